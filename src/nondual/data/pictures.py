"""Labelled pictures, as `digits` and `fashion` return them."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Pictures(NamedTuple):
    """N pictures of one size, each with the number of its class.

    Attributes:
        images: (N, C, H, W) uint8, 0 to 255; C is 1 for grey pictures.
        labels: (N,) int64, the class of each picture.
        names: of the classes, so that picture i shows `names[labels[i]]`.
    """

    images: "Tensor"
    labels: "Tensor"
    names: tuple[str, ...]
