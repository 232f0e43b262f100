"""pip's settings, read without pip: each file and variable in its rank, and the same as pip itself finds."""

import os
import subprocess
import sys

import pytest

from nondual.store.pip_settings import DEFAULT_INDEX, PipSettings, pip_settings


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine whose pip is told nothing, and whose folders for configuration lie in tmp_path."""
    for name in os.environ:
        if name.startswith("PIP_") or name.endswith("_CA_BUNDLE"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "shared"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "own"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    for place in ("shared/pip", "own/pip", "home/.pip", "venv"):
        (tmp_path / place).mkdir(parents=True)
    return monkeypatch


def say(folder, place, **settings):
    lines = [f"{name.replace('_', '-')} = {value}" for name, value in settings.items()]
    (folder / place).write_text("[global]\n" + "\n".join(lines))


def indexes() -> tuple[str, ...]:
    return pip_settings().index_urls


def test_without_any_configuration(bare):
    if os.path.exists("/etc/pip.conf"):  # this machine's own, which a test cannot move away
        bare.setenv("PIP_CONFIG_FILE", os.devnull)
    assert pip_settings() == PipSettings((DEFAULT_INDEX,), (), (), None, None, None, 15.0, 5)


def test_the_later_file_wins_and_a_variable_wins_over_all(bare, tmp_path):
    for place in ("shared/pip/pip.conf", "home/.pip/pip.conf", "own/pip/pip.conf", "venv/pip.conf", "named.conf"):
        say(tmp_path, place, index_url=f"https://{place}/simple")
        if place == "named.conf":
            assert indexes() == ("https://venv/pip.conf/simple",)
            bare.setenv("PIP_CONFIG_FILE", str(tmp_path / place))
        assert indexes() == (f"https://{place}/simple",)
    bare.setenv("PIP_INDEX_URL", "https://variable/simple")
    assert indexes() == ("https://variable/simple",)


def test_a_named_file_stands_for_the_user_s_and_devnull_for_none(bare, tmp_path):
    say(tmp_path, "own/pip/pip.conf", find_links="/from/user")
    say(tmp_path, "named.conf", index_url="https://named/simple")
    assert pip_settings().find_links == ("/from/user",)
    bare.setenv("PIP_CONFIG_FILE", str(tmp_path / "named.conf"))
    assert pip_settings().find_links == () and indexes() == ("https://named/simple",)
    bare.setenv("PIP_CONFIG_FILE", os.devnull)
    assert indexes() == (DEFAULT_INDEX,)


def test_sections_of_the_command_win_over_the_global_one(bare, tmp_path):
    (tmp_path / "own/pip/pip.conf").write_text(
        "[download]\nindex_url = https://download/simple\n[install]\nindex-url = https://install/simple\n"
        "[global]\nindex-url = https://global/simple\n"
    )
    assert indexes() == ("https://download/simple",)


def test_lists_are_split_at_spaces_and_lines(bare, tmp_path):
    bare.setenv("PIP_CONFIG_FILE", str(tmp_path / "x.conf"))
    say(tmp_path, "x.conf", extra_index_url="\n  https://a/simple\n  https://b/simple", find_links="~/wheels /more")
    bare.setenv("PIP_TRUSTED_HOST", "a b:8080")
    found = pip_settings()
    assert found.index_urls == (DEFAULT_INDEX, "https://a/simple", "https://b/simple")
    assert found.find_links == (str(tmp_path / "home/wheels"), "/more")
    assert found.trusted_hosts == ("a", "b:8080")


def test_no_index_leaves_the_links_alone(bare):
    bare.setenv("PIP_EXTRA_INDEX_URL", "https://a/simple")
    bare.setenv("PIP_FIND_LINKS", "/wheels")
    for value, found in (("1", ()), ("true", ()), ("on", ()), ("0", (DEFAULT_INDEX, "https://a/simple"))):
        bare.setenv("PIP_NO_INDEX", value)
        assert indexes() == found and pip_settings().find_links == ("/wheels",)


def test_an_empty_setting_counts_as_none(bare, tmp_path):
    say(tmp_path, "own/pip/pip.conf", index_url="https://user/simple")
    bare.setenv("PIP_INDEX_URL", "")
    assert indexes() == ("https://user/simple",)


def test_certificates_proxies_and_patience(bare):
    bare.setenv("PIP_CONFIG_FILE", os.devnull)
    bare.setenv("REQUESTS_CA_BUNDLE", "/requests.pem")
    assert pip_settings().cert == "/requests.pem"
    for name, value in (("CERT", "/c.pem"), ("CLIENT_CERT", "/me.pem"), ("PROXY", "http://p:1"), ("RETRIES", "2")):
        bare.setenv(f"PIP_{name}", value)
    bare.setenv("PIP_DEFAULT_TIMEOUT", "3")
    found = pip_settings()
    assert (found.cert, found.client_cert, found.proxy) == ("/c.pem", "/me.pem", "http://p:1")
    assert (found.timeout, found.retries) == (3.0, 2)


def test_passwords_are_not_shown(bare):
    bare.setenv("PIP_INDEX_URL", "https://ada:secret@host/simple")
    bare.setenv("PIP_PROXY", "http://ada:secret@proxy")
    assert "secret" in pip_settings().index_urls[0] and "secret" not in repr(pip_settings())


@pytest.mark.parametrize(
    "text, says",
    [
        ("index-url = https://x\n", r"x\.conf cannot be read: File contains no section headers"),
        ("[global]\nno-index = perhaps\n", "no-index must be true or false, got 'perhaps'"),
        ("[global]\ntimeout = soon\n", "timeout must be a number, 0 or more, got 'soon'"),
        ("[global]\nretries = -1\n", "retries must be a number, 0 or more, got '-1'"),
    ],
)
def test_what_cannot_be_read_is_named(bare, tmp_path, text, says):
    (tmp_path / "x.conf").write_text(text)
    bare.setenv("PIP_CONFIG_FILE", str(tmp_path / "x.conf"))
    with pytest.raises(ValueError, match=says):
        pip_settings()


def test_pip_itself_finds_the_same(bare, tmp_path):
    bare.undo()  # the platform and the environment are this process's own again
    say(tmp_path, "x.conf", index_url="https://a/simple", extra_index_url="https://b/simple", timeout="7")
    bare.setenv("PIP_CONFIG_FILE", str(tmp_path / "x.conf"))
    bare.setenv("PIP_EXTRA_INDEX_URL", "https://c/simple https://d/simple")
    code = (
        "from pip._internal.commands import create_command\n"
        "found, _ = create_command('download').parse_args(['x'])\n"
        "print([found.index_url, *found.extra_index_urls], found.find_links, found.trusted_hosts, sep='\\n')\n"
        "print(float(found.timeout), found.retries)"
    )
    pip = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    found = pip_settings()
    lists = [list(found.index_urls), list(found.find_links), list(found.trusted_hosts)]
    assert pip.stdout.splitlines() == [*map(str, lists), f"{found.timeout} {found.retries}"]
