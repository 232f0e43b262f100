"""The selective scan's kernels against float64, at their edges, in every layout; in Triton's interpreter or on a GPU.

Where there is no GPU the kernels run in the interpreter, in float32 and float16, in chunks of 8 steps of which 2 at a
time are unrolled: see conftest.py. On a GPU the same tests run compiled, with bfloat16, and larger ones besides.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import scan_cases
import torch
from harness import DRAWS, DTYPES, everywhere, half_a_place, incoming, laid, needs_the_interpreter
from scan_cases import leaves, results

from nondual.ops import selective_scan as door
from nondual.ops.selective_scan import selective_scan, selective_scan_step
from nondual.ops.selective_scan import triton as kernels
from nondual.ops.selective_scan.triton import forward, launch, tiles

SRC = Path(__file__).parents[2] / "src"
CHUNK = kernels.CHUNK


def test_the_kernels_can_run_here():
    assert kernels.INTERPRETED or torch.cuda.is_available(), "unset TRITON_INTERPRET=0: there is no GPU to compile for"


pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def once(monkeypatch):
    """The interpreter makes triton.language its own at every call of a function of a kernel, which is most of its time:
    here once for each launch and module."""
    if not kernels.INTERPRETED:
        return
    from triton.runtime import interpreter

    launch, done = interpreter.GridExecutor.__call__, set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in done:
            done.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def launched(self, *args, **kwargs):
        done.clear()
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)


@pytest.fixture
def levels(monkeypatch):
    """A function that sets into how many spans time is cut."""
    return lambda spans: monkeypatch.setattr(tiles, "spans_of", lambda u, kernel: spans)


RESETS = {
    "at the first": lambda length: [0],
    "in the middle": lambda length: [length // 2, length // 2 + 3],
    "at a chunk's border": lambda length: [CHUNK - 1, CHUNK, 2 * CHUNK],
    "at every step": lambda length: range(length),
}


def made(length, d, n, *, b=1, dtype=torch.float32, device="cpu", reset=None, **more):
    """Every argument, with A, D, delta_bias and the state in float32, as a model has them."""
    given = scan_cases.made(b, length, d, n, dtype=dtype, parameters=torch.float32, device=device, **more)
    if reset:
        m = torch.zeros(b, length, dtype=torch.bool, device=device)
        m[-1, [t for t in RESETS[reset](length) if t < length]] = True
        given["reset"] = m
    return given


def check(given, **how):
    """At most twice the error of plain PyTorch, three times for gradients, judged over several draws: however large
    the case, dA and dD have few numbers, which may be exact by luck in one."""
    how = {"dy": incoming(given["u"])} | how  # the same numbers for our engine, plain PyTorch and float64
    scan_cases.check(given, "triton", draws=DRAWS, floor=half_a_place, **how)


# --- right ---------------------------------------------------------------------------------------------------------

GRID = {
    "one step": {"length": 1, "d": 3, "n": 3},
    "two steps, one state": {"length": 2, "d": 5, "n": 1},
    "one step more than is unrolled": {"length": 3, "d": 2, "n": 4},
    "one chunk less one": {"length": CHUNK - 1, "d": 3, "n": 2},
    "one chunk": {"length": CHUNK, "d": 3, "n": 2},
    "two chunks and one, in a batch": {"length": 2 * CHUNK + 1, "d": 5, "n": 3, "b": 2},
    "more channels than a block": {"length": 5, "d": 37, "n": 16},
    "eight states": {"length": 3, "d": 67, "n": 8},
    "32 states": {"length": 5, "d": 3, "n": 32},
    "200 states": {"length": 3, "d": 2, "n": 200},
    "groups of each its own number": {"length": 9, "d": 6, "n": 5, "g_b": 2, "g_c": 3},
    "a group for each channel": {"length": 5, "d": 3, "n": 3, "g_b": 3, "g_c": 1},
    "B the same at every step": {"length": 9, "d": 5, "n": 3, "g_b": 0},
    "C the same at every step": {"length": 9, "d": 6, "n": 3, "g_c": 0, "g_b": 2},
    "B and C the same at every step": {"length": 9, "d": 37, "n": 3, "g_b": 0, "g_c": 0},
    "no D": {"length": 5, "d": 3, "n": 3, "without": ("D",)},
    "no gate": {"length": 5, "d": 3, "n": 3, "without": ("z",)},
    "no bias": {"length": 5, "d": 3, "n": 3, "without": ("delta_bias",)},
    "nothing that may be left out": {"length": 9, "d": 3, "n": 3, "without": ("D", "z", "delta_bias", "state")},
    **{f"reset {at}": {"length": 2 * CHUNK + 1, "d": 3, "n": 3, "reset": at} for at in RESETS},
}


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRID)
def test_error_is_that_of_plain_pytorch(device, dtype, case):
    check(made(**GRID[case], dtype=dtype, device=device))


@everywhere
def test_steps_without_softplus_may_be_negative(device):
    given = made(9, 3, 3, device=device, without=("delta_softplus", "delta_bias", "z"))
    with torch.no_grad():
        given["delta"] += 0.9
        given["A"] *= 0.2
    assert (given["delta"] < 0).any()
    check(given)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", ["large steps", "steps near zero", "A far below", "A just above zero", "A zero"])
def test_at_the_edges_of_what_is_stable(device, dtype, change):
    given = made(11, 3, 3, dtype=dtype, device=device)
    with torch.no_grad():
        if change == "large steps":
            given["delta"] += 60
        elif change == "steps near zero":
            given["delta"] -= 25
        else:
            given["A"].copy_({"A far below": -3e3, "A just above zero": 0.1, "A zero": 0.0}[change])
    check(given)


@everywhere
def test_a_step_length_keeps_all_its_places(device):
    """With A = 0 and B = C = u = 1 the output of one step is Δ itself, here from e^-30 to 30."""
    delta = torch.linspace(-30, 30, 241, device=device)[None, None].requires_grad_()
    one = torch.ones(241, 1, device=device)
    y, _ = selective_scan(torch.ones_like(delta), delta, 0 * one, one, one, delta_softplus=True, impl="triton")
    (slope,) = torch.autograd.grad(y.sum(), delta)
    exact = torch.nn.functional.softplus(delta.detach().double(), threshold=100)
    assert ((y - exact).abs() / exact).max() < (4e-6 if device == "cpu" else 8e-6)  # exp(x) is known to x ulps: e^-30
    assert ((y - exact).abs() / exact)[delta > -2].max() < 4e-7
    torch.testing.assert_close(slope, delta.detach().double().sigmoid().float(), rtol=8e-6, atol=0)


@everywhere
def test_a_reset_forgets_nan_and_infinity_too(device):
    given = made(2 * CHUNK + 3, 3, 3, device=device)
    given = {name: x.detach() if torch.is_tensor(x) else x for name, x in given.items()}
    at = CHUNK + 2
    given["reset"] = torch.arange(2 * CHUNK + 3, device=device).eq(at)[None]
    y, last = selective_scan(**given, impl="triton")
    given["u"][:, at - 2] = torch.nan
    given["delta"][:, at - 1] = torch.inf
    given["state"][:] = torch.nan
    again, last_again = selective_scan(**given, impl="triton")
    assert again[:, :at].isnan().any() and torch.equal(again[:, at:], y[:, at:]) and torch.equal(last, last_again)


@everywhere
def test_what_overflows_float16_before_its_gate_does_not_reach_the_gradient(device):
    given = {name: x.detach() for name, x in leaves(made(4, 3, 2, dtype=torch.float16, device=device)).items()}
    given["B"] = given["B"] * 1e3
    given["C"] = given["C"] * 1e3
    given["z"] = (given["z"] - 14).requires_grad_()
    y, _ = selective_scan(**given, delta_softplus=True, impl="triton")
    (dz,) = torch.autograd.grad(y.float().sum() * 1e-3, given["z"])
    assert y.isfinite().all() and dz.isfinite().all()


@everywhere
@pytest.mark.parametrize("only", ["y", "last"])
def test_the_gradient_of_one_output_alone(device, only):
    check(made(CHUNK + 3, 3, 3, device=device), only=only)


@everywhere
def test_a_sequence_in_two_is_the_whole_and_gradients_go_through_the_state(device):
    given, cut = made(CHUNK + 5, 5, 3, device=device), CHUNK + 3

    def halves(impl):
        timed = ("u", "delta", "B", "C", "z")
        first, second = dict(given), dict(given)
        for name in timed:
            first[name], second[name] = given[name][:, :cut], given[name][:, cut:]
        y, second["state"] = selective_scan(**first, impl=impl)
        z, state = selective_scan(**second, impl=impl)
        return torch.cat([y, z], 1), state

    whole, split = selective_scan(**given, impl="triton"), halves("triton")
    weights = [incoming(x, seed) for seed, x in enumerate(whole)]
    ins = leaves(given)
    grads = [torch.autograd.grad(outs, list(ins.values()), weights) for outs in (whole, split)]
    for name, a, b in zip(("y", "state", *ins), (*whole, *grads[0]), (*split, *grads[1])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@everywhere
def test_one_step_at_a_time(device):
    given = {name: x.detach() for name, x in leaves(made(3, 5, 3, device=device)).items()}
    whole, last = selective_scan(**given, impl="triton")
    state, same = given["state"], {name: given[name] for name in ("A", "D", "delta_bias")}
    for t in range(3):
        now = {name: given[name][:, t] for name in ("u", "delta", "B", "C", "z")}
        y, state = selective_scan_step(**now, **same, state=state, impl="triton")
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(state, last)


# --- two levels ----------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spans, more", [
    (2, {}), (3, {"reset": "in the middle"}), (3, {"reset": "at a chunk's border"}), (2, {"g_b": 0, "g_c": 0}),
    (3, {"without": ("D", "z", "delta_bias", "state")}),
])  # fmt: skip
def test_two_levels_are_right(device, dtype, spans, more, levels):
    levels(spans)
    check(made(2 * CHUNK + 3, 3, 3, **more, dtype=dtype, device=device))


@everywhere
def test_two_levels_are_one_to_rounding(device, levels):
    given = made(3 * CHUNK, 3, 2, device=device)
    found = []
    for spans in (1, 3):
        levels(spans)
        found.append(results(given, "triton"))
    for name, x in found[0].items():
        torch.testing.assert_close(x, found[1][name], rtol=2e-5, atol=2e-5)


@everywhere
def test_nan_is_forgotten_between_the_levels_too(device, levels):
    levels(3)
    given = {name: x.detach() for name, x in leaves(made(3 * CHUNK, 2, 2, device=device)).items()}
    given |= {"reset": torch.arange(3 * CHUNK, device=device).eq(CHUNK + 1)[None], "delta_softplus": True}
    _, last = selective_scan(**given, impl="triton")
    given["state"][:] = torch.nan
    y, again = selective_scan(**given, impl="triton")
    assert y[:, : CHUNK + 1].isnan().all() and y[:, CHUNK + 1 :].isfinite().all() and torch.equal(again, last)


@everywhere
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_two_levels_take_over_by_their_rule(device, kernel):
    def spans(b, length, d):
        return kernels.spans_of(torch.empty(1, device=device).expand(b, length, d), kernel)

    chip = 8 if device == "cpu" else torch.cuda.get_device_properties(0).multi_processor_count
    full, wanted = tiles.FULL[kernel] * chip, tiles.SPANNED[kernel] * chip
    assert spans(1, 100 * CHUNK, full) == spans(full, 100 * CHUNK, 1) == 1
    assert spans(1, 100 * CHUNK, full // 2) == -(-wanted // (full // 2)) > 1
    assert spans(1, 100 * CHUNK, 1) == 50  # no span is shorter than two chunks
    assert spans(1, 4 * CHUNK - 1, 1) == spans(1, 1, 1) == 1


# --- any layout ----------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "batch inside", "one number", "one head"])
def test_any_layout_of_inputs_and_of_the_incoming_gradients(device, layout):
    given = made(5, 3, 2, b=2, device=device)
    dy, d_state = torch.randn(2, 5, 3, device=device), torch.randn(2, 3, 2, device=device)
    for name in ("u", "delta", "A", "B", "C", "z", "state"):
        given[name] = laid(given[name].detach(), layout).requires_grad_()
    check(given, dy=laid(dy, layout), dlast=laid(d_state, layout))


@everywhere
def test_the_gradient_of_a_sum(device):
    given = made(5, 3, 2, device=device)
    check(given, dy=torch.ones((), device=device).expand(1, 5, 3), dlast=torch.ones((), device=device).expand(1, 3, 2))


@everywhere
@pytest.mark.parametrize("axis", [0, 1])
def test_offsets_beyond_two_to_the_31(device, axis, monkeypatch):
    """Steps or batches so far apart that the last offset passes 2^31; the memory between is never touched."""
    sizes = [(3, 2, 5), (1, 5, 5)][axis]
    strides = [10, 5, 1]
    strides[axis] = -(-(2**31 + 5) // (sizes[axis] - 1))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    room = torch.empty(2**31 + 4096, dtype=torch.float16, device=device)

    def far(seed):
        x = torch.as_strided(room, sizes, strides, seed * 512)
        return x.copy_(torch.randn(sizes, generator=torch.Generator().manual_seed(seed)))

    u, delta, z, dy = (far(seed) for seed in range(4))
    rest = made(sizes[1], 5, 2, b=sizes[0], dtype=torch.float16, device=device, without=("u", "delta", "z"))
    near = [x.clone(memory_format=torch.contiguous_format) for x in (u, delta, z)]
    found = []
    for timed in ((u, delta, z), near):
        given = rest | {name: x.detach().requires_grad_() for name, x in zip(("u", "delta", "z"), timed)}
        found.append(results(given, "triton", dy=dy))
    for name, x in found[0].items():
        assert torch.equal(x, found[1][name]), name


@everywhere
def test_runs_are_equal_to_the_bit(device, levels):
    for spans in (1, 2):
        levels(spans)
        given = made(2 * CHUNK + 1, 5, 3, g_b=0, device=device)
        first = results(given, "triton")
        for _ in range(1 if device == "cpu" else 99):
            again = results(given, "triton")
            assert all(torch.equal(x, again[name]) for name, x in first.items())


# --- memory --------------------------------------------------------------------------------------------------------


@needs_the_interpreter
def test_in_the_chunks_and_steps_of_a_gpu(monkeypatch):
    """With what is compiled for a GPU, in place of the interpreter's smaller numbers: chunks of 64, 8 or 4 steps."""
    own = tiles.configuration

    def configuration(*about):
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "INTERPRETED", False)
            return own(*about)

    monkeypatch.setattr(tiles, "configuration", configuration)
    monkeypatch.setattr(tiles, "CHUNK", 64)
    assert (configuration("forward", 16)["STEPS"], configuration("backward", 16)["STEPS"]) == (8, 4)
    check(made(67, 3, 16))


