"""Prompts of examples: by hand, one pass against one prompt for each count, greedy generation, labellings, errors."""

import pytest
import torch
from torch import nn

from nondual.analysis.few_shot import (
    Example,
    ask,
    drawn_answers,
    examples,
    first_tokens,
    prompts,
    right_answers,
    shuffled_answers,
)
from nondual.language_models.causal import CausalLM
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import FeedForward, TransformerLayer

V = 23


class Letters:
    """A tokenizer: a token for each letter a to s, one for a space (19), ":" (20), "\\n" (21), "#" (22)."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ["abcdefghijklmnopqrs :\n#".index(letter) for letter in text]}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)

    def layer(_):
        mixer = MultiHeadAttention(14, 2, causal=True)
        return TransformerLayer(mixer, FeedForward(14, 29), 14, norm_first=True)

    made = CausalLM(V, 14, 3, layer=layer, norm=nn.LayerNorm, max_len=64).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).double() * 0.5)
    return made


def drawn_rows(n_rows=5, k=3, seed=0):
    """Rows of questions and answers of one to three letters, half of the answers wrong."""
    draw = torch.Generator().manual_seed(seed)

    def word():
        n = int(torch.randint(1, 4, (), generator=draw))
        return "".join("abcdefghijklmnopqrs"[i] for i in torch.randint(19, (n,), generator=draw))

    rows = []
    for _ in range(n_rows):
        row = []
        for i in range(k):
            right = word()
            row.append(Example(word(), right if i % 2 else word(), right))
        rows.append(row)
    return rows


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_by_hand():
    row = [Example("ab", "c", "c"), Example("d", "ef", "g")]
    made = prompts(Letters(), [row, [Example("a", "b", "b"), Example("b", "a", "a")]], lead="#")
    # #  a  b  :  _  c  \n d  :  _  e  f  \n
    assert made.ids[0].tolist() == [22, 0, 1, 20, 19, 2, 21, 3, 20, 19, 4, 5, 21]
    assert made.ids[1].tolist() == [22, 0, 20, 19, 1, 21, 1, 20, 19, 0, 21, 0, 0]  # padded at the end
    assert made.asked.tolist() == [[3, 8], [2, 7]]
    assert made.spans == [[(4, 7), (9, 13)], [(3, 6), (8, 11)]]
    assert made.first.tolist() == [[19, 19], [19, 19]]  # the space before the answer is a token of its own here
    assert made.told.tolist() == [[True, False], [True, True]]
    assert first_tokens(Letters(), ["c", "a"]).tolist() == [19]


def test_what_stands_before_each_question_and_other_separators():
    made = prompts(Letters(), [[Example("a", "b", "b")] * 2], before="q", separator="::", end="#")
    assert made.ids.tolist() == [[16, 0, 20, 20, 19, 1, 22] * 2] and made.asked.tolist() == [[3, 10]]
    made = prompts(Letters(), [[Example("a", "b", "b"), Example("c", "d", "e")]], space="")
    assert made.ids.tolist() == [[0, 20, 1, 21, 2, 20, 3, 21]] and made.first.tolist() == [[1, 4]]
    assert first_tokens(Letters(), ["c", "a", "cd"], space="").tolist() == [0, 2]


# --- what the model answers ------------------------------------------------------------------------------------------

EVERY = torch.arange(V)


def test_the_scores_are_those_of_the_model_after_each_separator(model):
    made = prompts(Letters(), drawn_rows())
    found = ask(model, made, EVERY, batch=2)
    for row in range(5):
        scores = model(made.ids[row : row + 1])[0, made.asked[row]]
        nats = -scores.log_softmax(-1).gather(1, made.first[row][:, None])[:, 0]
        torch.testing.assert_close(found.nats[row], nats.float())
        assert torch.equal(found.greedy[row], scores.argmax(-1) == made.first[row])
        assert torch.equal(found.among[row], found.greedy[row])  # every token is a candidate
    few = torch.tensor([3, 19])
    scores = model(made.ids[:1])[0, made.asked[0]]
    assert torch.equal(ask(model, made, few).among[0], scores[:, 19] > scores[:, 3])


def test_one_pass_is_a_prompt_for_each_number_of_examples(model):
    rows = drawn_rows(3, 5)
    whole = ask(model, prompts(Letters(), rows, lead="#"), EVERY)
    for k in range(5):
        short = ask(model, prompts(Letters(), [row[: k + 1] for row in rows], lead="#"), EVERY, batch=1)
        for ours, theirs in zip(whole, short):
            torch.testing.assert_close(ours[:, : k + 1], theirs, equal_nan=True)


def test_exact_is_what_greedy_generation_writes(model):
    """An answer of two tokens that the model generates, with the end that it generates; then one letter is another."""
    letters = "abcdefghijklmnopqrs :\n#"
    for a in range(19):
        answer, end = "", ""
        for token in model.generate(torch.tensor([[a, 20]]), 3)[0, 2:4].tolist():
            answer += letters[token]
        end = letters[int(model.generate(torch.tensor([[a, 20]]), 3)[0, 4])]
        right = prompts(Letters(), [[Example(letters[a], answer, answer)]], space="", end=end)
        assert ask(model, right, EVERY).exact.item() == 1 and ask(model, right, EVERY).greedy.item()
        for other in ("b" + answer[1], answer[0] + "b"):
            if other != answer:
                wrong = prompts(Letters(), [[Example(letters[a], other, other)]], space="", end=end)
                assert ask(model, wrong, EVERY).exact.item() == 0
        untold = prompts(Letters(), [[Example(letters[a], "cd", answer)]], space="", end=end)
        assert ask(model, untold, EVERY).exact.isnan() == (answer != "cd")


def test_nothing_of_the_model_changes(model):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    ask(model, prompts(Letters(), drawn_rows()), EVERY)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_gives_float32_nats(model, dtype):
    made = prompts(Letters(), drawn_rows())
    low = ask(CausalLM.to(_copy(model), dtype), made, EVERY)
    assert low.nats.dtype == torch.float32
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(low.nats, ask(model, made, EVERY).nats, atol=tolerance, rtol=0.1)


def _copy(model):
    import copy

    return copy.deepcopy(model)


# --- labellings ------------------------------------------------------------------------------------------------------


def test_shuffled_answers_stay_within_the_first_2_4_8_and_16_and_none_keeps_its_own():
    own = [f"answer {i}" for i in range(17)]
    seen = set()
    for seed in range(20):
        given = shuffled_answers(own, torch.Generator().manual_seed(seed))
        for k in (2, 4, 8, 16):
            assert sorted(given[:k]) == sorted(own[:k])
        assert all(a != b for a, b in zip(given[:16], own))
        assert given[16] == own[16]  # alone in its block
        seen.add(tuple(given))
    assert len(seen) > 10


def test_answers_that_cannot_all_change_are_given_nevertheless():
    given = shuffled_answers(["a", "a", "b", "a", "a", "a", "a"], torch.Generator().manual_seed(0))
    assert given[:2] == ["a", "a"] and sorted(given[2:4]) == ["a", "b"] and given[2:4] == ["a", "b"]
    assert shuffled_answers([], torch.Generator()) == [] and shuffled_answers(["a"], torch.Generator()) == ["a"]


def test_drawn_answers_come_from_the_labels_each_as_often():
    given = drawn_answers(["x", "y"])(["a"] * 2000, torch.Generator().manual_seed(0))
    assert set(given) == {"x", "y"} and 900 < given.count("x") < 1100


def test_examples_keep_the_right_answer_beside_the_given_one():
    pairs = [("one", "eins"), ("two", "zwei")]
    draw = torch.Generator().manual_seed(0)
    assert examples(pairs, right_answers, draw) == [Example("one", "eins", "eins"), Example("two", "zwei", "zwei")]
    assert [e.given for e in examples(pairs, shuffled_answers, draw)] == ["zwei", "eins"]


# --- errors ----------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused(model):
    one = [Example("a", "b", "b")]
    with pytest.raises(ValueError, match=r"rows must all have the same number of examples, 1 or more, got \[1, 2\]"):
        prompts(Letters(), [one, one * 2])
    for rows in ([], [[]]):
        with pytest.raises(ValueError, match="rows must all have the same number"):
            prompts(Letters(), rows)
    with pytest.raises(ValueError, match="the separator must have a token or more, got ''"):
        prompts(Letters(), [one], separator="")
    with pytest.raises(ValueError, match="labels must hold one answer or more"):
        drawn_answers([])
    with pytest.raises(ValueError, match="answers must hold one or more"):
        first_tokens(Letters(), [])
    with pytest.raises(ValueError, match="labelling must return 2 answers"):
        examples([("a", "b"), ("c", "d")], lambda answers, generator: ["b"], torch.Generator())
    made = prompts(Letters(), [one])
    with pytest.raises(ValueError, match="candidates must hold the first token of every right answer"):
        ask(model, made, torch.tensor([3]))
    with pytest.raises(ValueError, match="batch must be 1 or more, got 0"):
        ask(model, made, EVERY, batch=0)
