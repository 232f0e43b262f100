"""One run of the comparison on Shakespeare: the five models, the text, and a training that is kept as it ends."""

import json
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from benchmarks.plays import drawn, in_numbers, windows
from benchmarks.record import keep
from nondual.efficient_attention.mamba import Mamba
from nondual.language_models.causal import CausalLM
from nondual.language_models.gpt import GPT
from nondual.language_models.hybrid import HybridLM
from nondual.language_models.mamba import MambaLM
from nondual.ops.causal_conv1d import causal_conv1d
from nondual.training import optimiser, train

CONTEXT, BATCH, EVERY = 256, 8, 100
CHOOSE_ON, HELD_OUT = "twelfth-night", ("macbeth", "the-tempest")
TRAINING = {  # in words, for what is measured
    "optimiser": "AdamW, betas 0.9 and 0.95, decay 0.1 on matrices, gradients clipped at 1",
    "schedule": "a tenth of the steps up, then along a cosine down to a tenth of the learning rate",
}
PROMPT, SAMPLE, TEMPERATURE = "ROMEO:\n", 240, 0.8


# --- the models ----------------------------------------------------------------------------------------------------


class Convolved(nn.Module):
    """A mixer behind a short convolution: x (B, N, E) -> mixer(SiLU(conv(x))), as Mamba has it before its scan."""

    def __init__(self, mixer: nn.Module, d_model: int, width: int = 4):
        super().__init__()
        self.mixer, self.conv1d = mixer, nn.Conv1d(d_model, d_model, width, groups=d_model)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = causal_conv1d(x, self.conv1d.weight[:, 0], self.conv1d.bias)
        return self.mixer(nn.functional.silu(y))


def transformer(vocabulary: int) -> CausalLM:
    return GPT(vocabulary, 80, 2, 5, max_len=CONTEXT, d_ff=380)


def convolved(vocabulary: int) -> CausalLM:
    model = transformer(vocabulary)
    for layer in model.layers:
        layer.mixer = Convolved(cast(nn.Module, layer.mixer), 80)
    return model


MODELS: dict[str, Callable[[int], CausalLM]] = {
    "mamba": lambda vocabulary: MambaLM(vocabulary, 80, 4),
    "mamba, no convolution": lambda vocabulary: MambaLM(vocabulary, 80, 4, mixer=partial(Mamba, d_conv=1)),
    "transformer": transformer,
    "transformer, convolution": convolved,
    "hybrid": lambda vocabulary: HybridLM(vocabulary, 70, 6, 5),
}


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- the text ------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """The plays in numbers; windows are of one character more than the context, (count, CONTEXT + 1)."""

    alphabet: list[str]
    train: Tensor
    choose_on: Tensor
    held_out: Tensor
    watched: Tensor
    """The first windows of the plays held out, for the curves."""


@cache
def read() -> Text:
    plays = in_numbers((CHOOSE_ON, *HELD_OUT))
    return Text(
        plays.alphabet,
        plays.train,
        windows(plays.of[CHOOSE_ON], CONTEXT, 64),
        torch.cat([windows(plays.of[name], CONTEXT) for name in HELD_OUT]),
        torch.cat([windows(plays.of[name], CONTEXT, 16) for name in HELD_OUT]),
    )


@torch.no_grad()
def bits(model: CausalLM, windows: Tensor) -> float:
    """Bits per character over the windows."""
    parts = windows.split(BATCH)
    return sum(model.loss(part).item() * len(part) for part in parts) / len(windows) / math.log(2)


def sample(model: CausalLM, alphabet: list[str]) -> str:
    """What the model says after the prompt."""
    prompt = torch.tensor([[alphabet.index(c) for c in PROMPT]])
    cached, generator = (
        all(hasattr(layer.mixer, "new_cache") for layer in model.layers),
        torch.Generator().manual_seed(0),
    )
    said = model.generate(prompt, SAMPLE, temperature=TEMPERATURE, generator=generator, cached=cached)
    return "".join(alphabet[i] for i in said[0].tolist())


# --- one run -------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One model, trained once to the end, and where it is kept."""

    model: str
    rate: float
    seed: int
    steps: int
    folder: Path

    @property
    def file(self) -> Path:
        return (
            self.folder / f"{self.model.replace(', ', '-').replace(' ', '-')}_{self.rate}_{self.seed}_{self.steps}.json"
        )

    def result(self) -> dict[str, Any] | None:
        """What the run ended with, or None where it has not ended."""
        return json.loads(self.file.read_text()) if self.file.exists() else None


def draw(generator: torch.Generator) -> Tensor:
    """Windows of the plays that are trained on, (BATCH, CONTEXT + 1), each beginning anywhere."""
    return drawn(read().train, BATCH, CONTEXT, generator)


def trained(
    model: CausalLM,
    rate: float,
    seed: int,
    steps: int,
    *,
    log: Path,
    checkpoint: Path,
    arguments: dict[str, Any],
    name: str | None = None,
) -> list[dict[str, float]]:
    """Train the model to the end, from its checkpoint where there is one, and give what was logged.

    Args:
        model: as it is at the beginning.
        rate: the largest learning rate of the schedule.
        seed: of the windows' order.
        steps: of training.
        log: a file of JSON lines, whose first has the provenance.
        checkpoint: where the training goes on after an interruption.
        arguments: what else the provenance names.
        name: of its progress bar; None for no bar.
    """
    return train(
        model,
        model.loss,
        draw,
        optimiser=optimiser(model, rate),
        steps=steps,
        seed=seed,
        measure=lambda: {"held_out": bits(model, read().watched)},
        log_every=EVERY,
        log=log,
        checkpoint=checkpoint,
        checkpoint_every=EVERY,
        arguments={"rate": rate, "context": CONTEXT, "batch": BATCH, **arguments},
        name=name,
    )


def curve(history: list[dict[str, float]]) -> dict[str, list[float]]:
    """What was logged, in bits per character."""
    return {
        "step": [row["step"] for row in history],
        "train": [round(row["loss"] / math.log(2), 4) for row in history],
        "held_out": [round(row["held_out"], 4) for row in history],
    }


def commit_of(log: Path) -> str:
    """The commit at which a training began."""
    return json.loads(log.read_text(encoding="utf-8").splitlines()[0])["commit"]


def carry_out(run: Run) -> None:
    """Train, on one thread, from the beginning or from where it was interrupted; keep the result."""
    if run.result() is not None:
        return
    torch.set_num_threads(1)
    text = read()
    torch.manual_seed(run.seed)
    model = MODELS[run.model](len(text.alphabet))
    result: dict[str, Any] = {
        "learning_rate": run.rate,
        "seed": run.seed,
        "chosen_on_bits": None,
        "held_out_bits": None,
    }
    checkpoint, log = run.file.with_suffix(".pt"), run.file.with_suffix(".jsonl")
    try:
        arguments = {"model": run.model, "size": size(model)}
        history = trained(model, run.rate, run.seed, run.steps, log=log, checkpoint=checkpoint, arguments=arguments)
    except FloatingPointError as error:
        result["stopped"] = str(error)
    else:
        model.eval()
        result["chosen_on_bits"] = round(bits(model, text.choose_on), 4)
        result["held_out_bits"] = round(bits(model, text.held_out), 4)
        result["curve"] = curve(history)
        result["sample"] = sample(model, text.alphabet)
    result["commit"] = commit_of(log)
    keep(run.file, result)
    checkpoint.unlink(missing_ok=True)
    print(*run[:3], f"held out {result['held_out_bits']}", result.get("stopped", ""), flush=True)