@needs_the_interpreter
@pytest.mark.parametrize("more", [
    {}, {"g_b": 2, "reset": "in the middle"}, {"g_b": 0, "g_c": 0},
    {"without": ("D", "z", "delta_bias", "state")},
])  # fmt: skip
def test_no_kernel_leaves_its_tensors_or_writes_twice(more, levels, monkeypatch, watch):
    """u, delta, z and dy lie inside larger tensors, whose other elements count as outside."""
    watched = {name: watch(getattr(kernels, f"{name}_kernel")) for name in KERNELS}
    for name, kernel in watched.items():
        monkeypatch.setattr(launch, f"{name}_kernel", kernel)
    levels(2)
    given = made(CHUNK + 3, 6, 3, **more)
    for name in {"u", "delta", "z"} & set(given):
        given[name] = laid(given[name].detach(), "sliced").requires_grad_()
    results(given, "triton", dy=laid(torch.randn(given["u"].shape), "sliced"))
    assert {name: kernel.launches for name, kernel in watched.items()} == KERNELS


KERNELS = {"forward": 2, "pass": 2, "adjoint": 1, "backward": 1}  # launches of each, in two levels


@needs_the_interpreter
def test_a_fault_in_memory_would_be_seen(watch, monkeypatch):
    watched = watch(kernels.pass_kernel)
    x = torch.zeros(1, 2, 3)
    how = {"REVERSE": False, "BLOCK": 4}
    watched[(1,)](x.clone(), x, x, None, 3, 2, **how)
    with pytest.raises(Exception, match="outside of every tensor"):
        watched[(1,)](x.clone(), x, x, None, 4, 2, **how)
    watched = watch(kernels.forward_kernel)
    monkeypatch.setattr(launch, "forward_kernel", watched)
    given, place = made(2, 3, 2, b=2), forward.place
    selective_scan(**given, impl="triton")
    monkeypatch.setattr(forward, "place", lambda *sizes: (0 * place(*sizes)[0], *place(*sizes)[1:]))
    with pytest.raises(AssertionError, match="a race"):  # both programs take the first batch
        selective_scan(**given, impl="triton")


