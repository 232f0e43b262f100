"""The speller without attention: batches, what it carries from word to sounds, and what it refuses."""

import pytest
import torch

from nondual.pretrained import g2p_en
from nondual.pretrained.g2p_en_network import END_OF_LETTERS, G2PNetwork, LastStateSpeller


@pytest.fixture(scope="module")
def speller():
    return g2p_en()


def test_a_batch_gives_what_each_word_gives_alone(speller):
    words = ["knight", "a", "antidisestablishmentarianism", "Attention"]
    assert speller.spell_all(words) == [speller.spell(word) for word in words]
    assert speller.spell("knight") == ["N", "AY1", "T"] and speller.spell_all([]) == []


def test_one_vector_of_256_numbers_is_all_that_is_handed_on(speller):
    numbers = speller.numbers("through")
    assert numbers[-1] == END_OF_LETTERS and len(numbers) == 8
    with torch.no_grad():
        assert speller.model.read(torch.tensor([numbers]), torch.tensor([8])).shape == (1, 1, 256)


@pytest.mark.parametrize(("word", "found"), [("", "no letter"), ("café", "'café' with 'é'"), ("a b", "'a b' with ' '")])
def test_what_it_cannot_read_is_refused(speller, word, found):
    with pytest.raises(ValueError, match=f"word must be written with one or more of the letters a to z, got {found}"):
        speller.spell(word)


def test_what_is_no_word_or_no_list_of_words_is_refused(speller):
    with pytest.raises(TypeError, match="word must be a str, got int"):
        speller.spell(7)
    with pytest.raises(TypeError, match="words must be a list of words, got the one word 'knight': use spell"):
        speller.spell_all("knight")


def test_a_word_that_does_not_end_is_ended_after_20_phonemes():
    model = G2PNetwork(5, 7).eval()
    torch.nn.init.zeros_(model.output.weight)
    torch.nn.init.constant_(model.output.bias, 0)
    with torch.no_grad():
        model.output.bias[5] = 1
    assert LastStateSpeller(model, {"a": 0, "b": 1}, list("0123abc")).spell("ab") == ["b"] * 20


def test_gradients_reach_every_parameter():
    model = G2PNetwork(5, 7)
    state = model.read(torch.tensor([[3, 4, 2]]), torch.tensor([3]))
    scores, _ = model.step(torch.tensor([2]), state)
    scores.logsumexp(-1).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
