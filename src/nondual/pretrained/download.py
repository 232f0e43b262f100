"""Download one pinned wheel from where pip would look for it, so that an interrupted download can go on later.

The wheel is found by name and version with `unearth`, in pip's configured indexes and folders, and is accepted by its
sha256 alone. What has arrived lies in a file NAME-VERSION.whl.part; the next attempt asks the server for the rest of it
(RFC 9110, section 14, range requests). Nothing is built, installed or run.
"""

import contextlib
import hashlib
import logging
import os
import re
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, cast

from nondual.pretrained.pip_settings import PipSettings, pip_settings

if TYPE_CHECKING:
    from unearth import Link, Package
    from unearth.fetchers import Fetcher, PyPIClient

if sys.platform != "win32":  # on Windows two processes are not kept apart, but the hash still finds what they spoil
    import fcntl

Report = Callable[[int, int | None], None]
"""Called with the number of bytes that are here, and of all of them, or None where the server does not say."""

STALLED = 60.0  # seconds without a new byte after which another process is no longer waited for
POSIX = os.name == "posix"
BUSY = {429, 500, 502, 503, 504}  # a server's answers that may be better the next time


class FetchError(RuntimeError):
    """A package could not be fetched; the message is one sentence, or two, that say why and what to do."""


@contextlib.contextmanager
def partial(part: Path) -> Iterator[FileIO]:
    """A file that grows, for this process alone; it is deleted when the block ends without error, or if it is empty.

    Args:
        part: where it is; made if it is not there, and opened for reading and appending.

    Raises:
        FetchError: another process holds it and has added nothing for a minute.
        OSError: it cannot be written to.
    """
    with _alone(part) as file:
        try:
            yield file
        finally:
            if POSIX and not file.seek(0, os.SEEK_END):
                part.unlink(missing_ok=True)
        if POSIX:  # while it is held, so that no other process begins to use it
            part.unlink(missing_ok=True)
    if not POSIX:  # Windows deletes no file that is open
        part.unlink(missing_ok=True)


def complete(
    file: FileIO, name: str, version: str, sha256: str, *, size: int | None = None, report: Report | None = None
) -> None:
    """Add what is missing of the wheel NAME-VERSION to a file, from the first place in pip's order that has it.

    Args:
        file: open for reading and appending; what it holds already is taken for the wheel's beginning.
        name: the project, as the index has it.
        version: the one version that is taken.
        sha256: of the whole file, in hexadecimal.
        size: in bytes, where it is known; a longer answer is cut off.
        report: called as bytes arrive.

    Raises:
        FetchError: no source has it, the machine is offline, or what came is not what was pinned.
        ImportError: unearth is not installed.
        OSError: the disk is full.
    """
    if _sha256(file) == sha256:
        return
    what = f"{name} {version} could not be fetched"
    try:
        settings = pip_settings()
    except ValueError as why:
        raise FetchError(f"{what}: {why}.") from None
    sources = [(url, "index") for url in settings.index_urls] + [(url, "find-links") for url in settings.find_links]
    unreachable, refused, answered = [], [], False
    with _session(settings) as session, _quiet():
        for url, kind in sources:
            try:
                for link in _links(session, url, kind, name, version, sha256):
                    _download(session, file, link, sha256, size, settings.retries, report or (lambda here, whole: None))
                    return
                refused.append(f"{shown(url)} does not have it")
                answered = answered or url.startswith("http")
            except _Unreachable as why:
                unreachable.append(f"{shown(url)}: {shown(str(why))}")
            except _Refused as why:
                refused.append(f"{shown(url)} {shown(str(why))}")
                answered = answered or url.startswith("http")
    here = file.seek(0, os.SEEK_END)
    kept = f" What has arrived, {here / 1e6:.1f} MB, is kept." if here else ""
    if not sources:
        raise FetchError(f"{what}: pip is configured to use no index (no-index), and no find-links are given.")
    if unreachable and not answered:
        reasons = "; ".join(unreachable)
        raise FetchError(f"{what}: this machine seems to be offline ({reasons}). Try again when it is connected.{kept}")
    raise FetchError(f"{what}: {'; '.join(unreachable + refused)}.{kept}")


# --- the file that grows -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[FileIO]:
    """The file, open for reading and appending, for this process alone; waits while another one is adding to it.

    Raises:
        FetchError: the other process holds it and has added nothing for a minute.
    """
    seen, since = -1, time.monotonic()
    while True:
        with open(part, "ab+", buffering=0) as file:
            if _lock(file):
                # the other process may have finished and deleted the file while this one waited for it
                if part.exists() and os.path.samestat(os.fstat(file.fileno()), part.stat()):
                    yield file
                    return
                continue
            size = file.seek(0, os.SEEK_END)
        if size != seen:
            seen, since = size, time.monotonic()
        elif time.monotonic() - since > STALLED:
            raise FetchError(f"{part} is held by another process that makes no progress: end that one, then try again.")
        time.sleep(0.1)


