"""Heads that condition one another, before they are joined by W_O.

In multi-head attention heads do not meet until W_O, which adds them up. Here they meet earlier, in two ways, each of
which stands in the place of a `MultiHeadAttention`'s operation:

    TalkingHeads   scores and weights are mixed over heads by a matrix: the linear case
    HeadFusion     at each position the heads' outputs attend to one another: O = O₀ + tanh(g) · F(O)

    MultiHeadAttention(64, 4, causal=True, op=HeadFusion(16))

Sources: Shazeer et al. 2020, "Talking-Heads Attention" (2003.02436); a layer given by its fixed point, Bai et al. 2019,
"Deep Equilibrium Models" (1909.01377). Symbols: q, k, v (B, H, N, D), O₀ what the heads put out, P_ij a weight.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nondual.ops import masks
from nondual.ops.attention import attention, check_mask, check_qkv, masked_softmax
from nondual.ops.autocast import autocast_off
from nondual.ops.checks import check_sizes, check_tensors
from nondual.ops.dtypes import accumulation_dtype

Update = Callable[[Tensor], Tensor]
Solver = Callable[[Update, Tensor], Tensor]


class TalkingHeads(nn.Module):
    """What joins q, k and v in a `MultiHeadAttention`, with scores and weights mixed over the heads.

        scores_g = Σ_h before_gh q_h k_hᵀ / √D,     P_g = Σ_h after_gh softmax(scores_h),     out_g = P_g v_g

    Both matrices start as the identity, under which this is ordinary attention. It forms all (B, H, N, M) scores.

    Args:
        n_heads: H.

    Raises:
        ValueError: n_heads below 1.

    Source: 2003.02436, section 4.
    """

    before: nn.Parameter
    after: nn.Parameter

    def __init__(self, n_heads: int):
        super().__init__()
        check_sizes(n_heads=n_heads)
        self.before = nn.Parameter(torch.eye(n_heads))
        self.after = nn.Parameter(torch.eye(n_heads))

    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g m d"],
        v: Float[Tensor, "b g m dv"],
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """out (B, H, N, Dv), or with the mixed weights (B, H, N, M), whose rows need not sum to one.

        Args:
            q: (B, H, N, D).
            k: (B, G, M, D), G a divisor of H.
            v: (B, G, M, Dv).
            mask: as in `nondual.ops.attention.attention`; it acts on the mixed scores.
            causal: each query sees its own position and those before, aligned at the end where N != M.
            scale: factor on q · k; 1 / √D where left out.
            dropout: probability of dropping a weight, before the second mixing.
            return_weights: also return the weights.

        Raises:
            TypeError: q, k, v or mask is not a tensor.
            ValueError: shapes, dtypes or devices that do not fit, or another number of heads.
        """
        check_tensors({"q": q, "k": k, "v": v}, {"mask": mask})
        check_qkv(q, k, v)
        if q.shape[1] != len(self.before):
            raise ValueError(f"q must have {len(self.before)} heads, got {q.shape[1]}")
        if mask is not None:
            check_mask(mask, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]), q)
        wide, share = accumulation_dtype(q.dtype), q.shape[1] // k.shape[1]
        q, k_all, v_all = q.to(wide), *(x.to(wide).repeat_interleave(share, dim=1) for x in (k, v))
        before, after = self.before.to(wide), self.after.to(wide)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        allowed = masks.causal(q.shape[2], k.shape[2], device=q.device) if causal else None
        with autocast_off(q.device.type):  # it would multiply in half precision
            # --8<-- [start:talking]
            scores = torch.einsum("gh,bhnm->bgnm", before, factor * q @ k_all.mT)
            scores = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
            weights = F.dropout(masked_softmax(scores, mask), dropout)
            weights = torch.einsum("gh,bhnm->bgnm", after, weights)
            # --8<-- [end:talking]
            out = (weights @ v_all).to(v.dtype)
        return (out, weights.to(v.dtype)) if return_weights else out

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        @overload
        def __call__(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *,
            mask: Tensor | None = None,
            causal: bool = False,
            scale: float | None = None,
            dropout: float = 0.0,
            return_weights: Literal[False] = False,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *,
            mask: Tensor | None = None,
            causal: bool = False,
            scale: float | None = None,
            dropout: float = 0.0,
            return_weights: Literal[True],
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *,
            mask: Tensor | None = None,
            causal: bool = False,
            scale: float | None = None,
            dropout: float = 0.0,
            return_weights: bool,
        ) -> Tensor | tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def among(scores: Float[Tensor, "... h h"]) -> Float[Tensor, "... h h"]:
    """The weights with which heads attend to one another: softmax over the others; with one head alone, 0."""
    own = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    return masked_softmax(scores, ~own)


def alone(scores: Float[Tensor, "... h h"]) -> Float[Tensor, "... h h"]:
    """In place of `among`, the same parameters where no head meets another: each looks at itself, with a sigmoid."""
    return torch.diag_embed(scores.diagonal(dim1=-2, dim2=-1).sigmoid())


def iterate(steps: int = 1) -> Solver:
    """A solver of O = f(O): that many updates, each with its gradient.

    Args:
        steps: how many.

    Raises:
        ValueError: steps below 1.
    """
    check_sizes(steps=steps)

    def solve(f: Update, start: Tensor) -> Tensor:
        for _ in range(steps):
            start = f(start)
        return start

    return solve


def fixed_point(tolerance: float = 1e-5, most: int = 100) -> Solver:
    """A solver of O = f(O) by updates until they no longer move it; the gradient is that of the fixed point itself.

    The backward pass solves g = gradient + Jᵀ g in the same way, so that no update is kept. It has no second
    derivative, and asking for one raises.

    Args:
        tolerance: an update is the last when it moves no number by more than this times the largest of them, or 1.
        most: how many updates there are at most.

    Raises:
        ValueError: a tolerance not above 0, or most below 1.
        RuntimeError: while solving, after `most` updates, forward or backward.

    Source: 1909.01377, theorem 1.
    """
    check_sizes(most=most)
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be above 0 and finite, got {tolerance}")

    def settled(f: Update, z: Tensor, which: str) -> Tensor:
        moved = math.inf
        for _ in range(most):
            z, before = f(z), z
            moved = float((z - before).abs().amax() / z.abs().amax().clamp(min=1)) if z.numel() else 0.0
            if moved <= tolerance:
                return z
        raise RuntimeError(
            f"the {which} must settle within {most} updates, and the last still moved it by {moved:.1e}: lower the "
            "gate or the learning rate, allow more updates, or use iterate(n)"
        )

    def solve(f: Update, start: Tensor) -> Tensor:
        with torch.no_grad():
            z = settled(f, start, "fixed point")
        if not torch.is_grad_enabled():
            return z
        out = f(z)  # its gradient reaches what f is made of; what reaches z itself is added in the hook
        if not out.requires_grad:
            return out
        at = z.detach().requires_grad_()
        again = f(at)

        def adjoint(gradient: Tensor | None) -> Tensor | None:
            if gradient is None:  # nothing asks for one
                return None
            if torch.is_grad_enabled():
                raise RuntimeError("fixed_point has no second derivative: use iterate(n)")
            return settled(
                lambda g: gradient + torch.autograd.grad(again, at, g, retain_graph=True)[0], gradient, "backward pass"
            )

        out.register_hook(adjoint)
        return out

    return solve


class HeadFusion(nn.Module):
    """What joins q, k and v in a `MultiHeadAttention`, after which the heads of each position attend to one another.

        O = O₀ + tanh(g) · tanh(P(O) O W_C),     P_hl(O) over the other heads l, from (O W_A)_h · (O W_B)_l / √D

    O₀ is what the operation puts out. The three matrices are shared by all heads, so that heads in another order give
    outputs in that order. The gate g starts at 0, where this is the operation itself to the bit.

    Args:
        d_head: Dv, the width of the values.
        op: what joins q, k and v, called as `nondual.ops.attention.attention` is.
        solver: how often O is updated: `iterate()`, once from O₀, where left out; `iterate(n)`; or `fixed_point()`.
        couple: scores (…, H, H) to weights: `among` the other heads; `alone` for the control in which no head meets
            another.

    Raises:
        ValueError: d_head below 1.
    """

    gate: nn.Parameter
    asks: nn.Linear
    asked: nn.Linear
    gives: nn.Linear
    op: Callable[..., Any]
    solver: Solver
    couple: Callable[[Tensor], Tensor]

    def __init__(
        self,
        d_head: int,
        *,
        op: Callable[..., Any] = attention,
        solver: Solver | None = None,
        couple: Callable[[Tensor], Tensor] = among,
    ):
        super().__init__()
        check_sizes(d_head=d_head)
        self.gate = nn.Parameter(torch.zeros(()))
        self.asks, self.asked, self.gives = (nn.Linear(d_head, d_head, bias=False) for _ in range(3))
        self.op, self.couple, self.solver = op, couple, iterate() if solver is None else solver

    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g m d"],
        v: Float[Tensor, "b g m dv"],
        *,
        return_weights: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """out (B, H, N, Dv), or (out, weights) where the operation gives them: its own weights, before the heads meet.

        Args:
            q: (B, H, N, D).
            k: (B, G, M, D).
            v: (B, G, M, Dv).
            return_weights: also return the operation's weights.
            options: given to the operation as they are: mask, causal, scale, dropout.

        Raises:
            TypeError, ValueError: what the operation refuses; values of another width.
            RuntimeError: a fixed point that was not reached.
        """
        check_tensors({"v": v})
        if v.ndim != 4 or v.shape[-1] != self.gives.in_features:
            raise ValueError(f"v must be (B, heads, length, {self.gives.in_features}), got {tuple(v.shape)}")
        found = self.op(q, k, v, return_weights=return_weights, **options)
        out, weights = found if return_weights else (found, None)
        heads = rearrange(out, "b h n d -> b n h d")

        # --8<-- [start:fusion]
        def update(o: Tensor) -> Tensor:
            scores = self.asks(o) @ self.asked(o).mT / o.shape[-1] ** 0.5  # (B, N, H, H)
            return heads + self.gate.tanh() * torch.tanh(self.couple(scores) @ self.gives(o))

        # --8<-- [end:fusion]
        out = rearrange(self.solver(update, heads), "b n h d -> b h n d").to(out.dtype)
        return (out, cast(Tensor, weights)) if return_weights else out

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        @overload
        def __call__(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *,
            return_weights: Literal[False] = False,
            **options: Any,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *,
            return_weights: Literal[True],
            **options: Any,
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *,
            return_weights: bool,
            **options: Any,
        ) -> Tensor | tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
