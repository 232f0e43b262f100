"""All digits are there, as scikit-learn itself reads them, and a missing file says how to get it."""

import pytest
import torch

from nondual.data import SCIKIT_LEARN, digits
from nondual.store import WeightsMissing


def test_the_same_digits_as_scikit_learn_s():
    datasets = pytest.importorskip("sklearn.datasets")  # an independent reader, which other tests bring along
    theirs = datasets.load_digits()
    ours = digits()
    ink = torch.tensor(theirs.images, dtype=torch.float64)
    assert torch.equal(ours.images[:, 0].double(), (ink * 255 / 16 + 1e-9).round())
    assert torch.equal(ours.labels, torch.tensor(theirs.target)) and ours.names == tuple("0123456789")


def test_the_first_digit_by_hand():
    found = digits()
    assert found.images.shape == (1797, 1, 8, 8) and found.images.is_contiguous() and found.labels.is_contiguous()
    assert found.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert found.images[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 255 / 16 of 0 0 5 13 9 1 0 0
    assert found.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_the_licence_of_the_photographs_came_along():
    assert (SCIKIT_LEARN.folder / "images/README.txt").read_text().count("creativecommons.org/licenses/by/2.0") == 2


def test_missing_digits_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"The pictures of scikit-learn are not in .*-m nondual.pretrained`"):
        digits()
