"""The built site, as a reader's browser and a reader's keyboard meet it.

The first part reads the files in site/ and needs no browser: links, what a page would fetch, what it weighs. The second
loads every page in Chromium at two widths, once at each, and looks at it in both palettes. The last shows that each
check fails when it should.
"""

import contextlib
import json
import os
import re
import shutil
import unicodedata
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from ledger.claims import Claim
from ledger.table import verdicts_html
from pages import blocks, glossary, notebooks, search

ROOT = Path(__file__).parent.parent
SITE = Path(os.environ.get("SITE_DIR", ROOT / "site"))
AXE = Path(__file__).parent / "assets" / "axe.min.js"
SIZES = {"desktop": (1440, 900), "phone": (390, 844)}

# What a page says and what it would fetch


@dataclass(repr=False)
class Document(HTMLParser):
    """One page, read once: its ids, its links, and the addresses a browser would fetch on its own."""

    text: str
    ids: list = field(default_factory=list)
    links: list = field(default_factory=list)
    fetched: list = field(default_factory=list)
    title: str = ""
    description: str = ""
    canonical: str = ""

    def __post_init__(self):
        super().__init__(convert_charrefs=True)
        self._in_title = False
        self.feed(self.text)

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
    return sorted({name for name in page.ids if page.ids.count(name) > 1})


def weight(name: str, page: Document, site: Path) -> int:
    """Bytes of the page and of the scripts, sheets and images that it names (fonts come as the text needs them)."""
    total = len(page.text.encode())
    for address in set(page.fetched):
        if address and not address.startswith(("data:", "#")) and not is_foreign(address):
            path = site / unquote(urlsplit(urljoin("/" + name, address)).path).lstrip("/")
            total += path.stat().st_size if path.is_file() else 0
    return total


@pytest.fixture(scope="module")
def pages():
    if not SITE.exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("site checks skipped: no site/; run `nox -s docs`")
    return read_site(SITE)


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


# In a browser


# The site as a host would serve it: its own 404 page, and the path it is published under. It is run in a process of its
# own, on a free port, so that a server that hangs is ended with its test.
SERVER = """
    import functools, http.server, sys
    from pathlib import Path

    folder, base = sys.argv[1:]

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            return super().translate_path("/" + path.removeprefix(base))

        def send_error(self, code, message=None, explain=None):
            page = Path(self.directory, "404.html")
            if code != 404 or not page.is_file():
                return super().send_error(code, message, explain)
            body = page.read_bytes()
            self.send_response(404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    print("port", server.server_port, flush=True)
    server.serve_forever()
"""


@pytest.fixture(scope="module")
def serve(a_server_of_its_own):
    """A context manager: the address of a server of this folder."""

    @contextlib.contextmanager
    def serving(folder: Path, base: str = "/"):
        with a_server_of_its_own(SERVER, folder, base, ready=r"port (\d+)\n") as found:
            yield f"http://127.0.0.1:{found[1]}{base}"

    return serving


@pytest.fixture(scope="module")
def browser():
    def without(what):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"browser checks skipped: {what}")

    program = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not program:
        without("no Chromium; apt install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        without("no playwright; pip install playwright")
    quiet = [
        "--no-sandbox",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
    ]
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=program, args=quiet, timeout=60_000)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def site(serve, pages):
    with serve(SITE, base_of(pages)) as address:
        yield address


@pytest.fixture
def home(browser, site):
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light")
    context.set_default_timeout(30_000)
    page = context.new_page()
    page.goto(site)
    yield page
    context.close()


LOOK = r"""() => {
  const faults = [];
  for (const image of document.images) if (!image.naturalWidth) faults.push("missing image " + image.src);
  for (const node of document.querySelectorAll(".katex-error")) faults.push("KaTeX: " + node.textContent);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (/\\[(\[]|\$\$/.test(node.data) && !node.parentElement.closest("pre, code, script, style, .katex"))
      faults.push("mathematics not set: " + node.data.trim().slice(0, 60));
  }
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) {
    const sticksOut = (node) => node.getBoundingClientRect().right > width + 1;
    const wide = [...document.querySelectorAll("body *")].filter(sticksOut).pop();
    faults.push("scrolls sideways, for one: " + (wide ? wide.outerHTML.slice(0, 90) : "?"));
  }
  return faults;
}"""

