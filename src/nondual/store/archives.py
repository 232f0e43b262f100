"""Read single files out of a package's archive, in memory: nothing is extracted, installed or run.

    wheel             a zip file
    npm tarball       a gzipped tar file, whose names begin with "package/"
    Debian package    an `ar` archive (deb(5)) that holds control.tar.* and data.tar.*; the files are in the second

A file is looked up by its exact name, so that no name in an archive decides where anything is written. Links, devices
and folders in it are passed over, and what would unpack to more than a limit is refused.
"""

import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, cast

LIMIT = 1 << 30  # bytes of one file, and of all that a tar file unpacks to; the largest package here has 0.1 GB
AR_MAGIC = b"!<arch>\n"
AR_HEADER = 60  # name 16, date 12, owner 6, group 6, mode 8, size 10, end 2


class BadArchive(ValueError):
    """An archive that does not hold what is looked for, or cannot be read; the message says what is wrong."""


def from_wheel(archive: Path, names: Collection[str]) -> dict[str, bytes]:
    """These files of a wheel, by name.

    Raises:
        BadArchive: it is no zip file, a file is not in it, or is larger than the limit.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for name in names:
                if opened.getinfo(name).file_size > LIMIT:
                    raise BadArchive(f"{name!r} unpacks to more than {LIMIT} bytes")
            return {name: opened.read(name) for name in names}
    except KeyError as why:
        raise BadArchive(str(why.args[0])) from None
    except zipfile.BadZipFile as why:
        raise BadArchive(str(why)) from None


def from_tarball(archive: Path, names: Collection[str]) -> dict[str, bytes]:
    """These files of a gzipped tar file, by name.

    Raises:
        BadArchive: it is no such file, a file is not in it, or it unpacks to more than the limit.
    """
    with open(archive, "rb") as file:
        return _from_tar(file, "gz", names)


def from_debian(archive: Path, names: Collection[str]) -> dict[str, bytes]:
    """These files of a Debian package, by name, as "usr/share/doc/hello/copyright".

    The name of a part of the package, as "data.tar.xz", gives that part as it is, compressed: so a package of thousands
    of small files can be kept as one file. `members` reads its files.

    Raises:
        BadArchive: it is no Debian package, a file is not in it, or it unpacks to more than the limit.
    """
    with open(archive, "rb") as file:
        parts = _ar(file)
        found = {name: _part(file, *parts[name]).read() for name in names if name in parts}
        rest = set(names) - set(found)
        if rest:
            data = next((name for name in parts if name.startswith("data.tar")), None)
            if data is None:
                raise BadArchive("a Debian package without data.tar")
            found |= _from_tar(_part(file, *parts[data]), data.removeprefix("data.tar").lstrip("."), rest)
    return found


def members(data: bytes, compression: str = "xz") -> dict[str, bytes]:
    """Every regular file of a compressed tar file, by name without "./" at its start, in the order of the archive.

    Args:
        data: the tar file.
        compression: "xz", "gz", "zst" (from Python 3.14 on), or "" for none.

    Raises:
        BadArchive: it cannot be read, or unpacks to more than the limit.
    """
    return _from_tar(io.BytesIO(data), compression, None)


def _from_tar(file: IO[bytes], compression: str, names: Collection[str] | None) -> dict[str, bytes]:
    """The regular files of a tar file that are named, or all; it is read once, from its beginning to its end."""
    found: dict[str, bytes] = {}
    wanted = None if names is None else set(names)
    try:
        with _decompressed(file, compression) as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
            total = 0
            for member in tar:
                total += member.size
                if total > LIMIT:
                    raise BadArchive(f"it unpacks to more than {LIMIT} bytes")
                name = member.name.removeprefix("./")
                if member.isreg() and (wanted is None or name in wanted) and (opened := tar.extractfile(member)):
                    found[name] = opened.read()
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as why:
        raise BadArchive(f"its tar file cannot be read: {why}") from None
    if wanted and (absent := sorted(wanted - set(found))):
        raise BadArchive(f"There is no item named {absent[0]!r} in the archive")
    return found


def _decompressed(file: IO[bytes], compression: str) -> IO[bytes]:
    """The file as it was before it was compressed, read as it is needed."""
    if compression == "xz":
        return cast("IO[bytes]", lzma.open(file))
    if compression == "gz":
        return cast("IO[bytes]", gzip.open(file))
    if compression == "zst":
        try:
            from compression import zstd  # type: ignore[import-not-found]  # in the standard library from 3.14 on
        except ImportError:
            raise BadArchive("it is compressed by Zstandard, which Python reads from version 3.14 on") from None
        return zstd.open(file)
    if compression == "":
        return file
    raise BadArchive(f"its compression must be xz, gz or zst, got {compression!r}")


def _ar(file: IO[bytes]) -> dict[str, tuple[int, int]]:
    """The parts of an `ar` archive: name -> (offset, size), in bytes."""
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        raise BadArchive("it is no Debian package: it does not begin with '!<arch>'")
    parts: dict[str, tuple[int, int]] = {}
    end = file.seek(0, io.SEEK_END)
    at = len(AR_MAGIC)
    while at < end:
        file.seek(at)
        header = file.read(AR_HEADER)
        size = header[48:58].strip()
        if len(header) < AR_HEADER or header[58:] != b"`\n" or not size.isdigit() or at + AR_HEADER + int(size) > end:
            raise BadArchive(f"its ar header at byte {at} cannot be read")
        parts[header[:16].decode("ascii", "replace").strip().rstrip("/")] = (at + AR_HEADER, int(size))
        at += AR_HEADER + int(size) + int(size) % 2  # parts begin at even bytes
    return parts


def _part(file: IO[bytes], offset: int, size: int) -> IO[bytes]:
    """One part of an `ar` archive."""
    if size > LIMIT:
        raise BadArchive(f"a part of it has more than {LIMIT} bytes")
    file.seek(offset)
    return io.BytesIO(file.read(size))
