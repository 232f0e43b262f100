"""The same eight examples in the prompt or in the weights of a language model: what each answers to other questions.

Section 6 of docs/measured/six_assignments.md says what is asked and how it is judged.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.in_context_real import LEAD
from nondual.analysis.few_shot import (
    Example,
    Labelling,
    ask,
    examples,
    first_tokens,
    prompts,
    right_answers,
    shuffled_answers,
)
from nondual.data import WORD_PAIRS
from nondual.language_models.causal import CausalLM

SHOWN, ASKED, UPPER, STEPS = 8, 16, 10, 12
RATES = (0.00001, 0.00003, 0.0001)
LABELS: dict[str, Labelling] = {"right": right_answers, "shuffled": shuffled_answers}
Pair = tuple[str, str]


def drawn(task: str, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Eight pairs of a task to be shown, and sixteen others to be asked."""
    pairs = WORD_PAIRS[task]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [pairs[i] for i in order[: SHOWN + ASKED]]
    return chosen[:SHOWN], chosen[SHOWN:]


def answered(model: CausalLM, tokenizer: Any, task: str, shown: Sequence[Example], asked: Sequence[Pair]) -> Tensor:
    """For each question, asked after the examples shown: whether the likeliest token begins its answer, and its loss.

    (2, questions), float32.
    """
    rows = [[*shown, Example(question, answer, answer)] for question, answer in asked]
    candidates = first_tokens(tokenizer, [answer for _, answer in WORD_PAIRS[task]])
    found = ask(model, prompts(tokenizer, rows, lead=LEAD), candidates)
    return torch.stack([found.greedy[:, -1].float(), found.nats[:, -1].float()])


@contextmanager
def taught(
    model: CausalLM, tokenizer: Any, shown: Sequence[Example], rate: float, upper: int = UPPER, steps: int = STEPS
) -> Iterator[list[float]]:
    """A context in which the upper layers have learned the examples, each asked by itself; it yields the losses."""
    made = prompts(tokenizer, [[example] for example in shown], lead=LEAD)
    labels = torch.full_like(made.ids, -100)
    for row, ((start, end),) in enumerate(made.spans):
        labels[row, start - 1 : end - 1] = made.ids[row, start:end]
    own = list(model.layers)
    first = len(own) - upper
    with torch.no_grad():
        below = model.embeddings(made.ids)
        for layer in own[:first]:
            below = layer(below)
    # --8<-- [start:taught]
    above = nn.ModuleList([copy.deepcopy(layer) for layer in own[first:]])
    optimiser = torch.optim.AdamW(above.parameters(), lr=rate, weight_decay=0.0)
    losses = []
    with torch.enable_grad():
        for _ in range(steps):
            x = below
            for layer in above:
                x = layer(x)
            loss = model.loss_at(model.norm_f(x), labels)
            gradients = torch.autograd.grad(loss, list(above.parameters()))
            for parameter, gradient in zip(above.parameters(), gradients):
                parameter.grad = gradient
            optimiser.step()
            losses.append(loss.item())
    # --8<-- [end:taught]
    try:
        for place, layer in enumerate(above, first):
            model.layers[place] = layer
        yield losses
    finally:
        for place, layer in enumerate(own):
            model.layers[place] = layer


def summed_up(found: Tensor) -> dict[str, float]:
    share, nats = found.mean(1).tolist()
    return {"share": round(share, 4), "nats": round(nats, 4)}


def by_rate(model: CausalLM, tokenizer: Any, task: str, rate: float, **sizes: int) -> dict[str, float]:
    """What right examples bring at one rate, on the draw that is used for nothing else."""
    shown, asked = drawn(task, 101)
    told = examples(shown, right_answers, torch.Generator())
    with taught(model, tokenizer, told, rate, **sizes) as losses:
        return summed_up(answered(model, tokenizer, task, (), asked)) | {"last loss": round(losses[-1], 4)}


def best(rows: dict[str, dict[str, float]]) -> float:
    """The rate of the largest mean share over the tasks; of equal ones, that of the least loss. Keys: "task rate"."""
    rates = sorted({float(key.split()[-1]) for key in rows})

    def merit(rate: float) -> tuple[float, float]:
        mine = [row for key, row in rows.items() if float(key.split()[-1]) == rate]
        return sum(row["share"] for row in mine), -sum(row["nats"] for row in mine)

    return max(rates, key=merit)


def draw(model: CausalLM, tokenizer: Any, task: str, seed: int, rate: float, **sizes: int) -> dict[str, Any]:
    """One draw of a task: bare, by the prompt and by the weights, with right and with shuffled answers."""
    shown, asked = drawn(task, seed)
    found: dict[str, Any] = {"bare": summed_up(answered(model, tokenizer, task, (), asked))}
    for name, labelling in LABELS.items():
        told = examples(shown, labelling, torch.Generator().manual_seed(seed))
        found[f"prompt, {name}"] = summed_up(answered(model, tokenizer, task, told, asked))
        with taught(model, tokenizer, told, rate, **sizes) as losses:
            weights = summed_up(answered(model, tokenizer, task, (), asked))
        found[f"weights, {name}"] = weights | {"losses": [round(loss, 3) for loss in losses]}
    return found
