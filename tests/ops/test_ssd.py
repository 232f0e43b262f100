"""State space duality against float64, at its edges, in every layout; the kernels in Triton's interpreter or on a GPU.

Where there is no GPU the kernels run in the interpreter, in float32 and float16 and with small tiles: see conftest.py.
On a GPU the same tests run compiled, with bfloat16, and larger ones besides.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

from nondual.ops import ssd as door
from nondual.ops.selective_scan import selective_scan
from nondual.ops.ssd import reference, ssd, ssd_matrix, ssd_step
from nondual.ops.ssd import triton as kernels
from nondual.ops.ssd.triton import launch

SRC = Path(__file__).parents[2] / "src"
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = [*(["cpu"] if kernels.INTERPRETED else []), CUDA]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
NAMES = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "state")
TIMED = ("x", "delta", "B", "C", "z")

everywhere = pytest.mark.parametrize("device", DEVICES)


def test_the_kernels_can_run_here():
    assert kernels.INTERPRETED or torch.cuda.is_available(), "unset TRITON_INTERPRET=0: there is no GPU to compile for"


pytestmark = pytest.mark.usefixtures("poisoned")


def test_what_is_not_written_would_be_seen():
    assert torch.empty(3).isnan().all()


def made(length, *, b=1, h=2, p=8, g=1, n=8, dtype=torch.float32, device="cpu", seed=0, skip="h", rate=1.0, lag=0.0):
    """Every argument by name, drawn once for all devices and dtypes; `rate` is the size of A, `lag` delta's mean."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (b, length, h, p), "delta": (b, length, h), "A": (h,), "B": (b, length, g, n), "C": (b, length, g, n),
        "D": (h,) if skip == "h" else (h, p), "z": (b, length, h, p), "delta_bias": (h,), "state": (b, h, p, n),
    }  # fmt: skip
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {}
    for name, shape in shapes.items():
        v = torch.randn(shape, generator=draw)
        v = -rate * (0.2 + v.abs()) if name == "A" else v + lag if name == "delta" else v
        inputs[name] = v.to(dtype if name in TIMED else wide).to(device).requires_grad_()
    return inputs


def resets(length, b=1, device="cpu", seed=2):
    """A few beginnings, neighbours and the last step among them, other ones in each row of the batch."""
    draw = torch.Generator().manual_seed(seed)
    marks = torch.rand(b, length, generator=draw) < 4 / max(length, 1)
    marks[0, length // 3 : length // 3 + 2] = True
    marks[-1, -1:] = True
    return marks.to(device)


def textbook(x, delta, A, B, C, D=None, z=None, delta_bias=None, state=None, *, softplus=True, reset=None):
    """Plain PyTorch: the matrix of `ssd_matrix` times x, with the matrices in whatever dtype x has."""
    dtype, length, share = x.dtype, x.shape[1], x.shape[2] // B.shape[2]
    steps = reference.step_length(delta.to(A.dtype), delta_bias, softplus)
    B, C = (v.repeat_interleave(share, 2).transpose(1, 2) for v in (B, C))  # (B, H, L, N)
    step, v = steps.mT, x.transpose(1, 2)  # (B, H, L) and (B, H, L, P)
    rates = step * A[:, None]
    lower = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    between = rates[..., None].expand(*rates.shape, length).masked_fill(~lower.tril(-1), 0).cumsum(-2)
    sequence = (torch.zeros_like(delta[..., 0]) if reset is None else reset).cumsum(1)
    seen = (lower & (sequence[:, :, None] == sequence[:, None]))[:, None]
    decay = between.masked_fill(~seen, -torch.inf).exp() * step[:, :, None]
    y = (C @ B.mT * decay.to(dtype)) @ v
    last = (decay[:, :, -1, :, None].to(dtype) * v).mT @ B
    if state is not None:
        passed = rates.cumsum(-1).masked_fill((sequence > 0)[:, None], -torch.inf).exp()[..., None]
        y = y + passed.to(dtype) * (C @ state.to(dtype).mT)
        last = last + passed[:, :, -1:] * state
    y = y.transpose(1, 2)
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]).to(dtype) * x
    return y if z is None else y * torch.nn.functional.silu(z), last.to(A.dtype)


def incoming(like, seed=1):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype).to(like.device)


def both_ways(run, inputs, d_y=None, d_state=None):
    """y, the last state and every gradient of a run, by name."""
    y, state = run(inputs)
    d_y = incoming(y) if d_y is None else d_y.to(y.dtype)
    d_state = incoming(state, 3) if d_state is None else d_state
    grads = torch.autograd.grad((y, state), tuple(inputs.values()), (d_y, d_state.to(state.dtype)))
    found = {"y": y, "last state": state} | {f"d{name}": grad for name, grad in zip(inputs, grads)}
    return {name: v.detach() for name, v in found.items()}


def by(impl, softplus=True, reset=None, chunk=None):
    def run(inputs):
        return ssd(**inputs, delta_softplus=softplus, reset=reset, chunk=chunk, impl=impl)

    return run


def plainly(softplus=True, reset=None):
    return lambda inputs: textbook(**inputs, softplus=softplus, reset=reset)


def exactly(inputs):
    return {name: v.detach().double().requires_grad_() for name, v in inputs.items()}


