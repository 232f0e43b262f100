"""The selective scan: its door, its reference, its matrix, and the engine for CPUs, compiled and in plain torch.

"c" and "torch" are the two ways of impl="cpu". More of that engine is in test_selective_scan_cpu.py, how its loop is
compiled in test_c_loop.py, and the Triton kernels are in test_selective_scan_triton.py.
"""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import laid
from mambapy.pscan import pscan
from scan_cases import NAMES, WAYS, as_double, check, errors, leaves, made, results
from scipy.integrate import solve_ivp
from transformers.models.mamba import modeling_mamba

from nondual.ops import selective_scan as door
from nondual.ops.impl import choose
from nondual.ops.selective_scan import cpu, reference, selective_scan, selective_scan_matrix, selective_scan_step
from nondual.ops.selective_scan.inputs import Inputs

pytestmark = pytest.mark.usefixtures("poisoned")
both = pytest.mark.parametrize("name", WAYS)


# --- what it computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "cpu", "auto"])
def test_a_case_by_hand(impl):
    """One channel, one state, A = -ln 2, Δ = 1, 2, 1: what was there is halved, quartered, halved.

    h = 1/2 · 4 + 1·1·3 = 5;  1/4 · 5 + 2·2·(-1) = -2.75;  1/2 · (-2.75) + 1·1·2 = 0.625
    y = C h + D u = 2·5 + 10·3 = 40;  1·(-2.75) + 10·(-1) = -12.75;  (-4)·0.625 + 10·2 = 17.5
    """
    column = lambda *x: torch.tensor(x)[None, :, None]  # noqa: E731
    u, delta, B, C = column(3.0, -1.0, 2.0), column(1.0, 2.0, 1.0), column(1.0, 2.0, 1.0), column(2.0, 1.0, -4.0)
    A, D = torch.tensor([[-math.log(2)]]), torch.tensor([10.0])
    y, state = selective_scan(u, delta, A, B, C, D, state=torch.tensor([[[4.0]]]), impl=impl)
    torch.testing.assert_close(y.flatten(), torch.tensor([40.0, -12.75, 17.5]))
    torch.testing.assert_close(state, torch.tensor([[[0.625]]]))
    # forgotten before the second step: h = 0 - 4 = -4, then -2 + 2 = 0
    reset = torch.tensor([[False, True, False]])
    y, state = selective_scan(u, delta, A, B, C, D, state=torch.tensor([[[4.0]]]), reset=reset, impl=impl)
    torch.testing.assert_close(y.flatten(), torch.tensor([40.0, -14.0, 20.0]))


