"""Ask early for the faces that the first screen of a page is set in.

Only when it lays out a page does a browser learn which faces of a style sheet the page needs, and then it paints at
once. A face that comes later breaks some lines elsewhere, although what stood in for it was as wide on average, and
what is being read moves. A face that the page's head names is there in time, unless the network is slow. It would be
fetched in any case, so nothing is fetched in vain.
"""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import NamedTuple

SCREEN = 2000  # about the characters that a desk's first screen shows
SERIF, SANS, MONO = "Source Serif 4", "Source Sans 3", "Source Code Pro"
OTHERS = ("Noto Serif Devanagari", "Noto Serif JP", "Noto Serif Tibetan")  # for the scripts that those do not have

# How shell.css sets elements, and the boxes that it names by their class.
_SANS = {"h1", "h2", "h3", "h4", "h5", "h6", "table", "figcaption", "summary", "admonition-title", "card"}
_MONO = {"code", "kbd", "pre"}
_BOLD = {"h1", "h2", "h3", "h4", "h5", "h6", "strong", "b", "th", "dt", "summary", "admonition-title"}
_ITALIC = {"em", "i", "cite", "dfn", "var"}
_PASSED_OVER = {"svg", "script", "style", "template", "katex"}
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}

_FACE = re.compile(r"@font-face\s*{([^}]*)}")
_PRELOAD = re.compile(r'<link rel="preload" as="font"[^>]*href="(?P<root>[^"]*?)assets/fonts/(?P<file>[^"]+)">')


class Face(NamedTuple):
    """A file that holds some characters of a family, in one style and weight."""

    family: str
    style: str
    weight: str
    file: str
    ranges: tuple[range, ...]

    def __contains__(self, character: object) -> bool:
        return isinstance(character, str) and any(ord(character) in one for one in self.ranges)


class Letter(NamedTuple):
    """A character as a page shows it."""

    character: str
    family: str
    style: str
    weight: str


def ask_early(site: Path) -> None:
    """Let the pages of a built site ask for the faces of their first screen beside the one that they all ask for.

    Args:
        site: the folder of the site, whose style sheets are not joined yet.
    """
    sheet = site / "assets" / "css" / "fonts.css"
    if not sheet.exists():  # a theme without fonts of its own
        return
    faces = list(faces_of(sheet.read_text(encoding="utf-8")))
    for path in sorted(site.rglob("*.html")):
        page = path.read_text(encoding="utf-8")
        if found := _PRELOAD.search(page):
            more = [face for face in needed(page, faces) if face.file != found["file"]]
            links = found[0] + "".join(_link(found[0].replace(found["file"], face.file), face) for face in more)
            path.write_text(page.replace(found[0], links, 1), encoding="utf-8")


def _link(link: str, face: Face) -> str:
    """The faces of running text come first: the lines that the others change are few."""
    return link if face.family == SERIF else link.replace(">", ' fetchpriority="low">')


def faces_of(sheet: str) -> Iterator[Face]:
    """The faces of a style sheet that say which characters they hold."""
    for body in _FACE.findall(sheet):
        said = {name.strip(): value.strip() for name, _, value in (one.partition(":") for one in body.split(";"))}
        if "unicode-range" in said:
            ends = (one.strip().removeprefix("U+").split("-") for one in said["unicode-range"].split(","))
            file = re.sub(r".*fonts/([^)\"']+).*", r"\1", said["src"])
            ranges = tuple(range(int(end[0], 16), int(end[-1], 16) + 1) for end in ends)
            yield Face(said["font-family"].strip("\"'"), said["font-style"], said["font-weight"], file, ranges)


def needed(page: str, faces: list[Face]) -> list[Face]:
    """The faces that the first screen of a page is set in: those of running text first, each kind as it is met."""
    found = dict.fromkeys(face for letter in letters(page) for face in _set_in(letter, faces))
    return sorted(found, key=lambda face: face.family != SERIF)


def _set_in(letter: Letter, faces: list[Face]) -> Iterator[Face]:
    own = (face for face in faces if face[:3] == letter[1:])
    other = (face for family in OTHERS for face in faces if face.family == family)
    yield from islice((face for few in (own, other) for face in few if letter.character in face), 1)


def letters(page: str, most: int = SCREEN) -> list[Letter]:
    """The different characters of a page's first screen, as they are met: the frame's, then those of its article."""
    reader = _Reader(most)
    for start in range(page.find("<article"), len(page), 8192):
        if reader.left > 0:
            reader.feed(page[start : start + 8192])
    return list(dict.fromkeys(reader.letters))


class _Reader(HTMLParser):
    """Reads the beginning of the article of a page."""

    def __init__(self, most: int):
        super().__init__(convert_charrefs=True)
        self.left = most
        self.open: list[tuple[str, set[str]]] = []  # from the article on, each element with its name and classes
        self.letters = [Letter("a", SANS, "normal", weight) for weight in ("400", "600")]  # the page's frame

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if (tag == "article" or self.open) and tag not in _VOID:
            names = {tag, *(given.get("class") or "").split()}
            self.open.append((tag, names | {"folded"} if tag == "details" and "open" not in given else names))

    def handle_endtag(self, tag):
        while self.open and tag in [name for name, _ in self.open]:  # ends those left open within it, too
            if self.open.pop()[0] == tag:
                break

    def handle_data(self, data):
        names = set().union(*(names for _, names in self.open))
        if self.left <= 0 or not self.open or names & _PASSED_OVER or ("folded" in names and "summary" not in names):
            return
        family = MONO if names & _MONO else SANS if names & _SANS else SERIF
        style = "italic" if names & _ITALIC else "normal"
        weight = "600" if names & _BOLD else "400"
        text = " ".join(data.split())[: self.left]
        self.left -= len(text)
        self.letters += [Letter(character, family, style, weight) for character in text if character != " "]
