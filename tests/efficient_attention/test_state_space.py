"""Dense linear systems against scipy.signal, and the order at which each discretisation converges."""

import math

import pytest
import torch
from scipy import integrate, signal, special

from nondual.efficient_attention.hippo import legt
from nondual.efficient_attention.state_space import RULES, discretize, run
from nondual.ops.discretize import discretize as discretize_diagonal


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def system(n=5, k=3, m=2):
    """A stable system of n states, k inputs and m outputs: A, B, C, D."""
    A = draw(n, n) - 3 * torch.eye(n, dtype=torch.float64)
    return A, draw(n, k, seed=1), draw(m, n, seed=2), draw(m, k, seed=3)


# --- one step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("delta", [1e-3, 0.1, 1.0])
def test_equals_scipys_cont2discrete(delta, rule):
    """Ā and B̄ are scipy's under each rule. (Its bilinear rule puts the mean of two inputs into C and D: see below.)"""
    A, B, C, D = system()
    A_bar, B_bar = discretize(delta, A, B, rule)
    theirs = signal.cont2discrete((A.numpy(), B.numpy(), C.numpy(), D.numpy()), delta, method=rule)
    torch.testing.assert_close((A_bar, B_bar), (torch.from_numpy(theirs[0]), torch.from_numpy(theirs[1])))


def test_one_state_by_hand():
    """A = -1, B = 1, Δ = log 2: half is kept, half is let in; Euler keeps 1 - log 2."""
    A, B, step = torch.tensor([[-1.0]]), torch.tensor([[1.0]]), math.log(2)
    torch.testing.assert_close(discretize(step, A, B), (torch.tensor([[0.5]]), torch.tensor([[0.5]])))
    euler = (torch.tensor([[1 - step]]), torch.tensor([[step]]))
    torch.testing.assert_close(discretize(step, A, B, "euler"), euler)
    kept = (1 - step / 2) / (1 + step / 2)
    bilinear = (torch.tensor([[kept]]), torch.tensor([[step / (1 + step / 2)]]))
    torch.testing.assert_close(discretize(step, A, B, "bilinear"), bilinear)


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_a_diagonal_matrix_equals_the_diagonal_rule(rule):
    a, B = -draw(7).exp(), draw(7, 1, seed=1)
    A_bar, B_bar = discretize(0.3, torch.diag(a), B, rule)
    diagonal = discretize_diagonal(torch.tensor(0.3).double(), a, B[:, 0], rule)
    torch.testing.assert_close((A_bar, B_bar[:, 0]), (torch.diag(diagonal[0]), diagonal[1]))


@pytest.mark.parametrize("delta", [1e-6, 1e-3, 0.01, 0.03, 0.1, 1.0, 30.0])
def test_zero_order_hold_is_exact_to_rounding_at_every_step_length(delta):
    """1 - exp(-Δ), digit for digit: torch's exponential of one small matrix has only ten of them."""
    A_bar, B_bar = discretize(delta, -torch.ones(1, 1).double(), torch.ones(1, 1).double())
    assert abs(A_bar.item() - math.exp(-delta)) < 1e-15 and abs(B_bar.item() + math.expm1(-delta)) < 1e-15


def test_a_singular_matrix_is_held_exactly():
    """A clock: position' = velocity, velocity' = push. A has no inverse; a held push of 1 gives Δ²/2 and Δ."""
    A, B = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0], [1.0]])
    torch.testing.assert_close(discretize(3.0, A, B), (torch.tensor([[1.0, 3], [0, 1]]), torch.tensor([[4.5], [3.0]])))


@pytest.mark.parametrize("rule", RULES)
def test_gradients(rule):
    A, B, *_ = system(3, 2)
    inputs = [torch.tensor(0.3).double().requires_grad_(), A.requires_grad_(), B.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *x: discretize(*x, rule), inputs)


