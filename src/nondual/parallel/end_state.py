"""What a part of a sequence makes of the state before it: h -> D h + S, in time and memory linear in the part.

S is where the part leads from a state of zero, D the total decay of its steps. Neither needs what the part's queries
read, so that no matrix of T x T is formed: where a head has one decay, or each channel of the keys one, S is a single
product of matrices,

    S = Σ_s (decay of all steps after s) (what step s writes)

For the selective scan, whose decay differs in every channel and state, S is a scan. For the delta rule D is a matrix,
the product of all exp(g_t) (I - β_t k_t k_tᵀ): S and D are the last states of one call, from zero and from the identity
in columns of their own, which nothing is written to.

A decay is the exponential of a sum of logs, in float64. Where a state grows (A above 0), its growth over the whole part
must be finite in the dtype of states. After a reset D is 0.

Source: Dao and Gu 2024 (2405.21060), section 6, step 2, for S as a product; Yang et al. 2024 (2406.06484), section 3.2,
for the delta rule's transition. Symbols as in the operations.
"""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from nondual.ops import linear_attention, selective_scan
from nondual.ops.autocast import autocast_off
from nondual.ops.discretize import step_length
from nondual.ops.dtypes import accumulation_dtype
from nondual.ops.linear_attention.inputs import Inputs as LinearAttentionInputs
from nondual.ops.selective_scan.inputs import Inputs as SelectiveScanInputs
from nondual.ops.ssd.chunked import log_decay
from nondual.ops.ssd.inputs import Inputs as SSDInputs
from nondual.ops.ssd.reference import wide

Inputs = TypeVar("Inputs", SelectiveScanInputs, SSDInputs, LinearAttentionInputs)


class EndState(NamedTuple):
    """h -> decay h + added, both in float32, or float64 for float64.

    Attributes:
        added: S, in the shape of a state.
        decay: D, in that shape or with 1 in place of a size; for the delta rule a matrix (B, H, D, D).
    """

    added: Tensor
    decay: Tensor


def of_selective_scan(given: SelectiveScanInputs, impl: selective_scan.Impl) -> EndState:
    """S and D (B, D, N).

    Args:
        given: checked.
        impl: as in `nondual.ops.selective_scan`.
    """
    _, added = selective_scan.run(given._replace(D=None, z=None, state=None), impl)
    dtype = accumulation_dtype(given.u.dtype)
    bias = None if given.delta_bias is None else given.delta_bias.to(dtype)
    time = step_length(given.delta.to(dtype), bias, given.delta_softplus).sum(1, dtype=torch.float64)  # (B, D)
    return EndState(added, _exp(time[..., None] * given.A.double(), given.reset, dtype))


def of_ssd(given: SSDInputs) -> EndState:
    """S (B, H, P, N) and D (B, H, 1, 1)."""
    x, delta, A, B, bias = wide(given.x, given.delta, given.A, given.B, given.delta_bias)
    delta = step_length(delta, bias, given.delta_softplus)
    log = log_decay(delta, A)  # (B, L, H)
    forgotten = before_last_reset(given.reset)
    # --8<-- [start:ssd]
    weight = after(log, 1, forgotten).exp().to(x.dtype) * delta
    written = _without((weight[..., None] * x), forgotten).unflatten(2, (B.shape[2], -1))  # (B, L, G, R, P)
    with autocast_off(x.device.type):
        added = torch.einsum("blgrp,blgn->bgrpn", written, _without(B, forgotten)).flatten(1, 2)
    decay = _exp(log.sum(1), given.reset, x.dtype)
    # --8<-- [end:ssd]
    return EndState(added, decay[..., None, None])


def of_linear_attention(given: LinearAttentionInputs) -> EndState:
    """S (B, H, D, Dv), with one more column for the normaliser; D with 1 for each size that it does not differ in."""
    if given.beta is not None:
        return _of_delta_rule(given)
    full = given._replace(q=given.q[..., :0], state=None).in_full()  # queries change nothing
    k, v, log = full.k, full.v, full.steps()
    forgotten = before_last_reset(given.reset)
    forgotten = None if forgotten is None else forgotten[:, None]  # (B, 1, N)
    if log is None:
        decay = _exp(k.new_zeros(1, 1, 1, dtype=torch.float64), given.reset, k.dtype)
    else:
        log = log.expand(-1, -1, k.shape[2], -1)  # (1 or B, H, N, 1 or D)
        k = after(log, 2, forgotten).exp().to(k.dtype) * k
        decay = _exp(log.sum(2), given.reset, k.dtype)
    with autocast_off(k.device.type):
        added = _without(k, forgotten).mT @ _without(v, forgotten)
    return EndState(added, decay[..., None])


def _of_delta_rule(given: LinearAttentionInputs) -> EndState:
    q, k, v = given.q, given.k, given.v
    dtype, width, columns = accumulation_dtype(q.dtype), k.shape[3], v.shape[3]
    start = torch.eye(width, dtype=dtype, device=q.device).expand(*q.shape[:2], -1, -1)
    start = torch.cat([start.new_zeros(*q.shape[:2], width, columns), start], -1)
    v = torch.cat([v, v.new_zeros(*v.shape[:3], width)], -1)
    _, last = linear_attention.run(given._replace(v=v, state=start), "auto")
    return EndState(*last.split([columns, width], -1))


def without_steps(given: Inputs) -> Inputs:
    """The same inputs with no steps of time: what leaves a state as it is."""
    cut = {}
    for name, x in given._asdict().items():
        dim = {"q": 2, "k": 2, "v": 2, "log_decay": 2, "beta": 2}.get(name, 1)
        timed = name in ("reset", "x", "u", "delta", "z") or (isinstance(x, Tensor) and x.ndim > 2 and name != "state")
        if isinstance(x, Tensor) and timed:
            cut[name] = x.narrow(dim, 0, 0)
    return given._replace(**cut)


# --- what comes after a step -----------------------------------------------------------------------------------------


def after(log: Tensor, dim: int, forgotten: Tensor | None) -> Tensor:
    """For each step the sum of the logs of all later ones along dim; -inf where a later step forgets it."""
    total = log.flip(dim).cumsum(dim).flip(dim) - log
    return total if forgotten is None else total.masked_fill(forgotten[..., None], -torch.inf)


def before_last_reset(reset: Tensor | None) -> Tensor | None:
    """True at the steps that a later reset forgets; steps lie along dimension 1."""
    if reset is None:
        return None
    return reset.flip(1).cumsum(1).flip(1) > reset.long()


def _without(x: Tensor, forgotten: Tensor | None) -> Tensor:
    """x with 0 where the mask, of its first dimensions, is True: a product of matrices would spread a NaN."""
    return (
        x if forgotten is None else x.masked_fill(forgotten.view(*forgotten.shape, *[1] * (x.ndim - forgotten.ndim)), 0)
    )


def _exp(log: Tensor, reset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The total decay, 0 where there is a reset; masked before the exponential, so that no gradient is 0 times NaN."""
    if reset is not None:
        log = log.masked_fill(reset.any(1).view(-1, *[1] * (log.ndim - 1)), -torch.inf)
    return log.exp().to(dtype)
