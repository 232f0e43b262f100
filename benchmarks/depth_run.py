"""One run of `depth`: characters of Shakespeare, a deep and narrow GPT, and six ways to join its layers.

The model has 8 layers of width 48 with 4 heads, and reads 96 characters. The six arms differ in `connection=` alone:

    plain                 the residual stream
    scaled                the stream multiplied by one learned number after each layer: a DenseFormer whose averages
                          have their last layer alone, so that it has such weights and cannot reach back
    denseformer           learned averages after each layer, 2402.02622
    attention residuals   a softmax over depth before each branch, 2603.15031
    value residual        the first layer's values in all later ones, 2410.17897
    hyper-connections     two streams with dynamic maps, 2409.19606
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.plays import drawn, in_numbers, windows
from benchmarks.record import keep
from nondual.connections import LayerCall, stream
from nondual.language_models.gpt import GPT
from nondual.recent.attention_residuals import AttentionResiduals, DepthAttention
from nondual.recent.denseformer import DenseFormer
from nondual.recent.hyper_connections import HyperConnections
from nondual.recent.value_residual import ValueResidual
from nondual.training import optimiser, train

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 8, 48, 4, 96, 8
CHOOSE_ON, HELD_OUT = "twelfth-night", ("macbeth", "the-tempest")


class Scaled(nn.Module):
    """The plain stream, multiplied after each layer by a learned number that starts at 1."""

    scales: nn.Parameter

    def __init__(self, n_layers: int):
        super().__init__()
        self.scales = nn.Parameter(torch.ones(n_layers))

    def forward(self, x: Tensor, layers: Sequence[LayerCall]) -> Tensor:
        """(B, N, E) -> (B, N, E)."""
        for layer, scale in zip(layers, self.scales):
            x = scale * layer(x)
        return x


ARMS: dict[str, Callable[[], Any]] = {
    "plain": lambda: stream,
    "scaled": lambda: Scaled(LAYERS),
    "denseformer": lambda: DenseFormer(LAYERS),
    "attention residuals": lambda: AttentionResiduals(WIDTH, 2 * LAYERS),
    "value residual": lambda: ValueResidual(LAYERS),
    "hyper-connections": lambda: HyperConnections(WIDTH, 2 * LAYERS, 2),
}


def model_of(arm: str, vocabulary: int) -> GPT:
    """A new model. All arms of one seed start with the same weights in their layers."""
    model = GPT(vocabulary, WIDTH, LAYERS, HEADS, max_len=CONTEXT)
    model.connection = ARMS[arm]()  # after the layers, whose random numbers it leaves as they are
    return model


class Text(NamedTuple):
    """The plays in numbers; windows are of one character more than the context."""

    vocabulary: int
    train: Tensor
    choose_on: Tensor
    """(count, CONTEXT + 1), of the play that chooses the rates."""
    held_out: Tensor
    """Of two plays that are neither trained nor chosen on."""


@cache
def read() -> Text:
    """The text, its plays divided."""
    plays = in_numbers((CHOOSE_ON, *HELD_OUT))
    return Text(
        len(plays.alphabet),
        plays.train,
        windows(plays.of[CHOOSE_ON], CONTEXT, 160),
        torch.cat([windows(plays.of[name], CONTEXT, 240) for name in HELD_OUT]),
    )


def draw(generator: torch.Generator) -> Tensor:
    """Windows of the plays that are trained on, (BATCH, CONTEXT + 1), each beginning anywhere."""
    return drawn(read().train, BATCH, CONTEXT, generator)


@torch.no_grad()
def bits(model: GPT, windows: Tensor) -> float:
    """Bits per character over the windows."""
    parts = windows.split(40)
    return sum(model.loss(part).item() * len(part) for part in parts) / len(windows) / math.log(2)


class Run(NamedTuple):
    """One model, trained once to the end, and where its result is kept."""

    arm: str
    rate: float
    seed: int
    steps: int
    folder: Path
    scored: int = 10_000
    """How many windows of each part are scored, at the most."""

    @property
    def file(self) -> Path:
        return self.folder / f"{self.arm.replace(' ', '-')}_{self.rate:g}_{self.seed}_{self.steps}.json"

    def result(self) -> dict[str, Any]:
        """What the run ended with."""
        return json.loads(self.file.read_text())


def carry_out(run: Run) -> dict[str, Any]:
    """Train on one thread and keep the result; a run that has ended is not made again."""
    if run.file.exists():
        return run.result()
    torch.set_num_threads(1)
    text = read()
    torch.manual_seed(run.seed)
    model = model_of(run.arm, text.vocabulary)
    history = train(
        model, model.loss, draw, optimiser=optimiser(model, run.rate), steps=run.steps, seed=run.seed,
        log_every=max(1, run.steps // 8), name=None,
    )  # fmt: skip
    model.eval()
    found = {
        "parameters": sum(x.numel() for x in model.parameters()),
        "tune": round(bits(model, text.choose_on[: run.scored]), 5),
        "held_out": round(bits(model, text.held_out[: run.scored]), 5),
        "trained_on": [round(row["loss"] / math.log(2), 4) for row in history],
        "learned": learned(model, text.held_out[:24]),
    }
    keep(run.file, {"rate": run.rate, "seed": run.seed, **found})
    print(*run[:4], found["held_out"], flush=True)
    return run.result()


@torch.no_grad()
def learned(model: GPT, windows: Tensor) -> Any:
    """What the connection learned: weights of averages; of attention, their mean over tokens and how far they vary."""
    connection = model.connection
    if isinstance(connection, DenseFormer):
        return rounded(connection.matrix())
    if isinstance(connection, Scaled):
        return rounded(connection.scales)
    if isinstance(connection, ValueResidual):
        return {"first": rounded(connection.first), "own": rounded(connection.own)}
    if not isinstance(connection, AttentionResiduals):
        return None
    seen: list[Tensor] = []
    hooks = [
        average.register_forward_hook(lambda module, args, _: seen.append(weights_of(module, args[1])))
        for average in connection.averages
    ]
    try:
        model(windows[:, :-1])
    finally:
        for hook in hooks:
            hook.remove()
    return {
        "mean": [rounded(w.mean((1, 2))) for w in seen],
        "spread": [rounded(w.flatten(1).std(1)) for w in seen],
    }


def weights_of(average: nn.Module, keys: Sequence[Tensor]) -> Tensor:
    """(L, B, N), of one average."""
    assert isinstance(average, DepthAttention)
    return average.weights(keys)


def rounded(x: Tensor) -> Any:
    return [rounded(row) for row in x] if x.ndim > 1 else [round(float(value), 4) for value in x]
