"""One style sheet in place of those that every page loads, less the rules that no page of the site can use.

A browser paints nothing until it has read every style sheet of a page. The theme's are made for all that a theme may
show: a third of their rules name classes that occur neither in a page nor in a script of this site.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

FOLDER = Path("assets/css")  # what the joined sheets load, such as fonts, is named as seen from here
GROUPS = ("@media", "@supports", "@container", "@layer")  # rules that hold rules
_LINK = re.compile(r'<link rel="stylesheet" href="(?P<root>[^"]*?)(?P<path>assets/[^"]+\.css)">')
_WORD = re.compile(r"[\w-]+")
_TOKEN = re.compile(
    r"/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|url\([^)\"']*\)|\\.|[{}();,\[\]]|[^{}();,\[\]\"'/\\u]+|.", re.S
)
_BRACKETS = re.compile(r"\[[^\]]*\]|\([^()]*\)")
_NAME = re.compile(r"[.#]((?:[\w-]|\\.)+)")
_VARIABLE = re.compile(
    r"(?<![\w-])(--[\w-]+)\s*:((?:\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|url\([^)\"']*\)|[^;{}\"'])*);?"
)
_EMPTY = re.compile(r"^[^{}@\n]+\{\s*\}\n", re.M)
_USE = re.compile(r"var\(\s*(--[\w-]+)")
_RELATIVE = re.compile(r"url\(\s*([\"']?)(?!data:|#|/|\w+:)([^)\"']+)\1\s*\)")


class Words:
    """The words of pages and scripts, among which are the names of all their classes and ids.

    A script may put a name together, as in `tab--${side}`: a name that begins with a word of a script that ends in a
    hyphen is among them too.
    """

    def __init__(self, pages: Iterable[str], scripts: Iterable[str]):
        in_scripts = _words_of(scripts)
        self.whole = in_scripts | _words_of(pages)
        self.begun = tuple(word for word in in_scripts if word.endswith("-") and word.strip("-"))

    def __contains__(self, name: str) -> bool:
        return name in self.whole or name.startswith(self.begun)


def _words_of(texts: Iterable[str]) -> frozenset[str]:
    return frozenset(word for text in texts for word in _WORD.findall(text))


def join(site: Path) -> None:
    """Put one sheet in place of those that all pages of a built site load first.

    Args:
        site: the folder of the site; its pages are changed to load the joined sheet.

    Raises:
        ValueError: If pages load style sheets of assets/ and have none in common, or a sheet cannot be read.
    """
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(site.rglob("*.html"))}
    loaded = [sheets for page in pages.values() if (sheets := [link["path"] for link in _LINK.finditer(page)])]
    if not loaded:  # a theme whose style sheets stand elsewhere
        return
    common = [first for first, *others in zip(*loaded, strict=False) if set(others) <= {first}]
    if not common:
        raise ValueError("all pages must load the same style sheet first, got pages that do not.")
    sheets = {path: (site / path).read_text(encoding="utf-8") for path in sorted(set().union(*loaded))}
    scripts = [path.read_text(encoding="utf-8") for path in sorted((site / "assets").rglob("*.js"))]
    words = Words([*pages.values(), *(text for path, text in sheets.items() if path not in common)], scripts)
    joined = shortened("\n".join(moved(sheets[path], Path(path).parent) for path in common), words)
    name = FOLDER / f"site.{hashlib.sha256(joined.encode()).hexdigest()[:8]}.css"
    for path in common:
        (site / path).unlink()
    (site / FOLDER).mkdir(parents=True, exist_ok=True)
    (site / name).write_text(joined, encoding="utf-8")
    for path, page in pages.items():
        path.write_text(relinked(page, common, name.as_posix()), encoding="utf-8")


def relinked(page: str, common: list[str], name: str) -> str:
    """The page with one link, to `name`, in place of its links to the sheets `common`."""

    def link(match: re.Match) -> str:
        if match["path"] not in common:
            return match[0]
        return f'<link rel="stylesheet" href="{match["root"]}{name}">' if match["path"] == common[0] else ""

    return _LINK.sub(link, page)


def moved(sheet: str, folder: Path) -> str:
    """The sheet, which stood in `folder`, with what it loads named as seen from FOLDER."""
    return _RELATIVE.sub(lambda m: f"url({m[1]}{os.path.relpath(folder / m[2], FOLDER)}{m[1]})", sheet)


def shortened(sheet: str, words: Words) -> str:
    """The sheet without comments, without rules that cannot apply, and without variables that nothing uses.

    Args:
        sheet: its text.
        words: those of the pages, scripts and other sheets. A rule that names a class or an id that is not among them
            is left out, and so is a variable that neither they nor the sheet's other rules name.

    Raises:
        ValueError: If its brackets do not match.
    """
    before, short = "", "".join(_rules(sheet, words))
    while before != short:  # what a variable that is left out used may now be without use
        before, used = short, frozenset(_USE.findall(short))
        short = _VARIABLE.sub(partial(_if_used, used, words), short)
    return _EMPTY.sub("", short)


def _if_used(used: frozenset[str], words: Words, variable: re.Match) -> str:
    return variable[0] if variable[1] in used or variable[1] in words else ""


def _rules(sheet: str, words: Words) -> Iterator[str]:
    """Each rule that may apply, a group of rules shortened inside."""
    for head, body in _blocks(sheet):
        if body is None:
            yield head + ";"
        elif head.startswith(GROUPS):
            if inside := "".join(_rules(body, words)):
                yield f"{head}{{{inside}}}\n"
        elif head.startswith("@"):
            yield f"{head}{{{body}}}\n"
        elif kept := ",".join(one for one in _alternatives(head) if _may_apply(one, words)):
            yield f"{kept}{{{body}}}\n"


def _blocks(sheet: str) -> Iterator[tuple[str, str | None]]:
    """What stands outermost in a sheet: heads with their bodies, and statements, whose body is None."""
    head, body, depth = [], [], 0
    for token in _TOKEN.findall(sheet):
        if token.startswith("/*"):
            continue
        if token == "{":
            depth += 1
            if depth == 1:
                continue
        elif token == "}":
            depth -= 1
            if depth < 0:
                break
            if depth == 0:
                yield _spaced(head), _spaced(body)
                head, body = [], []
                continue
        elif token == ";" and depth == 0:
            yield _spaced(head), None
            head = []
            continue
        (body if depth else head).append(token)
    if depth or _spaced(head):
        raise ValueError(
            f"a style sheet's brackets must match, got {(_spaced(head) or _spaced(body))[:60]!r} at its end."
        )


def _spaced(tokens: list[str]) -> str:
    """The tokens as one text, any space outside of strings a single one."""
    return "".join(t if t[0] in "\"'" else re.sub(r"\s+", " ", t) for t in tokens).strip()


def _alternatives(head: str) -> list[str]:
    """The selectors of a rule, split at its outermost commas."""
    found, depth = [""], 0
    for token in _TOKEN.findall(head):
        depth += (token in "([") - (token in ")]")
        if token == "," and not depth:
            found.append("")
        else:
            found[-1] += token
    return [one.strip() for one in found]


def _may_apply(selector: str, words: Words) -> bool:
    """Whether each class and id that the selector demands occurs; what is in brackets, `:not(.x)`, does not count."""
    before = None
    while before != selector:
        before, selector = selector, _BRACKETS.sub("", selector)
    return all("\\" in name or name in words for name in _NAME.findall(selector))