def by_loops(given, rule="zoh-euler"):
    """The equations, one number at a time."""
    x = {k: v.detach().double().numpy() if torch.is_tensor(v) else v for k, v in given.items()}
    (batch, length, channels), states = x["u"].shape, x["A"].shape[1]
    y, last = np.zeros((batch, length, channels)), np.zeros((batch, channels, states))
    for b, d, n in itertools.product(range(batch), range(channels), range(states)):
        h = x["state"][b, d, n]
        for t in range(length):
            B, C = (m[d, n] if m.ndim == 2 else m[b, t, d * m.shape[2] // channels, n] for m in (x["B"], x["C"]))
            step = math.log1p(math.exp(x["delta"][b, t, d] + x["delta_bias"][d]))
            if "reset" in x and x["reset"][b, t]:
                h = 0
            enters = step if rule == "zoh-euler" else (math.exp(step * x["A"][d, n]) - 1) / x["A"][d, n]
            h = math.exp(step * x["A"][d, n]) * h + enters * B * x["u"][b, t, d]
            y[b, t, d] += C * h
        last[b, d, n] = h
    z = x["z"]
    return torch.tensor((y + x["D"] * x["u"]) * z / (1 + np.exp(-z))), torch.tensor(last)


@pytest.mark.parametrize("g_b, g_c", [(1, 1), (2, 3), (0, 1), (6, 0)])
@pytest.mark.parametrize("impl, rule", [("reference", "zoh-euler"), ("reference", "zoh"), ("cpu", "zoh-euler")])
def test_it_is_the_equations(impl, rule, g_b, g_c):
    given = made(2, 7, 6, 3, g_b=g_b, g_c=g_c, dtype=torch.float64, reset="middle")
    ours = selective_scan(**given, impl=impl, discretization=rule)
    for a, b in zip(ours, by_loops(given, rule)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_zero_order_hold_is_the_differential_equation():
    """h' = A h + B u with u held still over each step, by scipy's integrator: "zoh" is exact, "zoh-euler" is not."""
    given = made(1, 4, 1, 2, dtype=torch.float64, without=("D", "z", "delta_bias")) | {"delta_softplus": False}
    given["delta"] = given["delta"].detach().abs()
    x = {k: v.detach()[0].numpy() for k, v in given.items() if torch.is_tensor(v)}
    h = x["state"][0]
    for t in range(4):

        def slope(_, h, t=t):
            return given["A"].detach().numpy()[0] * h + x["B"][t, 0] * x["u"][t, 0]

        h = solve_ivp(slope, (0, x["delta"][t, 0]), h, rtol=1e-11, atol=1e-13).y[:, -1]
    _, zoh = selective_scan(**given, discretization="zoh", impl="reference")
    _, euler = selective_scan(**given, discretization="zoh-euler", impl="reference")
    np.testing.assert_allclose(zoh[0, 0].detach(), h, rtol=1e-8)
    assert (euler - zoh).abs().max() > 1e-3


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_it_is_mambapy_s_and_transformers_s(impl):
    """Where they overlap: B and C shared by all channels, a state of zero; mambapy has the scan alone."""
    given = made(2, 21, 5, 3, dtype=torch.float64, without=("state",))
    inner = {k: x.detach() for k, x in given.items() if k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")}
    y, last = selective_scan(**given, impl=impl)
    swap = {k: x.squeeze(2) if k in "BC" else x for k, x in inner.items()}
    swap = {k: x.transpose(1, 2) if x.ndim == 3 else x for k, x in swap.items()}
    theirs, state = modeling_mamba.mamba_selective_scan(
        swap["u"], swap["delta"], swap["A"], swap["B"], swap["C"], D=swap["D"], z=swap["z"],
        delta_bias=swap["delta_bias"], delta_softplus=True, return_last_state=True,
    )  # fmt: skip
    torch.testing.assert_close(y, theirs.mT, atol=1e-5, rtol=1e-5)  # theirs narrows B to float32
    torch.testing.assert_close(last, state, atol=1e-5, rtol=1e-5)
    step = F.softplus(inner["delta"] + inner["delta_bias"])[..., None]
    hs = pscan(torch.exp(step * inner["A"]), step * inner["B"] * inner["u"][..., None])
    torch.testing.assert_close(last, hs[:, -1])
    bare, _ = selective_scan(**{k: x for k, x in given.items() if k not in ("D", "z")}, impl=impl)
    torch.testing.assert_close(bare, (hs * inner["C"]).sum(-1))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("resets", [False, True])
def test_the_matrix_times_u_is_the_scan(impl, resets):
    given = made(2, 19, 5, 3, dtype=torch.float64, without=("z", "state"), reset="middle" if resets else None)
    given |= {"B": given["B"].squeeze(2), "C": given["C"].squeeze(2)}
    M = selective_scan_matrix(**{k: x for k, x in given.items() if k != "u"})
    y, _ = selective_scan(**given, impl=impl)
    torch.testing.assert_close(torch.einsum("bdts,bsd->btd", M, given["u"]), y)
    assert (M.triu(1) == 0).all()


def test_the_reference_has_every_gradient_twice():
    given = made(1, 4, 2, 2, g_b=2, dtype=torch.float64, reset="middle")
    given["reset"][:] = torch.tensor([False, False, True, False])
    rest = {k: x for k, x in given.items() if k not in NAMES}
    for rule in ("zoh-euler", "zoh"):
        run = lambda *x, rule=rule: selective_scan(  # noqa: E731
            **dict(zip(NAMES, x)), **rest, impl="reference", discretization=rule
        )
        assert torch.autograd.gradcheck(run, [given[k] for k in NAMES])
        assert torch.autograd.gradgradcheck(run, [given[k] for k in NAMES])


# --- the engine for CPUs against float64 -----------------------------------------------------------------------------


@both
@pytest.mark.parametrize("length", [0, 1, 2, 17, 63, 64, 65, 257])
@pytest.mark.parametrize("reset", [None, "first", "middle", "everywhere"])
def test_error_is_that_of_plain_pytorch_at_every_length(way, name, length, reset):
    way(name)
    check(made(2, length, 3, 5, reset=reset))


@both
@pytest.mark.parametrize("n", [1, 3, 4, 16, 17])
@pytest.mark.parametrize("d, g_b, g_c", [
    (1, 1, 1), (67, 1, 1), (6, 2, 3), (134, 2, 1), (7, 0, 1), (67, 1, 0), (5, 0, 0), (4, 4, 4),
])  # fmt: skip
def test_error_at_every_width_and_grouping(way, name, n, d, g_b, g_c):
    way(name)
    check(made(2, 19, d, n, g_b=g_b, g_c=g_c))


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("g", [1, 0])
def test_error_in_every_dtype(way, name, dtype, g):
    way(name)
    given = made(2, 83, 37, 16, g_b=g, dtype=dtype, reset="middle")
    if dtype == torch.float64:
        ours, truth = results(given, "cpu"), results(given, "reference")
        for key, t in truth.items():
            torch.testing.assert_close(ours[key], t, rtol=1e-11, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")
    else:
        check(given)


@both
@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("state",), ("D", "z", "delta_bias", "state")])
def test_every_argument_may_be_left_out(way, name, without):
    way(name)
    given = made(2, 70, 5, 3, without=without)
    check(given)
    given["delta"] = F.softplus(given["delta"]).detach().requires_grad_()
    check(given | {"delta_softplus": False})


@both
def test_parameters_keep_their_own_dtype(way, name):
    way(name)
    given = made(2, 21, 5, 3, g_b=0, dtype=torch.bfloat16)
    wide = {k: given[k].detach().float().requires_grad_() for k in ("A", "B", "D", "delta_bias", "state")}
    ours = results(given | wide, "cpu")
    assert ours["y"].dtype == torch.bfloat16 and ours["dA"].dtype == ours["dB"].dtype == torch.float32
    check(given | wide)


@both
@pytest.mark.parametrize("case", ["steps of 0", "tiny steps", "far apart", "vanishing", "growing", "near overflow"])
def test_error_at_the_edges_of_the_exponential(way, name, case):
    way(name)
    given = made(2, 67, 19, 5, without=("z", "delta_bias")) | {"delta_softplus": False}
    delta, A = given["delta"].detach().abs(), given["A"].detach()
    if case == "steps of 0":
        delta = delta.masked_fill(delta < 1, 0)
    if case == "tiny steps":
        delta = delta * 1e-6
    if case == "far apart":  # states of one channel from forgetting at once to never
        A = -torch.logspace(-6, 4, 5).expand(19, 5)
    if case == "vanishing":
        A, delta = A * 1e4, delta * 10
    if case == "growing":
        A, delta = -A / 40, delta / 4
    if case == "near overflow":  # one step at exp(87) and the rest fading
        A, delta = torch.full_like(A, 1.0), delta * -0.05
        delta[:, 40] = 40.0
    given |= {"delta": delta.requires_grad_(), "A": A.clone().requires_grad_()}
    found = errors(given)
    for key, (ours, plain, floor) in found.items():
        assert ours <= (2 if key in ("y", "last") else 3) * plain + floor, f"{key}: {ours:.1e}, plain {plain:.1e}"


def exponential(x, dtype):
    """exp(x) as the compiled loop has it: one step of length 1 from a state of 1, with nothing entering."""
    x = x.to(dtype)[None, :, None].expand(1, -1, 1)
    length = x.shape[1]
    one = torch.ones(1, 1, length, dtype=dtype)
    zero, B = torch.zeros_like(one), torch.zeros(1, 1, 1, 1, dtype=dtype)
    _, h = selective_scan(zero, one, x[0], B, B, state=one.mT, impl="cpu")
    return h.flatten()


@pytest.mark.parametrize("dtype, ulps", [(torch.float32, 2), (torch.float64, 2)])
def test_the_exponential_is_right_to_two_units_in_the_last_place(way, dtype, ulps):
    way("c")
    low, high = (-87.3, 88.7) if dtype == torch.float32 else (-708.3, 709.7)
    x = torch.cat([torch.linspace(low, high, 300_000, dtype=torch.float64), torch.linspace(-1, 1, 99_999).double()])
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1e-30, -1e-30]).double()]).to(dtype)
    truth = np.exp(x.numpy().astype(np.longdouble))
    ours = exponential(x, dtype).numpy()
    error = np.abs(ours.astype(np.longdouble) - truth) / np.spacing(truth.astype(ours.dtype))
    assert error.max() <= ulps
    assert (exponential(torch.zeros(5), dtype) == 1).all()