@everywhere
def test_without_a_gradient_nothing_is_kept(device):
    given = made(2 * CHUNK, 3, 2, device=device)
    own = {name: x.detach() if torch.is_tensor(x) else x for name, x in given.items()}
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "state")
    *_, checkpoint, ungated = torch.ops.nondual.selective_scan(*(own[x] for x in order), None, False)
    assert checkpoint.numel() == ungated.numel() == 0
    *_, checkpoint, ungated = torch.ops.nondual.selective_scan(*(own[x] for x in order), None, True)
    assert checkpoint.shape == (1, 2, 3, 2) and ungated.shape == given["u"].shape
    with torch.no_grad():
        quiet = selective_scan(**given, impl="triton")
    for a, b in zip(quiet, selective_scan(**given, impl="triton")):
        assert torch.equal(a, b) and not a.requires_grad and b.requires_grad


# --- as an operator of torch ---------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("more", [{}, {"without": ("D", "z", "delta_bias", "state"), "g_b": 0}])
def test_opcheck(device, more):
    given = made(2, 2, 1, device=device, **more)
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    args = (*(given.get(x) for x in order), True, given.get("state"), None, True)
    torch.library.opcheck(torch.ops.nondual.selective_scan.default, args)
    y, last, *kept = (x.detach() for x in torch.ops.nondual.selective_scan(*args))
    args = [x.detach() if torch.is_tensor(x) else x for x in (y, last, *args[:-1], *kept)]
    torch.library.opcheck(torch.ops.nondual.selective_scan_backward.default, args)


