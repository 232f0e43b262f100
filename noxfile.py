"""One command for each thing a reader or an author does. All share one environment, .nox/nondual.

nox -s docs      build the site into site/ (strict); -- --anew draws every figure again
nox -s serve     read it on http://127.0.0.1:8000
nox -s tests     unit tests, every snippet, and the site's checks
nox -s snippets  every fence alone, as `python file.py`
nox -s exercises grade what you wrote in exercises/; -- CHAPTER for one
nox -s gpu_tests the kernels on a CUDA device (add --no-venv to use the torch you have)
nox -s bench     timings against peers; nox -s bench -- NAME for one
nox -s lint      ruff and pyright
nox -s mutants   plant faults one at a time in a copy, to see that tests catch them; -- FILE or NUMBER for some
"""

import hashlib
import os
import re
import socket
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
SITE = ROOT / "site"
BUILT = ROOT / ".nox" / "site"  # what the site was built from; not in site/, which is published
BARE = "--no-venv" in sys.argv  # use the interpreter that runs nox, and install nothing

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "none"  # `environment` below makes the one that all sessions share
nox.options.sessions = ["docs", "tests"]

os.environ["NO_MKDOCS_2_WARNING"] = "1"
os.environ["PYTHONUTF8"] = "1"


def run(session: nox.Session, *command: str, minutes: float, **options) -> str | bool | None:
    """Run a command, and end it with all that it started when its time is over: nothing stands still for ever."""
    limit = [sys.executable, str(ROOT / "hooks" / "limited.py"), str(minutes)]
    return session.run(*limit, *command, interrupt_timeout=15, terminate_timeout=15, **options)


