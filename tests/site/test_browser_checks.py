"""The checks of a page in a browser fail when they should."""

import time
from collections import Counter

import pytest
from axe import ASKED, OF_COLOUR, TIMES
from looking import PALETTES, faults_of
from pages.security import with_policy

NOWHERE = "http://nowhere.invalid/x.js"
LINK = "a long line of words and <a href='#top'>a link</a> within it"


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
        (
            '<figure><svg viewBox="0 0 20 20" width="10"><text y="9" font-size="15">x</text></svg></figure>',
            "letters of 7.5",
        ),
        (
            f"<p id='late'></p><p>{'moved ' * 300}</p>"
            "<script>onload = () => setTimeout(() => { late.style.height = '300px' }, 50)</script>",
            "moves by ",
        ),
        ('<p style="color: #999; background: #fff">faint</p>', "axe color-contrast"),
        ('<img src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=">', "axe image-alt"),
    ],
)
def test_a_faulty_page_is_caught(browser, serve, small, body, fault):
    with serve(small(body)) as address, browser.new_page(viewport={"width": 390, "height": 844}) as page:
        assert [found for found in faults_of(page, address, axe=True) if fault in found]


@pytest.mark.browser
@pytest.mark.parametrize(
    "body, fault",
    [
        ("<script>late()</script>", "script-src-elem inline"),
        ('<img alt="" src="https://nowhere.invalid/x.png">', "img-src https://nowhere.invalid"),
        ('<script src="x.js"></script>', "connect-src https://nowhere.invalid"),
        ('<div id="x"></div><script src="y.js"></script>', "script-src-attr inline"),
    ],
)
def test_what_a_pages_policy_refuses_is_caught(browser, serve, small, body, fault):
    """Also what its scripts ask for; the policy is the site's own."""
    scripts = {
        "x_js": 'fetch("https://nowhere.invalid/x").catch(() => 0)',
        "y_js": 'document.getElementById("x").innerHTML = "<img alt src=data:, onerror=late()>"',
    }
    folder = small(body, **scripts)
    page = (folder / "index.html").read_text(encoding="utf-8")
    page = with_policy(page.replace(body, "")).replace("</h1>", f"</h1>{body}")
    (folder / "index.html").write_text(page, encoding="utf-8")
    with serve(folder) as address, browser.new_page() as shown:
        found = faults_of(shown, address)
    assert [one for one in found if one.startswith("refused by its policy: ") and fault in one], found


@pytest.mark.browser
@pytest.mark.parametrize("palettes", PALETTES.values(), ids="-".join)
@pytest.mark.parametrize(
    "rule, body, fault",
    [
        ("p { color: #999; background: #fff }", "<p>faint</p>", "axe color-contrast"),
        ("p { color: #000; background: #fff } a { color: #030; text-decoration: none }",
         f"<p>{LINK}</p>", "axe link-in-text-block"),
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
def test_a_fault_that_comes_late_is_waited_for(browser, serve, small):
    """On a busy machine an answer may come after everything else was looked at."""
    folder = small("<style>@media (prefers-color-scheme: dark) { p { background: url(gone.png) } }</style><p>bare</p>")

    def late(route):
        time.sleep(1)
        route.fulfill(status=404)

    with serve(folder) as address, browser.new_page() as page:
        page.route("**/gone.png", late)
        found = faults_of(page, address, palettes=("light", "dark"))
    assert [one for one in found if "404: " in one]


@pytest.mark.browser
def test_axes_rules_of_colour_are_all_run_in_both_palettes(browser, serve, small):
    """All that its own tag names, but for the stricter contrast of AAA, which is off; all others look at the page."""
    with serve(small("")) as address, browser.new_page() as page:
        faults_of(page, address, axe=True)
        rules = page.evaluate("axe.getRules(['cat.color']).map((rule) => rule.ruleId)")
    assert set(rules) - {"color-contrast-enhanced"} == set(OF_COLOUR)


@pytest.mark.browser
@pytest.mark.parametrize("palettes", PALETTES.values(), ids="-".join)
def test_each_look_of_a_text_is_asked_about_until_it_has_passed(browser, serve, small, monkeypatch, palettes):
    """What passed is known on the next page; the same colour over another background, or of a link, is another look."""
    for palette in palettes:
        monkeypatch.setitem(ASKED, palette, Counter())
    bodies = {
        "sound": "<p style='color: #757575; background: #fff'>plain</p>",
        "on grey": "<p style='color: #757575; background: #ddd'>faint</p>",
        "behind": "<div style='background: #ddd'><p style='color: #757575'>faint</p></div>",
        "veiled": "<p style='color: #757575; background: #fff; opacity: 0.7'>faint</p>",
        "a link": f"<style>a {{ text-decoration: none; color: #030 }} p {{ background: #fff }}</style><p>{LINK}</p>",
    }
    faults, asked = {}, []
    with browser.new_page(viewport={"width": 390, "height": 844}) as page:
        for name in ("sound", "sound", "on grey", "on grey", "behind", "veiled", "a link"):
            with serve(small(bodies[name])) as address:
                faults[name] = faults_of(page, address, axe=True, palettes=palettes, every_text=False)
            asked.append([sum(ASKED[palette].values()) for palette in palettes])
    assert faults.pop("sound") == [] and asked[0] == asked[1] and min(asked[0]) >= TIMES
    for name, found in faults.items():
        rule = "axe link-in-text-block" if name == "a link" else "axe color-contrast"
        assert [one.partition(": ")[0] for one in found if rule in one] == list(palettes), (name, found)


@pytest.mark.browser
def test_a_sound_page_passes(browser, serve, small):
    folder = small("<p>All is well, <code>\\(x\\)</code> too.</p>")
    with serve(folder) as address, browser.new_page(viewport={"width": 390, "height": 844}) as page:
        assert faults_of(page, address, axe=True) == []
