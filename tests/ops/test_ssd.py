"""What state space duality computes: recurrence, matrix and chunks are one, split or packed, at its extremes too."""

import math

import pytest
import torch
from ssd_cases import HERE, NAMES, PLACED, TIMED, both_ways, by, check, exactly, incoming, made, resets

from nondual.ops.selective_scan import selective_scan
from nondual.ops.ssd import ssd, ssd_matrix, ssd_step

pytestmark = pytest.mark.usefixtures("poisoned")


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


# --- packed sequences ------------------------------------------------------------------------------------------------


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


# --- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("impl", HERE)
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


@pytest.mark.parametrize("impl", HERE)
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


# --- memory of its own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 70])
@pytest.mark.parametrize("impl", ["auto", *HERE])
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
