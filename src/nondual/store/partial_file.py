"""A file that holds what has been downloaded so far, kept between attempts and held by one process at a time."""

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from nondual.store.errors import FetchError

if sys.platform != "win32":  # on Windows nothing keeps two processes apart, but the hash shows what they spoil
    import fcntl

STALLED = 60.0  # seconds without a new byte after which another process is no longer waited for
POSIX = os.name == "posix"


@contextlib.contextmanager
def partial(part: Path) -> Iterator[FileIO]:
    """The file, for this process alone; it is deleted when the block ends without an error, or if it is empty.

    Args:
        part: its path; created if it is not there, and opened for reading and appending.

    Raises:
        FetchError: another process holds it and has added nothing for a minute.
        OSError: it cannot be written to.
    """
    with _locked(part) as file:
        try:
            yield file
        finally:
            if POSIX and not file.seek(0, os.SEEK_END):
                part.unlink(missing_ok=True)
        if POSIX:  # before the lock is released, so that no other process begins to use the file
            part.unlink(missing_ok=True)
    if not POSIX:  # Windows deletes no file that is open
        part.unlink(missing_ok=True)


def sha256(file: FileIO) -> str:
    """The hash of the whole file, in hexadecimal."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[FileIO]:
    """The file, open for reading and appending, with a lock; waits while another process is adding to it.

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
    """Whether this process now has the lock; closing the file releases it."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
