"""Clip art: thousands of drawings, each with a title and keywords, drawn by volunteers, one author a drawing.

Source: Open Clip Art Library, release 0.18 (2005), as the Debian package openclipart-svg carries it. Licence: public
domain (each author's dedication); the package's copyright file is kept beside the drawings.

Of its 7,458 drawings (and 663 links to some of them), these are left out: icon themes, generated stars, patterns and
gradients, playing cards; those without a title or without keywords; those whose title names a collection ("AIGA Symbol
Signs" stands for 243 drawings: a title of several drawings is kept only where all words of it are in the name of the
file); copies of another one; files of more than a million bytes, with entities, or that refer to other files; and what
cannot be drawn. `Clipart.left_out` counts each. Titles and keywords are the authors': mostly English, here and there
Italian, French or Spanish.
"""

import hashlib
import json
import os
import re
from collections import Counter
from html import unescape
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

from nondual.data.svg import kept, renderer
from nondual.data.svg_process import Painter
from nondual.store import Package, members, read

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

OPENCLIPART = Package(
    name="openclipart-svg",
    version="0.18+dfsg-19",
    sha256="989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    size=24_919_068,
    root="",
    files={
        "data.tar.xz": "136709d211f46c88370097d8a613aeb1661707a8e3ed78d1ad9dc1274c18f40d",
        "usr/share/doc/openclipart-svg/copyright": "e7ecf716ff4c74a08679d7b7260757ccd01b85aeec625352d42212a500eec914",
    },
    holds="drawings",
    source="debian",
    pool="main/o/openclipart",
)

ROOT = "usr/share/openclipart/svg/"
FOLDERS_OUT = ("computer/icons/", "shapes/stars/", "special/", "recreation/games/cards/", "unsorted/duplicates/")
LARGEST = 1_000_000  # bytes of a file
VERSION = 4  # of how drawings are chosen and made here: it is part of the name of the file in which they are kept

_DC = "{http://purl.org/dc/elements/1.1/}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


class Drawing(NamedTuple):
    """What an author says of a drawing.

    Attributes:
        title: "Soft Blue Couch".
        keywords: in lower case, in the author's order.
        folder: where it lies in the collection, "buildings/furniture".
        file: the name of its file, which often ends in the author's name.
    """

    title: str
    keywords: tuple[str, ...]
    folder: str
    file: str


class Clipart(NamedTuple):
    """N drawings.

    Attributes:
        drawings: what is said of each, in the order of their files' names.
        pictures: (N, 3, size, size) uint8, RGB on white, each as large as fits.
        left_out: how many of the collection's files are not among them, by reason.
    """

    drawings: tuple[Drawing, ...]
    pictures: "Tensor"
    left_out: dict[str, int]


def clipart(size: int = 32) -> Clipart:
    """Every drawing that has a title and keywords of its own.

    The first call for a size draws them, in about a minute; later ones read what was kept.

    Args:
        size: height and width, in pixels.

    Raises:
        ValueError: the size is not between 8 and 256.
        WeightsMissing: the collection was not fetched yet; the message says how.
        ImportError: resvg-py or Pillow is not installed.
    """
    import torch

    if not 8 <= size <= 256:
        raise ValueError(f"size must be between 8 and 256 pixels, got {size}")
    key = hashlib.sha256(repr([OPENCLIPART.sha256, renderer(), size, VERSION]).encode()).hexdigest()[:16]
    arrays = kept(f"clipart-{size}-{key}", lambda: _drawn(size))
    said = json.loads(arrays["said"].tobytes())
    drawings = [Drawing(title, tuple(keywords), folder, file) for title, keywords, folder, file in said["drawings"]]
    return Clipart(tuple(drawings), torch.from_numpy(arrays["pictures"]), said["left_out"])


