"""Every file of docs/measured can be traced and taken again: a clean commit of our history, a command, a use."""

import ast
import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import yaml
from ledger.claims import load

ROOT = Path(__file__).parent.parent
NAMES = runpy.run_path(str(ROOT / "benchmarks/__main__.py"), run_name="names")["NAMES"]
FILES = sorted((ROOT / "docs/measured").glob("*.json"))
EVERY_FILE = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
FIELDS = {"device", "versions", "commit", "command", "date", "figures"}


def git(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)


def no_history(root: Path) -> str | None:
    """Why the history of commits cannot be asked here, or None where it can."""
    top = git("rev-parse", "--show-toplevel", cwd=root)
    if top.returncode or Path(top.stdout.strip()).resolve() != root.resolve():
        return "no git history here, as in an unpacked sdist: a measurement's commit cannot be looked up"
    if git("rev-parse", "--is-shallow-repository", cwd=root).stdout.strip() == "true":
        return "a shallow clone: a measurement's commit cannot be looked up (git fetch --unshallow)"
    return None


def fault_of_commit(commit: str) -> str | None:
    """What is wrong in how a measurement names its commit, as far as the name tells."""
    if commit.endswith("+changes"):
        return f"was measured with changes that no commit has ({commit}): commit src and benchmarks, and measure again"
    if not re.fullmatch(r"[0-9a-f]{12}", commit):
        return f"has the commit {commit!r}, not the 12 hexadecimal digits of one"
    return None


def fault_of_history(commit: str, root: Path) -> str | None:
    """What is wrong with the commit itself."""
    if git("cat-file", "-e", f"{commit}^{{commit}}", cwd=root).returncode:
        return f"names the commit {commit}, which this repository does not have"
    if git("merge-base", "--is-ancestor", commit, "HEAD", cwd=root).returncode:
        return f"names the commit {commit}, which is no part of the history of HEAD"
    return None


