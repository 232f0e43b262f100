"""What a real model knows without examples: the word pairs and sums of `in_context_real`, asked in whole sentences.

"Unknown" must be measured apart from examples, or it means no more than "examples do not bring it". Each pair of each
task is asked once in each of three sentences, such as `The capital of Egypt is`. Right is an answer whose first token
is the likeliest of all, as in the curves of `in_context_real`. Beside it stands what one would get by always giving the
commonest first token of the task's answers. An interval is a bootstrap over the pairs.

    nox -s bench -- in_context_known

About a minute of one core. --tiny asks a few pairs and writes nothing.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.in_context_real import LEAD, SUMS, interval
from benchmarks.record import write
from nondual.analysis.few_shot import ask, examples, first_tokens, prompts, right_answers
from nondual.data import WORD_PAIRS

# The question stands where {} is. The braces of a sum hold what is written between its two numbers.
SENTENCES = {
    "past": (
        'The past tense of "{}" is "',
        'The past tense of the verb "{}" is "',
        "Today I {}. Yesterday I",
    ),
    "opposite": (
        'The opposite of "{}" is "',
        'The opposite of the word "{}" is the word "',
        "The antonym of {} is",
    ),
    "capital": (
        "The capital of {} is",
        "The capital city of {} is called",
        "What is the capital of {}? The capital is",
    ),
    "French": (
        'The French word for "{}" is "',
        '"{}" in French is "',
        'The English word "{}" is translated into French as "',
    ),
    "sums": (
        "{ + } = ",
        "The sum of { and } is ",
        "{ plus } is equal to ",
    ),
}


def pairs_of(task: str) -> Sequence[tuple[str, str]]:
    """The questions and answers of a task."""
    return SUMS if task == "sums" else WORD_PAIRS[task]


def known(model: Any, tokenizer: Any, task: str, sentence: str, count: int | None = None) -> list[float]:
    """The share of a task's pairs that one sentence brings, and its interval."""
    pairs = list(pairs_of(task))[:count]
    before, _, rest = sentence.partition("{")
    between, _, after = rest.partition("}")
    asked = [(question.replace("+", between), answer) for question, answer in pairs]
    space = "" if sentence[-1] in '" ' else " "
    rows = [[example] for example in examples(asked, right_answers, torch.Generator())]
    made = prompts(tokenizer, rows, lead=LEAD, before=before, separator=after, space=space)
    candidates = first_tokens(tokenizer, [answer for _, answer in pairs], space=space)
    return interval(ask(model, made, candidates).greedy[:, 0].float())


def commonest(tokenizer: Any, task: str) -> float:
    """The share of pairs that are right if the commonest first token of the answers is always given."""
    space = "" if task == "sums" else " "
    answers = [answer for _, answer in pairs_of(task)]
    tokens = [int(first_tokens(tokenizer, [answer], space=space)) for answer in answers]
    return round(max(Counter(tokens).values()) / len(tokens), 4)


def main(options: list[str]) -> None:
    from nondual.pretrained import our_smollm2

    torch.set_num_threads(1)
    model, tokenizer = our_smollm2()
    count = 2 if "--tiny" in options else None
    figures = {
        task: {
            "pairs": len(pairs_of(task)),
            "commonest": commonest(tokenizer, task),
            "sentences": {sentence: known(model, tokenizer, task, sentence, count) for sentence in sentences},
        }
        for task, sentences in SENTENCES.items()
    }
    if count:
        print("tiny", list(figures))
        return
    write("in_context_known", "nox -s bench -- in_context_known", figures, threads=1)
