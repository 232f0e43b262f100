"""Examples in the prompt of a real model: do they help, must they be right, what do they leave, which heads carry them.

The model is SmolLM2-135M-Instruct in our own classes. Its parameters are hashed before and after. Stages:

    curves    0 to 16 examples of word pairs, sums and classes, as "dog: chien"; the answers given are right, shuffled
              among the examples, drawn from the set of answers, or (two classes) exchanged
    three     translation, a question and sums of two numbers with two digits, in words as a person would write them:
              what Brown et al. 2020 (2005.14165) measured on 175 billion parameters, in the small
    look_up   eight pairs, and then the same eight in another order: made-up words, French, and wrong French
    vectors   the vector that eight examples leave before each layer, put into a bare question (2310.15916) or added
              to what is there, beside the vector of another task and a random one of the same length
    heads     the induction heads give out their mean over a plain text, beside as many other heads of their layers
    rule      small models trained on repeated passages in which a quarter of all pairs of neighbours never stands:
              accuracy on such pairs, induction score and accuracy through training

A row is read once and asked at each example, so a row gives one answer at each count. An interval is the 2.5 and 97.5
percent points of a bootstrap over rows (of vectors: over questions), each with examples of its own; differences are
taken within a row. With answers drawn from the set, those of the row's own questions are left out, so that no right
answer has been shown by chance; with sums and two classes all are drawn.

    nox -s bench -- in_context_real

Some fifteen minutes of one core. Each part is kept under a hash of this file, so that a stopped run goes on. --tiny
runs everything once on a few rows and keeps nothing.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.heads_removed import beside
from benchmarks.heads_trained_run import LENGTH, PERIODS, VOCABULARY, causal_model, halfway
from benchmarks.intervals import bootstrap
from benchmarks.record import write
from benchmarks.stages import carried_out
from nondual.analysis import profile, record_heads, replace_heads, weights_of
from nondual.analysis.few_shot import (
    Answers,
    Labelling,
    Prompts,
    ask,
    drawn_answers,
    examples,
    first_tokens,
    prompts,
    right_answers,
    shuffled_answers,
)
from nondual.analysis.interventions import mean_values
from nondual.analysis.task_vectors import scores_with, states_at
from nondual.data import ALICE, INVENTED_WORDS, WORD_CLASSES, WORD_PAIRS
from nondual.language_models.in_context_learning import fingerprint
from nondual.training import optimiser, train

LEAD = "<|im_start|>"  # what the model has at the start of each text that it was trained on
COUNTS = (0, 1, 2, 4, 8, 16)  # examples read
MANY = tuple(range(4, 17))  # over these a row's answers are averaged, for differences
MANY_SHUFFLED = (4, 8, 16)  # so many examples have their own answers, shuffled: see `shuffled_answers`
ROWS = {"curves": 32, "three": 24, "look_up": 24, "heads": 16, "draws": 12, "questions": 24}
TINY = {"curves": 2, "three": 2, "look_up": 2, "heads": 2, "draws": 2, "questions": 4}
Pairs = Sequence[tuple[str, str]]


class Bench:
    """The model with its tokenizer, and how many rows each stage has."""

    def __init__(self, model: Any, tokenizer: Any, rows: dict[str, int]):
        self.model, self.tokenizer, self.rows = model, tokenizer, rows

    def ask(self, rows: Sequence, answers: Sequence[str], **written: str) -> Answers:
        """What the model answers to rows of examples, among the first tokens of all answers of the task."""
        made = prompts(self.tokenizer, rows, **{"lead": LEAD, **written})
        space = {key: value for key, value in written.items() if key == "space"}
        return ask(self.model, made, first_tokens(self.tokenizer, answers, **space))


def interval(each: Tensor) -> list[float]:
    """The mean of (B,) and its interval by the bootstrap over rows."""
    return [round(x, 4) for x in bootstrap(each)]


def pick(pairs: Pairs, count: int, generator: torch.Generator) -> list[tuple[str, str]]:
    """So many different pairs in a random order."""
    return [pairs[i] for i in torch.randperm(len(pairs), generator=generator)[:count].tolist()]


# --- tasks -----------------------------------------------------------------------------------------------------------

SUMS = [(f"{a}+{b}", str(a + b)) for a in range(1, 9) for b in range(1, 10 - a)]  # the answer has one digit
NAMES = ("blick", "dax")  # of classes, that say nothing
TASKS = ("French", "opposite", "capital", "past", "sums", "classes", "classes, invented names")


def flipped(names: Sequence[str]) -> Labelling:
    """Each of two names in place of the other."""
    other = {names[0]: names[1], names[1]: names[0]}
    return lambda answers, generator: [other[answer] for answer in answers]


def drawings(task: str, count: int, seed: int) -> list[tuple[list[tuple[str, str]], list[str], list[str]]]:
    """For each row its pairs in order, the task's answers, and those from which a wrong one is drawn."""
    draw, rows = torch.Generator().manual_seed(seed), []
    classes = list(WORD_CLASSES.values())
    for row in range(count):
        if task in WORD_PAIRS or task == "sums":
            pairs = list(WORD_PAIRS.get(task, SUMS))
            chosen = pick(pairs, 17, draw)
            answers = sorted({answer for _, answer in pairs})
            shown = {answer for _, answer in chosen}
            labels = answers if task == "sums" else [answer for answer in answers if answer not in shown]
        else:
            both = classes[row % len(classes)]
            names = list(both)
            if "invented" in task:  # which class has which name changes from row to row
                names = list(NAMES) if row // len(classes) % 2 else list(NAMES)[::-1]
            pairs = [(word, name) for words, name in zip(both.values(), names) for word in words]
            chosen, answers, labels = pick(pairs, 17, draw), names, names
        rows.append((chosen, answers, labels))
    return rows


