"""benchmarks/in_context_real.py: what its tasks are made of, its intervals, and the whole, small."""

import re
import sys
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import in_context_real
from benchmarks.in_context_real import (
    MANY,
    NAMES,
    SUMS,
    TASKS,
    TINY,
    VECTOR_TASKS,
    Bench,
    drawings,
    flipped,
    halves,
    interval,
    measured,
    named,
    never,
    passages,
)
from nondual.data import WORD_CLASSES, WORD_PAIRS
from nondual.language_models.causal import CausalLM
from nondual.language_models.in_context_learning import fingerprint
from nondual.relative_positions import Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import FeedForward, TransformerLayer


class Words:
    """A tokenizer: a token for each word or mark, with the spaces before it; numbers by a checksum."""

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        ids = [zlib.crc32(word.encode()) % 48_000 for word in re.findall(r"\s*(?:\w+|[^\w\s])|\s+", text)]
        return {"input_ids": ids if return_tensors is None else torch.tensor([ids])}


@pytest.fixture(scope="module")
def model():
    """Three layers of nine heads on three, as many as the real model has, with rotary positions; 48,000 tokens."""
    torch.manual_seed(0)

    def layer(_):
        mixer = MultiHeadAttention(18, 9, n_kv_heads=3, d_head=2, causal=True, positions=Rotary(2))
        return TransformerLayer(mixer, FeedForward(18, 32), 18, norm_first=True)

    return CausalLM(48_000, 18, 3, layer=layer, norm=nn.LayerNorm).eval().requires_grad_(False)


@pytest.mark.parametrize("task", TASKS)
def test_a_row_has_17_questions_and_wrong_answers_do_not_show_a_right_one(task):
    for chosen, answers, labels in drawings(task, 7, 1):
        assert len(chosen) == len({question for question, _ in chosen}) == 17
        assert {answer for _, answer in chosen} <= set(answers) and set(labels) <= set(answers)
        if task in WORD_PAIRS:
            assert set(chosen) <= set(WORD_PAIRS[task]) and not {b for _, b in chosen} & set(labels)
        if task == "sums":
            assert all(sum(map(int, a.split("+"))) == int(b) < 10 for a, b in chosen)
        if task.startswith("classes"):
            (of,) = [of for of in WORD_CLASSES.values() if chosen[0][0] in {w for ws in of.values() for w in ws}]
            sides = [{answer for word, answer in chosen if word in words} for words in of.values()]
            assert all(len(side) <= 1 for side in sides) and labels == answers


def test_no_question_that_a_vector_is_put_into_is_an_example():
    for task in VECTOR_TASKS:
        shown, asked = halves(task)
        assert sorted(shown + asked) == sorted(WORD_PAIRS[task]) and len(shown) >= 9 and len(asked) >= 23


def test_which_class_has_which_invented_name_changes():
    firsts = [answers[0] for _, answers, _ in drawings("classes, invented names", 12, 1)]
    assert firsts.count(NAMES[0]) == firsts.count(NAMES[1]) == 6


def test_there_are_36_sums_of_one_digit():
    assert len(set(SUMS)) == 36 and ("3+4", "7") in SUMS


def test_flipped_names_are_each_the_other():
    assert flipped(["x", "y"])(["x", "y", "y"], torch.Generator()) == ["y", "x", "x"]


def test_an_interval_of_equal_rows_is_a_point_and_of_coins_has_the_binomial_width():
    assert interval(torch.full((9,), 0.25)) == [0.25, 0.25, 0.25]
    mean, low, high = interval((torch.arange(400) % 2).float())
    assert mean == 0.5 and high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)


def test_training_passages_never_hold_a_pair_that_is_left_out():
    ids, periods = passages(torch.Generator().manual_seed(0), 64)
    left_out = never()
    assert 0.22 < float(left_out.float().mean()) < 0.28
    assert not left_out[ids[:, :-1], ids[:, 1:]].any()
    for row, period in zip(ids, periods[:, 0].tolist()):
        assert len(set(row[:period].tolist())) == period and torch.equal(row[period:], row[:-period])
    unseen, _ = passages(torch.Generator().manual_seed(0), 64, left_out)
    assert left_out[unseen[:, :-1], unseen[:, 1:]].float().mean() > 0.8


def test_named_counts_the_pairs_asked_for_alone():
    ids, periods = passages(torch.Generator().manual_seed(0), 8)

    def next_by_look_up(rows):
        """Scores of a model that copies what followed the last earlier occurrence."""
        scores = torch.zeros(*rows.shape, in_context_real.VOCABULARY)
        for row, tokens in enumerate(rows.tolist()):
            for i, token in enumerate(tokens):
                earlier = [j for j in range(i) if tokens[j] == token]
                if earlier:
                    scores[row, i, tokens[earlier[-1] + 1]] = 1
        return scores

    assert named(next_by_look_up, ids, periods, ~never()) == 1
    assert named(lambda rows: 1 - next_by_look_up(rows), ids, periods, ~never()) == 0


def test_the_whole_runs_small_and_the_parameters_stay(model):
    before = fingerprint(model)
    found = measured(Bench(model, Words(), TINY), tiny=True)
    assert found["parameters"] == {"before": before, "after": before}
    assert set(found) == {*in_context_real.STAGES, "parameters"}
    assert set(found["curves"]) == set(TASKS) and len(found["curves"]["French"]["right"]["greedy"]) == 6
    assert len(found["curves"]["French"]["shuffled"]["examples"]) == 5 and "flipped" in found["curves"]["classes"]
    assert len(found["vectors"]["past"]["greedy"]["by layer"]["added"]) == 3 and max(MANY) == 16
    assert len(found["heads"]["all"]["heads"]) == 10


def test_another_parameter_gives_another_hash(model):
    before = fingerprint(model)
    with torch.no_grad():
        model.embeddings.weight[0, 0] += 1
    assert fingerprint(model) != before
    with torch.no_grad():
        model.embeddings.weight[0, 0] -= 1
