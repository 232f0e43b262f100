"""A package in the cache: its modes, what a complete, damaged or full one does, and where the cache may lie."""

import os
import stat

import pytest

from nondual.store import FetchError, Package, download, fetch, status


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


def test_damaged_and_lost_files_are_fetched_again(index, tiny, right):
    index("json")
    fetch(tiny)
    (tiny.folder / next(iter(tiny.files))).write_bytes(b"cut short")
    assert status(tiny) == "damaged"
    fetch(tiny)
    assert right(tiny)
    (tiny.folder / list(tiny.files)[1]).unlink()
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


def test_without_a_home_and_without_an_account(index, monkeypatch, tiny, tmp_path, right):
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


@pytest.mark.parametrize("at", ["download", "unpack"])
def test_a_full_disk_is_one_sentence_and_what_has_arrived_is_kept(index, monkeypatch, tiny, at, right, requests):
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
