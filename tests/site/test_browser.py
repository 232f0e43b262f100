"""The built site in Chromium: its palettes, search, glossary, wide code, and what a phone leaves for later.

Every page is looked at in test_every_page_on_a_desk.py and test_every_page_on_a_phone.py.
"""

from urllib.parse import urlsplit

import pytest
from documents import base_of
from looking import ALIVE, AT_ONCE, SCHEMES, code_of, still, turn

pytestmark = pytest.mark.timeout(600)  # on a busy machine

COLOURS = """() => [...document.querySelectorAll("body, body *:not(.katex *)")].flatMap((node) =>
  ["", "::before", "::after"].map((part) => {
  const style = getComputedStyle(node, part || null);
  if (part && ["none", "normal"].includes(style.content)) return "";  // it is not there
  const names = ["color", "backgroundColor", "backgroundImage", "fill", "stroke", "opacity", "filter", "boxShadow",
    "borderTopColor", "borderBottomColor", "borderLeftColor", "outlineColor", "textDecorationColor", "colorScheme",
    "display", "visibility"];
  return [node.tagName + "." + node.className + part, ...names.map((name) => style[name])].join("; ");
}))"""


@pytest.mark.browser
@pytest.mark.parametrize(
    "name, size",
    [("index.html", "phone"), ("essay/self_attention/index.html", "desktop"), ("ledger/index.html", "phone")],
)
def test_a_page_that_is_turned_has_the_colours_of_one_that_is_loaded(browser, site, name, size):
    """So a page need not be loaded anew for its second palette."""
    seen = {}
    for first, second in (("light", "dark"), ("dark", "light")):
        context = still(browser, size)
        page = context.new_page()
        page.emulate_media(color_scheme=first)
        page.goto(site + name.removesuffix("index.html"))
        page.evaluate("document.fonts.ready.then(() => 0)")
        assert page.evaluate(ALIVE) == []
        page.wait_for_timeout(300)  # an interactive figure may draw itself once more when it knows its place
        turn(page, first)
        seen[first, "loaded"] = page.evaluate(COLOURS)
        turn(page, second)
        seen[second, "turned"] = page.evaluate(COLOURS)
        context.close()
    for palette in SCHEMES:
        assert seen[palette, "turned"] == seen[palette, "loaded"]
    assert seen["light", "loaded"] != seen["dark", "loaded"]


@pytest.mark.browser
@pytest.mark.parametrize("typed, marked", [("pratyabhijna", "pratyabhijñā"), ("samskara", "saṃskāra")])
def test_search_finds_marked_words_by_plain_letters(home, pages, typed, marked):
    home.keyboard.press("/")
    home.locator(".md-search__input").press_sequentially(typed, delay=20)
    first = home.locator(".md-search-result__item a").first
    first.wait_for(state="visible")
    target = urlsplit(first.get_attribute("href")).path.removeprefix(base_of(pages)).lstrip("/")
    name = target + "index.html" if target in ("",) or target.endswith("/") else target
    assert marked in pages[name].text.lower()


@pytest.mark.browser
def test_a_glossary_term_explains_itself(home, site, pages):
    name = next(name for name, page in pages.items() if "<abbr title" in page.text)
    home.goto(site + name)
    term = home.locator("abbr").first
    term.scroll_into_view_if_needed()
    term.hover()
    tip = home.locator(".md-tooltip2--active, .md-tooltip--active").first
    tip.wait_for(state="visible")
    assert len(tip.inner_text()) > 20


@pytest.mark.browser
def test_the_palette_turns_from_system_to_light_to_dark(home):
    choices = home.locator("form[data-md-component=palette] input")
    media = [choices.nth(i).get_attribute("data-md-color-media") for i in range(3)]
    seen = []
    for now in media:
        home.wait_for_function("media => document.body.dataset.mdColorMedia === media", arg=now)
        seen.append(home.evaluate("document.body.dataset.mdColorScheme"))
        home.locator("form[data-md-component=palette] label:not([hidden])").click()
    assert seen == ["default", "default", "slate"]