def curve(bench: Bench, task: str) -> dict[str, Any]:
    """One task under each labelling: what is answered after 0 to 16 examples, and what wrong answers cost."""
    of_classes = task.startswith("classes")
    kinds = ("right", "shuffled", "random", *(("flipped",) if of_classes else ()))
    space = {"space": ""} if task == "sums" else {}
    drawn = drawings(task, bench.rows["curves"], 1)
    found: dict[str, Any] = {}
    hits: dict[str, Tensor] = {}
    for kind in kinds:
        draw, parts = torch.Generator().manual_seed(2), []
        for chosen, answers, labels in drawn:
            how: dict[str, Labelling] = {
                "right": right_answers,
                "shuffled": shuffled_answers,
                "random": drawn_answers(labels),
            }
            labelling = flipped(answers) if kind == "flipped" else how[kind]
            parts.append((examples(chosen, labelling, draw), answers))
        if of_classes:  # their candidates are the two names of the row
            each = [bench.ask([row], answers) for row, answers in parts]
            given = Answers(*(torch.cat(column) for column in zip(*each)))
        else:
            given = bench.ask([row for row, _ in parts], drawn[0][1], **space)
        # One example cannot be shuffled, and before the first there is nothing to shuffle.
        counts = [k for k in COUNTS if kind != "shuffled" or k != 1]
        found[kind] = {
            "examples": counts,
            "greedy": [interval(given.greedy[:, k].float()) for k in counts],
            "among": [interval(given.among[:, k].float()) for k in counts],
            "nats": [interval(given.nats[:, k]) for k in counts],
        }
        if kind == "right":
            found[kind]["exact"] = [interval(given.exact[:, k]) for k in counts]
        hits[kind] = (given.among if of_classes else given.greedy).float()  # (rows, 17)
        over = list(MANY_SHUFFLED if kind == "shuffled" else MANY)
        found[kind]["many"] = interval(hits[kind][:, over].mean(1))
        found[kind]["many, among"] = interval(given.among.float()[:, over].mean(1))
        found[kind]["many less none"] = interval(hits[kind][:, over].mean(1) - hits[kind][:, 0])
    for kind in kinds[1:]:
        over = list(MANY_SHUFFLED if kind == "shuffled" else MANY)
        found[f"right less {kind}"] = interval((hits["right"] - hits[kind])[:, over].mean(1))
    found["score"] = "among" if of_classes else "greedy"
    found["candidates"] = len(first_tokens(bench.tokenizer, drawn[0][1], **space))
    return found


# --- three tasks of the paper ----------------------------------------------------------------------------------------


