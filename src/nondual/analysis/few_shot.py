"""Examples in a prompt: rows of questions with right or wrong answers, and what a model then answers.

    dog: chien
    moon: lune
    bread:            <- asked here: the scores after ":" say which token begins the answer

A row of K examples asks K times: at example k the model has read k before it. A causal model sees nothing of what
follows, so one forward pass of one row gives the accuracy after 0, 1, …, K - 1 examples.

What stands as the answer of an example is chosen by a function (`right_answers`, `shuffled_answers`, `drawn_answers`).
Scored is always the right one.

Source: Brown et al. 2020 (2005.14165) for prompts of examples; Min et al. 2022 (2202.12837), section 3, for answers
drawn from the set of answers. Symbols: B rows, K examples a row, N tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nondual.language_models.causal import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Labelling = Callable[[Sequence[str], torch.Generator], list[str]]


class Example(NamedTuple):
    """A question, the answer that the prompt gives to it, and the right one.

    Attributes:
        question: as it is written.
        given: the answer that stands in the prompt.
        right: the answer that is scored.
    """

    question: str
    given: str
    right: str


class Prompts(NamedTuple):
    """Rows of K examples as tokens, padded at the end with token 0, which a causal model reads too late to matter.

    Attributes:
        ids: (B, N) int64.
        asked: (B, K) int64, the position of each separator, whose scores are for the first token of an answer.
        first: (B, K) int64, the first token of each right answer.
        spans: for each row and example (start, end): its given answer and the line's end are ids[start:end].
        told: (B, K) bool, True where the given answer is the right one.
    """

    ids: Int[Tensor, "b n"]
    asked: Int[Tensor, "b k"]
    first: Int[Tensor, "b k"]
    spans: list[list[tuple[int, int]]]
    told: Bool[Tensor, "b k"]


class Answers(NamedTuple):
    """What a model answers, (B, K) each: at example k of a row it has read the k before it.

    Attributes:
        nats: -ln p of the first token of the right answer, float32.
        greedy: whether that token is the likeliest of all.
        among: whether it is the likeliest of the candidates' first tokens.
        exact: 1 where the likeliest tokens, one after another, are the whole right answer and the end of the line;
            otherwise 0. NaN where the prompt gives another answer, since the model then reads that one.
    """

    nats: Float[Tensor, "b k"]
    greedy: Bool[Tensor, "b k"]
    among: Bool[Tensor, "b k"]
    exact: Float[Tensor, "b k"]


# --- which answers are given -----------------------------------------------------------------------------------------


def right_answers(answers: Sequence[str], generator: torch.Generator) -> list[str]:
    """The right answers, as they are."""
    return list(answers)


# --8<-- [start:shuffled_answers]
def shuffled_answers(answers: Sequence[str], generator: torch.Generator) -> list[str]:
    """The same answers at other questions; none keeps its own, if the answers allow it.

    They change places within examples 0 to 1, 2 to 3, 4 to 7, 8 to 15 and so on. So the
    first 2, 4, 8 or 16 examples have exactly their own answers, and that of the next
    question has not been shown.
    """
    ends = [0, *(2**i for i in range(1, len(answers).bit_length() + 1))]
    given: list[str] = []
    for start, end in pairwise(ends):
        block = list(answers[start:end])
        order = list(range(len(block)))
        for _ in range(200):
            order = torch.randperm(len(block), generator=generator).tolist()
            if all(block[i] != own for i, own in zip(order, block)):
                break
        given += [block[i] for i in order]
    return given


# --8<-- [end:shuffled_answers]


def drawn_answers(labels: Sequence[str]) -> Labelling:
    """A function that gives each question an answer drawn from `labels`, each as likely, whatever the question is.

    Args:
        labels: what is drawn from, one or more.

    Raises:
        ValueError: no labels.
    """
    if not labels:
        raise ValueError("labels must hold one answer or more to draw from, got none")

    def drawn(answers: Sequence[str], generator: torch.Generator) -> list[str]:
        picks = torch.randint(len(labels), (len(answers),), generator=generator)
        return [labels[int(i)] for i in picks]

    return drawn


def examples(pairs: Sequence[tuple[str, str]], labelling: Labelling, generator: torch.Generator) -> list[Example]:
    """Pairs (question, right answer) with the answers that a labelling gives them.

    Args:
        pairs: a row of them, in the order in which they will be read.
        labelling: `right_answers`, `shuffled_answers`, `drawn_answers(labels)`, or another function of the right
            answers and a generator that returns as many answers.
        generator: where the randomness comes from.

    Raises:
        ValueError: a labelling that returns another number of answers.
    """
    right = [answer for _, answer in pairs]
    given = labelling(right, generator)
    if len(given) != len(right):
        raise ValueError(f"labelling must return {len(right)} answers, one for each question, got {len(given)}")
    return [Example(question, *answers) for (question, _), *answers in zip(pairs, given, right)]


# --- prompts ---------------------------------------------------------------------------------------------------------


def prompts(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Sequence[Example]],
    *,
    lead: str = "",
    before: str = "",
    separator: str = ":",
    space: str = " ",
    end: str = "\n",
) -> Prompts:
    """Rows of examples as tokens: the lead once, then for each example before, question, separator, answer and end.

    Each piece is turned into tokens by itself, the answer with the space before it, so that every position is known.
    The last example's answer is there too; what is asked before it cannot see it.

    Args:
        tokenizer: of a CausalLM, as `our_smollm2` returns it.
        rows: each with the same number of examples, one or more.
        lead: what stands first in a row, such as a marker or an instruction.
        before: what stands before each question.
        separator: what stands between question and answer.
        space: what belongs to an answer's first token: a space, or nothing for numbers.
        end: what ends an example.

    Raises:
        ValueError: no rows, rows of different lengths or of none; a question, answer, separator or end without a token.
    """
    counts = {len(row) for row in rows}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"rows must all have the same number of examples, 1 or more, got {sorted(counts)}")

    def tokens(text: str, name: str) -> list[int]:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise ValueError(f"{name} must have a token or more, got {text!r}")
        return ids

    written, asked, first, spans, told = [], [], [], [], []
    for row in rows:
        ids = tokens(lead, "lead") if lead else []
        at: list[int] = []
        span: list[tuple[int, int]] = []
        for example in row:
            ids = ids + tokens(before + example.question, "a question") + tokens(separator, "the separator")
            at.append(len(ids) - 1)
            start = len(ids)
            ids = ids + tokens(space + example.given, "an answer") + tokens(end, "the end")
            span.append((start, len(ids)))
        written.append(torch.tensor(ids))
        asked.append(at)
        spans.append(span)
        first.append([tokens(space + example.right, "an answer")[0] for example in row])
        told.append([example.given == example.right for example in row])
    padded = torch.nn.utils.rnn.pad_sequence(written, batch_first=True)
    return Prompts(padded, torch.tensor(asked), torch.tensor(first), spans, torch.tensor(told))


def first_tokens(
    tokenizer: "PreTrainedTokenizerBase", answers: Sequence[str], *, space: str = " "
) -> Int[Tensor, " c"]:
    """The different tokens with which the answers begin, as candidates for `ask`; in order of their numbers.

    Args:
        tokenizer: as in `prompts`.
        answers: one or more.
        space: as in `prompts`.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("answers must hold one or more, got none")
    return torch.tensor(sorted({tokenizer(space + a, add_special_tokens=False)["input_ids"][0] for a in answers}))


