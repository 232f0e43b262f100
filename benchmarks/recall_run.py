"""One run of `recall`: four tasks, one frame for all mixers, and a training whose result is kept as it ends.

    recall     values by their keys, as `nondual.tasks.recall`; the number of pairs is drawn anew for each batch
    copying    a row of tokens, the latest first, as `nondual.tasks.copying`; its length is drawn anew for each batch
    gap        some tokens after a gap of blanks, as `nondual.tasks.copying`; gap and number are fixed
    EEG        the next samples of four channels of a recorded EEG, which comes with matplotlib

The frame: what is read becomes vectors of width E; then residual blocks, each of one mixer with its norm; then a norm
and scores. Recurrent mixers are torch's nn.RNN, nn.LSTM and nn.GRU, which have the parameters of `nondual.recurrent`
and on a CPU take a fraction of its time.
"""

import json
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import cbook
from torch import Tensor, nn

from benchmarks.record import keep
from nondual.efficient_attention.mamba import Mamba
from nondual.ops.attention import attention
from nondual.positional_encoding import ALiBi
from nondual.self_attention import MultiHeadAttention
from nondual.tasks import copying, recall
from nondual.training import constant, optimiser, train, warmup_cosine
from nondual.transformer_layer import MixerBlock

VALUES, KEYS, QUESTIONS, LONGEST = 8, 16, 8, 16
TRAINED_ON = (1, 2, 4, 8, 16)
"""How many pairs or tokens the batches of recall and copying have; each batch has one of these."""
WIDTH, HEADS, BATCH, DECAY = 64, 4, 32, 0.01
GAP_WIDTH, GAP_BATCH, CHECKED, SOLVED = 32, 16, 25, 0.99
EEG_WIDTH, WINDOW, AHEAD = 32, 64, 4
EEG_PARTS = {"train": slice(0, 480), "choose": slice(480, 640), "test": slice(640, 800)}

Batch = tuple[tuple[Tensor, ...], Tensor]
"""What is read, one or two tensors of (B, N) or (B, N, I), and the answers."""