@everywhere
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_forward_and_backward(device, dynamic):
    backend = "aot_eager" if device == "cpu" else "inductor"

    def twice(u, more):
        y, state = selective_scan(u * 1.5, **more, impl="triton")
        return y * 2, state

    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, dynamic=dynamic, backend=backend)
    for length in (3, 5):
        given = made(length, 3, 2, device=device)
        u = given.pop("u")
        ins = [u, *leaves(given).values()]
        ours, plain = compiled(u, given), twice(u, given)
        grads = [torch.autograd.grad(outs, ins, [incoming(x) for x in outs]) for outs in (ours, plain)]
        for a, b in zip((*ours, *grads[0]), (*plain, *grads[1])):
            torch.testing.assert_close(a, b)


def test_meta_tensors():
    given = {name: x.to("meta") if torch.is_tensor(x) else x for name, x in made(5, 3, 2).items()}
    y, state = selective_scan(**given, impl="triton")
    assert y.shape == (1, 5, 3) and state.shape == (1, 3, 2) and y.device.type == "meta"


@everywhere
def test_autocast(device):
    given = made(3, 3, 2, device=device)
    with torch.autocast(device, torch.float16):
        y, state = selective_scan(**given, impl="triton")
        (y.sum() + state.sum()).backward()
    assert y.dtype == torch.float16 and state.dtype == torch.float32
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in leaves(given).values())
    half = given | {name: given[name].detach().half() for name in ("u", "delta", "B", "C", "z")}
    assert torch.equal(y, selective_scan(**half, impl="triton")[0])


