"""From scores to weights: smoothing, windowing, the loss of coverage. Scores: tests/test_attention_mechanism.py."""

import pytest
import torch

from nondual.attention_mechanism.scores import around_median, attend, coverage_loss, smooth

B, N, M, H = 2, 3, 5, 7


def test_smooth_weights_are_shares_of_sigmoids():
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(B, N, M, generator=draw, dtype=torch.float64)
    h = torch.randn(B, M, H, generator=draw, dtype=torch.float64)
    mask = torch.ones(B, 1, M, dtype=torch.bool)
    mask[0, :, 3:] = False
    context, weights = attend(scores, h, mask, weigh=smooth)
    expected = scores.sigmoid() * mask
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(context, expected @ h)
    assert (smooth(scores, mask & False) == 0).all()
    assert smooth(torch.full((1, 4), -1e4)).sum() == pytest.approx(1)  # every sigmoid is 0 in float32


def test_the_window_lies_around_the_median():
    weights = torch.tensor([[0.1, 0.3, 0.2, 0.4, 0.0], [0.9, 0.1, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    expected = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(around_median(weights, 1)[:, 0], expected)
    assert torch.equal(around_median(torch.zeros(1, 3), 0)[0, 0], torch.tensor([True, False, False]))
    with pytest.raises(ValueError, match="width must be 0 or more, got -1"):
        around_median(weights, -1)


def test_coverage_loss_against_a_loop():
    weights = torch.randn(B, N, M, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(-1)
    loss = coverage_loss(weights)
    for b in range(B):
        covered = torch.zeros(M, dtype=torch.float64)
        for i in range(N):
            assert loss[b, i].item() == pytest.approx(sum(min(weights[b, i, j], covered[j]) for j in range(M)))
            covered += weights[b, i]
    assert (loss[:, 0] == 0).all() and (loss <= 1).all()
    with pytest.raises(TypeError, match="weights must be a Tensor"):
        coverage_loss([0.5])
