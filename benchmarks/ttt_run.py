"""One run of `ttt`: the models, texts that change, a training, and what is measured of the trained model.

Texts are Shakespeare's plays in 27 characters: the letters without case or accents, and one space for all between.

A cipher puts another letter in the place of each, one for one, and leaves the space: the same language in an alphabet
that no one has seen before. In training half of the windows change into a fresh cipher at a place drawn for each.
"""

import copy
import json
import math
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plays import drawn
from benchmarks.record import keep
from nondual.data import gita, shakespeare
from nondual.efficient_attention.linear_attention import LinearMixer
from nondual.feed_forward import FeedForward
from nondual.language_models.causal import CausalLM
from nondual.recent.ttt import TTT, TTTMLP, TTTLinear
from nondual.relative_positions import Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.training import optimiser, train
from nondual.transformer_layer import TransformerLayer

ALPHABET = " abcdefghijklmnopqrstuvwxyz"
CONTEXT, BATCH = 512, 4
LONG, CHANGE = 1024, 512
"""Windows that are measured are of LONG characters; what changes does so at CHANGE."""
BINS = (0, 16, 32, 64, 128, 256, 512, 1024)
AFTER_BINS = (0, 16, 32, 64, 128, 256, 512)
TIMES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
"""What the learned inner rate is multiplied by after a change."""
CHOOSE_ON, HELD_OUT = "twelfth-night", ("macbeth", "the-tempest")
WIDTH, HEADS, LAYERS = 96, 4, 2


# --- the models ----------------------------------------------------------------------------------------------------


