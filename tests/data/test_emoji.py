"""The same concepts in seven styles: how many there are, what is left out, and that the pictures show them."""

import json

import pytest
import torch

from nondual.data import EMOJIBASE, STYLES, Emoji, emoji, emoji_picture
from nondual.data.emoji import concepts
from nondual.store import WeightsMissing, read

DRAWN = {
    "noto": 1592,
    "twemoji": 1592,
    "openmoji": 1592,
    "fluent-emoji-flat": 1534,
    "fxemoji": 796,
    "emojione-v1": 891,
    "emojione": 1051,
}


@pytest.fixture(scope="module")
def all_of_them() -> Emoji:
    return emoji()


def test_every_concept_once():
    found = concepts()
    assert len(found) == len({one.hexcode for one in found}) == len({one.name for one in found}) == 1592
    assert {one.group for one in found} == {
        "smileys-emotion",
        "people-body",
        "animals-nature",
        "food-drink",
        "travel-places",
        "activities",
        "objects",
        "symbols",
    }
    dog = next(one for one in found if one.hexcode == "1F436")
    assert dog.tags == ("adorbs", "animal", "dog", "face", "pet", "puppies", "puppy")
    assert (dog.name, dog.subgroup, dog.hindi) == ("dog face", "animal-mammal", "कुत्ते का चेहरा")
    latin = [one.name for one in found if not any("\u0900" <= letter <= "\u097f" for letter in one.hindi)]
    assert latin == ["trombone"]
    assert all(one.tags == tuple(sorted(one.tags)) for one in found)


def test_what_is_left_out_is_counted_as_the_docstring_says():
    listed = json.loads(read(EMOJIBASE, "en/data.json"))
    subgroups = json.loads(read(EMOJIBASE, "meta/groups.json"))["subgroups"]
    kinds = [(entry.get("group"), subgroups.get(str(entry.get("subgroup")))) for entry in listed]
    assert len(listed) == 1949
    assert sum(group == 9 for group, _ in kinds) == 270
    assert sum(group is None for group, _ in kinds) == 26
    assert sum(group == 2 for group, _ in kinds) == 9
    assert [sum(kind == name for _, kind in kinds) for name in ("keycap", "alphanum")] == [13, 39]
    assert 1949 - 270 - 26 - 9 - 13 - 39 == 1592
    assert sum(len(entry.get("skins", [])) for entry in listed) == 2030


def test_pictures_and_where_there_is_one(all_of_them):
    assert {style: int(has.sum()) for style, has in all_of_them.has.items()} == DRAWN and tuple(DRAWN) == STYLES
    everywhere = torch.stack(list(all_of_them.has.values())).all(0)
    assert everywhere.sum() == 781
    for style in STYLES:
        pictures, has = all_of_them.pictures[style], all_of_them.has[style]
        assert pictures.shape == (1592, 3, 32, 32) and pictures.dtype == torch.uint8 and has.dtype == torch.bool
        blank = (pictures == 255).flatten(1).all(1)
        assert blank[~has].all()
        assert blank[has].sum() == 0, [all_of_them.concepts[i].name for i in (blank & has).nonzero().flatten()]


def test_the_second_call_reads_what_the_first_one_kept(all_of_them):
    again = emoji(("noto",))
    assert torch.equal(again.pictures["noto"], all_of_them.pictures["noto"]) and again.pictures.keys() == {"noto"}


def test_one_picture_is_the_same_as_among_all(all_of_them):
    for style in STYLES:
        there = all_of_them.has[style].nonzero().flatten()
        for i in there[:: len(there) // 5].tolist():
            one = emoji_picture(all_of_them.concepts[i].hexcode, style, 32)
            assert torch.equal(one, all_of_them.pictures[style][i])


def test_colours_that_a_concept_names(all_of_them):
    """A red heart is red in every style, a green apple green, a blue book blue."""
    index = {one.name: i for i, one in enumerate(all_of_them.concepts)}
    for name, channel in (("red heart", 0), ("green apple", 1), ("blue book", 2)):
        for style in STYLES:
            if all_of_them.has[style][index[name]]:
                picture = all_of_them.pictures[style][index[name]].float()
                inked = (picture < 250).any(0)
                assert picture[:, inked].mean(1).argmax() == channel, (name, style)


def test_a_concept_looks_most_like_itself_in_another_style(all_of_them):
    """Among 100 concepts the right one is the nearest far more often than by chance: the joins are right."""
    both = (all_of_them.has["twemoji"] & all_of_them.has["emojione-v1"]).nonzero().flatten()[::8][:100]
    pictures = [all_of_them.pictures[style][both].float() for style in ("twemoji", "emojione-v1")]
    small = [torch.nn.functional.avg_pool2d(255 - picture, 4).flatten(1) for picture in pictures]
    a, b = [torch.nn.functional.normalize(x - x.mean(0), dim=1) for x in small]
    found = (a @ b.T).argmax(1) == torch.arange(len(both))
    assert len(both) == 100 and found.float().mean() > 0.3  # by chance 0.01


def test_bad_input():
    with pytest.raises(ValueError, match=r"a style must be one of noto, twemoji, .*, got 'apple'"):
        emoji(("noto", "apple"))
    for size in (7, 513):
        with pytest.raises(ValueError, match=f"size must be between 8 and 512 pixels, got {size}"):
            emoji_picture("1F436", "noto", size)
    with pytest.raises(ValueError, match=r'hexcode must be the code points of a concept, as "1F436", got \'1F1E6\''):
        emoji_picture("1F1E6")
    with pytest.raises(ValueError, match=r"fxemoji has no drawing of 'water pistol' \(1F52B\): choose another style"):
        emoji_picture("1F52B", "fxemoji")


def test_missing_names_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    concepts.cache_clear()
    with pytest.raises(
        WeightsMissing, match=r"The names of emoji of emojibase-data are not in .*-m nondual.pretrained`"
    ):
        emoji(("noto",))
