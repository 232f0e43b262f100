"""A layer of linear attention is a step of gradient descent, to rounding in float64; k layers are k steps."""

import pytest
import torch

from nondual.language_models.in_context_learning.descent import DescentByAttention, descent_layer
from nondual.language_models.in_context_learning.fingerprint import fingerprint
from nondual.language_models.in_context_learning.predictors import gradient_descent
from nondual.ops.linear_attention import linear_attention


def drawn(b=3, n=11, m=7, d=5):
    draw = torch.Generator().manual_seed(0)
    shapes = ((b, n, d), (b, n), (b, m, d))
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)


def descended(x, y, steps, rate):
    """The weights after some steps on 1/(2N) Σ (w · x - y)², by torch's own gradients."""
    w = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype, requires_grad=True)
    for _ in range(steps):
        loss = (torch.einsum("bnd,bd->bn", x, w) - y).square().mean(1).sum() / 2
        w = (w - rate * torch.autograd.grad(loss, w)[0]).detach().requires_grad_()
    return w.detach()


def test_one_step_by_hand():
    model = DescentByAttention(1, n=2, steps=1, rate=0.5)
    x, y = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[3.0, 4.0]])
    # from w = 0 one step leads to 0.5 · (1 · 3 + 2 · 4) / 2 = 2.75; the answer at 10 is 27.5
    torch.testing.assert_close(model(x, y, torch.tensor([[[10.0]]])), torch.tensor([[27.5]]))


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_layers_predict_what_torch_s_own_gradient_steps_predict(steps):
    x, y, questions = drawn()
    model = DescentByAttention(5, n=11, steps=steps, rate=0.3, dtype=torch.float64)
    before = fingerprint(model)
    w = descended(x, y, steps, 0.3)
    said = model(x, y, questions)
    torch.testing.assert_close(said, torch.einsum("bmd,bd->bm", questions, w), rtol=1e-12, atol=1e-13)
    judge = gradient_descent(torch.cat([x, questions[:, :1]], 1), torch.cat([y, y[:, :1]], 1), steps=steps, rate=0.3)
    torch.testing.assert_close(judge[:, -1], w, rtol=1e-12, atol=1e-13)
    assert fingerprint(model) == before


def test_the_tokens_of_the_examples_carry_what_is_still_missed():
    x, y, _ = drawn()
    layer, tokens = descent_layer(5, 0.3 / 11, torch.float64), torch.cat([x, y[..., None]], -1)
    for steps in (1, 2, 3):
        tokens = layer(tokens)
        missed = y - torch.einsum("bnd,bd->bn", x, descended(x, y, steps, 0.3))
        torch.testing.assert_close(tokens[..., -1], missed, rtol=1e-12, atol=1e-13)
        assert torch.equal(tokens[..., :-1], x)


def test_the_state_of_linear_attention_is_the_gradient():
    """What the operation sums up, keys times values, is minus the gradient of half the sum of squares at w = 0."""
    x, y, _ = drawn()
    w = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    ((torch.einsum("bnd,bd->bn", x, w) - y).square().sum() / 2).backward()
    _, state = linear_attention(x[:, None], x[:, None], y[:, None, :, None])
    torch.testing.assert_close(state[:, 0, :, 0], -w.grad)


def test_questions_do_not_disturb_each_other_nor_the_examples():
    x, y, questions = drawn()
    model = DescentByAttention(5, n=11, steps=3, rate=0.3, dtype=torch.float64)
    together = model(x, y, questions)
    alone = torch.cat([model(x, y, questions[:, i : i + 1]) for i in range(7)], 1)
    torch.testing.assert_close(together, alone)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x[:, order], y[:, order], questions), together)


def test_one_example_and_no_question():
    model = DescentByAttention(5, n=1, steps=2, rate=0.3)
    x, y, questions = (z[:, :1].float() for z in drawn())
    assert model(x, y, questions).shape == (3, 1) and model(x, y, questions[:, :0]).shape == (3, 0)


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda: DescentByAttention(0, n=1, steps=1, rate=1.0), ValueError, "d must be 1 or more, got 0"),
        (lambda: DescentByAttention(1, n=0, steps=1, rate=1.0), ValueError, "n must be 1 or more, got 0"),
        (lambda: DescentByAttention(1, n=1, steps=0, rate=1.0), ValueError, "steps must be 1 or more, got 0"),
        (lambda: MODEL(torch.zeros(2, 5, 4), torch.zeros(2, 5), torch.zeros(2, 1, 3)), ValueError, "x must be"),
        (lambda: MODEL(torch.zeros(2, 5, 3), torch.zeros(2, 4), torch.zeros(2, 1, 3)), ValueError, r"y \(B, N\)"),
        (lambda: MODEL(torch.zeros(2, 5, 3), torch.zeros(2, 5), torch.zeros(2, 3)), ValueError, "questions must be"),
        (lambda: MODEL([1.0], torch.zeros(2, 5), torch.zeros(2, 3)), TypeError, "x must be a Tensor, got list"),
    ],
)
def test_what_is_refused(call, kind, said):
    with pytest.raises(kind, match=said):
        call()


MODEL = DescentByAttention(3, n=5, steps=1, rate=0.1)