def errors(inputs, impl="triton", softplus=True, reset=None, chunk=None, plain=None, **gradients):
    """Each output and gradient by name: our greatest error, that of plain PyTorch in the same dtype over five draws of
    signs, and what no result can promise to be below: half a unit in the last place of the greatest number, and eight
    of a float32 near 2, in which sums of terms that may cancel are kept."""
    gradients = {"d_y": incoming(inputs["x"])} | gradients  # one for all three, in x's dtype
    ours = both_ways(by(impl, softplus, reset, chunk), inputs, **gradients)
    theirs = both_ways(plain or plainly(softplus, reset), inputs, **gradients)
    exact = both_ways(by("chunked", softplus, reset, 16), exactly(inputs), **gradients)
    assert ours["y"].dtype == inputs["x"].dtype and ours["last state"].dtype == torch.float32
    result = {}
    for name, t in exact.items():
        a, b = ours[name], theirs[name]
        assert a.isfinite().all(), f"{name} is not finite"
        assert a.shape == t.shape
        if t.numel():
            top = t.abs().max()
            last_place = top * torch.finfo(a.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps * top.clamp(min=2)
            result[name] = tuple(float(v) for v in ((a - t).abs().max(), (b - t).abs().max(), last_place))
    if inputs["x"].numel() < 2**16:  # one draw is luck, but a small one: a large one is many
        for seed in range(1, DRAWS):
            again = inputs | {"x": with_signs(inputs["x"], seed)}
            more = gradients | {"d_y": with_signs(gradients["d_y"], -seed)}
            theirs = both_ways(plain or plainly(softplus, reset), again, **more)
            exact = both_ways(by("chunked", softplus, reset, 16), exactly(again), **more)
            for name, (off, usual, last_place) in result.items():
                result[name] = off, max(usual, float((theirs[name] - exact[name]).abs().max())), last_place
    few = [name for name in ("dA", "ddelta_bias", "dD") if name in result]
    plain = plain or plainly(softplus, reset)
    for name, usual in usual_of_eight(few, inputs, plain, softplus=softplus, reset=reset).items():
        result[name] = (result[name][0], max(usual, result[name][1]), result[name][2])
    return result


DRAWS = 5


def with_signs(v, seed):
    """The same numbers with other signs, drawn: another draw of the same size and dtype."""
    draw = torch.Generator().manual_seed(1000 + seed)
    return (v.detach() * (1 - 2 * torch.randint(2, v.shape, generator=draw)).to(v)).requires_grad_()


def usual_of_eight(names, inputs, plain, **exact):
    """Plain PyTorch's usual error (the root of its mean square) in gradients that are one number for each head, over
    eight incoming gradients: in one alone it is now and then nearly right by chance."""
    (y, state), (true_y, true_state) = plain(inputs), by("chunked", **exact)(true := exactly(inputs))
    squares = dict.fromkeys(names, 0.0)
    for seed in range(10, 18):
        d_y, d_state = incoming(inputs["x"], seed), incoming(state, seed + 8)
        found = (
            torch.autograd.grad(out, [of[name[1:]] for name in names], (d_y.to(out[0].dtype), d_state.to(out[1].dtype)),
                                retain_graph=True)
            for out, of in (((y, state), inputs), ((true_y, true_state), true))
        )  # fmt: skip
        for name, a, t in zip(names, *found):
            squares[name] += float((a - t).abs().max()) ** 2 / 8
    return {name: square**0.5 for name, square in squares.items()}


def check(inputs, **options):
    """At most twice the error of plain PyTorch, three times for gradients."""
    for name, (ours, plain, last_place) in errors(inputs, **options).items():
        assert ours <= (2 if name in ("y", "last state") else 3) * plain + last_place, (
            f"{name}: {ours:.1e}, plain PyTorch {plain:.1e}"
        )


# --- the three forms of one thing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_by_hand(impl):
    half = math.log(2)  # with A = -1 a step of log 2 halves the state
    x, delta = torch.tensor([1.0, 2, 4]).view(1, 3, 1, 1), torch.full((1, 3, 1), half)
    B = torch.tensor([1.0, 1, 3]).view(1, 3, 1)
    C = torch.tensor([1.0, 10, 2]).view(1, 3, 1)
    y, state = ssd(x, delta, -torch.ones(1), B, C, D=torch.ones(1), state=torch.full((1, 1, 1, 1), 2.0), impl=impl)
    # h = 2/2 + half·1·1, that/2 + half·2·1, that/2 + half·4·3
    h = [1 + half, 0.5 + 2.5 * half, 0.25 + 13.25 * half]
    torch.testing.assert_close(y.flatten(), torch.tensor([h[0] + 1, 10 * h[1] + 2, 2 * h[2] + 4]))
    torch.testing.assert_close(state.flatten(), torch.tensor([h[2]]))
    M = ssd_matrix(delta, -torch.ones(1), B, C, D=torch.ones(1))
    rows = torch.tensor([[1, 0, 0], [5, 10, 0], [0.5, 1, 6]])
    torch.testing.assert_close(M[0, 0], rows * half + torch.eye(3))


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("g", [1, 2, 6])
def test_it_is_a_selective_scan_with_one_rate_for_each_head(g, reset):
    b, length, h, p, n = 2, 23, 6, 3, 5
    inputs = made(length, b=b, h=h, p=p, g=g, n=n, dtype=torch.float64, skip="hp")
    marks = resets(length, b) if reset else None
    y, state = ssd(**inputs, delta_softplus=True, reset=marks, impl="reference")
    x, delta, A, B, C, D, z, bias, start = inputs.values()
    spread = lambda v: v.repeat_interleave(p, -1)  # noqa: E731  each channel of a head with the head's own
    scanned, scanned_state = selective_scan(
        x.flatten(2), spread(delta), spread(A)[:, None].expand(-1, n), B, C, D.flatten(), z.flatten(2), spread(bias),
        True, start.flatten(1, 2), reset=marks, impl="reference",
    )  # fmt: skip
    torch.testing.assert_close(y.flatten(2), scanned)
    torch.testing.assert_close(state.flatten(1, 2), scanned_state)


@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
@pytest.mark.parametrize("length", [1, 2, 16, 61, 131])
@pytest.mark.parametrize("p, n, g, h", [(1, 1, 1, 1), (7, 5, 2, 6)])
def test_matrix_recurrence_and_blocks_are_one(length, chunk, p, n, g, h):
    for marks in (None, resets(length, 2)):
        inputs = made(length, b=2, h=h, p=p, g=g, n=n, dtype=torch.float64)
        one, other = (both_ways(by(impl, reset=marks, chunk=chunk), inputs) for impl in ("reference", "chunked"))
        for name, v in one.items():
            torch.testing.assert_close(other[name], v, msg=lambda text, name=name: f"{name}: {text}")
        x, delta, A, B, C, D, _, bias, _ = inputs.values()
        M = ssd_matrix(delta, A, B, C, D, bias, True, reset=marks)
        y, _ = ssd(x, delta, A, B, C, D, None, bias, True, reset=marks, chunk=chunk, impl="chunked")
        torch.testing.assert_close(torch.einsum("bhts,bshp->bthp", M, x), y)


def test_below_the_diagonal_the_matrix_has_the_rank_of_the_state():
    v = made(32, h=1, n=3, dtype=torch.float64)
    M = ssd_matrix(v["delta"], v["A"], v["B"], v["C"], delta_softplus=True)[0, 0]
    assert torch.linalg.matrix_rank(M[16:, :16]) == 3 and torch.linalg.matrix_rank(M) == 32


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_gradcheck(impl):
    inputs = made(5, b=1, h=2, p=1, g=1, n=2, dtype=torch.float64, skip="hp")
    marks = torch.tensor([[False, False, False, True, False]])

    def run(*values):
        return ssd(**dict(zip(NAMES, values)), delta_softplus=True, reset=marks, chunk=3, impl=impl)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(run, tuple(inputs.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_plain_engines_have_the_error_of_plain_pytorch(impl, dtype):
    check(made(131, b=2, h=4, p=16, g=2, n=16, dtype=dtype), impl=impl)
    check(made(131, b=2, h=4, p=16, g=2, n=16, dtype=dtype), impl=impl, reset=resets(131, 2))


DECAYS = [(1e4, 3.0), (1.0, -12.0), (1e-6, 0.0), (30.0, 0.0)]


@pytest.mark.parametrize("rate, lag", DECAYS)
def test_blocks_at_strong_and_weak_decay(rate, lag):
    """(Where hardly anything fades the recurrence itself is worse: it rounds each step's exponential, near 1.)"""
    check(made(131, rate=rate, lag=lag), impl="chunked")


def strong_and_weak(length, **more):
    """Steps that forget everything beside steps that forget nothing, in every chunk: sums in which small ones drown."""
    inputs = made(length, **more)
    with torch.no_grad():
        inputs["delta"][:, ::7] += 300
        inputs["delta"][:, 1::7] -= 9
    return inputs


def test_strong_and_weak_steps_in_one_chunk():
    check(strong_and_weak(97, rate=3.0), impl="chunked")


@pytest.mark.parametrize("cut", [0, 1, 17, 60])
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_split_is_whole(impl, cut):
    inputs = made(61, b=2, dtype=torch.float64)
    marks = resets(61, 2)
    whole = both_ways(by(impl, reset=marks, chunk=16), inputs)

    def in_two(inputs):
        state, parts = inputs["state"], []
        for part in (slice(0, cut), slice(cut, 61)):
            piece = {name: v[:, part] if name in TIMED else v for name, v in inputs.items()} | {"state": state}
            y, state = by(impl, reset=marks[:, part], chunk=16)(piece)
            parts.append(y)
        return torch.cat(parts, 1), state

    for name, v in both_ways(in_two, inputs).items():
        torch.testing.assert_close(v, whole[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("g", [None, 1, 2])
def test_steps_are_the_sequence(g):
    inputs = made(11, b=2, h=4, g=g or 1, skip="hp", dtype=torch.float64)
    if g is None:  # shared by all heads, said without a G
        inputs |= {name: inputs[name][:, :, 0] for name in ("B", "C")}
    y, last = ssd(**inputs, delta_softplus=True, chunk=4)
    state = inputs["state"]
    for t in range(11):
        now = {name: v[:, t] if name in TIMED else v for name, v in inputs.items()} | {"state": state}
        y_t, state = ssd_step(**now, delta_softplus=True)
        torch.testing.assert_close(y_t, y[:, t])
    torch.testing.assert_close(state, last)


# --- packed sequences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_packed_sequences_are_those_alone(impl):
    inputs = made(50, dtype=torch.float64)
    marks = torch.zeros(1, 50, dtype=torch.bool)
    marks[:, [0, 13, 14, 40]] = True
    y, state = by(impl, reset=marks, chunk=8)(inputs)
    for start, stop in ((0, 13), (13, 14), (14, 40), (40, 50)):
        alone = {name: v[:, start:stop] if name in TIMED else v for name, v in inputs.items() if name != "state"}
        expected, last = by(impl, chunk=8)(alone)
        torch.testing.assert_close(y[:, start:stop], expected)
    torch.testing.assert_close(state, last)


BAD = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("name", ["x", "delta", "B", "C", "state"])
def test_what_is_not_finite_before_a_reset_is_forgotten_at_once(impl, name, bad):
    inputs = {k: v.detach() for k, v in made(40).items()}
    marks = torch.zeros(1, 40, dtype=torch.bool)
    marks[:, 11] = True
    clean = by(impl, reset=marks, chunk=8)(inputs)
    spoilt = inputs | {name: inputs[name].clone()}
    spoilt[name][:, *(() if name == "state" else (slice(9, 11),))] = bad
    y, state = by(impl, reset=marks, chunk=8)(spoilt)
    first = 0 if name == "state" else 9
    assert torch.equal(y[:, :first], clean[0][:, :first])  # nor does it reach back
    assert torch.equal(y[:, 11:], clean[0][:, 11:]) and torch.equal(state, clean[1])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("reset", [None, "at once", "in the next chunk"])
@pytest.mark.parametrize("name", ["x", "delta", "B", "C", "z", "state"])
def test_blocks_are_not_finite_where_the_recurrence_is_not(name, reset, bad):
    """One number: one channel of x and z, one head's step, one of N states. Chunks of 8 steps, and it comes at 9."""
    inputs = {k: v.detach() for k, v in made(29, b=2, h=4, g=2, dtype=torch.float64).items()}
    spoilt = inputs[name] = inputs[name].clone()
    spoilt[(0, 1, 3, 2) if name == "state" else (0, 9, *[1] * (spoilt.ndim - 2))] = bad
    marks = None
    if reset is not None:
        marks = torch.zeros(2, 29, dtype=torch.bool)
        marks[:, 11 if reset == "at once" else 19] = True
    (y, state), (expected, last) = (by(impl, reset=marks, chunk=8)(inputs) for impl in ("chunked", "reference"))
    for ours, theirs in ((y, expected), (state, last)):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        torch.testing.assert_close(ours[ours.isfinite()], theirs[ours.isfinite()])


@pytest.mark.parametrize("name", ["x", "delta", "B", "C", "z"])
@pytest.mark.parametrize("at", [15, 16, 19])
def test_gradients_of_blocks_before_a_reset_do_not_see_a_nan_after_it(name, at):
    """The reset is on a chunk's last step, on a first, and within one; the NaN comes two steps later. But a NaN in z is
    one in the gradient before the gate, and may reach the steps of its own chunk."""
    marks = torch.zeros(1, 33, dtype=torch.bool)
    marks[:, at] = True
    found = []
    for spoilt in (False, True):
        inputs = {k: v.detach() for k, v in made(33, dtype=torch.float64).items()}
        if spoilt:
            inputs[name][:, at + 2] = torch.nan
        leaves = {k: v.requires_grad_() for k, v in inputs.items()}
        y, _ = by("chunked", reset=marks, chunk=8)(leaves)
        grads = torch.autograd.grad(y[:, :at].sin().sum(), [leaves[k] for k in (*TIMED, "state")], allow_unused=True)
        clear = at // 8 * 8 if name == "z" and at == 19 else at
        found.append([g if k == "state" else g[:, :clear] for k, g in zip((*TIMED, "state"), grads)])
    for k, clean, other in zip((*TIMED, "state"), *found):
        assert torch.equal(clean, other), k


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("rate", [1.0, 10.0, 40.0])
def test_a_growing_state_beside_inputs_of_zero(rate, reset):
    """e^1000 times 0 is 0, in the state and in a chunk: where the recurrence is finite the blocks are, and right."""
    inputs = {k: v.detach() for k, v in made(128, b=2, rate=rate).items()}
    inputs["A"] = -inputs["A"]
    inputs["x"][:, :70] = 0
    inputs["state"] = inputs["state"] * 0
    marks = None
    if reset:
        marks = torch.zeros(2, 128, dtype=torch.bool)
        marks[0, 75] = marks[1, 64] = True
    y, _ = by("chunked", reset=marks)(inputs)
    judged, _ = by("reference", reset=marks)(inputs)
    exact, _ = by("reference", reset=marks)({k: v.double() for k, v in inputs.items()})
    known = judged.isfinite()
    assert known.float().mean() > 0.3 and y[known].isfinite().all()
    size = 1 + exact.abs().amax(-1, keepdim=True)  # of a step's channels, whose terms may cancel in one of them
    off, usual = (((v - exact).abs() / size)[known].max() for v in (y, judged))
    assert off <= 8 * usual + 1e-5


# --- the kernels are right -----------------------------------------------------------------------------------------
# In the interpreter a chunk has 32 steps and a tile 16: 37 steps are a whole chunk of two tiles, and a ragged one.


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
@pytest.mark.parametrize("left", ["D", "z", "delta_bias", "state"])
def test_what_is_left_out(device, left):
    inputs = {name: v for name, v in made(37, h=1, device=device).items() if name != left}
    check(inputs, softplus=left != "delta_bias")


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


# --- any layout ----------------------------------------------------------------------------------------------------


def laid(x, layout):
    if layout == "transposed":
        return x.transpose(1, -1).contiguous().transpose(1, -1) if x.ndim > 1 else x
    if layout == "sliced":
        return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]]
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    return x[(slice(0, 1),) * x.ndim].expand(x.shape)


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


@everywhere
def test_runs_are_equal_to_the_bit(device):
    times = 2 if device == "cpu" else 100
    inputs = made(19, device=device)
    first = both_ways(by("triton"), inputs)
    for _ in range(times - 1):
        again = both_ways(by("triton"), inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


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


# --- memory --------------------------------------------------------------------------------------------------------

KERNELS = ("steps", "states", "pass", "output", "pass_back", "rows", "columns", "steps_back")


def interpreted(test):
    """A test that looks into the interpreter: there is none on a GPU, where this is compute-sanitizer's work."""
    return test if kernels.INTERPRETED else None


@interpreted
@pytest.mark.parametrize("reset", [False, True])
def test_no_kernel_leaves_its_tensors_or_writes_twice(reset, monkeypatch, watch):
    """The tensors lie inside larger ones, whose other elements count as outside."""
    watched = {}
    for name in KERNELS:
        watched[name] = watch(launch.KERNELS[name])
        monkeypatch.setitem(launch.KERNELS, name, watched[name])
    inputs = made(35, h=2, p=5, n=19, skip="hp")
    inputs = {name: laid(v.detach(), "sliced").requires_grad_() for name, v in inputs.items()}
    d_y = laid(incoming(inputs["x"]), "sliced")
    both_ways(by("triton", reset=resets(35) if reset else None, chunk=32), inputs, d_y=d_y)
    launches = {name: kernel.launches for name, kernel in watched.items()}
    again = {"steps": 2, "states": 3, "pass": 2}  # the backward computes them anew
    assert launches == dict.fromkeys(KERNELS, 1) | again


@interpreted
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


@pytest.mark.parametrize("reset", [False, True])
def test_blocks_take_memory_linear_in_the_length(reset, largest):
    def numbers(length):
        inputs = made(length, h=2, p=8, n=8)
        marks = resets(length) if reset else None
        return largest(lambda: both_ways(by("chunked", reset=marks, chunk=32), inputs))

    assert numbers(1024) == 2 * numbers(512) == 1024 * 2 * 32  # the weights within chunks: L · T for each head


# --- as an operator of torch ---------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(device, dtype):
    inputs = made(5, h=1, device=device, skip="hp", dtype=dtype)
    ordered = [inputs[name] for name in NAMES]
    marks = resets(5, device=device)
    torch.library.opcheck(torch.ops.nondual.ssd.default, (*ordered, marks, True, 16))
    torch.library.opcheck(torch.ops.nondual.ssd.default, (*ordered[:5], None, None, None, None, None, False, 16))
    given = [v.detach() for v in ordered]
    d_y, d_last = torch.randn_like(given[0]), torch.randn_like(given[-1])
    torch.library.opcheck(torch.ops.nondual.ssd_backward.default, (d_y, d_last, *given, marks, True, 16))


@everywhere
def test_compiles_whole_forward_and_backward(device):
    def run(inputs):
        y, state = ssd(**inputs | {"x": inputs["x"] * 1.5}, delta_softplus=True, impl="triton")
        return y * 2, state

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager" if device == "cpu" else "inductor")
    for length in (9, 17):
        inputs = made(length, h=1, device=device)
        ours, plain = both_ways(compiled, inputs), both_ways(run, inputs)
        for name in plain:
            torch.testing.assert_close(ours[name], plain[name])


@pytest.mark.parametrize("reset", [False, True])
def test_auto_on_a_cpu_compiles_whole(reset):
    torch._dynamo.reset()
    inputs, marks = made(70), resets(70) if reset else None
    compiled = torch.compile(by("auto", reset=marks), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), by("auto", reset=marks)(inputs))


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_meta_tensors(impl):
    inputs = {name: v.detach().to("meta") for name, v in made(9, b=2, h=4, g=2, p=3, n=5).items()}
    y, state = by(impl, reset=torch.zeros(2, 9, dtype=torch.bool, device="meta"))(inputs)
    assert y.shape == (2, 9, 4, 3) and state.shape == (2, 4, 3, 5)


@everywhere
@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_autocast(device, impl):
    inputs = made(9, h=1, device=device)
    with torch.autocast(device, torch.float16):
        y, state = by(impl)(inputs | {"B": inputs["B"].half()})  # the dtypes meet
        (y.sum() + state.sum()).backward()
    assert y.dtype == torch.float16 and state.dtype == torch.float32
    assert all(v.grad.dtype == torch.float32 for v in inputs.values())
    half = {name: v.detach().half() if name in TIMED else v.detach() for name, v in inputs.items()}
    torch.testing.assert_close(y, by(impl)(half)[0])
    with torch.autocast(device, torch.float16):
        assert ssd(**exactly(inputs), impl="reference")[0].dtype == torch.float64


@everywhere
def test_a_second_derivative_is_refused(device):
    inputs = made(5, h=1, device=device)
    y, _ = by("triton")(inputs)
    with pytest.raises(RuntimeError, match="has no second derivative; impl='chunked' has one"):
        (grad,) = torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)
        grad.sum().backward()


# --- memory of its own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 70])
@pytest.mark.parametrize("impl", ["auto", "reference", "chunked", *(["triton"] if kernels.INTERPRETED else [])])
def test_the_last_state_shares_memory_with_nothing(impl, length):
    given = {name: v.detach() for name, v in made(length, h=1).items()}
    y, last = ssd(**given, impl=impl)
    assert last.untyped_storage().nbytes() == last.nbytes
    others = {v.untyped_storage().data_ptr() for v in (y, *given.values()) if v.numel()}
    assert last.untyped_storage().data_ptr() not in others
    before = given["state"].clone()
    last.zero_()
    assert torch.equal(given["state"], before)


def test_the_new_state_of_a_step_shares_memory_with_nothing():
    given = {name: v.detach() for name, v in made(1).items()}
    before = given["state"].clone()
    _, state = ssd_step(**{name: v[:, 0] if name in TIMED else v for name, v in given.items()})
    assert state.untyped_storage().nbytes() == state.nbytes
    state.zero_()
    assert torch.equal(given["state"], before)


# --- derivatives of every kind ---------------------------------------------------------------------------------------


def small(length=7, **more):
    return tuple(v.detach() for v in made(length, b=2, h=2, p=3, n=2, dtype=torch.float64, **more).values())


def plainly_called(impl, reset=None, chunk=3):
    return lambda *v: ssd(**dict(zip(NAMES, v)), delta_softplus=True, reset=reset, chunk=chunk, impl=impl)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("impl", ["auto", "reference", "chunked"])
def test_forward_mode(impl, reset):
    run, given, tangents = plainly_called(impl, resets(7, 2) if reset else None), small(), small(seed=1)
    _, found = torch.func.jvp(run, given, tangents)
    ahead, behind = (run(*(v + step * t for v, t in zip(given, tangents))) for step in (1e-6, -1e-6))
    torch.testing.assert_close(list(found), [(a - b) / 2e-6 for a, b in zip(ahead, behind)], atol=1e-6, rtol=1e-6)
    with forward_ad.dual_level():
        outs = run(*(forward_ad.make_dual(v, t) for v, t in zip(given, tangents)))
        torch.testing.assert_close([forward_ad.unpack_dual(v).tangent for v in outs], list(found))


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("impl", ["auto", "reference", "chunked"])
def test_transforms_of_torch_func(impl, reset):
    given, marks = small(), resets(7, 2) if reset else None

    def loss(*values, reset=marks):
        y, last = plainly_called(impl, reset)(*values)
        return y.sin().sum() + last.square().sum()

    leaves = [v.clone().requires_grad_() for v in given]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, argnums=tuple(range(9)))(*given), expected)
    outputs = lambda A: plainly_called(impl, marks)(*given[:2], A, *given[3:])[0]  # noqa: E731
    torch.testing.assert_close(torch.func.jacfwd(outputs)(given[2]), torch.func.jacrev(outputs)(given[2]))
    torch.testing.assert_close(
        torch.func.hessian(loss, argnums=2)(*given),
        torch.autograd.functional.hessian(lambda A: loss(*given[:2], A, *given[3:]), given[2]),
    )
    axes = tuple(None if name in ("A", "D", "delta_bias") else 0 for name in NAMES)

    def one(mark, *values):
        values = [v if axis is None else v[None] for v, axis in zip(values, axes)]
        return loss(*values, reset=None if mark is None else mark[None])

    each = torch.func.vmap(torch.func.grad(one, argnums=(3, 6)), (0 if reset else None, *axes))(marks, *given)
    torch.testing.assert_close([v.sum(0) for v in each], [expected[2], expected[5]])  # of A and of D


