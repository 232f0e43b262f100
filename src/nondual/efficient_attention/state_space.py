"""A linear state space model that does not change with time, and what a step of length Δ makes of it.

Source: Gu, Goel and Ré 2022 (2111.00396), sections 2.1 to 2.3; zero-order hold by the exponential of one larger matrix:
Van Loan 1978. Symbols: B batch, L steps, N states, K inputs; Ā and B̄ what a step makes of A and B.

    h(t)' = A h(t) + B u(t)      continuous
    h_t = Ā h_{t-1} + B̄ u_t      one step of length Δ: u_t enters, and h_t is the state at the end of the step

How near h_t is to the continuous state depends on the rule, and on where in its step u_t is taken. Over one step
h(Δ) = exp(ΔA) h(0) + ∫₀^Δ exp((Δ - s) A) B u(s) ds. With u(0) or u(Δ) in place of u(s), Δ²/2 · B u' is left behind at
every step, and there are 1/Δ of them: order 1. At the middle, or with the mean of both ends, u' cancels, and what is
left is of the third order at every step: order 2. exp(ΔA) itself is missed by Δ²A²/2 by Euler, and by Δ³A³/12 by the
bilinear rule. So:

    rule        Ā                          B̄                     u at an end   u at the middle   u held by the source
    "zoh"       exp(ΔA)                    (exp(ΔA) - 1) A⁻¹ B   1             2                 exact
    "bilinear"  (1 - ΔA/2)⁻¹ (1 + ΔA/2)    (1 - ΔA/2)⁻¹ ΔB       1             2                 2
    "euler"     1 + ΔA                     ΔB                    1             1                 1

A diagonal A is `nondual.efficient_attention.s4d`; an A that changes with the input is `nondual.ops.selective_scan`.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from nondual.ops.autocast import autocast_off
from nondual.ops.checks import check_tensors

Rule = Literal["zoh", "bilinear", "euler"]
RULES = get_args(Rule)


# --8<-- [start:discretize]
def discretize(
    delta: float | Float[Tensor, ""], A: Float[Tensor, "n n"], B: Float[Tensor, "n k"], rule: Rule = "zoh"
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n k"]]:
    """Ā and B̄ of one step of length delta, for any square A, a singular one too.

    Args:
        delta: Δ, in the time unit of A.
        A: (N, N).
        B: (N, K), one column an input.
        rule: "zoh", "bilinear" or "euler", in the table above.

    Returns:
        Ā (N, N) and B̄ (N, K), in A's dtype, under autocast too; differentiable.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown rule.
        TypeError: A or B that is not a Tensor.
    """
    n, k = _check(A, B, rule)
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    if rule == "euler":
        return eye + delta * A, delta * B
    if rule == "bilinear":
        implicit = eye - delta / 2 * A
        return torch.linalg.solve(implicit, eye + delta / 2 * A), torch.linalg.solve(implicit, delta * B)
    held = torch.cat([A, B], 1)  # u is a state that does not move: (h, u)' = [[A, B], [0, 0]] (h, u)
    held = delta * torch.cat([held, held.new_zeros(k, n + k)])
    # Two of it: for a single matrix whose norm is small torch takes a polynomial that is wrong from its tenth digit on.
    with autocast_off(A.device.type):
        whole = torch.linalg.matrix_exp(held.expand(2, -1, -1))[0]
    return whole[:n, :n], whole[:n, n:]


# --8<-- [end:discretize]


def run(
    u: Float[Tensor, "b l k"],
    A_bar: Float[Tensor, "n n"],
    B_bar: Float[Tensor, "n k"],
    state: Float[Tensor, "b n"] | None = None,
) -> tuple[Float[Tensor, "b l n"], Float[Tensor, "b n"]]:
    """Every state h_t = Ā h_{t-1} + B̄ u_t, one step after another, and the last. What is read of it is `h @ C.T`.

    Args:
        u: input (B, L, K); L may be 0.
        A_bar: (N, N).
        B_bar: (N, K).
        state: the state before the first step (B, N); zero where left out.

    Returns:
        h (B, L, N) and the last state (B, N), in memory of its own; in u's dtype, under autocast too; differentiable.
        No state depends on a later input, and what is not finite stays in its row of the batch.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        TypeError: what is not a Tensor.
    """
    n, k = _check(A_bar, B_bar, u=u, state=state)
    if u.ndim != 3 or u.shape[2] != k:
        raise ValueError(f"u must be (B, L, K) with K = {k} as in B_bar, got {tuple(u.shape)}")
    if state is not None and tuple(state.shape) != (u.shape[0], n):
        raise ValueError(f"state must be (B, N) = {(u.shape[0], n)}, got {tuple(state.shape)}")
    h = u.new_zeros(u.shape[0], n) if state is None else state
    states = []
    with autocast_off(u.device.type):
        for entering in (u @ B_bar.T).unbind(1):  # (B, N)
            h = h @ A_bar.T + entering
            states.append(h)
    return (torch.stack(states, 1), h) if states else (u.new_zeros(u.shape[0], 0, n), h.clone())


def _check(A: Tensor, B: Tensor, rule: str = "zoh", **others: Tensor | None) -> tuple[int, int]:
    """N and K of a system whose matrices fit each other; the others have its dtype and its device."""
    check_tensors({"A": A, "B": B} | {name: x for name, x in others.items() if name == "u"}, others)
    if A.ndim != 2 or A.shape[0] != A.shape[1] or not A.is_floating_point():
        raise ValueError(f"A must be floating point and square (N, N), got {A.dtype} {tuple(A.shape)}")
    if B.ndim != 2 or B.shape[0] != A.shape[0]:
        raise ValueError(
            f"B must be (N, K) with N = {A.shape[0]} as in A, got {tuple(B.shape)}; one input is B[:, None]"
        )
    for name, x in ({"B": B} | others).items():
        if x is not None and (x.dtype, x.device) != (A.dtype, A.device):
            raise ValueError(
                f"{name} must have A's dtype and device, {A.dtype} on {A.device}, got {x.dtype} on {x.device}"
            )
    if rule not in RULES:
        raise ValueError(f"rule must be one of {list(RULES)}, got {rule!r}")
    return B.shape[0], B.shape[1]
