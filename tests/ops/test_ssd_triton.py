"""The kernels of state space duality against float64: decays, layouts, memory; in Triton's interpreter or on a GPU.

In the interpreter a chunk has 32 steps and a tile 16: 37 steps are a whole chunk of two tiles, and a part of another.
On a GPU the same tests run compiled, with bfloat16; test_ssd_large.py has larger ones.
"""

import pytest
import torch
from harness import DTYPES, everywhere, needs_the_interpreter
from ssd_cases import (
    DECAYS,
    NAMES,
    TIMED,
    both_ways,
    by,
    check,
    exactly,
    incoming,
    laid,
    made,
    resets,
    strong_and_weak,
)

from nondual.ops.ssd import ssd
from nondual.ops.ssd import triton as kernels
from nondual.ops.ssd.triton import launch

pytestmark = pytest.mark.usefixtures("poisoned")


def test_the_kernels_can_run_here():
    assert kernels.INTERPRETED or torch.cuda.is_available(), "unset TRITON_INTERPRET=0: there is no GPU to compile for"


def test_what_is_not_written_would_be_seen():
    assert torch.empty(3).isnan().all()


# --- right in every size ---------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("h, g, skip", [(2, 1, "h"), (2, 2, "hp")])
def test_error_is_that_of_plain_pytorch(device, dtype, h, g, skip, reset):
    inputs = made(37, h=h, g=g, p=8, n=8, dtype=dtype, device=device, skip=skip)
    check(inputs, reset=resets(37, device=device) if reset else None)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p, n", [(1, 1), (24, 19), (128, 17), (17, 256)])
def test_any_width_and_states(device, dtype, p, n):
    check(made(19, h=1, p=p, n=n, dtype=dtype, device=device))


@everywhere
@pytest.mark.parametrize("skip", ["h", "hp"])
def test_a_head_too_large_for_the_chip_is_taken_apart(device, skip):
    """Into four of 17 channels, one of them a zero."""
    assert kernels.parts_of("sm_80", 67, 130, torch.float32) == 4
    check(made(9, h=1, p=67, n=130, device=device, skip=skip))


def test_heads_are_taken_apart_by_the_room_there_is():
    half, full = torch.bfloat16, torch.float32
    assert [kernels.parts_of("sm_80", p, n, half) for p, n in ((64, 128), (128, 128), (256, 256))] == [1, 2, 8]
    assert [kernels.parts_of("sm_90", p, n, half) for p, n in ((64, 256), (128, 256), (65, 128))] == [1, 2, 2]
    assert kernels.parts_of("sm_90", 64, 256, full) == 2


def test_a_chip_without_tiles_of_its_own_gets_those_of_sm_80():
    for dtype, kernel in ((torch.bfloat16, "states"), (torch.float16, "rows"), (torch.float32, "output")):
        found = [(kernels.configuration(kernel, chip, 64, 256, dtype, 256), kernels.parts_of(chip, 64, 256, dtype))
                 for chip in ("gfx942", "sm_80")]  # fmt: skip
        assert found[0] == found[1]


@everywhere
@pytest.mark.parametrize("length", [1, 2, 16, 17, 33, 64])
def test_short_sequences(device, length):
    check(made(length, h=1, device=device))


@everywhere
@pytest.mark.parametrize("b, h, g", [(2, 4, 2), (2, 1, 1)])
def test_batches_and_groups(device, b, h, g):
    check(made(9, b=b, h=h, g=g, device=device), reset=resets(9, b, device=device))


@everywhere
@pytest.mark.parametrize("chunk", [16, 64, 128, 256])
def test_any_chunk_gives_the_same(device, chunk):
    check(made(70, h=1, device=device), chunk=chunk)


@everywhere
@pytest.mark.parametrize("left", ["D", "z", "delta_bias", "state"])
def test_what_is_left_out(device, left):
    inputs = {name: v for name, v in made(37, h=1, device=device).items() if name != left}
    check(inputs, softplus=left != "delta_bias")