# axe fetches every style sheet once more for one experimental rule, which is off: it preloads sound and film alone.
AXE_RUN = """(rules) => axe.run(document, {
  resultTypes: ["violations"], preload: {assets: ["media"]}, ...(rules && {runOnly: {type: "rule", values: rules}}),
}).then((found) => found.violations
  .filter((v) => ["serious", "critical"].includes(v.impact))
  .map((v) => "axe " + v.id + ": " + v.nodes.slice(0, 3).map((n) => n.target.join(" ")).join(" | ")))"""
OF_COLOUR = ["color-contrast", "link-in-text-block"]  # axe's rules that look at colours

SCHEMES = {"light": "default", "dark": "slate"}
SETTLED = """async (scheme) => {
  const {body} = document, frame = () => new Promise(requestAnimationFrame), limit = performance.now() + 30_000;
  while ("mdColorScheme" in body.dataset && body.dataset.mdColorScheme !== scheme && performance.now() < limit)
    await frame();
  await frame();  // what the new colours set in motion is there only now
  await Promise.all(document.getAnimations().map((motion) => motion.finished.catch(() => 0)));
  return body.dataset.mdColorScheme ?? scheme;
}"""


def turn(page, palette: str) -> None:
    """Turn the page that is shown to a palette, as the reader's system would, and wait until its colours stand."""
    page.emulate_media(color_scheme=palette)
    assert page.evaluate(SETTLED, SCHEMES[palette]) == SCHEMES[palette], f"the page does not turn {palette}"


def faults_of(page, address: str, *, axe: bool = False, palettes: tuple[str, ...] = ("light",)) -> list[str]:
    """What goes wrong when `page` loads `address`: requests elsewhere, errors, failures, and what LOOK and axe see.

    It is loaded in the first palette and turned to the others where it stands; there axe looks at its colours alone.
    """
    faults, host = [], urlsplit(address).netloc

    def on_request(request):
        if urlsplit(request.url).scheme in ("http", "https") and urlsplit(request.url).netloc != host:
            faults.append(f"asks another host: {request.url}")

    def on_response(response):
        if response.status >= 400:
            faults.append(f"{response.status}: {response.url}")

    def on_failure(request):
        if "ERR_ABORTED" not in (request.failure or ""):
            faults.append(f"failed: {request.url}")

    heard = {
        "request": on_request,
        "response": on_response,
        "requestfailed": on_failure,
        "pageerror": lambda error: faults.append(f"script: {error}"),
        "console": lambda message: faults.append(f"console: {message.text}") if message.type == "error" else None,
    }
    for event, listener in heard.items():
        page.on(event, listener)
    page.emulate_media(color_scheme=palettes[0])
    page.goto(address)
    page.evaluate("document.fonts.ready.then(() => 0)")
    if axe:
        page.evaluate(AXE.read_text(encoding="utf-8") + ";0")
    for palette in palettes:
        turn(page, palette)
        seen = page.evaluate(LOOK)
        if axe:
            seen += page.evaluate(AXE_RUN, None if palette == palettes[0] else OF_COLOUR)
        faults += [f"{palette}: {fault}" for fault in seen]
    for event, listener in heard.items():
        page.remove_listener(event, listener)
    return faults


PARTS = 4  # the pages are looked at in so many tests, each within the time limit of one


# A page is loaded in the first and turned to the second, so that each width is the whole test of one palette.
PALETTES = {"desktop": ("light", "dark"), "phone": ("dark", "light")}


def still(browser, size: str):
    """A window of this size, without motion."""
    width, height = SIZES[size]
    viewport = {"width": width, "height": height}
    return browser.new_context(viewport=viewport, reduced_motion="reduce", service_workers="block")


@pytest.mark.browser
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("size", SIZES)
def test_every_page_reads_well(browser, site, pages, size, part):
    context, faults = still(browser, size), {}
    page = context.new_page()
    for name in list(pages)[part::PARTS]:
        found = faults_of(page, site + name.removesuffix("index.html"), axe=True, palettes=PALETTES[size])
        if found:
            faults[name] = found
    context.close()
    assert not faults, "\n".join(f"{name}: {fault}" for name, found in faults.items() for fault in found)


