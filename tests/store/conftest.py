"""What the tests of fetching share: a tiny wheel, and a package index with faults, on the loopback interface.

wheel, tiny   a wheel, and the `Package` that pins two of its files
server        the address of `serve_index.py`; nothing here leaves this machine
cache         an empty cache, and a pip without any configuration
index         index("cut"): let pip's index be the one that behaves like this
closed        an address on this machine where nothing listens
requests      requests(server): what it was asked since this was last called
right         right(tiny): whether the cache holds the package, and nothing but the package
"""

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

from nondual.store import Package, download, status

SIZE = 350_000
NAMES = ("data/one.bin", "data/two.txt")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("wheel") / "tiny-1.2-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("tiny/data/one.bin"), random.Random(0).randbytes(SIZE))
        archive.writestr(zipfile.ZipInfo("tiny/data/two.txt"), "two")
        archive.writestr(zipfile.ZipInfo("tiny/code.py"), "raise SystemExit('must not run')")
    return file


@pytest.fixture(scope="module")
def tiny(wheel) -> Package:
    with zipfile.ZipFile(wheel) as archive:
        files = {name: hashlib.sha256(archive.read(f"tiny/{name}")).hexdigest() for name in NAMES}
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Package("tiny", "1.2", sha256, "tiny/", files, size=wheel.stat().st_size)


@pytest.fixture(scope="module")
def server(wheel):
    """The address of the server."""
    command = [sys.executable, str(Path(__file__).with_name("serve_index.py")), str(wheel)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()
            try:
                process.wait(10)
            finally:
                process.kill()


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache, a pip without any configuration, and no waiting between attempts."""
    for name in os.environ:
        if name.startswith("PIP_") or name.lower().endswith("_proxy") or name.endswith("_CA_BUNDLE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_TIMEOUT", "20")
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_pause", lambda failures: 0.01)
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch, cache, server, requests):
    """A function: let pip's index be the one that behaves like this."""

    def choose(kind: str) -> str:
        requests(server)
        monkeypatch.setenv("PIP_INDEX_URL", f"{server}/{kind}/simple")
        return server

    return choose


@pytest.fixture
def closed() -> str:
    """An address on this machine where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def requests():
    """A function: what the server was asked since this was last called."""

    def asked(server: str) -> list[dict]:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{server}/log", timeout=20) as answer:
            return json.load(answer)

    return asked


@pytest.fixture(scope="session")
def right():
    """A function: whether the package is there, and nothing but the package."""

    def whole(tiny: Package) -> bool:
        cache = tiny.folder.parent
        files = {str(f.relative_to(cache)) for f in cache.rglob("*") if f.is_file()}
        return status(tiny) == "complete" and files == {f"tiny-1.2/{name}" for name in NAMES}

    return whole
