"""The changelog as an Atom feed, for programs that tell a reader what is new; and robots.txt, for search engines."""

import re
import subprocess
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import NamedTuple

import markdown
from markdown.extensions.toc import slugify

from pages.links import REPOSITORY

FEED = "changelog.xml"
_VERSION = re.compile(r"^## \[(?P<name>[^\]]+)\](?: - (?P<date>\d{4}-\d\d-\d\d))?[ ]*$", re.M)
_KIND = re.compile(r"^### (.+)$")


class Version(NamedTuple):
    """A section of the changelog: its name, its date if it has one, and its lists, a heading for each."""

    name: str
    date: str | None
    lists: dict[str, list[str]]


def versions(changelog: str) -> list[Version]:
    """The versions of a changelog that is written as keepachangelog.com has it, newest first."""
    heads = list(_VERSION.finditer(changelog))
    ends = [head.start() for head in heads[1:]] + [len(changelog)]
    return [Version(m["name"], m["date"], _lists(changelog[m.end() : end])) for m, end in zip(heads, ends, strict=True)]


def _lists(text: str) -> dict[str, list[str]]:
    """The items under each heading, in the order of the text."""
    lists: dict[str, list[str]] = {}
    for line in text.splitlines():
        if kind := _KIND.match(line):
            lists[kind[1]] = []
        elif line.startswith("- ") and lists:
            list(lists.values())[-1].append(line[2:])
        elif line.startswith("  ") and lists and (last := list(lists.values())[-1]):
            last[-1] += " " + line.strip()
    return lists


def atom(found: list[Version], site: str, name: str, today: str) -> str:
    """The feed: an entry for each version.

    Args:
        found: the versions.
        site: the address of the site, with a slash at its end.
        name: its name.
        today: the time of what has no date yet, as `2026-01-02T03:04:05+00:00`.
    """

    def when(version: Version) -> str:
        return f"{version.date}T00:00:00+00:00" if version.date else today

    entries = []
    for version in found:
        told = "".join(
            f"<h3>{escape(kind)}</h3><ul>{''.join(f'<li>{_inline(item)}</li>' for item in items)}</ul>"
            for kind, items in version.lists.items()
        )
        title = version.name if version.date else f"{version.name}: what the next version will have"
        entries.append(
            f"<entry><title>{escape(title)}</title><id>{site}changelog/#{_slug(version)}</id>"
            f'<link href="{site}changelog/#{_slug(version)}"/><updated>{when(version)}</updated>'
            f'<content type="html">{escape(told)}</content></entry>'
        )
    updated = max(map(when, found), default=today)
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<feed xmlns="http://www.w3.org/2005/Atom">'
        f"<title>{escape(name)}: changelog</title><id>{site}{FEED}</id>"
        f'<link rel="self" href="{site}{FEED}"/><link href="{site}changelog/"/>'
        f"<updated>{updated}</updated><author><name>{escape(name)}</name><uri>{REPOSITORY}</uri></author>\n"
        + "\n".join(entries)
        + "\n</feed>\n"
    )


def _slug(version: Version) -> str:
    """The anchor of a version on the page, as the headings get theirs."""
    return slugify(f"[{version.name}]" + (f" - {version.date}" if version.date else ""), "-")


def _inline(text: str) -> str:
    """Code, emphasis and links of a line of Markdown as HTML."""
    return markdown.markdown(text).removeprefix("<p>").removesuffix("</p>")


def changed(file: Path) -> str:
    """When a file was last committed, or, where there is no history, when it was written; to the second."""
    try:
        command = ["git", "log", "-1", "--format=%cI", "--", file.name]
        ran = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, timeout=10)
        if ran.returncode == 0 and ran.stdout.strip():
            return ran.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return datetime.fromtimestamp(int(file.stat().st_mtime), UTC).isoformat()


def robots(site: str) -> str:
    """robots.txt: everything may be read, and here is the list of pages."""
    return f"User-agent: *\nAllow: /\n\nSitemap: {site}sitemap.xml\n"
