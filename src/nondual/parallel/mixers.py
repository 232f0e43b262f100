"""A model whose mixers hand on a state, made for one device, becomes that of a rank, which reads its part of time.

    model = CausalLM(256, 64, 4, layer=lambda i: MixerBlock(Mamba2(64), 64))
    shard_time(model)
    scores = model(ids[:, start:stop])                # (B, n, V), of this rank's part

Each mixer gets two functions in place of its own: the scan over ranks (`scan`), and what hands the convolution before
it the last inputs of the ranks before (`rows_before`). Parameters keep their names.
"""

from functools import partial
from typing import Any, TypeVar

from torch import nn

from nondual.efficient_attention.linear_attention.mixer import LinearMixer
from nondual.efficient_attention.linear_attention.retention import Retention
from nondual.efficient_attention.mamba import Mamba
from nondual.efficient_attention.mamba2 import Mamba2
from nondual.language_models.causal import CausalLM
from nondual.parallel.all_to_all import AllToAllAttention
from nondual.parallel.exchange import ranks_of
from nondual.parallel.history import rows_before
from nondual.parallel.inputs import Placing
from nondual.parallel.layout import contiguous
from nondual.parallel.places import RowPositions
from nondual.parallel.ring import RingAttention
from nondual.parallel.scan import parallel_linear_attention, parallel_selective_scan, parallel_ssd
from nondual.self_attention import MultiHeadAttention

M = TypeVar("M", bound=nn.Module)

SCANS: dict[type[nn.Module], Any] = {
    Mamba: parallel_selective_scan,
    Mamba2: parallel_ssd,
    LinearMixer: parallel_linear_attention,
}
"""What a mixer's `scan` becomes."""


def shard_time(model: M, group: Any = None, *, layout: Placing = contiguous) -> M:
    """Let every Mamba, Mamba-2 and mixer of linear attention in a model read this rank's part of time, in place.

    To be called on every rank, before the model is compiled or given to DDP or `fully_shard`, which need a position on
    each rank: one without any has no gradient for the weights of a convolution. Each rank then gives its
    contiguous part of the sequence, in the order of ranks. If a mixer is given caches, one on each rank, that of rank
    0 is read, and that of the last rank is then what one device has after the whole sequence.

    Args:
        model: a module. Its MultiHeadAttention must have been made for ranks: `op=RingAttention(layout)`, with a
            contiguous layout.
        group: the ranks: a process group, a mesh of one dimension, or None for all.
        layout: where the parts begin, for `Retention`, which turns queries and keys by their places; the others take
            any lengths.

    Returns:
        The same model.

    Raises:
        ValueError: a model without such a mixer, or with another mixer beside them; nothing has been changed then.
        RuntimeError: no process group.
    """
    ranks_of(group)
    found = _mixers(model)
    for mixer, scan in found:
        mixer.scan = partial(scan, group=group)
        mixer.rows_before = partial(rows_before, group=group)
        if isinstance(mixer, Retention) and mixer.positions is not None:
            mixer.positions = RowPositions(mixer.positions, layout, group)
    return model


def _mixers(model: nn.Module) -> list[tuple[Any, Any]]:
    """Every mixer that hands on a state, with its scan over ranks; an error where another one mixes positions."""
    kinds = tuple(SCANS)
    if isinstance(model, CausalLM):
        for i, layer in enumerate(model.layers):
            mixer = getattr(layer, "mixer", None)
            if not isinstance(mixer, (*kinds, MultiHeadAttention)):
                raise ValueError(
                    f"layer {i} must mix positions by Mamba, Mamba2, linear attention or MultiHeadAttention, got "
                    f"{type(mixer).__name__}"
                )
        if model.positions is not None:
            raise ValueError("model must add no positions to its embeddings: a rank would count its first row as 0")
    found = []
    for name, module in model.named_modules():
        if isinstance(module, MultiHeadAttention) and not isinstance(module.op, RingAttention | AllToAllAttention):
            raise ValueError(
                f"{name or 'model'} must attend over ranks, as MultiHeadAttention(op=RingAttention(contiguous)) does, "
                f"got op={module.op!r}"
            )
        found += [(module, scan) for kind, scan in SCANS.items() if isinstance(module, kind)]
    if not found:
        raise ValueError(f"model must have a mixer of {', '.join(kind.__name__ for kind in kinds)}, got none")
    return found
