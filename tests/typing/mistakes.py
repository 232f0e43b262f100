"""Mistakes that a type checker must report: each in a line of its own that ends in `# refused`, and nothing else."""

from typing import assert_type

from torch import Tensor

import nondual
from nondual import MultiHeadAttention, attention, flash_attention, selective_scan, ssd
from nondual.extensions import DecayingAttention, HeadFusion, TalkingHeads


def mistakes(q: Tensor, A: Tensor) -> None:
    attention(q, q, q, impl="fast")  # refused
    attention(q, q, causal=True)  # refused
    flash_attention(q, q, q, impl="flash")  # refused
    flash_attention(q, q, q, windows=5)  # refused
    selective_scan(q, q, A, q, q, impl="cuda")  # refused
    selective_scan(q, q, A, q, q, discretization="euler")  # refused
    ssd(q, q, A, q, q, impl="cpu")  # refused
    nondual.atention(q, q, q)  # refused
    attention(q, q, q, return_weights=True).sum()  # refused
    assert_type(attention(q, q, q), tuple[Tensor, Tensor])  # refused
    MultiHeadAttention(12, "3")  # refused
    DecayingAttention(12, 3)(q, return_weights=True).sum()  # refused
    TalkingHeads(3)(q, q, q, masks=None)  # refused
    HeadFusion(4)(q, q, q, return_weights=True).sum()  # refused
