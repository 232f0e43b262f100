"""Formulas are typeset at the build."""

import re

import pytest
from documents import ROOT
from pages import blocks, mathematics, page

LINE = '<p>Of <span class="arithmatex">\\({}\\)</span>.</p>'
DISPLAY = '<div class="arithmatex">\\[\n{}\n\\]</div>'


def test_a_formula_in_a_line_becomes_html_and_mathml():
    html = mathematics.typeset(LINE.format("a &lt; b"))
    assert html.startswith('<p>Of <span class="arithmatex"><span class="katex">') and html.endswith("</span>.</p>")
    assert "<mi>a</mi><mo>&lt;</mo><mi>b</mi>" in html and 'class="katex-html" aria-hidden="true"' in html
    assert "\\(" not in html and "katex-display" not in html


def test_a_formula_on_lines_of_its_own_is_displayed():
    html = mathematics.typeset(DISPLAY.format("\\begin{aligned} x &amp;= 1 \\\\ y &amp;= 2 \\end{aligned}"))
    assert html.startswith('<div class="arithmatex"><span class="katex-display">') and html.count("<mtr>") == 2
    assert "\\[" not in html


def test_formulas_in_tables_and_captions_are_typeset_too():
    cell, caption = f"<table><tr><td>{LINE}</td></tr></table>", f"<figcaption>{LINE}</figcaption>"
    assert mathematics.typeset((cell + caption).format("x", "y")).count("<math") == 2


def test_a_held_comma_stays_with_its_typeset_formula():
    html = mathematics.typeset(blocks.hold_punctuation(LINE.format("N").replace("</span>.", "</span>,")))
    assert re.search(r'<span class="held"><span class="arithmatex"><span class="katex">.*</span>,</span></p>', html)


@pytest.mark.parametrize("source, reason", [("\\frac{1", "end of input"), ("\\nothing", "nothing"), ("é", "é")])
def test_a_formula_that_katex_cannot_read_stops_the_build_with_its_page_and_source(source, reason):
    with pytest.raises(ValueError) as caught:
        page.publish(LINE.format(source), "essay/x.md")
    told = str(caught.value)
    assert "essay/x.md" in told and f"\\({source}\\)" in told and reason in told and "\n" not in told


def test_a_formula_outside_its_mark_stops_the_build():
    with pytest.raises(ValueError, match=r"essay/x\.md.*not typeset: \\\(x\\\) of"):
        page.publish('<nav><a href="#x">The \\(x\\) of y</a></nav>', "essay/x.md")
    code = "<pre>\\(x\\)</pre><p><code>\\[x\\]</code></p><script>'\\('</script>"
    assert mathematics.typeset(code) == code


def test_katex_is_read_by_the_build_alone():
    assert mathematics.KATEX.is_file() and (mathematics.KATEX.parent / "LICENSE").is_file()
    assert not list((ROOT / "docs").rglob("katex*.js"))


def test_no_page_of_the_site_has_a_formula_that_waits_for_a_script(pages):
    assert not [name for name, one in pages.items() if mathematics.typeset(one.text) != one.text]
    assert sum(one.text.count("<math ") for one in pages.values()) > 200