TO_THE_END = """async () => {
  const code = document.querySelector("pre > code.more-right");
  const limit = performance.now() + 20_000;
  code.scrollLeft = code.scrollWidth;
  while (code.classList.contains("more-right") && performance.now() < limit)
    await new Promise((resolve) => setTimeout(resolve, 20));
  return code.className;
}"""


@pytest.mark.browser
def test_code_that_is_wide_scrolls_under_an_edge_that_is_shaded_while_there_is_more(browser, site):
    context = still(browser, "phone")
    page = context.new_page()
    page.goto(site + "essay/self_attention/")
    assert sum(one["wide"] for one in code_of(page)) > 5
    assert page.evaluate(TO_THE_END).split() == ["more-left"]
    context.close()


# Code far below a phone's screen, and whether the browser has left it for later.
LATER = """() => {
  const far = [...document.querySelectorAll(".md-content__inner > .highlight")];
  return far.filter((node) => node.getBoundingClientRect().top > 6 * innerHeight)
    .map((node) => !node.firstElementChild.checkVisibility({contentVisibilityAuto: true}));
}"""
TOPS = """async () => {
  await new Promise((resolve) => setTimeout(resolve, 400));
  const blocks = [...document.querySelectorAll(".md-content__inner > *")];
  return blocks.map((node) => node.getBoundingClientRect().top + scrollY);
}"""
THROUGH = """async () => {
  for (let y = 0; y < document.documentElement.scrollHeight; y += innerHeight / 2) {
    scrollTo(0, y);
    await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve, 10)));
  }
  scrollTo(0, 0);
}"""


@pytest.mark.browser
@pytest.mark.parametrize("name", ["essay/self_attention/", "essay/mamba/", "workshop/flash_attention/"])
def test_what_a_phone_leaves_for_later_is_found_in_its_place(browser, site, name):
    """A link into the page and the search of a browser meet what is not laid out yet; print has it all."""
    context = still(browser, "phone")
    page = context.new_page()
    page.goto(site + name)
    later = page.evaluate(LATER)
    assert len(later) > 3 and all(later)
    page.emulate_media(media="print")
    assert not any(page.evaluate(LATER))
    page.emulate_media(media="screen")
    last = page.locator(".md-content__inner > .highlight.alone code").last.text_content()
    line = max(last.splitlines(), key=len).strip()
    assert page.evaluate("line => find(line)", line) and page.evaluate("scrollY > 6 * innerHeight")

    page.goto(site + name)
    for anchor in page.locator(".md-content__inner > h2").evaluate_all("all => all.map((node) => node.id)")[::3]:
        page.goto("about:blank")
        page.goto(f"{site}{name}#{anchor}")
        page.wait_for_timeout(300)
        for _ in range(200):  # on a busy machine what is above may be laid out later
            top = page.locator(f"[id='{anchor}']").evaluate("node => node.getBoundingClientRect().top")
            header = page.locator(".md-header").evaluate("node => node.getBoundingClientRect().bottom")
            end = page.evaluate("scrollY + innerHeight >= document.documentElement.scrollHeight - 2")
            if there := top > header - 1 and (end or top < header + 60):
                break
            page.wait_for_timeout(100)
        assert there, (anchor, top, header)

    page.evaluate(THROUGH)
    seen = page.evaluate(TOPS)
    page.evaluate(AT_ONCE)
    assert page.evaluate(TOPS) == pytest.approx(seen, abs=1.0)
    context.close()


@pytest.mark.browser
def test_a_lost_reader_finds_the_way_home(home, site):
    answer = home.goto(site + "no/such/page/")
    assert answer.status == 404
    assert home.locator("h1").inner_text() == "No such page"
    home.locator(".md-content a", has_text="Home").click()
    home.wait_for_url(site)
