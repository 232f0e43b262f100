"""The commands that the README and CONTRIBUTING give are those that exist, and those that .ci/run runs."""

import os
import re
import tomllib
from pathlib import Path

from snippets.reading import fences

ROOT = Path(__file__).parent.parent


def commands(page: str) -> list[str]:
    """The lines of a page's console fences."""
    found = [fence for fence in fences(ROOT / page) if fence.info == "console"]
    return [line for fence in found for line in fence.code.splitlines() if line.strip()]


def sessions() -> set[str]:
    return set(re.findall(r"^@nox\.session\ndef (\w+)", (ROOT / "noxfile.py").read_text(), re.MULTILINE))


def test_ci_runs_what_the_readme_says():
    run = [
        line.strip().removeprefix("setsid ").removesuffix(" &") for line in (ROOT / ".ci/run").read_text().splitlines()
    ]
    assert commands("README.md") == ["pip install nox && nox -s docs", "nox -s serve", "nox -s tests"]
    for command in commands("README.md"):
        assert command in run, f".ci/run does not run `{command}`"
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_every_session_that_a_page_names_exists():
    assert sessions() == {"docs", "serve", "tests", "snippets", "exercises", "gpu_tests", "bench", "lint", "mutants"}
    for page in ("README.md", "CONTRIBUTING.md"):
        for named in re.findall(r"nox (?:--no-venv )?-s ([a-z_ ]+)", (ROOT / page).read_text()):
            assert set(named.split()) <= sessions(), f"{page}: nox -s {named}"


def test_the_readme_lists_every_session():
    table = re.findall(r"^\| `nox -s (\w+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(table) == sessions()


def test_the_workflow_runs_the_same_script():
    assert "run: .ci/run" in (ROOT / ".github/workflows/site.yml").read_text()


def test_lint_runs_pyright_on_the_library():
    noxfile = (ROOT / "noxfile.py").read_text()
    assert '"-m", "pyright"' in noxfile[noxfile.index("def lint(") :]
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]["include"] == ["src/nondual"]


def test_every_file_that_a_page_for_contributors_names_exists():
    for page in ("README.md", "CONTRIBUTING.md", "SECURITY.md"):
        named = re.findall(r"\b(?:src|tests|docs|hooks|benchmarks)/[\w/-]+\.(?:py|md|yml)\b", (ROOT / page).read_text())
        missing = [path for path in named if not (ROOT / path).exists()]
        assert not missing, f"{page} names {missing}"
