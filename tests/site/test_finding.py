"""How the site is found: rows of the ledger, links to the source, titles, pictures beside links, feed, robots.txt."""

import re
import struct
import xml.etree.ElementTree as ElementTree
from html import unescape

import pytest
from documents import ROOT, SITE
from ledger.claims import load
from pages import feed, links, social

NAMED = {
    "essay/flash_attention/index.html": "Mushin: flash attention - nondual",
    "ledger/index.html": "Ledger - nondual",
    "index.html": "nondual: attention, checked claim by claim",
}
WHOLE = ("og:title", "og:description", "og:url", "og:image", "twitter:card", "twitter:title", "twitter:image")
ATOM = "{http://www.w3.org/2005/Atom}"


def metas(text: str) -> dict[str, str]:
    """What the page's head says of it, by name or property."""
    found = re.findall(r'<meta (?:name|property)="([^"]+)" content="([^"]*)"', text)
    return {name: unescape(content) for name, content in found}


# --- in the ledger -------------------------------------------------------------------------------------------------


def test_each_claim_has_a_row_with_a_link_to_itself(pages):
    page = pages["ledger/index.html"]
    for claim in load(ROOT):
        assert page.ids.count(claim.id) == 1 and f"#{claim.id}" in page.links, claim.id


def test_each_test_of_the_ledger_leads_to_its_line(pages):
    linked = 0
    for address in pages["ledger/index.html"].links:
        if m := re.fullmatch(re.escape(links.REPOSITORY) + r"/blob/main/(tests/[\w/.]+)#L(\d+)", address):
            line = (ROOT / m[1]).read_text(encoding="utf-8").splitlines()[int(m[2]) - 1]
            assert re.match(r"\s*def test_", line), address
            linked += 1
    assert linked == sum(len(claim.test) for claim in load(ROOT))


@pytest.mark.browser
def test_on_a_phone_each_card_of_the_ledger_shows_its_verdict_beside_its_id(browser, site):
    context = browser.new_context(viewport={"width": 390, "height": 844}, reduced_motion="reduce")
    context.set_default_timeout(30_000)
    page = context.new_page()
    page.goto(site + "ledger/")
    boxes = page.evaluate("""() => [...document.querySelectorAll("tr[data-verdict]")].map((row) => {
      const id = row.querySelector(".ledger-id").getBoundingClientRect(), cell = row.querySelector(".ledger-verdict");
      const box = cell.getBoundingClientRect();
      return [id.top, box.top, box.left, box.right, box.height, parseFloat(getComputedStyle(cell).fontSize)];
    })""")
    context.close()
    assert len(boxes) >= 151
    for top, verdict, left, right, height, size in boxes:
        assert abs(top - verdict) < 2 and 0 < left < right <= 390 and height > 10 and size >= 11


# --- the pages' heads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_a_page_is_named_by_what_it_is_about(pages, name):
    assert pages[name].title.strip() == NAMED[name]


def test_each_page_says_what_a_link_to_it_shall_show(pages):
    home = pages["index.html"].canonical
    for name, page in pages.items():
        if name != "404.html":
            said = metas(page.text)
            assert not [key for key in WHOLE if not said.get(key)], name
            assert said["og:url"] == page.canonical and said["og:description"] == page.description
            assert (SITE / said["og:image"].removeprefix(home)).is_file(), name


def test_each_chapter_has_a_picture_of_its_own_of_the_usual_size(pages):
    drawn = {}
    for name, page in pages.items():
        if name.startswith(("essay/", "workshop/", "guides/")) or name == "index.html":
            picture = SITE / metas(page.text)["og:image"].removeprefix(pages["index.html"].canonical)
            head = picture.read_bytes()[:24]
            assert struct.unpack(">II", head[16:]) == (social.WIDTH, social.HEIGHT)
            assert picture.stat().st_size < 60_000
            drawn[name] = picture.read_bytes()
    assert len(set(drawn.values())) == len(drawn)