@both
def test_the_exponential_at_its_ends(way, name):
    way(name)
    x = torch.tensor([-math.inf, -1e30, -1000.0, -104.5, -95.0, 88.8, 1000.0, 1e30, math.inf, math.nan])
    ours = exponential(x, torch.float32)
    torch.testing.assert_close(ours, x.exp(), equal_nan=True, rtol=1e-6, atol=1e-45)
    ours = exponential(x * 8, torch.float64)
    torch.testing.assert_close(ours, (x.double() * 8).exp(), equal_nan=True)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_and_silu_at_their_ends(way, name, dtype):
    way(name)
    ends = [-1e4, -200.0, -87.0, -20.0, -1e-3, 0.0, 1e-3, 19.9, 20.1, 200.0]
    delta = torch.tensor(ends, dtype=dtype)[None, :, None].requires_grad_()
    z = delta.detach().clone().requires_grad_()
    given = made(1, len(ends), 1, 1, dtype=dtype, without=("delta_bias",), scale=1e-6) | {"delta": delta, "z": z}
    check(given)
    ours, truth = results(given, "cpu"), results(as_double(given), "reference")
    small = truth["ddelta"][0, :4, 0]  # of relative accuracy, small as they are
    torch.testing.assert_close(ours["ddelta"][0, :4, 0].double(), small, rtol=1e-4, atol=1e-37)


