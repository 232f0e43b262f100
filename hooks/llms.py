"""Say in a line what each page holds: its description, and llms.txt, the same list for a machine that reads.

A page's description is what its front matter says, or else its first paragraph.
"""

import html as html_
import re
from pathlib import Path

LONGEST = 200
_PARAGRAPH = re.compile(r"<p>(.*?)</p>", re.S)
_PAGES: dict[str, tuple[str, str]] = {}


def on_page_content(html, page, config, files):
    """Describe the page if it does not describe itself."""
    if not page.meta.get("description"):
        page.meta["description"] = first_paragraph(html) or config.site_description
    _PAGES[page.file.src_uri] = (plain(page.title or config.site_name), page.meta["description"])
    return html


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


def on_nav(nav, config, files):
    """Remember the order in which a reader meets the pages."""
    _ORDER[:] = [(section(page), page) for page in nav.pages]
    return nav


_ORDER: list = []


def section(page) -> str:
    """The heading of the navigation under which the page stands."""
    return page.ancestors[-1].title if page.ancestors else config_title(page)


def config_title(page) -> str:
    """Pages that stand alone are listed together."""
    return "Pages"


def on_post_build(config):
    """Write llms.txt."""
    lines, heading = [f"# {config.site_name}", "", f"> {config.site_description}"], None
    for title, page in _ORDER:
        if page.file.src_uri not in _PAGES:
            continue
        if title != heading:
            lines, heading = [*lines, "", f"## {title}", ""], title
        name, description = _PAGES[page.file.src_uri]
        lines.append(f"- [{name}]({page.canonical_url}): {description}")
    Path(config.site_dir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
