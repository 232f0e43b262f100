"""What can go wrong while a package is fetched, each fault in a sentence that says why and what to do.

Addresses of indexes and proxies may hold a user and a password: whatever is printed of them goes through `shown`.
"""

import errno
import re
import socket
import ssl
from pathlib import Path


class FetchError(RuntimeError):
    """A package could not be fetched; the message is one sentence, or two, that say why and what to do."""


class Unreachable(Exception):
    """A source did not answer at all, as when the machine is offline; the message says how."""


class Refused(Exception):
    """A source answered, and does not give the wheel; the message says why."""


def shown(text: str) -> str:
    """An address, or a sentence with addresses in it, without user and password, so that it may be printed."""
    return re.sub(r"//[^/\s]*@", "//", text)  # up to the last @ of the host: a password may contain one


def of_status(code: int) -> str:
    """What an HTTP status code of 400 or more says about a source."""
    known = {401: "wants a user and a password", 403: "refuses access", 404: "does not have it"}
    said = known.get(code, "is out of order" if code >= 500 else "refused")
    return f"{said} (HTTP {code})"


def of_network(error: BaseException) -> Unreachable | Refused:
    """The error to raise for one of httpx2's: `Unreachable` if no server answered, else `Refused`."""
    import httpx2

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(e, ssl.SSLError) for e in chain):
        return Refused("shows a certificate that is not trusted (pip's settings cert and trusted-host decide that)")
    if isinstance(error, httpx2.ProxyError):
        return Unreachable(f"the proxy does not let us through, {error}")
    if isinstance(error, httpx2.TimeoutException):
        return Unreachable("no answer in time")
    if any(isinstance(e, socket.gaierror) for e in chain):
        return Unreachable("its name is not found")
    if any(isinstance(e, ConnectionRefusedError) for e in chain):
        return Unreachable("the connection is refused")
    if isinstance(error, httpx2.NetworkError):
        return Unreachable(str(error).lower() or "the connection broke")
    if isinstance(error, httpx2.RemoteProtocolError):
        return Refused(f"breaks the connection ({error})")
    return Refused(f"cannot be asked ({error})")


def of_storage(error: OSError, folder: Path) -> str:
    """Why something could not be written to the cache folder, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        why, remedy = "there is no room left", "make room, or set NONDUAL_CACHE to a folder on another disk"
        return f"{folder} cannot take the files: {why}. What has arrived is kept: {remedy}, and run the command again."
    why = error.strerror or str(error)
    return f"{error.filename or folder} cannot be written: {why}. Set NONDUAL_CACHE to a folder that you may write to."