@pytest.mark.parametrize("given, says", [
    ("tangent", r"ssd\(impl='triton'\) has no forward-mode derivative .*; impl='chunked' and impl='auto' can do it"),
    ("transform", r"ssd\(impl='triton'\) cannot be transformed by torch.func .*; impl='chunked' and impl='auto' can"),
])  # fmt: skip
def test_the_kernels_say_what_they_cannot_do(given, says):
    values = tuple(v.float() for v in small())
    run = plainly_called("triton", chunk=16)
    with pytest.raises(RuntimeError, match=says):
        if given == "tangent":
            torch.func.jvp(run, values, values)
        else:
            torch.func.vmap(lambda A: run(*values[:2], A, *values[3:])[0])(torch.stack([values[2]] * 2))


def test_transforms_of_the_matrix():
    _, delta, A, B, C, D, _, bias, _ = small(4)
    marks = resets(4, 2)
    run = lambda *v: ssd_matrix(*v, True, reset=marks)  # noqa: E731
    values = (delta, A, B, C, D, bias)
    assert torch.autograd.gradcheck(run, [v.clone().requires_grad_() for v in values], check_forward_ad=True)
    torch.testing.assert_close(torch.func.jacfwd(run, argnums=1)(*values), torch.func.jacrev(run, argnums=1)(*values))
    both = torch.func.vmap(run, (None, 0, None, None, None, None))(delta, torch.stack([A, 2 * A]), *values[2:])
    torch.testing.assert_close(both, torch.stack([run(delta, A, *values[2:]), run(delta, 2 * A, *values[2:])]))


