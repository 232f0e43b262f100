"""The scan in plain torch, for where there is no C compiler: chunk by chunk, in memory linear in L.

Time comes first within a chunk of T steps, so that the numbers of a step lie together: x is (T, B, D), states are
(T, B, D, N), and B and C are (T, B, G, N), or (D, N) where they do not depend on time. The gradient of each of
`to_states`, `from_states` and `outer` is made of the other two.

Results are contiguous whatever the layout of the inputs, as those of the compiled loop are. Tensors (T, B, D, N) are
made once for a call and overwritten by each chunk (`out`, `scratch`): fresh memory would cost page faults each time.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nondual.ops.discretize import step_length
from nondual.ops.selective_scan.cpu.memory import CHUNK, Given, between_chunks, copy, empty, empty_outputs
from nondual.ops.selective_scan.inputs import Inputs


def forward(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state and the checkpoints. All inputs are in float32, or all in float64."""
    u, delta, A, B, C, D, z, bias, softplus, state, reset, _ = given
    y, last, checkpoints = empty_outputs(u, A)
    saved = between_chunks(checkpoints, u, A)
    memory = for_states(3, u, A)
    h = torch.zeros_like(last) if state is None else state
    for start in range(0, u.shape[1], CHUNK):
        if start:
            saved[:, start // CHUNK - 1] = h
        u_, delta_, B_, C_, z_ = chunk(start, u, delta, B, C, z)
        delta_ = step_length(delta_, bias, softplus)
        a, hs, scratch = (x[: len(u_)] for x in memory)
        scan(h, delta_, delta_ * u_, A, B_, resets_of(start, reset), a, hs)
        h = hs[-1].clone()
        y_ = from_states(hs, C_, scratch)
        if D is not None:
            y_ += D * u_
        if z_ is not None:
            y_ *= F.silu(z_)
        y[:, start : start + CHUNK] = y_.transpose(0, 1)
    return y, last.copy_(h), checkpoints


def backward(dout: Tensor, dlast: Tensor | None, checkpoints: Tensor, given: Inputs) -> tuple[Tensor | None, ...]:
    """The gradients of u, delta, A, B, C, D, z, bias and the initial state; None for what was not given."""
    u, delta, A, B, C, D, z, bias, softplus, state, reset, _ = given
    du, ddelta = empty(u, *u.shape), empty(u, *u.shape)
    dz = None if z is None else empty(u, *u.shape)
    dA, dB, dC = (x.new_zeros(x.shape) for x in (A, B, C))
    dD, dbias = (None if x is None else x.new_zeros(x.shape) for x in (D, bias))
    saved = between_chunks(checkpoints, u, A)
    memory = for_states(4, u, A)
    g = A.new_zeros(u.shape[0], *A.shape) if dlast is None else dlast
    for start in reversed(range(0, u.shape[1], CHUNK)):
        here, resets = slice(start, start + CHUNK), resets_of(start, reset)
        u_, raw, B_, C_, z_, dout_ = chunk(start, u, delta, B, C, z, dout)
        raw = raw if bias is None else raw + bias
        delta_ = F.softplus(raw) if softplus else raw
        dy = dout_ if z_ is None else dout_ * F.silu(z_)
        h = saved[:, start // CHUNK - 1] if start else torch.zeros_like(g) if state is None else state
        a, hs, gs, scratch = (x[: len(u_)] for x in memory)
        scan(h, delta_, delta_ * u_, A, B_, resets, a, hs)
        to_states(dy, C_, gs)
        for t in reversed(range(len(gs))):
            g = torch.add(gs[t], g, out=gs[t]) * a[t]
            if t in resets:
                g = g.masked_fill(resets[t], 0)
        for d, like, sums in ((dB, B_, outer(gs, delta_ * u_, B_, scratch)), (dC, C_, outer(hs, dy, C_, scratch))):
            if like.ndim == 2:
                d += sums
            else:
                d[:, here] = sums.transpose(0, 1)
        if dz is not None and z_ is not None:
            y = from_states(hs, C_, scratch)
            if D is not None:
                y += D * u_
            gate = torch.sigmoid(z_)
            dz[:, here] = (dout_ * y * gate * (1 + z_ * (1 - gate))).transpose(0, 1)
        dx = from_states(gs, B_, scratch)
        du_ = delta_ * dx
        if D is not None and dD is not None:
            du_ += D * dy
            dD += (dy * u_).sum((0, 1))
        du[:, here] = du_.transpose(0, 1)
        dstep = gs.mul_(a)  # the gradient of Δ A: g a times the state before
        dstep[0].mul_(h)
        dstep[1:].mul_(hs[:-1])
        for t, at in resets.items():
            dstep[t].masked_fill_(at, 0)
        dA += outer(dstep, delta_, A, scratch)
        ddelta_ = from_states(dstep, A, scratch) + u_ * dx
        if softplus:
            ddelta_ *= torch.sigmoid(raw).masked_fill_(raw > 20, 1)  # torch's softplus is the identity above 20
        if dbias is not None:
            dbias += ddelta_.sum((0, 1))
        ddelta[:, here] = ddelta_.transpose(0, 1)
    return du, ddelta, dA, dB, dC, dD, dz, dbias, None if state is None else copy(g)


# --- products between channels and states ----------------------------------------------------------------------------


def to_states(x: Tensor, B: Tensor, out: Tensor) -> Tensor:
    """B x: from channels to their states."""
    if B.ndim == 2:
        return torch.mul(x[..., None], B, out=out)
    groups = (B.shape[2], -1)
    torch.mul(x.unflatten(2, groups)[..., None], B[..., None, :], out=out.unflatten(2, groups))
    return out


def from_states(h: Tensor, C: Tensor, scratch: Tensor) -> Tensor:
    """Σ_n C h: from the states to their channel."""
    if C.ndim == 2:
        return torch.mul(h, C, out=scratch).sum(-1)
    return (h.unflatten(2, (C.shape[2], -1)) @ C[..., None]).flatten(2)


def outer(h: Tensor, x: Tensor, like: Tensor, scratch: Tensor) -> Tensor:
    """Σ h x in the shape of `like`, which is B, C or A: over the channels of a group, or over batch and time."""
    if like.ndim == 2:
        return torch.mul(h, x[..., None], out=scratch).sum((0, 1))
    groups = (like.shape[2], -1)
    return (x.unflatten(2, groups)[..., None, :] @ h.unflatten(2, groups)).squeeze(-2)


# --- a chunk of time -------------------------------------------------------------------------------------------------


def scan(
    h: Tensor, delta: Tensor, x: Tensor, A: Tensor, B: Tensor, resets: dict[int, Tensor], a: Tensor, hs: Tensor
) -> None:
    """Write exp(Δ A) and the states of a chunk into a and hs, from h, the state before it, and x = Δ u."""
    torch.mul(delta[..., None], A, out=a).exp_()
    to_states(x, B, hs)
    for t, (a_t, h_t) in enumerate(zip(a, hs)):
        if t in resets:
            h = h.masked_fill(resets[t], 0)
        h = torch.addcmul(h_t, a_t, h, out=h_t)


def chunk(start: int, *tensors: *Given) -> tuple[*Given]:
    """CHUNK steps of tensors (B, L, …), time first; (D, N) as it is."""
    given = cast("tuple[Tensor | None, ...]", tensors)
    parts = (x if x is None or x.ndim == 2 else x[:, start : start + CHUNK].transpose(0, 1) for x in given)
    return cast("tuple[*Given]", tuple(parts))


def for_states(count: int, u: Tensor, A: Tensor) -> list[Tensor]:
    """So many empty tensors for the states of a chunk (T, B, D, N)."""
    (batch, length, channels), states = u.shape, A.shape[1]
    return [empty(u, min(length, CHUNK), batch, channels, states) for _ in range(count)]


def resets_of(start: int, reset: Tensor | None) -> dict[int, Tensor]:
    """The steps of a chunk at which some sequence begins, and in which of the batch (B, 1, 1)."""
    (reset,) = chunk(start, None if reset is None else reset[..., None, None])
    return {} if reset is None else {t: reset[t] for t in reset.flatten(1).any(1).nonzero().flatten().tolist()}
