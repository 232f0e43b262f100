"""Ask pip's indexes and folders for one wheel by name and version: which files do they offer?

`unearth` reads the indexes, with pip's certificates, proxy, trusted hosts and credentials. Nothing is built, installed
or run.
"""

import contextlib
import logging
import os
import ssl
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from nondual.store.errors import FetchError, Refused, of_network, of_status, shown
from nondual.store.pip_settings import PipSettings

if TYPE_CHECKING:
    from unearth import Link, Package
    from unearth.fetchers import Fetcher, PyPIClient

BUSY = {429, 500, 502, 503, 504}  # HTTP status codes of a server that may answer the next time


def session(settings: PipSettings) -> "PyPIClient":
    """An HTTP client with pip's certificates, proxy, trusted hosts and credentials. It never asks for a password.

    Raises:
        FetchError: a certificate or the proxy cannot be used.
        ImportError: unearth is not installed.
    """
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
        client = PyPIClient(
            trusted_hosts=settings.trusted_hosts,
            verify=verify,
            timeout=settings.timeout,
            follow_redirects=True,
            proxy=settings.proxy,
        )
    except (ValueError, ImportError) as why:  # a scheme that httpx2 does not know, or SOCKS without its package
        raise FetchError(f"the proxy that is configured cannot be used: {shown(str(why))}.") from None
    client.auth = MultiDomainBasicAuth(prompting=False, index_urls=settings.index_urls)
    return client


def links(client: "PyPIClient", url: str, kind: str, name: str, version: str, sha256: str) -> "list[Link]":
    """The wheels of that name and version which a source offers, without those that it lists with another hash.

    Args:
        client: from `session`.
        url: of the source.
        kind: "index" or "find-links", as pip has them.
        name: the project, as the index has it.
        version: the one version that is taken.
        sha256: of the wheel, in hexadecimal.

    Raises:
        Unreachable, Refused: the source does not answer, or does not answer with a list of files.
    """
    import httpx2
    from unearth import PackageFinder

    answers: list[httpx2.Response] = []
    found: list[Package] = []
    client.event_hooks = {"response": [answers.append]}
    try:
        for attempt in range(3):
            time.sleep(attempt * 0.5)
            answers.clear()
            finder = PackageFinder(
                cast("Fetcher", client),  # unearth's own class, which unearth's protocol describes too narrowly
                index_urls=[url] if kind == "index" else [],
                find_links=[url] if kind == "find-links" else [],
                only_binary=[name],
                ignore_compatibility=True,  # the wheel is read as an archive, not installed
            )
            found = list(finder.find_matches(f"{name}=={version}", allow_yanked=True))
            if found or not answers or answers[-1].status_code not in BUSY:
                break
    except (httpx2.HTTPError, httpx2.InvalidURL) as why:
        raise of_network(why) from None
    except (ValueError, TypeError, AttributeError, LookupError, OSError) as why:
        # a folder that is not there, or an error within unearth when a page is no index
        said = (str(why) or type(why).__name__).splitlines()[0]
        raise Refused(f"cannot be read as an index ({said})") from None
    finally:
        client.event_hooks = {}
    listed = [package.link for package in found]
    offered = [link for link in listed if (link.hash_option or {}).get("sha256", [sha256]) == [sha256]]
    if listed and not offered:
        raise Refused(f"has {name} {version} with another sha256 than the pinned {sha256}")
    if not listed and answers and answers[-1].status_code >= 400:
        raise Refused(of_status(answers[-1].status_code))
    if not listed and not answers and url.startswith("http://"):
        raise Refused("was not asked: it is plain http, and not one of pip's trusted hosts")
    return offered


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep unearth's warnings about files that it skips off the terminal; handlers that the user set up still get them.

    Python prints the warnings of a logger that has no handler at all; a handler that does nothing prevents that.
    """
    logger, nowhere = logging.getLogger("unearth"), logging.NullHandler()
    logger.addHandler(nowhere)
    try:
        yield
    finally:
        logger.removeHandler(nowhere)