# --- compiled and exported for every length --------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("impl", ["auto", *(["triton"] if kernels.INTERPRETED else [])])
def test_compiled_once_for_every_length(impl, reset):
    torch._dynamo.reset()
    counter = CompileCounter()
    run = lambda given, marks: ssd(**given, delta_softplus=True, reset=marks, impl=impl)  # noqa: E731
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=False)
    for length in (7, 17, 40) if impl == "triton" else (7, 64, 65, 128, 300):
        given = made(length, b=2, h=1)
        marks = resets(length, 2) if reset else None
        for v in [given[name] for name in TIMED] + ([marks] if reset else []):
            torch._dynamo.mark_dynamic(v, 1)
        found = []
        for f in (compiled, run):
            y, last = f(given, marks)
            found.append([y, last, *torch.autograd.grad(y.sin().sum() + last.sum(), list(given.values()))])
        torch.testing.assert_close(*found, atol=2e-4, rtol=2e-4)
    assert counter.frame_count == 1


class Layer(torch.nn.Module):
    def forward(self, given, marks=None):
        return ssd(**given, delta_softplus=True, reset=marks)


LENGTH = torch.export.Dim("length", min=2, max=2**16)
SHAPES = {name: {1: LENGTH} if name in TIMED else None for name in NAMES}


