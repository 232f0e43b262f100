"""The build fetches the weights that the pages read and no others, and says beforehand how much it will download."""

import pytest
import weights
from documents import ROOT

from nondual import data, pretrained

PACKAGES = pretrained.PACKAGES | data.PACKAGES


def test_a_package_is_named_by_the_code_that_imports_its_reader():
    codes = ["from nondual.pretrained import smollm2 as model", "import torch\nminilm = 1", "x = = 1"]
    assert weights.read_by(codes, PACKAGES) == ["smollm2"]
    assert weights.read_by(["from nondual.data import shakespeare\n" + codes[0]], PACKAGES) == [
        "smollm2",
        "shakespeare",
    ]
    assert weights.read_by(["from other import minilm"], PACKAGES) == []
    assert weights.read_by(["from nondual.data.shakespeare import plain"], PACKAGES) == ["shakespeare"]


def test_a_reader_of_several_packages_has_them_all():
    for code in ("from nondual.data import emoji", "from nondual.data import emoji_picture"):
        found = weights.read_by([code], PACKAGES)
        assert found[:2] == ["emoji", "emoji/noto"] and len(found) == 8
    assert weights.read_by(["from nondual.data import photographs"], PACKAGES) == [
        "photographs",
        "photographs/scikit-learn",
    ]


def test_figures_and_notebooks_are_read_and_snippets_where_they_are_run(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/x.md").write_text('```python\na = 1\n```\n\n```python exec="on"\nb = 1\n```\n\n```text\nc\n```\n')
    (tmp_path / "docs/x.ipynb").write_text('{"cells": [{"cell_type": "code", "source": ["%time\\n", "d = 1"]}]}')
    assert list(weights.codes(tmp_path, {"figure"})) == ["b = 1\n", "\nd = 1"]
    assert list(weights.codes(tmp_path, {"figure", "snippet"})) == ["a = 1\n", "b = 1\n", "\nd = 1"]


def test_the_pages_of_the_site_are_read():
    assert "minilm" in weights.read_by(weights.codes(ROOT, {"figure"}), PACKAGES)


@pytest.mark.parametrize("here, told", [("complete", "nothing to download"), ("missing", "84 MB to download")])
def test_it_is_said_how_much_there_is_to_download(monkeypatch, here, told):
    monkeypatch.setattr(weights, "status", lambda package: here)
    assert weights.said(["minilm"], PACKAGES) == f"The pages read minilm (84 MB): {told}."
    twice = "The pages read digits (3 MB), photographs/scikit-learn (3 MB): "
    assert weights.said(["digits", "photographs/scikit-learn"], PACKAGES) == f"{twice}{told.replace('84', '3')}."
    assert weights.said([], PACKAGES) == "The pages read no weights: nothing to download."
