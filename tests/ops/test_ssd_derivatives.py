"""Derivatives of state space duality beyond one backward pass: forward mode, torch.func, the second derivative."""

import pytest
import torch
from harness import everywhere
from ssd_cases import NAMES, by, made, resets
from torch.autograd import forward_ad

from nondual.ops.ssd import ssd, ssd_matrix

pytestmark = pytest.mark.usefixtures("poisoned")


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


def test_transforms_of_the_matrix():
    _, delta, A, B, C, D, _, bias, _ = small(4)
    marks = resets(4, 2)
    run = lambda *v: ssd_matrix(*v, True, reset=marks)  # noqa: E731
    values = (delta, A, B, C, D, bias)
    assert torch.autograd.gradcheck(run, [v.clone().requires_grad_() for v in values], check_forward_ad=True)
    torch.testing.assert_close(torch.func.jacfwd(run, argnums=1)(*values), torch.func.jacrev(run, argnums=1)(*values))
    both = torch.func.vmap(run, (None, 0, None, None, None, None))(delta, torch.stack([A, 2 * A]), *values[2:])
    torch.testing.assert_close(both, torch.stack([run(delta, A, *values[2:]), run(delta, 2 * A, *values[2:])]))


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


@everywhere
def test_a_second_derivative_is_refused(device):
    inputs = made(5, h=1, device=device)
    y, _ = by("triton")(inputs)
    with pytest.raises(RuntimeError, match="has no second derivative; impl='chunked' has one"):
        (grad,) = torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)
        grad.sum().backward()