# --- any layout ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("g", [2, 0])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "batch inside", "one row", "one number"])
def test_any_layout_of_inputs_and_of_the_incoming_gradients(way, name, layout, g):
    way(name)
    given = made(2, 67, 34, 3, g_b=g, g_c=2, reset="middle")
    shaped = {k: laid(x.detach(), layout).requires_grad_() if x.ndim > 1 else x for k, x in leaves(given).items()}
    reset = given["reset"].mT.contiguous().mT
    draw = torch.Generator().manual_seed(3)
    dy, dlast = (laid(torch.randn(s, generator=draw), layout) for s in ((2, 67, 34), (2, 34, 3)))
    check(given | shaped | {"reset": reset}, dy=dy, dlast=dlast)


@both
def test_gradients_of_one_output_alone(way, name):
    way(name)
    given = made(2, 70, 5, 3)
    wide = as_double(given)
    for which in (0, 1):
        ours = torch.autograd.grad(selective_scan(**given, impl="cpu")[which].sum(), given["B"])[0]
        truth = torch.autograd.grad(selective_scan(**wide, impl="reference")[which].sum(), wide["B"])[0]
        torch.testing.assert_close(ours, truth.float(), atol=1e-5, rtol=1e-5)
    y, _ = selective_scan(**given, impl="cpu")
    frozen = {k: x.detach() if torch.is_tensor(x) else x for k, x in given.items()}
    A = given["A"]
    (alone,) = torch.autograd.grad(selective_scan(**frozen | {"A": A}, impl="cpu")[0].sum(), A)
    torch.testing.assert_close(alone, torch.autograd.grad(y.sum(), A)[0])


