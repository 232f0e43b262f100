"""S4D: against scipy, what its initialisation has to do with HiPPO, and what the module promises and refuses."""

import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from scipy import linalg, signal

from nondual.efficient_attention.hippo import legs
from nondual.efficient_attention.s4d import (
    S4D,
    chunked,
    convolution,
    recurrence,
    s4d_inv,
    s4d_legs,
    s4d_lin,
    scan,
)

WAYS = [recurrence, chunked, convolution, scan]
INITS = [s4d_legs, s4d_inv, s4d_lin]
B, D, N = 2, 3, 10


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(**options):
    torch.manual_seed(0)
    return S4D(D, N, dt_min=0.01, dt_max=0.3, **options).double()


# --- compilation, export and transforms ----------------------------------------------------------------------------


@pytest.mark.parametrize("way, most", [(chunked, 2), (scan, 2), (convolution, 5)])
def test_how_often_it_compiles(way, most):
    """Twice for all lengths: one taken for a constant, then any. The FFT: once more for each doubling of the length."""
    torch._dynamo.reset()
    module = layer(op=way).float()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for length in (5, 7, 9, 13, 64, 65, 100):
        u = draw(B, length, D).float()
        y, state = compiled(u, return_state=True)
        right, right_state = module(u, return_state=True)
        torch.testing.assert_close(y, right, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(state, right_state, atol=1e-5, rtol=1e-4)
    assert counter.frame_count <= most


@pytest.mark.parametrize("way", [chunked, scan])
def test_one_exported_program_serves_every_batch_and_length(way):
    module = layer(op=way)
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}
    program = torch.export.export(module, (draw(B, 6, D),), dynamic_shapes=(sizes,)).module()
    for batch, length in ((2, 6), (2, 2), (3, 64), (5, 130)):
        u = draw(batch, length, D)
        torch.testing.assert_close(program(u), module(u))


@pytest.mark.parametrize("op", WAYS)
def test_transforms_of_torch_func(op):
    """Gradients of each sample, and forward mode against reverse mode for every parameter."""
    module, u = layer(op=op), draw(3, 9, D)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, u):
        return torch.func.functional_call(module, parameters, (u[None],)).square().mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, u)
    for i in range(3):
        torch.testing.assert_close({name: g[i] for name, g in each.items()}, torch.func.grad(loss)(parameters, u[i]))
    for number, (name, p) in enumerate(parameters.items()):
        along = draw(*p.shape, seed=number)
        zeros = {n: torch.zeros_like(q) for n, q in parameters.items()}
        _, forward = torch.func.jvp(lambda q: loss(q, u[0]), (parameters,), (zeros | {name: along},))
        torch.testing.assert_close(forward, (each[name][0] * along).sum())
    torch.testing.assert_close(torch.func.vmap(module)(u[:, None]), module(u)[:, None])


# --- scipy ---------------------------------------------------------------------------------------------------------


def as_real(A):
    """A diagonal of conjugate pairs as real 2 x 2 blocks: [[Re, -Im], [Im, Re]]."""
    return linalg.block_diag(*([[a.real, -a.imag], [a.imag, a.real]] for a in A.tolist()))


def continuous(module, channel):
    """One channel as a continuous system of real matrices, for scipy: B is (1, 0) in each block, C is 2 (Re, -Im)."""
    A = torch.complex(-module.log_A_real.exp(), module.A_imag)[channel].detach()
    C = 2 * (module.C[channel].detach() * torch.tensor([1.0, -1.0])).reshape(1, -1)
    enters = torch.tensor([1.0, 0.0]).double().repeat(len(A))[:, None]
    return as_real(A), enters.numpy(), C.numpy(), module.D[channel].detach().view(1, 1).numpy()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("op", WAYS)
