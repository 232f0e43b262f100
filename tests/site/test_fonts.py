"""The fonts of the built site hold what its pages use, and little more."""

import re
import unicodedata
from html import unescape
from io import BytesIO

import pytest
from documents import ROOT, SITE
from fontTools.ttLib import TTFont
from pages import fonts, mathematics

SERIF = ROOT / "docs/assets/fonts/source-serif-4-latin-400-normal.woff2"
DEVANAGARI = ROOT / "docs/assets/fonts/noto-serif-devanagari-devanagari-400-normal.woff2"


def held(font: bytes) -> set[str]:
    with TTFont(BytesIO(font)) as opened:
        return set(map(chr, opened.getBestCmap()))


def test_a_font_is_cut_to_the_characters_asked_for():
    cut = fonts.shortened(SERIF.read_bytes(), map(ord, "Cat ख"))
    assert held(cut) == set("Cat ") and len(cut) < SERIF.stat().st_size / 4


def test_a_cut_font_keeps_its_licence_and_leaves_the_reserved_name():
    with TTFont(BytesIO(fonts.shortened(SERIF.read_bytes(), [65]))) as cut:
        names = {record.nameID: record.toUnicode() for record in cut["name"].names}
    assert "Reserved Font Name" in names[0] and "OFL" in names[14]
    assert not [text for number, text in names.items() if number not in fonts.LEGAL and "Source" in text]
    assert names[1] == "Nondual Serif 4"


def test_the_forms_in_which_letters_join_are_kept():
    """प्र and क्ष are each one sign, which no character of its own stands for."""
    with TTFont(BytesIO(fonts.shortened(DEVANAGARI.read_bytes(), map(ord, "प्रक्ष")))) as cut:
        assert len(cut.getGlyphOrder()) > len(cut.getBestCmap()) + 2 and "GSUB" in cut


def test_only_what_is_seen_of_a_formula_counts():
    page = f"<p>plain {mathematics.typeset_formula(chr(92) + 'mathbb{R} < 1', False)} words</p>"
    assert fonts.characters_of_formulas(page) == set("R<1")


def test_a_site_is_cut_with_and_without_a_store(tmp_path):
    pages = '<title>आ</title><p title="&eacute;">Ab {}</p>'.format(mathematics.typeset_formula("x", False))
    for name, store in (("plain", None), ("first", tmp_path / "store"), ("second", tmp_path / "store")):
        site = tmp_path / name
        (site / "assets" / "fonts").mkdir(parents=True)
        (site / "index.html").write_text(pages, encoding="utf-8")
        for file in (SERIF, DEVANAGARI, ROOT / "docs/assets/katex/fonts/KaTeX_Main-Regular.woff2"):
            (site / "assets" / "fonts" / file.name).write_bytes(file.read_bytes())
        fonts.cut(site, store)
    cut = {file.name: file.read_bytes() for file in (tmp_path / "plain").rglob("*.woff2")}
    assert cut == {file.name: file.read_bytes() for file in (tmp_path / "second").rglob("*.woff2")}
    assert held(cut[SERIF.name]) == fonts.ALWAYS | {"é"}
    assert held(cut[DEVANAGARI.name]) == {"आ"}
    assert held(cut["KaTeX_Main-Regular.woff2"]) == {"x"}
    assert len(list((tmp_path / "store").iterdir())) == 3


def test_the_store_forgets_what_is_not_used(tmp_path):
    import os

    (tmp_path / "assets").mkdir()
    old, new = tmp_path / "old.woff2", tmp_path / "new.woff2"
    old.touch(), new.touch()
    os.utime(old, (0, 0))
    fonts.cut(tmp_path, tmp_path)
    assert new.exists() and not old.exists()


@pytest.mark.parametrize("kind, most", [("fonts", 200), ("katex", 200)])
def test_the_fonts_of_the_site_are_small(pages, kind, most):
    sizes = {file.name: file.stat().st_size / 1000 for file in (SITE / "assets" / kind).rglob("*.woff2")}
    assert sizes and sum(sizes.values()) < most, sizes


def test_the_sites_fonts_hold_every_letter_of_its_pages_that_they_held(pages):
    """Each slice of a face is cut by the same words, so one face stands for all."""
    words = set().union(*(re.sub("<[^>]*>", "", page.text) for page in pages.values()))
    for file in (ROOT / "docs/assets/fonts").glob("*.woff2"):
        wanted = held(file.read_bytes()) & words
        if file.name.startswith("noto-"):
            wanted -= fonts.ALWAYS
        assert wanted <= held((SITE / "assets/fonts" / file.name).read_bytes()), file.name


def test_every_letter_of_another_script_has_a_face(pages):
    """A reader without fonts for Chinese, Tibetan or Devanagari would see a gap."""
    faces = set().union(*(held(file.read_bytes()) for file in (ROOT / "docs/assets/fonts").glob("*.woff2")))
    without = {}
    for name, page in pages.items():
        letters = {c for c in re.sub("<[^>]*>", "", unescape(page.text)) if c.isalpha() and ord(c) > 0x52F}
        if gaps := {c for c in letters - faces if not unicodedata.name(c).startswith("MATHEMATICAL")}:
            without[name] = sorted(gaps)
    assert not without
