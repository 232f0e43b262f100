"""A diagonal state space model: four ways to one output, and what a NaN or a huge number may reach."""

import math

import pytest
import torch
from harness import DRAWS, ErrorBudget

from nondual.efficient_attention.diagonal import chunked, convolution, powers, recurrence, scan
from nondual.efficient_attention.s4d import s4d_inv, s4d_legs, s4d_lin
from nondual.ops.discretize import discretize

WAYS = [recurrence, chunked, convolution, scan]
INITS = [s4d_legs, s4d_inv, s4d_lin]
B, D, N = 2, 3, 10


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def arguments(length, dtype=torch.float64, init=s4d_legs, seed=0):
    """u, Ā, B̄, C and a state, of steps long enough for the states to fade within a test."""
    whole = torch.complex128 if dtype == torch.float64 else torch.complex64
    delta = torch.tensor([0.01, 0.05, 0.3], dtype=torch.float64)[:, None]
    A = init(N).expand(D, -1)
    A_bar, B_bar = discretize(delta, A, torch.ones_like(A), "zoh")
    seeds = ((10 * seed + 1, (D,)), (10 * seed + 2, (B, D)))
    C, state = (draw(*shape, N // 2, seed=i, dtype=torch.complex128) for i, shape in seeds)
    return draw(B, length, D, seed=10 * seed).to(dtype), *(x.to(whole) for x in (A_bar, B_bar, C, state))


# --- four ways -----------------------------------------------------------------------------------------------------


def test_one_pair_of_states_by_hand():
    """Ā = i/2, B̄ = C = 1, an impulse: 2 Re of 1, i/2, -1/4, -i/8."""
    one = torch.ones(1, 1, dtype=torch.complex64)
    for way in WAYS:
        y, state = way(torch.tensor([[[1.0], [0], [0], [0]]]), 0.5j * one, one, one)
        torch.testing.assert_close(y[0, :, 0], torch.tensor([2, 0, -0.5, 0]))
        torch.testing.assert_close(state, torch.tensor([[[-0.125j]]]))


@pytest.mark.parametrize("length", [0, 1, 2, 63, 111])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("way", [chunked, convolution, scan])
def test_convolution_and_scan_equal_the_recurrence_forward_and_backward(way, init, length):
    outs = []
    for f in (recurrence, way):
        leaves = [x.clone().requires_grad_() for x in arguments(length, init=init)]
        y, state = f(*leaves)
        ((y * draw(*y.shape, seed=3)).sum() + (state * draw(*state.shape, seed=4)).real.sum()).backward()
        outs.append([y, state, *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)])
    torch.testing.assert_close(*outs, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_gradients(way):
    leaves = [x[:1, :3, :1] if x.ndim == 3 else x[:1] for x in arguments(5)]
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    leaves[0] = draw(1, 3, 1).requires_grad_()
    leaves[4] = draw(1, 1, N // 2, dtype=torch.complex128).requires_grad_()
    assert torch.autograd.gradcheck(way, leaves)


@pytest.mark.parametrize("cut", [0, 1, 8, 17])
@pytest.mark.parametrize("way", WAYS)
def test_splitting_a_sequence_changes_nothing(way, cut):
    u, A_bar, B_bar, C, state = arguments(17)
    first, carried = way(u[:, :cut], A_bar, B_bar, C, state)
    second, last = way(u[:, cut:], A_bar, B_bar, C, carried)
    torch.testing.assert_close((torch.cat([first, second], 1), last), way(u, A_bar, B_bar, C, state))


@pytest.mark.parametrize("way", [chunked, convolution, scan])
def test_no_less_exact_than_the_recurrence_in_float32(way):
    """Error against float64 at most twice that of the plain loop in float32, gradients three times."""

    def run(f, wide, single, grad):
        x = [(v.to(torch.complex128 if v.is_complex() else torch.float64) if wide else v.clone()) for v in single]
        x = [v.requires_grad_() for v in x]
        y, _ = f(*x)
        y.backward(grad.to(y.dtype))
        return [y.detach(), *(v.grad for v in x)]

    budget = ErrorBudget()
    for seed in range(DRAWS):
        given = arguments(1000, torch.float32, seed=seed), draw(B, 1000, D, seed=10 * seed + 3).float()
        runs = (run(f, wide, *given) for f, wide in ((way, False), (recurrence, False), (recurrence, True)))
        for name, ours, plain, exact in zip(("y", "d_u", "d_A_bar", "d_B_bar", "d_C", "d_state"), *runs):
            budget.add(name, ours=ours, plain=plain, exact=exact)
    budget.check({"y": 2}, otherwise=3, ulps=math.log2(2000) / 2)  # an FFT rounds once at each of its levels


@pytest.mark.parametrize("n", [1, 2, 3, 8, 100])
def test_powers_are_powers(n):
    x = arguments(1)[1]
    torch.testing.assert_close(powers(x, n), torch.stack([x**i for i in range(n)], -1))
    zero = torch.zeros(1, 1, dtype=torch.complex64, requires_grad=True)  # a state that forgets at once: 0⁰ is 1
    assert powers(zero, n)[0, 0].tolist() == [1.0] + [0.0] * (n - 1)
    powers(zero, n + 1).real.sum().backward()
    assert zero.grad.item() == 1


def test_the_convolution_does_not_come_round():
    """An impulse at the last step moves nothing before it."""
    u, *rest = arguments(64)
    u = torch.zeros_like(u)
    u[:, -1] = 1
    assert convolution(u, *rest[:3])[0][:, :-1].abs().max() < 1e-14


# --- causal, whatever comes last ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e8, -1e30])
@pytest.mark.parametrize("length", [2, 64, 65, 200])
@pytest.mark.parametrize("way", WAYS)
def test_the_last_input_moves_nothing_before_it(way, length, value):
    """Not by a bit; by FFT, a large number only within the bound that the docstring gives."""
    u, A_bar, B_bar, C, state = arguments(length, torch.float32)
    spoiled = u.clone()
    spoiled[0, -1, 1] = value
    y, last = way(spoiled, A_bar, B_bar, C, state)
    right, right_last = way(u, A_bar, B_bar, C, state)
    off = (y - right).abs()
    assert off[1].max() == 0 or way is convolution, "the other row of the batch"
    assert off[0, :, [0, 2]].max() == 0 or way is convolution, "the other channels"
    if way is convolution and math.isfinite(value):
        K = recurrence(torch.eye(1, length)[..., None].expand(1, length, D), A_bar, B_bar, C)[0][0]  # (L, D)
        bound = 2**-24 * math.log2(2 * length) * K[:, 1].norm() * abs(value)
        assert off[0, :-1, 1].max() <= bound + 1e-4
    else:
        assert off[0, :-1, 1].max() <= (1e-4 if way is convolution else 0)
    assert off[1].max() <= 1e-4 and off[0, :, [0, 2]].max() <= 1e-4
    if not math.isfinite(value):
        assert not y[0, -1, 1].isfinite() and not last[0, 1].isfinite().any()
    torch.testing.assert_close(last[1], right_last[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_spoils_all_that_follows(way, value):
    """As in the recurrence: from its step on, in its channel, up to the last state, and the gradients with it."""
    u, A_bar, B_bar, C, state = arguments(130)
    u[0, 70, 1] = value
    C.requires_grad_()
    y, last = way(u, A_bar, B_bar, C, state)
    assert y[0, :70].isfinite().all() and y[1].isfinite().all() and y[0, :, [0, 2]].isfinite().all()
    assert not y[0, 70:, 1].isfinite().any() and not last[0, 1].isfinite().any()
    y.sum().backward()
    assert C.grad[1].isnan().all() and not C.grad[[0, 2]].isnan().any()
