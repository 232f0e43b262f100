"""What is published: the two packages and what is in them, their metadata, the README's links, and the workflows."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = PROJECT["project"]["urls"]["Source"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def run(*command: str | Path, folder: Path = ROOT, limit: int = 100, **environment: str) -> str:
    """What a command prints; it must succeed."""
    env = {**os.environ, **environment}
    ran = subprocess.run(
        [str(part) for part in command], cwd=folder, env=env, capture_output=True, text=True, timeout=limit
    )
    assert ran.returncode == 0, f"{command} ended with {ran.returncode}\n{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"
    return ran.stdout


def tracked() -> set[str]:
    """What is published: the files that git tracks or would track; in an unpacked sdist, which has no git, all."""
    if (ROOT / ".git").exists():
        return set(run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines())
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    made = {"__pycache__", ".pytest_cache", ".ruff_cache", ".nox", "site", "dist"}
    return {str(file) for file in files if not made & set(file.parts)}


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel, built without the network."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder)
    return folder


@pytest.fixture(scope="module")
def sdist(packages, tmp_path_factory) -> Path:
    """The sdist, unpacked: the folder that holds pyproject.toml."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(next(packages.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    (inner,) = folder.iterdir()
    return inner


@pytest.fixture(scope="module")
def wheel(packages) -> zipfile.ZipFile:
    with zipfile.ZipFile(next(packages.glob("*.whl"))) as archive:
        yield archive


# --- the packages --------------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    ours = {name.removeprefix("src/") for name in tracked() if name.startswith("src/") and (ROOT / name).exists()}
    assert held == ours
    loops = {"nondual/ops/selective_scan/cpu/scan.c", "nondual/ops/sparse_attention/tiles.c"}
    assert {"nondual/py.typed", *loops} <= held
    licences = {name.split("/")[-1] for name in wheel.namelist() if "/licenses/" in name}
    assert licences == {"LICENSE", "LICENSE-TEXT"}


def test_the_wheel_works_without_the_checkout(packages, tmp_path):
    with zipfile.ZipFile(next(packages.glob("*.whl"))) as archive:
        archive.extractall(tmp_path)
    code = (
        "import nondual, torch\n"
        "assert nondual.__file__.startswith(folder), nondual.__file__\n"
        "q = torch.ones(1, 2, 3, 4)\n"
        "assert torch.equal(nondual.attention(q, q, q, causal=True), q)\n"
        "from nondual.ops.selective_scan import cpu\n"
        "from pathlib import Path\n"
        "assert (Path(cpu.__file__).parent / 'scan.c').is_file()\n"
    )
    run(sys.executable, "-c", f"folder = {str(tmp_path)!r}\n{code}", folder=tmp_path, PYTHONPATH=str(tmp_path))


def test_the_sdist_holds_what_git_tracks(sdist):
    held = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    assert held - {"PKG-INFO"} == {name for name in tracked() if (ROOT / name).is_file()} - {"PKG-INFO"}


@pytest.mark.timeout(500)
def test_the_sdist_runs_its_own_tests(sdist):
    """pytest finds every test there; these run too: of the library, the pages, the ledger and the workflows."""
    source = {"PYTHONPATH": str(sdist / "src"), "CI": "", "PYTHONDONTWRITEBYTECODE": "1"}
    code = "import nondual, sys; sys.exit(not nondual.__file__.startswith(sys.argv[1]))"
    run(sys.executable, "-c", code, sdist, folder=sdist, **source)
    chosen = ["test_masks.py", "test_commands.py", "test_ledger.py", "test_tasks.py"]
    quiet = ["-q", "-p", "no:cacheprovider", "--assert=plain"]  # asserts are not rewritten, a third of the time
    passed = run(
        sys.executable, "-m", "pytest", *quiet, "tests", "-k", " or ".join(chosen), folder=sdist, limit=400, **source
    )
    said = re.search(r"\n(?:=+ )?(\d+) passed,.*? (\d+) deselected", passed)
    assert said and int(said[1]) > 50 and int(said[2]) > 1000 and "failed" not in passed, passed[-2000:]


def test_a_wheel_built_from_the_sdist_is_the_same(sdist, wheel, tmp_path):
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, folder=sdist)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as again:
        assert {i.filename: i.CRC for i in again.infolist()} == {i.filename: i.CRC for i in wheel.infolist()}


# --- the metadata --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_the_metadata_names_the_project(metadata):
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog"} == set(urls)
    assert all(url.startswith("https://") for url in urls.values())
    assert metadata["Description-Content-Type"] == "text/markdown" and "# nondual" in metadata.get_payload()
    versions = {c.split(" :: ")[-1] for c in metadata.get_all("Classifier") if "Python :: 3." in c}
    assert versions == {"3.11", "3.12", "3.13", "3.14"} and metadata["Requires-Python"] == ">=3.11"


