"""A8.2: the cuts of a tokenizer are hard boundaries; bytes move toward dissolving them and have their own."""

import json
from pathlib import Path
from statistics import mean

import pytest
import torch

from nondual.data import gita
from nondual.data.gita import transliterate
from nondual.language_models.bytes import HNet
from nondual.tokenization import BPE, Bytes, Characters, Words

DEVANAGARI = "\n".join(" ".join(verse.devanagari) for verse in gita())
IAST = transliterate(DEVANAGARI)


@pytest.fixture(scope="module")
def found():
    return json.loads((Path(__file__).parents[2] / "docs/measured/bytes.json").read_text())["figures"]


@pytest.mark.claim("A8.2", "holds if")
def test_a_list_of_words_or_letters_is_a_boundary_and_bytes_have_none():
    for text in (IAST, DEVANAGARI):
        cut = text.rindex("\n", 0, len(text) * 9 // 10)
        read, unseen = text[:cut], text[cut:]
        words = Words.of(read).encode(unseen)
        assert 0.5 < words.count(0) / len(words) < 0.7
        assert Bytes().decode(Bytes().encode(unseen)) == unseen
    letters = Characters.of(IAST)
    assert set(letters.encode(DEVANAGARI.replace(" ", "").replace("\n", ""))) == {0}
    # Subwords know every byte, and what they learned is of use in their own script alone.
    learned = BPE.train(IAST[:40000], 768)
    assert len(IAST.encode()) / len(learned.encode(IAST)) > 2.5
    assert len(DEVANAGARI.encode()) / len(learned.encode(DEVANAGARI)) < 1.05


@pytest.mark.claim("A8.2", "holds if")
def test_utf_8_is_a_boundary_of_its_own_and_cuts_that_are_learned_are_hard_too():
    """The same verses have twice as many bytes in one script as in the other; and a cut has no slope."""
    assert 2.0 < len(DEVANAGARI.encode()) / len(IAST.encode()) < 2.3
    torch.manual_seed(0)
    model = HNet(16, 24, 2, pieces_of=3.0)
    torch.nn.init.normal_(model.embeddings.weight)
    cuts = model.chunking.router(torch.randn(1, 50, 16, requires_grad=True))
    assert cuts.cut.dtype == torch.bool and cuts.p.requires_grad and not cuts.cut.requires_grad
    assert 0 < cuts.cut.float().mean() < 1


@pytest.mark.claim("A8.2", "holds if")
def test_at_equal_work_bytes_lose_to_subwords_where_utf_8_is_long_and_are_hurt_less_by_noise(found):
    for text in ("IAST", "Devanagari"):
        words = found[text]["arms"]["words"]["runs"]
        assert all(0.55 < run["noise"]["0.0"]["unknown_tokens"] < 0.65 for run in words)
        for arm in ("bytes", "subwords", "learned pieces"):
            assert all(run["noise"]["0.1"]["unknown_tokens"] == 0 for run in found[text]["arms"][arm]["runs"])
        low, _ = found[text]["bits, second less first"]["words - bytes"]["0.0"]["interval"]
        assert low > 3
    bits, noise = (
        {text: found[text][what]["subwords - bytes"] for text in ("IAST", "Devanagari")}
        for what in ("bits, second less first", "added by noise, second less first")
    )
    low, high = bits["IAST"]["0.0"]["interval"]
    assert low < 0 < high
    assert bits["Devanagari"]["0.0"]["interval"][1] < -0.1 and bits["Devanagari"]["0.1"]["interval"][1] < 0
    english = found["English"]["added by noise, second less first"]["subwords - bytes"]["0.1"]["interval"]
    assert english[0] > 0.1
    low, high = noise["IAST"]["0.1"]["interval"]
    assert low < 0 < high and noise["Devanagari"]["0.1"]["interval"][0] > 0.05


@pytest.mark.claim("A8.2", "holds if")
def test_learned_cuts_fall_inside_letters_and_differ_from_training_to_training(found):
    def cut(text, kind, what):
        return [run["cuts"]["kinds"][kind][what] for run in found[text]["arms"]["learned pieces"]["runs"]]

    inside = [sum(each) for each in zip(*(cut("Devanagari", f"byte {i} of a character", "of_cuts") for i in (2, 3)))]
    chance = [sum(each) for each in zip(*(cut("Devanagari", f"byte {i} of a character", "of_bytes") for i in (2, 3)))]
    assert mean(inside) > mean(chance) > 0.6
    spaces = cut("IAST", "space", "cut")
    assert max(spaces) - min(spaces) > 0.5
    low, high = found["Devanagari"]["bits, second less first"]["learned pieces - bytes"]["0.0"]["interval"]
    assert low < 0 < high
