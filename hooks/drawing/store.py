"""What was drawn, kept until something that decided it changes.

A drawing is found by a hash of its code and of what runs it: this Python, the packages installed beside it, the kind of
machine. With it are the hashes of the project's files that it imported or read: where one of them is another now, the
drawing is not taken. So a changed byte draws anew, in a figure's code, in the library or in a measurement.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path

from drawing import process
from drawing.process import Drawing

DAYS = 30  # what was not used for so long is deleted


class Store:
    """The drawings of one project; made anew for each build, for within a build no file changes.

    Args:
        folder: where they lie, one file a drawing; made when the first is kept.
        root: the root of the project.
    """

    def __init__(self, folder: Path, root: Path):
        self.folder, self.root = folder, root
        self._recipe = recipe() + Path(process.__file__).read_text(encoding="utf-8")
        self._hashes: dict[str, str | None] = {}

    def get(self, code: str) -> Drawing | None:
        """The drawing of this code, or None where there is none or it is out of date."""
        file = self._file(code)
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if any(self._hash(name) != was for name, was in kept["files"].items()):
            return None
        os.utime(file)
        return Drawing(kept["output"], tuple(kept["files"]), kept["seconds"])

    def put(self, code: str, drawing: Drawing) -> None:
        """Keep a drawing."""
        files = {name: self._hash(name) for name in drawing.files}
        text = json.dumps({"output": drawing.output, "files": files, "seconds": drawing.seconds}, ensure_ascii=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(code)
        part = file.with_suffix(f".{os.getpid()}")  # two builds may write at once: each puts a whole file in its place
        part.write_text(text, encoding="utf-8")
        part.replace(file)

    def forget(self) -> None:
        """Delete what was not used for DAYS days."""
        for file in self.folder.glob("*.json"):
            if file.stat().st_mtime < time.time() - DAYS * 86400:
                file.unlink(missing_ok=True)

    def _file(self, code: str) -> Path:
        return self.folder / (hashlib.sha256((self._recipe + code).encode()).hexdigest() + ".json")

    def _hash(self, name: str) -> str | None:
        if name not in self._hashes:
            self._hashes[name] = hash_of(self.root / name)
        return self._hashes[name]


def hash_of(file: Path) -> str | None:
    """The sha256 of a file, or None where there is none."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def recipe() -> str:
    """What runs the code: this Python, the kind of machine, and every installed package with its version."""
    packages = sorted(f"{found.name}=={found.version}" for found in importlib.metadata.distributions())
    return "\n".join([sys.version, platform.system(), platform.machine(), *packages, ""])
