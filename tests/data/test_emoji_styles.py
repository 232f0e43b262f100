"""Drawings are found by code points where a set lists them, and by compared names where it does not."""

import json

import pytest

from nondual.data.emoji_styles import NAMES, PACKAGES, STYLES, drawing, letters, plain
from nondual.store import WeightsMissing, read

LICENCES = {
    "noto": "Apache-2.0",
    "twemoji": "CC-BY-4.0",
    "openmoji": "CC-BY-SA-4.0",
    "fluent-emoji-flat": "MIT",
    "fxemoji": "Apache-2.0",
    "emojione-v1": "CC-BY-SA-4.0",
    "emojione": "CC-BY-4.0",
}


def test_each_style_says_its_licence():
    assert tuple(LICENCES) == STYLES == tuple(PACKAGES)
    for style, package in PACKAGES.items():
        said = json.loads(read(package, "info.json"))
        assert (said["prefix"], said["license"]["spdx"]) == (style, LICENCES[style])


def test_code_points_and_names_are_compared_without_what_sets_write_differently():
    assert plain("2764-fe0f") == plain("2764") == "2764"
    assert plain("1F468-200D-2764-FE0F-200D-1F468") == "1F468-200D-2764-200D-1F468"
    assert letters("Face with Tears of Joy!") == letters("face-with-tears-of-joy") == "facewithtearsofjoy"


def test_a_drawing_of_each_style():
    for style in STYLES:
        svg = drawing(style, "1F680", ("rocket",))
        assert svg is not None and svg.startswith("<svg ") and svg.endswith("</svg>"), style
        assert drawing(style, "2764-FE0F", ("red heart", "HEAVY BLACK HEART")) is not None, style
        assert drawing(style, "1F9FF-1F9FF", ("no such thing",)) is None


@pytest.mark.parametrize("style", NAMES)
def test_what_is_written_by_hand_is_there_and_needed(style):
    icons = json.loads(read(PACKAGES[style], "icons.json"))
    known = {*icons["icons"], *icons.get("aliases", {})}
    for code, name in NAMES[style].items():
        assert name == "-" or name in known, (code, name)
        assert (drawing(style, code, ("no such thing",)) is None) == (name == "-")
    drawn = [name for name in NAMES[style].values() if name != "-"]
    assert len(drawn) == len(set(drawn))  # no drawing stands for two emoji


def test_a_name_that_means_another_thing_is_not_taken():
    """The emoji of the code point 1F52B was a revolver, and is a water pistol."""
    for style in NAMES:
        assert drawing(style, "1F52B", ("water pistol", "PISTOL")) is None
    assert drawing("noto", "1F52B", ()) is not None
    assert drawing("emojione", "1F997", ("cricket",)) is None  # an insect; the set has the game


def test_a_mirrored_alias_is_mirrored():
    """No alias of these sets that is mirrored belongs to a concept, so the rule is tried on one by hand."""
    from nondual.data import emoji_styles

    icons = {
        "width": 8,
        "height": 8,
        "icons": {"hand": {"body": "<path/>"}},
        "aliases": {"other": {"parent": "hand", "hFlip": True}, "same": {"parent": "hand"}},
    }
    cached = emoji_styles._drawings
    try:
        emoji_styles._drawings = lambda style: (icons, {"1": "hand", "2": "other", "3": "same"}, {})
        assert "matrix(-1 0 0 1 8 0)" in drawing("noto", "2", ())
        assert drawing("noto", "1", ()) == drawing("noto", "3", ()) and "matrix" not in drawing("noto", "1", ())
    finally:
        emoji_styles._drawings = cached


def test_a_missing_set_says_how_to_get_it(monkeypatch, tmp_path):
    from nondual.data import emoji_styles

    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    emoji_styles._drawings.cache_clear()
    with pytest.raises(WeightsMissing, match=r"The drawings of @iconify-json/noto are not in .*-m nondual.pretrained`"):
        drawing("noto", "1F680", ())
