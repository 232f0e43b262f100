"""The essay's proposals for what could come next, each as a mixer, or as what joins queries, keys and values in one.

continuous    positions that are query and key at once: scores without fixed roles, and a flow down one energy
head_fusion   heads that condition one another: talking heads, and heads that attend to one another
"""

from nondual.extensions.continuous import EnergyFlow, Roles, euler
from nondual.extensions.head_fusion import HeadFusion, TalkingHeads, alone, among, fixed_point, iterate

__all__ = [
    "EnergyFlow",
    "HeadFusion",
    "Roles",
    "TalkingHeads",
    "alone",
    "among",
    "euler",
    "fixed_point",
    "iterate",
]
