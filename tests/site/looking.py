"""A page as a browser shows it, and what is wrong with it: in its requests, its scripts, its layout and its colours."""

import gzip
import time
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from axe import faults_by_axe, load_axe
from documents import SITE
from pages.downloads import FOLDERS

SMALLEST = 10.95  # pixels: the letters of a figure, 11 but for rounding
HEAVIEST = 400  # kB for a first visit, fonts included, as gzip packs them
SIZES = {"desktop": (1440, 900), "phone": (390, 844)}

# A page is loaded in the first and turned to the second, so that each width is the whole test of one palette.
PALETTES = {"desktop": ("light", "dark"), "phone": ("dark", "light")}

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
  for (const text of document.querySelectorAll("figure svg text")) {
    const seen = text.checkVisibility() && text.getScreenCTM(), said = text.textContent.trim().slice(0, 60);
    const letters = (node) => node.nodeType === 3 && node.data.trim();
    const parts = [text, ...text.querySelectorAll("tspan")].filter((part) => [...part.childNodes].some(letters));
    if (!seen || !parts.length) continue;
    const largest = Math.max(...parts.map((part) => parseFloat(getComputedStyle(part).fontSize)));  // not an index
    const size = largest * Math.hypot(seen.a, seen.b);
    if (size < SMALLEST) faults.push(`letters of ${size.toFixed(1)} pixels in a figure: ${said}`);
  }
  return faults;
}""".replace("SMALLEST", str(SMALLEST))

# What the page's policy forbids it to load or run is heard from its first moment on.
LISTEN = """
  if (!window.refused) {
    window.refused = [];
    document.addEventListener("securitypolicyviolation", (e) =>
      refused.push(`refused by its policy: ${e.effectiveDirective} ${e.blockedURI} ${e.sample}`.trim()));
  }
"""

# What moved while the page came, as browsers sum it up: 0 is still, and more than 0.1 is called poor.
MOST_MOVED = 0.02
MOVED = """() => new Promise((resolve) => {
  const describe = ({node}) => ((node?.nodeType === 3 ? node.parentNode : node)?.outerHTML ?? "?").slice(0, 60);
  let sum = 0;
  const moved = [];
  new PerformanceObserver((list) => {
    for (const shift of list.getEntries()) {
      if (shift.hadRecentInput) continue;
      sum += shift.value;
      moved.push(...shift.sources.map(describe));
    }
  }).observe({type: "layout-shift", buffered: true});
  setTimeout(() => resolve([sum, moved.slice(0, 3).join(" | ")]), 100);
})"""

# An interactive figure is drawn first and comes alive when its script has run.
ALIVE = """async () => {
  const limit = performance.now() + 20_000, still = () => document.querySelectorAll("figure[data-live]:not(.alive)");
  while (still().length && performance.now() < limit) await new Promise((resolve) => setTimeout(resolve, 20));
  return [...still()].map((figure) => `an interactive figure stays a drawing: ${figure.id}`);
}"""

# A phone leaves what is far below its screen for later (content-visibility). To look at a whole page, all is laid out.
AT_ONCE = """async () => {
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(".md-content * { content-visibility: visible !important; }");
  document.adoptedStyleSheets.push(sheet);
  dispatchEvent(new Event("resize"));  // upon which the page measures what scrolls sideways
  for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);
  await document.fonts.ready;
}"""

# Code in folds is looked at too.
UNFOLD = """() => { for (const fold of document.querySelectorAll("details")) fold.open = true; }"""
CODE = """async () => {
  const look = () => [...document.querySelectorAll(".highlight:is(.alone, .excerpt) pre > code")].map((code) => {
  const wide = code.scrollWidth > code.clientWidth + 1, shown = getComputedStyle(code).boxShadow !== "none";
  const columns = Math.max(...code.textContent.split("\\n").map((line) => line.length));
  return {columns, wide, shown, reached: code.tabIndex === 0};
  });
  const differ = ({wide, shown, reached}) => wide !== shown || wide !== reached, limit = performance.now() + 20_000;
  let seen = look();  // once the page's script has heard of the folds
  while (seen.some(differ) && performance.now() < limit) {
    await new Promise((resolve) => setTimeout(resolve, 50));
    seen = look();
  }
  return seen;
}"""

# Two frames later, all that the page shows has been asked for; the answers may take longer.
DRAWN = "new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(() => resolve(0))))"
MOST_PATIENCE = 20  # seconds for them

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


def faults_of(
    page, address: str, *, axe: bool = False, palettes: tuple[str, ...] = ("light",), every_text: bool = True
) -> list[str]:
    """What goes wrong when `page` loads `address`: requests elsewhere, errors, failures, what the page's policy
    refuses, what moves while the page comes, and what LOOK and axe see.

    It is loaded in the first palette and turned to the others where it stands. All of axe's rules are asked in the
    first; in the others those of colour, for each look of a text that has not passed in this palette yet. So they are
    in the first too where `every_text` is false.
    """
    faults, host, unanswered = [], urlsplit(address).netloc, set()

    def on_request(request):
        unanswered.add(request)
        if urlsplit(request.url).scheme in ("http", "https") and urlsplit(request.url).netloc != host:
            faults.append(f"asks another host: {request.url}")

    def on_response(response):
        if response.status >= 400:
            faults.append(f"{response.status}: {response.url}")

    def on_failure(request):
        unanswered.discard(request)
        if "ERR_ABORTED" not in (request.failure or ""):
            faults.append(f"failed: {request.url}")

    heard = {
        "request": on_request,
        "response": on_response,
        "requestfinished": lambda request: unanswered.discard(request),
        "requestfailed": on_failure,
        "pageerror": lambda error: faults.append(f"script: {error}"),
        "console": lambda message: faults.append(f"console: {message.text}") if message.type == "error" else None,
    }
    for event, listener in heard.items():
        page.on(event, listener)
    page.add_init_script(LISTEN)
    page.emulate_media(color_scheme=palettes[0])
    page.goto(address)
    page.evaluate("document.fonts.ready.then(() => 0)")
    faults += page.evaluate(ALIVE)
    moved, what = page.evaluate(MOVED)
    if moved > MOST_MOVED:
        faults.append(f"moves by {moved:.3f} while it comes: {what}")
    page.evaluate(AT_ONCE)
    if axe:
        load_axe(page)
    for palette in palettes:
        turn(page, palette)
        seen = page.evaluate(LOOK)
        if axe:
            first = palette == palettes[0]
            seen += faults_by_axe(page, palette, all_rules=first, every_text=first and every_text)
        faults += [f"{palette}: {fault}" for fault in seen]
        page.evaluate(DRAWN)  # what only this palette shows has been asked for by now
    patience = time.monotonic() + MOST_PATIENCE
    while unanswered and time.monotonic() < patience:
        page.wait_for_timeout(20)
    faults += [f"no answer: {request.url}" for request in unanswered]
    faults += page.evaluate("refused")
    for event, listener in heard.items():
        page.remove_listener(event, listener)
    return faults


def code_of(page) -> list[dict]:
    """Of each block of code of the page that is shown: the longest line in columns, whether it is too wide for its
    place, whether an edge is shaded, and whether the keyboard reaches it. The page's folds are opened.
    """
    page.evaluate(UNFOLD)
    page.evaluate(AT_ONCE)
    return page.evaluate(CODE)


def faults_of_code(page, size: str) -> list[str]:
    """Code that is wide without a shaded edge or out of the keyboard's reach; on a desk, 88 columns that do not fit."""
    faults = []
    for one in code_of(page):
        if not one["wide"] == one["shown"] == one["reached"]:
            faults.append(f"code: {one}")
        if size == "desktop" and one["columns"] <= 88 and one["wide"]:
            faults.append(f"code of {one['columns']} columns does not fit")
    return faults