COLOURS = """() => [...document.querySelectorAll("body, body *:not(.katex *)")].flatMap((node) =>
  ["", "::before", "::after"].map((part) => {
  const style = getComputedStyle(node, part || null);
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


@pytest.mark.browser
def test_a_lost_reader_finds_the_way_home(home, site):
    answer = home.goto(site + "no/such/page/")
    assert answer.status == 404
    assert home.locator("h1").inner_text() == "No such page"
    home.locator(".md-content a", has_text="Home").click()
    home.wait_for_url(site)


# The checks themselves


PAGE = (
    '<!doctype html><html lang="en"><head><title>t</title><link rel="icon" href="data:,"></head>'
    '<body><main><h1 id="top">t</h1>{}</main></body></html>'
)
NOWHERE = "http://nowhere.invalid/x.js"


@pytest.fixture
def small(tmp_path):
    """A site of one page with the given body."""

    def make(body, **files):
        (tmp_path / "index.html").write_text(PAGE.format(body), encoding="utf-8")
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text, encoding="utf-8")
        return tmp_path

    return make


@pytest.mark.parametrize(
    "body, check, fault",
    [
        (f'<script src="{NOWHERE}"></script>', foreign, NOWHERE),
        ('<img src="//nowhere.invalid/x.png">', foreign, "nowhere.invalid"),
        ('<p style="background: url(https://nowhere.invalid/x.png)">', foreign, "nowhere.invalid"),
        ("<style>@import 'https://nowhere.invalid/x.css';</style>", foreign, "nowhere.invalid"),
        ('<a href="gone.html">', broken, "gone.html"),
        ('<a href="#gone">', broken, "#gone"),
        ('<img src="gone.png">', broken, "gone.png"),
    ],
)
def test_a_faulty_file_is_caught(small, body, check, fault):
    folder = small(body)
    assert [found for found in check(read_site(folder), folder) if fault in found]


def test_a_faulty_style_sheet_is_caught(small):
    folder = small("", a_css="a { background: url(gone.woff2) } b { background: url(https://nowhere.invalid/x) }")
    pages = read_site(folder)
    assert foreign(pages, folder) and broken(pages, folder)


def test_a_sound_file_passes(small):
    folder = small(
        '<a href="#top">top</a> <a href="https://example.org">a plain link out is the reader\'s own step</a>'
    )
    pages = read_site(folder)
    assert not foreign(pages, folder) and not broken(pages, folder)


@pytest.mark.browser
@pytest.mark.parametrize(
    "body, fault",
    [
        (f'<script src="{NOWHERE}"></script>', "asks another host"),
        ('<script>fetch("http://nowhere.invalid/x").catch(() => 0)</script>', "asks another host"),
        ("<script>console.error('x')</script>", "console: x"),
        ("<script>undefined.x</script>", "script: "),
        ('<script src="gone.js"></script>', "404: "),
        ('<img alt="" src="data:image/png;base64,AAAA">', "missing image"),
        ('<p class="katex-error">\\frac</p>', "KaTeX"),
        ("<p>\\(x\\)</p>", "mathematics not set"),
        ('<p style="width: 900px">wide</p>', "scrolls sideways"),
        ('<p style="color: #999; background: #fff">faint</p>', "axe color-contrast"),
        ('<img src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=">', "axe image-alt"),
    ],
)
def test_a_faulty_page_is_caught(browser, serve, small, body, fault):
    with serve(small(body)) as address, browser.new_page(viewport={"width": 390, "height": 844}) as page:
        assert [found for found in faults_of(page, address, axe=True) if fault in found]


@pytest.mark.browser
@pytest.mark.parametrize("palettes", PALETTES.values(), ids="-".join)
@pytest.mark.parametrize(
    "rule, body, fault",
    [
        ("p { color: #999; background: #fff }", "<p>faint</p>", "axe color-contrast"),
        ("p { color: #000; background: #fff } a { color: #030; text-decoration: none }",
         "<p>a long line of words and <a href='#top'>a link</a> within it</p>", "axe link-in-text-block"),
        ("p { width: 900px }", "<p>wide</p>", "scrolls sideways"),
        ("p { background: url(gone.png) }", "<p>bare</p>", "404: "),
    ],
)  # fmt: skip
def test_a_fault_in_the_dark_alone_is_caught(browser, serve, small, rule, body, fault, palettes):
    """Whether the page is loaded in the dark or turned to it; what is seen there is not said of the light."""
    folder = small(f"<style>@media (prefers-color-scheme: dark) {{ {rule} }}</style>{body}")
    with serve(folder) as address, browser.new_page(viewport={"width": 390, "height": 844}) as page:
        found = faults_of(page, address, axe=True, palettes=palettes)
    assert [one for one in found if fault in one]
    assert all(one.startswith("dark: ") for one in found if "axe" in one or "sideways" in one), found


@pytest.mark.browser
def test_axes_rules_of_colour_are_all_run_in_both_palettes(browser, serve, small):
    """All that its own tag names, but for the stricter contrast of AAA, which is off; all others look at the page."""
    with serve(small("")) as address, browser.new_page() as page:
        faults_of(page, address, axe=True)
        rules = page.evaluate("axe.getRules(['cat.color']).map((rule) => rule.ruleId)")
    assert set(rules) - {"color-contrast-enhanced"} == set(OF_COLOUR)


@pytest.mark.browser
def test_a_sound_page_passes(browser, serve, small):
    folder = small("<p>All is well, <code>\\(x\\)</code> too.</p>")
    with serve(folder) as address, browser.new_page(viewport={"width": 390, "height": 844}) as page:
        assert faults_of(page, address, axe=True) == []


# The hooks that make a page


def test_a_box_is_headed_by_its_word():
    box = '<div class="admonition claim">\n<p class="admonition-title">{}</p>\n</div>'
    assert '<span class="kind">Claim</span></p>' in blocks.name_boxes(box.format("Claim"))
    assert '<span class="kind">Claim</span> <span class="title">A1.4</span></p>' in blocks.name_boxes(
        box.format("A1.4")
    )
    other = '<details class="mkdocstrings-source"><summary>Source code</summary></details>'
    assert blocks.name_boxes(other) == other


def test_the_code_of_a_figure_is_folded_and_other_code_is_not():
    code = '<div class="language-python highlight"><pre><code>x</code></pre></div>'
    assert blocks.fold_drawings(f"<figure></figure>\n{code}\n{code}").count("<details") == 1
    assert "<details" not in blocks.fold_drawings(f"<p></p>{code}")


def test_the_code_of_a_table_is_folded_and_labelled_code_is_not():
    code = '<div class="language-python {}highlight"><pre><code>x</code></pre></div>'
    made = blocks.fold_makings(f"<p></p>{code.format('')}\n{code.format('alone ')}\n{code.format('excerpt no-copy ')}")
    assert made.count("<details") == 1 and made.startswith('<p></p><details class="drawn"')
    drawn = blocks.fold_drawings(f"<figure></figure>\n{code.format('')}")
    assert blocks.fold_makings(drawn) == drawn


def test_a_comma_stays_with_its_short_formula():
    short, long = (
        f'<span class="arithmatex">\\({formula}\\)</span>' for formula in ("N", "s_{01} > s_{02} = s_{20} > s_{21}")
    )
    assert blocks.hold_punctuation(f"of {short}, and") == f'of <span class="held">{short},</span> and'
    assert blocks.hold_punctuation(f"of {short} and {long}.") == f"of {short} and {long}."


def test_a_term_is_marked_once_a_section_and_never_in_a_heading_or_a_link():
    term, field = '<abbr title="x">Spanda</abbr>', '<abbr title="y">{}</abbr>'
    terms = [
        {"term": "spanda", "gloss": "x"},
        {"term": "head", "gloss": "y", "field": "machine learning", "marks": ["head", "heads"]},
    ]
    html = f"<h1>{term}</h1><p>{term} {term}</p><h2>{term}</h2><p><a href='#'>{term}</a> {term} {term}</p>"
    assert glossary.thinned(html, terms).count("<abbr") == 2
    assert glossary.thinned(html, terms).count("<p><abbr") == 1  # in the second section the link is no place for it
    html = f"<p>{field.format('Heads')} {field.format('head')}</p><h2>x</h2><p>{field.format('head')}</p>"
    assert glossary.thinned(html, terms) == html.replace(field.format("head"), "head")


def test_every_term_has_a_gloss_and_a_meaning_and_stands_in_NFC():
    terms = glossary.terms(ROOT / "docs")
    for entry in terms:
        assert set(entry) <= {"term", "field", "script", "lang", "gloss", "meaning", "locus", "marks"}
        assert entry["gloss"] and entry["meaning"] and ("script" in entry) == ("lang" in entry)
        assert ("script" in entry) != (entry.get("field") == "machine learning")
        assert unicodedata.is_normalized("NFC", str(entry))
    marks = [mark for entry in terms for mark in glossary.marks(entry)]
    assert len(marks) == len(set(marks))  # one tooltip a word


def test_the_glossary_page_lists_every_term():
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = glossary.terms(ROOT / "docs")
    listed = glossary.PLACE.sub(lambda m: m["which"], page).splitlines()
    assert {entry.get("field", "traditions") for entry in terms} <= set(listed)


def test_a_block_of_code_says_whether_it_runs_alone():
    snippet = "text\n\n    ```python\n    x = 1\n    ```\n"
    assert '    ``` { .python .alone title="Runs alone" }\n    x = 1' in blocks.label_code(snippet, ROOT)
    figure = '```python exec="on"\nx\n```\n\n```text\nx\n```\n'
    assert blocks.label_code(figure, ROOT) == figure


def test_an_excerpt_names_its_file_and_lines_and_leads_there(tmp_path):
    (tmp_path / "src").mkdir()
    file = tmp_path / "src" / "a_b.py"
    file.write_text("import x\n# --8<-- [start:part]\none\ntwo\n# --8<-- [end:part]\n", encoding="utf-8")
    fence = '```py\n--8<-- "src/a_b.py:part"\n```\n'
    labelled = blocks.label_code(fence, tmp_path)
    assert labelled.startswith('``` { .python .excerpt .no-copy title="From src/a_b.py, lines 3–4" }\n--8<-- "src/')
    html = blocks.link_excerpts('<span class="filename">From src/a_b.py, lines 3–4</span>')
    assert 'src/a_b.py#L3-L4">src/<wbr>a_<wbr>b.py</a>, lines 3–4: an excerpt' in html
    assert "lines 1–5" in blocks.label_code(fence.replace(":part", ""), tmp_path)


def test_the_verdicts_of_a_chapter_are_listed_by_kind():
    """What the home page shows: every verdict of a chapter in the same type, each with a link to where it is said."""
    many = [
        ("A1.1", "holds", "essay/x.md"),
        ("A1.2", "does not hold", "essay/x.md"),
        ("A1.3", "holds", "essay/x.md"),
        ("A2.1", None, None),
    ]
    claims = [Claim(name, "", "", "holds", verdict, chapter=chapter) for name, verdict, chapter in many]
    shown = verdicts_html(claims, ["essay/x.md"], str)
    assert re.sub("<.*?>", "", shown) == "holds A1.1, A1.3 does not hold A1.2"
    assert '<a href="essay/x.md#verdict-A1.3">A1.3</a>' in shown
    assert re.sub("<.*?>", "", verdicts_html(claims, ["essay/x.md", "except", "A1.1"], str)).startswith("holds A1.3 ")
    assert verdicts_html(claims, ["A2.1"], str) == ""  # a claim that is not reached yet has none
    with pytest.raises(ValueError, match=r"A9\.9"):
        verdicts_html(claims, ["A9.9"], str)


def test_every_block_of_code_on_a_page_is_of_a_kind(pages):
    """A block that a reader may take for a program is headed as one, or as an excerpt; figures fold theirs away."""
    for name, page in pages.items():
        if name.startswith(("essay/", "workshop/")) or name == "index.html":
            text = re.sub(r"<details\b.*?</details>", "", page.text, flags=re.S)
            blocks = re.findall(r'<div class="(language-python[^"]*)">(<span class="filename">[^<]+)?', text)
            assert blocks and not [kind for kind, head in blocks if not head], name
            assert all(("alone" in kind) == head.endswith("Runs alone") for kind, head in blocks), name


def test_marked_words_fold_to_plain_letters():
    assert search.folded_words("Saṃskāra, plain, pratyabhijñā प्रकाश") == ["pratyabhijna", "samskara"]


def test_a_notebook_keeps_its_formulas_and_mends_its_quotes():
    assert notebooks.curled("""it's "so": $f'(x)$""") == "it’s “so”: $f'(x)$"
    assert (
        notebooks._MATHS.sub(notebooks.as_maths, "$x$ costs $5") == '<span class="arithmatex">\\(x\\)</span> costs $5'
    )
