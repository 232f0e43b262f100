"""The essay's proposals for what could come next, each as a mixer, or as what joins queries, keys and values in one.

continuous        positions that are query and key at once: scores without fixed roles, and a flow down one energy
self_liberating   attention that decays over time, scores that persist over depth, and a stream with a certified error
head_fusion       heads that condition one another: talking heads, and heads that attend to one another
recognition       a reward for naming the stored task, and the index between recalling a task and constructing it
"""

from nondual.extensions.continuous import EnergyFlow, Roles, euler
from nondual.extensions.head_fusion import HeadFusion, TalkingHeads, alone, among, fixed_point, iterate
from nondual.extensions.recognition import Named, Recogniser, recognition_index, recurring, zipf
from nondual.extensions.self_liberating import CertifiedStream, DecayingAttention, PersistentScores, decay_between

__all__ = [
    "CertifiedStream",
    "DecayingAttention",
    "EnergyFlow",
    "HeadFusion",
    "Named",
    "PersistentScores",
    "Recogniser",
    "Roles",
    "TalkingHeads",
    "alone",
    "among",
    "decay_between",
    "euler",
    "fixed_point",
    "iterate",
    "recognition_index",
    "recurring",
    "zipf",
]
