"""hama's prefix language model in our classes: what its own engine writes, and that its mask is what we say."""

import json
from pathlib import Path

import pytest
import torch

from nondual.pretrained import HAMA, WeightsMissing, hama, hama_p2g, read
from nondual.pretrained.hama import hama_tensors
from nondual.pretrained.hama_p2g import from_hama_p2g

ENGINE = json.loads((Path(__file__).parent / "hama_p2g_engine.json").read_text(encoding="utf-8"))["words"]


@pytest.fixture(scope="module")
def speller():
    return hama_p2g()


@pytest.fixture(scope="module")
def spelled(speller):
    return dict(zip(ENGINE, speller.write_all([phonemes.split() for phonemes, _ in ENGINE.values()]), strict=True))


def test_it_writes_every_word_as_its_own_engine_does(spelled):
    assert len(ENGINE) == 300 and {len(word) for word in ENGINE} >= set(range(2, 17))
    assert spelled == {word: text for word, (_, text) in ENGINE.items()}
    assert 0.4 < sum(word == text for word, text in spelled.items()) / len(ENGINE) < 0.6  # not one word alone: n aɪ t


@torch.no_grad()
def test_with_another_mask_it_writes_otherwise(speller, spelled):
    """The control: the same weights with a causal mask over the prefix write fewer of the engine's words."""
    end, same = speller.tokens.index("<eos>"), 0
    words = list(ENGINE)[::12]
    for word in words:
        prompt = torch.tensor([speller.prompt(ENGINE[word][0].split())])
        written = speller.model.model.generate(prompt, 32, eos=end)[0, prompt.shape[1] :].tolist()
        letters = written[: written.index(end)] if end in written else written
        same += "".join(speller.tokens[i] for i in letters) == spelled[word]
    assert same / len(words) < 0.9


def test_one_word_and_several_with_and_without_a_cache(speller):
    assert speller.write(["n", "aɪ", "t"]) == "night"
    words = [ENGINE[word][0].split() for word in list(ENGINE)[:3]]
    assert len({len(phonemes) for phonemes in words}) > 1
    assert speller.write_all(words) == [speller.write(word) for word in words] and speller.write_all([]) == []
    prompt = torch.tensor([speller.prompt(words[1])])
    assert torch.equal(speller.model.generate(prompt, 14), speller.model.generate(prompt, 14, cached=False))


def test_what_the_other_model_hears_it_spells(speller):
    words = ["attention", "recognition", "memory", "transformer"]
    heard = [phonemes for phonemes, _ in hama().spell_all(words)]
    assert speller.write_all(heard) == words


def test_every_number_of_the_file_is_used_once():
    stored = hama_tensors(read(HAMA, "p2g.hama"))
    state = from_hama_p2g(stored)
    assert len(stored) == len(state) == 52
    assert sum(t.numel() for t in stored.values()) == sum(t.numel() for t in state.values()) == 7_299_936
    assert {t.dtype for t in stored.values()} == {torch.float16}


def test_missing_weights_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"of hama are not in .* `python -m nondual\.pretrained`"):
        hama_p2g()


@pytest.mark.parametrize(
    "phonemes, error, says",
    [
        ("n aɪ t", TypeError, r"phonemes must be a list of phonemes, got the str 'n aɪ t': use \.split\(\)"),
        ([], ValueError, "phonemes must be 1 to 192, got 0"),
        (["n"] * 193, ValueError, "phonemes must be 1 to 192, got 193"),
        (["n", "QQ", "<eos>"], ValueError, "phonemes must be ones that the network knows, got '<eos>', 'QQ'"),
    ],
)
def test_what_is_refused(speller, phonemes, error, says):
    with pytest.raises(error, match=says):
        speller.write(phonemes)
