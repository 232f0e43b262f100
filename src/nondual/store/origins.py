"""The three kinds of package, each with the places that it comes from and the way in which its archive is read.

pypi      a wheel from the indexes and folders of pip
npm       a tarball from the registry of npm
debian    a Debian package from a mirror of Debian; one without machine code ("all")
"""

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from nondual.store import archives, debian, npm, sources
from nondual.store.pip_settings import PipSettings

if TYPE_CHECKING:
    from unearth import Link
    from unearth.fetchers import PyPIClient

Source = Literal["pypi", "npm", "debian"]


class Wanted(NamedTuple):
    """What is looked for.

    Attributes:
        name: the project or package.
        version: the one version that is taken.
        sha256: of the archive, in hexadecimal.
        pool: of a Debian package, the folder in the pool.
    """

    name: str
    version: str
    sha256: str
    pool: str = ""


class Place(NamedTuple):
    """A place that may have the archive.

    Attributes:
        address: for messages.
        links: asks it which files it offers; raises Unreachable or Refused.
    """

    address: str
    links: "Callable[[PyPIClient], list[Link]]"


class Origin(NamedTuple):
    """A kind of package.

    Attributes:
        suffix: of the archive's name.
        archive: what it is called in messages.
        places: where one may come from, in the order in which they are asked. May raise ValueError, for settings that
            cannot be read.
        contents: reads files out of the archive, by their names. Raises BadArchive.
    """

    suffix: str
    archive: str
    places: Callable[[Wanted, PipSettings], list[Place]]
    contents: Callable[[Path, Collection[str]], dict[str, bytes]]


def _pip(wanted: Wanted, settings: PipSettings) -> list[Place]:
    kinds = [(url, "index") for url in settings.index_urls] + [(url, "find-links") for url in settings.find_links]
    found: list[Place] = []
    for url, kind in kinds:
        ask = partial(sources.links, url=url, kind=kind, name=wanted.name, version=wanted.version, sha256=wanted.sha256)
        found.append(Place(url, ask))
    return found


def _npm(wanted: Wanted, settings: PipSettings) -> list[Place]:
    found = npm.npm_settings(wanted.name)
    return [Place(found.registry, partial(npm.links, settings=found, name=wanted.name, version=wanted.version))]


def _debian(wanted: Wanted, settings: PipSettings) -> list[Place]:
    places: list[Place] = []
    for mirror in debian.mirrors():
        ask = partial(debian.links, mirror=mirror, name=wanted.name, version=wanted.version, pool=wanted.pool)
        places.append(Place(mirror, ask))
    return places


ORIGINS: dict[Source, Origin] = {
    "pypi": Origin("whl", "wheel", _pip, archives.from_wheel),
    "npm": Origin("tgz", "npm tarball", _npm, archives.from_tarball),
    "debian": Origin("deb", "Debian package", _debian, archives.from_debian),
}
"""What differs between the kinds of package, by the name of their source."""
