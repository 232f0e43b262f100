"""The files of the built site: links, what a page would fetch, what it weighs. No browser is needed."""

import json
import re

import pytest
from documents import SITE, broken, foreign, twice, weight


def test_nothing_is_fetched_from_another_host(pages):
    assert not foreign(pages, SITE)


def test_every_link_anchor_and_image_is_there(pages):
    assert not broken(pages, SITE)


def test_every_page_has_a_title_and_a_description(pages):
    assert not [name for name, page in pages.items() if not page.title.strip() or not page.description.strip()]


def test_an_id_is_used_once_a_page(pages):
    assert not {name: twice(page) for name, page in pages.items() if twice(page)}


@pytest.mark.parametrize("name", ["404.html", "sitemap.xml", "llms.txt", "claims.json", "search/search_index.json"])
def test_the_site_has(pages, name):
    assert (SITE / name).stat().st_size > 100


def test_llms_txt_lists_every_page_with_a_line(pages):
    listed = re.findall(r"^- \[.+\]\((.+)\): .+$", (SITE / "llms.txt").read_text(encoding="utf-8"), re.M)
    wanted = [page.canonical for name, page in pages.items() if name != "404.html" and page.canonical]
    assert sorted(listed) == sorted(wanted)


def test_plain_letters_are_in_the_search_index(pages):
    index = json.loads((SITE / "search" / "search_index.json").read_text(encoding="utf-8"))
    glossary = " ".join(
        entry["title"] + entry["text"] for entry in index["docs"] if entry["location"].startswith("glossary/")
    )
    assert "saṃskāra" in glossary and "samskara" in glossary


def test_no_page_is_heavy(pages):
    weights = {name: weight(name, page, SITE) / 1024 for name, page in pages.items()}
    for name, kib in sorted(weights.items(), key=lambda item: -item[1]):
        print(f"{kib:8.0f} KiB  {name}")  # shown with -s, and when the check fails
    limit = {name: 2048 if "notebooks/" in name else 1024 for name in weights}
    assert not [name for name, kib in weights.items() if kib > limit[name]]


def test_every_block_of_code_on_a_page_is_of_a_kind(pages):
    """A block that a reader may take for a program is headed as one, or as an excerpt; figures fold theirs away."""
    for name, page in pages.items():
        if name.startswith(("essay/", "workshop/")) or name == "index.html":
            text = re.sub(r"<details\b.*?</details>", "", page.text, flags=re.S)
            blocks = re.findall(r'<div class="(language-python[^"]*)">(<span class="filename">[^<]+)?', text)
            none = "_texts/" in name or name == "essay/what_stood/index.html"  # on texts, and on what others ran
            assert blocks or none, name
            assert not [kind for kind, head in blocks if not head], name
            assert all(("alone" in kind) == head.endswith("Complete: copy and run") for kind, head in blocks), name
