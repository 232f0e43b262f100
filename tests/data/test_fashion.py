"""Both parts of Fashion-MNIST are whole and balanced, and its file format is read by hand."""

import pytest
import torch

from nondual.data import FASHION_MNIST, fashion
from nondual.data.fashion import parsed
from nondual.store import WeightsMissing


@pytest.mark.parametrize("split, n", [("train", 60_000), ("test", 10_000)])
def test_every_class_alike_often(split, n):
    found = fashion(split)
    assert found.images.shape == (n, 1, 28, 28)
    assert found.labels.bincount().tolist() == [n // 10] * 10
    mean, deviation = found.images.float().mean() / 255, found.images.float().std() / 255
    assert abs(mean - 0.2860) < 0.002 and abs(deviation - 0.3530) < 0.002  # as they are often normalised


def test_shoes_lie_low_and_trousers_stand():
    found = fashion("test")
    where = {name: found.images[found.labels == i, 0].float().mean(0) for i, name in enumerate(found.names)}
    assert where["sneaker"][14:].sum() > 1.5 * where["sneaker"][:14].sum()
    assert where["trouser"][:, :7].sum() < 0.05 * where["trouser"].sum()


def test_the_format_by_hand():
    data = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes(range(6))
    assert torch.equal(parsed(data), torch.arange(6, dtype=torch.uint8).view(2, 3))
    with pytest.raises(ValueError, match=r"must begin with 00 00 08, got 1f 8b 08"):
        parsed(b"\x1f\x8b\x08\x00")


def test_another_split_is_refused_and_missing_pictures_say_how_to_get_them(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r'split must be "train" or "test", got \'validation\''):
        fashion("validation")
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"The pictures of dataset-fashion-mnist are not in"):
        fashion("test")


def test_the_licence_came_along():
    assert "Zalando SE" in (FASHION_MNIST.folder / "doc/dataset-fashion-mnist/copyright").read_text()
