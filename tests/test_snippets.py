"""Snippets that cannot rot: the guard over every page, and proof that each guard fails when it should."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from pytest_codeblocks.main import extract_from_file
from snippets import alone, judging, reading

ROOT = Path(__file__).parent.parent
PAGES = reading.pages(ROOT)
OUTPUT = "<!--pytest-codeblocks:expected-output-->"


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- every page ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_fence_of_a_page_is_one_that_runs(page):
    found = judging.faults(page)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_pytest_collects_exactly_the_snippets_that_we_count(page):
    collected = [block for block in extract_from_file(page) if block.syntax in ("python", "sh", "bash")]
    counted = [fence for fence in reading.fences(page) if fence.kind == "snippet"]
    assert [block.lineno for block in collected] == [fence.line for fence in counted]
    for block, fence in zip(collected, counted):  # but for empty lines, which conftest.py puts back
        assert block.code.split() == fence.code.split(), fence.where
        assert (block.expected_output or "").split() == (fence.output or "").split(), fence.where
        assert not block.expected_output_ignore_whitespace, fence.where


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent != ROOT], ids=page_id)
def test_the_lines_of_an_excerpt_fit_a_page(page):
    """In 88 columns, which a desk shows without scrolling, counted from the excerpt's own margin."""
    for path, section in re.findall(r'--8<-- "([^":]+):(\w+)"', page.read_text(encoding="utf-8")):
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        start, end = (
            next(i for i, line in enumerate(lines) if line.strip().endswith(f"--8<-- [{edge}:{section}]"))
            for edge in ("start", "end")
        )
        part = textwrap.dedent("\n".join(lines[start + 1 : end])).splitlines()
        wide = [line for line in part if len(line) > 88]
        assert not wide, f"{path}:{section}: {wide}"


def test_the_readme_has_a_snippet():
    assert any(fence.kind == "snippet" for fence in reading.fences(ROOT / "README.md"))


# --- the guard, on pages with one fault each -----------------------------------------------------------------------

PYTHON = "```python\nx = 1\n```"

