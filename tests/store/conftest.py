"""What the tests of fetching share: tiny packages, and a package index with faults, on the loopback interface.

wheel, tiny   a wheel, and the `Package` that pins two of its files
tarball, deb  an npm tarball and a Debian package with the same files
tiny_npm, tiny_debian   the `Package` of each
server        the address of `serve_index.py`; nothing here leaves this machine
cache         an empty cache, and a pip and an npm without any configuration
index         index("cut"): let pip's index be the one that behaves like this
closed        an address on this machine where nothing listens
requests      requests(server): what it was asked since this was last called
right         right(tiny): whether the cache holds the package's two files, and nothing but these
"""

import hashlib
import io
import json
import os
import random
import socket
import subprocess
import sys
import tarfile
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


def tar(files: dict[str, bytes], mode: str) -> bytes:
    """A tar file, with a link that leads out of it."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("package/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return whole.getvalue()


def ar(parts: dict[str, bytes]) -> bytes:
    """An `ar` archive, as deb(5) describes it."""
    whole = b"!<arch>\n"
    for name, content in parts.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
        whole += header.encode() + content + b"\n" * (len(content) % 2)
    return whole


def pinned(wheel: Path, archive: Path, name: str, version: str, root: str, **more) -> Package:
    """The package in an archive that holds the files of the wheel."""
    with zipfile.ZipFile(wheel) as opened:
        files = {name: hashlib.sha256(opened.read(f"tiny/{name}")).hexdigest() for name in NAMES}
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    return Package(name, version, sha256, root, files, size=archive.stat().st_size, **more)


@pytest.fixture(scope="module")
def tarball(wheel) -> Path:
    file = wheel.with_name("pictures-1.2.tgz")
    with zipfile.ZipFile(wheel) as archive:
        files = {f"package/{name}": archive.read(f"tiny/{name}") for name in NAMES}
    file.write_bytes(tar(files, "w:gz"))
    return file


@pytest.fixture(scope="module")
def deb(wheel) -> Path:
    file = wheel.with_name("tiny-pictures_1.2~git+dfsg-1_all.deb")
    with zipfile.ZipFile(wheel) as archive:
        files = {f"./usr/share/tiny/{name}": archive.read(f"tiny/{name}") for name in NAMES}
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": tar({}, "w:xz"), "data.tar.xz": tar(files, "w:xz")}
    file.write_bytes(ar(parts))
    return file


@pytest.fixture(scope="module")
def tiny_npm(wheel, tarball) -> Package:
    return pinned(wheel, tarball, "@tiny/pictures", "1.2", "package/", source="npm")


@pytest.fixture(scope="module")
def tiny_debian(wheel, deb) -> Package:
    root, pool = "usr/share/tiny/", "main/t/tiny"
    return pinned(wheel, deb, "tiny-pictures", "1.2~git+dfsg-1", root, source="debian", pool=pool)


@pytest.fixture(scope="module")
def server(wheel, tarball, deb):
    """The address of the server."""
    command = [sys.executable, str(Path(__file__).with_name("serve_index.py")), str(wheel), str(tarball), str(deb)]
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
    """An empty cache, a pip and an npm without any configuration, and no waiting between attempts."""
    for name in os.environ:
        if name.startswith(("PIP_", "NONDUAL_")) or name.lower().startswith("npm_config_"):
            monkeypatch.delenv(name)
        elif name.lower().endswith("_proxy") or name.endswith("_CA_BUNDLE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NPM_CONFIG_USERCONFIG", str(tmp_path / "npmrc"))
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
        return status(tiny) == "complete" and files == {f"{tiny.folder.name}/{name}" for name in NAMES}

    return whole
