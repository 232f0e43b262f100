"""Examples in the prompt of a real model: what is stored, and a small part of each experiment once more."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.in_context_real import LEAD, hash_of
from nondual.analysis import mean_values, profile, record_heads, replace_heads, weights_of
from nondual.analysis.few_shot import ask, examples, first_tokens, prompts, right_answers
from nondual.analysis.task_vectors import scores_with, states_at
from nondual.data import ALICE, INVENTED_WORDS, WORD_PAIRS
from nondual.pretrained import our_smollm2

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def smol():
    model, tokenizer = our_smollm2()
    return model.requires_grad_(False), tokenizer


@pytest.fixture(scope="module")
def found():
    return json.loads((ROOT / "docs/measured/in_context_real.json").read_text(encoding="utf-8"))["figures"]


@pytest.fixture(scope="module")
def long():
    return json.loads((ROOT / "docs/measured/long_prompts.json").read_text(encoding="utf-8"))["figures"]


def rows_of(pairs, count, seed, n=9):
    draw = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(pairs), generator=draw)[:n].tolist() for _ in range(count)]
    return [examples([pairs[i] for i in order], right_answers, draw) for order in orders]


def answered(smol, rows, answers):
    model, tokenizer = smol
    return ask(model, prompts(tokenizer, rows, lead=LEAD), first_tokens(tokenizer, answers))


def capitals(smol, rows):
    return answered(smol, rows, [answer for _, answer in WORD_PAIRS["capital"]])


# --- the tables of the paper -----------------------------------------------------------------------------------------

# Brown et al. 2020, 175 billion parameters: zero-shot, one-shot, few-shot.
PAPER = {
    "translation": (25.2, 28.3, 32.6),  # Table 3.4, English to French, BLEU
    "question": (64.3, 68.0, 71.2),  # Table 3.3, TriviaQA
    "sums": (76.9, 99.6, 100.0),  # Table 3.9, two digits, addition
}


@pytest.mark.claim("A7.6", "holds if")
def test_the_paper_s_model_gains_from_examples_and_does_most_without_and_a_small_one_answers_too(smol, found):
    for none, one, few in PAPER.values():
        assert none < one < few and none / few > 0.7  # most of it is there with a description alone
    before = hash_of(smol[0])
    given = capitals(smol, rows_of(WORD_PAIRS["capital"], 4, 0))
    assert given.exact[:, 0].mean() < 0.2 < 0.5 < given.exact[:, 4:].mean()
    assert hash_of(smol[0]) == before
    assert found["parameters"]["before"] == found["parameters"]["after"]
