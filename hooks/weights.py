"""Fetch the weights and texts that the pages read, and no others, and say before that how much is to be downloaded.

python hooks/weights.py               what the build runs: figures and notebooks
python hooks/weights.py --snippets    and what the snippets read
"""

import ast
import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from snippets.reading import ROOT, cells, fences, notebooks, pages

from nondual import data, pretrained
from nondual.store import Package, command, status


def main(arguments: list[str]) -> int:
    kinds = {"figure", "snippet"} if "--snippets" in arguments else {"figure"}
    packages = pretrained.PACKAGES | data.PACKAGES
    names = read_by(codes(ROOT, kinds), packages)
    print(said(names, packages), flush=True)
    return command.main(packages, names) if names else 0


def codes(root: Path, kinds: set[str]) -> Iterator[str]:
    """The code of every fence of these kinds, and of every notebook's cell."""
    for page in pages(root):
        yield from (fence.code for fence in fences(page) if fence.kind in kinds)
    for notebook in notebooks(root):
        yield from (code for _, code in cells(notebook))


def read_by(codes: Iterable[str], packages: Mapping[str, Package]) -> list[str]:
    """The packages that the code reads: each by a function or module of its name, or of one that begins so.

    "emoji_picture" reads what "emoji" does, and the package "emoji/noto" is a part of that.
    """
    imported: set[str] = set()
    for code in codes:
        with contextlib.suppress(SyntaxError):  # what runs the code says where
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nondual"):
                    imported |= {alias.name for alias in node.names} | set((node.module or "").split(".")[2:])
    readers = {name: name.split("/")[0] for name in packages}
    return [
        name
        for name, reader in readers.items()
        if any(known == reader or known.startswith(f"{reader}_") for known in imported)
    ]


def said(names: list[str], packages: Mapping[str, Package]) -> str:
    """'The pages read minilm (46 MB): 46 MB to download.'"""
    sizes = {name: (packages[name].size or 0) / 1e6 for name in names}
    needed = {packages[name].part: name for name in names if status(packages[name]) != "complete"}  # each once
    missing = sum(sizes[name] for name in needed.values())
    listed = ", ".join(f"{name} ({size:.0f} MB)" for name, size in sizes.items())
    return f"The pages read {listed or 'no weights'}: {f'{missing:.0f} MB' if missing else 'nothing'} to download."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