FAULTS = {  # name: (the page, the line named, a word of the fault)
    "a title after the language": ('\n```python title="x.py"\nx = 1\n```', 2, "would not be run"),
    "the short name": ("```py\nx = 1\n```", 1, "would not be run"),
    "an include with code beside it": ('```py\n--8<-- "a.py"\nx = 1\n```', 1, "`--8<--` lines alone"),
    "python3": ("text\n\n```python3\nx = 1\n```", 3, "would not be run"),
    "a capital": ("```Python\nx = 1\n```", 1, "would not be run"),
    "a space before the language": ("``` python\nx = 1\n```", 1, "would not be run"),
    "braces": ('```{.python title="a"}\nx = 1\n```', 1, "would not be run"),
    "braces with an id first": ("``` { #here .python }\nx = 1\n```", 1, "would not be run"),
    "tildes": ("~~~python\nx = 1\n~~~", 1, "not with tildes"),
    "a console session": ("```pycon\n>>> 1\n1\n```", 1, "would not be run"),
    "ipython": ("```ipython\nx = 1\n```", 1, "would not be run"),
    "a quotation": ("> words\n>\n> ```python\n> x = 1\n> ```", 3, "not with tildes"),
    "on the line of a list item": ("- ```python\n  x = 1\n  ```", 1, "not with tildes"),
    "no language": ("```\nimport torch\n```", 1, "without a language"),
    "html": ('<pre><code class="language-python">x = 1</code></pre>', 1, "would not be run"),
    "a comment": ("<!--\n\n" + PYTHON + "\n\n-->", 3, "HTML comment"),
    "a print without an output": ("```python\nx = 1\nprint(x)\n```", 1, "line 3) and shows no output"),
    "a print in a function": ("```python\ndef f():\n    print(1)\n```", 1, "line 3) and shows no output"),
    "a write without an output": ("```python\nimport sys\nsys.stdout.write('a')\n```", 1, "shows no output"),
    "the output of another fence": (f"{PYTHON}\n\n```text\na\n```\n\n{OUTPUT}\n\n```\n1\n```", 5, "could print it"),
    "an output in Python": (f"```python\nprint(1)\n```\n{OUTPUT}\n```python\n1\n```", 5, "not Python"),
    "an output with nothing under it": (f"{PYTHON}\n\n{OUTPUT}\n", 5, "is read, with a fence after it"),
    "an output compared loosely": (
        "```python\nprint(1)\n```\n<!--pytest-codeblocks:expected-output-ignore-whitespace-->\n```\n1\n```",
        1,
        "shows no output",
    ),
    "a continuation": (
        f"{PYTHON}\n\n<!--pytest-codeblocks:cont-->\n\n```python\ny = x\n```",
        7,
        "needs the fence before",
    ),
    "a name from the fence before": (f"{PYTHON}\n\n```python\ny = x\n```", 5, "`x` (line 6) is never defined"),
    "a name used in a function": ("```python\ndef f():\n    return torch.ones(1)\n```", 1, "`torch` (line 3)"),
    "a figure with a session": ('```python exec="on" session="a"\nx = 1\n```', 1, "session"),
    "a figure that leans on another": ('```python exec="on"\nprint(x)\n```', 1, "`x` (line 2) is never defined"),
    "sh": ("```sh\nrm -r /\n```", 1, "`console`"),
    "bash": ("```bash\nrm -r /\n```", 1, "`console`"),
    "skip": (f"<!--pytest.mark.skip-->\n\n{PYTHON}", 3, "would hide a failure"),
    "skipif": (f"<!--pytest.mark.skipif(True, reason='')-->\n{PYTHON}", 2, "would hide a failure"),
    "xfail": (f"<!--pytest.mark.xfail-->\n{PYTHON}", 2, "would hide a failure"),
    "importorskip": (f"<!--pytest-codeblocks:importorskip(torch)-->\n{PYTHON}", 2, "would hide a failure"),
    "skipfile": (f"<!--pytest-codeblocks:skipfile-->\n{PYTHON}", 2, "would hide a failure"),
    "a syntax error": ("\n```python\nx = 1\nx = = 2\n```", 2, "SyntaxError on line 4"),
    "a fence left open": ("```python\nx = 1\n", 1, "never closed"),
    "a main guard": ("```python\nif __name__ == '__main__':\n    x = 1\n```", 1, "`__name__` (line 2)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_guard_names_file_and_line(tmp_path, name):
    text, line, word = FAULTS[name]
    page = tmp_path / "page.md"
    page.write_text(text)
    found = judging.faults(page)
    assert any(fault.startswith(f"{page}:{line}: ") and word in fault for fault in found), found


GOOD = {
    "a snippet": PYTHON,
    "a snippet that prints": f"```python\nprint(1)\n```\n\n{OUTPUT}\n\n```\n1\n```",
    "in a box": (
        f'!!! claim "A"\n\n    words\n\n    ```python\n    print(1)\n    ```\n\n    {OUTPUT}\n\n    ```\n    1\n    ```'
    ),
    "in a list": "1. words\n\n    ```python\n    x = 1\n    ```\n",
    "four backticks": "````python\nx = '''\n```\n'''\n````",
    "python shown as text in a longer fence": "````markdown\n```python title=\n```\n````",
    "an include": '```py\n--8<-- "src/nondual/self_attention.py:scores"\n```',
    "a figure": '```python exec="on" html="true"\nprint("<svg/>")\n```',
    "a print to stderr": "```python\nimport sys\nprint(1, file=sys.stderr)\n```",
    "names of every kind": (
        "```python\nimport os.path as p\nfrom math import pi\n\nclass A:\n    b = pi\n"
        "    def c(self, d, *e, f=1, **g):\n"
        "        global h\n        h = [i for i in e if i]\n        return super().__init__(), __class__, d, f, g\n\n"
        "def outer():\n    k = 1\n    def inner():\n        nonlocal k\n        k += 1\n    return inner\n\n"
        "with open(p.devnull) as l: pass\ntry: A()\nexcept Exception as m: n = str(m)\n(o := 1)\n"
        "q = {r: s for r, s in {}.items()}\n"
        "for t in range(3): t\ndel t\nmatch o:\n    case [u, *v]: u, v\n    case _: lambda w: w\n```"
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_the_guard_lets_good_pages_pass(tmp_path, name):
    page = tmp_path / "page.md"
    page.write_text(GOOD[name])
    assert judging.faults(page) == []
    collected = [block.lineno for block in extract_from_file(page) if block.syntax == "python"]
    assert collected == [fence.line for fence in reading.fences(page) if fence.kind == "snippet"]


# --- a failing snippet under pytest --------------------------------------------------------------------------------


def run_pytest(folder: Path, *arguments: str, **environment: str) -> str:
    shutil.copy(ROOT / "conftest.py", folder)
    if not (folder / "hooks").exists():
        (folder / "hooks").symlink_to(ROOT / "hooks")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    claim(id, verdict)\n    gpu\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    env = os.environ | environment
    ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=180)
    return ran.stdout + ran.stderr


def test_a_failing_snippet_names_page_line_and_exception(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(
        "# A page\n\n```python\nimport torch\n\n\ndef f(x):\n    return x.reshape(3)\n\n\nf(torch.ones(2))\n```\n\n"
        f"```python\nprint(1)\n```\n\n{OUTPUT}\n\n```\n2\n```\n\n```python\nraise SystemExit(0)\n```\n\n"
        "```python\nx = = 1\n```\n"
    )
    said = run_pytest(tmp_path, "--codeblocks", "docs")
    assert "docs/page.md:8: RuntimeError: shape '[3]' is invalid for input of size 2" in said
    assert "docs/page.md:14: AssertionError: the snippet does not print what the page shows" in said
    assert "docs/page.md:25: SystemExit: 0" in said
    assert "docs/page.md:29: " in said and "SyntaxError" in said
    assert "4 failed" in said


def test_an_indented_snippet_keeps_its_empty_lines(tmp_path):
    (tmp_path / "page.md").write_text(
        "!!! measured\n\n    ```python\n    x = 1\n\n    print(x, end='\\n\\n')\n    print(2)\n    ```\n\n"
        f"    {OUTPUT}\n\n    ```\n    1\n\n    2\n    ```\n\n    ```python\n    x = 1\n\n    x / 0\n    ```\n"
    )
    said = run_pytest(tmp_path, "--codeblocks", "page.md")
    assert "page.md:21: ZeroDivisionError: division by zero" in said
    assert "1 failed, 1 passed" in said


@pytest.mark.parametrize("workers", ["-n0", "-n1"])
def test_a_snippet_leaves_nothing_behind(tmp_path, workers):
    leave = (
        "import os, random\nimport torch\ntorch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\n"
        "os.environ['LEFT'] = '1'\nopen('left', 'w').close()\n"
    )
    find = (
        "import os\nimport torch\nassert torch.ones(1).dtype == torch.float32\nassert torch.is_grad_enabled()\n"
        "assert 'LEFT' not in os.environ\nassert not os.path.exists('left')\n"
    )
    (tmp_path / "page.md").write_text(f"```python\n{leave}```\n\n```python\n{find}```\n")
    assert "2 passed" in run_pytest(tmp_path, "--codeblocks", "page.md", workers)
    assert not (tmp_path / "left").exists()


# --- each fence alone ----------------------------------------------------------------------------------------------


def test_alone_names_what_went_wrong(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(
        f"```python\nx = 1\nprint(x)\n```\n\n{OUTPUT}\n\n```\n1\n```\n\n"  # 1: right
        "```python\nprint(x)\n```\n\n"  # 12: leans on the fence before
        f"```python\nprint(1)\n```\n\n{OUTPUT}\n\n```\n2\n```\n\n"  # 16: another output
        "```python\nx = 1\nraise ValueError('heads must divide')\n```\n\n"  # 26: an exception
        '```python exec="on"\nprint(1 / 0)\n```\n\n'  # 31: a figure that fails
        "```python\nexec('print(3)')\n```\n"  # 35: prints, unseen by the eye
    )
    assert alone.main([str(page)]) == 1
    said = capsys.readouterr().out
    assert f"{page}:13: NameError: name 'x' is not defined" in said
    assert f"{page}:16: shows\n    2\n  and prints\n    1\n" in said
    assert f"{page}:28: ValueError: heads must divide" in said
    assert f"{page}:32: ZeroDivisionError: division by zero" in said
    assert f"{page}:35: prints, and no output is shown" in said
    assert said.endswith("6 fences run alone: 1 passed, 5 failed\n")


def test_alone_leaves_out_the_figures_that_the_build_has_run(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text('```python exec="on"\nprint(1 / 0)\n```\n\n```python\nx = 1\n```\n')
    assert alone.main(["--snippets", str(page)]) == 0
    assert capsys.readouterr().out == "1 fences run alone: 1 passed, 0 failed\n"


def test_a_fence_that_imports_torch_is_run_as_if_by_a_fresh_python(tmp_path, capsys):
    page = tmp_path / "page.md"
    first = (
        "import atexit\nimport os\nimport sys\nimport torch\n"
        "print(os.listdir(), __name__, sys.argv == [__file__], sys.path[0] == os.path.dirname(__file__))\n"
        "print(sys.stdin.read() == '', torch.get_num_threads(), 'hooks' in str(sys.path))\n"
        "os.environ['LEFT'] = '1'\natexit.register(lambda: print('at the end', flush=True))\n"
    )
    shown = "[] __main__ True True\nTrue 1 False\nat the end\n"
    second = "import os\nimport torch\nassert 'LEFT' not in os.environ\nraise SystemExit(3)\n"
    third = "import torch\nimport os\nos._exit(9)\n"
    page.write_text(
        f"```python\n{first}```\n\n{OUTPUT}\n\n```\n{shown}```\n\n```python\n{second}```\n\n```python\n{third}```\n"
    )
    assert alone.main([str(page)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.removeprefix(f"{page}:") for line in said] == [
        "20: exit code 3", "27: exit code 9", "3 fences run alone: 1 passed, 2 failed"
    ]  # fmt: skip


def test_a_fence_that_goes_on_for_too_long_is_ended_and_the_next_is_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(alone, "SECONDS", 5)
    monkeypatch.setattr(alone.os, "cpu_count", lambda: 1)
    page = tmp_path / "page.md"
    page.write_text("```python\nimport torch\n\nwhile True:\n    pass\n```\n\n```python\nimport torch\n```\n")
    assert alone.main([str(page)]) == 1
    assert capsys.readouterr().out == (f"{page}:1: still running after 5 s\n2 fences run alone: 1 passed, 1 failed\n")


def test_alone_passes_what_is_right(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"```python\nprint('ṛ')\n```\n\n{OUTPUT}\n\n```\nṛ\n```\n")
    assert alone.main([str(page)]) == 0
    assert capsys.readouterr().out == "1 fences run alone: 1 passed, 0 failed\n"


# --- a skip is not a pass ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["-n0", "-n1"])
def test_evidence_may_not_be_skipped(tmp_path, monkeypatch, light_pytest, workers):
    monkeypatch.delenv("CI", raising=False)
    (tmp_path / "test_evidence.py").write_text(
        "import pytest\n\n\n@pytest.mark.claim('A1.4', 'holds')\ndef test_a():\n    pytest.skip('no weights')\n\n\n"
        "@pytest.mark.claim('A1.5', 'holds')\n@pytest.mark.skip(reason='later')\ndef test_b():\n    assert 1\n\n\n"
        "def test_c():\n    pytest.skip('no browser')\n\n\n"
        "@pytest.mark.gpu\ndef test_d():\n    pytest.skip('no device')\n"
    )
    said = run_pytest(tmp_path, workers, **light_pytest)
    assert "the evidence for claim A1.4 was not run: it may not be skipped (Skipped: no weights)" in said
    assert "the evidence for claim A1.5 was not run: it may not be skipped (Skipped: later)" in said
    assert "1 failed, 2 skipped, 1 error" in said
    assert "2 skipped, 2 deselected" in run_pytest(tmp_path, "-k", "test_c or test_d", **light_pytest)
    monkeypatch.setenv("CI", "true")
    said = run_pytest(tmp_path, workers, **light_pytest)
    assert "in CI a skip is a failure (Skipped: no browser)" in said
    assert "2 failed, 1 skipped, 1 error" in said


def test_in_ci_a_file_may_not_skip_itself_either(tmp_path, monkeypatch, light_pytest):
    monkeypatch.delenv("CI", raising=False)
    (tmp_path / "test_whole.py").write_text(
        "import pytest\n\npytest.importorskip('no_such_package')\n\n\ndef test_a():\n    pass\n"
    )
    assert "1 skipped" in run_pytest(tmp_path, **light_pytest)
    assert "1 skipped" in run_pytest(tmp_path, "-m", "gpu", **light_pytest)
    monkeypatch.setenv("CI", "true")
    said = run_pytest(tmp_path, **light_pytest)
    assert "test_whole.py: in CI a skip is a failure (Skipped: could not import 'no_such_package'" in said
    assert "1 error" in said
    assert "1 skipped" in run_pytest(tmp_path, "-m", "gpu", **light_pytest)
