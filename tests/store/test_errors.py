"""Each fault is one sentence that says why: offline, refused, no folder to write to; and no password is in it."""

import pytest

from nondual.store import FetchError, errors, fetch


@pytest.mark.parametrize("secret", ["ada:lovelace", "ada:love@lace", "token"])
def test_a_password_is_never_printed(cache, monkeypatch, tiny, closed, tmp_path, secret):
    assert errors.shown(f"see https://{secret}@host/simple, a@b") == "see https://host/simple, a@b"
    monkeypatch.setenv("PIP_INDEX_URL", closed.replace("//", f"//{secret}@"))
    with pytest.raises(FetchError) as caught:
        fetch(tiny)
    monkeypatch.setenv("PIP_PROXY", f"gopher://{secret}@127.0.0.1:1")
    with pytest.raises(FetchError, match="proxy") as of_proxy:
        fetch(tiny)
    for said in (str(caught.value), str(of_proxy.value)):
        assert not any(part in said for part in secret.replace("@", ":").split(":")), said


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


def test_a_folder_that_cannot_be_written_to(index, monkeypatch, tiny, tmp_path):
    index("json")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(FetchError, match=r"cannot be written: Not a directory\. Set NONDUAL_CACHE to a folder"):
        fetch(tiny)