def _drawn(size: int) -> "dict[str, np.ndarray]":
    """The pictures, and as JSON what is said of them, for `kept`."""
    import numpy as np

    files = members(read(OPENCLIPART, "data.tar.xz"))
    left_out: Counter[str] = Counter()
    drawings: list[Drawing] = []
    pictures: list[bytes] = []
    with Painter(size) as painter:
        for drawing, svg in chosen(files, left_out):
            try:
                pictures.append(painter.draw(svg))
            except TimeoutError:
                left_out["takes too long"] += 1
            except ValueError:
                left_out["cannot be drawn, or is empty"] += 1
            else:
                drawings.append(drawing)
    said = json.dumps({"drawings": drawings, "left_out": left_out}).encode()
    stacked = np.frombuffer(b"".join(pictures), np.uint8).reshape(-1, size, size, 3).transpose(0, 3, 1, 2)
    return {"pictures": np.ascontiguousarray(stacked), "said": np.frombuffer(said, np.uint8)}


def chosen(files: dict[str, bytes], left_out: "Counter[str]") -> list[tuple[Drawing, str]]:
    """The drawings that can be used, with their SVG; counts the others by reason.

    Args:
        files: those of the package, by name.
        left_out: to be added to.
    """
    described: list[tuple[Drawing, bytes]] = []
    for name in sorted(files):
        if not (name.startswith(ROOT) and name.endswith(".svg")):
            continue
        folder, _, file = name.removeprefix(ROOT).rpartition("/")
        content = files[name]
        if f"{folder}/".startswith(FOLDERS_OUT):
            left_out["icons, stars, patterns, cards"] += 1
        elif len(content) > LARGEST:
            left_out["large"] += 1
        elif b"<!ENTITY" in content or refers(content):
            left_out["has entities, or refers to other files"] += 1
        elif (drawing := _described(content, folder, file)) is None:
            left_out["has no title or no keywords"] += 1
        else:
            described.append((drawing, content))
    titles = Counter(drawing.title for drawing, _ in described)
    found: list[tuple[Drawing, str]] = []
    seen: set[bytes] = set()
    for drawing, content in described:
        digest = hashlib.sha256(content).digest()
        if titles[drawing.title] > 1 and not _in_name(drawing):
            left_out["the title is a collection's"] += 1
        elif digest in seen:
            left_out["a copy"] += 1
        else:
            seen.add(digest)
            found.append((drawing, content.decode("utf-8", "replace")))
    return found


def refers(content: bytes) -> bool:
    """Whether an SVG draws a picture from another file or address; pictures within it ("data:") are its own."""
    links = re.findall(rb"""<(?:\w+:)?(?:image|use|feImage)\b[^>]*?href\s*=\s*["']\s*([^"']{0,8})""", content)
    return any(not link.startswith((b"#", b"data:")) for link in links)


def _described(content: bytes, folder: str, file: str) -> Drawing | None:
    """Title and keywords from an SVG's metadata (Dublin Core in RDF), or None where one is missing."""
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError:
        return None
    title = next((node.text or "" for node in root.iter(f"{_DC}title")), "")
    title = " ".join(
        re.sub(r"^\s*clip ?art by [^-]* - ", "", unescape(title), flags=re.IGNORECASE).replace("_", " ").split()
    )
    listed = [item.text or "" for subject in root.iter(f"{_DC}subject") for item in subject.iter(f"{_RDF}li")]
    keywords = dict.fromkeys(" ".join(word.lower().split()) for word in listed)
    keywords = tuple(word for word in keywords if word and word not in ("hash", "unsorted") and word[:2] != "0x")
    return Drawing(title, keywords, folder, os.path.basename(file)) if title and keywords else None


def _in_name(drawing: Drawing) -> bool:
    """Whether every word of the title, of three letters or digits or more, is part of the file's name."""
    name = re.sub("[^a-z0-9]", "", drawing.file.lower().removesuffix(".svg"))
    words = re.findall("[a-z0-9]{3,}", drawing.title.lower())
    return bool(words) and all(word in name for word in words)
