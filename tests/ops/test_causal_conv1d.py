"""The short causal convolution: by hand, against torch's, in parts, and never across a reset."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from nondual.ops.causal_conv1d import causal_conv1d

B, L, D, K = 2, 11, 5, 4


def inputs(length=L, width=K, dtype=torch.float64, **more):
    torch.manual_seed(0)
    made = [torch.randn(*shape, dtype=dtype, **more) for shape in ((B, length, D), (D, width), (D,))]
    return [x.requires_grad_() for x in made]


def test_a_case_by_hand():
    x = torch.tensor([[[1.0], [2.0], [3.0]]])
    y, history = causal_conv1d(x, torch.tensor([[10.0, 1.0]]), torch.tensor([0.5]))
    assert y.flatten().tolist() == [1.5, 12.5, 23.5]  # 1; 10·1 + 2; 10·2 + 3; and the bias
    assert history.flatten().tolist() == [3.0]
    y, history = causal_conv1d(x, torch.tensor([[10.0, 1.0]]), reset=torch.tensor([[False, False, True]]))
    assert y.flatten().tolist() == [1.0, 12.0, 3.0]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_it_is_torchs_convolution_padded_on_the_left(length, width):
    x, weight, bias = inputs(length, width)
    conv = nn.Conv1d(D, D, width, groups=D, padding=width - 1, dtype=torch.float64)
    conv.weight.data, conv.bias.data = weight.detach()[:, None], bias.detach()
    theirs = conv(x.transpose(1, 2))[..., :length].transpose(1, 2)
    ours, history = causal_conv1d(x, weight, bias)
    torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=1e-14)
    assert history.shape == (B, width - 1, D)
    torch.testing.assert_close(history, F.pad(x, (0, 0, width - 1, 0))[:, length:])


@pytest.mark.parametrize("cut", [0, 1, 2, 5, 10, 11])
def test_in_parts_it_is_the_whole_and_so_are_the_gradients(cut):
    given = inputs()
    x, weight, bias = given
    whole, last = causal_conv1d(x, weight, bias)
    first, history = causal_conv1d(x[:, :cut], weight, bias)
    second, end = causal_conv1d(x[:, cut:], weight, bias, history)
    parts = torch.cat([first, second], 1)
    torch.testing.assert_close(parts, whole, atol=1e-14, rtol=1e-14)
    assert torch.equal(end, last)
    g = torch.randn_like(whole)
    for a, b in zip(torch.autograd.grad(parts, given, g), torch.autograd.grad(whole, given, g)):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-13)


def test_packed_each_is_as_if_alone_even_beside_a_nan():
    x, weight, bias = inputs()
    starts = [0, 3, 4, 9]
    reset = torch.zeros(B, L, dtype=torch.bool)
    reset[:, starts] = True
    spans = list(zip(starts, [*starts[1:], L]))
    packed, history = causal_conv1d(x, weight, bias, torch.full((B, K - 1, D), torch.nan).double(), reset=reset)
    alone = [causal_conv1d(x[:, a:b], weight, bias) for a, b in spans]
    torch.testing.assert_close(packed, torch.cat([y for y, _ in alone], 1), atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(history, alone[-1][1])
    poisoned = x.detach().clone()
    poisoned[:, 4:9] = torch.nan
    y, history = causal_conv1d(poisoned, weight, bias, reset=reset)
    assert y[:, 9:].isfinite().all() and y[:, :4].isfinite().all() and history.isfinite().all()


def test_rows_may_begin_at_different_steps():
    x, weight, bias = inputs()
    reset = torch.zeros(B, L, dtype=torch.bool)
    reset[0, 4] = reset[1, 10] = True
    together, history = causal_conv1d(x, weight, bias, reset=reset)
    for row, start in ((0, 4), (1, 10)):
        one = x[row : row + 1]
        y = torch.cat([causal_conv1d(part, weight, bias)[0] for part in (one[:, :start], one[:, start:])], 1)
        torch.testing.assert_close(together[row : row + 1], y, atol=1e-14, rtol=1e-14)
        torch.testing.assert_close(history[row : row + 1], causal_conv1d(one[:, start:], weight, bias)[1])


def test_nothing_to_convolve():
    x, weight, bias = inputs(0)
    y, history = causal_conv1d(x, weight, bias)
    assert y.shape == (B, 0, D) and history.shape == (B, K - 1, D)
    y, _ = causal_conv1d(torch.zeros(0, L, D), torch.zeros(D, K))
    assert y.shape == (0, L, D)


def test_autocast_and_gradcheck():
    x, weight, bias = inputs(dtype=torch.float32)
    reset = torch.zeros(B, L, dtype=torch.bool)
    for marks in (None, reset):
        with torch.autocast("cpu", torch.bfloat16):
            y, history = causal_conv1d(x, weight, bias, reset=marks)
        assert y.dtype == history.dtype == torch.bfloat16
    reset[:, 5] = True
    assert torch.autograd.gradcheck(lambda *given: causal_conv1d(*given, reset=reset), inputs())


# --- memory of its own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("length", [0, 1, 2, L])
@pytest.mark.parametrize("width", [1, K])
def test_the_history_shares_memory_with_nothing(length, width, reset):
    x, weight, _ = (v.detach() for v in inputs(length, width))
    before = torch.randn(B, width - 1, D, dtype=torch.float64)
    marks = torch.zeros(B, length, dtype=torch.bool) if reset else None
    y, history = causal_conv1d(x, weight, None, before, reset=marks)
    assert history.untyped_storage().nbytes() == history.nbytes
    others = {v.untyped_storage().data_ptr() for v in (x, y, weight, before) if v.numel()}
    assert history.untyped_storage().data_ptr() not in others
    kept = before.clone()
    history.zero_()
    assert torch.equal(before, kept)


# --- derivatives of every kind, compiled and exported ----------------------------------------------------------------


def marked(length=L):
    return torch.arange(length).eq(length // 2).expand(B, -1)


@pytest.mark.parametrize("reset", [False, True])
def test_forward_mode_and_the_transforms_of_torch_func(reset):
    marks = marked() if reset else None
    x, weight, bias = given = [v.detach() for v in inputs()]
    history = torch.randn(B, K - 1, D, dtype=torch.float64)
    run = lambda *v: causal_conv1d(*v, reset=marks)  # noqa: E731
    leaves = [v.clone().requires_grad_() for v in (*given, history)]
    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, leaves)
    outputs = lambda weight: run(x, weight, bias, history)[0]  # noqa: E731
    torch.testing.assert_close(torch.func.jacfwd(outputs)(weight), torch.func.jacrev(outputs)(weight))

    def loss(x, weight, history, marks):
        y, after = causal_conv1d(x, weight, bias, history, reset=marks)
        return y.sin().sum() + after.square().sum()

    one = lambda x, weight, history, marks: loss(  # noqa: E731
        x[None], weight, history[None], None if marks is None else marks[None]
    )
    axes = (0, None, 0, 0 if reset else None)
    each = torch.func.vmap(torch.func.grad(one, argnums=1), axes)(x, weight, history, marks)
    torch.testing.assert_close(each.sum(0), torch.func.grad(loss, argnums=1)(x, weight, history, marks))


@pytest.mark.parametrize("reset", [False, True])
def test_compiled_and_exported_once_for_every_length(reset):
    def arguments(length):
        x, weight, bias = (v.detach() for v in inputs(length, dtype=torch.float32))
        return x, weight, bias, torch.ones(B, K - 1, D), marked(length) if reset else None

    class Layer(nn.Module):
        def forward(self, x, weight, bias, history, marks):
            return causal_conv1d(x, weight, bias, history, reset=marks)

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(Layer(), backend=counter, fullgraph=True, dynamic=False)
    long = torch.export.Dim("long", min=2, max=2**16)
    shapes = ({1: long}, None, None, None, {1: long} if reset else None)
    exported = torch.export.export(Layer(), arguments(9), dynamic_shapes=shapes).module()
    for length in (2, 3, 7, 64):
        given = arguments(length)
        torch._dynamo.mark_dynamic(given[0], 1)
        if reset:
            torch._dynamo.mark_dynamic(given[4], 1)
        for found in (compiled(*given), exported(*given)):
            torch.testing.assert_close(found, Layer()(*given))
    assert counter.frame_count == 1


def test_meta_tensors():
    x, weight, bias = (v.detach().to("meta") for v in inputs())
    y, history = causal_conv1d(x, weight, bias, reset=torch.zeros(B, L, dtype=torch.bool, device="meta"))
    assert y.shape == x.shape and history.shape == (B, K - 1, D) and y.device.type == "meta"


@pytest.mark.parametrize("name", ["x", "weight", "bias", "history", "reset"])
def test_what_is_not_a_tensor_is_named(name):
    given = dict(x=torch.zeros(B, L, D), weight=torch.zeros(D, K), bias=torch.zeros(D))
    given |= dict(history=torch.zeros(B, K - 1, D), reset=torch.zeros(B, L, dtype=torch.bool))
    with pytest.raises(TypeError, match=f"^{name} must be a Tensor, got ndarray; use torch.from_numpy"):
        causal_conv1d(**given | {name: given[name].numpy()})
    with pytest.raises(TypeError, match=f"^{name} must be a Tensor, got list"):
        causal_conv1d(**given | {name: given[name].tolist()})


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(x=torch.zeros(L, D)), r"x must be 3-dimensional"),
        (dict(weight=torch.zeros(D + 1, K)), r"weight must be \(D, K\) with D = 5"),
        (dict(bias=torch.zeros(1)), r"bias must be \(D,\) = \(5,\), got \(1,\)"),
        (dict(history=torch.zeros(B, K, D)), r"history must be \(B, K-1, D\) = \(2, 3, 5\), got \(2, 4, 5\)"),
        (dict(weight=torch.zeros(D, K, dtype=torch.float64)), r"weight must have the dtype of x"),
        (dict(reset=torch.zeros(B, L)), r"reset must be boolean"),
        (dict(reset=torch.zeros(B, L + 1, dtype=torch.bool)), r"reset must be \(B, L\)"),
        (dict(bias=torch.zeros(D, device="meta")), r"bias must be on the device of x, cpu, got meta"),
    ],
)
def test_what_does_not_fit_is_named(change, says):
    with pytest.raises(ValueError, match=says):
        causal_conv1d(**(dict(x=torch.zeros(B, L, D), weight=torch.zeros(D, K)) | change))
