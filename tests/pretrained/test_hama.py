"""hama's weights in our classes: what its own engine writes, how its file is read, and what the door refuses."""

import json
from pathlib import Path

import pytest
import torch

from nondual.pretrained import HAMA, WeightsMissing, hama, read
from nondual.pretrained.hama import from_hama, hama_tensors
from nondual.pretrained.hama_network import SOS

ENGINE = json.loads((Path(__file__).parent / "hama_engine.json").read_text(encoding="utf-8"))["words"]
NEARLY_TIED = {"australopithecus", "corroborated"}  # where the engine, with its rounding, takes the other of two


@pytest.fixture(scope="module")
def speller():
    return hama()


@pytest.fixture(scope="module")
def spelled(speller):
    return dict(zip(ENGINE, speller.spell_all(list(ENGINE)), strict=True))


def test_phonemes_and_most_looked_at_letters_are_those_of_its_own_engine(spelled):
    assert len(ENGINE) == 1000 and {len(word) for word in ENGINE} >= set(range(1, 19))
    ours = {
        word: f"{' '.join(phonemes)} | {' '.join(str(letter) for letter in weights.argmax(-1).tolist())}"
        for word, (phonemes, weights) in spelled.items()
    }
    other = {word for word in ENGINE if ours[word].split(" | ")[0] != ENGINE[word].split(" | ")[0]}
    assert other == NEARLY_TIED
    assert {word for word in ENGINE if ours[word] != ENGINE[word]} == NEARLY_TIED


def test_where_the_engine_writes_otherwise_two_phonemes_are_nearly_tied(speller, spelled):
    model = speller.model
    for word in NEARLY_TIED:
        ours, theirs = spelled[word][0], ENGINE[word].split(" | ")[0].split()
        n = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
        with torch.no_grad():
            memory = model.read(torch.tensor([speller.numbers(word)]), torch.tensor([len(word)]))
            state, weights, last = memory.state, memory.mask / len(word), torch.tensor([SOS])
            for phoneme in [*ours[:n], None]:
                scores, state, weights = model.step(last, memory, state, weights)
                last = scores.argmax(-1) if phoneme is None else torch.tensor([speller.phonemes.index(phoneme)])
        two = scores[0].topk(2)
        assert {speller.phonemes[i] for i in two.indices.tolist()} == {ours[n], theirs[n]}
        assert 0 <= two.values[0] - two.values[1] < 0.02, word


def test_every_number_of_the_file_is_used_once():
    stored = hama_tensors(read(HAMA, "encoder.hama")) | hama_tensors(read(HAMA, "decoder_step.hama"))
    state = from_hama(stored)
    assert len(stored) == 40 and sum(t.numel() for t in stored.values()) == 2_101_584
    assert sum(t.numel() for t in state.values()) == 2_101_584
    assert {t.dtype for t in stored.values()} == {torch.float16}
    assert sorted(float(t.float().sum()) for t in hama_tensors(read(HAMA, "encoder.hama")).values())  # all can be read


def test_the_gates_are_put_into_torchs_order():
    stored = hama_tensors(read(HAMA, "encoder.hama")) | hama_tensors(read(HAMA, "decoder_step.hama"))
    state, w, biases = from_hama(stored), stored["onnx::GRU_527"], stored["onnx::GRU_526"]
    for direction, way in enumerate(("", "_reverse")):
        z, r, n = w[direction].chunk(3)
        assert torch.equal(state[f"encoder.weight_ih_l1{way}"], torch.cat([r, z, n]))
        z, r, n = biases[direction][288:].chunk(3)
        assert torch.equal(state[f"encoder.bias_hh_l1{way}"], torch.cat([r, z, n]))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (b"PK\x03\x04" + bytes(20), r"file must begin with b'HAMAPK', got b'PK"),
        (
            b"HAMAPK\x01\x00\x01\x00\x00\x00\x01\x00w\x02\x00",
            r"tensor w must have the dtype float16, code 1, got code 2",
        ),
    ],
)
def test_another_file_is_refused(file, said):
    with pytest.raises(ValueError, match=said):
        hama_tensors(file)


def test_missing_and_changed_weights_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"of hama are not in .* `python -m nondual\.pretrained hama`|of hama"):
        hama()
    (tmp_path / HAMA.folder.name).mkdir()
    (tmp_path / HAMA.folder.name / "g2p_vocab.json").write_text("{}")
    with pytest.raises(RuntimeError, match=r"not the pinned 520d19e.*: delete it and fetch again"):
        hama()
