"""The linear recurrence as an operator of torch: forward mode, torch.func, compiled and exported for every length."""

import pytest
import torch
from recurrence_cases import ENGINES, KINDS, arguments, by_matrix, draw
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from nondual.ops.linear_recurrence import doubling, linear_recurrence, sequential

# --- derivatives of every kind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("impl", ["auto", *ENGINES])
def test_forward_mode(impl, dtype):
    given = [x.requires_grad_() for x in arguments(5, dtype, width=(2,))]
    assert torch.autograd.gradcheck(
        lambda *x: linear_recurrence(*x, impl=impl), given, check_forward_ad=True, check_backward_ad=False
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given[1].detach(), torch.ones_like(given[1]))
        _, last = linear_recurrence(given[0].detach(), dual, impl=impl)
        tangent = forward_ad.unpack_dual(last).tangent
    _, summed = linear_recurrence(given[0].detach(), torch.ones_like(given[1]), impl=impl)
    torch.testing.assert_close(tangent, summed)  # linear in b: the derivative along ones is the run over ones


@pytest.mark.parametrize("impl", ["auto", *ENGINES])
def test_transforms_of_torch_func(impl):
    a, b, state = arguments(5, width=(2,))

    def loss(a, b, state):
        h, last = linear_recurrence(a, b, state, impl=impl)
        return h.sin().sum() + last.square().sum()

    leaves = [x.clone().requires_grad_() for x in (a, b, state)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1, 2))(a, b, state), expected)
    states = lambda a: linear_recurrence(a, b, state, impl=impl)[0]  # noqa: E731
    tangents = draw(*a.shape, seed=7)
    forward, backward = torch.func.jacfwd(states)(a), torch.func.jacrev(states)(a)
    torch.testing.assert_close(forward, backward)
    torch.testing.assert_close(
        torch.func.jvp(states, (a,), (tangents,))[1], torch.einsum("abcdef,def->abc", forward, tangents)
    )
    torch.testing.assert_close(
        torch.func.hessian(loss, argnums=2)(a, b, state),
        torch.autograd.functional.hessian(lambda s: loss(a, b, s), state),
    )
    per_sample = torch.func.vmap(torch.func.grad(lambda a, b: loss(a[None], b[None], None)))(a, b)
    for i in range(len(a)):
        torch.testing.assert_close(
            per_sample[i : i + 1], torch.func.grad(lambda a, b: loss(a, b, None))(a[i : i + 1], b[i : i + 1])
        )


# --- compiled and exported -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", *ENGINES])
def test_compiled_once_for_every_length(impl):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = lambda a, b, state: linear_recurrence(a * 0.5, b, state, impl=impl)  # noqa: E731
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    for length in (7, 8, 17, 64, 111):  # none equal to another size, which torch would take for the same
        both = [[x.requires_grad_() for x in arguments(length)] for _ in range(2)]
        for f, leaves in zip((compiled, run), both):
            h, last = f(*leaves)
            (h.sin().sum() + last.sum()).backward()
        torch.testing.assert_close(compiled(*both[0]), run(*both[1]))
        torch.testing.assert_close(*[[x.grad for x in leaves] for leaves in both])
    assert counter.frame_count == 1


class Layer(torch.nn.Module):
    def forward(self, a, b, state):
        return linear_recurrence(a, b, state)


def any_length():
    length = torch.export.Dim("length", min=2, max=2**16)
    return {1: length}, {1: length}, None


def test_exported_for_every_length():
    exported = torch.export.export(Layer(), arguments(9), dynamic_shapes=any_length()).module()
    for length in (2, 5, 63):
        torch.testing.assert_close(exported(*arguments(length)), linear_recurrence(*arguments(length)))


def test_onnx_for_every_length(tmp_path):
    import onnxruntime  # here: a GPU machine that runs the rest of this file does not have it

    narrow = lambda length: tuple(x.float() for x in arguments(length))  # noqa: E731
    program = torch.onnx.export(Layer(), narrow(9), dynamo=True, dynamic_shapes=any_length())
    program.save(tmp_path / "recurrence.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "recurrence.onnx")
    names = [x.name for x in session.get_inputs()]
    for length in (2, 9, 77):
        found = session.run(None, {name: x.numpy() for name, x in zip(names, narrow(length))})
        torch.testing.assert_close([torch.from_numpy(x) for x in found], list(linear_recurrence(*narrow(length))))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("length", [1, 2, 17])
def test_doubling_is_the_recurrence(length, dtype):
    a, b, state = arguments(length, dtype)
    torch.testing.assert_close(doubling(a, b, state), by_matrix(a, b, state))
    torch.testing.assert_close(
        doubling(a[:, :1, :1].expand(-1, length, -1, -1), b, state),
        sequential(a[:, :1, :1].expand(-1, length, -1, -1), b, state),
    )


@pytest.mark.parametrize("in_parallel", [False, True])
@pytest.mark.parametrize("length", [1, 7])
def test_opcheck_in_any_layout(length, in_parallel):
    a, b, state = arguments(length)
    a, b, state = a.transpose(0, 1).contiguous().transpose(0, 1), b.mT.contiguous().mT, state.mT.contiguous().mT
    given = [x.requires_grad_() for x in (a, b, state)]
    torch.library.opcheck(torch.ops.nondual.linear_recurrence.default, (*given, in_parallel))


@pytest.mark.parametrize("impl", ["auto", *ENGINES])
def test_meta_tensors(impl):
    h, last = linear_recurrence(*(x.to("meta") for x in arguments(7)), impl=impl)
    assert h.shape == (2, 7, 3, 5) and last.shape == (2, 3, 5) and h.device.type == "meta"
