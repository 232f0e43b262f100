"""Clip art: which drawings are taken and why the others are not, and that a drawing and its title belong together."""

import sys
from collections import Counter

import pytest
import torch

from nondual.data import OPENCLIPART, Clipart, clipart, svg
from nondual.data.clipart import ROOT, Drawing, chosen, refers
from nondual.store import WeightsMissing, members, read

RDF = 'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:dc="http://purl.org/dc/elements/1.1/"'


def page(title: str, *keywords: str, body: str = '<rect width="4" height="4" fill="#00f"/>') -> bytes:
    """An SVG with a title and keywords, as Inkscape writes them."""
    words = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9" {RDF}><metadata><rdf:RDF><dc:title>{title}'
        f"</dc:title><dc:subject><rdf:Bag>{words}</rdf:Bag></dc:subject></rdf:RDF></metadata>{body}</svg>"
    ).encode()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return members(read(OPENCLIPART, "data.tar.xz"))


def test_which_are_taken_by_hand():
    square = '<rect width="4" height="4"/>'
    made = {
        "animals/cat_ann_01.svg": page("Cat", "Animal", "unsorted", "0xa1"),
        "animals/cat_bob_02.svg": page("Cat", "animal", body=square),
        "animals/dog.svg": page("Clipart by Ann Other - small_dog", "animal"),
        "animals/cow.svg": page("Farm", "cow"),
        "animals/hen.svg": page("Farm", "hen"),
        "animals/copy_of_a_cat.svg": page("Cat", "animal", body=square),
        "animals/untitled.svg": page("", "animal"),
        "animals/without.svg": page("No keywords", "hash"),
        "animals/broken.svg": b"<svg",
        "animals/big.svg": page("Big", "big", body="<!--" + "x" * 1_000_000 + "-->"),
        "animals/bomb.svg": b'<!DOCTYPE svg [<!ENTITY a "aaaa">]>' + page("Bomb", "bomb"),
        "animals/far.svg": page("Far", "far", body='<image xlink:href="http://host/x.png"/>'),
        "computer/icons/x.svg": page("Icon", "icon"),
        "shapes/stars/star.svg": page("Star", "star"),
    }
    left_out: Counter[str] = Counter()
    found = chosen({ROOT + name: content for name, content in made.items()} | {"usr/doc": b""}, left_out)
    assert [drawing for drawing, _ in found] == [
        Drawing("Cat", ("animal",), "animals", "cat_ann_01.svg"),
        Drawing("Cat", ("animal",), "animals", "cat_bob_02.svg"),
        Drawing("small dog", ("animal",), "animals", "dog.svg"),
    ]
    assert left_out == {
        "icons, stars, patterns, cards": 2,
        "large": 1,
        "has entities, or refers to other files": 2,
        "has no title or no keywords": 3,
        "the title is a collection's": 2,
        "a copy": 1,
    }


@pytest.mark.parametrize(
    "body, does",
    [
        (b'<image xlink:href="data:image/png;base64,AA"/>', False),
        (b"<use xlink:href='#a'/>", False),
        (b'<a xlink:href="http://host"><path/></a>', False),
        (b'<image width="1"\n xlink:href="file.png"/>', True),
        (b'<svg:image href="http://host/x.png"/>', True),
        (b'<use xlink:href="other.svg#a"/>', True),
        (b'<feImage href="/etc/passwd"/>', True),
    ],
)
def test_what_refers_to_another_file(body, does):
    assert refers(body) is does


def test_what_is_found_in_the_collection(files):
    left_out: Counter[str] = Counter()
    found = [drawing for drawing, _ in chosen(files, left_out)]
    assert len(found) == 2791 and len(found) + left_out.total() == 7458
    assert len({drawing.title for drawing in found}) == 2361
    assert all(drawing.title and drawing.keywords and drawing.folder for drawing in found)
    couch = next(drawing for drawing in found if drawing.title == "Soft Blue Couch")
    assert couch == ("Soft Blue Couch", ("furniture",), "buildings/furniture", "soft_blue_couch_jonadab_01.svg")


@pytest.fixture
def few(monkeypatch, tmp_path, files) -> Clipart:
    """The collection with one folder only, drawn into an empty cache."""
    module = sys.modules["nondual.data.clipart"]  # the name in the package is the function's
    fruit = {name: content for name, content in files.items() if name.startswith(f"{ROOT}food/fruit/")}
    monkeypatch.setattr(module, "members", lambda data: fruit)
    monkeypatch.setattr(svg, "cache_folder", lambda: tmp_path)
    return clipart(16)


def test_drawings_and_titles_belong_together(few):
    n = len(few.drawings)
    assert n > 30 and few.pictures.shape == (n, 3, 16, 16) and few.pictures.dtype == torch.uint8
    assert few.left_out.get("takes too long", 0) == 0
    inked = few.pictures.amin((1, 2, 3)) < 250
    assert inked.all()  # no picture is blank
    touches = (few.pictures < 250).any(1)
    assert (touches[:, [0, -1]].any((1, 2)) | touches[:, :, [0, -1]].any((1, 2))).all()  # each is as large as fits
    lemons = [i for i, drawing in enumerate(few.drawings) if "lemon" in drawing.title.lower()]
    assert lemons
    again = clipart(16)  # from what was kept
    assert again.drawings == few.drawings and torch.equal(again.pictures, few.pictures)
    assert again.left_out == few.left_out and isinstance(again.drawings[0], Drawing)


def test_bad_input_and_a_missing_collection(monkeypatch, tmp_path):
    for size in (7, 257):
        with pytest.raises(ValueError, match=f"size must be between 8 and 256 pixels, got {size}"):
            clipart(size)
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"The drawings of openclipart-svg are not in .*-m nondual.pretrained`"):
        clipart()


def test_the_dedication_to_the_public_domain_came_along():
    said = (OPENCLIPART.folder / "usr/share/doc/openclipart-svg/copyright").read_text()
    assert "Public Domain Dedication" in said