def test_only_the_extra_brings_triton(metadata):
    needed = metadata.get_all("Requires-Dist")
    assert {re.match(r"[\w-]+", line)[0] for line in needed if "extra ==" not in line} == {
        "torch", "numpy", "einops", "jaxtyping"
    }  # fmt: skip
    (line,) = (line for line in needed if line.startswith("triton"))
    assert "extra == 'triton'" in line


def requirements(*lists: list) -> set[str]:
    """The names of the packages that lists of requirements ask for."""
    return {re.match(r"[\w-]+", line)[0] for lines in lists for line in lines if isinstance(line, str)}


def test_every_package_that_the_library_imports_is_declared():
    found = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            found |= {name.split(".")[0] for name in names}
    declared = requirements(PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values())
    by_matplotlib = {"cycler"}
    names = {"PIL": "pillow", "resvg_py": "resvg-py"}  # of packages that are imported by another name
    standard = {*sys.stdlib_module_names, "compression"}  # this one from Python 3.14 on; an older Python does without
    assert {names.get(name, name) for name in found} - {"nondual", *standard} <= declared | by_matplotlib


def test_every_dependency_is_pinned_for_the_tests():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in pins if "==" in line}
    extras, groups = PROJECT["project"]["optional-dependencies"], PROJECT["dependency-groups"]
    needed = requirements(PROJECT["project"]["dependencies"], *extras.values(), *groups.values())
    assert {name.lower().replace("_", "-") for name in needed} <= pinned


def test_the_version_is_said_once_everywhere():
    import nondual

    version = PROJECT["project"]["version"]
    assert nondual.__version__ == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


# --- links ---------------------------------------------------------------------------------------------------------


def test_the_readme_s_links_hold_on_a_package_index():
    """There a relative link leads nowhere: each is absolute, and what it names in this repository exists."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", readme)
    assert links
    for link in links:
        assert link.startswith("https://"), f"README.md links to {link}, which a package index cannot follow"
        if link.startswith(f"{REPOSITORY}/blob/main/"):
            assert (ROOT / link.removeprefix(f"{REPOSITORY}/blob/main/")).exists(), link


def test_every_page_names_the_same_repository():
    pages = ["pyproject.toml", "README.md", "CITATION.cff", "SECURITY.md", ".github/ISSUE_TEMPLATE/config.yml"]
    for page in pages:
        named = set(re.findall(r"https://github\.com/[\w.-]+/nondual\b", (ROOT / page).read_text(encoding="utf-8")))
        assert named <= {REPOSITORY}, f"{page} names {named}"
    assert REPOSITORY in (ROOT / "CITATION.cff").read_text()


# --- workflows -----------------------------------------------------------------------------------------------------


READ_BY_GITHUB = [*WORKFLOWS, ROOT / ".github/dependabot.yml", *sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))]


@pytest.mark.parametrize("file", READ_BY_GITHUB, ids=lambda file: file.name)
def test_what_github_reads_is_yaml(file):
    assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_every_action_is_pinned_by_its_commit(file):
    uses = re.findall(r"uses: *(\S+)(.*)", file.read_text(encoding="utf-8"))
    assert uses
    for action, comment in uses:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action), f"{file.name}: {action} is not pinned"
        assert re.fullmatch(r" +# v\d+(\.\d+)+", comment), f"{file.name}: say the version of {action} behind it"


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_every_job_has_a_time_limit_and_no_more_rights_than_it_needs(file):
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert 0 < job["timeout-minutes"] <= 90, f"{file.name}: {name}"
        rights = job.get("permissions", {})
        assert set(rights) <= {"contents", "pages", "id-token"} and rights.get("contents", "read") == "read"
        assert ("id-token" in rights) == bool("environment" in job), f"{file.name}: {name}"


def test_every_supported_python_is_tried():
    jobs = yaml.safe_load((ROOT / ".github/workflows/site.yml").read_text())["jobs"]
    assert jobs["pythons"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]


def test_a_release_is_published_by_the_workflow_s_own_identity():
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    publish = workflow["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["needs"] == "build"
    text = (ROOT / ".github/workflows/release.yml").read_text()
    assert "password" not in text and "secrets." not in text
    assert "twine check --strict" in text


def test_pre_commit_uses_the_same_ruff_as_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    local = [hook for repo in hooks["repos"] if repo["repo"] == "local" for hook in repo["hooks"]]
    assert [hook["id"] for hook in local] == ["ruff-check", "ruff-format"]
    for hook in local:
        assert set(hook["additional_dependencies"]) <= set((ROOT / "constraints.txt").read_text().splitlines())
