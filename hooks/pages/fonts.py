"""Cut the site's fonts to the characters that its pages use: together they shrink to a third.

The whole fonts stay in docs/assets; only the copies in the built site are cut. Their licence, the SIL Open Font
License, lets a changed font be passed on under another name than one that its makers reserved, so what is cut is named
anew inside; style sheets go on calling it by the name that they give it.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterable
from html import unescape
from io import BytesIO
from pathlib import Path

import fontTools
from fontTools import subset
from fontTools.ttLib import TTFont

ALWAYS = frozenset(map(chr, range(0x20, 0x7F)))  # what a reader may type into the search
RESERVED = "Source"
LEGAL = (0, 13, 14)  # the names of a font that are its copyright, its licence and the licence's address
DAYS = 30  # a stored font that was not used for so long is deleted
_TAG = re.compile(r"<[^>]*>")
_FORMULA = re.compile(r'<span class="katex-html"')
_SPAN = re.compile(r"<(/?)span\b[^>]*>")
_FRACTIONS = {"frac", "numr", "dnom"}  # no style sheet asks for these forms of figures


def cut(site: Path, store: Path | None = None) -> None:
    """Cut each font of a built site, the files themselves, to the characters in use.

    Args:
        site: the folder of the site.
        store: a folder where fonts that were cut before are found, and new ones are kept: to cut all takes seconds.
    """
    pages = [path.read_text(encoding="utf-8") for path in sorted(site.rglob("*.html"))]
    own = [path for kind in ("css", "js") for path in sorted((site / "assets" / kind).rglob("*." + kind))]
    words = ALWAYS.union(*map(unescape, pages), *(path.read_text(encoding="utf-8") for path in own))
    formulas = set().union(*map(characters_of_formulas, pages))
    for file in sorted((site / "assets").rglob("*.woff2")):
        if file.name.startswith("KaTeX_"):
            used = formulas
        else:  # the faces of other scripts follow those that hold all of ALWAYS
            used = words - ALWAYS if file.name.startswith("noto-") else words
        file.write_bytes(_stored(file.read_bytes(), used, store))
    if store:
        _forget(store)


def characters_of_formulas(page: str) -> set[str]:
    """What KaTeX's fonts set: the characters of each formula's HTML; its MathML is for a screen reader."""
    found: set[str] = set()
    for start in _FORMULA.finditer(page):
        depth = 0
        for span in _SPAN.finditer(page, start.start()):
            depth += -1 if span[1] else 1
            if not depth:
                found.update(unescape(_TAG.sub("", page[start.start() : span.end()])))
                break
    return found


def _stored(font: bytes, characters: Iterable[str], store: Path | None) -> bytes:
    """`shortened`, from the store where it is there."""
    with TTFont(BytesIO(font)) as whole:
        held = sorted(set(map(ord, characters)) & set(whole.getBestCmap()))
    if store is None:
        return shortened(font, held)
    recipe = Path(__file__).read_bytes() + fontTools.version.encode() + repr(held).encode()
    kept = store / f"{hashlib.sha256(font + recipe).hexdigest()[:32]}.woff2"
    if not kept.exists():
        store.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")  # two builds may write at once: each puts a whole file in its place
        part.write_bytes(shortened(font, held))
        part.replace(kept)
    os.utime(kept)
    return kept.read_bytes()


def _forget(store: Path) -> None:
    """Delete what was not used for DAYS days."""
    for file in store.glob("*.woff2"):
        if time.time() - file.stat().st_mtime > DAYS * 86400:
            file.unlink(missing_ok=True)


def shortened(font: bytes, codes: Iterable[int]) -> bytes:
    """A font with the glyphs of these characters alone, as WOFF2, under a name that is not reserved.

    Args:
        font: the file of a font.
        codes: the characters as Unicode code points; those that it does not hold are passed over.
    """
    options = subset.Options()
    options.flavor = "woff2"
    options.name_IDs = [*options.name_IDs, *LEGAL]
    options.hinting = False  # current browsers draw text without it
    options.layout_features = [name for name in options.layout_features if name not in _FRACTIONS]
    with TTFont(BytesIO(font), recalcTimestamp=False) as whole:
        cutter = subset.Subsetter(options)
        cutter.populate(unicodes=codes)
        cutter.subset(whole)
        for record in whole["name"].names:
            if record.nameID not in LEGAL:
                record.string = record.toUnicode().replace(RESERVED, "Nondual")
        out = BytesIO()
        subset.save_font(whole, out, options)
        return out.getvalue()
