"""Linear attention beyond one backward pass, and as programs: derivatives, torch.func, autocast, compile, export."""

import pytest
import torch
from linear_cases import FORMS, both_ways, made, resets
from torch._dynamo.testing import CompileCounter

from nondual.ops.linear_attention import linear_attention

CHOSEN = ["normalised", "each channel", "gated delta"]


def as_function(given, options, impl, **more):
    names = list(given)
    return lambda *values: linear_attention(**dict(zip(names, values)), **options, impl=impl, chunk=4, **more)


@pytest.mark.parametrize("impl", ["reference", "parallel", "chunked"])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("form", CHOSEN)
def test_first_and_second_derivatives_and_forward_mode(form, reset, impl):
    given, options = made(form, 6, b=1, h=2, g=1, d=2, dv=2)
    marks = resets(6, 1) if reset else None
    run = as_function(given, options, impl, reset=marks)
    values = list(given.values())
    assert torch.autograd.gradcheck(run, values, check_forward_ad=True)
    if impl == "chunked":
        assert torch.autograd.gradgradcheck(lambda *v: [x.sin().sum() for x in run(*v)], values)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("form", CHOSEN)
def test_transforms_of_torch_func(form, impl):
    given, options = made(form, 7, d=2, dv=2, requires_grad=False)
    run, values = as_function(given, options, impl), tuple(given.values())
    loss = lambda *v: run(*v)[0].sin().sum() + run(*v)[1].square().sum()  # noqa: E731
    leaves = [x.clone().requires_grad_() for x in values]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, argnums=tuple(range(len(values))))(*values), expected)
    one = lambda *v: loss(*(x[None] for x in v))  # noqa: E731
    each = torch.func.vmap(torch.func.grad(one, argnums=1))(*values)
    torch.testing.assert_close(each, expected[1])
    outputs = lambda v: run(*values[:2], v, *values[3:])[0]  # noqa: E731
    torch.testing.assert_close(torch.func.jacfwd(outputs)(values[2]), torch.func.jacrev(outputs)(values[2]))


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("form", ["sum", "retention", "each channel", "gated delta"])
def test_compiled_once_for_every_length(form, reset):
    torch._dynamo.reset()
    counter = CompileCounter()
    _, options = made(form, 5)
    run = lambda given, marks: linear_attention(**given, **options, reset=marks)  # noqa: E731
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=False)
    for length in (7, 64, 65, 300):
        given, _ = made(form, length, dtype=torch.float32, strength=0.3)
        marks = resets(length) if reset else None
        for name, x in given.items():
            if x.ndim > 2 and name != "state":
                torch._dynamo.mark_dynamic(x, 2)
        if marks is not None:
            torch._dynamo.mark_dynamic(marks, 1)
        found = []
        for f in (compiled, run):
            out, last = f(given, marks)
            found.append([out, last, *torch.autograd.grad(out.sin().sum() + last.sum(), list(given.values()))])
        torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)
    assert counter.frame_count == 1


def test_exported_for_every_length():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, log_decay, beta):
            return linear_attention(q, k, v, log_decay=log_decay, beta=beta)

    def inputs(length):
        given, _ = made("gated delta", length, dtype=torch.float32, state=False, requires_grad=False)
        return {name: x.float() for name, x in given.items()}

    length = torch.export.Dim("length", min=2, max=2**16)
    shapes = {name: {2: length} for name in inputs(3)}
    exported = torch.export.export(Layer(), (), inputs(9), dynamic_shapes=shapes).module()
    for n in (2, 64, 130):
        torch.testing.assert_close(exported(**inputs(n)), Layer()(**inputs(n)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "parallel", "chunked"])
@pytest.mark.parametrize("form", FORMS)
def test_under_autocast_sums_stay_in_float32(form, impl):
    """q, k and v are rounded once, on the way in; what follows is as if they had come in bfloat16."""
    given, options = made(form, 20, dtype=torch.float32)
    rounded = {name: x.detach().bfloat16().requires_grad_() if name in "qkv" else x for name, x in given.items()}
    expected = both_ways(impl, rounded, options)
    found = both_ways(impl, given, options, torch.autocast("cpu", dtype=torch.bfloat16))
    assert found["out"].dtype == torch.bfloat16 and found["last state"].dtype == torch.float32
    for name, x in expected.items():
        torch.testing.assert_close(found[name].float(), x.float(), atol=0, rtol=0)


def test_the_operator_that_passes_states_on():
    from nondual.ops.linear_attention import chunk_recurrence

    torch.manual_seed(0)
    whole = torch.rand(2, 3, 4, 1, 1).double().requires_grad_()
    added, initial = (
        torch.randn(2, 3, 4, 2, 5).double().requires_grad_(),
        torch.randn(2, 3, 2, 5).double().requires_grad_(),
    )
    x, y = (torch.randn(2, 3, 4, 6, 2).double().requires_grad_() for _ in range(2))
    for more in ((None, None), (x, y)):
        torch.library.opcheck(torch.ops.nondual.linear_attention_pass_on.default, (whole, added, initial, *more, False))
    before, last = chunk_recurrence.pass_on(whole, added, initial, x, y)
    S = initial
    for k in range(4):
        torch.testing.assert_close(before[:, :, k], S)
        S = whole[:, :, k] * S + added[:, :, k] - x[:, :, k].mT @ y[:, :, k] @ S
    torch.testing.assert_close(last, S)