# --- many steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 2, 63])
def test_equals_scipys_lsim_with_held_input(length):
    """scipy's state at the end of step t is ours; its y there reads the step after, so states are compared."""
    A, B, _, _ = system()
    u = draw(1, length, 3, seed=4)
    h, last = run(u, *discretize(0.2, A, B))
    assert h.shape == (1, length, 5)
    if length:
        held = torch.cat([u[0], u[0, -1:]])  # one more time point, for the end of the last step
        eye, none = torch.eye(5).numpy(), torch.zeros(5, 3).numpy()
        _, states, _ = signal.lsim(
            (A.numpy(), B.numpy(), eye, none), held.numpy(), (0.2 * torch.arange(length + 1)).numpy(), interp=False
        )
        torch.testing.assert_close(h[0], torch.from_numpy(states)[1:].reshape(length, 5))
        torch.testing.assert_close(last, h[:, -1])


def test_equals_scipys_bilinear_system_with_the_mean_of_two_inputs():
    """scipy's bilinear C and D hold half of B̄ u: y_t = C h_t + D u_t, where each step lets in (u_{t-1} + u_t) / 2."""
    A, B, C, D = system()
    u = draw(1, 40, 3, seed=4)
    theirs = signal.cont2discrete((A.numpy(), B.numpy(), C.numpy(), D.numpy()), 0.2, method="bilinear")
    _, y, _ = signal.dlsim(theirs, u[0].numpy())
    before = torch.cat([torch.zeros_like(u[:, :1]), u[:, :-1]], 1)
    h, _ = run((before + u) / 2, *discretize(0.2, A, B, "bilinear"))
    torch.testing.assert_close(h @ C.T + u @ D.T, torch.from_numpy(y)[None])


@pytest.mark.parametrize("cut", [0, 1, 8, 17])
def test_splitting_a_sequence_changes_nothing(cut):
    A_bar, B_bar = discretize(0.2, *system()[:2])
    u, state = draw(2, 17, 3), draw(2, 5, seed=1)
    first, carried = run(u[:, :cut], A_bar, B_bar, state)
    second, last = run(u[:, cut:], A_bar, B_bar, carried)
    torch.testing.assert_close((torch.cat([first, second], 1), last), run(u, A_bar, B_bar, state))


def test_gradients_through_time():
    A_bar, B_bar = discretize(0.2, *system(3, 2)[:2])
    inputs = [x.requires_grad_() for x in (draw(2, 5, 2), A_bar, B_bar, draw(2, 3, seed=1))]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e8])
def test_the_last_input_moves_no_earlier_state(value):
    A_bar, B_bar = (x.float() for x in discretize(0.2, *system()[:2]))
    u = draw(3, 70, 3).float()
    spoiled = u.clone()
    spoiled[1, -1] = value
    found, right = run(spoiled, A_bar, B_bar)[0], run(u, A_bar, B_bar)[0]
    assert torch.equal(found[1, :-1], right[1, :-1])
    torch.testing.assert_close(found[[0, 2]], right[[0, 2]], atol=0, rtol=1e-6)


def test_autocast_changes_nothing():
    A, B, *_ = (x.float() for x in system())
    u = draw(2, 20, 3).float()
    for rule in RULES:
        right = run(u, *discretize(0.2, A, B, rule))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(run(u, *discretize(0.2, A, B, rule)), right)


def test_transforms_of_torch_func():
    A_bar, B_bar = discretize(0.2, *system()[:2])
    u, v = draw(4, 2, 9, 3), draw(2, 9, 3, seed=1)
    torch.testing.assert_close(torch.func.vmap(lambda u: run(u, A_bar, B_bar))(u)[0][1], run(u[1], A_bar, B_bar)[0])
    _, forward = torch.func.jvp(lambda u: run(u, A_bar, B_bar), (u[0],), (v,))
    torch.testing.assert_close(forward, run(v, A_bar, B_bar))  # it is linear


# --- convergence ---------------------------------------------------------------------------------------------------

CENTRE, WIDTH, END = 1.0, 0.2, 3.0
OSCILLATOR = (torch.tensor([[0.0, 1.0], [-9.0, -1.0]]).double(), torch.tensor([[0.0], [1.0]]).double())


def bump(t):
    """A smooth pulse."""
    return torch.exp(-((t - CENTRE) ** 2) / (2 * WIDTH**2))


