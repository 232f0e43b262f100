"""Say in a line what each page holds: its description, and llms.txt, the same list for a machine that reads.

A page's description is what its front matter says, or else its first paragraph.
"""

import html as html_
import re
from collections.abc import Iterable
from typing import NamedTuple

LONGEST = 200
_PARAGRAPH = re.compile(r"<p>(.*?)</p>", re.S)


class Entry(NamedTuple):
    """A page in the list: the heading of the navigation under which it stands, its title, address and description."""

    section: str
    title: str
    address: str
    description: str


def listed(name: str, description: str, entries: Iterable[Entry]) -> str:
    """llms.txt: the site's name and description, and each page in a line, in the order in which a reader meets them."""
    lines, heading = [f"# {name}", "", f"> {description}"], None
    for entry in entries:
        if entry.section != heading:
            lines, heading = [*lines, "", f"## {entry.section}", ""], entry.section
        lines.append(f"- [{entry.title}]({entry.address}): {entry.description}")
    return "\n".join(lines) + "\n"


def first_paragraph(html: str) -> str:
    """The first paragraph as plain text, cut after a whole sentence, or a whole word, within LONGEST characters."""
    match = _PARAGRAPH.search(html)
    text = plain(match[1]) if match else ""
    if len(text) <= LONGEST:
        return text
    text = text[:LONGEST]
    return text[: text.rfind(". ") + 1] or text[: text.rfind(" ")] + "…"


def plain(html: str) -> str:
    """Text without tags, entities and line ends."""
    return " ".join(html_.unescape(re.sub(r"<[^>]+>", "", html)).split())
