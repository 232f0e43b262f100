"""Where a page is, as seen from another: each has a folder of its own, as in `essay/mamba/`."""

import posixpath
from collections.abc import Callable
from pathlib import Path

Link = Callable[[str], str | None]  # from a page's path under docs, maybe with an #anchor, to its address


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
