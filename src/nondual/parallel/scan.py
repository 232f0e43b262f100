"""Scans over a sequence that is cut in time: each rank scans its own part, from the state that those before lead to.

1. end state      what this rank's part makes of any state, h -> D h + S (`end_state`); no outputs are computed
2. passed on      the state before this rank's part, from the D and S of all ranks before it (`passed_on`)
3. the operation  as on one device, from that state: outputs, skip, gate and resets, once

Where a head has one decay, step 1 is one product of matrices, as much work as it would be to add what the state before
contributes to each output afterwards; and the operation itself, whatever its engine, then rounds as it does on one
device. The selective scan has a decay for each channel and state, and its step 1 is a second scan. No rank forms a
tensor of time x state. The last rank, which nobody waits for, skips step 1.

On a CPU call torch.set_flush_denormal(True) first: the gradient of an end state decays backward through a long part
below 1e-38, where a CPU computes ten times as slowly.

Every rank gives its contiguous part of time, in the order of ranks; parts may differ in length, and be empty.

Source: Sun et al. 2024, LASP (2404.02882), for linear attention over ranks; Dao and Gu 2024 (2405.21060), section 8.2,
for the scan of Mamba-2. Symbols as in the operations; P ranks.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nondual.ops import linear_attention, selective_scan, ssd
from nondual.ops.discretize import Discretization
from nondual.ops.dtypes import accumulation_dtype
from nondual.ops.impl import choose
from nondual.ops.linear_attention.inputs import Inputs as LinearAttentionInputs
from nondual.ops.selective_scan.inputs import Inputs as SelectiveScanInputs
from nondual.ops.ssd.inputs import Inputs as SSDInputs
from nondual.parallel.end_state import EndState, of_linear_attention, of_selective_scan, of_ssd, without_steps
from nondual.parallel.exchange import Ranks, compared, naming_the_lost, not_compiled, note_sent, ranks_of
from nondual.parallel.inputs import device_of
from nondual.parallel.passed_on import carry, first_rank_gives, need_of_gradients

dist = torch.distributed

Inputs = TypeVar("Inputs", SelectiveScanInputs, SSDInputs, LinearAttentionInputs)


@not_compiled
def parallel_selective_scan(
    u: Float[Tensor, "b l d"],
    delta: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "..."],
    C: Float[Tensor, "..."],
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b l d"] | None = None,
    delta_bias: Float[Tensor, " d"] | None = None,
    delta_softplus: bool = False,
    state: Float[Tensor, "b d n"] | None = None,
    *,
    reset: Bool[Tensor, "b l"] | None = None,
    discretization: Discretization = "zoh-euler",
    impl: selective_scan.Impl = "auto",
    group: Any = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n"]]:
    """`nondual.ops.selective_scan.selective_scan` of a sequence whose parts lie on the ranks of a group.

    Every rank must make the call and, where it is differentiated, go backward through its own results: the others wait
    for it. The arguments are those of the operation, for this rank's part of time; these besides:

    Args:
        state: the state before the whole sequence (B, D, N), as rank 0 gives it; zero where that leaves it out. What
            other ranks give is not read.
        reset: given by all ranks, or by none.
        group: a process group, a mesh of one dimension, or None for all ranks.

    Returns:
        y (B, L, D) of this rank's steps, and the state after them (B, D, N): on the last rank the one after the whole
        sequence, which no other rank has.

    Raises:
        TypeError: what is not a tensor.
        ValueError: on every rank alike: what the operation refuses; sizes that differ between ranks in more than the
            steps; a state that rank 0 does not give.
        RuntimeError: no process group, a rank that does not answer, a second derivative, or as the operation.
    """
    ranks, call = ranks_of(group), "parallel_selective_scan"

    def check() -> tuple[SelectiveScanInputs, dict[str, int]]:
        given = selective_scan.checked(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, reset, discretization
        )
        choose(impl, selective_scan.ENGINES, given)
        return given, {"batch size": u.shape[0], "number of channels": u.shape[2], "number of states": A.shape[1]}

    given = _told(ranks, call, check, u)
    return _from_the_state_before(
        ranks, call, given, lambda part: of_selective_scan(part, impl), lambda part: selective_scan.run(part, impl)
    )


@not_compiled
def parallel_ssd(
    x: Float[Tensor, "b l h p"],
    delta: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "..."],
    C: Float[Tensor, "..."],
    D: Float[Tensor, "..."] | None = None,
    z: Float[Tensor, "b l h p"] | None = None,
    delta_bias: Float[Tensor, " h"] | None = None,
    delta_softplus: bool = False,
    state: Float[Tensor, "b h p n"] | None = None,
    *,
    reset: Bool[Tensor, "b l"] | None = None,
    chunk: int | None = None,
    impl: ssd.Impl = "auto",
    group: Any = None,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """`nondual.ops.ssd.ssd` of a sequence whose parts lie on the ranks of a group.

    Every rank must make the call and, where it is differentiated, go backward through its own results: the others wait
    for it. The arguments are those of the operation, for this rank's part of time; these besides:

    Args:
        A: as in the operation; above 0, the growth over a rank's whole part must be finite in float32 (float64).
        state: the state before the whole sequence (B, H, P, N), as rank 0 gives it; zero where that leaves it out. What
            other ranks give is not read.
        reset: given by all ranks, or by none.
        group: a process group, a mesh of one dimension, or None for all ranks.

    Returns:
        y (B, L, H, P) of this rank's steps, and the state after them (B, H, P, N): on the last rank the one after the
        whole sequence, which no other rank has.

    Raises:
        TypeError: what is not a tensor.
        ValueError: on every rank alike: what the operation refuses; sizes that differ between ranks in more than the
            steps; a state that rank 0 does not give.
        RuntimeError: no process group, a rank that does not answer, a second derivative, or as the operation.
    """
    ranks, call = ranks_of(group), "parallel_ssd"

    def check() -> tuple[SSDInputs, dict[str, int]]:
        given = ssd.checked(x, delta, A, B, C, D, z, delta_bias, delta_softplus, state, reset, chunk)
        choose(impl, ssd.ENGINES, given)
        batch, _, heads, width = x.shape
        sizes = {"batch size": batch, "number of heads": heads, "head width": width, "number of states": B.shape[-1]}
        return given, sizes

    given = _told(ranks, call, check, x)
    return _from_the_state_before(ranks, call, given, of_ssd, lambda part: ssd.run(part, impl))


@not_compiled
def parallel_linear_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m dv"],
    *,
    log_decay: Float[Tensor, "..."] | None = None,
    beta: Float[Tensor, "b h n"] | None = None,
    normalise: bool = False,
    causal: bool = True,
    scale: float = 1.0,
    state: Float[Tensor, "b h d dv_"] | None = None,
    reset: Bool[Tensor, "b n"] | None = None,
    chunk: int | None = None,
    impl: linear_attention.Impl = "auto",
    group: Any = None,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h d dv_"]]:
    """`nondual.ops.linear_attention.linear_attention` of a sequence whose parts lie on the ranks of a group.

    Every rank must make the call and, where it is differentiated, go backward through its own results: the others wait
    for it. With `beta` ranks pass on a matrix D x D for each head beside the state, the product of their transitions.
    Without `causal` the states of all ranks are added up, and each query reads the sum.

    The arguments are those of the operation, for this rank's part of the sequence; these besides:

    Args:
        log_decay: as in the operation; above 0, the growth over a rank's whole part must be finite in float32
            (float64).
        state: the state before the whole sequence, as rank 0 gives it; zero where that leaves it out. What other ranks
            give is not read.
        reset: given by all ranks, or by none.
        group: a process group, a mesh of one dimension, or None for all ranks.

    Returns:
        out (B, H, N, Dv) of this rank's queries, and the state after its part (B, H, D, Dv), or (B, H, D, Dv + 1) with
        normalise: on the last rank the one after the whole sequence, which no other rank has. Without causal every rank
        has the sum.

    Raises:
        TypeError: what is not a tensor.
        ValueError: on every rank alike: what the operation refuses; sizes or options that differ between ranks in more
            than the steps; a state that rank 0 does not give.
        RuntimeError: no process group, a rank that does not answer, a second derivative, or as the operation.
    """
    ranks, call = ranks_of(group), "parallel_linear_attention"

    def check() -> tuple[LinearAttentionInputs, dict[str, int]]:
        given = linear_attention.checked(q, k, v, log_decay, beta, normalise, causal, scale, state, reset, chunk)
        choose(impl, linear_attention.ENGINES, given)
        return given, {
            "batch size": q.shape[0],
            "number of heads": q.shape[1],
            "head width": q.shape[3],
            "value width": v.shape[3],
            "number of dimensions of log_decay": 0 if log_decay is None else log_decay.ndim,
            "beta": int(beta is not None),
            "normalise": int(given.normalise),
            "causal": int(given.causal),
        }

    def run(part: LinearAttentionInputs) -> tuple[Tensor, Tensor]:
        return linear_attention.run(part, impl)

    given = _told(ranks, call, check, q)
    if not given.causal:
        return _from_the_sum(ranks, call, given, run)
    product = torch.mul if beta is None else torch.matmul
    return _from_the_state_before(ranks, call, given, of_linear_attention, run, product)


# --- what the three share ------------------------------------------------------------------------------------------


def _told(ranks: Ranks, call: str, check: Callable[[], tuple[Inputs, Mapping[str, int]]], lead: object) -> Inputs:
    """The inputs, checked on every rank and compared with those of the others, with rank 0's state there alone."""
    checked: list[Inputs] = []

    def tell() -> dict[str, int]:
        given, sizes = check()
        checked.append(given)
        return {
            **sizes,
            "bytes of a number in a state": accumulation_dtype(given[0].dtype).itemsize,
            "reset": int(given.reset is not None),
            "state": int(given.state is not None),
            "need of gradients": int(_learns(given)),
        }

    told = compared(ranks, call, tell, device_of(ranks, lead), may_differ=("state",))
    first_rank_gives(call, "state", [of_rank["state"] for of_rank in told])
    (given,) = checked
    return given if ranks.rank == 0 else given._replace(state=None)


