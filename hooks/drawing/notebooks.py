"""Where the outputs of executed notebooks are kept: a folder named by a hash of all that they could depend on.

The notebooks' plugin looks there for a notebook of the same bytes. A notebook is not asked which files it read, as a
figure is; whatever changes in the library or in a measurement, all notebooks are executed again.
"""

import hashlib
import shutil
from pathlib import Path

from drawing.store import hash_of, recipe

STORE = Path(".cache", "notebooks")  # under the root of the project, and not in git


def folder(root: Path) -> Path:
    """The folder for the project as it is. Those for the project as it was are deleted."""
    files = [file for place in ("src", "docs/measured") for file in sorted((root / place).rglob("*"))]
    found = hashlib.sha256(recipe().encode())
    for file in files:
        if file.is_file() and "__pycache__" not in file.parts:
            found.update(f"{file.relative_to(root)}\0{hash_of(file)}".encode())
    chosen = root / STORE / found.hexdigest()
    for other in (root / STORE).glob("*"):
        if other != chosen:
            shutil.rmtree(other, ignore_errors=True)
    return chosen