def _lock(file: FileIO) -> bool:
    """Whether this process now holds the file; it lets go when the file is closed."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _sha256(file: FileIO) -> str:
    """The hash of the whole file, in hexadecimal."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


# --- where it may come from ----------------------------------------------------------------------------------------


class _Unreachable(Exception):
    """A source did not answer at all, as when the machine is offline; the message says how."""


class _Refused(Exception):
    """A source answered, and does not give the wheel; the message says why."""


def _session(settings: PipSettings) -> "PyPIClient":
    """A client with pip's certificates, proxy, trusted hosts and credentials. It asks for no password."""
    try:
        from unearth.auth import MultiDomainBasicAuth
        from unearth.fetchers import PyPIClient
    except ImportError as missing:
        raise ImportError(f"{missing.name} is needed to fetch: pip install 'nondual[pretrained]'") from None
    verify: ssl.SSLContext | bool = True
    try:
        if settings.cert and os.path.isdir(settings.cert):
            verify = ssl.create_default_context(capath=settings.cert)
        elif settings.cert:
            verify = ssl.create_default_context(cafile=settings.cert)
        if settings.client_cert:
            verify = verify if isinstance(verify, ssl.SSLContext) else ssl.create_default_context()
            verify.load_cert_chain(settings.client_cert)
    except (OSError, ssl.SSLError) as why:
        raise FetchError(f"pip's setting cert or client-cert cannot be used: {why}.") from None
    try:
        session = PyPIClient(
            trusted_hosts=settings.trusted_hosts,
            verify=verify,
            timeout=settings.timeout,
            follow_redirects=True,
            proxy=settings.proxy,
        )
    except (ValueError, ImportError) as why:  # of no known kind, or SOCKS without the package for it
        raise FetchError(f"the proxy that is configured cannot be used: {shown(str(why))}.") from None
    session.auth = MultiDomainBasicAuth(prompting=False, index_urls=settings.index_urls)
    return session


def _links(session: "PyPIClient", url: str, kind: str, name: str, version: str, sha256: str) -> "list[Link]":
    """The wheels of that name and version which a source offers, without those it says to have another hash.

    Raises:
        _Unreachable, _Refused: the source does not answer, or not with a list of files.
    """
    import httpx2
    from unearth import PackageFinder

    answers: list[httpx2.Response] = []
    found: list[Package] = []
    session.event_hooks = {"response": [answers.append]}
    try:
        for attempt in range(3):
            time.sleep(attempt * 0.5)
            answers.clear()
            finder = PackageFinder(
                cast("Fetcher", session),  # its own class, which its protocol describes too narrowly
                index_urls=[url] if kind == "index" else [],
                find_links=[url] if kind == "find-links" else [],
                only_binary=[name],
                ignore_compatibility=True,  # it is read as an archive, not installed
            )
            found = list(finder.find_matches(f"{name}=={version}", allow_yanked=True))
            if found or not answers or answers[-1].status_code not in BUSY:
                break
    except (httpx2.HTTPError, httpx2.InvalidURL) as why:
        raise _reason(why) from None
    except (ValueError, TypeError, AttributeError, LookupError, OSError) as why:
        # a folder that is not there, or what a page that is no index makes of unearth's reader
        said = (str(why) or type(why).__name__).splitlines()[0]
        raise _Refused(f"cannot be read as an index ({said})") from None
    finally:
        session.event_hooks = {}
    links = [package.link for package in found]
    offered = [link for link in links if (link.hash_option or {}).get("sha256", [sha256]) == [sha256]]
    if links and not offered:
        raise _Refused(f"has {name} {version} with another sha256 than the pinned {sha256}")
    if not links and answers and answers[-1].status_code >= 400:
        raise _Refused(_status(answers[-1].status_code))
    if not links and not answers and url.startswith("http://"):
        raise _Refused("was not asked: it is plain http, and not one of pip's trusted hosts")
    return offered


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """unearth logs what it skips; where no handler is set up, its warnings are not printed between our sentences."""
    logger, nowhere = logging.getLogger("unearth"), logging.NullHandler()
    logger.addHandler(nowhere)
    try:
        yield
    finally:
        logger.removeHandler(nowhere)


# --- the bytes -----------------------------------------------------------------------------------------------------