def three(bench: Bench, task: str) -> dict[str, Any]:
    """Translation, question and sums in words: the whole answer greedily right after 0 to 16 examples."""
    draw = torch.Generator().manual_seed(3)
    pairs: list[tuple[str, str]]
    if task == "translation":
        pairs, written = list(WORD_PAIRS["French"]), {"lead": f"{LEAD}Translate English to French:\n"}
        written |= {"separator": " =>"}
    elif task == "question":
        pairs = [(f"What is the capital of {a}?", b) for a, b in WORD_PAIRS["capital"]]
        written = {"before": "Q: ", "separator": "\nA:", "end": "\n\n"}
    else:
        pairs = [(f"What is {a} plus {b}?", str(a + b)) for a, b in itertools.product(range(10, 100), repeat=2)]
        written = {"before": "Q: ", "separator": "\nA: ", "space": "", "end": "\n\n"}
    rows = [examples(pick(pairs, 17, draw), right_answers, draw) for _ in range(bench.rows["three"])]
    given = bench.ask(rows, [answer for _, answer in pairs], **written)
    many = given.exact[:, list(MANY)].mean(1)
    return {
        "examples": list(COUNTS),
        "exact": [interval(given.exact[:, k]) for k in COUNTS],
        "first token": [interval(given.greedy[:, k].float()) for k in COUNTS],
        "many": interval(many),
        "many less none": interval(many - given.exact[:, 0]),
        "many less one": interval(many - given.exact[:, 1]),
    }


# --- look-up ---------------------------------------------------------------------------------------------------------


def look_up(bench: Bench, task: str) -> dict[str, Any]:
    """Eight pairs twice: the share answered as the prompt has it, the first time and the second."""
    draw, rows, true = torch.Generator().manual_seed(4), [], []
    for _ in range(bench.rows["look_up"]):
        if task == "invented words":
            words = [word for word, _ in pick([(word, "") for word in INVENTED_WORDS], 16, draw)]
            chosen = list(zip(words[:8], words[8:]))
            given = examples(chosen, right_answers, draw)
        else:
            chosen = pick(WORD_PAIRS["French"], 8, draw)
            given = examples(chosen, right_answers if task == "French" else shuffled_answers, draw)
        again = torch.randperm(8, generator=draw).tolist()
        told = [example._replace(right=example.given) for example in given]
        rows.append(told + [told[i] for i in again])
        true.append(given + [given[i] for i in again])
    words = list(INVENTED_WORDS) if task == "invented words" else [answer for _, answer in WORD_PAIRS["French"]]
    as_told, as_true = bench.ask(rows, words), bench.ask(true, words)
    return {
        "pairs": 8,
        "as told": {
            "first": interval(as_told.greedy[:, :8].float().mean(1)),
            "second": interval(as_told.greedy[:, 8:].float().mean(1)),
            "second, exact": interval(as_told.exact[:, 8:].mean(1)),
        },
        "as is true": {
            "first": interval(as_true.greedy[:, :8].float().mean(1)),
            "second": interval(as_true.greedy[:, 8:].float().mean(1)),
        },
    }


# --- vectors ---------------------------------------------------------------------------------------------------------

VECTOR_TASKS = ("opposite", "capital", "past", "plural")


def last_of(made: Prompts) -> Tensor:
    """The position of the last separator of each row."""
    return made.asked[:, -1]


def halves(task: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """A task's pairs in two halves: one for examples, one for the questions that are asked."""
    pairs = pick(WORD_PAIRS[task], len(WORD_PAIRS[task]), torch.Generator().manual_seed(5))
    return pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]


def left_by(bench: Bench, task: str, draws: int) -> tuple[list[list[Any]], Tensor]:
    """Eight examples for each draw, and (layers, draws, E), what they leave at the separator of another question."""
    draw, rows = torch.Generator().manual_seed(6), []
    for _ in range(draws):
        rows.append(examples(pick(halves(task)[0], 9, draw), right_answers, draw))
    made = prompts(bench.tokenizer, rows, lead=LEAD)
    return [row[:8] for row in rows], states_at(bench.model, made.ids, last_of(made))


