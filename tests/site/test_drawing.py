"""Figures are drawn side by side and kept; a changed byte draws anew, and a fault names its page and line."""

import time

import pytest
from documents import ROOT
from drawing import notebooks, process, store
from drawing.pages import STORE, draw_pages, normal
from snippets.reading import fences

PAGE = """# A page

```python exec="on" html="on"
from pathlib import Path

import library

print(library.NAME, Path("docs/measured/run.json").read_text())
```

!!! measured

    ```python exec="on" html="on"
    x = 1

    print(x)
    ```
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "docs/measured").mkdir(parents=True)
    (tmp_path / "src").mkdir()
    (tmp_path / "docs/page.md").write_text(PAGE)
    (tmp_path / "docs/measured/run.json").write_text("7")
    (tmp_path / "src/library.py").write_text("NAME = 'one'\n")
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    return tmp_path


@pytest.fixture
def drawn(project):
    """A function: what the figures print, in order, and how many of them were drawn for it."""

    def draw(**given):
        told = []
        output = draw_pages(project, say=told.append, **given)
        codes = [normal(fence.code) for fence in fences(project / "docs/page.md") if fence.kind == "figure"]
        return [output[code] for code in codes], int(told[0].split()[0])

    return draw


def change(file, old, new):
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_what_is_drawn_is_kept_until_a_byte_changes(project, drawn, monkeypatch):
    assert drawn() == (["one 7\n", "1\n"], 2)
    assert drawn() == (["one 7\n", "1\n"], 0)
    change(project / "src/library.py", "one", "two")  # what a figure imports
    assert drawn() == (["two 7\n", "1\n"], 1)
    change(project / "docs/measured/run.json", "7", "8")  # what it reads
    assert drawn() == (["two 8\n", "1\n"], 1)
    change(project / "docs/page.md", "x = 1", "x = 2")  # its own code
    assert drawn() == (["two 8\n", "2\n"], 1)
    change(project / "docs/page.md", "# A page", "# A page of two figures")  # and nothing else
    assert drawn() == (["two 8\n", "2\n"], 0)
    monkeypatch.setattr(store, "recipe", lambda: "another version")
    assert drawn() == (["two 8\n", "2\n"], 2)


def test_a_clean_build_takes_nothing_from_the_store(project, drawn):
    drawn()
    assert drawn(anew=True)[1] == 2


def test_a_drawing_that_was_not_whole_is_drawn_again(project, drawn):
    drawn()
    for file in (project / STORE).glob("*.json"):
        file.write_text(file.read_text()[:20])
    assert drawn() == (["one 7\n", "1\n"], 2)


def test_what_nothing_used_for_a_month_is_deleted(project, drawn, monkeypatch):
    drawn()
    change(project / "docs/page.md", "x = 1", "x = 2")
    drawn()
    assert len(list((project / STORE).iterdir())) == 3
    later = time.time() + (store.DAYS - 1) * 86400
    monkeypatch.setattr(store.time, "time", lambda: later)
    drawn()
    assert len(list((project / STORE).iterdir())) == 3
    monkeypatch.setattr(store.time, "time", lambda: later + 2 * 86400)
    store.Store(project / STORE, project).forget()
    assert list((project / STORE).iterdir()) == []


def test_a_fault_names_its_page_and_line_and_all_faults_are_named(project, drawn):
    change(project / "docs/page.md", "x = 1", "x = [][3]")
    change(project / "docs/page.md", "import library", "import library.gone")
    with pytest.raises(ValueError) as caught:
        drawn()
    told = str(caught.value)
    assert "docs/page.md:6: ModuleNotFoundError: No module named 'library.gone'" in told
    assert "docs/page.md:14: IndexError: list index out of range" in told
    assert "x = [][3]" in told  # the traceback shows the line of the page
    assert "process.py" not in told  # and nothing of ours


@pytest.mark.parametrize(
    "code, fault",
    [
        ("x = = 1", "docs/page.md:14: SyntaxError: invalid syntax"),
        ("raise SystemExit(3)", "docs/page.md:14: SystemExit: 3"),
        ("import os; os._exit(5)", "docs/page.md:13: its process ended with status 5"),
        ("while True: pass", "docs/page.md:13: still running after 1 s"),
        ("import library\n    library.fail()", "docs/page.md:15: ZeroDivisionError: division by zero"),
    ],
)
def test_a_figure_that_fails_in_any_way_is_named(project, drawn, monkeypatch, code, fault):
    (project / "src/library.py").write_text("NAME = 'one'\ndef fail():\n    1 / 0\n")
    drawn()
    if "while" in code:
        monkeypatch.setattr(process, "SECONDS", 1)
    change(project / "docs/page.md", "x = 1", code)
    with pytest.raises(ValueError) as caught:
        drawn()
    assert str(caught.value).startswith(fault)


def test_a_figure_finds_nothing_that_another_left(project, drawn):
    change(project / "docs/page.md", "import library\n", "import library\n\nlibrary.LEFT = 1\n")
    change(project / "docs/page.md", "x = 1\n", "import library\n    x = hasattr(library, 'LEFT')\n")
    assert drawn()[0] == ["one 7\n", "False\n"]


def test_a_page_that_takes_long_is_named(project, monkeypatch):
    told = []
    monkeypatch.setattr("drawing.pages.LIMIT", 0)
    draw_pages(project, say=told.append)
    assert len(told) == 2 and told[1].startswith("docs/page.md: its figures take ")


def test_a_figure_stops_the_build(project, monkeypatch, caplog):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    monkeypatch.delenv("CI", raising=False)
    (project / "docs/index.md").write_text("# Home\n")
    (project / "docs/glossary.yml").write_text("[]\n")
    (project / "docs/ledger").mkdir()
    for essay in "ABCDE":
        (project / f"docs/ledger/{essay}.yml").write_text("claims: []\n")
    (project / "pyproject.toml").write_text('[project]\nname = "nondual"\nversion = "0.1.0"\n')
    (project / "mkdocs.yml").write_text(
        "site_name: x\nplugins: [search, {markdown-exec: {languages: [python]}}]\n"
        f"markdown_extensions: [admonition, pymdownx.superfences]\nhooks: [{ROOT / 'hooks/build.py'}]\n"
    )

    def site():
        build(load_config(str(project / "mkdocs.yml")))
        return (project / "site/page/index.html").read_text()

    shown = site()
    assert "one 7" in shown
    change(project / "docs/page.md", "x = 1", "x = 1 / 0")
    with pytest.raises(Abort):
        site()
    assert "docs/page.md:14: ZeroDivisionError: division by zero" in caplog.text


def test_notebooks_are_kept_until_the_library_changes(project):
    first = notebooks.folder(project)
    first.mkdir(parents=True)
    assert notebooks.folder(project) == first and first.exists()
    change(project / "src/library.py", "one", "two")
    second = notebooks.folder(project)
    assert second != first and not first.exists()
    second.mkdir()
    change(project / "docs/measured/run.json", "7", "8")
    assert notebooks.folder(project) != second
