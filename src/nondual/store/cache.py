"""The cache folder: where compiled code, weights and texts are kept between runs.

It is NONDUAL_CACHE; where that is not set, `nondual` under XDG_CACHE_HOME; where that is not set either, `nondual`
under ~/.cache. A user without a home folder gets a private folder among the temporary files.
"""

import contextlib
import os
import stat
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """The cache folder, as an absolute path. This function does not create it.

    Raises:
        PermissionError: this user has no home folder, and the folder for temporary files that would stand in for it
            is a file or a link, belongs to another user, or can be written to by others.
    """
    given = os.environ.get("NONDUAL_CACHE")
    if given:
        return Path(os.path.abspath(os.path.expanduser(given)))  # absolute: the working folder may change
    base = os.environ.get("XDG_CACHE_HOME")
    if base and os.path.isabs(base):  # the XDG specification has relative ones ignored
        return Path(base) / "nondual"
    try:
        return Path.home() / ".cache" / "nondual"
    except RuntimeError:  # HOME is not set, and the user id belongs to no account
        return _temporary()


def _temporary() -> Path:
    """A folder among the temporary files that only this user can write to, since compiled code is loaded from it."""
    folder = Path(tempfile.gettempdir()) / f"nondual-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()  # not stat: a link could be pointed elsewhere after this check
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} must belong to you and to you alone: set NONDUAL_CACHE to another folder")
    return folder
