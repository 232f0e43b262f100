"""The one file that knows MkDocs: which step is done at which moment of its build.

The steps themselves are functions of texts and files, in ledger/, pages/ and drawing/, so that another builder of the
site needs another file like this one and no more.
"""

import functools
import gc
import logging
import os
import posixpath
from pathlib import Path

# What the pages run is small: more threads only wait for each other. This is read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"

import markdown_exec
from drawing.notebooks import folder
from drawing.pages import draw_pages, normal
from ledger.agreement import faults
from ledger.claims import OPEN, load, published
from mkdocs.exceptions import PluginError
from pages import downloads, faces, feed, figures, fonts, links, llms, search, social, styles
from pages.page import finish, prepare, publish

log = logging.getLogger("mkdocs.hooks.nondual")
ANEW = bool(os.environ.get("CI") or os.environ.get("NONDUAL_DRAW_ANEW"))  # a clean build takes nothing from the stores


def root_of(config) -> Path:
    return Path(config.docs_dir).parent


_serving = False


def on_startup(command, dirty):
    """`mkdocs serve` adds a script of its own to a page after it is built, which the page's policy would forbid."""
    global _serving
    _serving = command == "serve"
    gc.set_threshold(50_000, 20, 20)  # by default a fifth of the time in which the library's source is read


def on_config(config):
    """Let the notebooks' plugin keep what it executes until the library, or what runs it, changes."""
    if notebooks := config.plugins.get("mkdocs-jupyter"):
        notebooks.config["cache"] = not ANEW
        notebooks.config["cache_dir"] = str(folder(root_of(config)))
    return config


def on_pre_build(config):
    """Stop here if ledger and pages disagree, or a figure's code fails; draw the figures for the pages to come.

    (That the tests agree with the ledger, and pass, is for the tests to say.)
    """
    root = root_of(config)
    if found := faults(root, tests=False):
        raise PluginError("ledger:\n  " + "\n  ".join(found))
    try:
        drawn = draw_pages(root, anew=ANEW, say=log.info)
    except ValueError as error:
        raise PluginError(f"figures:\n\n{error}") from None
    # markdown-exec writes the block of a figure and its code; what the code printed is there already.
    markdown_exec.formatters["python"] = functools.partial(
        markdown_exec.base_format, language="python", run=lambda code, **options: drawn[normal(code)]
    )


def on_page_markdown(markdown, page, config, files):
    return prepare(markdown, page.file.src_uri, root_of(config))


_taken = {}  # what a page lets its reader take away, by its path in the site
_apart = {}  # what its script fetches, likewise


def on_page_content(html, page, config, files):
    uri, root = page.file.src_uri, root_of(config)
    html, taken = downloads.taken_away(finish(html, uri, root), page.file.content_string, uri, root)
    html, apart = figures.with_data_apart(figures.lighter(html))
    _taken.update(taken)
    _apart.update((posixpath.join(links.folder_of(uri), name), text) for name, text in apart.items())
    first = llms.first_paragraph(html)
    page.meta["description"] = page.meta.get("description") or first or config.site_description
    page.meta["thesis"] = first or page.meta["description"]
    page.edit_url = links.edit(uri)
    if config.site_url:
        page.meta["card"] = social.name(uri)
    return html


def on_post_page(output, page, config):
    return published_page(output, page.file.src_uri)


def on_post_template(output_content, template_name, config):
    """404.html, which is no page, has the same frame."""
    return published_page(output_content, template_name) if template_name.endswith(".html") else output_content


def published_page(html, uri):
    try:
        return publish(html, uri, policy=not _serving)
    except ValueError as error:
        raise PluginError(str(error)) from None


_navigation = []


def on_nav(nav, config, files):
    """Keep the pages in the order in which a reader meets them."""
    _navigation[:] = nav.pages
    return nav


def on_post_build(config):
    """Write claims.json, the search index, llms.txt and what other programs ask for; cut the fonts, name those of each
    page's first screen in its head, join the styles."""
    site, root = Path(config.site_dir), root_of(config)
    (site / "claims.json").write_text(published(root), encoding="utf-8")
    for path, text in {**_taken, **_apart}.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text, encoding="utf-8")
    if not os.environ.get("CI"):
        for name in downloads.keep(_taken, root):
            log.info(f"{name} was written anew: commit it")
    if not _serving:
        fonts.cut(site, None if ANEW else root / ".cache" / "fonts")
        faces.ask_early(site)
        styles.join(site)
    rows = [search.Row(one.id, one.gist, one.verdict or OPEN, one.finding or "") for one in load(root)]
    search.complete(site / "search" / "search_index.json", rows)
    entries = [
        llms.Entry(
            page.ancestors[-1].title if page.ancestors else "Pages",
            llms.plain(page.title or config.site_name),
            page.canonical_url,
            page.meta["description"],
        )
        for page in _navigation
    ]
    (site / "llms.txt").write_text(llms.listed(config.site_name, config.site_description, entries), encoding="utf-8")
    if config.site_url:
        write_for_others(config, site)


def write_for_others(config, site):
    """Write what other programs ask a site for: robots.txt, the changelog as a feed, a picture beside a link."""
    (site / "robots.txt").write_text(feed.robots(config.site_url), encoding="utf-8")
    changelog = root_of(config) / "CHANGELOG.md"
    versions = feed.versions(changelog.read_text(encoding="utf-8"))
    told = feed.atom(versions, config.site_url, config.site_name, feed.changed(changelog))
    (site / feed.FEED).write_text(told, encoding="utf-8")
    own_fonts = Path(config.docs_dir) / "assets" / "fonts"
    for page in _navigation:
        if not page.file.src_uri.startswith("reference/"):
            picture = site / social.name(page.file.src_uri)
            picture.parent.mkdir(parents=True, exist_ok=True)
            title = config.site_description.partition(":")[0] if page.is_homepage else llms.plain(page.title)
            picture.write_bytes(social.card(title, page.meta["thesis"], config.site_name, own_fonts))
