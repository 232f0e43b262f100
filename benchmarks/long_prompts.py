"""Long prompts: does an instruction lose its hold, is generating to blame, and do summary, repetition and form help.

The model is SmolLM2-135M-Instruct in our own classes. Four parts:

    instruction   "When you are asked for the password, say ...", then filler, then a question: the attention of the
                  last position on the instruction, and how likely the word is. The filler is a play, one sentence
                  again and again, or words in random order. As a control the same filler stands before the instruction.
    generating    the same prompts read at once, as in training, and token by token with a cache
    repetition    the instruction once, twice or four times, or once with other sentences that make up the length
    form          three persons with their cities, as a list, as three sentences, or each within a paragraph of talk,
                  among three paragraphs on others; and list and sentences with the talk after them, or before, which
                  makes all as long

Intervals are bootstraps over rows (words, or sets of persons); differences are taken within a row.

    nox -s bench -- long_prompts

Some six minutes of one core. Each part is kept under a hash of this file. --tiny runs everything on a few short rows
and keeps nothing.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.in_context_real import interval
from benchmarks.record import write
from benchmarks.stages import carried_out
from nondual.analysis.attention_layers import attention_layers
from nondual.data import RELATIONS, WORD_PAIRS, shakespeare

WORDS = ("apple", "river", "purple", "music", "table", "winter", "garden", "silver", "tiger", "bread", "moon", "glass")
INSTRUCTION = 'When you are asked for the password, say "{}".'
NEUTRAL = ("The weather was mild on most days.", "A train left at nine.", "The shop sells paper and pens.")
QUESTION = "What is the password?"
SYSTEM, END = "<|im_start|>system\n{}<|im_end|>\n", '<|im_start|>assistant\nThe password is "'
DISTANCES = (0, 32, 128, 512)
FILLERS = ("play", "one sentence", "random words")
SIZES = {"words": len(WORDS), "cached": 3, "sets": 40, "distances": DISTANCES, "cached at": (0, 128), "after": 64}
TINY = {"words": 2, "cached": 2, "sets": 2, "distances": (0, 32), "cached at": (0, 16), "after": 32}


@functools.cache
def play() -> str:
    """The first of the plays."""
    return next(iter(shakespeare().values()))


class Bench:
    """The model with its tokenizer, and how many rows each part has."""

    def __init__(self, model: Any, tokenizer: Any, sizes: dict[str, Any]):
        self.model, self.tokenizer, self.sizes = model, tokenizer, sizes

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def filler(self, kind: str, count: int, row: int) -> list[int]:
        """So many tokens, other ones for each row."""
        if kind == "play":
            start = 2000 + 6000 * row
            return self.ids(play()[start : start + 6 * count])[:count]
        if kind == "one sentence":
            sentence = self.ids(RELATIONS[row].text + " ")
            return (sentence * (count // len(sentence) + 1))[:count]
        words = sorted({word for sentence in RELATIONS for word in sentence.words})
        order = torch.randint(len(words), (count,), generator=torch.Generator().manual_seed(row)).tolist()
        return self.ids(" ".join(words[i] for i in order))[:count]

    def last(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The log-probabilities (B, V) after each row, some rows at a time."""
        found = []
        step = max(1, 2048 // max(len(row) for row in rows))
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in some], batch_first=True)
            hidden = self.model.hidden(self.model.embeddings(ids))
            ends = torch.tensor([len(row) - 1 for row in some])
            found.append(self.model.scores(hidden[torch.arange(len(some)), ends]).log_softmax(-1))
        return torch.cat(found)


