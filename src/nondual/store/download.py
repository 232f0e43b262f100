"""Download one pinned archive from where pip or npm would look for it, so that an interrupted download can be resumed.

The archive is accepted by its sha256 alone. What has arrived lies in a file NAME-VERSION.whl.part (or .tgz.part, or
.deb.part); the next attempt asks the server for the rest of it (RFC 9110, section 14, range requests).
"""

import os
import time
from collections.abc import Callable
from io import FileIO
from typing import TYPE_CHECKING

from nondual.store import sources
from nondual.store.errors import FetchError, Refused, Unreachable, of_network, of_status, shown
from nondual.store.origins import ORIGINS, Source, Wanted
from nondual.store.partial_file import sha256 as hash_of
from nondual.store.pip_settings import pip_settings

if TYPE_CHECKING:
    from unearth import Link
    from unearth.fetchers import PyPIClient

Report = Callable[[int, int | None], None]
"""Called with the number of bytes that are here, and of all of them, or None where the server does not say."""


def complete(
    file: FileIO,
    wanted: Wanted,
    *,
    source: Source = "pypi",
    size: int | None = None,
    report: Report | None = None,
) -> None:
    """Add what is missing of an archive to a file, from the first place of its source that has it.

    Args:
        file: open for reading and appending; what it holds already is taken for the archive's beginning.
        wanted: the package's name and version, and the sha256 of the archive.
        source: where it comes from; for a wheel, the places in pip's order.
        size: in bytes, where it is known; a longer answer is cut off.
        report: called as bytes arrive.

    Raises:
        FetchError: no place has it, the machine is offline, or what came is not what was pinned.
        ImportError: unearth is not installed.
        OSError: the disk is full.
    """
    if hash_of(file) == wanted.sha256:
        return
    what = f"{wanted.name} {wanted.version} could not be fetched"
    try:
        settings = pip_settings()
        places = ORIGINS[source].places(wanted, settings)
    except ValueError as why:
        raise FetchError(f"{what}: {why}.") from None
    unreachable, refused, answered = [], [], False
    with sources.session(settings) as client, sources.quiet():
        for url, links in places:
            try:
                for link in links(client):
                    _download(
                        client, file, link, wanted.sha256, size, settings.retries, report or (lambda here, whole: None)
                    )
                    return
                refused.append(f"{shown(url)} does not have it")
                answered = answered or url.startswith("http")
            except Unreachable as why:
                unreachable.append(f"{shown(url)}: {shown(str(why))}")
            except Refused as why:
                refused.append(f"{shown(url)} {shown(str(why))}")
                answered = answered or url.startswith("http")
    here = file.seek(0, os.SEEK_END)
    kept = f" What has arrived, {here / 1e6:.1f} MB, is kept." if here else ""
    if not places:
        raise FetchError(f"{what}: pip is configured to use no index (no-index), and no find-links are given.")
    if unreachable and not answered:
        reasons = "; ".join(unreachable)
        raise FetchError(f"{what}: this machine seems to be offline ({reasons}). Try again when it is connected.{kept}")
    raise FetchError(f"{what}: {'; '.join(unreachable + refused)}.{kept}")


def _download(
    client: "PyPIClient", file: FileIO, link: "Link", sha256: str, size: int | None, retries: int, report: Report
) -> None:
    """Append what is missing, and compare the hash; what an earlier attempt left is discarded if it does not fit.

    Raises:
        Unreachable, Refused: the rest does not come, or the file is not the one that was pinned.
    """
    found = ""
    for _ in range(2):
        resumed = file.seek(0, os.SEEK_END) > 0
        if link.is_file:
            _copy(file, link, report)
        else:
            _receive(client, file, link, size, retries, report)
        found = hash_of(file)
        if found == sha256:
            return
        file.truncate(0)
        if not resumed:
            break
    raise Refused(f"sent a file of sha256 {found}, not the pinned {sha256}")


def _copy(file: FileIO, link: "Link", report: Report) -> None:
    """Take an archive that lies on this machine's own disk."""
    file.truncate(0)
    try:
        source = open(link.file_path, "rb")
    except OSError as why:
        raise Refused(f"has a file that cannot be read ({why.strerror})") from None
    with source:
        while piece := source.read(1 << 20):
            _append(file, piece)
    report(file.tell(), file.tell())


def _receive(client: "PyPIClient", file: FileIO, link: "Link", size: int | None, retries: int, report: Report) -> None:
    """Append to the file until the server has sent all; after a broken connection, ask for the rest.

    Raises:
        Unreachable, Refused: `retries` attempts in a row brought no new byte, or the server does not give the file.
    """
    import httpx2

    failures, furthest, ranges = 0, file.seek(0, os.SEEK_END), True
    while True:
        here = file.seek(0, os.SEEK_END)
        if not ranges and here:
            file.truncate(0)
            here = 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={here}-"} if here else {})
        try:
            with client.stream("GET", link.url_without_fragment, headers=headers) as answer:
                status = answer.status_code
                if status == 416 and here:  # there is nothing after what is here: it is complete, or another file
                    return
                if status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {here}-"):
                    if not here:  # the whole file was asked for: asking again would never end
                        raise Refused("sends a piece where the whole file was asked for (HTTP 206)")
                    ranges = False  # another piece than the one asked for
                    continue
                if status not in (200, 206):
                    if status not in sources.BUSY or failures >= retries:
                        raise Refused(of_status(status))
                    failures += 1
                    time.sleep(_pause(failures))
                    continue
                if status == 200 and here:  # the server does not know range requests, and sends all of it
                    file.truncate(0)
                    here = 0
                length = answer.headers.get("Content-Length", "")
                whole = here + int(length) if length.isdecimal() else size
                report(here, whole)
                for piece in answer.iter_raw():  # as it comes: bytes that wait for a full block would be lost
                    _append(file, piece)
                    here += len(piece)
                    report(here, whole)
                    if size is not None and here > size:  # not the pinned file, and perhaps without end
                        return
                return
        except (httpx2.HTTPError, httpx2.InvalidURL) as why:
            here = file.seek(0, os.SEEK_END)
            if here > furthest:
                failures, furthest = 0, here
            failures += 2 if isinstance(why, httpx2.TimeoutException) else 1  # a timeout has taken longer
            if failures > retries or not isinstance(why, httpx2.TransportError):
                raise of_network(why) from None
            time.sleep(_pause(failures))


def _pause(failures: int) -> float:
    """Seconds to wait before the next attempt, longer after each failure."""
    return min(0.1 * 2**failures, 4.0)


def _append(file: FileIO, piece: bytes) -> None:
    """Write all of it: one write to an unbuffered file may take a part only, when the disk is nearly full."""
    rest = memoryview(piece)
    while rest:
        rest = rest[file.write(rest) :]
