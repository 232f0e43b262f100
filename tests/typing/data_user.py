"""A user's script on pictures, for type checkers alone."""

from typing import assert_type

from torch import Tensor

from nondual.data import STYLES, Concept, clipart, digits, emoji, emoji_picture, fashion, photographs


def pictures() -> None:
    assert_type(digits().images, Tensor)
    assert_type(fashion("test").names, tuple[str, ...])
    assert_type(photographs(), dict[str, Tensor])
    found = emoji(STYLES[:2], size=16)
    assert_type(found.concepts, tuple[Concept, ...])
    assert_type(found.pictures["noto"], Tensor)
    assert_type(found.has, dict[str, Tensor])
    assert_type(found.concepts[0].tags, tuple[str, ...])
    assert_type(emoji_picture("1F436", "twemoji", 32), Tensor)
    assert_type(clipart().drawings[0].title, str)
