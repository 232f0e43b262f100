"""Where a page is, as seen from another, each in a folder of its own, as in `essay/mamba/`; and where its source is."""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

Link = Callable[[str], str | None]  # from a page's path under docs, maybe with an #anchor, to its address

REPOSITORY = "https://github.com/nondual/nondual"


def linker(uri: str, docs: Path) -> Link:
    """A function from a page's path under docs to its address as seen from the page `uri`, or None if there is none."""

    def link(target: str) -> str | None:
        path, hash_, anchor = target.partition("#")
        if not (docs / path).is_file():
            return None
        return posixpath.relpath(folder_of(path) or ".", folder_of(uri) or ".") + "/" + hash_ + anchor

    return link


def folder_of(uri: str) -> str:
    """The folder of a page in the site: `essay/mamba.md` gives `essay/mamba`, `index.md` an empty name."""
    stem = uri.rpartition(".")[0]
    return posixpath.dirname(stem) if posixpath.basename(stem) in ("index", "README") else stem


# --- the repository ------------------------------------------------------------------------------------------------


def source(file: str, first: int | None = None, last: int | None = None) -> str:
    """The address of a file in the repository, or of one of its lines, or of several."""
    lines = f"#L{first}" + (f"-L{last}" if last else "") if first else ""
    return f"{REPOSITORY}/blob/main/{file}{lines}"


_ELSEWHERE = {  # pages whose text is in another file than docs has under their name
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "glossary.md": "docs/glossary.yml",
}
_GENERATED = ("reference/", "notebooks/", "ledger.md", "map.md")


def edit(uri: str) -> str | None:
    """Where a reader can mend the page `uri`, or None where the page is made from other files."""
    if uri.startswith(_GENERATED):
        return None
    return f"{REPOSITORY}/edit/main/{_ELSEWHERE.get(uri, f'docs/{uri}')}"


_NAMED = re.compile(
    r"(?P<linked><(?P<tag>a|pre|summary)\b.*?</(?P=tag)>)|<code>(?P<file>(?:src|tests|benchmarks|hooks)/[\w/.-]+\.(?:py|toml))"
    r"(?:::(?P<test>[\w:]+))?</code>",
    re.S,
)


def to_source(html: str, root: Path) -> str:
    """Lead from `tests/test_x.py` or `tests/test_x.py::test_y` in the text to it in the repository."""

    def link(m: re.Match) -> str:
        if m["linked"] or not (root / m["file"]).is_file():
            return m[0]
        line = line_of(root / m["file"], m["test"]) if m["test"] else None
        return f'<a href="{source(m["file"], line)}">{m[0]}</a>'

    return _NAMED.sub(link, html)


def line_of(file: Path, test: str) -> int | None:
    """The line at which a test, or a method `Class::test`, is defined, or None."""
    define = re.compile(rf"\s*(?:async )?def {re.escape(test.rpartition('::')[2])}\(")
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((i for i, line in enumerate(lines, 1) if define.match(line)), None)