def vectors(bench: Bench, task: str) -> dict[str, Any]:
    """Accuracy on bare questions with the vector of this task's examples, of another's and with a random one.

    own, other, random   the vector of one draw of examples in place of the bare question's own (Hendel et al. 2023)
    mean                 the mean vector of all draws in its place
    added                the mean of all draws, less the mean over all tasks, added to the bare question's own vector;
                         "added, other" is that of another task

    The layer is chosen, for each kind, on every second question and counted on the rest, and the other way round.
    """
    model, tokenizer = bench.model, bench.tokenizer
    draws, count = bench.rows["draws"], bench.rows["questions"]
    next_task = VECTOR_TASKS[(VECTOR_TASKS.index(task) + 1) % len(VECTOR_TASKS)]
    left = {name: left_by(bench, name, draws) for name in VECTOR_TASKS}
    means = {name: of.mean(1, keepdim=True) for name, (_, of) in left.items()}
    middle = torch.stack(list(means.values())).mean(0)
    candidates = first_tokens(tokenizer, [answer for _, answer in WORD_PAIRS[task]])

    generator = torch.Generator().manual_seed(7)
    asked = examples(halves(task)[1][:count], right_answers, generator)
    bare = prompts(tokenizer, [[example] for example in asked], lead=LEAD)
    which = [i % draws for i in range(len(asked))]  # the draw that goes with each question
    whole = prompts(tokenizer, [left[task][0][i] + [example] for i, example in zip(which, asked)], lead=LEAD)
    at, right, plain_states = last_of(bare), bare.first[:, 0], states_at(model, bare.ids, last_of(bare))
    own = left[task][1][:, which]
    noise = torch.randn(own.shape, generator=generator)
    given = {
        "own": own,
        "other": left[next_task][1][:, which],
        "random": noise * own.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True),
        "mean": means[task],
        "added": plain_states + means[task] - middle,
        "added, other": plain_states + means[next_task] - middle,
    }

    def hits(scores: Tensor) -> dict[str, Tensor]:
        among = candidates[scores[:, candidates].argmax(-1)] == right
        return {"greedy": (scores.argmax(-1) == right).float(), "among": among.float()}

    each = {
        name: [hits(scores_with(model, bare.ids, at, layer, of[layer])) for layer in range(len(model.layers))]
        for name, of in given.items()
    }
    none, with_examples = ask(model, bare, candidates), ask(model, whole, candidates)
    found: dict[str, Any] = {}
    half = torch.arange(len(right)) % 2 == 0
    for score in ("greedy", "among"):
        plain = {"none": getattr(none, score)[:, 0].float(), "examples": getattr(with_examples, score)[:, -1].float()}
        rows = {name: torch.stack([at_layer[score] for at_layer in of]) for name, of in each.items()}
        best = {name: [int(of[:, part].mean(1).argmax()) for part in (half, ~half)] for name, of in rows.items()}
        held = {name: torch.where(half, of[best[name][1]], of[best[name][0]]) for name, of in rows.items()}
        found[score] = {
            **{name: interval(of) for name, of in plain.items()},
            **{f"{name}, held out": interval(of) for name, of in held.items()},
            "best layers": best,
            "by layer": {name: [round(x, 4) for x in of.mean(1).tolist()] for name, of in rows.items()},
            "own less other": interval(held["own"] - held["other"]),
            "own less none": interval(held["own"] - plain["none"]),
            "added less added, other": interval(held["added"] - held["added, other"]),
            "added less none": interval(held["added"] - plain["none"]),
            "examples less own": interval(plain["examples"] - held["own"]),
            "examples less added": interval(plain["examples"] - held["added"]),
        }
    return found


# --- heads -----------------------------------------------------------------------------------------------------------

HEAD_TASKS = ("opposite", "capital", "past", "classes, invented names", "look-up")
SETS = (10,)
OTHERS = 4
REPEATED, CHOOSING = 12, 4  # rows of random tokens that come twice


