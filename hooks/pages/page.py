"""All that is done to one page: to its Markdown before it is converted, to its content after that, and at last to the
whole page as it is published.

All are functions of the text and of the files of the project. Whichever program builds the site calls them.
"""

from pathlib import Path

from ledger.essay_map import with_map
from ledger.stated import with_anchors
from ledger.table import with_tables

from pages import blocks, engines, glossary, mathematics, notebooks, security
from pages.links import linker, to_source


def prepare(markdown: str, uri: str, root: Path) -> str:
    """The page's Markdown with what is generated in it, and with headings over its blocks of code.

    Args:
        markdown: its text.
        uri: its path under docs.
        root: the root of the project.
    """
    link = linker(uri, root / "docs")
    markdown = with_anchors(markdown, uri)
    markdown = with_map(with_tables(markdown, root, link), root, link)
    markdown = engines.with_tables(markdown)
    markdown = blocks.label_code(markdown, root)
    return glossary.with_terms(markdown, glossary.terms(root / "docs"))


def finish(html: str, uri: str, root: Path) -> str:
    """The page's content as it is shown."""
    if uri.endswith(".ipynb"):
        html = notebooks.as_page(html, uri, linker(uri, root / "docs"))
    html = blocks.finish(html, cells=uri.startswith(("reference/", "notebooks/")))
    return to_source(glossary.thinned(html, glossary.terms(root / "docs")), root)


def publish(page: str, uri: str, *, policy: bool = True) -> str:
    """The whole page, its frame included, as it is written to the site.

    Args:
        page: its HTML.
        uri: its path under docs.
        policy: whether it says what a browser may load and run for it.

    Raises:
        ValueError: If a formula cannot be typeset, or a script stands where the policy forbids one; names the page.
    """
    try:
        page = mathematics.typeset(blocks.name_search(page))
        return security.with_policy(page) if policy else page
    except ValueError as error:
        raise ValueError(f"{uri}: {error}") from None