@everywhere
def test_a_second_derivative_is_refused(device):
    given = made(3, 3, 2, device=device)
    y, _ = selective_scan(**given, impl="triton")
    with pytest.raises(RuntimeError, match="has no second derivative"):
        (grad,) = torch.autograd.grad(y.sum(), given["u"], create_graph=True)
        grad.sum().backward()


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, says", [
    ({"dtype": torch.float64}, "u must be float16, bfloat16 or float32 for impl='triton', got torch.float64"),
    ({"n": 257}, "A must have at most 256 states for impl='triton', got N = 257; impl='reference' takes any"),
])  # fmt: skip
def test_bad_input_is_named(change, says):
    with pytest.raises(ValueError, match=says):
        selective_scan(**made(**{"length": 3, "d": 2, "n": 2} | change), impl="triton")


def test_the_limit_of_states_is_the_widest_tile():
    """The door names it too, since it may not import the kernels' side."""
    assert door.MOST_STATES == max(kernels.TILES)


def test_another_discretisation_is_refused():
    with pytest.raises(ValueError, match="discretization must be 'zoh-euler' for impl='triton', got 'zoh'"):
        selective_scan(**made(3, 2, 2), discretization="zoh", impl="triton")


def test_bfloat16_is_refused_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    with pytest.raises(ValueError, match="float16 or float32 in Triton's interpreter"):
        selective_scan(**made(3, 2, 2, dtype=torch.bfloat16), impl="triton")


