"""Attention over a sequence that is cut: keys and values go round a ring of ranks, and the queries stay.

    causal       the work is even where the layout is `zigzag`; where it is `contiguous` the last rank has almost twice
                 the mean
    documents    several sequences packed into one, each of which sees itself alone
    window       only the keys in reach are sent, to those who need them (`nondual.parallel.halo`); nothing goes round

The rounds are in `nondual.parallel.rounds`. Any number of heads will do, and no rank holds more than its part of the
sequence and two parts of keys and values; what a rank sends does not fall with the number of ranks.

Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers" (2310.01889), section 3; causal work: Brandon et
al. 2023, "Striped Attention" (2311.09431); its zig-zag order and documents: Llama 3 (Dubey et al. 2024, 2407.21783),
section 3.3.2. Symbols: P ranks, N positions, n of them on this rank; B batch, H query heads, G key/value heads, D head
width, Dv width of the values.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from nondual.ops.autocast import as_autocast_does
from nondual.ops.flash_attention import check_window
from nondual.ops.flash_attention.partial import engine_of
from nondual.parallel.exchange import Ranks, not_compiled
from nondual.parallel.halo import windowed_attention
from nondual.parallel.inputs import OverRanks, Placing, checked_rows, refuse_options, refuse_transforms
from nondual.parallel.pieces import fragments
from nondual.parallel.rounds import Ring, round_the_ring

Impl: TypeAlias = Literal["auto", "reference", "triton"]


def ring_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g n d"],
    v: Float[Tensor, "b g n dv"],
    layout: Placing,
    *,
    group: Any = None,
    causal: bool = False,
    window: int | None = None,
    documents: Sequence[int] | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "b h n dv"]:
    """Each query's weighted mean of the values of all ranks, as `flash_attention` gives it for the whole sequence.

    Every rank must make the call and, where it is differentiated, go backward through its own output: the others wait
    for it. A rank may hold no rows. Sums over ranks, those of gradients too, are in float32 or wider.

    A row of NaN reaches the rows that see it. In a causal call it can reach others of its own piece too, as in
    `flash_attention`, but none of a piece before it and none of another document.

    Args:
        q: this rank's queries (B, H, n, D), rows in the layout's order; float64, float32, float16 or bfloat16.
        k: its keys (B, G, n, D). H must be a multiple of G.
        v: its values (B, G, n, Dv).
        layout: which rank holds which positions: a `Layout`, or a function of N and P that gives it, such as `zigzag`.
        group: the ranks: a process group, a mesh of one dimension, or None for all.
        causal: each query sees its own position and those before.
        window: each query sees the last `window` keys, its own included; it looks back only, whether `causal` is True
            or not. Then a rank holds, besides its rows, the keys in their reach. A window that reaches over the longest
            document leaves all that are before.
        documents: the lengths of several sequences that are packed along N, in their order, summing to N; a query sees
            keys of its own sequence alone. One for all N where left out.
        scale: factor on q · k; 1/√D where left out.
        impl: "reference" or "triton", engines of `nondual.ops.flash_attention`; "auto" takes "triton" on a GPU that can
            run it. (With a window "auto" takes "sdpa" too, as there.)

    Returns:
        This rank's rows of the output (B, H, n, Dv), in q's dtype.

    Raises:
        TypeError: q, k or v is not a tensor, layout neither a Layout nor a function, or documents no sequence.
        ValueError: on every rank alike: rows that do not fit together, the layout, or those of the other ranks; a
            window below 1; documents that are no lengths or do not sum to N; an engine that cannot
            hold these tensors.
        RuntimeError: no process group, a rank that does not answer, or a second derivative. A forward-mode derivative
            or a transform of torch.func.
    """
    return _attention("ring_attention", q, k, v, layout, group, causal, window, documents, scale, impl)


@dataclass(frozen=True)
class RingAttention(OverRanks):
    """What `MultiHeadAttention(op=...)` calls, over `ring_attention`; it has no parameters.

        MultiHeadAttention(512, 8, causal=True, op=RingAttention(zigzag))

    Attributes:
        layout: as in `ring_attention`.
        group: the ranks; all where None.
        window: how many keys a query sees, its own included; it makes the module causal. All where None.
        documents: lengths of sequences packed along N; None for one.
        scale: factor on q · k; 1/√D where None.
        impl: as in `ring_attention`.
    """

    layout: Placing
    group: Any = None
    window: int | None = None
    documents: Sequence[int] | None = None
    scale: float | None = None
    impl: Impl = "auto"

    def __call__(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g n d"],
        v: Float[Tensor, "b g n dv"],
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        return_weights: bool = False,
    ) -> Float[Tensor, "b h n dv"]:
        """Attention of this rank's rows to those of all ranks.

        Args:
            q: queries (B, H, n, D).
            k: keys (B, G, n, D), H a multiple of G.
            v: values (B, G, n, Dv).
            mask: None. Which keys a query sees follows from positions alone: causal, window and documents.
            causal: no query sees a later key.
            dropout: 0.
            return_weights: False.

        Returns:
            out (B, H, n, Dv).

        Raises:
            TypeError: as in `ring_attention`.
            ValueError: a mask, a dropout or the weights are asked for; or as in `ring_attention`.
            RuntimeError: as in `ring_attention`.
        """
        options = causal, self.window, self.documents, self.scale, self.impl
        asked = (mask, dropout, return_weights)
        return _attention("RingAttention", q, k, v, self.layout, self.group, *options, asked)


@not_compiled
def _attention(
    call, q, k, v, layout, group, causal, window, documents, scale, impl, asked=(None, 0.0, False)
) -> Tensor:
    given = [x for x in (q, k, v) if isinstance(x, Tensor)]
    refuse_transforms(call, q, k, v)

    def refuse(_: Ranks) -> None:
        refuse_options(call, *asked)
        _check_options(window, documents)
        if len(given) == 3 and impl != "auto":
            engine_of(impl, *as_autocast_does(q, k, v))

    causal = causal or window is not None
    options = {
        "causal": causal,
        "window": window if isinstance(window, int) else None,
        "documents (a checksum)": zlib.crc32(repr(tuple(documents)).encode()) if _is_sequence(documents) else None,
        "scale": None if scale is None else float(scale),
        "need of gradients of k or v": torch.is_grad_enabled() and any(x.requires_grad for x in given[1:]),
    }
    ranks, layout, q, k, v = checked_rows(call, q, k, v, layout, group, options=options, refuse=refuse)
    if documents is not None and sum(documents) != layout.length:
        raise ValueError(
            f"documents must sum to the {layout.length} positions of the layout, got {sum(documents)}: "
            f"{_shortened(documents)}"
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    held = [fragments(layout, rank, documents) for rank in range(layout.size)]
    if window is not None and window < (layout.length if documents is None else max(documents, default=0)):
        return windowed_attention(ranks, held, q, k, v, window, scale, impl)
    ring = Ring(ranks, held, layout.lengths, causal, scale, engine_of(impl, q, k, v))
    return round_the_ring(q, k, v, ring)


def _check_options(window: object, documents: object) -> None:
    """Refuse a window or documents that are none."""
    check_window(window)
    if documents is None:
        return
    if not _is_sequence(documents):
        raise TypeError(f"documents must be a sequence of lengths or None, got {type(documents).__name__}")
    if any(isinstance(x, bool) or not isinstance(x, int) or x < 0 for x in documents):
        raise ValueError(f"documents must be lengths, integers of 0 or more, got {_shortened(documents)}")


def _is_sequence(x: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(x, Sequence) and not isinstance(x, str)


def _shortened(lengths: Sequence[object]) -> str:
    """The first few of them."""
    return f"{list(lengths[:8])}"[:-1] + (", …]" if len(lengths) > 8 else "]")
