"""The photographs have their sizes and colours, and each one's licence is beside it."""

import sys

import pytest
import torch

from nondual.data import SCIKIT_IMAGE, photographs
from nondual.data.photographs import decoded
from nondual.store import WeightsMissing

SIZES = {
    "astronaut": (512, 512),
    "cat": (300, 451),
    "coffee": (400, 600),
    "rocket": (427, 640),
    "china": (427, 640),
    "flower": (427, 640),
}


def test_sizes_and_colours():
    found = photographs()
    assert {name: tuple(picture.shape[1:]) for name, picture in found.items()} == SIZES
    assert all(picture.dtype == torch.uint8 and picture.is_contiguous() for picture in found.values())
    red, green, blue = found["china"][:, :60].float().mean((1, 2))  # the sky
    assert blue > green > red
    red, green, blue = found["coffee"].float().mean((1, 2))  # a wooden table
    assert red > green > blue


def test_what_names_authors_and_licences_came_along():
    said = (SCIKIT_IMAGE.folder / "skimage/data/__init__.py").read_text(encoding="utf-8")
    for part in ("CC0 by the photographer (Stefan van der Walt)", "CC0 by the photographer (Rachel Michetti)", "NASA"):
        assert part in said


def test_a_picture_by_hand():
    """A PNG of two pixels, red and blue, as Pillow writes it."""
    image = pytest.importorskip("PIL.Image")
    import io

    file = io.BytesIO()
    picture = image.new("RGB", (2, 1), (255, 0, 0))
    picture.putpixel((1, 0), (0, 0, 255))
    picture.save(file, "PNG")
    assert decoded(file.getvalue()).tolist() == [[[255, 0]], [[0, 0]], [[0, 255]]]


def test_bad_input_missing_photographs_and_no_pillow(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="data must be a JPEG or PNG file, got 4 bytes that cannot be read"):
        decoded(b"text")
    with monkeypatch.context() as here:
        here.setitem(sys.modules, "PIL", None)
        with pytest.raises(ImportError, match=r"pip install 'nondual\[pictures\]'"):
            decoded(b"")
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"The photographs of scikit-image are not in"):
        photographs()