# --- laws ------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("cut", [1, 63, 64, 100])
def test_a_split_sequence_is_the_whole_through_its_gradients(way, name, cut):
    way(name)
    given = made(2, 131, 5, 3, g_c=0, dtype=torch.float64, reset="middle")

    def joined():
        timed = ("u", "delta", "B", "z", "reset")
        first, second = ({k: given[k][:, part] for k in timed} for part in (slice(0, cut), slice(cut, None)))
        y, state = selective_scan(**given | first, impl="cpu")
        more, state = selective_scan(**given | second | {"state": state}, impl="cpu")
        return torch.cat([y, more], 1), state

    inputs = list(leaves(given).values())
    whole, parts = selective_scan(**given, impl="cpu"), joined()
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b)
    grads = (torch.autograd.grad([(x * x).sum() for x in out], inputs) for out in (whole, parts))
    for key, a, b in zip(leaves(given), *grads):
        torch.testing.assert_close(a, b, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("impl", ["reference", "cpu", "auto"])
def test_one_step_after_another_is_the_scan(impl, largest):
    given = {k: x.detach() for k, x in leaves(made(2, 9, 6, 3, g_b=2)).items()}
    y, last = selective_scan(**given, delta_softplus=True, impl=impl)
    state, fixed = given["state"], {k: given[k] for k in ("A", "D", "delta_bias")}
    for t in range(9):
        now = {k: given[k][:, t] for k in ("u", "delta", "B", "C", "z")}
        now["C"] = now["C"].squeeze(1)  # (B, N)
        y_t, state = selective_scan_step(**now, **fixed, delta_softplus=True, state=state, impl=impl)
        torch.testing.assert_close(y_t, y[:, t])
    torch.testing.assert_close(state, last)
    step = lambda: selective_scan_step(**now, **fixed, delta_softplus=True, state=state, impl=impl)  # noqa: E731
    assert largest(step) <= state.numel()
    # constant B: one group for each channel
    B = torch.randn(6, 3)
    first = {k: x if x.ndim < 3 or k == "state" else x[:, :1] for k, x in given.items()}
    expected, _ = selective_scan(**first | {"B": B}, impl=impl)
    now = {k: given[k][:, 0] for k in ("u", "delta", "C", "z")} | {"B": B.expand(2, 6, 3), "state": given["state"]}
    torch.testing.assert_close(selective_scan_step(**now, **fixed, impl=impl)[0], expected[:, 0])


@both
def test_what_came_before_a_reset_is_forgotten_even_a_nan(way, name):
    way(name)
    given = made(1, 131, 5, 3)
    reset = torch.zeros(1, 131, dtype=torch.bool)
    reset[:, 70] = True
    bad = {k: given[k].detach().clone() for k in ("u", "B", "state")}
    bad["u"][:, 3], bad["B"][:, 68], bad["state"][:] = torch.nan, torch.inf, torch.nan
    bad = {k: x.requires_grad_() for k, x in bad.items()}
    y, last = selective_scan(**given | bad, reset=reset, impl="cpu")
    after = {k: x[:, 70:] if k in ("u", "delta", "B", "C", "z") else x for k, x in given.items() if k != "state"}
    expected, state = selective_scan(**after, impl="cpu")
    torch.testing.assert_close(y[:, 70:], expected)
    torch.testing.assert_close(last, state)
    du, dC = torch.autograd.grad(y[:, 70:].sum() + last.sum(), (bad["u"], given["C"]))
    assert du[:, 70:].isfinite().all() and dC[:, 70:].isfinite().all()


@both
def test_memory_is_linear_in_the_length(way, name, largest):
    """Nothing of the size B·L·D·N: at most the inputs, and what is kept between chunks."""
    way(name)
    d, n = 48, 16
    for length in (512, 2048):
        given = made(1, length, d, n, without=("state",))

        def both_ways(given=given):
            y, _ = selective_scan(**given, impl="cpu")
            y.sum().backward()

        assert largest(both_ways) <= max(length * d, 3 * cpu.CHUNK * d * n)
    assert length * d * n > 8 * max(length * d, cpu.CHUNK * d * n)


def test_threads_do_not_change_a_bit(way):
    """Of the compiled loop; torch's own exp may differ in the last place with the cut between two threads."""
    way("c")
    given = made(2, 300, 200, 16, g_c=2)
    before = torch.get_num_threads()
    seen = []
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            seen.append(results(given, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for key, x in seen[0].items():
            assert torch.equal(x, other[key]), key


# --- as an operator of torch -----------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("without", [(), ("D", "z", "delta_bias", "state")])
def test_opcheck(way, name, without):
    way(name)
    given = made(2, 67, 6, 3, g_c=2, without=without, reset=None if without else "middle")
    inputs = [given.get(k) for k in (*NAMES, "reset")]
    torch.library.opcheck(torch.ops.nondual.selective_scan_cpu.default, (*inputs, True))
    y, last, kept = torch.ops.nondual.selective_scan_cpu(*inputs, True)
    inputs = [None if x is None else x.detach() for x in (y, last, kept, *inputs)]
    torch.library.opcheck(torch.ops.nondual.selective_scan_cpu_backward.default, (*inputs, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_forward_and_backward(dynamic):
    def run(given):
        y, last = selective_scan(**given | {"u": given["u"] * 1.5}, impl="auto")
        return y * 2 + last.sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (9, 70):
        given = made(2, length, 5, 3, reset="middle")
        ours, plain = compiled(given), run(given)
        torch.testing.assert_close(ours, plain)
        inputs = list(leaves(given).values())
        for a, b in zip(*(torch.autograd.grad(out.sum(), inputs) for out in (ours, plain))):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["reference", "cpu", "auto"])
def test_meta_tensors(impl):
    given = {k: x.to("meta") if torch.is_tensor(x) else x for k, x in made(2, 70, 5, 3, dtype=torch.float16).items()}
    y, last = selective_scan(**given, impl=impl)
    assert y.shape == (2, 70, 5) and y.dtype == torch.float16
    assert last.shape == (2, 5, 3) and last.dtype == torch.float32


@both
def test_autocast(way, name):
    way(name)
    given = made(2, 70, 37, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y, last = selective_scan(**given | {"B": given["B"].bfloat16()}, impl="cpu")  # the dtypes meet
        y.sum().backward()
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert all(x.grad.dtype == torch.float32 for x in leaves(given).values())
    timed = {k: given[k].detach().bfloat16().requires_grad_() for k in ("u", "delta", "B", "C", "z")}
    for k in ("A", "D", "state"):
        given[k].grad, kept = None, given[k].grad
        timed |= {f"_{k}": kept}
    alone, _ = selective_scan(**given | {k: x for k, x in timed.items() if k[0] != "_"}, impl="cpu")
    assert torch.equal(alone, y)  # all sums in float32: autocast has no say within
    alone.sum().backward()
    for k in ("A", "D", "state"):
        assert torch.equal(given[k].grad, timed[f"_{k}"]), k


@both
def test_a_second_derivative_is_refused(way, name):
    way(name)
    given = made()
    y, _ = selective_scan(**given, impl="cpu")
    with pytest.raises(RuntimeError, match="has no second derivative; impl='reference' has one"):
        (grad,) = torch.autograd.grad(y.sum(), given["u"], create_graph=True)
        grad.sum().backward()


def test_which_engine_auto_is(monkeypatch):
    seen = []
    monkeypatch.setattr(cpu, "selective_scan", lambda **given: seen.append("cpu") or reference.selective_scan(**given))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        selective_scan(**made(dtype=dtype))
        assert seen.pop() == "cpu"
    selective_scan(**made(), discretization="zoh")  # what the engine does not hold
    selective_scan(**made(length=0))  # nothing to do
    assert not seen

    def auto(device, states=16, rule="zoh-euler"):
        u = SimpleNamespace(device=torch.device(device), dtype=torch.float32)
        given = Inputs(u, u, torch.zeros(1, states), u, u, None, None, None, False, None, None, rule)
        taken = choose("auto", door.ENGINES, given)
        return next(name for name, engine in door.ENGINES.items() if engine is taken)

    monkeypatch.setattr(door, "refuses_transforms", lambda *tensors: None)  # these are no tensors
    assert auto("meta") == auto("cuda", rule="zoh") == "reference"
    assert (auto("cuda", 256), auto("cuda", 257)) == ("triton", "reference")  # 257 states are more than a kernel holds


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("b, length, d", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_nothing_to_do(impl, b, length, d):
    given = made(b, length, d, 2)
    y, last = selective_scan(**given, impl=impl)
    assert y.shape == (b, length, d) and torch.equal(last, given["state"])
    (y.sum() + last.sum()).backward()


# --- refused ---------------------------------------------------------------------------------------------------------


def zeros(**other):
    return {
        "u": torch.zeros(2, 5, 6), "delta": torch.zeros(2, 5, 6), "A": torch.zeros(6, 3), "B": torch.zeros(2, 5, 3),
        "C": torch.zeros(2, 5, 3),
    } | other  # fmt: skip


@pytest.mark.parametrize("other, says", [
    ({"u": torch.zeros(5, 6)}, r"u must be 3-dimensional \(B, L, D\), got \(5, 6\)"),
    ({"A": torch.zeros(5, 3)}, r"A must be \(D, N\) with D = 6 .* got \(5, 3\)"),
    ({"A": torch.zeros(6, 0)}, r"N of 1 or more, got \(6, 0\)"),
    ({"A": torch.zeros(6)}, r"A must be \(D, N\)"),
    ({"delta": torch.zeros(2, 5, 1)}, r"delta must be \(B, L, D\) = \(2, 5, 6\), got \(2, 5, 1\)"),
    ({"z": torch.zeros(2, 6, 5)}, r"z must be \(B, L, D\)"),
    ({"D": torch.zeros(1)}, r"D must be \(D,\) = \(6,\), got \(1,\)"),
    ({"delta_bias": torch.zeros(6, 1)}, r"delta_bias must be \(D,\)"),
    ({"state": torch.zeros(2, 3, 6)}, r"state must be \(B, D, N\) = \(2, 6, 3\), got \(2, 3, 6\)"),
    ({"reset": torch.zeros(5, dtype=torch.bool)}, r"reset must be \(B, L\)"),
    ({"reset": torch.zeros(2, 5)}, "reset must be boolean, .* got torch.float32"),
    ({"B": torch.zeros(2, 4, 3)}, r"B must be .* = \(2, 5, 3\), .* or \(D, N\) = \(6, 3\), got \(2, 4, 3\)"),
    ({"C": torch.zeros(3, 6)}, r"C must be .* got \(3, 6\)"),
    ({"C": torch.zeros(3)}, r"C must be .* got \(3,\)"),
    ({"B": torch.zeros(2, 5, 4, 3)}, "the G of B must divide D = 6, got 4"),
    ({"C": torch.zeros(2, 5, 0, 3)}, "the G of C must divide D = 6, got 0"),
    ({"A": torch.zeros(6, 3, dtype=torch.complex64)}, "A must be real, floating point, got torch.complex64"),
    ({"u": torch.zeros(2, 5, 6, dtype=torch.int64)}, "u must be floating point, got torch.int64"),
    ({"delta": torch.zeros(2, 5, 6).half()}, "delta must have the dtype of u, torch.float32, got torch.float16"),
    ({"C": torch.zeros(2, 5, 3).double()}, "C must have the dtype of u"),
    ({"A": torch.zeros(6, 3, device="meta")}, "A must be on the device of u, cpu, got meta"),
    ({"reset": torch.zeros(2, 5, dtype=torch.bool, device="meta")}, "reset must be on the device of u"),
    ({"discretization": "bilinear"}, r"discretization must be one of \['zoh-euler', 'zoh'\], got 'bilinear'"),
    ({"discretization": "zoh", "impl": "cpu"}, "must be 'zoh-euler' for impl='cpu', got 'zoh'; impl='reference' has"),
    ({"impl": "fast"}, "impl must be one of .*'cpu'.* got 'fast'"),
])  # fmt: skip
def test_what_does_not_fit_is_named(other, says):
    with pytest.raises(ValueError, match=says):
        selective_scan(**zeros(**other))


def test_a_step_is_named_too_and_a_dtype_that_the_engine_does_not_hold():
    given = zeros()
    with pytest.raises(ValueError, match=r"u must be \(B, D\), .* for one step, got \(2, 5, 6\).*selective_scan takes"):
        selective_scan_step(**given)
    small = {k: x.to(torch.float8_e4m3fn) for k, x in given.items()}
    with pytest.raises(ValueError, match="u must be float16, bfloat16, float32 or float64 for impl='cpu', got"):
        selective_scan(**small, impl="cpu")
