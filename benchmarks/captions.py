"""What `llava` and `flamingo` share: pictures of emoji, their names as captions, one training, and what is asked of it.

Both join two frozen models: the image tower of nondual.pretrained.emoji_clip, whose vectors are computed once, and
SmolLM2. A text is a mark for the picture, the name, and a full stop:

    ▒ straw berry .

The split is that of benchmarks/clip_data.py: the 150 test concepts were met neither by the tower nor here, in any
style. Training pictures come in six styles, as they are and in VIEWS - 1 variations each.
"""

import json
import tempfile
import time
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.clip_data import COMPLETE, HELD_STYLE, emoji_pairs, varied
from benchmarks.clip_judge import interval
from benchmarks.record import keep
from nondual.data.emoji import concepts
from nondual.multimodal.flamingo import Flamingo
from nondual.multimodal.llava import Llava
from nondual.pretrained.emoji_clip import emoji_clip
from nondual.pretrained.smollm2 import our_smollm2
from nondual.store import cache_folder
from nondual.training import optimiser, train

BATCH, VIEWS, LONGEST, DECAY = 16, 4, 6, 0.01
"""A step's pictures, views of each, the tokens of a name that are learnt at most, and the weight decay."""
SHORTLIST = 5
"""How many names are scored in full for each picture: those whose first tokens are the likeliest."""
SHOWN = 12
"""How many captions are kept: those of the test concepts whose code points come first."""
FULL_STOP = 30


class Captions(NamedTuple):
    """Pictures as the frozen tower sees them, and their names as SmolLM2 reads them.

    Attributes:
        patches: (P, VIEWS, 16, 128), the tower's last vectors; views beyond the first are variations.
        concept: (P,) int64, of each picture.
        train: (T,) int64, the pictures that are trained on.
        names: of the C concepts.
        groups: of the C concepts.
        tokens: the ids of each name, in C lists, without the full stop.
        tune, test: (…,) int64, concepts.
        pictures: (3, C) int64, the picture of each concept in each style that draws all of them.
        hexcodes: the code points of each concept.
        clip: (150,) int64, which test name the tower's own CLIP finds nearest to each test picture in the first style.
    """

    patches: Tensor
    concept: Tensor
    train: Tensor
    names: tuple[str, ...]
    groups: tuple[str, ...]
    tokens: list[list[int]]
    tune: Tensor
    test: Tensor
    pictures: Tensor
    hexcodes: tuple[str, ...]
    clip: Tensor


@cache
def language_model() -> tuple[Any, Any]:
    """SmolLM2 and its tokenizer."""
    return our_smollm2()


@cache
def captions(folder: Path) -> Captions:
    """All of it; computed once, and then read from the folder."""
    file = folder / "captions.pt"
    if not file.exists():
        torch.save(tuple(_captions()), file)
    return Captions(*torch.load(file, weights_only=True))


@torch.no_grad()
def _captions() -> Captions:
    pairs, model = emoji_pairs(), emoji_clip()
    generator = torch.Generator().manual_seed(0)
    tower: Any = model.image_tower

    def seen(pictures: Tensor) -> Tensor:
        return tower.vit.features((pictures.float() / 255 - 0.75) / 0.3)

    views = [
        torch.stack([seen(part), *(seen(varied(part, generator)) for _ in range(VIEWS - 1))], 1)
        for part in pairs.pictures.split(512)
    ]
    _, tokenizer = language_model()
    tokens = [tokenizer(f" {name}").input_ids for name in pairs.names]
    usable = torch.isin(pairs.concept, pairs.train) & (pairs.style != pairs.styles.index(HELD_STYLE))
    of_style = []
    for style in COMPLETE:
        row = torch.zeros(len(pairs.names), dtype=torch.long)
        here = (pairs.style == pairs.styles.index(style)).nonzero()[:, 0]
        row[pairs.concept[here]] = here
        of_style.append(row)
    images = model.encode_images(pairs.of(pairs.test, COMPLETE[0]))
    nearest = (images @ model.encode_texts(pairs.captions[pairs.test, 0]).T).argmax(1)
    codes = {each.name: each.hexcode for each in concepts()}
    return Captions(
        torch.cat(views), pairs.concept, usable.nonzero()[:, 0], pairs.names, pairs.groups, tokens, pairs.tune,
        pairs.test, torch.stack(of_style), tuple(codes[name] for name in pairs.names), nearest,
    )  # fmt: skip


