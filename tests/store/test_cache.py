"""Where things are kept between runs, whatever the environment says or leaves out."""

import os
import tempfile
from pathlib import Path

import pytest

from nondual.store import cache_folder


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No variable is set, and temporary files have a folder of their own."""
    for name in ("NONDUAL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return monkeypatch


def test_the_variables_in_their_order(bare, tmp_path):
    bare.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home/.cache/nondual"
    bare.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/nondual"
    bare.setenv("NONDUAL_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_a_relative_folder_stays_where_it_was(bare, tmp_path):
    bare.chdir(tmp_path)
    for given, meant in ((".", tmp_path), ("here", tmp_path / "here")):
        bare.setenv("NONDUAL_CACHE", given)
        assert cache_folder() == meant and cache_folder().is_absolute()


def test_a_relative_xdg_folder_is_ignored_as_its_specification_says(bare, tmp_path):
    bare.setenv("HOME", str(tmp_path))
    bare.setenv("XDG_CACHE_HOME", "cache")
    assert cache_folder() == tmp_path / ".cache/nondual"


@pytest.fixture
def homeless(bare):
    """A user id without an account, and no HOME."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    bare.setattr(Path, "home", staticmethod(home))


def test_without_a_home_a_private_folder(homeless, tmp_path):
    assert cache_folder() == tmp_path / f"nondual-{os.getuid()}"
    assert cache_folder().stat().st_mode & 0o077 == 0


def test_a_folder_that_others_may_write_to_is_refused(homeless, tmp_path):
    cache_folder().chmod(0o777)
    with pytest.raises(PermissionError, match="set NONDUAL_CACHE"):
        cache_folder()


def test_a_tilde_is_the_home_folder(bare, tmp_path):
    bare.setenv("HOME", str(tmp_path))
    bare.setenv("NONDUAL_CACHE", "~/own folder")
    assert cache_folder() == tmp_path / "own folder"


@pytest.mark.parametrize("what", ["a link", "a link to nothing", "a file"])
def test_what_stands_where_the_private_folder_would_and_is_none_is_refused(homeless, tmp_path, what):
    """Another user could have put it there, and code is loaded from it."""
    place = tmp_path / f"nondual-{os.getuid()}"
    if what == "a file":
        place.touch()
    else:
        if what == "a link":
            (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="set NONDUAL_CACHE"):
        cache_folder()


def test_a_user_without_an_account(in_a_process_of_its_own, tmp_path):
    """As in a container that is run with a number for a user: no HOME, and no name to look one up by."""
    code = """
        import os, pwd
        from pathlib import Path

        def unknown(uid):
            raise KeyError(uid)

        pwd.getpwuid = unknown
        from nondual.store import cache_folder

        assert cache_folder() == Path(os.environ["TMPDIR"]) / f"nondual-{os.getuid()}"
        assert cache_folder().is_dir()
    """
    env = {"HOME": None, "NONDUAL_CACHE": None, "XDG_CACHE_HOME": None, "TMPDIR": str(tmp_path)}
    in_a_process_of_its_own(code, env=env, timeout=60)
