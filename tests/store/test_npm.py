"""A tarball comes from npm's registry as npm is configured: its address, its credentials, and each of its faults."""

import base64

import pytest

from nondual.store import FetchError, fetch, status
from nondual.store.npm import DEFAULT_REGISTRY, NpmSettings, npm_settings


@pytest.fixture
def registry(monkeypatch, cache, server, requests):
    """A function: let npm's registry be the one that behaves like this."""

    def choose(kind: str) -> str:
        requests(server)
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"{server}/{kind}/npm")
        return server

    return choose


@pytest.fixture
def npmrc(cache, monkeypatch, tmp_path):
    """A function: what stands in the user's .npmrc."""
    return lambda text: (tmp_path / "npmrc").write_text(text)


def test_the_tarball_of_a_scope_is_fetched_once(registry, tiny_npm, right, requests):
    server = registry("plain")
    assert fetch(tiny_npm).name == "tiny-pictures-1.2" and right(tiny_npm)
    asked = [one["path"] for one in requests(server)]
    assert asked == ["/plain/npm/@tiny%2Fpictures", "/plain/npm/@tiny/pictures/-/pictures-1.2.tgz"]
    fetch(tiny_npm)
    assert requests(server) == []


def test_an_interrupted_download_goes_on_where_it_was(registry, tiny_npm, right, requests):
    server = registry("cut")
    fetch(tiny_npm)
    assert right(tiny_npm)
    asked = [one["range"] for one in requests(server) if one["path"].endswith(".tgz")]
    assert asked == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]


@pytest.mark.parametrize("kind", ["redirect", "busy-once", "norange", "mirror"])
def test_registries_that_do_it_in_their_own_way(registry, tiny_npm, kind, right):
    """A mirror repeats the public registry's addresses, and means its own."""
    registry(kind)
    fetch(tiny_npm)
    assert right(tiny_npm)


def test_a_damaged_file_is_fetched_again(registry, tiny_npm, right):
    registry("plain")
    fetch(tiny_npm)
    (tiny_npm.folder / next(iter(tiny_npm.files))).write_bytes(b"cut short")
    assert status(tiny_npm) == "damaged"
    fetch(tiny_npm)
    assert right(tiny_npm)


@pytest.mark.parametrize(
    "kind, says",
    [
        ("missing", r"/missing/npm does not have it \(HTTP 404\)"),
        ("busy", r"/busy/npm is out of order \(HTTP 503\)"),
        ("gone", r"does not have it \(HTTP 404\)"),
        ("wrong", r"sent a file of sha256 [0-9a-f]{64}, not the pinned [0-9a-f]{64}"),
        ("newer", r"/newer/npm does not have version 1\.2"),
        ("garbage", r"/garbage/npm cannot be read as an npm registry"),
        ("auth", r"wants a user and a password \(HTTP 401\)"),
    ],
)
def test_what_a_registry_may_refuse_is_one_sentence(registry, tiny_npm, kind, says):
    registry(kind)
    with pytest.raises(FetchError, match=says) as error:
        fetch(tiny_npm)
    assert "\n" not in str(error.value) and str(error.value).startswith("@tiny/pictures 1.2 could not be fetched: ")
    assert list(tiny_npm.folder.parent.iterdir()) == []


def test_offline_is_said_in_one_sentence(cache, monkeypatch, tiny_npm, closed):
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", closed.replace("//", "//ada:lovelace@"))
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(FetchError, match=r"this machine seems to be offline .*the connection is refused") as error:
        fetch(tiny_npm)
    assert "lovelace" not in str(error.value)


def test_a_token_goes_to_its_registry_and_nowhere_else(registry, npmrc, monkeypatch, server, tiny_npm, right, requests):
    registry("auth")
    host = server.partition(":")[2]
    monkeypatch.setenv("TINY_TOKEN", "a-token")
    npmrc(f"{host}/auth/npm/:_authToken=${{TINY_TOKEN}}\n")
    fetch(tiny_npm)
    assert right(tiny_npm)
    assert {one["auth"] for one in requests(server)} == {"Bearer a-token"}
    (tiny_npm.folder / next(iter(tiny_npm.files))).unlink()
    registry("plain")  # another registry on the same host
    fetch(tiny_npm)
    assert {one["auth"] for one in requests(server)} == {None}


# --- the settings ---------------------------------------------------------------------------------------------------


def test_the_registry_of_a_scope_then_the_variable_then_the_file_then_the_public_one(npmrc, monkeypatch):
    assert npm_settings("tiny") == NpmSettings(DEFAULT_REGISTRY, None)
    npmrc("; a comment\n# = another\nregistry = https://file/npm/\n@mine:registry=https://scope/\n")
    assert npm_settings("tiny").registry == "https://file/npm"
    assert npm_settings("@mine/tiny").registry == "https://scope"
    monkeypatch.setenv("npm_config_registry", "https://small")
    assert npm_settings("tiny").registry == "https://small"
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "https://large")
    assert npm_settings("tiny").registry == "https://large" and npm_settings("@mine/x").registry == "https://scope"


def test_credentials_of_the_host_or_of_a_path_under_it(npmrc):
    npmrc("registry=https://host/a/npm\n//host/:_authToken=outer\n")
    assert npm_settings("tiny").authorization == "Bearer outer"
    npmrc("registry=https://host/a/npm\n//host/:_authToken=outer\n//host/a/npm/:_auth=aW5uZXI6eA==\n")
    assert npm_settings("tiny").authorization == "Basic aW5uZXI6eA=="
    password = base64.b64encode(b"lovelace").decode()
    npmrc(f"registry=https://host/\n//host/:username=ada\n//host/:_password={password}\n")
    assert npm_settings("tiny").authorization == "Basic " + base64.b64encode(b"ada:lovelace").decode()
    npmrc("registry=https://host/\n//other/:_authToken=x\n")
    assert npm_settings("tiny").authorization is None


def test_credentials_are_not_shown(npmrc):
    npmrc("registry=https://ada:secret@host\n//ada:secret@host/:_authToken=token\n")
    found = npm_settings("tiny")
    assert found.authorization == "Bearer token" and "secret" not in repr(found) and "token" not in repr(found)


def test_a_file_that_cannot_be_read_is_named(cache, monkeypatch, tmp_path, tiny_npm):
    (tmp_path / "npmrc").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(FetchError, match=r"npm's configuration .*npmrc cannot be read"):
        fetch(tiny_npm)