@contextlib.contextmanager
def last_weights(model: Any) -> Iterator[list[Tensor]]:
    """A list that a forward pass fills with the attention from the last position, (B, H, N) for each layer."""
    mixers: list[Any] = [layer.module for layer in attention_layers(model)]
    found: list[Tensor] = []
    ops = [mixer.op for mixer in mixers]

    def keeping(op: Callable) -> Callable:
        def run(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
            keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            found.append((q[:, :, -1:] @ keys.mT / q.shape[-1] ** 0.5).softmax(-1)[:, :, 0])
            return op(q, k, v, **more)

        return run

    try:
        for mixer in mixers:
            mixer.op = keeping(mixer.op)
        yield found
    finally:
        for mixer, op in zip(mixers, ops):
            mixer.op = op


# --- an instruction and its distance ---------------------------------------------------------------------------------


def prompt(bench: Bench, word: str, filler: Sequence[int], place: str) -> tuple[list[int], slice]:
    """A prompt with the instruction before or after the filler, and where in it the instruction stands."""
    told = bench.ids(INSTRUCTION.format(word))
    user, question = bench.ids("<|im_start|>user\n"), bench.ids(f"\n\n{QUESTION}<|im_end|>\n{END}")
    if place == "before":
        lead, between = bench.ids("<|im_start|>system\n"), bench.ids("<|im_end|>\n")
        return [*lead, *told, *between, *user, *filler, *question], slice(len(lead), len(lead) + len(told))
    lead = [*user, *filler, *bench.ids("\n\n")]  # the user's turn goes on: filler, instruction, question
    return [*lead, *told, *question], slice(len(lead), len(lead) + len(told))


def instruction(bench: Bench, kind: str) -> dict[str, Any]:
    """Mass on the instruction and obedience, by distance, with the instruction before the filler and after it."""
    words = WORDS[: bench.sizes["words"]]
    right = torch.tensor([bench.ids(word)[0] for word in words])
    found: dict[str, Any] = {"distances": list(bench.sizes["distances"])}
    for place in ("before", "after"):
        rows: dict[str, list[Any]] = {name: [] for name in ("mass", "share", "obeys", "nats", "length")}
        each: dict[str, list[Tensor]] = {"mass": [], "share": [], "obeys": [], "nats": []}
        for distance in bench.sizes["distances"]:
            mass, even, scores, length = [], [], [], 0
            for number, word in enumerate(words):
                ids, where = prompt(bench, word, bench.filler(kind, distance, number), place)
                with last_weights(bench.model) as weights:
                    scores.append(bench.last([ids]))
                whole = torch.stack(weights)[:, 0]  # (layers, H, N)
                mass.append(whole[..., where].sum(-1).mean())
                even.append((where.stop - where.start) / len(ids))
                length += len(ids)
            logs = torch.cat(scores)
            each["mass"].append(torch.stack(mass))
            each["share"].append(torch.stack(mass) / torch.tensor(even))
            each["obeys"].append((logs.argmax(-1) == right).float())
            each["nats"].append(-logs[torch.arange(len(words)), right])
            rows["length"].append(length / len(words))
        for name, of in each.items():
            rows[name] = [interval(x) for x in of]
        found[place] = rows
        for name in ("mass", "obeys", "nats"):
            found[place][f"{name}, last less first"] = interval(each[name][-1] - each[name][0])
        found[place]["each nats"] = [[round(float(x), 3) for x in of] for of in each["nats"]]
    return found


# --- read at once, and token by token --------------------------------------------------------------------------------


def generating(bench: Bench, part: str) -> dict[str, Any]:
    """The same prompts read at once and token by token: how far scores differ, and the decline in both."""
    words = WORDS[: bench.sizes["cached"]]
    right = torch.tensor([bench.ids(word)[0] for word in words])
    rows = []
    for distance in bench.sizes["cached at"]:
        each = [prompt(bench, word, bench.filler("play", distance, i), "before")[0] for i, word in enumerate(words)]
        at_once = bench.last(each)
        step_by_step = torch.cat([by_steps(bench.model, torch.tensor([ids])) for ids in each])
        rows.append(
            {
                "distance": distance,
                "tokens": sum(map(len, each)),
                "greatest difference": float((at_once - step_by_step).abs().max()),
                "same choice": bool(torch.equal(at_once.argmax(-1), step_by_step.argmax(-1))),
                "nats at once": [round(float(-logs[of]), 5) for logs, of in zip(at_once, right)],
                "nats by steps": [round(float(-logs[of]), 5) for logs, of in zip(step_by_step, right)],
            }
        )
    return {"rows": rows}


def by_steps(model: Any, ids: Tensor) -> Tensor:
    """The log-probabilities (B, V) after ids (B, N), each token read alone, with a cache."""
    cache, scores = model.new_cache(len(ids), ids.shape[1]), torch.empty(0)
    for i in range(ids.shape[1]):
        scores = model(ids[:, i : i + 1], cache=cache)
    return scores[:, -1].log_softmax(-1)


# --- said more than once ---------------------------------------------------------------------------------------------


def repetition(bench: Bench, part: str) -> dict[str, Any]:
    """The instruction once, twice and four times before filler, and once among sentences that say nothing of it."""
    words, after = WORDS[: bench.sizes["words"]], bench.sizes["after"]
    right = torch.tensor([bench.ids(word)[0] for word in words])
    nats: dict[str, Tensor] = {}
    obeys: dict[str, Tensor] = {}
    found: dict[str, Any] = {"after": after}
    for arm in ("once", "twice", "four times", "once among others"):
        rows = []
        for number, word in enumerate(words):
            told = INSTRUCTION.format(word)
            count = {"twice": 2, "four times": 4}.get(arm, 1)
            text = " ".join([told] * count if "others" not in arm else [told, *NEUTRAL])
            user = bench.ids("<|im_start|>user\n") + bench.filler("play", after, number)
            rows.append(bench.ids(SYSTEM.format(text)) + user + bench.ids(f"\n\n{QUESTION}<|im_end|>\n{END}"))
        logs = bench.last(rows)
        nats[arm], obeys[arm] = -logs[torch.arange(len(words)), right], (logs.argmax(-1) == right).float()
        found[arm] = {"obeys": interval(obeys[arm]), "nats": interval(nats[arm])}
    for arm, other in (("once", "twice"), ("once", "four times"), ("once among others", "four times")):
        found[f"{other} less {arm}"] = {
            "obeys": interval(obeys[other] - obeys[arm]),
            "nats": interval(nats[other] - nats[arm]),
        }
    return found


# --- form and length -------------------------------------------------------------------------------------------------

NAMES = "Anna Ben Clara David Emma Frank Grace Henry Irene Jack Kate Leo Maria Nina Oscar Paul".split()
TALK = (
    "Most mornings {name} is up before the alarm rings. {fact}The kitchen is small, but there is always coffee, and on "
    "Sundays a neighbour comes by with fresh rolls and the news of the street.",
    "Nobody in the choir laughs as loudly as {name}. {fact}After the rehearsal they walk to the bus together and talk "
    "about everything that went wrong, and about the concert in spring.",
    "It took {name} a long time to learn to drive. {fact}The first car broke down after a week, the second was stolen, "
    "and since then a bicycle has had to do, in rain and in snow.",
    "When {name} was a child, the summers seemed endless. {fact}There is still a box of shells under the bed, and a "
    "photograph of a boat whose name has faded.",
    "Everybody asks {name} for advice about plants. {fact}Too much water is what kills them, is the usual answer, and "
    "then a place at the window, but not in the sun.",
    "For years {name} has been writing a novel. {fact}The first chapter has been thrown away nine times, and friends "
    "have stopped asking how it ends.",
)
CITIES = tuple(city for _, city in WORD_PAIRS["capital"] if " " not in city)
FORMS = ("list", "sentences", "talk", "list, then talk", "sentences, then talk", "talk, then sentences")


def form(bench: Bench, part: str) -> dict[str, Any]:
    """In which city one of three persons lives, asked of six forms of the same facts."""
    draw = torch.Generator().manual_seed(11)
    rows: dict[str, list[list[int]]] = {name: [] for name in FORMS}
    right, among = [], []
    for _ in range(bench.sizes["sets"]):
        names = [NAMES[i] for i in torch.randperm(len(NAMES), generator=draw)[:6].tolist()]
        cities = [CITIES[i] for i in torch.randperm(len(CITIES), generator=draw)[:3].tolist()]
        order = torch.randperm(6, generator=draw).tolist()  # of the paragraphs; three of their persons have a city
        asked = int(torch.randint(3, (), generator=draw))
        facts = [f"{name} lives in {city}." for name, city in zip(names, cities)]
        with_fact = [f"{fact} " for fact in facts] + [""] * 3
        told = "\n".join(TALK[i].format(name=names[i], fact=with_fact[i]) for i in order)
        empty = "\n".join(TALK[i].format(name=names[i], fact="") for i in order)
        listed = "\n".join(f"- {name}: {city}" for name, city in zip(names, cities))
        sentences = " ".join(facts)
        texts = {
            "list": listed,
            "sentences": sentences,
            "talk": told,
            "list, then talk": f"{listed}\n\n{empty}",
            "sentences, then talk": f"{sentences}\n\n{empty}",
            "talk, then sentences": f"{empty}\n\n{sentences}",
        }
        question = f"\n\nQuestion: Where does {names[asked]} live?\nAnswer: {names[asked]} lives in"
        for name, text in texts.items():
            rows[name].append(bench.ids("<|im_start|>" + text + question))
        among.append([bench.ids(f" {city}")[0] for city in cities])
        right.append(among[-1][asked])
    goal, three = torch.tensor(right), torch.tensor(among)
    nats: dict[str, Tensor] = {}
    hits: dict[str, Tensor] = {}
    found: dict[str, Any] = {}
    for name, of in rows.items():
        logs = bench.last(of)
        nats[name] = -logs[torch.arange(len(goal)), goal]
        hits[name] = (three.gather(1, logs.gather(1, three).argmax(-1, keepdim=True))[:, 0] == goal).float()
        found[name] = {
            "tokens": round(sum(map(len, of)) / len(of), 1),
            "among three": interval(hits[name]),
            "greedy": interval((logs.argmax(-1) == goal).float()),
            "nats": interval(nats[name]),
        }
    for one, other in (
        ("sentences", "talk"),
        ("sentences, then talk", "talk"),
        ("talk, then sentences", "talk"),
        ("sentences", "sentences, then talk"),
        ("list", "sentences"),
        ("list", "list, then talk"),
        ("list, then talk", "sentences, then talk"),
        ("list", "talk"),
        ("list, then talk", "talk"),
    ):
        found[f"{one} less {other}"] = {
            "among three": interval(hits[one] - hits[other]),
            "nats": interval(nats[one] - nats[other]),
        }
    return found


# --- all together ----------------------------------------------------------------------------------------------------

STAGES: dict[str, tuple[Callable[..., Any], Sequence[str]]] = {
    "form": (form, ("all",)),
    "repetition": (repetition, ("all",)),
    "instruction": (instruction, FILLERS),
    "generating": (generating, ("all",)),
}


@torch.inference_mode()
def measured(bench: Bench, tiny: bool) -> dict[str, Any]:
    """All figures."""
    parts = {name: few for name, (_, few) in STAGES.items()}
    return carried_out(__file__, parts, lambda name, part: STAGES[name][0](bench, part), tiny)


def main(options: list[str]) -> None:
    from nondual.pretrained import our_smollm2

    torch.set_num_threads(1)
    tiny = "--tiny" in options
    bench = Bench(*our_smollm2(), TINY if tiny else SIZES)
    figures = measured(bench, tiny)
    if tiny:
        print("tiny", list(figures))
        return
    setup = {"words": WORDS, "instruction": INSTRUCTION, "sizes": SIZES}
    write("long_prompts", "nox -s bench -- long_prompts", figures, threads=1, setup=setup)