@everywhere
@pytest.mark.parametrize("cut", [5, 32])
def test_split_is_whole_by_the_kernels(device, cut):
    inputs = {name: v.detach() for name, v in made(41, h=1, device=device).items()}
    whole, last = by("triton")(inputs)
    state, parts = inputs["state"], []
    for part in (slice(0, cut), slice(cut, 41)):
        piece = {name: v[:, part] if name in TIMED else v for name, v in inputs.items()} | {"state": state}
        y, state = by("triton")(piece)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(state, last)


@everywhere
@pytest.mark.parametrize("per", [1, 2, 3])
def test_heads_added_up_in_a_program_or_between_give_the_same(device, per, monkeypatch):
    monkeypatch.setattr(launch, "heads_of_a_program", lambda *_: per)
    check(made(17, h=3, device=device))


def test_the_backward_splits_heads_by_its_rule():
    cpu = torch.device("cpu")  # counted as two multiprocessors, of two programs each
    assert [kernels.heads_of_a_program(programs, 24, cpu) for programs in (1, 2, 3, 4, 99)] == [6, 12, 12, 24, 24]
    assert kernels.heads_of_a_program(1, 3, cpu) == 1 and kernels.heads_of_a_program(1, 1, cpu) == 1


def test_rows_and_columns_have_one_height():
    """What passes over a tile is counted in tiles: both kernels and the one that adds them up mean the same."""
    for lines in kernels.TILES.values():
        assert [t[0] for t in lines["rows"]] == [t[0] for t in lines["columns"]]