def heads(bench: Bench, task: str) -> dict[str, Any]:
    """Accuracy on repeated random tokens and on the tasks without the induction heads, and without others."""
    model, tokenizer = bench.model, bench.tokenizer
    draw = torch.Generator().manual_seed(7)
    count = 2 if bench.rows is TINY else REPEATED
    tokens = torch.randint(200, 48000, (count + CHOOSING, 40), generator=draw)
    twice = torch.cat([tokens, tokens], 1)
    # The heads are chosen on other rows than those on which they are removed.
    scores = profile(weights_of(model, twice[count:]), twice[count:])["induction"]
    twice = twice[:count]
    order = [divmod(place, scores.shape[1]) for place in scores.flatten().argsort(descending=True).tolist()]
    plain = tokenizer(ALICE, return_tensors="pt")["input_ids"][:, :512].view(4, -1)
    with record_heads(model) as record:
        model.hidden(model.embeddings(plain))
    sets: dict[str, list[tuple[int, int]]] = {"none": []}
    for count in SETS:
        sets[f"induction {count}"] = order[:count]
        for number in range(OTHERS):
            sets[f"others {count}, {number}"] = beside(order[:count], draw)

    def plain_loss() -> Tensor:
        return torch.stack([-model.loss(row[None]) for row in plain])

    asked: dict[str, Callable[[], Tensor]] = {"repeated": lambda: repeated(model, twice), "plain": plain_loss}
    for name in HEAD_TASKS:
        asked[name] = partial(of_task, bench, name)
    each: dict[str, dict[str, Tensor]] = {name: {} for name in asked}
    for kind, chosen in sets.items():
        with replace_heads(model, mean_values(record, chosen)):
            for name, function in asked.items():
                each[name][kind] = function()
        print(kind, flush=True)
    found: dict[str, Any] = {
        "heads": [[*head, round(float(scores[head]), 3)] for head in order[: max(SETS)]],
        "others": {kind: of for kind, of in sets.items() if kind.startswith("others")},
    }
    for name, of in each.items():
        found[name] = {"none": interval(of["none"])}
        for count in SETS:
            others = torch.stack([of[f"others {count}, {number}"] for number in range(OTHERS)]).mean(0)
            found[name][f"induction {count}"] = interval(of[f"induction {count}"])
            found[name][f"others {count}"] = interval(others)
            found[name][f"none less induction {count}"] = interval(of["none"] - of[f"induction {count}"])
            found[name][f"none less others {count}"] = interval(of["none"] - others)
            found[name][f"others less induction {count}"] = interval(others - of[f"induction {count}"])
    return found


def repeated(model: Any, twice: Tensor) -> Tensor:
    """The share of tokens named in the second half of each row, but for its first."""
    half = twice.shape[1] // 2
    hidden = model.hidden(model.embeddings(twice))[:, half:-1]
    return (model.scores(hidden).argmax(-1) == twice[:, half + 1 :]).float().mean(1)


def of_task(bench: Bench, task: str) -> Tensor:
    """For each row the share right after eight examples or more; of a look-up, the second time."""
    count = bench.rows["heads"]
    draw = torch.Generator().manual_seed(8)
    if task == "look-up":
        rows = []
        for _ in range(count):
            words = [word for word, _ in pick([(word, "") for word in INVENTED_WORDS], 16, draw)]
            given = examples(list(zip(words[:8], words[8:])), right_answers, draw)
            rows.append(given + [given[i] for i in torch.randperm(8, generator=draw).tolist()])
        return bench.ask(rows, INVENTED_WORDS).greedy[:, 8:].float().mean(1)
    drawn = drawings(task, count, 8)
    if task.startswith("classes"):
        each = [bench.ask([examples(chosen, right_answers, draw)], answers) for chosen, answers, _ in drawn]
        return torch.cat([given.among for given in each])[:, 8:].float().mean(1)
    rows = [examples(chosen, right_answers, draw) for chosen, _, _ in drawn]
    return bench.ask(rows, drawn[0][1]).greedy[:, 8:].float().mean(1)


# --- a rule ----------------------------------------------------------------------------------------------------------

ARMS = {"two layers": 0.008, "first layer sees itself only": 0.002}  # the best rates of heads_trained
SEEDS, STEPS, EVERY = (11, 12, 13, 14), 500, 25


def never() -> Tensor:
    """(V, V): True for a quarter of all pairs (token, next), which stand in no training."""
    return torch.rand(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(9)) < 0.25


