"""The download over connections that break and servers that send the wrong piece: resumed, begun anew, or given up."""

import pytest

from nondual.store import FetchError, fetch


def test_an_interrupted_download_goes_on_where_it_was(index, tiny, right, requests):
    server = index("cut")
    seen = []
    fetch(tiny, lambda here, whole: seen.append((here, whole)))
    assert right(tiny)
    asked = [one["range"] for one in requests(server) if one["path"].endswith(".whl")]
    assert asked == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]
    assert seen == sorted(seen) and {whole for _, whole in seen} == {tiny.size} and seen[-1][0] == tiny.size


@pytest.mark.parametrize("kind", ["json", "norange", "other-range"])
@pytest.mark.parametrize("left", ["some of it", "all of it", "more than all", "of another file"])
def test_what_an_earlier_attempt_left_is_used_or_given_up(index, tiny, wheel, kind, left, right, requests):
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
def test_a_server_that_always_sends_a_piece_is_given_up(index, tiny, requests):
    server = index("always-a-piece")
    with pytest.raises(FetchError, match=r"sends a piece where the whole file was asked for \(HTTP 206\)"):
        fetch(tiny)
    assert len([line for line in requests(server) if line["path"].endswith(".whl")]) == 1


def test_a_server_that_never_gets_further_is_given_up(index, tiny, requests):
    server = index("stuck")
    with pytest.raises(FetchError, match=r"tiny 1\.2 could not be fetched: .*breaks the connection.* is kept"):
        fetch(tiny)
    assert 2 <= len(requests(server)) < 12


def test_an_index_that_is_down_does_not_hide_another(index, monkeypatch, tiny, closed, right):
    server = index("json")
    monkeypatch.setenv("PIP_INDEX_URL", f"{closed}/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{server}/missing/simple")
    with pytest.raises(FetchError, match=r"could not be fetched: .*refused; .*does not have it") as error:
        fetch(tiny)
    assert "offline" not in str(error.value)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{server}/json/simple")
    fetch(tiny)
    assert right(tiny)


def test_without_an_index_and_without_links(cache, monkeypatch, tiny):
    monkeypatch.setenv("PIP_NO_INDEX", "true")
    with pytest.raises(FetchError, match=r"pip is configured to use no index \(no-index\), and no find-links"):
        fetch(tiny)