def exact_state(A, B, end=END):
    """The state at `end`, T, of one that started from rest at 0, by completing the square.

    ∫ exp(λ (T - s)) bump(s) ds = σ √(π/2) exp(λ (T - μ) + λ²σ²/2) [erf((s - μ + λσ²) / (σ√2))] from 0 to T
    """
    values, vectors = torch.linalg.eig(A)
    weights = torch.linalg.solve(vectors, B.to(vectors))[:, 0]
    to, start = (
        torch.from_numpy(special.erf(((t - CENTRE + values * WIDTH**2) / (WIDTH * 2**0.5)).numpy())) for t in (end, 0)
    )
    grown = torch.exp(values * (end - CENTRE) + values**2 * WIDTH**2 / 2)
    return (vectors @ (weights * WIDTH * math.sqrt(math.pi / 2) * grown * (to - start))).real


def test_the_exact_state_is_scipys_integral():
    """By quadrature, from the impulse response of x'' + x' + 9 x = u as a textbook has it."""
    omega = math.sqrt(9 - 1 / 4)

    def position(t):
        return math.exp(-t / 2) * math.sin(omega * t) / omega

    def velocity(t):
        return math.exp(-t / 2) * math.cos(omega * t) - position(t) / 2

    for response, exact in zip((position, velocity), exact_state(*OSCILLATOR).tolist()):
        value, error = integrate.quad(
            lambda s, response=response: response(END - s) * math.exp(-((s - CENTRE) ** 2) / (2 * WIDTH**2)),
            *(0, END),
            epsabs=1e-13,
            epsrel=1e-13,
            limit=200,
        )
        assert error < 1e-12 and abs(value - exact) < 1e-12, (value, exact, error)


def state_at_end(rule, where, steps):
    """The state at END in so many steps, each told the pulse at an end, at its middle, or the mean of both ends."""
    step = END / steps
    t = step * torch.arange(steps, dtype=torch.float64)
    told = {
        "left": bump(t),
        "right": bump(t + step),
        "middle": bump(t + step / 2),
        "mean": (bump(t) + bump(t + step)) / 2,
    }[where]
    return run(told[None, :, None], *discretize(step, *OSCILLATOR, rule))[1][0]


ORDERS = {
    **{("zoh", where): order for where, order in (("left", 1), ("right", 1), ("middle", 2), ("mean", 2))},
    **{("bilinear", where): order for where, order in (("left", 1), ("right", 1), ("middle", 2), ("mean", 2))},
    **{("euler", where): 1 for where in ("left", "right", "middle", "mean")},
}


@pytest.mark.parametrize("rule, where", ORDERS)
def test_the_order_of_convergence_is_what_theory_says(rule, where):
    """The slope of log error over log step, by least squares over 5 halvings, is within 0.1 of the table's order."""
    steps = torch.tensor([300, 600, 1200, 2400, 4800])
    errors = torch.stack([(state_at_end(rule, where, n) - exact_state(*OSCILLATOR)).norm() for n in steps.tolist()])
    x, y = -steps.double().log(), errors.log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert abs(slope.item() - ORDERS[rule, where]) < 0.1, (slope.item(), errors.tolist())


@pytest.mark.parametrize("end, order", [(1.2, 1), (END, None)])
def test_mambas_step_errs_by_half_a_step_of_the_push_that_is_left(end, order):
    """Ā = exp(Δ A) and B̄ = Δ B, told the push at the end of each step: this is a sum Δ Σ f(t) over the ends of the
    steps, f(s) = exp(A (T - s)) B push(s), and by Euler and Maclaurin's formula it is off by Δ/2 (f(T) - f(0)), to
    second order. So it is of first order while the push lasts; when it is over f is 0 at both ends, and next to
    nothing is left of the error. Told at the start of the step it is of first order in either case."""
    A, B = OSCILLATOR

    def state(steps, at):
        step = end / steps
        told = bump(step * (torch.arange(steps, dtype=torch.float64) + at))
        return run(told[None, :, None], discretize(step, A, B)[0], step * B)[1][0]

    exact = exact_state(A, B, end)
    errors = {at: torch.stack([(state(n, at) - exact).norm() for n in (100, 200, 400, 800)]) for at in (0, 1)}
    assert ((errors[0][:-1] / errors[0][1:]).log2() - 1).abs().max() < 0.1, errors
    if order:
        left = (B[:, 0] * bump(torch.tensor(end).double()) / 2 * end / 800).norm()  # exp(A 0) B push(T) Δ/2
        assert ((errors[1][:-1] / errors[1][1:]).log2() - order).abs().max() < 0.1, errors
        assert abs(errors[1][-1] / left - 1) < 0.05, (errors, left)
    else:
        assert errors[1].max() < 1e-7 < errors[0].min() / 1000, errors