def test_equals_scipys_lsim(op, init):
    """Held input: scipy's state at the end of each step, read with C, and D u of the step itself."""
    module = layer(op=op, init=init)
    u = draw(1, 50, D)
    y = module(u)
    for d, delta in enumerate(module.log_dt.exp().tolist()):
        A, enters, C, skip = continuous(module, d)
        told = torch.cat([u[0, :, d], u[0, -1:, d]]).numpy()
        _, _, states = signal.lsim((A, enters, C, skip), told, [delta * t for t in range(51)], interp=False)
        expected = states[1:] @ C[0] + skip[0, 0] * told[:-1]
        torch.testing.assert_close(y[0, :, d], torch.from_numpy(expected), atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_equals_scipys_dlsim_of_cont2discrete(rule):
    """scipy reads a state before its input enters, and hides half an input in C and D of its bilinear: both undone."""
    module = layer(rule=rule)
    u = draw(1, 50, D)
    y = module(u)
    for d, delta in enumerate(module.log_dt.exp().tolist()):
        A, enters, C, skip = continuous(module, d)
        A_bar, B_bar, *_ = signal.cont2discrete((A, enters, C, skip), delta, method=rule)
        _, expected, _ = signal.dlsim((A_bar, B_bar, C @ A_bar, C @ B_bar + skip, delta), u[0, :, d].numpy())
        torch.testing.assert_close(y[0, :, d], torch.from_numpy(expected[:, 0]), atol=1e-10, rtol=1e-9)


def test_the_kernel_is_scipys_impulse_response_as_steps_shrink():
    """K_l / Δ at the middle of step l against scipy.signal.impulse: zero-order hold errs by Δ² there."""
    module, errors = layer(), []
    for delta in (0.02, 0.01, 0.005):
        module.log_dt.data.fill_(math.log(delta))
        steps = int(2 / delta)
        impulse = torch.zeros(1, steps, D).double()
        impulse[0, 0] = 1
        kernel = (module(impulse) - module.D * impulse)[0, :, 0].detach() / delta
        at = delta * (torch.arange(steps).double() + 0.5)
        _, exact = signal.impulse(continuous(module, 0), T=at.numpy())
        errors.append((kernel - torch.from_numpy(exact)).abs().max().item())
    ratios = [errors[0] / errors[1], errors[1] / errors[2]]
    assert all(abs(math.log2(r) - 2) < 0.1 for r in ratios), (errors, ratios)


# --- the initialisation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 8, 64, 256])
def test_s4d_legs_is_half_the_spectrum_of_the_normal_part(n):
    """By scipy's general eigenvalues, which know nothing of skew: each on the line -1/2, in conjugate pairs."""
    A, enters = legs(n)
    values = torch.from_numpy(linalg.eigvals((A + enters @ enters.T / 2).numpy()))
    upper = values[values.imag > 0]
    upper = upper[upper.imag.argsort()]
    torch.testing.assert_close(s4d_legs(n), upper, atol=1e-8 * n**2, rtol=1e-9)
    assert s4d_legs(n).shape == (n // 2,) and (s4d_legs(n).real == -0.5).all()


def test_s4d_inv_and_lin_by_hand():
    """N = 4. Inv: 4/π (4/3 - 1) and 4/π (4 - 1); Lin: 0 and π."""
    torch.testing.assert_close(s4d_inv(4).imag, torch.tensor([4 / 3, 12]).double() / math.pi)
    torch.testing.assert_close(s4d_lin(4).imag, torch.tensor([0, math.pi]).double())
    assert (s4d_inv(4).real == -0.5).all() and (s4d_lin(4).real == -0.5).all()


@pytest.mark.parametrize("n", [16, 64, 256])
def test_the_fastest_state_of_legs_turns_about_n_squared_over_pi(n):
    """And so does Inv's, from below: to N/3."""
    top, inv = s4d_legs(n)[-1].imag.item(), s4d_inv(n)[-1].imag.item()
    assert 0 < n**2 / math.pi - top < n / 3 and 0 < n**2 / math.pi - inv < n / 3 + 1


def normal_part(n):
    """S4D-LegS before it is made diagonal: the normal part and half of B. And LegS itself."""
    A, enters = legs(n)
    return A, enters, A + enters @ enters.T / 2, enters / 2


@pytest.mark.parametrize("n", [1, 2, 8, 40])
@pytest.mark.parametrize("omega", [0.3, 3.0, 50.0])
def test_the_diagonal_part_answers_a_frequency_like_legs_divided_by_one_plus_pi(n, omega):
    """G_diagonal = G_LegS / (1 + Π), Π = ∏ (s - k) / (s + k + 1); at s = iω |Π| is ω / √(N² + ω²) and goes to 0."""
    A, enters, normal, half = (x.to(torch.complex128) for x in normal_part(n))
    s, eye, k = 1j * omega, torch.eye(n, dtype=A.dtype), torch.arange(n).double()
    product = ((s - k) / (s + k + 1)).prod()
    whole, diagonal = torch.linalg.solve(s * eye - A, enters), torch.linalg.solve(s * eye - normal, half)
    torch.testing.assert_close(diagonal, whole / (1 + product), atol=1e-11, rtol=1e-9)
    assert abs(product.abs().item() - omega / math.hypot(n, omega)) < 1e-12


def answers_to_a_bump(n, width=0.1, period=80.0):
    """The first 4 states of the diagonal part, and of LegS, for ever after a smooth bump: by their Fourier series.

    All frequencies of the bump up to 8 / width, beyond which it has less than 1e-13, and a period in which all fades.
    """
    omega = torch.arange(int(8 / width * period / (2 * math.pi))) * (2 * math.pi / period)
    bump = torch.exp(-((omega * width) ** 2) / 2 - 1j * omega)  # at time 1, of area 1
    _, _, normal, half = normal_part(n)
    values, V = torch.linalg.eigh(-1j * (normal + torch.eye(n) / 2))
    diagonal = (V[:4] * (V.mH @ half.to(V))[:, 0]) @ (1 / (1j * omega - (1j * values - 0.5)[:, None]))
    A, enters, *_ = normal_part(4)  # LegS is triangular: its first states do not know of the rest
    whole = [torch.linalg.solve(1j * w * torch.eye(4) - A.to(V), enters.to(V))[:, 0] for w in omega]
    return (torch.fft.irfft(g * bump, 4096) * 4096 / period for g in (diagonal, torch.stack(whole, -1)))


def test_a_smooth_input_is_answered_alike_as_n_grows():
    """The largest difference, at any time after, falls as 1/N, as |Π| does: a slope of -1 within 0.1."""
    sizes = torch.tensor([64, 128, 256, 512])
    errors = torch.stack([(ours - whole).abs().max() for ours, whole in map(answers_to_a_bump, sizes.tolist())])
    x, y = sizes.double().log(), errors.log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert abs(slope + 1) < 0.1, (slope, errors)


@pytest.mark.parametrize("n", [32, 128])
def test_yet_the_kernels_themselves_never_meet(n):
    """The distance between the two kernels of state k, in the mean square, stays at √(2k + 1) / 2 (within 2 %).

    By a Gramian, so exactly: W solves A W + W Aᵀ + B Bᵀ = 0 for the two systems side by side. That is half of the
    kernel's own square, (2k + 1) / 2, however large N is: it has moved up to frequencies between N and N².
    """
    A, enters, normal, half = (x.numpy() for x in normal_part(n))
    both = np.concatenate([enters, half])
    W = linalg.solve_continuous_lyapunov(linalg.block_diag(A, normal), -both @ both.T)
    for k in range(4):
        distance = math.sqrt(W[k, k] + W[n + k, n + k] - 2 * W[k, n + k])
        assert abs(distance / (math.sqrt(2 * k + 1) / 2) - 1) < 0.02, (k, distance)


# --- the module ----------------------------------------------------------------------------------------------------


def test_the_layer_is_causal_as_it_comes():
    torch.manual_seed(0)
    layer, u = S4D(D, N), draw(B, 300, D).float()
    for value in (math.nan, math.inf, 1e8):
        spoiled = u.clone()
        spoiled[:, -1] = value
        assert torch.equal(layer(spoiled)[:, :-1], layer(u)[:, :-1])


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("op", WAYS)
def test_decoding_step_by_step_equals_the_whole(op, rule):
    module = layer(op=op, rule=rule)
    u = draw(B, 13, D)
    y, last = module(u, return_state=True)
    torch.testing.assert_close(module(u), y)
    first, state = module(u[:, :4], return_state=True)
    decoded = []
    for u_t in u[:, 4:].unbind(1):
        y_t, state = module.step(u_t, state)
        decoded.append(y_t)
    torch.testing.assert_close(torch.cat([first, torch.stack(decoded, 1)], 1), y)
    torch.testing.assert_close(state, last)
    torch.testing.assert_close(module.step(u[:, 0])[0], y[:, 0])


@pytest.mark.parametrize("op", WAYS)
def test_every_parameter_learns_and_no_step_sees_the_future(op):
    module = layer(op=op)
    u = draw(B, 9, D).requires_grad_()
    module(u).square().sum().backward()
    names = {"log_dt": (D,), "log_A_real": (D, N // 2), "A_imag": (D, N // 2), "C": (D, N // 2, 2), "D": (D,)}
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == names
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in module.parameters())
    u.grad = None
    module(u)[:, 4].sum().backward()
    assert (u.grad[:, :5] != 0).all() and u.grad[:, 5:].abs().max() < 1e-14


def test_what_it_starts_from():
    torch.manual_seed(0)
    module = S4D(5000, 4, dt_min=1e-3, dt_max=1e-1)
    dt = module.log_dt.exp()
    assert 1e-3 <= dt.min() and dt.max() <= 0.1 + 1e-7 and abs(module.log_dt.mean() - math.log(1e-2)) < 0.1
    assert abs(module.C.square().sum(-1).mean() - 1) < 0.05 and (module.D == 1).all()
    A = torch.complex(-module.log_A_real.exp(), module.A_imag)
    torch.testing.assert_close(A[17], s4d_legs(4).to(torch.complex64))
    other = S4D(3, 4, init=lambda n: torch.tensor([-1.0 + 2j, -3.0]))
    torch.testing.assert_close(other.log_A_real.exp()[0], torch.tensor([1.0, 3.0]))


@pytest.mark.parametrize("op", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype, op):
    torch.manual_seed(0)
    module = S4D(D, N, op=op)
    u = draw(B, 40, D).to(dtype)
    y, state = module(u, return_state=True)
    assert y.dtype == dtype and state.dtype == torch.complex64
    torch.testing.assert_close(y, module(u.float()).to(dtype))
    small = module.to(dtype)
    y, state = small(u, return_state=True)
    assert y.dtype == dtype and state.dtype == torch.complex64 and y.isfinite().all()
    assert small.step(u[:, 0], state)[0].dtype == dtype


@pytest.mark.parametrize("op", WAYS)
def test_autocast_changes_nothing_in_float32(op):
    torch.manual_seed(0)
    module, u = S4D(D, N, op=op), draw(B, 40, D).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = module(u)
        direct = op(u, *module.discretized(torch.float32))[0]
    torch.testing.assert_close(inside, module(u))
    torch.testing.assert_close(direct + module.D * u, inside)


@pytest.mark.parametrize("op", WAYS)
def test_nothing_to_do(op):
    module = layer(op=op)
    y, state = module(draw(B, 0, D), return_state=True)
    assert y.shape == (B, 0, D) and (state == 0).all() and state.shape == (B, D, N // 2)
    held = torch.ones_like(state)
    _, after = module(draw(B, 0, D), held, return_state=True)
    assert torch.equal(after, held) and after.data_ptr() != held.data_ptr()
    assert module(draw(0, 5, D)).shape == (0, 5, D)


@pytest.mark.parametrize("op", WAYS)
def test_on_the_meta_device_it_knows_its_shapes(op):
    with torch.device("meta"):
        module = S4D(D, N, op=op)
        y, state = module(torch.empty(B, 7, D), return_state=True)
    assert y.is_meta and y.shape == (B, 7, D) and state.shape == (B, D, N // 2)


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="u must be a Tensor, got list"):
        layer()([[[1.0, 2.0, 3.0]]])
    with pytest.raises(TypeError, match="u must be a Tensor, got ndarray"):
        layer().step(np.ones((2, 3)))
    with pytest.raises(TypeError, match="state must be a Tensor, got ndarray"):
        layer()(draw(2, 5, 3), np.ones((2, 3, 5)))


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: S4D(3, 7), "n_states must be even and 2 or more, for conjugate pairs, got 7"),
        (lambda: S4D(3, 0), "n_states must be even and 2 or more"),
        (lambda: S4D(0, 4), "d_model must be 1 or more, got 0"),
        (lambda: S4D(3, 4, rule="euler"), r"rule must be one of \['zoh', 'bilinear'\], got 'euler'"),
        (lambda: S4D(3, 4, dt_min=0.2), "dt_min and dt_max must be positive and in order, got 0.2 and 0.1"),
        (lambda: S4D(3, 4, dt_min=0), "dt_min and dt_max must be positive and in order, got 0 and 0.1"),
        (lambda: S4D(3, 4, init=lambda n: torch.ones(2) + 0j), "init must give 2 values with negative real part"),
        (lambda: S4D(3, 4, init=lambda n: -torch.ones(n) + 0j), "init must give 2 values with negative real part"),
        (lambda: s4d_inv(3), "n_states must be even"),
        (lambda: s4d_lin(-2), "n_states must be even"),
        (lambda: layer()(draw(2, 5)), r"u must be floating point \(B, L, D\) with D = 3, got torch.float64 \(2, 5\)"),
        (lambda: layer()(draw(2, 5, 4)), r"u must be floating point \(B, L, D\) with D = 3"),
        (lambda: layer()(torch.ones(2, 5, 3, dtype=torch.long)), "u must be floating point .* got torch.int64"),
        (lambda: layer()(draw(2, 5, 3), draw(2, 3, 5)), "state must be complex .* got torch.float64"),
        (
            lambda: layer()(draw(2, 5, 3), draw(1, 3, 5, dtype=torch.complex128)),
            r"state must be complex \(B, D, N/2\) = \(2, 3, 5\), got torch.complex128 \(1, 3, 5\)",
        ),
        (lambda: layer().step(draw(2, 5, 3)), r"u must be \(B, D\) for one step, got \(2, 5, 3\)"),
        (lambda: layer().step(draw(2, 4)), r"u must be floating point \(B, L, D\) with D = 3"),
    ],
)
def test_what_cannot_be_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