# --- texts ---------------------------------------------------------------------------------------------------------


def texts(tokens: list[list[int]], prompt: list[int]) -> tuple[Tensor, Tensor]:
    """Prompt, name, full stop, filled on the right: ids (B, N), and labels (B, N), -100 but for name and full stop."""
    longest = max(map(len, tokens)) + 1
    ids = torch.tensor([[*prompt, *each, *[FULL_STOP] * (longest - len(each))] for each in tokens])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    for row, each in zip(labels, tokens):
        row[len(prompt) + len(each) + 1 :] = -100
    return ids, labels


@torch.no_grad()
def nats(model: Llava | Flamingo, ids: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """The loss of each label (B, N - 1), 0 where there is none."""
    scores = model(ids[:, :-1], images)
    return F.cross_entropy(scores.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")


# --- one training --------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A kind of model: how it is made, its prompt, and which of the tower's vectors it takes.

    Attributes:
        made: (arm) -> an untrained model, on the language model.
        prompt: ids before the name, the mark among them.
        pooled: whether it takes the mean of the 16 patches as one vector, or all of them.
        measure: (model) -> what is logged of a training.
        more: (model, captions) -> what else is asked of a trained model.
        adam: (model, rate) -> the optimiser.
    """

    made: Any
    prompt: list[int]
    pooled: bool
    measure: Any
    more: Any
    adam: Any = partial(optimiser, decay=DECAY)

    def vectors(self, patches: Tensor) -> Tensor:
        """(…, 16, 128) -> (…, S, 128)."""
        return patches.mean(-2, keepdim=True) if self.pooled else patches


class Run(NamedTuple):
    """One training, and where its result is kept.

    Attributes:
        arm: which model; one that ends in "deaf" is shown another training picture each time, drawn by chance.
        rate, seed, steps: of the training. The seed fixes the first weights and the batches.
        asked: what is measured at the end: "tune", the loss on the concepts to choose on; "losses", those on the test
            concepts and on some of the training too; "all", names chosen and captions written as well.
    """

    kind: str
    arm: str
    rate: float
    seed: int
    steps: int
    folder: Path
    asked: str

    @property
    def file(self) -> Path:
        return self.folder / f"{self.kind}_{self.arm.replace(' ', '-')}_{self.rate}_{self.seed}_{self.steps}.json"


def batch_of(task: Task, data: Captions, deaf: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, vectors and labels of BATCH training pictures whose names are of about the same length.

    Four times as many are drawn and sorted by the length of their names, and one of the four parts is taken.
    """
    drawn = torch.randint(len(data.train), (4 * BATCH,), generator=generator)
    pictures = data.train[drawn].tolist()
    pictures.sort(key=lambda i: len(data.tokens[int(data.concept[i])]))
    part = int(torch.randint(4, (), generator=generator)) * BATCH
    chosen = torch.tensor(pictures[part : part + BATCH])
    ids, labels = texts([data.tokens[int(data.concept[i])][:LONGEST] for i in chosen], task.prompt)
    other = data.train[torch.randint(len(data.train), (BATCH,), generator=generator)]
    view = torch.randint(VIEWS, (BATCH,), generator=generator)
    return ids, task.vectors(data.patches[other if deaf else chosen, view]), labels


def carry_out(run: Run, task: Task) -> dict[str, Any]:
    """Train on one thread and keep the result; a run that has ended is only read."""
    if run.file.exists():
        return json.loads(run.file.read_text())
    torch.set_num_threads(1)
    data = captions(run.folder)
    torch.manual_seed(run.seed)
    model = task.made(run.arm)
    began: list[float] = []
    history: list[dict[str, float]] = []
    if run.steps:

        def loss_of(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            began.append(time.process_time())
            ids, images, labels = batch
            return model.loss(ids, images, labels)

        history = train(
            model, loss_of, lambda generator: batch_of(task, data, run.arm.endswith("deaf"), generator),
            optimiser=task.adam(model, run.rate), steps=run.steps, seed=run.seed,
            measure=lambda: task.measure(model), log_every=max(1, run.steps // 10), name=None,
        )  # fmt: skip
    model.eval()
    result = {
        **{name: getattr(run, name) for name in ("kind", "arm", "rate", "seed", "steps")},
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "curve": {key: [round(row[key], 4) for row in history] for key in (history[0] if history else ())},
        "seconds a step": round(median(b - a for a, b in pairwise(began)), 4) if len(began) > 1 else None,
        "tune": round(float(losses(model, task, data, data.tune).mean()), 4),
    }
    if run.asked != "tune":
        result["test"] = [round(x, 4) for x in losses(model, task, data, data.test).tolist()]
        result["trained"] = round(float(losses(model, task, data, data.concept[data.train[::101]]).mean()), 4)
    if run.asked == "all":
        result |= choices(model, task, data) | {"captions": written(model, task, data)} | task.more(model, data)
        torch.save(model.trained_state_dict(), run.file.with_suffix(".pt"))
    keep(run.file, result)
    said = round(sum(result["test"]) / len(result["test"]), 4) if "test" in result else "not asked"
    print(run.file.stem, "tune", result["tune"], "test", said, result["seconds a step"], "s a step", flush=True)
    return result


LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""The learning rates that can be chosen."""
SWEEP_SEED = 0
"""The seed of the trainings that choose a rate; none of them is compared."""


class Plan:
    """All trainings of a benchmark, each of `steps` steps, those that choose a rate too.

    Args:
        kind: of the runs; task: what they train; folder: where they are kept; seeds: of the runs to compare.
        first: the rate that each arm tries first. An arm that is not named takes the rate of the arm `of`[it].
    """

    def __init__(
        self, kind: str, task: Task, folder: Path, steps: int, seeds: tuple[int, ...], first: dict[str, float],
        of: dict[str, str],
    ):  # fmt: skip
        self.kind, self.task, self.folder, self.steps, self.seeds = kind, task, folder, steps, seeds
        self.first, self.of = first, of

    def run(self, arm: str, rate: float, seed: int, asked: str = "losses", steps: int | None = None) -> dict[str, Any]:
        asked = "all" if seed == self.seeds[0] else asked
        steps = self.steps if steps is None else steps
        return carry_out(Run(self.kind, arm, rate, seed, steps, self.folder, asked), self.task)

    def sweep(self, arm: str) -> dict[float, float]:
        """The loss on the concepts to choose on, at each rate tried.

        The first rate and its neighbours on the LADDER are tried, then the neighbours of the best, until both
        neighbours of the best have been.
        """
        found: dict[float, float] = {}
        best = LADDER.index(self.first[arm])
        while missing := [
            LADDER[k] for k in (best, best - 1, best + 1) if 0 <= k < len(LADDER) and LADDER[k] not in found
        ]:
            found |= {rate: self.run(arm, rate, SWEEP_SEED, "tune")["tune"] for rate in missing}
            best = LADDER.index(min(found, key=lambda rate: found[rate]))
        return dict(sorted(found.items()))

    def best(self, arm: str) -> float:
        """The rate with the lowest."""
        found = self.sweep(self.of.get(arm, arm))
        return min(found, key=lambda rate: found[rate])

    def results(self, arms: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
        """The runs of each arm, one for each seed; all arms of a seed first, so that an early stop leaves pairs."""
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
        for seed in self.seeds:
            for arm in arms:
                found[arm].append(self.run(arm, self.best(arm), seed))
        return found

    def sweeps(self) -> dict[str, dict[str, float]]:
        """Each sweep, for the record."""
        return {arm: {str(rate): x for rate, x in self.sweep(arm).items()} for arm in self.first}

    def settings(self, data: Captions) -> dict[str, Any]:
        """What the record says of all runs."""
        return {
            "threads": 1, "batch": BATCH, "views": VIEWS, "shortlist": SHORTLIST, "pictures": len(data.train),
            "test": len(data.test), "steps": self.steps, "seeds": {"rate": SWEEP_SEED, "compared": list(self.seeds)},
        }  # fmt: skip


def plan(options: list[str], kind: str, task: Task, steps: int, seeds: tuple[int, ...], **rates: Any) -> Plan:
    """The plan that a command line asks for; --runs=FOLDER keeps its runs elsewhere."""
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    folder = folder or cache_folder() / "runs" / "captions"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    return Plan(kind, task, folder, steps, seeds, **rates)


def tiny(kind: str, task: Task, arms: tuple[str, ...], rate: float) -> None:
    """Two steps of each arm, kept nowhere, to see that all parts run."""
    with tempfile.TemporaryDirectory() as folder:
        for arm in arms:
            carry_out(Run(kind, arm, rate, 0, 2, Path(folder), "all" if arm == arms[0] else "losses"), task)


# --- what is asked -------------------------------------------------------------------------------------------------


def losses(model: Llava | Flamingo, task: Task, data: Captions, which: Tensor) -> Tensor:
    """For each concept, the nats per token of name and full stop, in the first of the complete styles (M,)."""
    found = []
    order = sorted(range(len(which)), key=lambda i: len(data.tokens[int(which[i])]))
    for part in torch.tensor(order).split(50):
        ids, labels = texts([data.tokens[int(i)] for i in which[part]], task.prompt)
        images = task.vectors(data.patches[data.pictures[0, which[part]], 0])
        found.append(nats(model, ids, images, labels).sum(1) / (labels != -100).sum(1))
    return torch.cat(found)[torch.tensor(order).argsort()]


@torch.no_grad()
def choices(model: Llava | Flamingo, task: Task, data: Captions) -> dict[str, Any]:
    """For each test picture, which of the test names is the likeliest, and which gains most over an average picture.

    Names are first ordered by their first token, for both measures; the first SHORTLIST of each are scored in full.
    """
    names = [data.tokens[int(i)] for i in data.test]
    images = task.vectors(data.patches[data.pictures[0, data.test], 0])  # (M, S, 128)
    average = task.vectors(data.patches[data.train, 0].mean(0, keepdim=True))  # (1, S, 128)
    prompt = torch.tensor([task.prompt])
    first = torch.tensor([each[0] for each in names])
    seen = model(prompt.expand(len(images), -1), images)[:, -1].log_softmax(-1)[:, first]  # (M, M)
    guessed = model(prompt, average)[:, -1].log_softmax(-1)[:, first]  # (1, M)
    prior = -likelihoods(model, task, names, average.expand(len(names), -1, -1))
    listed = [
        torch.cat([x.topk(SHORTLIST).indices, (x - guessed[0]).topk(SHORTLIST).indices]).unique().tolist() for x in seen
    ]
    rows = [(i, j) for i, row in enumerate(listed) for j in row]
    score = -likelihoods(model, task, [names[j] for _, j in rows], images[[i for i, _ in rows]])
    chosen, gained = [], []
    for i in range(len(images)):
        here = [k for k, row in enumerate(rows) if row[0] == i]
        chosen.append(rows[max(here, key=lambda k: float(score[k]))][1])
        gained.append(rows[max(here, key=lambda k: float(score[k] - prior[rows[k][1]]))][1])
    return {"chosen": chosen, "gained": gained}


def likelihoods(model: Llava | Flamingo, task: Task, names: list[list[int]], images: Tensor) -> Tensor:
    """The nats of each whole caption given its picture (M,); names of a length are read together."""
    total = torch.zeros(len(names))
    for length in {len(each) for each in names}:
        of_length = torch.tensor([i for i, each in enumerate(names) if len(each) == length])
        for rows in of_length.split(96):
            ids, labels = texts([names[int(i)] for i in rows], task.prompt)
            total[rows] = nats(model, ids, images[rows], labels).sum(1)
    return total


def written(model: Llava | Flamingo, task: Task, data: Captions, shown: int = SHOWN) -> list[dict[str, str]]:
    """What it writes for the first test pictures by code point, up to the full stop."""
    _, tokenizer = language_model()
    which = sorted(data.test.tolist(), key=lambda i: data.hexcodes[i])[:shown]
    images = task.vectors(data.patches[data.pictures[0, which], 0])
    ids = model.generate(torch.tensor([task.prompt] * len(which)), 7, images, eos=FULL_STOP)[:, len(task.prompt) :]
    said = [tokenizer.decode(row).split(".")[0].strip() for row in ids.tolist()]
    return [{"hexcode": data.hexcodes[i], "name": data.names[i], "written": text} for i, text in zip(which, said)]


def all_written(whole: Plan, arm: str, data: Captions) -> list[dict[str, str]]:
    """What the first seed of an arm writes for every test picture, from the weights that its training kept."""
    run = Run(whole.kind, arm, whole.best(arm), whole.seeds[0], whole.steps, whole.folder, "all").file
    file = run.with_suffix(".written.json")
    if not file.exists():
        model = whole.task.made(arm)
        model.load_state_dict(torch.load(run.with_suffix(".pt"), weights_only=True), strict=False)
        keep(file, {"captions": written(model.eval(), whole.task, data, len(data.test))})
    return json.loads(file.read_text())["captions"]


# --- what came of several runs -------------------------------------------------------------------------------------


def difference(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, Any]:
    """Nats per token of a less those of b, paired by seed and concept: [mean, low, high] over concepts, and by seed."""
    each = [torch.tensor(x["test"]) - torch.tensor(y["test"]) for x, y in zip(a, b, strict=True)]
    return {
        "interval": interval(torch.stack(each).mean(0)),
        "by seed": [round(float(x.mean()), 4) for x in each],
    }


def shares(data: Captions, chosen: list[int]) -> dict[str, Any]:
    """How often the right one of the 150 test names was chosen, and one of the right group: [mean, low, high]."""
    picked = torch.tensor(chosen)
    groups = [data.groups[int(i)] for i in data.test]
    same = torch.tensor([groups[i] == groups[j] for i, j in enumerate(chosen)])
    return {"name": interval((picked == torch.arange(len(picked))).double()), "group": interval(same.double())}


def compared(data: Captions, a: list[int], b: list[int]) -> dict[str, Any]:
    """The share of right choices in a less that in b, paired by test picture, for name and group: [mean, low, high]."""
    groups = [data.groups[int(i)] for i in data.test]
    names = torch.tensor([(i == k) - (j == k) for k, (i, j) in enumerate(zip(a, b, strict=True))])
    kinds = torch.tensor([(groups[i] == own) - (groups[j] == own) for own, i, j in zip(groups, a, b, strict=True)])
    return {"name": interval(names.double()), "group": interval(kinds.double())}


def summed_up(runs: list[dict[str, Any]], data: Captions) -> dict[str, Any]:
    """The seeds of one arm."""
    result: dict[str, Any] = {
        "parameters": runs[0]["parameters"],
        "rate": runs[0]["rate"],
        "steps": runs[0]["steps"],
        "seeds": [run["seed"] for run in runs],
        "test": interval(torch.stack([torch.tensor(run["test"]) for run in runs]).mean(0)),
        "by seed": [round(sum(run["test"]) / len(run["test"]), 4) for run in runs],
        "trained": [run["trained"] for run in runs],
        "seconds a step": [run["seconds a step"] for run in runs],
        "curve": runs[0]["curve"],
    }
    for run in runs[:1]:
        if "chosen" in run:
            result |= {"likeliest": shares(data, run["chosen"]), "gains most": shares(data, run["gained"])}
            result["captions"] = run["captions"]
    return result