def _learns(given: Inputs) -> bool:
    return need_of_gradients(*(x for x in given if isinstance(x, Tensor)))


def _from_the_state_before(
    ranks: Ranks,
    call: str,
    given: Inputs,
    end_state: Callable[[Inputs], EndState],
    run: Callable[[Inputs], tuple[Tensor, Tensor]],
    product: Callable[[Tensor, Tensor], Tensor] = torch.mul,
) -> tuple[Tensor, Tensor]:
    """Steps 1 to 3 of this file."""
    if ranks.size == 1:
        return run(given)
    # --8<-- [start:steps]
    last = ranks.rank == ranks.size - 1
    added, decay = end_state(without_steps(given) if last else given)
    initial = None if given.state is None else given.state.to(added.dtype)
    through = _with_gradients(given)
    before, passed = carry(ranks, call, added, decay, initial, product, list(through.values()))
    out, after = run(given._replace(state=before, **dict(zip(through, passed))))
    # --8<-- [end:steps]
    return _reaching(out, passed), after


def _with_gradients(given: Inputs) -> dict[str, Tensor]:
    """The inputs that backward comes to, and the first of all, which a rank without steps returns no more than."""
    if not _learns(given):
        return {}
    tensors = {name: x for name, x in given._asdict().items() if isinstance(x, Tensor)}
    first = next(iter(tensors))
    return {name: x for name, x in tensors.items() if name == first or (x.requires_grad and name != "state")}