def test_without_the_interpreter_a_cpu_is_refused():
    code = """
import torch
from nondual.ops.selective_scan import selective_scan
u, A = torch.randn(1, 3, 2), -torch.ones(2, 2)
try:
    selective_scan(u, u, A, A, A, impl="triton")
except ValueError as error:
    print(error)
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(SRC)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=100)
    said = ran.stdout
    assert "u must be on a CUDA device for impl='triton', got cpu" in said and "TRITON_INTERPRET=1" in said


def test_without_triton_its_engine_is_refused(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("nondual.ops.selective_scan.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(door, "triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="needs triton"):
        selective_scan(**made(3, 2, 2), impl="triton")


# --- large, on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("b, length, d, n, more", [
    (2, 1025, 257, 16, {}),
    (1, 2049, 1024, 16, {"reset": "at a chunk's border"}),
    (3, 500, 96, 16, {"g_b": 2, "g_c": 3}),
    (2, 333, 131, 64, {}),
    (1, 129, 67, 256, {}),
    (2, 777, 640, 1, {}),
    (2, 700, 300, 8, {"g_b": 0, "g_c": 0}),
    (16, 257, 1024, 16, {"without": ("D", "z", "delta_bias", "state")}),
])  # fmt: skip
def test_large(dtype, b, length, d, n, more):
    check(made(length, d, n, b=b, dtype=dtype, device="cuda", **more))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_very_long_sequence(dtype):
    check(made(65537, 3, 4, dtype=dtype, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("b, d", [(16, 1024), (1, 1024)])
def test_large_runs_are_equal_to_the_bit(dtype, b, d):
    given = made(1025, d, 16, b=b, dtype=dtype, device="cuda")
    first = results(given, "triton")
    for _ in range(99):
        again = results(given, "triton")
        assert all(torch.equal(x, again[name]) for name, x in first.items())


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """A leaky sum, of which every number is known: with A = -log 2, Δ = 1 and B = C = u = 1 the output is 2 - 2^-t; at
    the far end of 2^31 numbers too, forward and backward."""
    b, length, d = 2, 4200, 2**18
    assert b * length * d > 2**31
    u = torch.ones(b, length, d, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    delta = torch.ones((), dtype=torch.bfloat16, device="cuda").expand(b, length, d)
    A = torch.full((d, 1), -0.6931471805599453, device="cuda")
    one = torch.ones(d, 1, device="cuda")
    y, last = selective_scan(u, delta, A, one, one, impl="triton")
    exact = 2 - 0.5 ** torch.arange(length, device="cuda").double()
    assert (y[-1, :, -1].double() - exact).abs().max() < 1e-2 and (last[-1, -1] - 2).abs().max() < 1e-5
    (du,) = torch.autograd.grad(y, u, torch.ones((), dtype=torch.bfloat16, device="cuda").expand(y.shape))
    assert (du[-1, :, -1].double() - exact.flip(0)).abs().max() < 1e-2
    assert torch.equal(du[0, :, 0], du[-1, :, -1]) and torch.equal(y[0, :, 0], y[-1, :, -1])
