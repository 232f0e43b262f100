"""Labelled pictures of both kinds have one form."""

import torch

from nondual.data import Pictures, digits, fashion


def test_every_set_has_the_same_form():
    for found in (digits(), fashion("test")):
        assert isinstance(found, Pictures)
        n, channels, height, width = found.images.shape
        assert found.images.dtype == torch.uint8 and found.labels.dtype == torch.int64
        assert found.labels.shape == (n,) and channels == 1 and height == width
        assert found.labels.unique().tolist() == list(range(len(found.names))) == list(range(10))
        assert (found.images.min(), found.images.max()) == (0, 255)