def faults_of_pages(browser, site: str, names: list[str], size: str) -> dict[str, list[str]]:
    """What is wrong with these pages of the site. Each is loaded once, and looked at in both palettes.

    Texts lie over each other or do not in both palettes alike: axe looks at every text of a page once, on a desk.
    """
    context, faults = still(browser, size), {}
    page = context.new_page()
    for name in names:
        address, desk = site + name.removesuffix("index.html"), size == "desktop"
        found = faults_of(page, address, axe=True, palettes=PALETTES[size], every_text=desk)
        weight = weight_of(page, SITE, site) / 1000
        if weight > HEAVIEST:  # faces that the page before asked for may be among it
            alone = still(browser, size)
            first = alone.new_page()
            faults_of(first, address, axe=False, palettes=PALETTES[size], every_text=False)
            weight = weight_of(first, SITE, site) / 1000
            alone.close()
        print(f"{weight:8.0f} kB  {name}")  # shown with -s, and when the check fails
        if weight > HEAVIEST:
            found.append(f"a first visit weighs {weight:.0f} kB")
        if name.startswith(FOLDERS):
            found += faults_of_code(page, size)
        if found:
            faults[name] = found
    context.close()
    return faults


def weight_of(page, folder: Path, address: str) -> int:
    """Bytes on the way to a reader who sees the site for the first time: the page shown and all that it has fetched.

    Args:
        page: a window that shows a page of the site.
        folder: the site's files.
        address: the site's address.
    """
    fetched = page.evaluate("[location.href, ...performance.getEntriesByType('resource').map((one) => one.name)]")
    paths = {unquote(urlsplit(one).path.removeprefix(urlsplit(address).path)) for one in fetched}
    files = [folder / (path + "index.html" if path == "" or path.endswith("/") else path) for path in paths]
    return sum(packed(file) for file in files if file.is_file())


@cache
def packed(file: Path) -> int:
    """Bytes of a file as a host sends it: compressed by gzip, where that makes it smaller."""
    whole = file.read_bytes()
    return min(len(whole), len(gzip.compress(whole, 6)))


def still(browser, size: str):
    """A window of this size, without motion."""
    width, height = SIZES[size]
    viewport = {"width": width, "height": height}
    return browser.new_context(viewport=viewport, reduced_motion="reduce", service_workers="block")
