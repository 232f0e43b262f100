"""The joined style sheet says for the site's pages what the sheets that it replaces said."""

import re
from pathlib import Path

import material
import pytest
import tinycss2
from documents import ROOT, SITE
from pages import styles

THEME = sorted((Path(material.__file__).parent / "templates/assets/stylesheets").glob("*.min.css"))
OURS = sorted((ROOT / "docs/assets/css").glob("*.css"))


class Every:
    """Every word there is."""

    def __contains__(self, name):
        return True


def short(sheet, page="", script=""):
    return styles.shortened(sheet, styles.Words([page], [script])).replace("\n", "")


@pytest.mark.parametrize(
    ("sheet", "kept"),
    [
        (".in { a: b } .out { a: b }", ".in{a: b}"),
        (".in, .out > p, p.in:hover { a: b }", ".in,p.in:hover{a: b}"),
        ("#in a, #out a, p { a: b }", "#in a,p{a: b}"),
        (":is(.out, .in), p:not(.out), [href='.out'] { a: b }", ":is(.out, .in),p:not(.out),[href='.out']{a: b}"),
        (".tab--next, .tab { a: b }", ".tab--next{a: b}"),  # a script makes tab--next
        ("@media print { .out { a: b } .in { a: b } }", "@media print{.in{a: b}}"),
        ("@media print { .out { a: b } }", ""),
        ("@supports (a: b) { @media print { .in { a: b } } }", "@supports (a: b){@media print{.in{a: b}}}"),
        ("@font-face { src: url(a.woff2) }", "@font-face{src: url(a.woff2)}"),
        ("@charset 'utf-8'; .in { a: b }", "@charset 'utf-8';.in{a: b}"),
        ('/* .in { */ .in { a: "} /* " }', '.in{a: "} /* "}'),
        (".in { a: url(data:x;{) }", ".in{a: url(data:x;{)}"),
        (".in { --x: 1; --y: var(--z); --z: 2; a: var(--y) }", ".in{--y: var(--z); --z: 2; a: var(--y)}"),
        (".in { --x: var(--y) } p { --y: 'a;b' }", ""),  # nothing uses x, so nothing uses y
        (".in { --page: 1 }", ".in{--page: 1}"),  # a page uses it
        ("p--q:hover { a: b }", "p--q:hover{a: b}"),
        (".sm\\:in { a: b }", ".sm\\:in{a: b}"),
    ],
)
def test_what_can_apply_is_kept_and_nothing_else(sheet, kept):
    assert re.sub(r"\{ ", "{", short(sheet, '<p class="in" style="a: var(--page)">', "`tab--${next}`")) == kept


@pytest.mark.parametrize("sheet", [".in { a: b", ".in", "@media print { .in { a: b }"])
def test_a_sheet_whose_brackets_do_not_match_is_refused(sheet):
    with pytest.raises(ValueError, match=r"brackets must match, got '(\.in|@media)"):
        short(sheet, "in")


def read_by_a_judge(sheet, path=()):
    """Each rule with its groups, as tinycss2 reads them, spaces apart."""
    for rule in tinycss2.parse_stylesheet(sheet, skip_comments=True, skip_whitespace=True):
        assert rule.type != "error", rule
        head = "".join(tinycss2.serialize(rule.prelude).split())
        if rule.type == "at-rule" and f"@{rule.lower_at_keyword}" in styles.GROUPS:
            yield from read_by_a_judge(tinycss2.serialize(rule.content), (*path, head))
        else:
            body = tinycss2.serialize(rule.content or [])
            yield *path, head, "".join(re.sub(r"/\*.*?\*/", "", body, flags=re.S).split())


@pytest.mark.parametrize("file", [*THEME, *OURS], ids=lambda file: file.name)
def test_where_every_word_occurs_a_sheet_stays_as_it_is(file):
    sheet = file.read_text(encoding="utf-8")
    assert list(read_by_a_judge(styles.shortened(sheet, Every()))) == list(read_by_a_judge(sheet))


def test_what_a_sheet_loads_is_found_from_its_new_place():
    sheet = "a{b:url(../fonts/a.woff2)}c{d:url('e.svg')}f{g:url(data:h)}i{j:url(#k)}"
    assert styles.moved(sheet, Path("assets/css")) == sheet.replace("e.svg", "e.svg")
    assert "url('../look/e.svg')" in styles.moved(sheet, Path("assets/look"))
    assert "url(../fonts/a.woff2)" in styles.moved(sheet, Path("assets/look"))


def a_site(folder, **pages):
    (folder / "assets/css").mkdir(parents=True)
    for name in ("one", "two", "three"):
        (folder / f"assets/css/{name}.css").write_text(
            f".{name}, .no-{name} {{ color: var(--{name}) }} p {{ --three: red }}"
        )
    for name, sheets in pages.items():
        links = "".join(f'<link rel="stylesheet" href="/base/assets/css/{each}.css">' for each in sheets.split())
        (folder / f"{name}.html").write_text(f'{links}<p class="one two">')
    return folder


def test_pages_load_the_joined_sheet_and_then_their_own(tmp_path):
    site = a_site(tmp_path, a="one two", b="one two three", bare="")
    styles.join(site)
    (joined,) = site.glob("assets/css/site.*.css")
    text = joined.read_text()
    assert text.index(".one{") < text.index(".two{") and ".no-" not in text
    assert "--three" in text  # which the sheet of one page uses
    link = f'<link rel="stylesheet" href="/base/assets/css/{joined.name}">'
    assert (site / "a.html").read_text() == f'{link}<p class="one two">'
    assert (site / "b.html").read_text().startswith(f'{link}<link rel="stylesheet" href="/base/assets/css/three.css">')
    assert sorted(file.name for file in site.glob("assets/css/*")) == sorted([joined.name, "three.css"])


def test_pages_without_a_common_sheet_are_refused(tmp_path):
    with pytest.raises(ValueError, match="load the same style sheet first"):
        styles.join(a_site(tmp_path, a="one two", b="two one"))


def test_a_page_waits_for_two_sheets_at_most_and_for_no_script(pages):
    for name, page in pages.items():
        sheets = re.findall(r'<link rel="stylesheet" href="[^"]*?(assets/[^"]*)"', page.text)
        assert re.fullmatch(r"assets/css/site\.[0-9a-f]{8}\.css", sheets[0]), name
        assert len(sheets) <= 2 and all((SITE / sheet).exists() for sheet in sheets), name
        for script in re.findall(r"<script [^>]*src=[^>]*>", page.text):
            assert " defer" in script or 'type="module"' in script, (name, script)


def test_each_class_and_variable_of_a_page_keeps_its_rules(pages):
    """Of the sheets before they were joined, every selector whose classes are on some page, read by the judge."""
    (joined,) = (SITE / "assets/css").glob("site.*.css")
    heads = {head for *_, head, _ in read_by_a_judge(joined.read_text(encoding="utf-8"))}
    kept = {one for head in heads for one in styles._alternatives(head)}
    classes = {
        name for page in pages.values() for given in re.findall(r'class="([^"]*)"', page.text) for name in given.split()
    }
    for file in (each for each in [*THEME, *OURS] if each.name != "ledger.css"):
        for *_, head, body in read_by_a_judge(file.read_text(encoding="utf-8")):
            for one in () if head[:1] in "@" or not body else styles._alternatives(head):
                named = set(re.findall(r"\.([A-Za-z_][\w-]*)", one))
                assert not named or named - classes or one in kept or "--" in body, (file.name, one)
