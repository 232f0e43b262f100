"""Continuous self-attention: positions that are query and key at once, by degrees or as a flow.

The scores of a head are X M Xᵀ with M = W_Q W_Kᵀ, and M = S + A has a symmetric part S and an antisymmetric part A.
Under S alone two positions score each other equally; that one of them asks and the other is asked comes from A.

    Roles        scores from S + λ A: λ = 1 is ordinary attention, λ = 0 knows no roles
    EnergyFlow   positions that move down one energy, so that each changes as a query and as a key

Sources: the two parts of M, Saponati et al. 2025 (2502.10927); symmetric scores, Courtois et al. 2024 (2406.06366) and
Kowsher et al. 2024 (2412.00359); the energy, Hoover et al. 2023, "Energy Transformer" (2302.07253), section 3. Symbols:
x (B, N, E), H heads of width D, P_ij the weight of key j for query i, β the inverse temperature, 1 / √D.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nondual.ops.attention import attention
from nondual.ops.autocast import autocast_off
from nondual.ops.checks import check_sizes, check_tensors
from nondual.ops.dtypes import at_least_float32
from nondual.weights import matrix_and_bias

Velocity = Callable[[Tensor], Tensor]
Solver = Callable[[Velocity, Tensor, float], Tensor]


class Roles(nn.Module):
    """What joins q, k and v in a `MultiHeadAttention`, with the antisymmetric part of its scores taken λ times.

        MultiHeadAttention(64, 4, causal=True, op=Roles(4, share=0.0))                # no roles
        MultiHeadAttention(64, 4, causal=True, op=Roles(4, share=0.5, learned=True))  # training finds λ, for each head

    The scores are (1 + λ)/2 q_i · k_j + (1 - λ)/2 k_i · q_j, which is S + λ A. They are formed as products of vectors
    of twice the width, so that any operation that joins q, k and v forms them. Rotary positions turn q and k before:
    then the content has no roles at λ = 0, and direction comes from place alone.

    Args:
        n_heads: H.
        share: λ, or where it starts.
        learned: whether λ is a parameter.
        op: what is given the wider queries and keys, called as `nondual.ops.attention.attention` is.

    Raises:
        ValueError: n_heads below 1, or a share that is not finite.
    """

    share: Tensor
    op: Callable[..., Any]

    def __init__(self, n_heads: int, share: float = 1.0, *, learned: bool = False, op: Callable[..., Any] = attention):
        super().__init__()
        check_sizes(n_heads=n_heads)
        if not math.isfinite(share):
            raise ValueError(f"share must be finite, got {share}: 1 is ordinary attention, 0 knows no roles")
        start = torch.full((n_heads,), float(share))
        if learned:
            self.share = nn.Parameter(start)
        else:
            self.register_buffer("share", start)
        self.op = op

    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
        *,
        scale: float | None = None,
        **options: Any,
    ) -> Any:
        """Attention with scores from S + λ A; what it returns is what the operation returns.

        Args:
            q: (B, H, N, D), of the positions that are also the keys.
            k: (B, H, N, D).
            v: (B, H, N, Dv).
            scale: by what the scores are multiplied; 1 / √D where left out.
            options: given to the operation as they are: mask, causal, dropout, return_weights.

        Raises:
            TypeError: q or k is not a tensor.
            ValueError: q and k of two shapes, as with a cache, a memory or grouped heads, or another number of heads.
        """
        check_tensors({"q": q, "k": k})
        if q.ndim != 4 or q.shape != k.shape or q.shape[1] != len(self.share):
            raise ValueError(
                f"q and k must be (B, {len(self.share)}, N, D) of the same positions, since each asks and is asked, "
                f"got {tuple(q.shape)} and {tuple(k.shape)}: leave out cache, memory and grouped heads"
            )
        # --8<-- [start:roles]
        share = self.share.to(q.dtype)[:, None, None]
        asking = torch.cat([(1 + share) / 2 * q, (1 - share) / 2 * k], -1)
        asked = torch.cat([k, q], -1)
        # --8<-- [end:roles]
        return self.op(asking, asked, v, scale=q.shape[-1] ** -0.5 if scale is None else scale, **options)


def euler(steps: int) -> Solver:
    """A solver of dx/dt = velocity(x): that many equal steps, each straight on.

    Its error at a fixed time falls as 1 / steps.

    Args:
        steps: how many steps.

    Raises:
        ValueError: steps below 1.
    """
    check_sizes(steps=steps)

    def solve(velocity: Velocity, x: Tensor, time: float) -> Tensor:
        for _ in range(steps):
            x = x + time / steps * velocity(x)
        return x

    return solve


class EnergyFlow(nn.Module):
    """Positions that flow down one energy, x (B, N, E) to how far each has come, (B, N, E): a mixer.

        TransformerLayer(EnergyFlow(64, 4), FeedForward(64, 256), 64, norm_first=True)

    With g = norm(x), q = g W_Q and k = g W_K,

        E(g) = -1/β Σ_h Σ_i log Σ_j exp(β q_hi · k_hj),        dx/dt = -∂E/∂g

    The gradient at a position has two parts: what it takes as a query, Σ_j P_ij k_j W_Qᵀ, and what it is given as a
    key, Σ_i P_ij q_i W_Kᵀ. There are no values and no W_O. Because the norm's Jacobian is symmetric and positive
    semidefinite, E never rises along the flow; in steps, where they are small enough.

    With `causal` a position may not be moved by a later one, which asks for it as a key. It then follows only its
    own part of the energy, i of the outer sum, and no one energy falls.

    W_Q and W_K are used both ways. What stands in the place of q_proj or k_proj, such as an adapter, or what a hook
    makes of their outputs, must be linear too, and without dropout: its matrix is then computed at every step.

    Args:
        d_model: E.
        n_heads: H.
        d_head: D; d_model / n_heads where left out.
        time: for how long the positions flow.
        solver: what carries them along, called as (velocity, x, time): `euler(4)` where left out; for an adaptive one
            `lambda f, x, t: torchdiffeq.odeint(lambda _, x: f(x), x, torch.tensor([0.0, t]))[-1]`.
        causal: no position is moved by a later one.
        eps: added to the variance in the norm.

    Raises:
        ValueError: a size below 1, heads that do not divide d_model, or a time that is not finite or not above 0.
    """

    n_heads: int
    d_head: int
    time: float
    causal: bool
    eps: float
    solver: Solver
    q_proj: nn.Linear
    k_proj: nn.Linear
    gain: nn.Parameter
    shift: nn.Parameter

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        d_head: int | None = None,
        time: float = 1.0,
        solver: Solver | None = None,
        causal: bool = False,
        eps: float = 1e-5,
    ):
        super().__init__()
        check_sizes(d_model=d_model, n_heads=n_heads)
        if d_head is None and d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}; or give d_head")
        d_head = d_model // n_heads if d_head is None else d_head
        check_sizes(d_head=d_head)
        if not 0 < time < math.inf:
            raise ValueError(f"time must be above 0 and finite, got {time}")
        self.n_heads, self.d_head, self.time, self.causal, self.eps = n_heads, d_head, time, causal, eps
        self.solver = euler(4) if solver is None else solver
        self.q_proj = nn.Linear(d_model, n_heads * d_head, bias=False)
        self.k_proj = nn.Linear(d_model, n_heads * d_head, bias=False)
        self.gain = nn.Parameter(torch.ones(()))  # one for all channels: otherwise the norm's Jacobian is not symmetric
        self.shift = nn.Parameter(torch.zeros(d_model))

    def forward(
        self, x: Float[Tensor, "b n e"], *, mask: Tensor | None = None, causal: bool | None = None
    ) -> Float[Tensor, "b n e"]:
        """How far each position has come after `time`, (B, N, E), to be added to x.

        Args:
            x: (B, N, E).
            mask: (N, N) or broadcastable to (B, H, N, N); True where a query may see a key.
            causal: no position is moved by a later one; as the module was made where left out.

        Raises:
            TypeError: x or mask is not a tensor.
            ValueError: x of another rank or width, or a mask that is not boolean or does not fit.
        """
        causal = self.causal if causal is None else causal
        self._check(x, mask)
        return self.solver(lambda x: self.velocity(x, mask=mask, causal=causal), x, self.time) - x

    def velocity(
        self, x: Float[Tensor, "b n e"], *, mask: Tensor | None = None, causal: bool = False
    ) -> Float[Tensor, "b n e"]:
        """-∂E/∂g at x, (B, N, E); with `causal` each position's own part of it.

        Args:
            x: (B, N, E).
            mask: as in `forward`.
            causal: as in `forward`.
        """
        q, k = self._queries_and_keys(x)
        # --8<-- [start:velocity]
        taken, weights = attention(q, k, k, mask=mask, causal=causal, return_weights=True)
        given = weights.diagonal(dim1=-2, dim2=-1)[..., None] * q if causal else weights.mT @ q
        # --8<-- [end:velocity]
        back = [rearrange(each.to(x.dtype), "b h n d -> b n (h d)") for each in (taken, given)]
        w_q, w_k = (matrix_and_bias(proj, x.shape[-1], self.shift)[0] for proj in (self.q_proj, self.k_proj))
        return F.linear(back[0], w_q.mT) + F.linear(back[1], w_k.mT)

    def energy(self, x: Float[Tensor, "b n e"], *, mask: Tensor | None = None) -> Float[Tensor, " b"]:
        """E at x, (B,), in float32 or better: what the flow without `causal` never lets rise. Autocast changes nothing.

        Args:
            x: (B, N, E).
            mask: as in `forward`. A query that may see no key adds nothing.

        Raises:
            TypeError: x or mask is not a tensor.
            ValueError: as in `forward`.
        """
        self._check(x, mask)
        with autocast_off(x.device.type):  # it would project and multiply in half precision
            q, k = (at_least_float32(each) for each in self._queries_and_keys(x.to(self.shift.dtype)))
            scores = q @ k.mT / self.d_head**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        found = scores.logsumexp(-1)
        return -(self.d_head**0.5) * torch.where(found == -torch.inf, 0.0, found).sum((1, 2))

    def _queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # --8<-- [start:norm]
        g = self.gain * F.layer_norm(x, x.shape[-1:], eps=self.eps) + self.shift
        # --8<-- [end:norm]
        q = rearrange(self.q_proj(g), "b n (h d) -> b h n d", h=self.n_heads)
        k = rearrange(self.k_proj(g), "b n (h d) -> b h n d", h=self.n_heads)
        return q, k

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        check_tensors({"x": x} if mask is None else {"x": x, "mask": mask})
        width = self.q_proj.in_features
        if x.ndim != 3 or x.shape[-1] != width:
            raise ValueError(f"x must be (B, N, {width}), got {tuple(x.shape)}")
        if mask is not None:
            shape = (x.shape[0], self.n_heads, x.shape[1], x.shape[1])
            fits = mask.ndim in (2, 4) and all(a in (1, b) for a, b in zip(mask.shape, shape[-mask.ndim :]))
            if mask.dtype != torch.bool or not fits:
                raise ValueError(
                    f"mask must be boolean and (N, N) = {shape[2:]}, or broadcast to (B, H, N, N) = {shape}, got "
                    f"{mask.dtype} {tuple(mask.shape)}"
                )
