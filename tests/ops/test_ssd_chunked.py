"""State space duality by chunks in plain torch: errors, growing states, where NaN goes, memory, and its operator."""

import pytest
import torch
from ssd_cases import DECAYS, TIMED, both_ways, by, check, made, resets, strong_and_weak

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("rate, lag", DECAYS)
def test_blocks_at_strong_and_weak_decay(rate, lag):
    """The chunks alone: where decays are near 1 the recurrence itself is worse, since it rounds each of them."""
    check(made(131, rate=rate, lag=lag), impl="chunked")


def test_strong_and_weak_steps_in_one_chunk():
    check(strong_and_weak(97, rate=3.0), impl="chunked")


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


# --- not finite ------------------------------------------------------------------------------------------------------


BAD = [torch.nan, torch.inf, -torch.inf]


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


# --- memory, and the state from chunk to chunk -----------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
def test_blocks_take_memory_linear_in_the_length(reset, largest):
    def numbers(length):
        inputs = made(length, h=2, p=8, n=8)
        marks = resets(length) if reset else None
        return largest(lambda: both_ways(by("chunked", reset=marks, chunk=32), inputs))

    assert numbers(1024) == 2 * numbers(512) == 1024 * 2 * 32  # the weights within chunks: L · T for each head


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