@everywhere
def test_runs_are_equal_to_the_bit(device):
    times = 2 if device == "cpu" else 100
    inputs = made(19, device=device)
    first = both_ways(by("triton"), inputs)
    for _ in range(times - 1):
        again = both_ways(by("triton"), inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


# --- decays and ranges -----------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate, lag", DECAYS)
def test_strong_and_weak_decay(device, dtype, rate, lag):
    check(made(19, h=1, rate=rate, lag=lag, dtype=dtype, device=device))


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
def test_strong_and_weak_steps_in_one_tile(device, dtype):
    check(strong_and_weak(37, h=1, rate=3.0, dtype=dtype, device=device))


@everywhere
def test_float16_does_not_overflow_where_the_result_does_not(device):
    """C · B is 1e6 here, and Δ 1e-4: their product is what a float16 holds."""
    inputs = made(37, h=1, n=64, dtype=torch.float16, device=device, lag=-9.0)
    with torch.no_grad():
        inputs["B"].copy_(torch.ones_like(inputs["B"]) * 120)
        inputs["C"].copy_(torch.ones_like(inputs["C"]) * 130)
        inputs["x"].mul_(0.1)
    exact, ours = (both_ways(by(impl), v) for impl, v in (("chunked", exactly(inputs)), ("triton", inputs)))
    for name in ("y", "last state"):
        worst = (ours[name] - exact[name]).abs().max() / exact[name].abs().max()
        assert worst < 4 * torch.finfo(torch.float16).eps, f"{name}: {worst:.1e}"


@everywhere
def test_a_state_beyond_float16_is_read_by_a_small_c(device):
    """States are float32 and reach 1e6 here; C is about .001, so that what they give fits float16."""
    inputs = made(37, h=1, n=64, dtype=torch.float16, device=device)
    with torch.no_grad():
        inputs["state"].mul_(1e6)
        inputs["C"].mul_(1e-3)
    exact, ours = (both_ways(by(impl), v) for impl, v in (("chunked", exactly(inputs)), ("triton", inputs)))
    for name in ("y", "last state"):  # dC is of the size of the state
        assert ours[name].isfinite().all(), name
        worst = (ours[name] - exact[name]).abs().max() / exact[name].abs().max()
        assert worst < 4 * torch.finfo(torch.float16).eps, f"{name}: {worst:.1e}"


@everywhere
def test_softplus_to_the_last_place_and_its_derivative(device):
    delta = torch.tensor([-80.0, -30, -15, -9, -3, -0.1, 0, 0.1, 3, 15, 19.9, 20.1, 80], device=device)
    inputs = {
        "x": torch.ones(1, 13, 1, 1, device=device), "delta": delta.view(1, 13, 1).requires_grad_(),
        "A": -torch.ones(1, device=device), "B": torch.ones(1, 13, 1, 1, device=device),
        "C": torch.ones(1, 13, 1, 1, device=device), "reset": torch.ones(1, 13, dtype=torch.bool, device=device),
    }  # fmt: skip
    y, _ = ssd(**inputs, delta_softplus=True, impl="triton")  # each step alone: y is its length
    (grad,) = torch.autograd.grad(y.sum(), inputs["delta"])
    delta = delta.detach().double()
    # an exponential knows its argument to the last place, and so itself to as many as the argument is long
    places = (4 + delta.abs()) * torch.finfo(torch.float32).eps
    for ours, truth in ((y, torch.nn.functional.softplus(delta)), (grad, torch.sigmoid(delta))):
        assert ((ours.flatten() - truth).abs() <= places * truth).all()


# --- not finite ------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("name", ["x", "delta", "B", "C", "state"])
def test_nan_before_a_reset_is_forgotten_by_the_kernels(device, name):
    inputs = {k: v.detach() for k, v in made(40, h=1, device=device).items()}
    marks = torch.zeros(1, 40, dtype=torch.bool, device=device)
    marks[:, 11] = True
    clean = by("triton", reset=marks, chunk=16)(inputs)
    bad = inputs | {name: inputs[name].clone()}
    bad[name][:, *(() if name == "state" else (slice(9, 11),))] = torch.nan
    y, state = by("triton", reset=marks, chunk=16)(bad)
    first = 16 if name == "x" else 11
    assert y[:, 9 if name != "state" else 0].isnan().all()
    assert torch.equal(y[:, first:], clean[0][:, first:]) and torch.equal(state, clean[1])


@everywhere
@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_nan_in_delta_b_or_c_does_not_reach_back(device, impl):
    inputs = {k: v.detach() for k, v in made(20, h=1, device=device).items()}
    y, _ = by(impl, chunk=32)(inputs)
    for name in ("delta", "B", "C"):
        bad = inputs | {name: inputs[name].clone()}
        bad[name][:, 9] = torch.nan
        spoilt, _ = by(impl, chunk=32)(bad)
        assert torch.equal(spoilt[:, :9], y[:, :9]) and spoilt[:, 9].isnan().all()


@everywhere
@pytest.mark.parametrize("name", ["x", "delta", "B", "C", "z"])
@pytest.mark.parametrize("at", [31, 32, 35])
def test_gradients_of_the_kernels_before_a_resets_chunk_do_not_see_a_nan_after_it(device, name, at):
    """Chunks of 16 steps: the reset is on a last step, on a first, and within one; the NaN comes two steps later."""
    marks = torch.arange(48, device=device).eq(at)[None]
    clear = at // 16 * 16
    read = clear if name == "x" else at  # a NaN in x reaches every output of its chunk
    found = []
    for spoilt in (False, True):
        inputs = {k: v.detach() for k, v in made(48, h=1, device=device).items()}
        if spoilt:
            inputs[name][:, at + 2] = torch.nan
        leaves = {k: v.requires_grad_() for k, v in inputs.items()}
        y, _ = by("triton", reset=marks, chunk=16)(leaves)
        grads = torch.autograd.grad(y[:, :read].sin().sum(), [leaves[k] for k in (*TIMED, "state")])
        found.append([g if k == "state" else g[:, :clear] for k, g in zip((*TIMED, "state"), grads)])
    for k, clean, other in zip((*TIMED, "state"), *found):
        assert torch.equal(clean, other), k


# --- any layout ------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "one number"])
def test_any_layout_of_inputs_and_of_the_incoming_gradients(device, layout):
    inputs = {name: laid(v.detach(), layout).requires_grad_() for name, v in made(17, b=2, h=1, device=device).items()}
    d_y, d_state = (torch.randn(inputs[name].shape, device=device) for name in ("x", "state"))
    check(inputs, d_y=laid(d_y, layout), d_state=laid(d_state, layout))


@everywhere
def test_the_gradient_of_a_sum(device):
    inputs = made(19, h=1, device=device)
    exact = exactly(inputs)
    for values, impl in ((inputs, "triton"), (exact, "chunked")):
        y, state = by(impl)(values)
        (y.sum() + state.sum()).backward()  # gradients of one number, expanded
    for name in NAMES:
        torch.testing.assert_close(inputs[name].grad, exact[name].grad.float(), atol=3e-5, rtol=3e-5)


@everywhere
@pytest.mark.parametrize("name", ["x", "z", "B", "C", "delta"])
def test_offsets_beyond_two_to_the_31(device, name, monkeypatch):
    """Steps so far apart that the last offset passes 2^31; the memory between is never touched."""
    length = 17
    inputs = {k: v.detach() for k, v in made(length, h=1, p=4, n=4, dtype=torch.float16, device=device).items()}
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    room = torch.empty(2**31 + 4096, dtype=torch.float16, device=device)
    v = inputs[name]
    strides = [v.stride(0), -(-(2**31 + 5) // (length - 1)), *v.stride()[2:]]
    far = torch.as_strided(room, v.shape, strides).copy_(v)
    assert far.stride(1) * (length - 1) > 2**31
    one, other = (both_ways(by("triton"), {k: w.requires_grad_() for k, w in each.items()})
                  for each in (inputs, inputs | {name: far}))  # fmt: skip
    assert all(torch.equal(one[key], other[key]) for key in one)


# --- memory ----------------------------------------------------------------------------------------------------------


@needs_the_interpreter
@pytest.mark.parametrize("reset", [False, True])
def test_no_kernel_leaves_its_tensors_or_writes_twice(reset, monkeypatch, watch):
    """The tensors lie inside larger ones, whose other elements count as outside."""
    watched = {}
    for name in launch.KERNELS:
        watched[name] = watch(launch.KERNELS[name])
        monkeypatch.setitem(launch.KERNELS, name, watched[name])
    inputs = made(35, h=2, p=5, n=19, skip="hp")
    inputs = {name: laid(v.detach(), "sliced").requires_grad_() for name, v in inputs.items()}
    d_y = laid(incoming(inputs["x"]), "sliced")
    both_ways(by("triton", reset=resets(35) if reset else None, chunk=32), inputs, d_y=d_y)
    launches = {name: kernel.launches for name, kernel in watched.items()}
    again = {"steps": 2, "states": 3, "pass": 2}  # the backward computes them anew
    assert launches == dict.fromkeys(launch.KERNELS, 1) | again


@needs_the_interpreter
def test_a_fault_in_memory_would_be_seen(watch):
    state, one = torch.zeros(1, 1, 2, 4, 4), torch.zeros(1, 1, 4, 4)
    decay, start = torch.zeros(1, 1, 20), torch.zeros(1, 20, dtype=torch.int32)
    sizes = {"RESET": True, "SIZE": 16, "CHUNK": 16, "BLOCK": 16}
    watched = watch(kernels.pass_kernel)
    watched[(1,)](state, one, decay, decay, start, one.clone(), 20, 1, 2, **sizes)
    with pytest.raises(Exception, match="read outside"):  # one step more than there are
        watched[(1,)](state, one, decay, decay, start, one.clone(), 21, 1, 2, **sizes)
    with pytest.raises(Exception, match="read outside"):  # one chunk more
        watched[(1,)](state, one, decay, decay, start, one.clone(), 20, 1, 3, **sizes)
    with pytest.raises(AssertionError, match="a race"):  # the last state where the first chunk's is
        watched[(1,)](state, one, decay, decay, start, state, 20, 1, 2, **sizes)
