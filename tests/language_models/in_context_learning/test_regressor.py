"""The model that reads examples: what it may see, any length, every gradient, and what is refused."""

import pytest
import torch
from torch import nn

from nondual.efficient_attention.linear_attention import LinearAttentionMixer
from nondual.language_models.in_context_learning.regressor import InContextRegressor


def model(dtype=torch.float64, **more):
    torch.manual_seed(0)
    return InContextRegressor(3, 20, 2, 5, **more).to(dtype)


def drawn(b=2, n=7, d=3, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(b, n, d, generator=draw, dtype=dtype), torch.randn(b, n, generator=draw, dtype=dtype)


def test_a_prediction_sees_its_own_input_and_the_examples_before_it_and_nothing_else():
    reader, (x, y) = model(), drawn()
    x.requires_grad_(), y.requires_grad_()
    said = reader(x, y)
    assert said.shape == (2, 7)
    for i in range(7):
        of_x, of_y = torch.autograd.grad(said[0, i], (x, y), retain_graph=True)
        assert (of_x[0, : i + 1] != 0).all() and (of_x[0, i + 1 :] == 0).all() and (of_x[1] == 0).all()
        assert (of_y[0, :i] != 0).all() and (of_y[0, i:] == 0).all()


def test_the_tokens_are_what_the_docstring_says_by_an_independent_reading():
    """The questions are read one by one, each after the tokens of the examples before it and their questions."""
    reader, (x, y) = model(), drawn(b=1)
    said = reader(x, y)
    rows = []
    for i in range(7):
        rows.append([*x[0, i].tolist(), 0.0, 0.0])
        tokens = torch.tensor([rows], dtype=torch.float64)
        torch.testing.assert_close(reader.read_out(reader.encoder(reader.read_in(tokens)))[0, -1, 0], said[0, i])
        rows.append([*x[0, i].tolist(), y[0, i].item(), 1.0])


def test_the_order_of_the_examples_of_one_layer_does_not_matter():
    torch.manual_seed(0)
    reader, (x, y) = InContextRegressor(3, 20, 1, 5).double(), drawn()
    order = torch.tensor([3, 1, 5, 0, 4, 2, 6])
    torch.testing.assert_close(reader(x[:, order], y[:, order])[:, -1], reader(x, y)[:, -1])


@pytest.mark.parametrize("n", [1, 2, 63])
def test_it_reads_prompts_of_any_length(n):
    reader, (x, y) = model(), drawn(n=n)
    said = reader(x, y)
    assert said.shape == (2, n) and said.isfinite().all()
    torch.testing.assert_close(reader(x[:, :1], y[:, :1]), said[:, :1])


def test_every_parameter_gets_a_gradient():
    reader, (x, y) = model(), drawn()
    (reader(x, y) - y).square().mean().backward()
    for name, parameter in reader.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("k_proj.bias"):  # a number added to all scores of a row: softmax drops it
            assert (parameter.grad != 0).any(), name


def test_it_runs_with_another_mixer_in_bfloat16_and_compiled():
    x, y = drawn(dtype=torch.bfloat16)
    assert model(torch.bfloat16)(x, y).dtype == torch.bfloat16
    x, y = drawn(dtype=torch.float32)
    reader = model(torch.float32, mixer=lambda e: LinearAttentionMixer(e, 5))
    assert isinstance(reader.encoder.layers[0].mixer, LinearAttentionMixer) and reader(x, y).shape == (2, 7)
    reader = model(torch.float32)
    compiled = torch.compile(reader, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y), reader(x, y))


def test_one_exported_program_serves_every_length():
    reader, n = model(torch.float32), torch.export.Dim("n", min=2, max=99)
    program = torch.export.export(reader, drawn(dtype=torch.float32), dynamic_shapes=({1: n}, {1: n})).module()
    for length in (2, 5, 31):
        given = drawn(n=length, dtype=torch.float32)
        torch.testing.assert_close(program(*given), reader(*given))


def test_its_sizes():
    assert model().encoder.layers[0].feed_forward.linear1.out_features == 80
    assert model(d_ff=11).encoder.layers[0].feed_forward.linear1.out_features == 11
    assert isinstance(model().read_in, nn.Linear) and model().read_in.in_features == 5


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda: InContextRegressor(0, 20, 1, 5), ValueError, "d must be 1 or more, got 0"),
        (lambda: model()(torch.zeros(2, 7, 4), torch.zeros(2, 7)), ValueError, r"x must be floating point \(B, N, 3\)"),
        (lambda: model()(torch.zeros(7, 3), torch.zeros(7)), ValueError, "x must be"),
        (lambda: model()(torch.zeros(2, 7, 3), torch.zeros(2, 6)), ValueError, r"y must be floating point \(B, N\)"),
        (lambda: model()(torch.zeros(2, 7, 3).long(), torch.zeros(2, 7)), ValueError, "got torch.int64"),
        (lambda: model()([1.0], torch.zeros(2, 7)), TypeError, "x must be a Tensor, got list"),
    ],
)
def test_what_is_refused(call, kind, said):
    with pytest.raises(kind, match=said):
        call()
