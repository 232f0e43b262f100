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
import triton

from nondual.ops import ssd as door
from nondual.ops.selective_scan import selective_scan
from nondual.ops.ssd import chunked, reference, ssd, ssd_matrix, ssd_step


from nondual.ops.ssd import triton as kernels


SRC = Path(__file__).parents[2] / "src"
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = [*(["cpu"] if kernels.INTERPRETED else []), CUDA]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
NAMES = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "state")
TIMED = ("x", "delta", "B", "C", "z")

everywhere = pytest.mark.parametrize("device", DEVICES)


def test_the_kernels_can_run_here():
    assert kernels.INTERPRETED or torch.cuda.is_available(), "unset TRITON_INTERPRET=0: there is no GPU to compile for"


@pytest.fixture(autouse=True)
def poisoned():
    """What is not written stays NaN, and is seen: torch fills new memory with it in this mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


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
    fade = between.masked_fill(~seen, -torch.inf).exp() * step[:, :, None]
    y = (C @ B.mT * fade.to(dtype)) @ v
    last = (fade[:, :, -1, :, None].to(dtype) * v).mT @ B
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
    """Each output and gradient by name: our greatest error, that of plain PyTorch in the same dtype, and what no result
    can promise to be below: half a unit in the last place of the greatest number, and eight of a float32 near 2, in
    which sums of terms that may cancel are kept."""
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
    return result


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
    inputs = made(7, b=1, h=2, p=2, g=1, n=2, dtype=torch.float64, skip="hp")
    marks = torch.tensor([[False, False, False, False, True, False, False]])

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


def strong_and_weak(**more):
    """Steps that forget everything beside steps that forget nothing, in every chunk: sums in which small ones drown."""
    inputs = made(97, **more)
    with torch.no_grad():
        inputs["delta"][:, ::7] += 300
        inputs["delta"][:, 1::7] -= 9
    return inputs


def test_strong_and_weak_steps_in_one_chunk():
    check(strong_and_weak(rate=3.0), impl="chunked")


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


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("name", ["x", "delta", "B", "C", "state"])
def test_nan_before_a_reset_is_forgotten(impl, name):
    """At once; but in x, where the blocks multiply it by the zeros of a mask, by the end of its chunk."""
    inputs = {k: v.detach() for k, v in made(40).items()}
    marks = torch.zeros(1, 40, dtype=torch.bool)
    marks[:, 11] = True
    clean = by(impl, reset=marks, chunk=8)(inputs)
    bad = inputs | {name: inputs[name].clone()}
    bad[name][:, *(() if name == "state" else (slice(9, 11),))] = torch.nan
    y, state = by(impl, reset=marks, chunk=8)(bad)
    leaks = impl != "reference" and name == "x"
    first = 16 if leaks else 11
    assert y[:, :9].isnan().any() == (name == "state" or leaks)
    assert torch.equal(y[:, first:], clean[0][:, first:]) and torch.equal(state, clean[1])