def test_zero_order_hold_is_exact_for_a_held_input():
    """What the source holds for 0.5 is met to rounding by steps of 0.5 and of 0.001; the other rules miss it."""
    A, B = OSCILLATOR
    held = draw(1, 6, 1)
    values, vectors = torch.linalg.eig(A)  # closed form: each level is (exp(λ t) - 1) / λ, faded by what comes after
    weights = torch.linalg.solve(vectors, B.to(vectors))[:, 0]
    ends = 0.5 * torch.arange(5, -1, -1)[:, None]
    level = (torch.exp(values * (ends + 0.5)) - torch.exp(values * ends)) / values
    exact = (vectors @ (weights * (held[0] * level).sum(0))).real
    for fine in (1, 500):
        u = held.repeat_interleave(fine, 1)
        errors = {
            rule: (run(u, *discretize(0.5 / fine, A, B, rule))[1][0] - exact).abs().max().item() for rule in RULES
        }
        assert errors["zoh"] < 1e-13 and errors["bilinear"] > 1e-8 and errors["euler"] > 1e-4, errors


def test_euler_grows_where_the_others_fade():
    """A stiff system, HiPPO's own: steps that zero-order hold and the bilinear rule can take make Euler explode."""
    radius = {r: torch.linalg.eigvals(discretize(1 / 100, *legt(32), r)[0]).abs().max().item() for r in RULES}
    assert radius["zoh"] < 1 and radius["bilinear"] < 1 and radius["euler"] > 1, radius


# --- the door ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "A, B, rule, says",
    [
        (
            torch.ones(3, 2),
            torch.ones(3, 1),
            "zoh",
            r"A must be floating point and square \(N, N\), got torch.float32 \(3, 2\)",
        ),
        (
            torch.eye(3),
            torch.ones(3),
            "zoh",
            r"B must be \(N, K\) with N = 3 as in A, got \(3,\); one input is B\[:, None\]",
        ),
        (torch.eye(3), torch.ones(2, 1), "zoh", r"B must be \(N, K\) with N = 3 as in A, got \(2, 1\)"),
        (torch.eye(3).long(), torch.ones(3, 1), "zoh", "A must be floating point .* got torch.int64"),
        (torch.eye(3), torch.ones(3, 1).double(), "zoh", "B must have A's dtype and device, torch.float32 on cpu"),
        (torch.eye(3), torch.ones(3, 1), "tustin", r"rule must be one of \['zoh', 'bilinear', 'euler'\], got 'tustin'"),
    ],
)
def test_a_system_that_does_not_fit_is_named(A, B, rule, says):
    with pytest.raises(ValueError, match=says):
        discretize(0.1, A, B, rule)


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="A must be a Tensor, got list"):
        discretize(0.1, [[1.0]], torch.ones(1, 1))
    with pytest.raises(TypeError, match="u must be a Tensor, got list"):
        run([[[1.0]]], torch.eye(1), torch.ones(1, 1))


@pytest.mark.parametrize(
    "u, state, says",
    [
        (torch.ones(2, 5), None, r"u must be \(B, L, K\) with K = 1 as in B_bar, got \(2, 5\)"),
        (torch.ones(2, 5, 2), None, r"u must be \(B, L, K\) with K = 1"),
        (torch.ones(2, 5, 1).double(), None, "u must have A's dtype .* got torch.float64 on cpu"),
        (torch.ones(2, 5, 1), torch.ones(2, 4), r"state must be \(B, N\) = \(2, 3\), got \(2, 4\)"),
    ],
)
def test_an_input_that_does_not_fit_is_named(u, state, says):
    with pytest.raises(ValueError, match=says):
        run(u, torch.eye(3), torch.ones(3, 1), state)


@pytest.mark.parametrize("length", [0, 1, 3])
def test_the_last_state_shares_memory_with_nothing(length):
    A, B, *_ = system()
    state, u = draw(2, 5), draw(2, length, 3)
    h, last = run(u, *discretize(0.1, A, B), state)
    assert last.untyped_storage().nbytes() == last.nbytes
    assert last.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr() for x in (h, state) if x.numel()}
