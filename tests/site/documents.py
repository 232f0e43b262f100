"""The pages of a built site as their files have them: what each says and would fetch, and what is wrong with it."""

import os
import re
from collections import Counter
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

ROOT = Path(__file__).parent.parent.parent
SITE = Path(os.environ.get("SITE_DIR", ROOT / "site"))


class Reading(HTMLParser):
    """What the markup of a page holds."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.title = self.description = self.canonical = ""
        self._in_title = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "title" and not self.title:
            self._in_title = True
        if tag == "meta" and given.get("name") == "description":
            self.description = given.get("content", "")
        if tag in ("a", "area") and "href" in given:
            self.links.append(given["href"])
        elif tag == "link":
            rel = given.get("rel", "")
            if rel == "canonical":
                self.canonical = given["href"]
            elif rel in ("prev", "next"):
                self.links.append(given["href"])
            elif rel != "alternate":
                self.fetched.append(given.get("href", ""))
        else:
            self.fetched += [given[name] for name in ("src", "data", "poster", "href", "xlink:href") if name in given]
            self.fetched += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]
        self.fetched += addresses_in_css(given.get("style", ""))

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        if self._in_title:
            self.title += data
        if self.lasttag == "style":
            self.fetched += addresses_in_css(data)

    def handle_endtag(self, tag):
        self._in_title = self._in_title and tag != "title"


class Document:
    """One page: its text, its ids, its links, and the addresses a browser would fetch on its own.

    The markup is read once, when it is first asked for: of a whole site that takes seconds, and many tests ask for one
    page, or for text alone.
    """

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def read(self) -> Reading:
        return Reading(self.text)

    ids = property(lambda self: self.read.ids)
    links = property(lambda self: self.read.links)
    fetched = property(lambda self: self.read.fetched)
    title = property(lambda self: self.read.title)
    description = property(lambda self: self.read.description)
    canonical = property(lambda self: self.read.canonical)


def addresses_in_css(css: str) -> list[str]:
    """What `url()` and `@import` name, less the data that a sheet holds itself."""
    found = re.findall(r"""url\(\s*(["']?)(.*?)\1\s*\)""", css) + re.findall(r"""@import\s+(["'])(.*?)\1""", css)
    return [address for _, address in found if not address.startswith(("data:", "#"))]


def is_foreign(address: str) -> bool:
    return bool(urlsplit(address).netloc)


def read_site(site: Path) -> dict[str, Document]:
    """Every page of the site by its path from the root: `notation/index.html`."""
    return {
        path.relative_to(site).as_posix(): Document(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
    }


def base_of(pages: dict[str, Document]) -> str:
    """The path under which the site is published: `/`, or `/nondual/`."""
    home = pages.get("index.html")
    return urlsplit(home.canonical).path if home and home.canonical else "/"


def foreign(pages: dict[str, Document], site: Path) -> list[str]:
    """What would be fetched from another host, by pages and by style sheets."""
    faults = [f"{name}: {address}" for name, page in pages.items() for address in page.fetched if is_foreign(address)]
    for sheet in sorted(site.rglob("*.css")):
        css = sheet.read_text(encoding="utf-8")
        faults += [f"{sheet.relative_to(site)}: {address}" for address in addresses_in_css(css) if is_foreign(address)]
    return faults


def broken(pages: dict[str, Document], site: Path) -> list[str]:
    """Links, anchors, images and other files that a page names and the site does not have."""
    base, faults = base_of(pages), []
    for name, page in pages.items():
        here = base + ("" if name == "404.html" else name)
        for address in [*page.links, *(a for a in page.fetched if not a.startswith("data:"))]:
            parts = urlsplit(urljoin(here, address))
            if parts.scheme or parts.netloc:
                continue
            target = unquote(parts.path).removeprefix(base)
            target = target + "index.html" if target == "" or target.endswith("/") else target
            if name == target or (site / target).is_file():
                known = pages[target].ids if target in pages else None
                anchor = unquote(parts.fragment)
                if anchor and known is not None and anchor not in known and not anchor.startswith(":~:"):
                    faults.append(f"{name}: no #{anchor} in {target}")
            else:
                faults.append(f"{name}: {address}")
    for sheet in sorted(site.rglob("*.css")):
        for address in addresses_in_css(sheet.read_text(encoding="utf-8")):
            if not is_foreign(address) and not (sheet.parent / urlsplit(address).path).is_file():
                faults.append(f"{sheet.relative_to(site)}: {address}")
    return faults


def twice(page: Document) -> list[str]:
    """Ids that a page uses more than once."""
    return sorted(name for name, times in Counter(page.ids).items() if times > 1)


def weight(name: str, page: Document, site: Path) -> int:
    """Bytes of the page and of the scripts, sheets and images that it names (fonts come as the text needs them)."""
    total = len(page.text.encode())
    for address in set(page.fetched):
        if address and not address.startswith(("data:", "#")) and not is_foreign(address):
            path = site / unquote(urlsplit(urljoin("/" + name, address)).path).lstrip("/")
            total += path.stat().st_size if path.is_file() else 0
    return total
