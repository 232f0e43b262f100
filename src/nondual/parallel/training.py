"""A language model trained with each sequence cut over ranks: what a rank reads, and a loss over the tokens of all.

    model = DistributedDataParallel(shard_sequence(model, zigzag, mesh["sequence"], op=RingAttention))
    inputs, targets = shard_tokens(ids, zigzag, mesh["sequence"])        # ids (B, N + 1) to (B, n) each
    parallel_token_loss(model(inputs), targets).backward()               # gradients: those of one device

Parameters are the same on every rank, and their gradients are averaged over ranks, by DDP or by `fully_shard`, as with
ranks that read other sequences. Targets are cut after they are moved by one place, since the token that follows a
rank's last row lies on another.

Symbols: P ranks, N positions of the whole sequence, n of them on this rank; B sequences, V tokens in the vocabulary.
"""

import zlib
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nondual.ops.checks import check_tensors
from nondual.ops.dtypes import at_least_float32
from nondual.parallel.exchange import Ranks, compared, naming_the_lost, not_compiled, ranks_of
from nondual.parallel.inputs import Placing, device_of, layout_of

dist = torch.distributed

IGNORED = -100
"""The target of a position that predicts nothing, as in `torch.nn.functional.cross_entropy`."""


@not_compiled
def shard_tokens(
    ids: Int[Tensor, "b m"], layout: Placing, group: Any = None
) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
    """This rank's part of a batch: the tokens that it reads, and for each the token that follows it.

    Args:
        ids: (B, N + 1), the whole sequences, the same on every rank of the group.
        layout: which rank holds which of the N positions: a `Layout`, or a function of N and P that gives it.
        group: the ranks: a process group, a mesh of one dimension, or None for all.

    Returns:
        inputs (B, n) and targets (B, n), rows in the layout's order.

    Raises:
        TypeError: ids is not a tensor.
        ValueError: on every rank alike: ids that are not integers (B, N + 1), or not the same on every rank; a layout
            of another length or for another number of ranks.
        RuntimeError: no process group, or a rank does not answer.
    """
    ranks = ranks_of(group)

    def check() -> dict[str, int]:
        check_tensors({"ids": ids})
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool or not ids.shape[1]:
            raise ValueError(f"ids must be integers (B, N + 1), got {ids.dtype} {tuple(ids.shape)}")
        cut = layout_of(layout, ids.shape[1] - 1, ranks.size)
        if (cut.length, cut.size) != (ids.shape[1] - 1, ranks.size):
            raise ValueError(
                f"layout must be of {ids.shape[1] - 1} positions, one fewer than ids has, over {ranks.size} ranks, got "
                f"{cut.length} over {cut.size}"
            )
        checksum = zlib.crc32(ids.detach().cpu().contiguous().numpy().tobytes())
        return {"batch size": ids.shape[0], "number of tokens": ids.shape[1], "ids (their checksum)": checksum}

    compared(ranks, "shard_tokens", check, device_of(ranks, ids))
    cut = layout_of(layout, ids.shape[1] - 1, ranks.size)
    return cut.shard(ids[:, :-1], ranks.rank, dim=1), cut.shard(ids[:, 1:], ranks.rank, dim=1)


@not_compiled
def parallel_token_loss(
    scores: Float[Tensor, "b n v"], targets: Int[Tensor, "b n"], group: Any = None
) -> Float[Tensor, ""]:
    """The mean cross-entropy, in nats, of the tokens of all ranks; the same number on every rank.

    Its gradient on a rank is P times that of the rank's own share in the mean, so that the mean of the gradients over
    ranks, which DDP and `fully_shard` take, is the gradient of the whole. Ranks with more tokens count for more, which
    a mean of each rank's mean would not give. Going backward sends nothing.

    Args:
        scores: (B, n, V) of this rank's rows, any floating dtype; their softmax is taken in float32 or better.
        targets: (B, n), any integer dtype: the token that follows each, or -100 where none is to be predicted.
        group: all ranks over which gradients are averaged: the ranks of the sequence, and where there are other
            sequences on others, those too. None for all of the job.

    Returns:
        A number, in float32 or better: 0, and so are its gradients, where nothing is to be predicted.

    Raises:
        TypeError: scores or targets is not a tensor.
        ValueError: on every rank alike: shapes or dtypes that do not fit.
        RuntimeError: no process group, or a rank does not answer.
    """
    ranks = ranks_of(group)

    def check() -> dict[str, int]:
        check_tensors({"scores": scores, "targets": targets})
        if scores.ndim != 3 or not scores.is_floating_point():
            raise ValueError(f"scores must be floating point (B, n, V), got {scores.dtype} {tuple(scores.shape)}")
        shape = tuple(scores.shape[:2])
        if tuple(targets.shape) != shape or targets.is_floating_point() or targets.dtype == torch.bool:
            raise ValueError(f"targets must be integers (B, n) = {shape}, got {targets.dtype} {tuple(targets.shape)}")
        return {"vocabulary": scores.shape[2], "tokens": int((targets != IGNORED).sum())}

    told = compared(ranks, "parallel_token_loss", check, device_of(ranks, scores), may_differ=("tokens",))
    tokens = max(sum(of_rank["tokens"] for of_rank in told), 1)
    # --8<-- [start:loss]
    own = F.cross_entropy(
        at_least_float32(scores).flatten(0, 1), targets.long().flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return _SumOverRanks.apply(own / tokens, ranks)
    # --8<-- [end:loss]


class _SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' shares; backward each rank's own share, times P for the mean that is taken of gradients."""

    @staticmethod
    def forward(ctx, share: Tensor, ranks: Ranks) -> Tensor:
        ctx.size = ranks.size
        whole = share.clone()
        with naming_the_lost(ranks, "parallel_token_loss"):
            dist.all_reduce(whole, group=ranks.group)
        return whole

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.size, None
