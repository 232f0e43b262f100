"""A Debian package comes from the pool of a mirror, and from Debian's archive where it has left the pool."""

import pytest

from nondual.store import FetchError, debian, fetch, status


@pytest.fixture
def mirror(monkeypatch, cache, server, requests):
    """A function: let the mirror be the one that behaves like this."""

    def choose(kind: str) -> str:
        requests(server)
        monkeypatch.setenv("NONDUAL_DEBIAN_MIRROR", f"{server}/{kind}/debian/")
        return server

    return choose


def test_it_comes_from_the_pool(mirror, tiny_debian, right, requests):
    server = mirror("plain")
    assert fetch(tiny_debian).name == "tiny-pictures-1.2~git+dfsg-1" and right(tiny_debian)
    pool = "/plain/debian/pool/main/t/tiny"
    assert [one["path"] for one in requests(server)] == [f"{pool}/tiny-pictures_1.2~git%2Bdfsg-1_all.deb"]
    (tiny_debian.folder / next(iter(tiny_debian.files))).write_bytes(b"cut short")
    assert status(tiny_debian) == "damaged"
    fetch(tiny_debian)
    assert right(tiny_debian)


def test_it_comes_from_a_folder_without_any_network(cache, monkeypatch, tiny_debian, deb, right, tmp_path):
    (tmp_path / "pool/main/t/tiny").mkdir(parents=True)
    (tmp_path / "pool/main/t/tiny" / deb.name).write_bytes(deb.read_bytes())
    monkeypatch.setenv("NONDUAL_DEBIAN_MIRROR", str(tmp_path))
    fetch(tiny_debian)
    assert right(tiny_debian)


def test_an_interrupted_download_goes_on_where_it_was(mirror, tiny_debian, right, requests):
    server = mirror("cut")
    fetch(tiny_debian)
    assert right(tiny_debian)
    asked = [one["range"] for one in requests(server)]
    assert asked == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]


def test_what_has_left_the_pool_comes_from_the_next_mirror(cache, monkeypatch, server, tiny_debian, right):
    monkeypatch.setattr(debian, "MIRRORS", (f"{server}/missing/debian", f"{server}/plain/debian"))
    fetch(tiny_debian)
    assert right(tiny_debian)


def test_the_mirrors():
    assert debian.MIRRORS[0] == "https://deb.debian.org/debian"
    assert debian.MIRRORS[1].startswith("https://snapshot.debian.org/archive/debian/2")


@pytest.mark.parametrize(
    "kind, says",
    [
        ("missing", r"/missing/debian does not have it \(HTTP 404\)"),
        ("gone", r"does not have it \(HTTP 404\)"),
        ("wrong", r"sent a file of sha256 [0-9a-f]{64}, not the pinned [0-9a-f]{64}"),
        ("endless", r"sent a file of sha256 [0-9a-f]{64}, not the pinned"),
    ],
)
def test_what_a_mirror_may_refuse_is_one_sentence(mirror, tiny_debian, kind, says):
    mirror(kind)
    with pytest.raises(FetchError, match=says) as error:
        fetch(tiny_debian)
    assert "\n" not in str(error.value)
    assert list(tiny_debian.folder.parent.iterdir()) == []


def test_offline_and_a_folder_without_it(cache, monkeypatch, tiny_debian, closed, tmp_path):
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("NONDUAL_DEBIAN_MIRROR", closed)
    with pytest.raises(FetchError, match=r"this machine seems to be offline .*the connection is refused"):
        fetch(tiny_debian)
    monkeypatch.setenv("NONDUAL_DEBIAN_MIRROR", str(tmp_path / "nowhere"))
    with pytest.raises(FetchError, match=r"has a file that cannot be read \(No such file or directory\)"):
        fetch(tiny_debian)
