"""HiPPO's matrices against the projections that they claim to follow, in closed form and on a real recording."""

import itertools
import math

import numpy as np
import pytest
import torch
from matplotlib import cbook
from scipy import interpolate

from nondual.efficient_attention.hippo import (
    legendre,
    legs,
    legs_states,
    legt,
    legt_states,
    project,
    reconstruct,
)
from nondual.efficient_attention.state_space import discretize


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nodes(n=60):
    """Gauss's points and weights on [0, 1]: exact for polynomials up to degree 2 n - 1."""
    z, w = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((z + 1) / 2), torch.from_numpy(w / 2)


# --- the basis -----------------------------------------------------------------------------------------------------


def test_the_basis_is_numpys_and_orthonormal():
    p, w = nodes()
    g = legendre(p, 40)
    scaled = np.polynomial.legendre.legvander(2 * p.numpy() - 1, 39) * np.sqrt(2 * np.arange(40) + 1)
    torch.testing.assert_close(g, torch.from_numpy(scaled))
    torch.testing.assert_close(g.T @ (w[:, None] * g), torch.eye(40).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_reconstruct_is_the_sum(n):
    c, p = draw(2, 3, n), torch.linspace(0, 1, 11, dtype=torch.float64)
    expected = sum(
        c[..., i, None] * math.sqrt(2 * i + 1) * torch.special.legendre_polynomial_p(2 * p - 1, i) for i in range(n)
    )
    torch.testing.assert_close(reconstruct(c, p), expected)
    assert reconstruct(c.float(), p).dtype == torch.float32


@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_project_is_the_integral(n):
    """Against Gauss's rule in each step, where the held sample is a constant and g_n a polynomial."""
    u = draw(2, 13)
    p, w = nodes(20)
    steps = torch.stack([w @ legendre((j + p) / 13, n) / 13 for j in range(13)])
    torch.testing.assert_close(project(u, n), u @ steps, atol=1e-13, rtol=1e-10)
    torch.testing.assert_close(project(u.float(), n).double(), u @ steps, atol=1e-6, rtol=1e-5)


def test_what_a_projection_loses_is_what_parseval_says():
    u, n = draw(13), 5
    p, w = nodes(20)
    missed = sum((w * (u[j] - reconstruct(project(u, n), (j + p) / 13)).square()).sum() / 13 for j in range(13))
    torch.testing.assert_close(missed, u.square().mean() - project(u, n).square().sum())


# --- the matrices --------------------------------------------------------------------------------------------------


def test_two_states_by_hand():
    r = math.sqrt(3)
    A, B = legt(2, 2.0)
    torch.testing.assert_close(A, -torch.tensor([[1, -r], [r, 3]]).double() / 2)
    torch.testing.assert_close(B, torch.tensor([[1], [r]]).double() / 2)
    A, B = legs(2)
    torch.testing.assert_close(A, -torch.tensor([[1, 0], [r, 2]]).double())
    torch.testing.assert_close(B, torch.tensor([[1], [r]]).double())


def polynomial(degree):
    """A polynomial of this degree and its derivative."""
    p = np.polynomial.Polynomial(draw(degree + 1).numpy())
    return (lambda t: torch.from_numpy(p(t.numpy()))), (lambda t: torch.from_numpy(p.deriv()(t.numpy())))


def moving(A, B, n, degree, window):
    """c' as the window's left end and its right end move on, and A c + B u: a polynomial under LegT."""
    u, du = polynomial(degree)
    p, w = nodes()
    now = torch.tensor([1.7]).double()
    past = now - window + window * p
    c, dc = ((w * f(past)) @ legendre(p, n) for f in (u, du))
    return dc, A @ c + B[:, 0] * u(now)


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_legt_follows_every_polynomial_that_it_can_hold_and_no_other(n):
    """Degree N - 1 exactly. At degree N what leaves the window is misremembered, and c' is off."""
    for degree, exact in ((n - 1, True), (n, False)):
        dc, claimed = moving(*legt(n, 0.8), n, degree, 0.8)
        assert torch.allclose(dc, claimed, atol=1e-9, rtol=1e-9) == exact


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_legs_follows_whatever_there_was(n):
    """t c' = A c + B u for a polynomial of a degree far above N: nothing is forgotten, so nothing is guessed."""
    u, du = polynomial(n + 7)
    p, w = nodes()
    t = torch.tensor([1.7]).double()
    g = legendre(p, n)
    c, dc = (w * u(t * p)) @ g, (w * p * du(t * p)) @ g
    A, B = legs(n)
    torch.testing.assert_close(t * dc, A @ c + B[:, 0] * u(t), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("n", [1, 4, 9])
def test_legt_is_the_legendre_memory_unit_in_another_scale(n):
    """Voelker et al. 2019, equations 1 and 2, whose state m_i is (-1)^i √(2 i + 1) c_i."""
    i = torch.arange(n)[:, None].double()
    j = i.T
    A_lmu = (2 * i + 1) * torch.where(i < j, -1.0, (-1.0) ** (i - j + 1)) / 0.7
    B_lmu = (2 * i + 1) * (-1.0) ** i / 0.7
    scale = (-1.0) ** i * (2 * i + 1).sqrt()
    A, B = legt(n, 0.7)
    torch.testing.assert_close((scale * A / scale.T, scale * B), (A_lmu, B_lmu))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_legts_oldest_moment_is_pades_delay(n):
    """Reading at the window's left end is the best rational delay: Padé's [N-1/N] of exp(-θ s), by scipy."""
    window = 0.7
    A, B = legt(n, window)
    read = legendre(torch.zeros(1).double(), n)
    over, under = interpolate.pade([(-window) ** k / math.factorial(k) for k in range(2 * n)], n, n - 1)
    for s in (0.3, 1 + 2j, -1j, 40.0):
        transfer = read.to(torch.complex128) @ torch.linalg.solve(
            s * torch.eye(n, dtype=A.dtype) - A.to(torch.complex128), B + 0j
        )
        assert abs(transfer.item() - over(s) / under(s)) < 1e-9


@pytest.mark.parametrize("n", [1, 5, 20])
def test_legs_standing_still_remembers_on_a_logarithmic_clock(n):
    """exp(t A) B = exp(-t) g(exp(-t)): Legendre polynomials of a past whose moments crowd together as they recede."""
    A, B = legs(n)
    t = torch.tensor([0.0, 0.1, 0.7, 3.0]).double()
    response = torch.stack([torch.linalg.matrix_exp(s * A) @ B[:, 0] for s in t])
    torch.testing.assert_close(response, torch.exp(-t)[:, None] * legendre(torch.exp(-t), n), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("n", [1, 8, 64])
def test_both_are_stable(n):
    assert torch.linalg.eigvals(legt(n, 0.5)[0]).real.max() < 0
    torch.testing.assert_close(legs(n)[0].diagonal(), -torch.arange(1.0, n + 1).double())  # triangular: its eigenvalues


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 16, 48])
def test_legs_states_are_the_projections_of_all_there_was(n):
    """After every sample, to rounding: the recurrence, which never sees the past again, equals the integral over it."""
    u = draw(2, 50)
    states = legs_states(u, n)
    for t in range(50):
        torch.testing.assert_close(states[:, t], project(u[:, : t + 1], n), atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("n", [1, 3, 24])
def test_a_constant_is_held_in_one_number(n):
    """Once the window is full of it, LegT's state is (1, 0, …, 0); LegS's is from the first sample on."""
    one = torch.ones(400).double()
    first = torch.zeros(n).double()
    first[0] = 1
    torch.testing.assert_close(legt_states(one, n, 10)[-1], first, atol=1e-9, rtol=0)
    torch.testing.assert_close(legs_states(one, n), first.expand(400, -1), atol=1e-11, rtol=0)


def test_the_reconstruction_of_a_smooth_window_falls_with_n():
    """Slow waves in a window of 200 samples, seen at the middle of each, down to what holding a sample costs: 5e-4."""
    t = torch.arange(1000).double()
    u = (2 * math.pi * t / 130).sin() + 0.5 * (2 * math.pi * t / 71 + 1).cos()
    middles = (torch.arange(200).double() + 0.5) / 200
    errors = []
    for n in (4, 8, 12, 16):
        drawn = reconstruct(legt_states(u, n, 200.0)[-1], middles)
        errors.append((drawn - u[-200:]).square().mean().sqrt().item())
    assert all(after < before / 2 for before, after in itertools.pairwise(errors)) and errors[-1] < 1e-3, errors


def test_the_window_slides():
    """What is read a quarter of the way in is the signal of three quarters of a window ago, at every moment."""
    t = torch.arange(1000).double()
    u = (2 * math.pi * t / 130).sin()
    read = reconstruct(legt_states(u, 24, 200.0), torch.tensor([0.25]))[:, 0]
    late = (2 * math.pi * (t + 0.5 - 150) / 130).sin()  # the middle of a held step is half a sample on
    assert (read - late)[400:].abs().max() < 2e-3


def eeg():
    """A recording of the brain that matplotlib ships: 10 s of 4 electrodes at 80 a second, each of variance 1."""
    with cbook.get_sample_data("eeg.dat") as file:
        return torch.from_numpy(np.frombuffer(file.read()).reshape(800, 4).copy())


@pytest.mark.parametrize("n", [4, 16, 64, 128])
def test_on_a_real_recording_legt_loses_little_beyond_the_projection(n):
    """Two seconds of EEG, at all 641 places: never better than the projection, and a quarter worse at most."""
    u, window = eeg()[:, 0], 160
    windows = u.unfold(0, window, 1)
    best, held = project(windows, n), legt_states(u, n, window)[window - 1 :]
    lost = windows.square().mean(-1) - best.square().sum(-1)  # by Parseval
    more = (held - best).square().sum(-1)
    assert (lost > 0).all()
    ratio = ((lost + more).mean() / lost.mean()).sqrt()
    assert 1 < ratio < 1.25, ratio


def test_batches_and_empty_signals():
    u = draw(2, 3, 7)
    for states in (legt_states(u, 4, 5.0), legs_states(u, 4)):
        assert states.shape == (2, 3, 7, 4)
    torch.testing.assert_close(legt_states(u, 4, 5.0)[1, 2], legt_states(u[1, 2], 4, 5.0))
    torch.testing.assert_close(legs_states(u, 4)[1, 2], legs_states(u[1, 2], 4))
    assert legt_states(u[..., :0], 4, 5.0).shape == legs_states(u[..., :0], 4).shape == (2, 3, 0, 4)
    assert legt_states(u.float(), 4, 5.0).dtype == legs_states(u.float(), 4).dtype == torch.float32


def test_gradients():
    u, p = draw(2, 5).requires_grad_(), torch.linspace(0, 1, 3, dtype=torch.float64)
    for states in (lambda u: legt_states(u, 3, 4.0), lambda u: legs_states(u, 3), lambda u: project(u, 3)):
        assert torch.autograd.gradcheck(lambda u, states=states: reconstruct(states(u), p), [u])


def test_a_step_of_the_logarithmic_clock_is_as_exact_at_64_states():
    """The norm of LegS's A is about 64²; squaring its exponential up to that size costs digits, but not the answer."""
    u = draw(40)
    torch.testing.assert_close(legs_states(u, 64)[-1], project(u, 64), atol=1e-10, rtol=1e-8)
    A_bar, _ = discretize(math.log(2), *legs(64))
    torch.testing.assert_close(A_bar.diagonal(), 0.5 ** torch.arange(1.0, 65).double(), atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e8])
def test_the_last_sample_moves_no_earlier_state(value):
    """Not by a bit, in float32; and a NaN stays in its own signal."""
    u = draw(3, 90).float()
    spoiled = u.clone()
    spoiled[1, -1] = value
    for states in (lambda u: legt_states(u, 6, 20.0), lambda u: legs_states(u, 6)):
        found, right = states(spoiled), states(u)
        assert torch.equal(found[1, :-1], right[1, :-1])
        torch.testing.assert_close(found[[0, 2]], right[[0, 2]], atol=0, rtol=1e-6)
        assert not torch.equal(found[1, -1], right[1, -1])


def test_autocast_changes_nothing():
    u, points = draw(2, 40).float(), torch.linspace(0, 1, 9)
    for states in (lambda u: legt_states(u, 6, 20.0), lambda u: legs_states(u, 6), lambda u: project(u, 6)):
        right = states(u), reconstruct(states(u), points)
        with torch.autocast("cpu", torch.bfloat16):
            found = states(u)
            torch.testing.assert_close((found, reconstruct(found, points)), right)


def test_transforms_of_torch_func():
    u, v = draw(3, 12), draw(3, 12, seed=1)
    for states in (lambda u: legt_states(u, 4, 5.0), lambda u: legs_states(u, 4), lambda u: project(u, 4)):
        torch.testing.assert_close(torch.func.vmap(states)(u), states(u))
        torch.testing.assert_close(torch.func.jvp(states, (u,), (v,))[1], states(v))  # it is linear
        torch.testing.assert_close(
            torch.func.vjp(states, u)[1](states(v))[0], torch.autograd.functional.vjp(states, u, states(v))[1]
        )


def test_what_is_no_tensor_is_named():
    for call in (lambda u: legt_states(u, 3, 2.0), lambda u: legs_states(u, 3), lambda u: project(u, 3)):
        with pytest.raises(TypeError, match="u must be a Tensor, got list"):
            call([1.0, 2.0])
    with pytest.raises(TypeError, match="points must be a Tensor, got list"):
        reconstruct(torch.ones(3), [0.0, 1.0])


# --- the door ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: legt(0), "n_states must be 1 or more, got 0"),
        (lambda: legs(-1), "n_states must be 1 or more, got -1"),
        (lambda: legt(3, 0.0), "window must be positive, got 0.0"),
        (lambda: legt(3, math.nan), "window must be positive, got nan"),
        (lambda: project(torch.ones(0), 3), "u must have at least one sample to project, got none"),
        (lambda: project(torch.ones(5).long(), 3), r"u must be floating point \(…, L\), got torch.int64 \(5,\)"),
        (lambda: legt_states(torch.ones(5).long(), 3, 2.0), "u must be floating point"),
        (lambda: legs_states(torch.ones(()), 3), "u must be floating point"),
        (lambda: project(torch.ones(5), 0), "n_states must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
