"""One command for each thing a reader or an author does. All share one environment, .nox/nondual.

    nox -s docs      build the site into site/ (strict)
    nox -s serve     read it on http://127.0.0.1:8000
    nox -s tests     unit tests, every snippet, and the site's checks
    nox -s snippets  every fence alone, as `python file.py`
    nox -s gpu_tests the kernels on a CUDA device (add --no-venv to use the torch you have)
    nox -s bench     timings against peers; nox -s bench -- NAME for one
    nox -s lint      ruff
"""

import hashlib
import os
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
SITE = ROOT / "site"
BARE = "--no-venv" in sys.argv  # use the interpreter that runs nox, and install nothing

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "none"  # `environment` below makes the one that all sessions share
nox.options.sessions = ["docs", "tests"]

os.environ["NO_MKDOCS_2_WARNING"] = "1"
os.environ["PYTHONUTF8"] = "1"


def environment(session: nox.Session) -> str:
    """The Python of the shared environment, made anew when pyproject.toml or constraints.txt changed."""
    if BARE:
        return sys.executable
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        session.error(f"nondual is tested on Python 3.11 to 3.13; this nox runs on {sys.version.split()[0]}.")
    home = ROOT / ".nox" / "nondual"
    python = str(home / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    recipe = [ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    stamp = hashlib.sha256(b"".join(file.read_bytes() for file in recipe) + sys.version.encode()).hexdigest()
    if not (home / "stamp").exists() or (home / "stamp").read_text() != stamp:
        session.run(sys.executable, "-m", "virtualenv", "--clear", "--quiet", str(home))
        session.run(
            python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "-c", "constraints.txt", "-e", ".[pretrained,figures]", "--group", "dev",
        )  # fmt: skip
        (home / "stamp").write_text(stamp)
    return python


def build(session: nox.Session) -> str:
    """Build the site, strictly; a broken link, a failing figure or a false verdict stops it."""
    python = environment(session)
    session.run(python, "-m", "nondual.pretrained")  # the real weights, once, into the user's cache
    session.run(python, "-m", "mkdocs", "build", "--strict", "--site-dir", str(SITE))
    return python


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into site/."""
    build(session)
    session.log("Built. Read it with: nox -s serve")


@nox.session
def serve(session: nox.Session) -> None:
    """Serve the built site; `nox -s serve -- --live` rebuilds it as you write."""
    python = environment(session)
    if "--live" in session.posargs:
        session.run(python, "-m", "mkdocs", "serve", "--dev-addr", "127.0.0.1:8000")
    if not SITE.exists():
        session.error("There is no site yet: run `nox -s docs` first.")
    session.log("http://127.0.0.1:8000 (stop with Ctrl-C)")
    session.run(python, "-m", "http.server", "8000", "--bind", "127.0.0.1", "--directory", str(SITE))


@nox.session
def tests(session: nox.Session) -> None:
    """Unit tests, every snippet of README and docs, and the checks of the built site."""
    python = build(session)
    session.run(python, "-m", "pytest", "--codeblocks", "tests", "README.md", "docs", *session.posargs)


@nox.session
def snippets(session: nox.Session) -> None:
    """Every fence of README and docs as a file of its own, as a reader would run it."""
    python = environment(session)
    session.run(python, "-m", "nondual.pretrained")
    session.run(python, "hooks/fences.py", *session.posargs)


@nox.session
def gpu_tests(session: nox.Session) -> None:
    """The kernels on a CUDA device, in every dtype and at full size."""
    python = environment(session)
    probe = "import torch; print('CUDA' if torch.cuda.is_available() else 'none')"
    if "CUDA" not in session.run(python, "-c", probe, silent=True):
        session.error("gpu_tests needs a CUDA device, and torch sees none here: nothing was tested.")
    session.run(python, "-m", "pytest", "-m", "gpu", "tests", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Time ours against its peers in one run, and write docs/measured."""
    python = environment(session)
    session.run(python, "-m", "benchmarks", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, as an error and as a format."""
    python = environment(session)
    session.run(python, "-m", "ruff", "check", ".")
    session.run(python, "-m", "ruff", "format", "--check", ".")
