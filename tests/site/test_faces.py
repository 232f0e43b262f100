"""The head of each page names the faces of its first screen, and no others."""

import re

import pytest
from documents import ROOT
from pages import faces

SHEET = (ROOT / "docs/assets/css/fonts.css").read_text(encoding="utf-8")
FACES = list(faces.faces_of(SHEET))
ALWAYS = ["source-sans-3-latin-400-normal.woff2", "source-sans-3-latin-600-normal.woff2"]


def article(content):
    return f"<nav>ā</nav><article>{content}</article><p>ā</p>"


def test_the_faces_of_a_sheet_are_read():
    (face,) = faces.faces_of(
        '@font-face { font-family: "A"; font-style: italic; font-weight: 600; font-display: swap;\n'
        "  src: url(../fonts/a.woff2) format('woff2');\n  unicode-range: U+41-43, U+3bb; }"
        '@font-face { font-family: "B"; src: local("B"); size-adjust: 98%; }'
    )
    assert face[:4] == ("A", "italic", "600", "a.woff2")
    assert [each for each in "@ABCDλμ" if each in face] == ["A", "B", "C", "λ"]


@pytest.mark.parametrize(
    ("content", "files"),
    [
        ("<p>a</p>", ["source-serif-4-latin-400-normal"]),
        (
            "<p><em>a</em><br><strong>b</strong></p>",
            ["source-serif-4-latin-400-italic", "source-serif-4-latin-600-normal"],
        ),
        ("<p><em>ā</em></p>", ["source-serif-4-latin-ext-400-italic"]),
        ("<p>&#257;</p>", ["source-serif-4-latin-ext-400-normal"]),
        (
            "<h2>ñ <code>a</code></h2><pre>a</pre>",
            ["source-code-pro-latin-600-normal", "source-code-pro-latin-400-normal"],
        ),
        (
            "<figure><svg><text>α</text></svg><figcaption>a<em>b</em></figcaption></figure>",
            ["source-sans-3-latin-400-italic"],
        ),
        ("<p><em>आ</em></p>", ["noto-serif-devanagari-devanagari-400-normal"]),
        ("<details><summary>a</summary><p>a</p></details>", []),
        ("<details open><summary>a</summary><p>a</p></details>", ["source-serif-4-latin-400-normal"]),
        ('<p class="admonition-title">a</p><p><span class="katex">a</span></p>', []),
        ("<p><em>a</p><p>b</p>", ["source-serif-4-latin-400-italic", "source-serif-4-latin-400-normal"]),
    ],
)
def test_a_page_needs_what_its_elements_are_set_in(content, files):
    found = [face.file for face in faces.needed(article(content), FACES)]
    wanted = ALWAYS + [f"{name}.woff2" for name in files]
    assert found == sorted(wanted, key=lambda name: not name.startswith("source-serif"))


def test_what_is_below_the_first_screen_is_not_asked_for():
    page = article("<p>abc</p><p>ā</p>")
    assert {one.character for one in faces.letters(page, most=3)} == set("abc")
    assert "ā" in {one.character for one in faces.letters(page, most=4)}


def test_the_links_stand_beside_the_one_that_a_page_has_and_those_of_its_text_come_first(tmp_path):
    (tmp_path / "assets/css").mkdir(parents=True)
    (tmp_path / "assets/css/fonts.css").write_text(SHEET, encoding="utf-8")
    own = '<link rel="preload" as="font" crossorigin href="../assets/fonts/source-serif-4-latin-400-normal.woff2">'
    (tmp_path / "page.html").write_text(own + article("<p>a <em>a</em></p>"), encoding="utf-8")
    (tmp_path / "bare.html").write_text(article("<p>a</p>"), encoding="utf-8")
    faces.ask_early(tmp_path)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    asked = re.findall(r'crossorigin href="../assets/fonts/([^"]+)"', page)
    assert asked == ["source-serif-4-latin-400-normal.woff2", "source-serif-4-latin-400-italic.woff2", *ALWAYS]
    assert page.count(' fetchpriority="low">') == len(ALWAYS)
    assert (tmp_path / "bare.html").read_text(encoding="utf-8") == article("<p>a</p>")


FETCHED = """() => document.fonts.ready.then(() => performance.getEntriesByType("resource").map((one) => one.name))"""


@pytest.mark.browser
def test_no_face_is_asked_for_in_vain(browser, site, pages):
    """Without the links, a browser fetches each of these faces as well."""
    chapters = [name for name in pages if re.fullmatch(r"essay/\w+/index\.html|index\.html", name)]
    assert len(chapters) > 20
    context = browser.new_context(viewport={"width": 1440, "height": 900}, service_workers="block")
    page = context.new_page()
    for name in chapters:
        text = re.sub(r'<link rel="preload" as="font"[^>]*>', "", pages[name].text)
        asked = re.findall(r'<link rel="preload" as="font"[^>]*href="[^"]*/([^"/]+)"', pages[name].text)
        address = site + name.removesuffix("index.html")
        page.route(
            address, lambda route, _, text=text: route.fulfill(body=text, content_type="text/html; charset=utf-8")
        )
        page.goto(address)
        fetched = page.evaluate(FETCHED)
        page.unroute(address)
        assert len(asked) > 3 and len(asked) == len(set(asked)), name
        assert set(asked) <= {one.rsplit("/", 1)[-1] for one in fetched}, name
    context.close()