def detached(length):
    return {name: v.detach() for name, v in made(length, b=2).items()}


@pytest.mark.parametrize("reset", [False, True])
def test_exported_for_every_length(reset):
    marks = lambda length: (resets(length, 2),) if reset else ()  # noqa: E731
    shapes = (SHAPES, {1: LENGTH}) if reset else (SHAPES,)
    exported = torch.export.export(Layer(), (detached(9), *marks(9)), dynamic_shapes=shapes).module()
    for length in (2, 64, 130):
        given = detached(length), *marks(length)
        torch.testing.assert_close(exported(*given), Layer()(*given), atol=1e-5, rtol=1e-5)


def test_onnx_for_every_length(tmp_path):
    import onnxruntime  # here: a GPU machine that runs the rest of this file does not have it

    program = torch.onnx.export(Layer().eval(), (detached(9), None), dynamo=True, dynamic_shapes=(SHAPES, None))
    program.save(tmp_path / "ssd.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "ssd.onnx")
    names = [v.name for v in session.get_inputs()]
    for length in (2, 77, 200):
        given = detached(length)
        found = session.run(None, {name: v.numpy() for name, v in zip(names, given.values())})
        torch.testing.assert_close([torch.from_numpy(v) for v in found], list(Layer()(given)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_opcheck_of_the_pass_from_chunk_to_chunk(reverse, ends):
    draw = torch.Generator().manual_seed(0)
    near, far = (torch.rand(2, 3, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    own, first = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((2, 3, 2, 5, 4), (2, 2, 5, 4)))
    own, first = (v.mT.contiguous().mT.requires_grad_() for v in (own, first))
    marks = torch.tensor([[False, True, False], [True, False, False]]) if ends else None
    given = (near.requires_grad_(), far, own, first, marks, reverse)
    torch.library.opcheck(torch.ops.nondual.ssd_pass_on.default, given)
    run = lambda near, own, first: torch.ops.nondual.ssd_pass_on(near, far, own, first, marks, reverse)  # noqa: E731
    assert torch.autograd.gradcheck(run, (near, own, first)) and torch.autograd.gradgradcheck(run, (near, own, first))


# --- dtypes and extremes ---------------------------------------------------------------------------------------------

PLAIN = ["reference", "chunked", *(["triton"] if kernels.INTERPRETED else [])]
PLACED = [*((impl, "cpu") for impl in PLAIN), pytest.param("triton", "cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("wide", TIMED)
def test_autocast_takes_mixed_dtypes(impl, wide):
    """One argument is still in float32, as a layer outside of autocast would give it; the others are in half."""
    given = {name: v.detach() for name, v in made(9, h=1).items()}
    half = {name: v.half() if name in TIMED else v for name, v in given.items()}
    with torch.autocast("cpu", torch.float16):
        y, last = by(impl)(half | {wide: given[wide]})
    assert y.dtype == torch.float16 and last.dtype == torch.float32
    torch.testing.assert_close((y, last), by(impl)(half))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("name", ["A", "D", "delta_bias", "state"])
def test_a_parameter_in_half_precision_is_its_own_number(impl, name, dtype):
    """Rounded once, then used in float32, as if the rounded numbers had come so. Its gradient is of its dtype."""
    given = {k: v.detach() for k, v in made(9, h=1).items()}
    rounded = given[name].to(dtype)
    found = []
    for v in (rounded, rounded.float()):
        leaves = {k: w.clone().requires_grad_() for k, w in (given | {name: v}).items()}
        result = both_ways(by(impl), leaves)
        assert all(result[f"d{k}"].dtype == w.dtype for k, w in leaves.items())
        found.append(result | {f"d{name}": result[f"d{name}"].to(dtype)})
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("impl", PLAIN)
def test_a_gate_of_200_and_its_gradient(impl, dtype):
    """silu(-200) is 0 and silu(200) is 200; their slopes 0 and 1; nothing overflows on the way."""
    inputs = made(9, h=1, dtype=dtype)
    with torch.no_grad():
        inputs["z"].copy_(torch.where(inputs["z"] > 0, 200.0, -200.0))
        inputs["x"] *= 0.1
    d_y = incoming(inputs["x"]) * 0.1
    ours, exact = both_ways(by(impl), inputs, d_y=d_y), both_ways(by("reference"), exactly(inputs), d_y=d_y)
    for name, truth in exact.items():
        assert ours[name].isfinite().all(), name
        assert (ours[name] - truth).abs().max() <= 16 * torch.finfo(dtype).eps * (1 + truth.abs().max()), name


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_steps(impl, extreme):
    """A step of 1e4 forgets all, one of softplus(-1e4) = 0 nothing; no NaN in either pass."""
    inputs = made(37, h=1)
    with torch.no_grad():
        inputs["delta"][:, 16:18] = extreme
    ours, exact = both_ways(by(impl), inputs), both_ways(by("reference"), exactly(inputs))
    for name, truth in exact.items():
        assert ours[name].isfinite().all(), name
        assert (ours[name] - truth).abs().max() <= 2e-5 * (1 + truth.abs().max()), name


@pytest.mark.parametrize("impl, device", PLACED)
@pytest.mark.parametrize("at", [15, 16, 31, 32])
def test_a_reset_on_a_chunks_first_or_last_step_with_weak_decay(impl, device, at):
    """Almost nothing is forgotten but by the reset: a step off by one would let a whole state through."""
    inputs = made(40, h=1, rate=1e-3, lag=-3.0, device=device)
    marks = torch.arange(40, device=device).eq(at)[None]
    ours = both_ways(by(impl, reset=marks, chunk=16), inputs)
    exact = both_ways(by("reference", reset=marks), exactly(inputs))
    for name, truth in exact.items():
        assert (ours[name] - truth).abs().max() <= 2e-5 * (1 + truth.abs().max()), name


# --- engines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "reference", "chunked", "triton"])
@pytest.mark.parametrize("b, length, h", [(2, 0, 3), (0, 5, 3), (2, 5, 0)])
def test_nothing_to_do(impl, b, length, h):
    inputs = made(length, b=b, h=h)
    y, state = ssd(**inputs, reset=torch.ones(b, length, dtype=torch.bool), impl=impl)
    assert y.shape == (b, length, h, 8) and state.shape == (b, h, 8, 8)
    if not length:
        assert torch.equal(state, inputs["state"])
    (y.sum() + state.sum()).backward()


def test_auto_on_a_cpu_is_chunked():
    inputs = made(70)
    auto, named = (ssd(**inputs, impl=impl) for impl in ("auto", "chunked"))
    assert torch.equal(auto[0], named[0]) and torch.equal(auto[1], named[1])


@pytest.mark.gpu
def test_auto_on_a_gpu_is_triton_where_it_can():
    inputs = made(70, device="cuda")
    auto, named = (ssd(**inputs, impl=impl) for impl in ("auto", "triton"))
    assert torch.equal(auto[0], named[0]) and torch.equal(auto[1], named[1])
    for other in (exactly(inputs), made(70, p=257, n=1, device="cuda"), made(70, n=257, device="cuda")):
        auto, named = (ssd(**other, impl=impl) for impl in ("auto", "chunked"))
        assert torch.equal(auto[0], named[0])


# --- refused -------------------------------------------------------------------------------------------------------


def zeros(dtype=torch.float32, **other):
    shapes = {"x": (2, 5, 4, 3), "delta": (2, 5, 4), "A": (4,), "B": (2, 5, 2, 6), "C": (2, 5, 2, 6)} | other
    return {
        name: torch.zeros(shape, dtype=dtype) if isinstance(shape, tuple) else shape for name, shape in shapes.items()
    }


@pytest.mark.parametrize("inputs, says", [
    (zeros(x=(2, 5, 4)), r"x must be 4-dimensional \(B, L, H, P\), got \(2, 5, 4\)"),
    (zeros(delta=(2, 5, 3)), r"delta must be \(B, L, H\) = \(2, 5, 4\), got \(2, 5, 3\)"),
    (zeros(A=(4, 6)), r"A must be \(H,\) = \(4,\), got \(4, 6\)"),
    (zeros(B=(2, 4, 2, 6)), r"B must be \(B, L, N\) or \(B, L, G, N\) with \(B, L\) = \(2, 5\).*got \(2, 4, 2, 6\)"),
    (zeros(C=(5, 6)), r"C must be \(B, L, N\) or .* got \(5, 6\)"),
    (zeros(B=(2, 5, 0), C=(2, 5, 0)), r"N of 1 or more, got \(2, 5, 0\)"),
    (zeros(C=(2, 5, 2, 7)), r"C must have the shape of B, \(2, 5, 2, 6\), got \(2, 5, 2, 7\)"),
    (zeros(B=(2, 5, 3, 6), C=(2, 5, 3, 6)), "the G of B and C must divide H = 4, got 3"),
    (zeros(D=(3,)), r"D must be \(H,\) = \(4,\) or \(H, P\) = \(4, 3\), got \(3,\)"),
    (zeros(z=(2, 5, 4, 1)), r"z must be \(B, L, H, P\) = \(2, 5, 4, 3\), got \(2, 5, 4, 1\)"),
    (zeros(delta_bias=(3,)), r"delta_bias must be \(H,\) = \(4,\), got \(3,\)"),
    (zeros(state=(2, 4, 6, 3)), r"state must be \(B, H, P, N\) = \(2, 4, 3, 6\), got \(2, 4, 6, 3\)"),
    (zeros(reset=(2, 4)), r"reset must be \(B, L\) = \(2, 5\), got \(2, 4\)"),
    (zeros(reset=(2, 5)), "reset must be boolean, True where a sequence begins, got torch.float32"),
    (zeros(torch.int64), "x must be floating point, got torch.int64"),
    (zeros(A=torch.zeros(4, dtype=torch.complex64)), "A must be real, floating point, got torch.complex64"),
    (zeros(delta=torch.zeros(2, 5, 4).half()), "delta must have the dtype of x, torch.float32, got torch.float16"),
    (zeros(A=torch.zeros(4, device="meta")), "A must be on the device of x, cpu, got meta"),
    (zeros(chunk=0), "chunk must be an integer of 1 or more, or None for the engine's own, got 0"),
    (zeros(chunk=True), "chunk must be an integer of 1 or more"),
    (zeros(chunk=16.0), "chunk must be an integer of 1 or more"),
    (zeros(chunk=48, impl="triton"), r"chunk must be one of \[16, 32, 64, 128, 256\] for impl='triton', got 48"),
    (zeros(impl="cuda"), "impl must be one of .*'chunked'.* got 'cuda'"),
    (zeros(torch.float64, impl="triton"), "x must be float16, bfloat16 or float32 for impl='triton'"),
    (zeros(x=(2, 5, 4, 257), impl="triton"), "P must be at most 256 and N at most 256 .*, got 257 and 6"),
    (zeros(B=(2, 5, 257), C=(2, 5, 257), impl="triton"), "N at most 256 for impl='triton', got 3 and 257"),
])  # fmt: skip
def test_bad_input_is_named(inputs, says):
    with pytest.raises(ValueError, match=says):
        ssd(**inputs)


@pytest.mark.parametrize("name", [*NAMES, "reset"])
def test_what_is_not_a_tensor_is_named(name):
    given = {k: v.detach() for k, v in made(5).items()} | {"reset": resets(5)}
    with pytest.raises(TypeError, match=f"^{name} must be a Tensor, got ndarray; use torch.from_numpy"):
        ssd(**given | {name: given[name].numpy()})
    with pytest.raises(TypeError, match=f"^{name} must be a Tensor, got list"):
        ssd(**given | {name: given[name].tolist()})
    if name in ("x", "delta", "A", "B", "C", "z"):
        now = {k: v[:, 0] if k in TIMED else v for k, v in given.items() if k != "reset"}
        with pytest.raises(TypeError, match=f"^{name} must be a Tensor, got ndarray"):
            ssd_step(**now | {name: now[name].numpy()})


def test_a_step_of_a_sequence_is_refused():
    with pytest.raises(ValueError, match=r"x must be \(B, H, P\).* for one step.*ssd takes whole sequences"):
        ssd_step(**zeros())


def test_bfloat16_is_refused_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    with pytest.raises(ValueError, match="float16 or float32 in Triton's interpreter"):
        ssd(**zeros(torch.bfloat16), impl="triton")


def test_without_the_interpreter_a_cpu_is_refused_and_auto_works():
    code = """
import torch
from nondual.ops.ssd import ssd
x, delta, B = torch.randn(1, 3, 2, 4), torch.rand(1, 3, 2), torch.randn(1, 3, 5)
arguments = x, delta, -torch.ones(2), B, B
assert torch.equal(ssd(*arguments)[0], ssd(*arguments, impl="chunked")[0])
try:
    ssd(*arguments, impl="triton")
except ValueError as error:
    print(error)
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(SRC)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=100)
    said = ran.stdout
    assert "x must be on a CUDA device for impl='triton', got cpu" in said and "TRITON_INTERPRET=1" in said


def test_without_triton_its_engine_is_refused(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("nondual.ops.ssd.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(door, "triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="needs triton"):
        ssd(**zeros(), impl="triton")
    assert ssd(**zeros())[0].shape == (2, 5, 4, 3)


# --- large, on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("length", [257, 1025, 2048])
@pytest.mark.parametrize("p, n, h, g", [(64, 128, 24, 1), (64, 256, 4, 2), (128, 128, 4, 4), (59, 111, 6, 3)])
def test_large(dtype, reset, length, p, n, h, g):
    inputs = made(length, b=2, h=h, g=g, p=p, n=n, dtype=dtype, device="cuda", skip="hp")
    check(inputs, reset=resets(length, 2, "cuda") if reset else None)


def in_pieces(size):
    """The textbook, piece by piece, each with the state of the one before: what L² has no room for at once."""

    def run(inputs):
        state, parts = inputs["state"], []
        for start in range(0, inputs["x"].shape[1], size):
            piece = {k: v[:, start : start + size] if k in TIMED else v for k, v in inputs.items()} | {"state": state}
            y, state = textbook(**piece)
            parts.append(y)
        return torch.cat(parts, 1), state

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_and_long(dtype):
    check(made(65537, h=2, p=64, n=128, dtype=dtype, device="cuda"), plain=in_pieces(1024))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rate, lag", DECAYS)
def test_large_at_strong_and_weak_decay(dtype, rate, lag):
    check(made(1025, h=4, p=64, n=128, rate=rate, lag=lag, dtype=dtype, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_runs_are_equal_to_the_bit(dtype):
    inputs = made(2049, b=2, h=24, p=64, n=128, dtype=dtype, device="cuda")
    marks = resets(2049, 2, "cuda")
    first = both_ways(by("triton", reset=marks), inputs)
    for _ in range(99):
        again = both_ways(by("triton", reset=marks), inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """One head at the far end of 2^31 numbers, with the rest and alone: the same bits, forward and backward."""
    length, h, p, n = 32768, 520, 128, 16
    assert length * h * p > 2**31

    def drawn(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)

    x, delta, B, C = drawn(1, length, h, p), drawn(1, length, h), drawn(1, length, n), drawn(1, length, n)
    A = -torch.rand(h, device="cuda")
    y, state = ssd(x, delta, A, B, C, delta_softplus=True, impl="triton")
    d_y = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, delta), d_y)
    alone = [v[:, :, -1:].detach().clone().requires_grad_() for v in (x, delta)]
    y_last, state_last = ssd(*alone, A[-1:], B, C, delta_softplus=True, impl="triton")
    assert torch.equal(y[:, :, -1:], y_last) and torch.equal(state[:, -1:], state_last)
    for a, b in zip(grads, torch.autograd.grad(y_last, alone, d_y[:, :, -1:])):
        assert torch.equal(a[:, :, -1:], b)
