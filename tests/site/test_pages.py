"""What the build does to a page besides converting it: boxes, folds, terms, excerpts, notebooks."""

import importlib
import re
import unicodedata

import pytest
from documents import ROOT
from ledger.claims import Claim
from ledger.table import verdicts_html
from pages import blocks, engines, glossary, notebooks
from pages.links import linker
from templates import text

OPERATIONS = [  # those that choose between engines
    file
    for file in sorted((ROOT / "src/nondual/ops").rglob("*.py"))
    if re.search("^ENGINES = ", file.read_text(encoding="utf-8"), re.MULTILINE)
]


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


def test_in_code_what_has_no_colour_of_its_own_has_no_element():
    marked = '<span class="n">y</span><span class="w"> </span><span class="o">=</span> <span class="k">None</span>'
    assert blocks.unmark_plain(marked) == 'y = <span class="k">None</span>'
    assert blocks.unmark_plain('<span class="note">n</span>') == '<span class="note">n</span>'


def test_a_comma_stays_with_its_short_formula():
    short, long = (
        f'<span class="arithmatex">\\({formula}\\)</span>' for formula in ("N", "s_{01} > s_{02} = s_{20} > s_{21}")
    )
    assert blocks.hold_punctuation(f"of {short}, and") == f'of <span class="held">{short},</span> and'
    assert blocks.hold_punctuation(f"of {short} and {long}.") == f"of {short} and {long}."


def test_a_term_is_marked_once_a_section_and_never_in_a_heading_or_a_link_or_where_it_means_something_else():
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
    plain = f'<p><span class="plain">{field.format("heads")}</span> of a town, {field.format("heads")}</p>'
    assert glossary.thinned(plain, terms) == plain.replace(field.format("heads"), "heads", 1)


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
    assert '    ``` { .python .alone title="Complete: copy and run" }\n    x = 1' in blocks.label_code(snippet, ROOT)
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


def test_a_notebook_keeps_its_formulas_and_mends_its_quotes():
    assert notebooks.curled("""it's "so": $f'(x)$""") == "it’s “so”: $f'(x)$"
    assert (
        notebooks._MATHS.sub(notebooks.as_maths, "$x$ costs $5") == '<span class="arithmatex">\\(x\\)</span> costs $5'
    )


@pytest.mark.parametrize(
    "operation", [file.parent.name if file.stem == "__init__" else file.stem for file in OPERATIONS]
)
def test_the_reference_of_an_operation_has_the_table_of_its_engines(operation):
    """Made of the library's own lines: each limit in it is one that the operation refuses by."""
    page = (ROOT / f"docs/reference/ops/{operation}.md").read_text(encoding="utf-8")
    assert f"<!-- engines nondual.ops.{operation} -->" in page
    table = engines.with_tables(page)
    for name, engine in importlib.import_module(f"nondual.ops.{operation}").ENGINES.items():
        row = re.search(rf'<tr><td[^>]*><code>"{name}"</code></td>.*</tr>', table)[0]
        for words in [engine.does, *(limit.takes for limit in engine.limits), *(engine.auto or [])[:1]]:
            assert str(text(glossary.curled(words))) in row


def test_a_link_leads_from_one_pages_folder_to_anothers(tmp_path):
    for page in ("index.md", "ledger.md", "essay/mamba.md", "notebooks/heads.ipynb"):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).touch()
    home, chapter = linker("index.md", tmp_path), linker("essay/mamba.md", tmp_path)
    assert home("essay/mamba.md#verdict-A1.4") == "essay/mamba/#verdict-A1.4" and home("index.md") == "./"
    assert chapter("ledger.md#A1.4") == "../../ledger/#A1.4" and chapter("index.md") == "../../"
    assert chapter("notebooks/heads.ipynb") == "../../notebooks/heads/" and chapter("essay/mamba.md") == "./"
    assert chapter("gone.md") is None


def test_one_file_knows_the_program_that_builds_the_site():
    imports = re.compile(r"^\s*(?:import|from) (?:mkdocs|markdown_exec)\b", re.MULTILINE)
    hooks = ROOT / "hooks"
    found = [file for file in hooks.rglob("*.py") if imports.search(file.read_text(encoding="utf-8"))]
    assert found == [hooks / "build.py"]