def environment(session: nox.Session) -> str:
    """The Python of the shared environment, made anew when what it holds has changed."""
    if BARE:
        return sys.executable
    if not (3, 11, 5) <= sys.version_info[:3] < (3, 15):  # what builds the site has left 3.11.4 behind
        session.error(f"nondual is tested on Python 3.11.5 to 3.14; this nox runs on {sys.version.split()[0]}.")
    home = ROOT / ".nox" / "nondual"
    python = str(home / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    stamp = recipe()
    if not (home / "stamp").exists() or (home / "stamp").read_text() != stamp:
        run(session, sys.executable, "-m", "virtualenv", "--clear", "--quiet", str(home), minutes=5)
        run(
            session, python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "-c", "constraints.txt", "-e", ".[pretrained,figures,pictures]", "--group", "dev",
            minutes=40,
        )  # fmt: skip
        (home / "stamp").write_text(stamp)
    return python


def recipe() -> str:
    """A hash of all that decides what the environment holds: the dependencies, the pins and this Python."""
    import tomllib  # not at the top: an older Python should get as far as the sentence above

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    parts = [project["build-system"], project["project"], project["dependency-groups"]]
    text = repr(parts) + (ROOT / "constraints.txt").read_text(encoding="utf-8") + sys.version + str(ROOT)
    return hashlib.sha256(text.encode()).hexdigest()


def build(session: nox.Session, *, anew: bool = True) -> str:
    """Build the site, strictly; a broken link, a failing figure or a false verdict stops it.

    Figures whose code, library and versions are as they were are taken from .cache, but not in CI.
    Without `anew` a site that was built from the files as they are is taken as it is.
    """
    python = environment(session)
    run(session, python, "hooks/weights.py", minutes=20)  # those that the pages read, once, into the user's cache
    sources = contents()
    if not anew and is_built(sources):
        session.log("The site is built from the files as they are.")
        return python
    BUILT.unlink(missing_ok=True)
    env = {"OMP_WAIT_POLICY": "passive"}  # torch's threads sleep while they wait, and do not hold up a busy machine
    if "--anew" in session.posargs:
        env["NONDUAL_DRAW_ANEW"] = "1"
    run(session, python, "-m", "mkdocs", "build", "--strict", "--site-dir", str(SITE), env=env, minutes=20)
    BUILT.parent.mkdir(exist_ok=True)
    BUILT.write_text(sources)
    return python


def is_built(sources: str) -> bool:
    """Whether there is a site that was built from these files, as `contents` says them."""
    return SITE.exists() and BUILT.exists() and BUILT.read_text() == sources


def contents() -> str:
    """A hash of every file of the project but what is made from them: pages, code, tests, measurements."""
    found = hashlib.sha256((recipe() + os.environ.get("SITE_URL", "")).encode())
    for folder, inner, names in os.walk(ROOT):
        made = ("site", "dist") if Path(folder) == ROOT else ()
        inner[:] = sorted(name for name in inner if name not in (*made, "__pycache__") and name[0] != ".")
        for name in sorted(names):
            file = Path(folder, name)
            if file.is_file():
                found.update(f"{file.relative_to(ROOT)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into site/; `-- --anew` draws every figure again, as CI does."""
    build(session)
    session.log("Built. Read it with: nox -s serve")


@nox.session
def serve(session: nox.Session) -> None:
    """Serve the built site; `nox -s serve -- --live` rebuilds it as you write, `-- 8001` takes another port."""
    python = environment(session)
    port = next((given for given in session.posargs if given.isdigit()), "8000")
    with socket.socket() as knock:
        if knock.connect_ex(("127.0.0.1", int(port))) == 0:
            session.error(f"Port {port} is taken: nox -s serve -- {int(port) + 1}")
    if "--live" in session.posargs:
        session.run(python, "-m", "mkdocs", "serve", "--dev-addr", f"127.0.0.1:{port}")
        return
    if not SITE.exists():
        session.error("There is no site yet: run `nox -s docs` first.")
    session.log(f"http://127.0.0.1:{port} (stop with Ctrl-C)")
    session.run(python, "-m", "http.server", port, "--bind", "127.0.0.1", "--directory", str(SITE))


@nox.session
def tests(session: nox.Session) -> None:
    """Unit tests, every snippet of README and docs, and the checks of the built site; `-- -n0` runs them in turn."""
    python = build(session, anew=False)
    run(session, python, "-m", "nondual.pretrained", minutes=20)  # the tests read all of the weights and texts
    # The tests of a file stay together, for what they share; conftest.py sorts the files. Each worker loads torch.
    many = ["--numprocesses=auto", "--maxprocesses=4", "--dist=loadfile", "--no-loadscope-reorder"]
    what = ["--codeblocks", "tests", "README.md", "docs", "--durations=40", "--durations-min=8"]
    run(session, python, "-m", "pytest", *many, *what, *session.posargs, minutes=60)  # twenty minutes on two cores


@nox.session
def snippets(session: nox.Session) -> None:
    """Every fence of README and docs as a file of its own, as a reader would run it.

    Where the site is built from the files as they are, its build has run the figures so, and they are left out.
    """
    python = environment(session)
    run(session, python, "hooks/weights.py", "--snippets", minutes=20)
    figures = () if session.posargs or not is_built(contents()) else ("--snippets",)
    run(session, python, "hooks/fences.py", *figures, *session.posargs, minutes=30)


@nox.session
def exercises(session: nox.Session) -> None:
    """Grade what a reader wrote in exercises/, a line for each exercise; `-- mamba` grades those of one chapter."""
    python = environment(session)
    run(session, python, "tests/exercises/grading.py", *session.posargs, minutes=10)


@nox.session
def gpu_tests(session: nox.Session) -> None:
    """The kernels on a CUDA device, in every dtype and at full size."""
    python = environment(session)
    needed = ["torch", "numpy", "triton", "einops", "jaxtyping", "pytest"]
    probe = f"import importlib.util as u; print(*(name for name in {needed} if not u.find_spec(name)))"
    if missing := run(session, python, "-c", probe, minutes=5, silent=True).strip():
        session.error(f"gpu_tests needs {missing}: {python} -m pip install {missing}")
    probe = "import torch; print('CUDA' if torch.cuda.is_available() else 'none')"
    if "CUDA" not in run(session, python, "-c", probe, minutes=5, silent=True):
        session.error("gpu_tests needs a CUDA device, and torch sees none here: nothing was tested.")
    files = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "tests").rglob("test_*.py")) if on_gpu(file)]
    if not files:
        session.error("gpu_tests found no test marked `gpu`: nothing was tested.")
    env = {"PYTHONPATH": str(ROOT / "src")} if BARE else {}  # a bare interpreter has no nondual installed
    run(session, python, "-m", "pytest", "-m", "gpu", *files, *session.posargs, env=env, minutes=60)


def on_gpu(file: Path) -> bool:
    """Whether a file has tests for a GPU. Only these are collected: the others import more than a bare machine has."""
    marked = r"^[ \t]*@pytest\.mark\.gpu\b|^pytestmark\b.*\bgpu\b|\bmarks=.*\bgpu\b|^@everywhere\b"
    return re.search(marked, file.read_text(encoding="utf-8"), re.MULTILINE) is not None


@nox.session
def bench(session: nox.Session) -> None:
    """Time ours against its peers in one run, and write docs/measured."""
    python = environment(session)
    run(session, python, "-m", "benchmarks", *session.posargs, minutes=240)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, as an error and as a format, and pyright on the library."""
    python = environment(session)
    run(session, python, "-m", "ruff", "check", ".", minutes=5)
    run(session, python, "-m", "ruff", "format", "--check", ".", minutes=5)
    run(session, python, "-m", "pyright", "--pythonpath", python, minutes=10)


@nox.session
def mutants(session: nox.Session) -> None:
    """Plant faults one at a time in a copy of the tree, and see whether a test catches each; -- FILE or NUMBER."""
    python = environment(session)
    run(session, python, "tests/mutants/run.py", *session.posargs, minutes=240)
