"""Figures as a page carries them: SVG without what nobody sees, and large data in a file of its own.

A browser reads a page's drawings, and the numbers of its interactive figures, before it paints the first word.
"""

import base64
import io
import re
from functools import cache

from PIL import Image

LARGEST = 20_000  # characters of data that stay in the page
_SVG = re.compile(r'<svg viewBox="[^>]*xmlns:xlink="[^>]*>.*?</svg>', re.S)
_TAG = re.compile(r"<(?P<end>/?)(?P<name>[A-Za-z]+)(?P<given>[^>]*?)(?P<closed>/?)>")
_PATH = re.compile(r'(?<= d=")[^"]*')
_COMMAND = re.compile(r"[A-Za-z][^A-Za-z]*")
_ZEROS = re.compile(r"(?<=\d)\.0+(?!\d)|(?<=\.[1-9])0+(?!\d)")
_UNTURNED = re.compile(r' transform="rotate\(-?0(?:\.0*)? [^)"]*\)"')
_FAMILY = re.compile(r'(?<=[";])(\s*)font-family: [^;"]*;?\s*')
_BETWEEN = re.compile(r"(?<=>)\s+(?=</?(?:clipPath|defs|g|image|path|rect|svg|text|use)\b)(?!</text)")
_RASTER = re.compile(r"data:image/png;base64,\s*(?P<data>[A-Za-z0-9+/=\s]{800,})")
_COLOURS, _QUALITY = 300, 72  # a picture of more colours than a colour map has may lose a little
_UNSEEN = re.compile(r' d="[^"]*" style="fill: none"')
_DATA = re.compile(
    r'(?P<opening><figure class="drawn[^>]* id="(?P<name>[^"]+)" data-live="\w+")>(?P<before>(?:(?!</figure>).)*?)'
    r'(?P<whole><script type="application/json" class="data">(?P<data>[^<]*)</script>)',
    re.S,
)


def lighter(html: str) -> str:
    """The page with its drawings in fewer characters and elements; they look the same.

    A group without attributes, an empty list of definitions, a path with neither line nor ground, and a turn by nothing
    have no effect; the face of words in a figure is for the page's style sheet to say. Pictures inside a drawing become
    WebP where that is smaller: without loss, or as photographs are kept, by the number of their colours.
    """
    return _SVG.sub(lambda drawing: _RASTER.sub(lambda m: _smaller(m[0]), _lighter(drawing[0])), html)


@cache
def _smaller(png: str) -> str:
    """A picture, as a data address, in WebP; as it was if that is no smaller."""
    picture = Image.open(io.BytesIO(base64.b64decode(_RASTER.fullmatch(png)["data"])))
    file, photograph = io.BytesIO(), picture.convert("RGB").getcolors(_COLOURS) is None
    picture.save(file, "WEBP", quality=_QUALITY if photograph else 100, lossless=not photograph, method=6)
    webp = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return webp if len(webp) < len(png) else png


def _lighter(svg: str) -> str:
    kept: list[str] = []  # of each group that is open, the attributes
    parts: list[str] = []
    at = 0
    for tag in _TAG.finditer(svg):
        parts.append(svg[at : tag.start()])
        at = tag.end()
        if tag["name"] == "g" and not tag["closed"]:
            given = kept.pop() if tag["end"] else tag["given"]
            if not tag["end"]:
                kept.append(given)
            if not given.strip():
                continue
        elif tag["name"] == "path" and _UNSEEN.fullmatch(tag["given"]) and "stroke" not in "".join(kept):
            continue
        parts.append(_shorter(tag))
    svg = _BETWEEN.sub("", "".join([*parts, svg[at:]]))
    return svg.replace("<defs></defs>", "")


def _shorter(tag: re.Match) -> str:
    """The tag with shorter numbers in its path, without a turn by nothing and, if it is text, without its face."""
    whole = _UNTURNED.sub("", tag[0])
    if tag["name"] == "text":
        return _FAMILY.sub(r"\1", whole)
    return _PATH.sub(lambda path: _path(path[0]), whole) if tag["name"] == "path" else whole


def _path(path: str) -> str:
    """A path without needless zeros and spaces; after a point to begin at, or a line, a line needs no letter."""
    short, last = "", ""
    for command in _COMMAND.findall(_ZEROS.sub("", path)):
        letter, numbers = command[0], " ".join(command[1:].split())
        implied = letter == "L" and last in ("L", "M")
        short += (" " if implied else letter) + numbers
        last = letter
    return short


def with_data_apart(html: str) -> tuple[str, dict[str, str]]:
    """A page whose large data are files, which the figures' script fetches: {"figures/NAME.json": the data}."""
    files: dict[str, str] = {}

    def move(m: re.Match) -> str:
        if len(m["data"]) <= LARGEST:
            return m[0]
        file = f"figures/{m['name']}.json"
        files[file] = m["data"]
        return f'{m["opening"]} data-from="{file}">{m["before"]}'

    return _DATA.sub(move, html), files