def test_a_picture_is_the_same_whenever_it_is_drawn():
    fonts = ROOT / "docs" / "assets" / "fonts"
    draw = social.card.__wrapped__
    once = draw("Pratyabhijñā: self-attention", "A sequence looks at itself.", "nondual", fonts)
    assert once == draw("Pratyabhijñā: self-attention", "A sequence looks at itself.", "nondual", fonts)
    assert once != draw("Mushin: flash attention", "A sequence looks at itself.", "nondual", fonts)


def test_the_reference_shares_the_picture_of_home():
    assert social.name("reference/ops/masks.md") == social.name("index.md") == "assets/cards/index.png"
    assert social.name("essay/mamba.md") == "assets/cards/essay-mamba.png"


# --- to the repository ---------------------------------------------------------------------------------------------


def test_a_page_that_is_written_by_hand_can_be_edited(pages):
    for name, page in pages.items():
        offered = [address for address in page.links if "/edit/main/" in address]
        made = name.startswith(("reference/", "notebooks/", "ledger/", "map/")) or name == "404.html"
        assert len(offered) == (0 if made else 1), name
        assert all((ROOT / address.partition("/edit/main/")[2]).is_file() for address in offered), name


def test_a_file_that_a_page_names_leads_to_the_repository(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_x.py").write_text("import x\n\n\nclass Y:\n    def test_y(self):\n        pass\n")
    where = f"{links.REPOSITORY}/blob/main/tests/test_x.py"
    code = "<code>tests/test_x.py{}</code>"
    assert links.to_source(code.format(""), tmp_path) == f'<a href="{where}">{code.format("")}</a>'
    assert f'href="{where}#L5"' in links.to_source(code.format("::Y::test_y"), tmp_path)
    for unchanged in (
        "<code>tests/gone.py</code>",
        f'<a href="y">{code.format("")}</a>',
        f"<pre>{code.format('')}</pre>",
        f"<summary>{code.format('')}</summary>",  # it opens something else
    ):
        assert links.to_source(unchanged, tmp_path) == unchanged


# --- for other programs --------------------------------------------------------------------------------------------

CHANGELOG = """# Changelog

## [Unreleased]

### Added

- A `thing` with
  two lines & a [link](https://example.org).

## [0.2.0] - 2026-01-02

### Changed

- **A1.4** holds.

### Fixed

- Nothing.
"""


def address_of(entry) -> str:
    """Where an entry of the feed leads."""
    link = entry.find(f"{ATOM}link")
    assert link is not None
    return link.get("href", "")


def test_the_feed_has_an_entry_for_each_version():
    found = feed.versions(CHANGELOG)
    assert [(one.name, one.date) for one in found] == [("Unreleased", None), ("0.2.0", "2026-01-02")]
    assert found[1].lists == {"Changed": ["**A1.4** holds."], "Fixed": ["Nothing."]}
    root = ElementTree.fromstring(feed.atom(found, "https://example.org/x/", "x", "2026-03-04T05:06:07+00:00"))
    assert root.findtext(f"{ATOM}updated") == "2026-03-04T05:06:07+00:00"
    first, second = root.findall(f"{ATOM}entry")
    assert "<code>thing</code> with two lines &amp; a <a href=" in first.findtext(f"{ATOM}content", "")
    assert address_of(second) == "https://example.org/x/changelog/#020-2026-01-02"
    assert second.findtext(f"{ATOM}updated") == "2026-01-02T00:00:00+00:00"


def test_the_built_feed_leads_to_the_versions_on_their_page(pages):
    home = pages["index.html"].canonical
    root = ElementTree.parse(SITE / feed.FEED).getroot()
    entries = root.findall(f"{ATOM}entry")
    assert len(entries) == len(feed.versions((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))) >= 1
    for entry in entries:
        path, _, anchor = address_of(entry).removeprefix(home).partition("#")
        assert anchor in pages[path + "index.html"].ids
    assert all(
        f'href="{"../" * name.count("/")}{feed.FEED}"' in page.text
        for name, page in pages.items()
        if name != "404.html"
    )


def test_robots_may_read_all_and_are_told_where_the_list_of_pages_is(pages):
    told = (SITE / "robots.txt").read_text(encoding="utf-8")
    assert "Allow: /\n" in told and f"Sitemap: {pages['index.html'].canonical}sitemap.xml\n" in told
