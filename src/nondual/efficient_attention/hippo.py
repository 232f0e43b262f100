"""HiPPO: a state that gets one sample at a time, and from which the past can be reconstructed.

Source: Gu, Dao, Ermon, Rudra and Ré 2020 (2008.07669), sections 2.2 to 2.4, appendices D.1 and D.3. LegT with another
scale for each state is the Legendre memory unit of Voelker, Kajić and Eliasmith 2019. Symbols: N states, L samples.

The state holds the coefficients of the past in Legendre polynomials, stretched over what is remembered:

    g_n(p) = √(2n + 1) P_n(2p - 1),  p from 0, the oldest, to 1, now;   c_n = ∫₀¹ past(p) g_n(p) dp

    LegT    c' = A c + B u            the past is a window of fixed length; what leaves it must be forgotten
    LegS    c' = (A c + B u) / t      the past is all there was; each moment counts the same

LegS is exact: its state is the best polynomial of degree N - 1 in the mean square. LegT is not quite: to forget what
leaves the window it must know what that was, and asks its own memory, Σ_n g_n(0) c_n. So its state differs from the
projection by as much as that answer was wrong before.

Where we differ from the paper: A carries its sign, LegS's too; the basis is orthonormal (their λ_n = 1); and LegS
takes its steps by zero-order hold on the clock log t, where it does not change with time, so that a held input is met
exactly.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from nondual.efficient_attention.state_space import discretize, run
from nondual.ops.autocast import autocast_off
from nondual.ops.checks import check_tensors


# --8<-- [start:matrices]
def legt(n_states: int, window: float = 1.0) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n 1"]]:
    """A and B of HiPPO-LegT: c' = A c + B u, where c stands for the last `window` of u.

        A_nk = -√(2n + 1) √(2k + 1) / window · (1 where k ≤ n, (-1)^(n-k) where k > n),   B_n = √(2n + 1) / window

    Args:
        n_states: N.
        window: its length, in the unit of time.

    Returns:
        A (N, N) and B (N, 1), float64.

    Raises:
        ValueError: N below 1, or a window that is not positive.
    """
    root, n, k = _roots(n_states)
    if not window > 0:
        raise ValueError(f"window must be positive, got {window}")
    sign = torch.where(k <= n, 1, (-1) ** (n - k).abs())
    return -root * root.T * sign / window, root / window


def legs(n_states: int) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n 1"]]:
    """A and B of HiPPO-LegS: c' = (A c + B u) / t, where c stands for all of u from 0 to t.

        A_nk = -√(2n + 1) √(2k + 1) where k < n,  -(n + 1) where k = n,  0 where k > n;   B_n = √(2n + 1)

    Args:
        n_states: N.

    Returns:
        A (N, N) and B (N, 1), float64.

    Raises:
        ValueError: N below 1.
    """
    root, n, k = _roots(n_states)
    return torch.where(k < n, -root * root.T, torch.where(k == n, -(n + 1.0), 0.0)), root


# --8<-- [end:matrices]


def _roots(n_states: int) -> tuple[Tensor, Tensor, Tensor]:
    """√(2n + 1), n and k: columns, and a row."""
    if n_states < 1:
        raise ValueError(f"n_states must be 1 or more, got {n_states}")
    n = torch.arange(n_states)[:, None]
    return (2.0 * n.double() + 1).sqrt(), n, n.T


def legt_states(u: Float[Tensor, "*b l"], n_states: int, window: float) -> Float[Tensor, "*b l n"]:
    """The LegT state after every sample, from a state of zero, with each sample held for its step.

    Args:
        u: samples (…, L), one every unit of time.
        n_states: N.
        window: how many samples are remembered.

    Returns:
        Coefficients (…, L, N) in u's dtype: `reconstruct` draws the window again from any one of them.

    Raises:
        ValueError: as `legt`; or u is not floating point.
        TypeError: u is not a Tensor.
    """
    samples = _signals(u)
    A_bar, B_bar = (x.to(u) for x in discretize(1.0, *legt(n_states, window)))
    states, _ = run(samples[..., None], A_bar, B_bar)
    return states.view(*u.shape, n_states)


def legs_states(u: Float[Tensor, "*b l"], n_states: int) -> Float[Tensor, "*b l n"]:
    """The LegS state after every sample: what there was from the first to this one, in N numbers.

    On the clock log t the system does not change: from the end of sample t to the next it goes on by log((t + 1) / t).
    The first step comes from log 0, infinitely far, and leaves what a constant leaves: u_0 in the first coefficient.

    Args:
        u: samples (…, L).
        n_states: N.

    Returns:
        Coefficients (…, L, N) in u's dtype: `reconstruct` draws the past again from any one of them.

    Raises:
        ValueError: as `legs`; or u is not floating point.
        TypeError: u is not a Tensor.
    """
    A, B = legs(n_states)
    samples = _signals(u)
    c, states = samples.new_zeros(len(samples), n_states), []
    for t, u_t in enumerate(samples.unbind(1)):
        if t == 0:
            c = torch.cat([u_t[:, None], c[:, 1:]], 1)
        else:
            A_bar, B_bar = (x.to(u) for x in discretize(math.log1p(1 / t), A, B))
            with autocast_off(u.device.type):
                c = c @ A_bar.T + u_t[:, None] * B_bar.T
        states.append(c)
    return (torch.stack(states, 1) if states else samples.new_zeros(0)).view(*u.shape, n_states)


def _signals(u: Tensor) -> Tensor:
    """One signal a row (B, L), whatever the shape of the batch: () too."""
    check_tensors({"u": u})
    if u.ndim < 1 or not u.is_floating_point():
        raise ValueError(f"u must be floating point (…, L), got {u.dtype} {tuple(u.shape)}")
    return u.reshape(math.prod(u.shape[:-1]), u.shape[-1])


# --8<-- [start:reconstruct]
def reconstruct(state: Float[Tensor, "*b n"], points: Float[Tensor, " p"]) -> Float[Tensor, "*b p"]:
    """The past that the state stands for: Σ_n c_n g_n.

    Args:
        state: coefficients (…, N), of LegT or LegS.
        points: where to look (P,): 0 is the oldest that is remembered, 1 is now.

    Returns:
        The signal there (…, P), in the state's dtype, under autocast too; differentiable.

    Raises:
        TypeError: state or points that is not a Tensor.
    """
    check_tensors({"state": state, "points": points})
    with autocast_off(state.device.type):
        return state @ legendre(points.to(state), state.shape[-1]).T


def legendre(points: Float[Tensor, " p"], n: int) -> Float[Tensor, "p n"]:
    """g_0 … g_{n-1} at each point: Legendre polynomials, orthonormal on [0, 1], by their three-term recurrence.

    Args:
        points: (P,), from 0 to 1.
        n: how many.

    Returns:
        (P, n), in the points' dtype.
    """
    z = 2 * points - 1
    rows = [torch.ones_like(z), z]
    for i in range(1, n - 1):
        rows.append(((2 * i + 1) * z * rows[i] - i * rows[i - 1]) / (i + 1))
    return torch.stack([math.sqrt(2 * i + 1) * row for i, row in enumerate(rows[:n])], -1)


# --8<-- [end:reconstruct]


def project(u: Float[Tensor, "*b l"], n_states: int) -> Float[Tensor, "*b n"]:
    """The best that N numbers can do: the projection of the samples, each held for its step, on g_0 … g_{N-1}.

    The integral of g_n over a step is exact: (2n + 1) P_n is the derivative of P_{n+1} - P_{n-1}.

    Args:
        u: samples (…, L), the oldest first.
        n_states: N.

    Returns:
        Coefficients (…, N), in u's dtype. What is lost in the mean square is mean(u²) - Σ c_n².

    Raises:
        ValueError: N below 1, no samples, or u is not floating point.
        TypeError: u is not a Tensor.
    """
    root, *_ = _roots(n_states)
    if _signals(u).shape[-1] == 0:
        raise ValueError("u must have at least one sample to project, got none")
    edges = torch.linspace(0, 1, u.shape[-1] + 1, dtype=torch.float64, device=u.device)
    P = legendre(edges, n_states + 1) / _roots(n_states + 1)[0][:, 0].to(u.device)
    below = torch.cat([torch.ones_like(P[:, :1]), P[:, :-2]], 1)  # P_{n-1}; what stands for P_{-1} falls out below
    steps = ((P[:, 1:] - below) / (2 * root[:, 0].to(u.device))).diff(dim=0)  # (L, N)
    with autocast_off(u.device.type):
        return u @ steps.to(u)
