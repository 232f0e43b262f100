"""The loss by token: by hand, against torch's own, with padding and label smoothing."""

import math

import pytest
import torch
import torch.nn.functional as F

from nondual.losses import least_loss, token_loss

B, N, V = 2, 5, 7


def draw(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, N, V, generator=generator, dtype=dtype), torch.randint(V, (B, N), generator=generator)


def test_by_hand():
    """Probabilities 1/2, 1/4, 1/4 and the first is right: ε = 0.3 spreads 0.1 over each of the three."""
    scores = torch.tensor([[[0.5, 0.25, 0.25]]], dtype=torch.float64).log()
    target = torch.tensor([[0]])
    torch.testing.assert_close(token_loss(scores, target), torch.tensor(math.log(2), dtype=torch.float64))
    expected = 0.8 * math.log(2) + 0.1 * math.log(4) + 0.1 * math.log(4)
    got = token_loss(scores, target, label_smoothing=0.3)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_it_is_the_cross_entropy_with_the_smoothed_targets_and_padding_counts_for_nothing(smoothing):
    scores, targets = draw()
    real = torch.arange(N) < torch.tensor([[N], [2]])
    asked = (1 - smoothing) * F.one_hot(targets, V) + smoothing / V
    each = -(asked * scores.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(token_loss(scores, targets, label_smoothing=smoothing), each.mean())
    got = token_loss(scores, targets, real=real, label_smoothing=smoothing)
    torch.testing.assert_close(got, each[real].mean())
    other = torch.where(real[..., None], scores, scores + 3 * draw(1)[0])
    torch.testing.assert_close(token_loss(other, targets, real=real, label_smoothing=smoothing), got)


def test_gradients_of_padding_are_0_and_all_are_where_nothing_is_real():
    scores, targets = draw()
    real = torch.zeros(B, N, dtype=torch.bool)
    for counted in (False, True):
        real[0, :3] = counted
        x = scores.clone().requires_grad_()
        loss = token_loss(x, targets, real=real, label_smoothing=0.1)
        (grad,) = torch.autograd.grad(loss, x)
        assert (grad[~real] == 0).all() and bool((grad[real] != 0).all())
        assert bool(loss > 0) == counted and math.isfinite(loss)


def test_the_least_loss_is_reached_by_the_smoothed_targets_and_by_nothing_else():
    targets = draw()[1]
    for smoothing in (0.1, 0.5):
        asked = ((1 - smoothing) * F.one_hot(targets, V) + smoothing / V).double().log()
        least = least_loss(V, smoothing)
        assert math.isclose(token_loss(asked, targets, label_smoothing=smoothing), least)
        for factor in (0.9, 1.1):  # less sure and surer
            assert token_loss(factor * asked, targets, label_smoothing=smoothing) > least
    assert least_loss(V, 0.0) == 0.0 and least_loss(1, 0.4) == 0.0


def test_half_precision_is_summed_in_float32():
    scores, targets = draw(dtype=torch.float32)
    half = token_loss(scores.bfloat16(), targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, token_loss(scores.bfloat16().float(), targets))
    assert token_loss(scores, targets.to(torch.uint8)).dtype == torch.float32


@pytest.mark.parametrize(
    "change, error, says",
    [
        (
            {"scores": draw()[0][0]},
            ValueError,
            r"scores must be floating point \(B, N, V\), got torch.float64 \(5, 7\)",
        ),
        ({"targets": draw()[1][:, :3]}, ValueError, r"targets must be integers \(B, N\) = \(2, 5\), got torch.int64"),
        ({"targets": draw()[1].double()}, ValueError, r"targets must be integers .*got torch.float64"),
        ({"real": torch.ones(B, N)}, ValueError, r"real must be boolean \(B, N\) = \(2, 5\), False on padding"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\), got -0.1"),
        ({"targets": [[1]]}, TypeError, "targets must be a Tensor, got list"),
    ],
)
def test_bad_input_is_refused_with_one_clear_sentence(change, error, says):
    scores, targets = draw()
    with pytest.raises(error, match=says):
        token_loss(**({"scores": scores, "targets": targets} | change))
    with pytest.raises(ValueError, match="vocabulary must be 1 or more, got 0"):
        least_loss(0, 0.1)