def _reaching(out: Tensor, passed: list[Tensor]) -> Tensor:
    """An output without steps, so that backward comes by all the same, with a gradient of 0 for each input."""
    return out + sum(x.sum() for x in passed) if passed and out.numel() == 0 else out


def _from_the_sum(
    ranks: Ranks,
    call: str,
    given: LinearAttentionInputs,
    run: Callable[[LinearAttentionInputs], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Without an order of steps: the sum of all ranks' states, which each query reads."""
    if ranks.size == 1:
        return run(given)
    total = of_linear_attention(given).added
    total = total if given.state is None else total + given.state.to(total.dtype)
    through = _with_gradients(given)
    total, *passed = _Summed.apply(ranks, call, total, *through.values())
    given = given._replace(state=total, **dict(zip(through, passed)))
    out, total = run(given._replace(k=given.k[:, :, :0], v=given.v[:, :, :0]))
    return _reaching(out, passed), total


class _Summed(torch.autograd.Function):
    """The sum over all ranks, and tensors that go through as they are: see `carry`."""

    @staticmethod
    def forward(ctx, ranks, call, x, *through):
        ctx.ranks, ctx.call, ctx.shape = ranks, call, x.shape
        return _all_reduced(ranks, call, x), *through

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        d_total, *d_through = gradients
        return None, None, _all_reduced(ctx.ranks, ctx.call, d_total), *d_through


def _all_reduced(ranks: Ranks, call: str, x: Tensor) -> Tensor:
    """The sum over ranks. Counted as what a ring sends: (P - 1)/P of x to be added up, and as much to hand it round."""
    total = x.clone(memory_format=torch.contiguous_format)
    share = total.flatten()[: total.numel() * (ranks.size - 1) // ranks.size]
    note_sent(share)
    note_sent(share)
    with naming_the_lost(ranks, call):
        dist.all_reduce(total, group=ranks.group)
    return total
