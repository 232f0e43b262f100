"""The speller with attention: single words and batches, what can be left out of its scores, and what it refuses."""

import math

import pytest
import torch

from nondual.attention_mechanism import compare
from nondual.pretrained import hama
from nondual.pretrained.hama_network import HamaNetwork, fixed_pull, learned_scores

WORDS = ["knight", "attention", "through", "a", "antidisestablishmentarianism", "rhythm", "café"]


@pytest.fixture(scope="module")
def speller():
    return hama()


def test_a_knight_has_no_k_and_each_sound_looks_at_its_letters(speller):
    phonemes, weights = speller.spell("knight")
    assert phonemes == ["n", "aɪ", "t"]
    assert [["knight"[j] for j in weights.argmax(-1).tolist()]] == [["n", "i", "t"]]


def test_a_batch_gives_what_each_word_gives_alone(speller):
    for word, (phonemes, weights) in zip(WORDS, speller.spell_all(WORDS), strict=True):
        alone, alone_weights = speller.spell(word)
        assert phonemes == alone and weights.shape == (len(phonemes), len(word))
        torch.testing.assert_close(weights, alone_weights, atol=1e-5, rtol=0)
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(phonemes)))
    assert speller.spell_all([]) == []


def test_what_stands_beyond_a_words_end_does_not_matter(speller):
    numbers, lengths = speller.numbers("knight"), torch.tensor([6, 8])
    with torch.no_grad():
        memory = speller.model.read(torch.tensor([[*numbers, 13, 21], speller.numbers("throught")]), lengths)
        alone = speller.model.read(torch.tensor([numbers]), torch.tensor([6]))
    torch.testing.assert_close(memory.h[0, :6], alone.h[0], atol=1e-5, rtol=0)
    assert memory.h[0, 6:].abs().max() == 0


def test_a_step_is_the_formulas_of_the_module(speller):
    """The score, the pull, the weights and the context of one step, written out with loops."""
    model = speller.model
    with torch.no_grad():
        memory = model.read(torch.tensor([speller.numbers("shiva")]), torch.tensor([5]))
        past = torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1]])
        kept = {}
        handle = model.decoder_norm.register_forward_hook(lambda module, given, out: kept.update(s=out[0, 0]))
        _, _, weights = model.step(torch.tensor([7]), memory, memory.state, past)
        handle.remove()
        attention, s, h = model.attention, kept["s"], memory.h[0]
        place = sum(k * float(past[0, k]) for k in range(5))
        u = []
        for j in range(5):
            f = [
                sum(
                    float(attention.filters.weight[c, 0, t] * past[0, j + t - 5])
                    for t in range(11)
                    if 0 <= j + t - 5 < 5
                )
                for c in range(16)
            ]
            inside = attention.w_s.weight @ s + attention.w_h.weight @ h[j] + attention.w_f.weight @ torch.tensor(f)
            u.append(float(attention.v @ inside.tanh()) - 0.1 * abs(j - place))
        e = [math.exp(score - max(u)) for score in u]
    torch.testing.assert_close(weights[0], torch.tensor([x / sum(e) for x in e]), atol=1e-5, rtol=1e-4)


def test_the_pull_is_0_where_the_step_before_looked_and_falls_by_a_tenth_a_letter():
    past = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0]])
    torch.testing.assert_close(fixed_pull(past), torch.tensor([[-0.1, 0.0, -0.1, -0.2]] * 2))


def test_scores_and_pull_can_be_exchanged(speller):
    kept = speller.spell("attention", scores=learned_scores, pull=fixed_pull)
    assert kept[0] == speller.spell("attention")[0]
    none, nothing = (
        (lambda attention, s, memory, past: memory.h.new_zeros(len(past), 1, past.shape[1])),
        torch.zeros_like,
    )
    _, uniform = speller.spell("attention", scores=none, pull=nothing)
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / 9))

    def content(attention, s, memory, past):
        return compare(attention.w_s(s), memory.projected, attention.v)

    alone = speller.spell("attention", scores=content)
    batch = speller.spell_all(["attention", "a", "antidisestablishmentarianism"], scores=content)[0]
    assert batch[0] == alone[0] != kept[0]


def test_capital_letters_are_read_as_small_ones(speller):
    assert speller.spell("Attention")[0] == speller.spell("attention")[0] == list("ətɛnʃən")


@pytest.mark.parametrize(
    ("word", "found"),
    [("", "no letter"), ("two words", r"'two words' with ' '"), ("q😀x\n", r"with '\\n', '😀'")],
)
def test_what_it_cannot_read_is_refused(speller, word, found):
    with pytest.raises(
        ValueError, match=f"word must be written with one or more letters that the network knows, got .*{found}"
    ):
        speller.spell(word)


def test_a_word_that_does_not_end_is_ended_after_32_phonemes():
    from nondual.pretrained.hama_network import EOS, AttentiveSpeller

    torch.manual_seed(0)
    model = HamaNetwork(3, 5).eval()
    with torch.no_grad():
        model.output[1].weight[EOS] = 0
        model.output[1].weight[4] = torch.full((80,), 1e3)
        model.output[0].bias.fill_(10)
    phonemes, weights = AttentiveSpeller(model, {"a": 0, "b": 1}, list("012ab")).spell("ab")
    assert phonemes == ["b"] * 32 and weights.shape == (32, 2)


def test_what_is_no_word_or_no_list_of_words_is_refused(speller):
    with pytest.raises(TypeError, match="word must be a str, got int"):
        speller.spell(7)
    with pytest.raises(TypeError, match="words must be a list of words, got the one word 'knight': use spell"):
        speller.spell_all("knight")


def test_gradients_reach_every_parameter():
    model = HamaNetwork(7, 5)
    letters = torch.tensor([[1, 2, 3], [4, 5, 0]])
    memory = model.read(letters, torch.tensor([3, 2]))
    state, past, loss = memory.state, memory.mask / torch.tensor([[3], [2]]), torch.zeros(())
    for phoneme in (1, 3):
        scores, state, past = model.step(torch.full((2,), phoneme), memory, state, past)
        loss = loss + scores.logsumexp(-1).sum()
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert past[1, 2] == 0
