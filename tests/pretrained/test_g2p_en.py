"""g2p-en's weights in our classes: what its own numpy code writes, and what is refused."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from nondual.pretrained import G2P_EN, WeightsMissing, g2p_en, read

NUMPY = json.loads((Path(__file__).parent / "g2p_en_numpy.json").read_text(encoding="utf-8"))["words"]


def test_phonemes_are_those_of_its_own_code():
    speller = g2p_en()
    assert len(NUMPY) == 300
    assert [" ".join(phonemes) for phonemes in speller.spell_all(list(NUMPY))] == list(NUMPY.values())
    assert sum(p.numel() for p in speller.model.parameters()) == 834_890


def test_the_file_holds_tensors_alone_and_all_of_them_are_used():
    from nondual.pretrained.g2p_en import NAMES

    with np.load(io.BytesIO(read(G2P_EN, "g2p_en/checkpoint20.npz")), allow_pickle=False) as stored:
        assert set(stored) == set(NAMES) and sum(stored[name].size for name in stored) == 834_890
        assert {stored[name].dtype for name in stored} == {np.dtype("float32")}


def test_missing_and_changed_weights_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing, match="of g2p-en are not in"):
        g2p_en()
    file = tmp_path / G2P_EN.folder.name / "g2p_en" / "checkpoint20.npz"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"PK")
    with pytest.raises(RuntimeError, match=r"not the pinned b8af35e.*: delete it and fetch again"):
        g2p_en()
