"""Where a Debian package lies: in the pool of a mirror of Debian, which is deb.debian.org unless another is set.

NONDUAL_DEBIAN_MIRROR is the address of another mirror, or a folder on this machine that is one: what stands before
"/pool". Where no mirror is set and the package has left the pool, as it does some years after its release, it comes
from Debian's archive of all that ever was in it, snapshot.debian.org.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from unearth import Link
    from unearth.fetchers import PyPIClient

MIRRORS = (
    "https://deb.debian.org/debian",
    "https://snapshot.debian.org/archive/debian/20250601T000000Z",
)


def mirrors() -> tuple[str, ...]:
    """The addresses that are asked, in their order, without a slash at their end."""
    given = os.environ.get("NONDUAL_DEBIAN_MIRROR")
    if not given:
        return MIRRORS
    if "://" not in given:  # a folder
        given = Path(os.path.abspath(os.path.expanduser(given))).as_uri()
    return (given.rstrip("/"),)


def links(client: "PyPIClient", mirror: str, name: str, version: str, pool: str) -> "list[Link]":
    """The package's place in a mirror, as a list of one; the mirror is not asked yet.

    Args:
        client: from `sources.session`.
        mirror: its address.
        name: of the binary package, "openclipart-svg".
        version: with Debian's revision and without an epoch, as in the file's name.
        pool: the folder of the source package in the pool, "main/o/openclipart".
    """
    from unearth import Link

    return [Link(f"{mirror}/pool/{pool}/{quote(f'{name}_{version}_all.deb', safe='')}")]
