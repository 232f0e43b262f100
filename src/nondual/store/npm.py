"""Where npm would look for a package: its registry and credentials, read without npm.

The registry is NPM_CONFIG_REGISTRY (or npm_config_registry); where neither is set, `registry=` of ~/.npmrc (or of the
file that NPM_CONFIG_USERCONFIG names), whose `@scope:registry=` counts before both for a package of that scope; else
the public one. A token or a password of that file goes to its registry alone. Proxy and certificates are pip's.

Source: npm's documentation, "npmrc" and "Package metadata" (the abbreviated form).
"""

import base64
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from nondual.store.errors import Refused, of_network, of_status
from nondual.store.sources import BUSY

if TYPE_CHECKING:
    import httpx2
    from unearth import Link
    from unearth.fetchers import PyPIClient

DEFAULT_REGISTRY = "https://registry.npmjs.org"
ABBREVIATED = "application/vnd.npm.install-v1+json; q=1.0, application/json; q=0.8"
METADATA_LIMIT = 64 << 20  # bytes; the metadata of a package with thousands of versions takes some 10 MB


@dataclass(frozen=True)
class NpmSettings:
    """npm's settings about where one package comes from.

    Attributes:
        registry: the address of the registry, without a slash at its end.
        authorization: the HTTP header of that name to send to it, or None.
    """

    registry: str = field(default=DEFAULT_REGISTRY, repr=False)  # not shown: it may hold a password
    authorization: str | None = field(default=None, repr=False)


def npm_settings(name: str) -> NpmSettings:
    """npm's settings for a package, from the environment and from the user's .npmrc.

    Args:
        name: of the package, "emojibase-data" or "@iconify-json/noto".

    Raises:
        ValueError: .npmrc cannot be read.
    """
    found = _npmrc()
    scope = f"{name.split('/')[0]}:registry" if name.startswith("@") else ""
    general = os.environ.get("NPM_CONFIG_REGISTRY") or os.environ.get("npm_config_registry") or found.get("registry")
    registry = (found.get(scope) or general or DEFAULT_REGISTRY).rstrip("/")
    place = registry.partition(":")[2]  # npm names credentials by "//host/path/"
    while place.strip("/"):
        for key in (f"{place}/", place):
            if token := found.get(f"{key}:_authToken"):
                return NpmSettings(registry, f"Bearer {token}")
            if password := found.get(f"{key}:_auth"):
                return NpmSettings(registry, f"Basic {password}")
            if (user := found.get(f"{key}:username")) and (password := found.get(f"{key}:_password")):
                plain = f"{user}:{base64.b64decode(password).decode('utf-8', 'replace')}"
                return NpmSettings(registry, "Basic " + base64.b64encode(plain.encode()).decode())
        place = place.rpartition("/")[0]
    return NpmSettings(registry)


def _npmrc() -> dict[str, str]:
    """The lines "key = value" of the user's .npmrc; ${NAME} in a value is that environment variable."""
    named = os.environ.get("NPM_CONFIG_USERCONFIG") or os.environ.get("npm_config_userconfig")
    file = Path(os.path.expanduser(named or "~/.npmrc"))
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as why:
        raise ValueError(f"npm's configuration {file} cannot be read: {why}") from None
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.lstrip().startswith(("#", ";")):
            value = re.sub(r"\$\{(\w+)\}", lambda name: os.environ.get(name[1], ""), value.strip().strip("\"'"))
            found[key.strip()] = value
    return found


def links(client: "PyPIClient", settings: NpmSettings, name: str, version: str) -> "list[Link]":
    """The tarball of that name and version which the registry offers, as a list of one.

    Args:
        client: from `sources.session`; from now on it sends the registry's credentials to the registry.
        settings: from `npm_settings`.
        name: the package, with its scope.
        version: the one version that is taken.

    Raises:
        Unreachable, Refused: the registry does not answer, or does not have it.
    """
    import httpx2
    from unearth import Link

    if settings.authorization:
        client.auth = _credentials(settings)
    address = f"{settings.registry}/{quote(name, safe='@')}"
    body, status = b"", 0
    try:
        for attempt in range(3):
            time.sleep(attempt * 0.5)
            with client.stream("GET", address, headers={"Accept": ABBREVIATED}) as answer:
                status, body = answer.status_code, b""
                for piece in answer.iter_bytes() if status == 200 else ():
                    body += piece
                    if len(body) > METADATA_LIMIT:
                        raise Refused(f"sends more than {METADATA_LIMIT >> 20} MB of metadata")
            if status not in BUSY:
                break
    except (httpx2.HTTPError, httpx2.InvalidURL) as why:
        raise of_network(why) from None
    if status != 200:
        raise Refused(of_status(status))
    try:
        versions = json.loads(body)["versions"]
        tarball = versions[version]["dist"]["tarball"] if version in versions else None
    except (ValueError, TypeError, LookupError):
        raise Refused("cannot be read as an npm registry") from None
    if not isinstance(tarball, str):
        raise Refused(f"does not have version {version}")
    if tarball.startswith(f"{DEFAULT_REGISTRY}/"):  # a mirror may repeat the public registry's addresses
        tarball = settings.registry + tarball.removeprefix(DEFAULT_REGISTRY)
    return [Link(tarball)]


def _credentials(settings: NpmSettings) -> "httpx2.Auth":
    """Sends the credentials to addresses of the registry, and to no other host."""
    import httpx2

    class Credentials(httpx2.Auth):
        def auth_flow(self, request: httpx2.Request) -> Iterator[httpx2.Request]:  # type: ignore[override]
            if str(request.url).startswith(f"{settings.registry}/"):
                request.headers["Authorization"] = settings.authorization or ""
            yield request

    return Credentials()