def _download(
    session: "PyPIClient", file: FileIO, link: "Link", sha256: str, size: int | None, retries: int, report: Report
) -> None:
    """Append what is missing, and compare the hash; what an earlier attempt left is given up if it does not fit.

    Raises:
        _Unreachable, _Refused: the rest does not come, or the file is not the one that was pinned.
    """
    found = ""
    for _ in range(2):
        resumed = file.seek(0, os.SEEK_END) > 0
        if link.is_file:
            _copy(file, link, report)
        else:
            _receive(session, file, link, size, retries, report)
        found = _sha256(file)
        if found == sha256:
            return
        file.truncate(0)
        if not resumed:
            break
    raise _Refused(f"sent a file of sha256 {found}, not the pinned {sha256}")


def _copy(file: FileIO, link: "Link", report: Report) -> None:
    """A wheel on this machine's own disk."""
    file.truncate(0)
    try:
        source = open(link.file_path, "rb")
    except OSError as why:
        raise _Refused(f"has a file that cannot be read ({why.strerror})") from None
    with source:
        while piece := source.read(1 << 20):
            _append(file, piece)
    report(file.tell(), file.tell())


def _receive(session: "PyPIClient", file: FileIO, link: "Link", size: int | None, retries: int, report: Report) -> None:
    """Append to the file until the server has sent all; a connection that breaks is made again where it left off."""
    import httpx2

    failures, furthest, ranges = 0, file.seek(0, os.SEEK_END), True
    while True:
        here = file.seek(0, os.SEEK_END)
        if not ranges and here:
            file.truncate(0)
            here = 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={here}-"} if here else {})
        try:
            with session.stream("GET", link.url_without_fragment, headers=headers) as answer:
                status = answer.status_code
                if status == 416 and here:  # nothing comes after what is here: it is complete, or not this file
                    return
                if status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {here}-"):
                    if not here:  # the whole was asked for: to ask again would go on for ever
                        raise _Refused("sends a piece where the whole file was asked for (HTTP 206)")
                    ranges = False  # another piece than the one asked for
                    continue
                if status not in (200, 206):
                    if status not in BUSY or failures >= retries:
                        raise _Refused(_status(status))
                    failures += 1
                    time.sleep(_pause(failures))
                    continue
                if status == 200 and here:  # the server knows no ranges, and begins anew
                    file.truncate(0)
                    here = 0
                length = answer.headers.get("Content-Length", "")
                whole = here + int(length) if length.isdecimal() else size
                report(here, whole)
                for piece in answer.iter_raw():  # as it comes: what waits to fill a block would be lost
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
            failures += 2 if isinstance(why, httpx2.TimeoutException) else 1  # each took a whole timeout
            if failures > retries or not isinstance(why, httpx2.TransportError):
                raise _reason(why) from None
            time.sleep(_pause(failures))


def _pause(failures: int) -> float:
    """Seconds to wait before the next attempt, longer after each failure."""
    return min(0.1 * 2**failures, 4.0)


def _append(file: FileIO, piece: bytes) -> None:
    """Write all of it: an unbuffered file may take a part only, when the disk is nearly full."""
    rest = memoryview(piece)
    while rest:
        rest = rest[file.write(rest) :]


# --- words ---------------------------------------------------------------------------------------------------------


def shown(text: str) -> str:
    """An address, or a sentence with addresses in it, as it may be printed: without user and password."""
    return re.sub(r"//[^/\s]*@", "//", text)  # up to the last @ of the host: a password may hold one


def _status(code: int) -> str:
    """What a status code says of a source."""
    known = {401: "wants a user and a password", 403: "refuses access", 404: "does not have it"}
    said = known.get(code, "is out of order" if code >= 500 else "refused")
    return f"{said} (HTTP {code})"


def _reason(error: BaseException) -> _Unreachable | _Refused:
    """What an error of the network means for the one who waits."""
    import httpx2

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(e, ssl.SSLError) for e in chain):
        return _Refused("shows a certificate that is not trusted (pip's settings cert and trusted-host decide that)")
    if isinstance(error, httpx2.ProxyError):
        return _Unreachable(f"the proxy does not let us through, {error}")
    if isinstance(error, httpx2.TimeoutException):
        return _Unreachable("no answer in time")
    if any(isinstance(e, socket.gaierror) for e in chain):
        return _Unreachable("its name is not found")
    if any(isinstance(e, ConnectionRefusedError) for e in chain):
        return _Unreachable("the connection is refused")
    if isinstance(error, httpx2.NetworkError):
        return _Unreachable(str(error).lower() or "the connection broke")
    if isinstance(error, httpx2.RemoteProtocolError):
        return _Refused(f"breaks the connection ({error})")
    return _Refused(f"cannot be asked ({error})")