def fault_of_command(command: str, stem: str, benchmarks: Path) -> str | None:
    """What is wrong with the command: it names one benchmark, knows its options, and that benchmark writes the file."""
    said = re.fullmatch(r"nox -s bench -- (?P<name>\w+)(?P<options>( --[\w-]+(=\S+)?)*)", command)
    if not said or said["name"] not in NAMES:
        return f"has the command {command!r}; write nox -s bench -- NAME, NAME being one of {', '.join(NAMES)}"
    tree = ast.parse((benchmarks / f"{said['name']}.py").read_text(encoding="utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    if stem not in texts:
        return f"has the command {command!r}, and benchmarks/{said['name']}.py writes no {stem}"
    for option in said["options"].split():
        name = option.partition("=")[0]
        if not any(text in (name, f"{name}=") or text.startswith(f"{name}=") for text in texts):
            return f"has the command {command!r}, and benchmarks/{said['name']}.py knows no {name}"
    return None


def uses(name: str, root: Path) -> list[str]:
    """The pages, notebooks, claims and tests that use a measured file."""
    read = [*(root / "docs").rglob("*.md"), *(root / "docs").rglob("*.ipynb"), root / "README.md"]
    read += [file for file in (root / "tests").rglob("test_*.py")]
    claims = [claim.id for claim in load(root) if name in claim.measured]
    waiting = root / "docs/measured/TODO.md"
    return claims + [
        file.relative_to(root).as_posix()
        for file in sorted(read)
        if file != waiting and name in file.read_text(encoding="utf-8")
    ]


# --- every file ----------------------------------------------------------------------------------------------------


@EVERY_FILE
def test_a_measurement_says_where_and_how_it_was_taken(file):
    run = json.loads(file.read_text(encoding="utf-8"))
    assert set(run) >= FIELDS and all(run[name] for name in FIELDS)
    assert re.fullmatch(r"20\d\d-[01]\d-[0-3]\d", run["date"])
    assert run["versions"]["python"] and run["versions"]["torch"]


@EVERY_FILE
def test_its_commit_is_clean(file):
    fault = fault_of_commit(json.loads(file.read_text(encoding="utf-8"))["commit"])
    assert fault is None, f"{file.relative_to(ROOT)} {fault}"


@EVERY_FILE
def test_its_commit_is_in_our_history(file):
    if why := no_history(ROOT):
        pytest.skip(why)  # in CI a skip is a failure: its checkouts have all of history
    commit = json.loads(file.read_text(encoding="utf-8"))["commit"].removesuffix("+changes")
    fault = fault_of_history(commit, ROOT)
    assert fault is None, f"{file.relative_to(ROOT)} {fault}"


@EVERY_FILE
def test_one_command_takes_it_again(file):
    fault = fault_of_command(json.loads(file.read_text(encoding="utf-8"))["command"], file.stem, ROOT / "benchmarks")
    assert fault is None, f"{file.relative_to(ROOT)} {fault}"


@EVERY_FILE
def test_something_uses_it(file):
    assert uses(file.name, ROOT), f"{file.relative_to(ROOT)}: no page, claim or test uses it; delete it"


def test_ci_checks_out_all_of_history():
    for workflow in sorted((ROOT / ".github/workflows").glob("*.yml")):
        for name, job in yaml.safe_load(workflow.read_text())["jobs"].items():
            for step in job.get("steps", []):
                if step.get("uses", "").startswith("actions/checkout@"):
                    assert step["with"]["fetch-depth"] == 0, f"{workflow.name}: {name}"


def test_what_waits_for_a_gpu_names_benchmarks_that_there_are():
    text = (ROOT / "docs/measured/TODO.md").read_text(encoding="utf-8")
    assert {word for word in re.findall(r"nox -s bench -- (\w+)", text)} <= set(NAMES)
    for name in re.findall(r"writes `(\w+\.json)`", text):
        assert not (ROOT / "docs/measured" / name).exists(), f"{name} is there: strike it from docs/measured/TODO.md"
    for name in re.findall(r"`(\w+\.json)`", text.replace("writes `", "writes ")):
        assert (ROOT / "docs/measured" / name).exists(), f"docs/measured/TODO.md names {name}, which is not there"


# --- and what is wrong is seen -------------------------------------------------------------------------------------


@pytest.fixture
def history(tmp_path):
    """A repository with a commit on its branch, and one on a branch that was left."""

    def commit(message: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        made = git(*who, "commit", "-q", "--allow-empty", "-m", message, cwd=tmp_path)
        assert made.returncode == 0, made.stderr
        return git("rev-parse", "--short=12", "HEAD", cwd=tmp_path).stdout.strip()

    git("init", "-q", cwd=tmp_path)
    first = commit("first")
    git("checkout", "-q", "-b", "other", cwd=tmp_path)
    left = commit("left")
    git("checkout", "-q", "-", cwd=tmp_path)
    commit("second")
    return tmp_path, first, left


@pytest.mark.parametrize("commit", ["b6309af4a2de+changes", "b6309af", "b6309af4a2dz", "HEAD", "", "B6309AF4A2DE"])
def test_a_commit_that_is_not_clean_is_named(commit):
    assert commit in fault_of_commit(commit)
    assert fault_of_commit("b6309af4a2de") is None


def test_a_commit_outside_of_history_is_named(history):
    root, first, left = history
    assert fault_of_history(first, root) is None
    assert "no part of the history" in fault_of_history(left, root)
    assert "does not have" in fault_of_history("0123456789ab", root)


def test_where_there_is_no_history_it_is_said(history, tmp_path_factory):
    root, _, _ = history
    assert no_history(root) is None
    (root / "unpacked").mkdir()
    assert "sdist" in no_history(root / "unpacked")  # a folder in another repository has not that one's history
    clone = tmp_path_factory.mktemp("clone")
    assert git("clone", "-q", "--depth=1", root.as_uri(), ".", cwd=clone).returncode == 0
    assert "shallow" in no_history(clone)


@pytest.mark.parametrize(
    "command, fault",
    [
        ("nox -s bench -- shakespeare --longer", None),
        ("nox -s bench -- essay_codebase --checkout=DIR", None),
        ("nox -s bench -- shakespear", "NAME being one of"),
        ("nox -s bench", "NAME being one of"),
        ("python benchmarks/shakespeare.py", "NAME being one of"),
        ("nox -s bench -- record", "NAME being one of"),
        ("nox -s bench -- shakespeare --shorter", "knows no --shorter"),
        ("nox -s bench -- self_attention", "writes no shakespeare"),
    ],
)
def test_a_command_that_takes_nothing_again_is_named(command, fault):
    stem = "essay_codebase" if "codebase" in command else "shakespeare_longer" if "longer" in command else "shakespeare"
    found = fault_of_command(command, stem, ROOT / "benchmarks")
    assert found is None if fault is None else fault in found


def test_a_file_that_nothing_uses_is_seen():
    assert uses("nobody_measured" + "_this.json", ROOT) == []
    assert {"A0.3", "docs/essay/self_attention_texts.md"} <= set(uses("essay_codebase" + ".json", ROOT))
