"""The gap between two clouds: by hand, closed, and seen by a linear classifier."""

import math

import pytest
import torch
import torch.nn.functional as F

from nondual.analysis import close_gap, modality_gap, probe_modality

N, D = 61, 7


def clouds(apart=0.0, n=N, seed=0):
    draw = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(2, n, D, generator=draw, dtype=torch.float64)
    images[:, 0] += apart
    return images, texts


def test_by_hand():
    """Two images at 90 degrees, one text on the third axis."""
    images, texts = torch.tensor([[2.0, 0, 0], [0, 1, 0]]), torch.tensor([[0, 0, 5.0]])
    found = modality_gap(images, texts)
    torch.testing.assert_close(found.vector, torch.tensor([0.5, 0.5, -1], dtype=torch.float64))
    assert found.distance == pytest.approx(math.sqrt(1.5)) and found.images_cosine == pytest.approx(0)
    assert math.isnan(found.texts_cosine)


def test_the_mean_cosine_is_that_of_all_pairs():
    images, texts = clouds(1.0)
    cosine = F.normalize(images, dim=-1) @ F.normalize(images, dim=-1).T
    others = cosine[~torch.eye(N, dtype=torch.bool)]
    assert modality_gap(images, texts).images_cosine == pytest.approx(float(others.mean()))


def test_closing_it_brings_the_centroids_together_and_nothing_else_moves_them():
    images, texts = clouds(3.0)
    before = modality_gap(images, texts).distance
    distances = [modality_gap(*close_gap(images, texts, share)).distance for share in (-0.5, 0.0, 0.5, 1.0)]
    assert distances == sorted(distances, reverse=True) and distances[1] == pytest.approx(before)
    assert distances[0] > before > 0.7 and distances[3] < 0.3 * before  # the scaling brings a little back
    same = close_gap(images, texts, 0.0)
    torch.testing.assert_close(same[0], F.normalize(images, dim=-1))
    torch.testing.assert_close(same[1], F.normalize(texts, dim=-1))
    for cloud in close_gap(images, texts):
        torch.testing.assert_close(cloud.norm(dim=-1), torch.ones(N, dtype=torch.float64))


def test_the_probe_tells_clouds_apart_that_lie_apart_and_no_others():
    images, texts = clouds(9.0, n=200)
    assert probe_modality(images, -images) == 1.0
    assert 0.9 < probe_modality(images, texts) < 1.0
    chance = [probe_modality(*clouds(0.0, n=200, seed=seed)) for seed in range(8)]
    assert 0.44 < sum(chance) / 8 < 0.54
    same = torch.randn(40, D)
    assert probe_modality(same, same) <= 0.5  # a pair is never on both sides of the split


@pytest.mark.parametrize("apart, ridge", [(0.3, 1e-3), (1.5, 1e-3), (1.5, 0.3)])
def test_the_probe_is_the_logistic_regression_of_another_library(apart, ridge):
    from sklearn.linear_model import LogisticRegression

    images, texts = (F.normalize(x, dim=-1) for x in clouds(apart, n=200))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    right = 0
    for fold in order.tensor_split(5):
        rest = torch.tensor([i for i in range(200) if i not in fold])
        x = torch.cat([images[rest], texts[rest]])
        mean, spread = x.mean(0), x.std(0)
        judge = LogisticRegression(C=1 / (ridge * len(x)), tol=1e-9, max_iter=1000)
        judge.fit(((x - mean) / spread).numpy(), [1] * len(rest) + [0] * len(rest))
        for cloud, label in ((images, 1), (texts, 0)):
            right += int((judge.predict(((cloud[fold] - mean) / spread).numpy()) == label).sum())
    assert probe_modality(images, texts, ridge=ridge) == pytest.approx(right / 400, abs=0.003)


def test_more_dimensions_than_vectors_and_a_split_by_seed():
    images, texts = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(0))
    assert 0 <= probe_modality(images, texts, folds=2) <= 1
    images, texts = clouds(1.0)
    assert probe_modality(images, texts) == probe_modality(images, texts)
    assert len({probe_modality(images, texts, seed=seed) for seed in range(6)}) > 1


A, B = (x.float() for x in clouds(n=4))
REFUSED = [
    ((A.tolist(), B), TypeError, r"images must be a Tensor, got list"),
    ((A, B[:, :3]), ValueError, r"texts must have the width of images, D=7, got 3"),
    ((A[:0], B), ValueError, r"images must be 1 vector or more, floating point \(B, D\), got torch.float32 \(0, 7\)"),
    ((A, B.long()), ValueError, r"texts must be 1 vector or more, floating point \(B, D\), got torch.int64"),
    ((A / 0, B), ValueError, r"images must be finite, got NaN or infinity"),
]


@pytest.mark.parametrize("inputs, error, says", REFUSED, ids=[case[2][:40] for case in REFUSED])
@pytest.mark.parametrize("function", [modality_gap, close_gap, probe_modality])
def test_what_are_no_two_clouds_is_refused(function, inputs, error, says):
    with pytest.raises(error, match=says):
        function(*inputs)


def test_a_probe_that_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match=r"texts must be as many as images, one for each, got 3 for 4"):
        probe_modality(A, B[:3])
    for folds in (1, 5):
        with pytest.raises(ValueError, match=rf"folds must be 2 or more and at most the pairs, got {folds} for 4"):
            probe_modality(A, B, folds=folds)
    with pytest.raises(ValueError, match=r"ridge must be above 0, .* got 0"):
        probe_modality(A, B, folds=2, ridge=0)