# --- what the model answers ------------------------------------------------------------------------------------------


@torch.no_grad()
def ask(model: CausalLM, asked: Prompts, candidates: Int[Tensor, " c"], *, batch: int = 8) -> Answers:
    """What a model answers at every example of every row; its parameters are read and not changed.

    Args:
        model: in the mode in which it is to answer; evaluation mode, unless it has no dropout.
        asked: from `prompts`.
        candidates: (C,) tokens, from `first_tokens`; each right answer's first token must be among them.
        batch: how many rows are read at a time.

    Returns:
        Answers, (B, K) each, on the CPU.

    Raises:
        ValueError: a right answer whose first token is no candidate, or a batch below 1.
    """
    if batch < 1:
        raise ValueError(f"batch must be 1 or more, got {batch}")
    if not torch.isin(asked.first, candidates).all():
        raise ValueError("candidates must hold the first token of every right answer, got some that are missing")
    device = model.embeddings.weight.device if hasattr(model.embeddings, "weight") else None
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(asked.ids), batch):
        here = slice(start, start + batch)
        ids, at, first = (x[here].to(device) for x in (asked.ids, asked.asked, asked.first))
        hidden = model.hidden(model.embeddings(ids))
        # --8<-- [start:ask]
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        scores = model.scores(hidden[rows, at]).float()  # (B, K, V), after each separator
        nats = F.cross_entropy(scores.flatten(0, 1), first.flatten(), reduction="none")
        greedy = scores.argmax(-1) == first
        among = candidates.to(ids.device)[scores[..., candidates].argmax(-1)] == first
        # --8<-- [end:ask]
        exact = _exact(model, hidden, ids, asked.spans[here]).masked_fill(~asked.told[here].to(device), torch.nan)
        parts.append((nats.view_as(first), greedy, among, exact))
    return Answers(*(torch.cat(column).cpu() for column in zip(*parts)))


def _exact(model: CausalLM, hidden: Tensor, ids: Tensor, spans: list[list[tuple[int, int]]]) -> Tensor:
    """1 where each token of an answer is the likeliest after those before it, (B, K)."""
    places = [(row, at) for row, spans_of in enumerate(spans) for span in spans_of for at in range(*span)]
    row, at = torch.tensor(places, device=ids.device).T
    hits = (model.scores(hidden[row, at - 1]).argmax(-1) == ids[row, at]).tolist()
    found, used = [], 0
    for spans_of in spans:
        found.append([])
        for start, end in spans_of:
            found[-1].append(float(all(hits[used : used + end - start])))
            used += end - start
    return torch.tensor(found, device=ids.device)
