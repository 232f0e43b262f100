"""Where pip would look for a package: its configuration, read without pip.

Many machines have pip configured for a private index, a proxy or a certificate, in files and in environment variables.
What is fetched here comes from the same place. Source: pip's documentation, "Configuration".
"""

import configparser
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_INDEX = "https://pypi.org/simple"
ALIASES = {"default-timeout": "timeout", "pypi-url": "index-url"}
SECTIONS = ("global", "download", ":env:")  # later ones override; pip reads [install] for another command


@dataclass(frozen=True)
class PipSettings:
    """pip's settings about where packages come from, under pip's own names.

    Attributes:
        index_urls: indexes, in the order in which they are asked; user and password may be part of an address.
        find_links: folders, pages or files that are looked at besides the indexes.
        trusted_hosts: "host" or "host:port", taken without a valid certificate or by plain http.
        cert: a file or a folder of certificates to trust instead of the system's.
        client_cert: a file with our own certificate and its private key.
        proxy: the address of a proxy; where it is None, the HTTP client reads HTTP_PROXY, HTTPS_PROXY and NO_PROXY.
        timeout: seconds of silence after which a connection is given up.
        retries: how often a failed request is repeated.
    """

    index_urls: tuple[str, ...] = field(default=(DEFAULT_INDEX,), repr=False)  # not shown: they may hold passwords
    find_links: tuple[str, ...] = field(default=(), repr=False)
    trusted_hosts: tuple[str, ...] = ()
    cert: str | None = None
    client_cert: str | None = None
    proxy: str | None = field(default=None, repr=False)
    timeout: float = 15.0
    retries: int = 5


def pip_settings() -> PipSettings:
    """pip's settings for this process: its files in pip's order, then the variables PIP_*; later ones override.

    Raises:
        ValueError: a file of pip's configuration or a number in it cannot be read.
    """
    found = _configured()
    no_index = _truth(found, "no-index")
    indexes = () if no_index else (found.get("index-url", DEFAULT_INDEX), *found.get("extra-index-url", "").split())
    return PipSettings(
        index_urls=tuple(dict.fromkeys(indexes)),  # each once, in their order
        find_links=tuple(os.path.expanduser(place) for place in found.get("find-links", "").split()),
        trusted_hosts=tuple(found.get("trusted-host", "").split()),
        cert=found.get("cert") or os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or None,
        client_cert=found.get("client-cert"),
        proxy=found.get("proxy"),
        timeout=_number(found, "timeout", "15"),
        retries=int(_number(found, "retries", "5")),
    )


def _configured() -> dict[str, str]:
    """Every setting by its long name, such as "extra-index-url"; an empty one counts as not given, as in pip."""
    sections: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for file in _files():
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as why:
            raise ValueError(f"pip's configuration {file} cannot be read: {str(why).splitlines()[0]}") from None
        for section in parser.sections():
            if section in sections:
                sections[section].update((_name(key), value) for key, value in parser.items(section) if value)
    variables = ((key, value) for key, value in os.environ.items() if key.startswith("PIP_"))
    sections[":env:"].update((_name(key[4:]), value) for key, value in variables if value)
    return {key: value for section in SECTIONS for key, value in sections[section].items()}


def _name(key: str) -> str:
    """A setting's name, however it was written: INDEX_URL and --index_url are "index-url"."""
    name = key.lower().replace("_", "-").removeprefix("--")
    return ALIASES.get(name, name)


def _files() -> list[Path]:
    """pip's configuration files, later ones override: all users', this user's, this environment's, PIP_CONFIG_FILE."""
    named = os.environ.get("PIP_CONFIG_FILE")
    if named == os.devnull:  # in pip this means: read no file
        return []
    base = "pip.ini" if os.name == "nt" else "pip.conf"
    home = Path(os.path.expanduser("~"))  # a user without a home keeps the "~", and no file is found there
    if os.name == "nt":
        shared = [Path(os.environ.get("PROGRAMDATA", r"C:\ProgramData")) / "pip"]
        own = [home / "pip", Path(os.environ.get("APPDATA", home)) / "pip"]
    elif sys.platform == "darwin":
        shared = [Path("/Library/Application Support/pip")]
        support = home / "Library/Application Support/pip"
        own = [home / ".pip", support if support.is_dir() else home / ".config/pip"]
    else:
        folders = os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg"
        shared = [*(Path(folder) / "pip" for folder in folders.split(os.pathsep)), Path("/etc")]
        own = [home / ".pip", Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip"]
    files = [*shared, *([] if named and os.path.exists(named) else own), Path(sys.prefix)]
    return [*(folder / base for folder in files), *([Path(named)] if named else [])]


def _truth(found: dict[str, str], name: str) -> bool:
    """A switch that is on or off.

    Raises:
        ValueError: it is neither.
    """
    value = found.get(name, "no").lower()
    if value not in {"1", "y", "yes", "t", "true", "on", "0", "n", "no", "f", "false", "off"}:
        raise ValueError(f"pip's setting {name} must be true or false, got {value!r}")
    return value in {"1", "y", "yes", "t", "true", "on"}


def _number(found: dict[str, str], name: str, default: str) -> float:
    """A number that is not negative.

    Raises:
        ValueError: it is not a number of 0 or more.
    """
    try:
        value = float(found.get(name, default))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"pip's setting {name} must be a number, 0 or more, got {found.get(name, default)!r}")
    return value
