"""What a reader takes away: the pages as programs and notebooks, which run, and the figures as files."""

import json
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from documents import SITE
from pages import downloads
from snippets.forking import Forking

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = {
    file.relative_to(DOCS).as_posix(): file.read_text(encoding="utf-8")
    for folder in downloads.FOLDERS
    for file in sorted(DOCS.glob(f"{folder}*.md"))
}
PROGRAMS = [uri for uri, text in PAGES.items() if downloads.has_program(text, uri)]


def cells(uri):
    return downloads.cells(PAGES[uri], uri, ROOT)


def test_every_chapter_and_workshop_with_a_snippet_has_a_program():
    assert {"essay/self_attention.md", "essay/flash_attention.md", "essay/mamba.md"} <= set(PROGRAMS)
    assert {"workshop/flash_attention.md", "workshop/selective_scan.md"} <= set(PROGRAMS)
    assert "essay/self_attention_texts.md" not in PROGRAMS  # it has no snippet


# --- they run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python():
    """A Python that has loaded torch, and runs each program in a process of its own."""
    python = Forking(os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"})
    yield python
    python.end()


@pytest.mark.timeout(500)
@pytest.mark.parametrize("uri", PROGRAMS)
def test_a_program_runs_in_an_empty_folder_and_prints_what_it_says(uri, python, tmp_path):
    found = cells(uri)
    file = tmp_path / f"{downloads.name_of(uri)}.py"
    file.write_text(downloads.program(found, downloads.address_of(uri)), encoding="utf-8")
    place = tmp_path / "empty"
    place.mkdir()
    ran = python.run(file, place, timeout=450)
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = [cell.text.partition("\n\n# It prints:\n")[2] for cell in found if cell.code]
    wanted = [line.removeprefix("#   ").removeprefix("#") for text in said if text for line in text.splitlines()]
    assert [line.rstrip() for line in ran.stdout.splitlines()] == wanted


@pytest.mark.timeout(500)
def test_a_notebook_runs_from_top_to_bottom(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    uri = "workshop/selective_scan.md"
    made = nbformat.reads(downloads.notebook(cells(uri), downloads.address_of(uri)), as_version=4)
    nbformat.validate(made)
    nbclient.NotebookClient(made, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printing = [cell for cell in made.cells if cell.cell_type == "code" and "# It prints:" in cell.source]
    assert printing
    for cell in printing:
        said = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        wanted = cell.source.partition("# It prints:\n")[2]
        assert [f"#   {line}".rstrip() for line in said.splitlines()] == wanted.splitlines()


# --- what is in them -----------------------------------------------------------------------------------------------

PAGE = """---
title: A page
---

# A page

Some \\(x^2\\) and [another page](mamba.md#code), see [above](#a-page). <!-- live: x -->

```python
print(1 + 1)
```

<!--pytest-codeblocks:expected-output-->

```
2
```

```python exec="on" html="on"
print(figures.show(fig, name="a-figure", alt="a", caption="b"))
```

!!! claim "A1.4"
    It holds.

    ```py
    --8<-- "src/nondual/ops/attention.py:nothing"
    ```

??? exercise "By code"
    Do it.

    ```python
    x = 1
    ```

    Done.

<div class="card" markdown>
Module
:   `x`
</div>
"""


@pytest.fixture
def made(tmp_path):
    file = tmp_path / "src" / "nondual" / "ops" / "attention.py"
    file.parent.mkdir(parents=True)
    file.write_text("a = 1\n# --8<-- [start:nothing]\n    def b(): ...\n# --8<-- [end:nothing]\n", encoding="utf-8")
    return downloads.cells(PAGE, "essay/x.md", tmp_path)


def test_prose_and_code_alternate_and_outputs_are_comments(made):
    assert [cell.code for cell in made] == [False, True, False, True, False]
    assert made[1].text == "print(1 + 1)\n\n# It prints:\n#   2"
    assert made[3].text == "x = 1" and made[4].text == "Done."


def test_prose_is_markdown_that_any_notebook_shows(made):
    first, middle = made[0].text, made[2].text
    site = downloads.SITE
    assert first.startswith("# A page\n\nSome $x^2$ and") and "<!--" not in first and "title:" not in first
    assert f"[another page]({site}essay/mamba/#code)" in first and f"[above]({site}essay/x/#a-page)" in first
    assert f"[![Figure]({site}essay/x/figures/a-figure.svg)]({site}essay/x/#a-figure)" in middle
    assert "**Claim: A1.4**\n\nIt holds." in middle and "**Exercise: By code**\n\nDo it." in middle
    excerpt = "From `src/nondual/ops/attention.py`, lines 3 to 3:\n\n```python\ndef b(): ...\n```"
    assert excerpt in middle
    assert "card" not in made[-1].text and "Module" not in made[-1].text


def test_no_mark_of_the_site_is_left_in_a_page():
    for uri in PROGRAMS:
        prose = "\n".join(cell.text for cell in cells(uri) if not cell.code)
        text = re.sub(r"```.*?```", "", prose, flags=re.S)
        left = re.findall(r"^(?:!!!|\?\?\?).*|<!--.*|--8<--.*|</?div.*|\\\(|\]\((?!https?://)[^)]*\)", text, re.M)
        assert not left, f"{uri}: {left}"


def test_long_lines_are_wrapped_and_formulas_are_not(made):
    long = downloads.Cell(False, "- " + "word " * 60 + "\n\n$$\n" + "x + " * 60 + "\n$$")
    lines = downloads.program([long], "a").splitlines()
    assert max(len(line) for line in lines if "word" in line) <= downloads.WIDTH
    assert sum("word" in line for line in lines) > 1 and any("x + " * 60 in line + " " for line in lines)


def test_the_links_stand_in_the_card_or_at_the_end():
    colab = "https://colab.research.google.com/github/nondual/nondual/blob/main/notebooks/essay/mamba.ipynb"
    card = downloads.offered('<p>a</p><div class="card"><dl><dt>Module</dt><dd>x</dd></dl></div>', "essay/mamba.md")
    assert card.endswith("</dd></dl></div>") and f'href="{colab}"' in card and 'href="mamba.py" download' in card
    assert downloads.offered("<p>a</p>", "essay/mamba.md").startswith('<p>a</p><p class="download">Download as')


@pytest.mark.parametrize("uri", PROGRAMS)
def test_the_repository_has_the_notebook_that_colab_opens(uri):
    """Its programs are the page's. Its prose may be that of the last build at a desk, which writes it."""

    def code(text):
        return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]

    file = ROOT / downloads.kept(uri)
    wanted = downloads.notebook(cells(uri), downloads.address_of(uri))
    assert file.exists() and code(file.read_text(encoding="utf-8")) == code(wanted), (
        f"{downloads.kept(uri)} has other programs than docs/{uri}: run `nox -s docs`, and commit what it writes"
    )


def test_a_build_writes_the_notebooks_that_changed(tmp_path):
    files = {"essay/mamba/mamba.ipynb": "{}", "essay/mamba/mamba.py": "", "essay/mamba/figures/x.svg": ""}
    assert downloads.keep(files, tmp_path) == ["notebooks/essay/mamba.ipynb"]
    assert downloads.keep(files, tmp_path) == []
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["mamba.ipynb"]


# --- figures -------------------------------------------------------------------------------------------------------


def test_a_figure_s_file_stands_alone_in_dark_on_white():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    from nondual import figures

    figures.style()

    def drawn(width):
        fig, ax = plt.subplots(figsize=(width, 2))
        ax.plot([0, 1], [0, 1])
        ax.set_title("a & b")
        return fig

    html = figures.show([drawn(3), drawn(4)], name="two", alt="It rises.", caption="A line.", phone=drawn(3.5))
    page, files = downloads.with_figures(html)
    assert page.count('href="figures/two.svg" download') == 1 and page.endswith("</p></figure>")
    (root,) = [ET.fromstring(text) for text in files.values()]
    space = "{http://www.w3.org/2000/svg}"
    inner = root.findall(f"{space}svg")
    assert root.find(f"{space}title").text == "It rises." and len(inner) == 2  # the drawing for a phone is left out
    assert float(inner[1].get("x")) >= float(inner[0].get("width")) and inner[1].get("y") == "0"  # side by side
    assert "currentColor" not in files["figures/two.svg"] and downloads.INK in files["figures/two.svg"]
    assert root.find(f"{space}rect").get("fill") == downloads.PAPER


def test_names_that_an_html_parser_wrote_small_are_put_right():
    svg = '<svg viewbox="0 0 1 1"><clippath id="a"></clippath><text fill="red">viewbox clippath</text></svg>'
    right = '<svg viewBox="0 0 1 1"><clipPath id="a"></clipPath><text fill="red">viewbox clippath</text></svg>'
    assert downloads.as_xml(svg) == downloads.as_xml(right) == right


def test_every_drawn_figure_of_the_site_has_its_file(pages):
    for name, page in pages.items():
        for figure in re.findall(r'<figure class="drawn[^>]* id="([^"]+)"', page.text):
            file = SITE / Path(name).parent / "figures" / f"{figure}.svg"
            assert file.is_file(), f"{name}: {figure}"
            assert "currentColor" not in file.read_text(encoding="utf-8")
            ET.parse(file)


def test_steps_of_a_figure_stand_below_each_other_in_its_file():
    svg = '<svg viewBox="0 0 20 10" style="x" fill="currentColor"></svg>'
    root = ET.fromstring(downloads.alone([svg, svg], "a &amp; b"))
    assert [(part.get("x"), part.get("y")) for part in root.findall("{*}svg")] == [("0", "0"), ("0", "22")]
    assert (root.get("width"), root.get("height")) == ("20pt", "32pt") and root.find("{*}title").text == "a & b"


# --- print ---------------------------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize("scripts", [True, False])
def test_answers_are_open_in_print(browser, site, scripts):
    context = browser.new_context(java_script_enabled=scripts)
    page = context.new_page()
    page.goto(site + "essay/mamba/")
    answers = page.locator("details.exercise")

    def visible():
        return [answers.nth(i).locator("> :last-child").is_visible() for i in range(answers.count())]

    assert answers.count() >= 3 and not any(visible())
    page.emulate_media(media="print")
    assert all(visible()) and not page.locator("figure > .download").first.is_visible()
    context.close()