def passages(generator: torch.Generator, batch: int, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(ids (B, LENGTH), periods (B, 1)): p tokens again and again, every pair of neighbours one that is allowed."""
    allowed = ~never() if allowed is None else allowed
    periods = torch.randint(PERIODS[0], PERIODS[1] + 1, (batch, 1), generator=generator)
    first = torch.randint(VOCABULARY, (batch,), generator=generator)
    used = torch.zeros(batch, VOCABULARY, dtype=torch.bool)
    columns, rows = [first], torch.arange(batch)
    used[rows, first] = True
    for i in range(1, PERIODS[1]):
        can = allowed[columns[-1]] & ~used
        last = can & allowed[:, first].T  # the passage's last token leads to its first
        can = torch.where((i == periods - 1) & last.any(1, keepdim=True), last, can)
        can = torch.where(can.any(1, keepdim=True), can, ~used)  # a dead end: those who ask look at single pairs
        columns.append(torch.multinomial(can.float(), 1, generator=generator)[:, 0])
        used[rows, columns[-1]] = True
    return torch.stack(columns, 1).gather(1, torch.arange(LENGTH) % periods), periods


@torch.no_grad()
def named(model: Any, ids: Tensor, periods: Tensor, pairs: Tensor) -> float:
    """The share of tokens named where the answer stands earlier in the row, and the pair is one of `pairs`."""
    right = model(ids)[:, :-1].argmax(-1) == ids[:, 1:]
    counts = (torch.arange(LENGTH - 1) >= periods) & pairs[ids[:, :-1], ids[:, 1:]]
    return float(right[counts].float().mean())


def rule(bench: Bench, seed: int) -> dict[str, Any]:
    """Both arms of one seed: does a model name the next token of pairs that it was never trained on?"""
    found: dict[str, Any] = {}
    steps = 2 * EVERY if bench.rows is TINY else STEPS
    for arm, rate in ARMS.items():
        torch.manual_seed(seed)
        model = causal_model(arm)
        seen = passages(torch.Generator().manual_seed(10), 48)
        unseen = passages(torch.Generator().manual_seed(10), 48, never())
        through: dict[str, list[float]] = {"step": [], "seen": [], "unseen": [], "induction": []}

        def look(model: Any = model, through: dict = through, seen: Any = seen, unseen: Any = unseen) -> dict:
            through["step"].append(EVERY * len(through["step"]))
            through["seen"].append(round(named(model, seen[0], seen[1], ~never()), 4))
            through["unseen"].append(round(named(model, unseen[0], unseen[1], never()), 4))
            scores = profile(weights_of(model, seen[0]), seen[0])["induction"]
            through["induction"].append(round(float(scores[-1].max()), 4))
            return {}

        look()
        train(
            model,
            lambda drawn, model=model: model.loss(drawn[0]),
            partial(passages, batch=32),
            optimiser=optimiser(model, rate, decay=0.01),
            steps=steps,
            seed=seed,
            measure=look,
            log_every=EVERY,
            name=None,
        )
        found[arm] = {key: through[key][-1] for key in ("seen", "unseen", "induction")} | {"through": through}
        if through["induction"][-1] > 0.5:
            found[arm]["half"] = {
                key: round(halfway(through["step"], through[key]), 1) for key in ("seen", "unseen", "induction")
            }
    return found


# --- all together ----------------------------------------------------------------------------------------------------

STAGES: dict[str, tuple[Callable[..., Any], Sequence[Any]]] = {
    "three": (three, ("translation", "question", "sums")),
    "curves": (curve, TASKS),
    "look_up": (look_up, ("invented words", "French", "wrong French")),
    "vectors": (vectors, VECTOR_TASKS),
    "heads": (heads, ("all",)),
    "rule": (rule, SEEDS),
}


def measured(bench: Bench, tiny: bool) -> dict[str, Any]:
    """All figures, and the fingerprint of the parameters before and after."""

    def ask(name: str, part: Any) -> Any:
        with torch.inference_mode(name != "rule"):  # in `rule` models are trained; the other stages need no gradients
            return STAGES[name][0](bench, part)

    parts = {name: few[:1] if tiny and name == "rule" else few for name, (_, few) in STAGES.items()}
    before = fingerprint(bench.model)
    figures = carried_out(__file__, parts, ask, tiny)
    return figures | {"parameters": {"before": before, "after": fingerprint(bench.model)}}


def main(options: list[str]) -> None:
    from nondual.pretrained import our_smollm2

    torch.set_num_threads(1)
    tiny = "--tiny" in options
    bench = Bench(*our_smollm2(), TINY if tiny else ROWS)
    figures = measured(bench, tiny)
    if tiny:
        print("tiny", list(figures))
        return
    setup = {
        "rows": ROWS | {"repeated": REPEATED},
        "counts": COUNTS,
        "many": [MANY[0], MANY[-1]],
        "many, shuffled": MANY_SHUFFLED,
        "lead": LEAD,
        "rule": {"rates": ARMS, "steps": STEPS, "seeds": SEEDS, "left out": round(float(never().float().mean()), 4)},
    }
    write("in_context_real", "nox -s bench -- in_context_real", figures, threads=1, setup=setup)