class LinearMemory(LinearMixer):
    """Linear attention whose writing can be turned down: every key is multiplied by `writes`."""

    writes = 1.0

    def features(self, q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
        return q, k * self.writes


MIXERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "linear attention": (lambda: LinearMemory(WIDTH, HEADS, gate=True), 248),
    "TTT-Linear": (lambda: TTTLinear(WIDTH, HEADS), 232),
    "softmax attention": (lambda: MultiHeadAttention(WIDTH, HEADS, causal=True, positions=Rotary(WIDTH // HEADS)), 304),
    "TTT-MLP": (lambda: TTTMLP(WIDTH, HEADS), 148),
}
"""Each with the width of its feed-forward networks, by which all have the same number of parameters."""


def model_of(name: str) -> CausalLM:
    make, d_ff = MIXERS[name]

    def layer(_: int) -> nn.Module:
        return TransformerLayer(make(), FeedForward(WIDTH, d_ff), WIDTH, norm_first=True, norm=nn.RMSNorm)

    return CausalLM(len(ALPHABET), WIDTH, LAYERS, layer=layer)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def writing(model: CausalLM, times: float) -> Iterator[None]:
    """Meanwhile every memory of fixed size is written `times` as strongly as it was trained to be; with 0, not at
    all."""
    strengths = [
        (layer.mixer, "base_rate" if isinstance(layer.mixer, TTT) else "writes")
        for layer in model.layers
        if isinstance(layer.mixer, TTT | LinearMemory)
    ]
    before = [getattr(mixer, name) for mixer, name in strengths]
    for (mixer, name), strength in zip(strengths, before):
        setattr(mixer, name, strength * times)
    try:
        yield
    finally:
        for (mixer, name), strength in zip(strengths, before):
            setattr(mixer, name, strength)


# --- the texts -----------------------------------------------------------------------------------------------------


def folded(text: str) -> Tensor:
    """A text in the numbers of ALPHABET."""
    plain = unicodedata.normalize("NFD", text).lower()
    letters = "".join(c for c in plain if not unicodedata.combining(c))
    words = "".join(c if c in ALPHABET else " " for c in letters).split()
    return torch.tensor([ALPHABET.index(c) for c in " ".join(words)])


class Texts(NamedTuple):
    """The plays that are trained on; and windows (count, LONG + 1) of the others, and of the Gītā (count, LONG + 1)."""

    train: Tensor
    choose_on: Tensor
    held_out: Tensor
    gita: Tensor


@cache
def read() -> Texts:
    plays = {name: folded(play) for name, play in shakespeare().items()}
    others = (CHOOSE_ON, *HELD_OUT)

    def windows(text: Tensor, count: int) -> Tensor:
        return text[: len(text) // count * count].view(count, -1)[:, : LONG + 1]

    return Texts(
        torch.cat([play for name, play in plays.items() if name not in others]),
        windows(plays[CHOOSE_ON], 16),
        torch.cat([windows(plays[name], 12) for name in HELD_OUT]),
        windows(folded(" ".join(word for verse in gita() for word in verse.iast)), 24),
    )


def enciphered(ids: Tensor, generator: torch.Generator) -> Tensor:
    """Each row (count, n) in a cipher of its own."""
    letters = torch.stack([torch.randperm(len(ALPHABET) - 1, generator=generator) for _ in ids]) + 1
    return torch.cat([torch.zeros(len(ids), 1, dtype=torch.long), letters], 1).gather(1, ids)


def draw(generator: torch.Generator) -> Tensor:
    """Windows of the plays that are trained on (BATCH, CONTEXT + 1), half of which change into a cipher."""
    ids = drawn(read().train, BATCH, CONTEXT, generator)
    at = torch.randint(CONTEXT, (BATCH, 1), generator=generator)
    at[torch.rand(BATCH, generator=generator) < 0.5] = CONTEXT + 1
    return torch.where(torch.arange(CONTEXT + 1) < at, ids, enciphered(ids, generator))


def changes(windows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What windows (count, LONG + 1) begin with, and what may follow: English as it was, a cipher, or Sanskrit."""
    after = windows[:, CHANGE + 1 :]
    cipher = enciphered(after, torch.Generator().manual_seed(99))
    return windows[:, : CHANGE + 1], {
        "English": after,
        "cipher": cipher,
        "Sanskrit": read().gita[: len(windows), CHANGE + 1 :],
    }


# --- what is measured ----------------------------------------------------------------------------------------------


@torch.no_grad()
def bits(model: CausalLM, ids: Tensor, afters: dict[str, Tensor], times: tuple[float, ...] = (1.0,)) -> dict:
    """Bits of each character but the first (LONG,), the mean over windows, by what follows and by strength.

    Args:
        model: in evaluation mode.
        ids: what is read up to CHANGE (count, CHANGE + 1).
        afters: what follows, by name (count, LONG - CHANGE).
        times: from CHANGE on the memory is written so many times as strongly.
    """
    caches = model.new_cache(len(ids), LONG)
    scores = model(ids[:, :-1], cache=caches)
    before = F.cross_entropy(scores.mT, ids[:, 1:], reduction="none").mean(0)
    found: dict[str, dict[float, Tensor]] = {name: {} for name in afters}
    for name, after in afters.items():
        given = torch.cat([ids[:, -1:], after[:, :-1]], 1)
        for strength in times:
            with writing(model, strength):
                scores = model(given, cache=copy.deepcopy(caches))
            bits_after = F.cross_entropy(scores.mT, after, reduction="none").mean(0)
            found[name][strength] = torch.cat([before, bits_after]) / math.log(2)
    return found


def binned(each: Tensor, edges: tuple[int, ...]) -> list[float]:
    """The mean between two edges each."""
    return [round(each[a:b].mean().item(), 4) for a, b in pairwise(edges)]


def measured(model: CausalLM, windows: Tensor) -> dict[str, Any]:
    """By place in the context; and after each change, by how strongly the memory is written from then on."""
    fixed = isinstance(model.layers[0].mixer, TTT | LinearMemory)
    ids, afters = changes(windows)
    found: dict[str, Any] = {"after": {}, "after_by_place": {}}
    for into, by_times in bits(model, ids, afters, TIMES if fixed else (1.0,)).items():
        found["after"][into] = {str(times): round(each[CHANGE:].mean().item(), 4) for times, each in by_times.items()}
        found["after_by_place"][into] = {str(t): binned(each[CHANGE:], AFTER_BINS) for t, each in by_times.items()}
        if into == "English":
            found["by_place"] = binned(by_times[1.0], BINS)
    if fixed:
        with writing(model, 0.0):
            never = bits(model, ids, {"English": afters["English"]})["English"][1.0]
        found["by_place_never_written"] = binned(never, BINS)
    return found


def without_a_model(windows: Tensor) -> dict[str, list[float]]:
    """Bits of the cipher by place after the change, for two who know nothing of its letters but what is said here.

    spaces: how often a space comes in English; all letters alike.
    counting: how often each character has come since the change, each begun at 1.
    """
    after = windows[:, CHANGE + 1 :]  # a cipher changes neither of the two
    space = (read().train == 0).float().mean()
    letter = (1 - space) / (len(ALPHABET) - 1)
    spaces = -torch.where(after == 0, space, letter).log2().mean(0)
    before = F.one_hot(after, len(ALPHABET)).cumsum(1) - F.one_hot(after, len(ALPHABET)) + 1
    share = before.gather(2, after[..., None])[..., 0] / before.sum(-1)
    return {"spaces": binned(spaces, AFTER_BINS), "counting": binned(-share.log2().mean(0), AFTER_BINS)}


# --- one run -------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One model, trained once to the end, and where its result is kept."""

    model: str
    rate: float
    seed: int
    steps: int
    folder: Path
    windows: int = 24
    """How many windows of the plays held out are measured; 0 for the loss alone by which rates are chosen."""

    @property
    def file(self) -> Path:
        name = self.model.replace(" ", "-")
        return self.folder / f"{name}_{self.rate}_{self.seed}_{self.steps}_{self.windows}.json"

    def result(self) -> dict[str, Any] | None:
        """What the run ended with, or None where it has not ended."""
        return json.loads(self.file.read_text()) if self.file.exists() else None


def carry_out(run: Run) -> dict[str, Any]:
    """Train on one thread, measure, keep the result, and give it."""
    if (before := run.result()) is not None:
        return before
    torch.set_num_threads(1)
    run.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(run.seed)
    model = model_of(run.model)
    result: dict[str, Any] = {"rate": run.rate, "seed": run.seed, "parameters": size(model), "choose": math.inf}
    try:
        train(model, model.loss, draw, optimiser=optimiser(model, run.rate), steps=run.steps, seed=run.seed, name=None)
    except FloatingPointError as error:
        result["stopped"] = str(error)
    else:
        model.eval()
        ids, afters = changes(read().choose_on)
        chosen = bits(model, ids, {into: afters[into] for into in ("English", "cipher")})
        result["choose"] = round(sum(each[1.0].mean().item() for each in chosen.values()) / 2, 4)
        if run.windows:
            result |= measured(model, read().held_out[: run.windows])
            result["base_rates"] = learned(model)
    keep(run.file, result)
    print(*run[:4], result["choose"], result.get("after"), flush=True)
    return result


@torch.no_grad()
def learned(model: CausalLM) -> list[dict[str, Any]]:
    """What the outer loop made of the inner one, by layer: η and τ of the last place, means over a text."""
    found = []
    for layer in model.layers:
        mixer = layer.mixer
        if isinstance(mixer, TTT):
            last = mixer.shares()[-1].item()
            bias = mixer.rate_proj.bias.sigmoid().mean().item()
            found.append({"share_of_last_place": round(last, 4), "sigmoid_of_bias": round(bias, 4)})
    return found