# --- the models ----------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A network of torch's as a mixer, with one projection of its output."""

    def __init__(self, d_model: int, network: nn.RNNBase):
        super().__init__()
        self.network = network
        self.out_proj = nn.Linear(network.hidden_size, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, E) -> (B, N, E)."""
        return self.out_proj(self.network(x)[0])


class Reader(nn.Module):
    """Inputs whose vectors are added up, positions where a mixer needs them, blocks, a norm and scores."""

    def __init__(self, inputs: list[nn.Module], width: int, blocks: list[nn.Module], scores: int, places: int = 0):
        super().__init__()
        self.inputs = nn.ModuleList(inputs)
        self.places = nn.Parameter(width**-0.5 * torch.randn(places, width)) if places else None
        self.blocks = nn.ModuleList(MixerBlock(mixer, width) for mixer in blocks)
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, scores)
        for one in inputs:
            if isinstance(one, nn.Embedding):
                nn.init.normal_(one.weight, std=width**-0.5)

    def forward(self, given: tuple[Tensor, ...]) -> Tensor:
        """One tensor for each input -> scores (B, N, scores). The middle of the places is the middle of a row."""
        x = torch.stack([one(part) for one, part in zip(self.inputs, given)]).sum(0)
        if self.places is not None:
            first = (len(self.places) - x.shape[1]) // 2
            x = x + self.places[first : first + x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def lstm(d_model: int, hidden: int, forget_bias: float | Tensor = 1.0, input_bias: float | Tensor = 0.0) -> Recurrent:
    """An LSTM whose biases are 0 but for those of its forget and input gates."""
    mixer = Recurrent(d_model, nn.LSTM(d_model, hidden, batch_first=True))
    with torch.no_grad():
        for name, parameter in mixer.network.named_parameters():
            if "bias" in name:
                parameter.zero_()
        bias = cast(Tensor, mixer.network.bias_ih_l0)
        bias[:hidden], bias[hidden : 2 * hidden] = input_bias, forget_bias
    return mixer


def chrono(d_model: int, hidden: int, longest: int) -> Recurrent:
    """An LSTM whose cells start with time constants spread evenly from 1 to the longest gap.

    Source: Tallec and Ollivier 2018 (1804.11188), equation 16.
    """
    bias = torch.empty(hidden).uniform_(1, longest - 1).log()
    return lstm(d_model, hidden, bias, -bias)


def attending(d_model: int, heads: int, **more: Any) -> MultiHeadAttention:
    return MultiHeadAttention(d_model, heads, causal=True, op=attention, **more)


def mixers(arm: str) -> tuple[int, list[nn.Module], int]:
    """Of an arm of recall or copying: the width, the mixers, and the numbers of its state (of attention, 0)."""
    kind, size = arm.split()[:2]
    n = int(size)
    if kind == "LSTM":
        return WIDTH, [lstm(WIDTH, n)], 2 * n
    if kind == "Mamba":
        mixer = Mamba(WIDTH, d_state=n)
        return WIDTH, [mixer], mixer.d_inner * (n + mixer.d_conv - 1)
    return n, [attending(n, HEADS) for _ in range(2)], 0


def gap_model(arm: str, gap: int) -> Reader:
    """A model for tokens after a gap."""
    width = GAP_WIDTH
    make: dict[str, Callable[[], nn.Module]] = {
        "RNN": lambda: Recurrent(width, nn.RNN(width, width, batch_first=True)),
        "GRU": lambda: Recurrent(width, nn.GRU(width, width, batch_first=True)),
        "LSTM, forget bias 0": lambda: lstm(width, width, 0.0),
        "LSTM, forget bias 1": lambda: lstm(width, width, 1.0),
        "LSTM, chrono": lambda: chrono(width, width, gap + 2),
        "attention": lambda: attending(width, 2),
    }
    return Reader([nn.Embedding(VALUES + 2, width)], width, [make[arm]()], VALUES)


def eeg_model(arm: str) -> Reader:
    """A model of the EEG; attention has two layers, which come nearest to the parameters of the others."""
    width = EEG_WIDTH
    make: dict[str, Callable[[], list[nn.Module]]] = {
        "attention": lambda: [attending(width, HEADS) for _ in range(2)],
        "attention, ALiBi": lambda: [attending(width, HEADS, positions=ALiBi(HEADS)) for _ in range(2)],
        "LSTM": lambda: [lstm(width, width)],
        "GRU": lambda: [Recurrent(width, nn.GRU(width, width, batch_first=True))],
        "Mamba": lambda: [Mamba(width)],
    }
    places = WINDOW if arm == "attention" else 0
    return Reader([nn.Linear(4, width)], width, make[arm](), 4 * AHEAD, places)


# --- what they read ------------------------------------------------------------------------------------------------


def pairs(batch: int, m: int, generator: torch.Generator) -> Batch:
    """Keys and values (B, m + Q), and what is asked (B, Q)."""
    keys, values, answers = recall(batch, m, keys=KEYS, values=VALUES, questions=QUESTIONS, generator=generator)
    return (keys, values), answers


def tokens(batch: int, n: int, generator: torch.Generator, gap: int = 0, latest_first: bool = True) -> Batch:
    """Ids (B, n + gap + n), and what is asked (B, n)."""
    ids, answers = copying(batch, n, vocabulary=VALUES, gap=gap, latest_first=latest_first, generator=generator)
    return (ids,), answers


def one_of(draw: Callable[[int, int, torch.Generator], Batch], generator: torch.Generator) -> Batch:
    """A batch of one of the sizes that are trained on."""
    return draw(BATCH, TRAINED_ON[int(torch.randint(len(TRAINED_ON), (1,), generator=generator))], generator)


@cache
def eeg() -> Tensor:
    """The recording (800, 4), each channel less its mean and over its deviation in the part that is trained on."""
    with cast(Any, cbook.get_sample_data("eeg.dat")) as file:
        x = torch.from_numpy(np.fromfile(file, dtype=float).reshape(800, 4).copy())
    known = x[EEG_PARTS["train"]]
    return ((x - known.mean(0)) / known.std(0)).float()


def eeg_windows(part: str, starts: Tensor | None = None) -> Batch:
    """Windows (B, WINDOW, 4) of a part, every one where no starts are given, and the samples after each of them."""
    x = eeg()[EEG_PARTS[part]]
    last = len(x) - WINDOW - AHEAD
    at = (torch.arange(last + 1) if starts is None else starts % (last + 1))[:, None] + torch.arange(WINDOW)
    after = torch.stack([x[at + 1 + h] for h in range(AHEAD)], 2)  # (B, WINDOW, AHEAD, 4)
    return (x[at],), after.flatten(2)


# --- the losses ----------------------------------------------------------------------------------------------------


def loss_of(model: Reader, batch: Batch) -> Tensor:
    """Of answers, the cross-entropy at the last positions; of samples, the mean square."""
    given, answers = batch
    said = model(given)
    if answers.is_floating_point():
        return F.mse_loss(said, answers)
    return F.cross_entropy(said[:, -answers.shape[1] :].flatten(0, 1), answers.flatten())


@torch.no_grad()
def scored(model: Reader, batch: Batch) -> tuple[float, float, list[float]]:
    """The share of right answers, the bits that each answer tells on average, and the right ones question by question.

    log2(VALUES) less the cross-entropy is a lower bound of what the state and the question together tell of an answer.
    """
    given, answers = batch
    said = model(given)[:, -answers.shape[1] :]
    right = (said.argmax(-1) == answers).double().mean(0)
    nats = F.cross_entropy(said.flatten(0, 1), answers.flatten()).item()
    return right.mean().item(), math.log2(VALUES) - nats / math.log(2), right.tolist()


@torch.no_grad()
def eeg_scored(model: Reader, part: str) -> dict[str, Any]:
    """The mean square of what is missed over that of the samples, by how far ahead; after WINDOW / 2 samples read."""
    (x,), after = eeg_windows(part)
    half = WINDOW // 2
    after = after[:, half:].unflatten(2, (AHEAD, 4))
    missed = (model((x,))[:, half:].unflatten(2, (AHEAD, 4)) - after).square().mean((0, 1, 3))
    ahead = (missed / after.square().mean((0, 1, 3))).tolist()
    return {"missed": round(sum(ahead) / AHEAD, 4), "by_step": [round(value, 4) for value in ahead]}


@torch.no_grad()
def weight_on_the_pair(model: Reader, m: int) -> list[float]:
    """Of attention on recall: the weight of the pair that is asked for, of the head that gives it most, by layer."""
    (keys, values), _ = pairs(256, m, torch.Generator().manual_seed(8))
    x = torch.stack([one(part) for one, part in zip(model.inputs, (keys, values))]).sum(0)
    match = keys[:, m:, None] == keys[:, None, :m]  # (B, Q, m)
    found = []
    for block in cast(Any, model.blocks):
        mixed, weights = block.mixer(block.norm(x), return_weights=True)
        each = (weights[:, :, m:, :m] * match[:, None]).sum(-1).mean((0, 2))
        found.append(round(each.max().item(), 4))
        x = x + mixed
    return found


# --- one run -------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One model, trained once, and where its result is kept. A task is "recall", "copying", "EEG" or "gap 30 x 2"."""

    task: str
    arm: str
    rate: float
    seed: int
    steps: int
    folder: Path

    @property
    def file(self) -> Path:
        name = f"{self.task}_{self.arm}_{self.rate}_{self.seed}_{self.steps}.json"
        return self.folder / name.replace(" ", "-").replace(",", "")

    def result(self) -> dict[str, Any]:
        """What the run ended with."""
        return json.loads(self.file.read_text())


