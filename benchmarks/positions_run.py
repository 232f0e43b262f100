"""One run of the comparison of position codes on Shakespeare: the models, the windows, and a training that is kept."""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.plays import drawn, in_numbers, windows
from benchmarks.record import keep
from nondual.language_models.causal import CausalLM
from nondual.positional_encoding import (
    AddedPositions,
    ALiBi,
    LearnedPositions,
    RelativeBias,
    RelativePositions,
    Rotary,
    Sinusoidal,
)
from nondual.self_attention import MultiHeadAttention
from nondual.training import optimiser, train
from nondual.transformer import FeedForward, TransformerLayer

WIDTH, HEADS, LAYERS = 64, 4, 2
CONTEXT, LONGEST, BATCH = 64, 512, 16
CHOOSE_ON, HELD_OUT = "twelfth-night", ("macbeth", "the-tempest")
BIN = 16  # positions of which the loss is averaged

# --- the models ----------------------------------------------------------------------------------------------------


def model_of(added: AddedPositions | None, within: Callable[[], RelativePositions | None], vocabulary: int) -> CausalLM:
    """A causal model whose positions are added to the embeddings, or act within each layer's attention, or are none."""

    def layer(_: int) -> TransformerLayer:
        mixer = MultiHeadAttention(WIDTH, HEADS, causal=True, positions=within())
        return TransformerLayer(mixer, FeedForward(WIDTH, 4 * WIDTH), WIDTH, norm_first=True)

    return CausalLM(vocabulary, WIDTH, LAYERS, layer=layer, positions=added, norm=nn.LayerNorm)


def nothing() -> None:
    """No positions within attention."""


ARMS: dict[str, Callable[[int], CausalLM]] = {
    "none": lambda vocabulary: model_of(None, nothing, vocabulary),
    "learned": lambda vocabulary: model_of(LearnedPositions(CONTEXT, WIDTH), nothing, vocabulary),
    "sinusoidal": lambda vocabulary: model_of(Sinusoidal(WIDTH, scale=0.02 * 2**0.5), nothing, vocabulary),
    "rotary": lambda vocabulary: model_of(None, lambda: Rotary(WIDTH // HEADS), vocabulary),
    "ALiBi": lambda vocabulary: model_of(None, lambda: ALiBi(HEADS), vocabulary),
    "T5": lambda vocabulary: model_of(None, lambda: RelativeBias(HEADS, causal=True), vocabulary),
}


# --- the text ------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """The plays in numbers; windows have one character more than the context, for the last prediction."""

    alphabet: list[str]
    train: Tensor
    choose_on: Tensor
    held_out: Tensor


@cache
def read() -> Text:
    """The plays: one to choose rates on, windows of CONTEXT; two held out, windows of LONGEST; the rest to train on."""
    plays = in_numbers((CHOOSE_ON, *HELD_OUT))
    return Text(
        plays.alphabet,
        plays.train,
        windows(plays.of[CHOOSE_ON], CONTEXT, 512),
        torch.cat([windows(plays.of[name], LONGEST, 64) for name in HELD_OUT]),
    )


def draw(generator: torch.Generator) -> Tensor:
    """Windows of the plays that are trained on, (BATCH, CONTEXT + 1), each beginning anywhere."""
    return drawn(read().train, BATCH, CONTEXT, generator)


@torch.no_grad()
def bits(model: CausalLM, windows: Tensor) -> Tensor:
    """Bits of each character after the first, by its position in the window (N,)."""
    total = torch.zeros(windows.shape[1] - 1, dtype=torch.float64)
    for part in windows.split(BATCH):
        scores = model(part[:, :-1]).transpose(1, 2)
        total += nn.functional.cross_entropy(scores, part[:, 1:], reduction="none").double().sum(0)
    return total / len(windows) / math.log(2)


# --- one run -------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One model, trained once to the end, and where it is kept."""

    arm: str
    rate: float
    seed: int
    steps: int
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / f"{self.arm}_{self.rate}_{self.seed}_{self.steps}.json"

    def result(self) -> dict[str, Any]:
        """What the run ended with."""
        return json.loads(self.file.read_text())

    def model(self, *, trained: bool = True) -> CausalLM:
        """The model as it ended, or as it began."""
        torch.manual_seed(self.seed)
        model = ARMS[self.arm](len(read().alphabet)).eval()
        if trained:
            model.load_state_dict(torch.load(self.file.with_suffix(".pt"), weights_only=True)["model"])
        return model


def carry_out(run: Run) -> None:
    """Train from the beginning or from where it was interrupted; keep the result."""
    if run.file.exists():
        return
    model, log = run.model(trained=False), run.file.with_suffix(".jsonl")
    run.folder.mkdir(parents=True, exist_ok=True)
    train(
        model,
        model.loss,
        draw,
        optimiser=optimiser(model, run.rate),
        steps=run.steps,
        seed=run.seed,
        log_every=250,
        log=log,
        checkpoint=run.file.with_suffix(".pt"),
        checkpoint_every=250,
        arguments={"arm": run.arm, "rate": run.rate},
    )
    model.eval()
    result = {
        "learning_rate": run.rate,
        "seed": run.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "chosen_on_bits": round(bits(model, read().choose_on).mean().item(), 4),
        "held_out_bits": by_bin(model),
        "commit": json.loads(log.read_text(encoding="utf-8").splitlines()[0])["commit"],
    }
    keep(run.file, result)


def by_bin(model: CausalLM) -> list[float]:
    """Bits of the plays held out, in bins of BIN positions; as far as the model's positions reach."""
    longest = CONTEXT if isinstance(model.positions, LearnedPositions) else LONGEST
    each = bits(model, read().held_out[:, : longest + 1])
    return [round(value, 4) for value in each.view(-1, BIN).mean(1).tolist()]
