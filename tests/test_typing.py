"""What type checkers say: nothing about users' scripts, something about each mistake, and that every name is typed.

`nox -s lint` runs pyright on the library itself.
The scripts of tests/typing are checked strictly, in a folder of their own, as a user's project that has nondual
installed. They are not run.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "tests/typing").glob("*_user.py"))
MISTAKES = ROOT / "tests/typing/mistakes.py"

# Parts of torch and transformers that the library does not import: no type of ours comes from there. Without them mypy
# takes a third of the time. It does read the one model whose class we return.
UNREAD = (
    "torch._decomp", "torch._dynamo", "torch._export", "torch._functorch", "torch._higher_order_ops",
    "torch._inductor", "torch._prims", "torch._refs", "torch.ao", "torch.distributed", "torch.export",
    "torch.fx.passes", "torch.onnx", "torch.profiler", "torch.testing", "torch.utils.data",
    "transformers.data", "transformers.integrations", "transformers.loss", "transformers.models",
    "transformers.pipelines", "transformers.quantizers", "sympy",
)  # fmt: skip
READ = "transformers.models,transformers.models.llama.*"

pytestmark = pytest.mark.timeout(900)  # a checker reads most of torch: 5 to 20 s


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A user's project: the scripts, and settings that are as strict as they can be."""
    folder = tmp_path_factory.mktemp("project")
    for script in [*SCRIPTS, MISTAKES]:
        shutil.copy(script, folder)
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict", "include": ["."]}))
    library = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    assert not [name for name in UNREAD if re.search(rf"\b(?:from|import) {re.escape(name)}\b", library)]
    unread = ",".join(f"{name}.*" for name in UNREAD)
    (folder / "mypy.ini").write_text(
        f"[mypy]\nstrict = True\n[mypy-{unread}]\nfollow_imports = skip\n[mypy-{READ}]\nfollow_imports = normal\n"
    )
    return folder


def pyright(*arguments: str, folder: Path = ROOT, site: Path | None = None) -> dict:
    """pyright's report. It runs by the node that is installed beside it (the extra nodejs); nothing is downloaded.

    Args:
        arguments: what to check; by default all that the settings in the folder say.
        folder: where pyright runs.
        site: a folder with packages that are found before the installed ones.
    """
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    interpreter = () if "--verifytypes" in arguments else ("--pythonpath", sys.executable)  # it takes none with that
    command = [sys.executable, "-m", "pyright", "--outputjson", *interpreter, *arguments]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=800)
    assert ran.stdout.startswith("{"), f"pyright ended with {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def by_pyright(project) -> dict[str, dict[int, str]]:
    """What pyright says about the user's project: for each file the lines, and what is wrong there."""
    said: dict[str, dict[int, str]] = {}
    for each in pyright(folder=project)["generalDiagnostics"]:
        said.setdefault(Path(each["file"]).name, {})[each["range"]["start"]["line"] + 1] = each["message"]
    return said


@pytest.fixture(scope="module")
def by_mypy(project, pytestconfig) -> dict[str, dict[int, str]]:
    """The same by mypy."""
    cache = pytestconfig.cache.mkdir("mypy") if getattr(pytestconfig, "cache", None) else project / "cache"
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(cache), "."]
    ran = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=800)
    assert re.search(r"^(Found \d+ errors? in|Success)", ran.stdout, re.M), f"{ran.stdout}\n{ran.stderr}"
    said: dict[str, dict[int, str]] = {}
    for file, line, message in re.findall(r"^(\S+?):(\d+): error: (.*)$", ran.stdout, re.M):
        said.setdefault(file, {})[int(line)] = message
    return said


def refused() -> set[int]:
    lines = enumerate(MISTAKES.read_text(encoding="utf-8").splitlines(), 1)
    return {number for number, line in lines if line.endswith("# refused")}


@pytest.mark.parametrize("checker", ["by_pyright", "by_mypy"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_user_s_script_is_right(checker, script, request):
    assert request.getfixturevalue(checker).get(script.name, {}) == {}


@pytest.mark.parametrize("checker", ["by_pyright", "by_mypy"])
def test_each_mistake_is_reported(checker, request):
    assert set(request.getfixturevalue(checker)["mistakes.py"]) == refused()


def test_every_public_name_is_typed(tmp_path):
    """pyright's own measure of a typed library, on the built wheel: only the Triton kernels' modules are left out."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True,
                   capture_output=True, timeout=100)  # fmt: skip
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    found = pyright("--verifytypes", "nondual", "--ignoreexternal", folder=tmp_path, site=tmp_path / "site")
    symbols = [each for each in found["typeCompleteness"]["symbols"] if each["isExported"]]
    ours = [each for each in symbols if ".triton." not in each["name"]]
    assert len(ours) > 400
    assert [each["name"] for each in ours if each["isTypeAmbiguous"] or not each["isTypeKnown"]] == []