def carry_out(run: Run) -> dict[str, Any]:
    """Train from the beginning, unless it was done before; keep the result."""
    if not run.file.exists():
        torch.manual_seed(run.seed)
        kind = run.task.split()[0]
        try:
            result = {"recall": tabled, "copying": tabled, "gap": gapped, "EEG": recorded}[kind](run)
        except FloatingPointError as error:  # a rate that is too high for this arm
            result = {"failed": str(error)}
        run.folder.mkdir(parents=True, exist_ok=True)
        keep(run.file, {"rate": run.rate, "seed": run.seed, **result})
    return run.result()


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def tabled(run: Run) -> dict[str, Any]:
    """Recall or copying: how many answers are right, by the number of pairs or tokens."""
    width, blocks, state = mixers(run.arm)
    draw = pairs if run.task == "recall" else tokens
    inputs = [KEYS, VALUES + 1] if run.task == "recall" else [VALUES + 2]
    places = 2 * LONGEST if run.task == "copying" and not state else 0  # the order, which a recurrence has by itself
    model = Reader([nn.Embedding(n, width) for n in inputs], width, blocks, VALUES, places)
    history = fitted(run, model, partial(one_of, draw))
    told = [scored(model, draw(256, n, torch.Generator().manual_seed(7))) for n in range(1, LONGEST + 1)]
    result = {
        "parameters": size(model),
        "state": state,
        "loss": history[-1]["loss"],
        "right": [round(right, 4) for right, _, _ in told],
        "bits": [round(n * bits, 2) for n, (_, bits, _) in enumerate(told, 1)],
    }
    if run.task == "copying":
        result["right_by_question"] = {str(n): [round(x, 4) for x in told[n - 1][2]] for n in (4, 8, 16)}
    elif not state:
        result["weight"] = {str(m): weight_on_the_pair(model, m) for m in TRAINED_ON}
    return result


