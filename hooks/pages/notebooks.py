"""A notebook as a page of this site: its cells in the site's own blocks.

mkdocs-jupyter runs the notebook. What it writes carries half a megabyte of styles, and scripts that ask another host;
this takes out the cells and leaves the rest. Mathematics, quotation marks and links to pages come out as on any page.
"""

import posixpath
import re

from bs4 import BeautifulSoup

from pages.links import Link

PARTS = ".jp-RenderedMarkdown, .jp-Cell-inputArea .highlight-ipynb, .jp-OutputArea-output"
_MATHS = re.compile(r"\$\$(.+?)\$\$|(?<![\\$])\$([^\s$](?:[^$\n]*[^\s$])?)\$", re.S)


def as_page(html: str, uri: str, link: Link) -> str:
    """The page of a notebook, whose path under docs is `uri`."""
    soup = BeautifulSoup(html, "html.parser")
    blocks = [block(part) for part in soup.select(PARTS)]
    source = posixpath.basename(uri)
    blocks.insert(1, f'<p class="download"><a href="{source}" download>Download this notebook</a></p>')
    return linked("\n".join(blocks), uri, link)


def block(part) -> str:
    """One part of a cell: prose, code, what it printed, or what it drew."""
    kinds = part.get("class", [])
    if "highlight-ipynb" in kinds:
        return (
            f'<div class="language-python highlight"><pre><code>{part.pre.decode_contents().strip()}</code></pre></div>'
        )
    if "jp-RenderedText" in kinds:
        return (
            f'<div class="language-text highlight"><pre><code>{part.pre.decode_contents().rstrip()}</code></pre></div>'
        )
    if "jp-RenderedMarkdown" in kinds:
        for anchor in part.select("a.anchor-link"):
            anchor["class"], anchor["title"], anchor.string = "headerlink", "Link to this section", "#"
        for text in part.find_all(string=True):
            if not text.find_parent(["code", "pre"]):
                told = _MATHS.sub(as_maths, curled(str(text.output_ready(formatter="html"))))
                text.replace_with(BeautifulSoup(told, "html.parser"))
    return part.decode_contents()


def as_maths(match: re.Match) -> str:
    """A formula as the mathematics extension marks it on other pages."""
    if match[1] is not None:
        return f'<span class="arithmatex">\\[{match[1]}\\]</span>'
    return f'<span class="arithmatex">\\({match[2]}\\)</span>'


def curled(text: str) -> str:
    """Typographic quotation marks, outside formulas."""
    parts = re.split(r"(\$\$.+?\$\$|\$[^$\n]+\$)", text, flags=re.S)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(^|(?<=[\s(\[]))\"", "“", parts[i]).replace('"', "”")
        parts[i] = re.sub(r"(^|(?<=[\s(\[“]))'", "‘", parts[i]).replace("'", "’")
    return "".join(parts)


def linked(html: str, uri: str, link: Link) -> str:
    """Links to a page's source, `../essay/x.md#y`, as links to the page. ValueError for one that is not there."""

    def address(match: re.Match) -> str:
        path, _, anchor = match[1].partition("#")
        target = link(posixpath.normpath(posixpath.join(posixpath.dirname(uri), path)))
        if target is None:
            raise ValueError(f"{uri}: a link to {path}, which is not there.")
        return f'href="{target}{"#" * bool(anchor)}{anchor}"'

    return re.sub(r'href="([^":]+\.(?:md|ipynb)(?:#[^"]*)?)"(?! download)', address, html)
