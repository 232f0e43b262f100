"""Each kind of package has its places in their order, and an archive that is read in its own way."""

import pytest

from nondual.store import FetchError, Package, fetch
from nondual.store.origins import ORIGINS, Wanted
from nondual.store.pip_settings import PipSettings

SETTINGS = PipSettings(index_urls=("https://a/simple", "https://b/simple"), find_links=("/wheels",))


def test_the_places_in_their_order(cache):
    wanted = Wanted("tiny", "1.2", "0" * 64, "main/t/tiny")
    addresses = {
        source: [place.address for place in origin.places(wanted, SETTINGS)] for source, origin in ORIGINS.items()
    }
    assert addresses["pypi"] == ["https://a/simple", "https://b/simple", "/wheels"]
    assert addresses["npm"] == ["https://registry.npmjs.org"]
    assert [address.split("/")[2] for address in addresses["debian"]] == ["deb.debian.org", "snapshot.debian.org"]


def test_what_arrives_is_named_by_its_kind(tiny, tiny_npm, tiny_debian):
    assert tiny.part.name == "tiny-1.2.whl.part"
    assert tiny_npm.part.name == "tiny-pictures-1.2.tgz.part"
    assert tiny_debian.part.name == "tiny-pictures-1.2~git+dfsg-1.deb.part"


@pytest.mark.parametrize("kind, called", [("npm", "npm tarball"), ("debian", "Debian package")])
def test_an_archive_without_the_pinned_files_says_so(cache, monkeypatch, server, tiny_npm, tiny_debian, kind, called):
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"{server}/plain/npm")
    monkeypatch.setenv("NONDUAL_DEBIAN_MIRROR", f"{server}/plain/debian")
    tiny = tiny_npm if kind == "npm" else tiny_debian
    other = Package(tiny.name, tiny.version, tiny.sha256, "other/", tiny.files, source=tiny.source, pool=tiny.pool)
    with pytest.raises(FetchError, match=rf"the {called} of {tiny.name} .* does not hold what was pinned: There is no"):
        fetch(other)


def test_no_other_program_is_started(cache, monkeypatch, server, tiny_npm, right):
    """Neither npm nor apt is started."""
    import os
    import subprocess

    def refuse(*given, **more):
        raise AssertionError("a process was started")

    monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"{server}/plain/npm")
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "posix_spawn", refuse)
    fetch(tiny_npm)
    assert right(tiny_npm)