def fitted(run: Run, model: Reader, draw: Callable[[torch.Generator], Batch]) -> list[dict[str, float]]:
    """Train to the end of the schedule."""
    history = train(
        model,
        partial(loss_of, model),
        draw,
        optimiser=optimiser(model, run.rate, decay=DECAY),
        steps=run.steps,
        schedule=warmup_cosine,
        seed=run.seed,
        log_every=max(run.steps // 10, 1),
        name=None,
    )
    model.eval()
    return history


class Solved(Exception):
    """Raised to end a training early."""


def gapped(run: Run) -> dict[str, Any]:
    """Tokens after a gap: how many are right; ended as soon as SOLVED of them are."""
    _, gap, _, items = run.task.split()
    model = gap_model(run.arm, int(gap))
    draw = partial(tokens, GAP_BATCH, int(items), gap=int(gap), latest_first=False)
    held_out = tokens(128, int(items), torch.Generator().manual_seed(7), gap=int(gap), latest_first=False)
    curve: list[float] = []

    def measure() -> dict[str, float]:
        curve.append(scored(model, held_out)[0])
        if curve[-1] >= SOLVED:
            raise Solved
        return {}

    try:
        train(
            model,
            partial(loss_of, model),
            lambda generator: draw(generator=generator),
            optimiser=optimiser(model, run.rate, decay=DECAY),
            steps=run.steps,
            schedule=constant,
            seed=run.seed,
            measure=measure,
            log_every=CHECKED,
            name=None,
        )
    except Solved:
        pass
    return {
        "parameters": size(model),
        "steps": CHECKED * len(curve),
        "right": round(curve[-1], 4),
        "best": round(max(curve), 4),
    }


def recorded(run: Run) -> dict[str, Any]:
    """The EEG: what is missed, at the step at which least was missed of the part to choose on."""
    model = eeg_model(run.arm)
    checks: list[tuple[float, int, dict[str, Any]]] = []

    def measure() -> dict[str, float]:
        missed = eeg_scored(model, "choose")["missed"]
        checks.append((missed, len(checks) + 1, eeg_scored(model, "test")))
        return {"choose": missed}

    train(
        model,
        partial(loss_of, model),
        lambda generator: eeg_windows("train", torch.randint(10**9, (GAP_BATCH,), generator=generator)),
        optimiser=optimiser(model, run.rate, decay=DECAY),
        steps=run.steps,
        seed=run.seed,
        measure=measure,
        log_every=CHECKED,
        name=None,
    )
    missed, when, test = min(checks, key=lambda check: check[0])
    return {"parameters": size(model), "choose": missed, "steps": CHECKED * when, **test}
