"""One run of `tantra`: a small model from which one part of the transformer is missing, one task, trained once.

Two questions, with arms of their own. *roles*: what do query, key and value each do? Arms differ in the mixer: one
projection for queries and keys, no values of their own, or no keys (Synthesizer, Tay et al. 2020, 2005.00743). *norms*:
what do the norms do? Arms differ in where they stand, or have none, at several depths. Tasks, the model, training and
outcomes are those of docs/measured/protocol.md, as benchmarks/proposals_run.py has them.
"""

import math
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.proposals_run import CHECKS, HEAD, HEADS, LAYERS, TASKS, WIDE, WIDTH, Arm, Reader, Task, judged, loss_of
from benchmarks.recall_run import size
from benchmarks.record import kept, run_file
from benchmarks.steps import steps_of_training
from nondual.ops import masks
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import FeedForward, TransformerLayer

# --- roles ---------------------------------------------------------------------------------------------------------


class Synthesizer(nn.Module):
    """Heads that mix values by scores which no key has a part in (2005.00743, sections 3.1 and 3.2).

        dense       scores of position i = ReLU(x_i W1) W2: from the token that asks, one for each place
        random      scores of position i = row i of a learned table: from nothing but the places

    Where we differ: causal; and the table is multiplied by the square root of E, because Adam moves a number by its
    rate at most in a step, and a score that is a product of projections moves faster.

    Args:
        length: the longest input.
        dense: from the token that asks, or from a table alone.
    """

    def __init__(self, length: int, dense: bool):
        super().__init__()
        self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.hidden = nn.Linear(WIDTH, WIDTH, bias=False) if dense else None
        self.places = nn.Parameter(torch.randn(HEADS, HEAD if dense else length, length) * WIDTH**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, E) -> (B, N, E)."""
        n = x.shape[1]
        if self.hidden is None:
            scores = self.places[:, :n, :n] * WIDTH**0.5  # (H, N, N)
        else:
            scores = heads_of(self.hidden(x).relu()) @ self.places[..., :n]  # (B, H, N, N)
        weights = scores.masked_fill(~masks.causal(n, device=x.device), -math.inf).softmax(-1)
        return self.out_proj((weights @ heads_of(self.v_proj(x))).transpose(1, 2).flatten(2))


def heads_of(x: Tensor) -> Tensor:
    """(B, N, H · D) -> (B, H, N, D)."""
    return x.unflatten(-1, (HEADS, HEAD)).transpose(1, 2)


def one_projection(_: int, causal: bool) -> nn.Module:
    """Queries are keys."""
    mixer = MultiHeadAttention(WIDTH, HEADS, bias=False, causal=causal)
    mixer.k_proj = mixer.q_proj
    return mixer


def no_values(_: int, causal: bool) -> nn.Module:
    """What is averaged is the input itself, cut into heads."""
    mixer = MultiHeadAttention(WIDTH, HEADS, bias=False, causal=causal)
    mixer.v_proj = nn.Identity()  # type: ignore[assignment]
    return mixer


ROLES: dict[str, Callable[[int], Arm]] = {
    "query, key, value": lambda _: Arm(),
    "query is key": lambda _: Arm(mixer=one_projection),
    "value is input": lambda _: Arm(mixer=no_values),
    "no key, dense": lambda length: Arm(mixer=lambda _, __: Synthesizer(length, True)),
    "no key, no query": lambda length: Arm(mixer=lambda _, __: Synthesizer(length, False)),
}
"""By the longest input; all of the size of the first, by the width of the feed-forward part."""


@cache
def length_of(task: str) -> int:
    return TASKS[task]().draw(1, torch.Generator().manual_seed(0))[0][0].shape[1]


def with_roles(task: str, arm: str, seed: int) -> nn.Module:
    """A new model; what it shares with the first arm by name and shape begins as that of this seed does."""
    of, made, wide = TASKS[task](), ROLES[arm](length_of(task)), WIDE
    if made.mixer is not None:
        wide += round((size(Reader(of, Arm())) - size(Reader(of, made))) / (LAYERS * (2 * WIDTH + 1)))
    torch.manual_seed(seed)
    model = Reader(of, made, wide)
    if made.mixer is not None:
        alike(model, with_roles(task, "query, key, value", seed))
    return model


def alike(model: nn.Module, control: nn.Module) -> None:
    start = dict(control.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start and start[name].shape == parameter.shape:
                parameter.copy_(start[name])


# --- norms ---------------------------------------------------------------------------------------------------------


def no_norm(d_model: int, *, eps: float = 0.0) -> nn.Module:
    """Called as nn.LayerNorm is."""
    return nn.Identity()


NORMS: dict[str, dict[str, Any]] = {
    "as printed": {"norm": no_norm},
    "norm after": {"norm": nn.LayerNorm, "norm_first": False},
    "norm before": {"norm": nn.LayerNorm, "norm_first": True},
}
SMALL = ", small inputs"
"""An arm with this at its end starts with inputs as small as those of the protocol."""
DEEP = {2: (*NORMS, *(f"{arm}{SMALL}" for arm in ("as printed", "norm before"))), 8: tuple(NORMS)}
"""The arms of each depth."""


class Deep(Reader):
    """A reader of any depth whose layers have their norms where the arm says; the last norm stays.

    Its inputs begin with a variance of 1, which is what a norm makes of them; in the protocol, where every layer
    begins with a norm, they begin with 1/E for each vector that is added up.
    """

    def __init__(self, task: Task, layers: int, small: bool, **norms: Any):
        super().__init__(task, Arm())
        make = partial(MultiHeadAttention, WIDTH, HEADS, bias=False, causal=True)
        self.layers = nn.ModuleList(
            TransformerLayer(make(), FeedForward(WIDTH, WIDE), WIDTH, **norms) for _ in range(layers)
        )
        added = [*self.inputs, self.places]
        with torch.no_grad():
            for one in added:
                one.weight.mul_(1 if small else (WIDTH / len(added)) ** 0.5)  # type: ignore[union-attr, operator]


def with_norms(task: str, arm: str, layers: int, seed: int) -> nn.Module:
    """A new model; a seed gives all arms of a depth the same numbers (norms begin at 1 and 0)."""
    torch.manual_seed(seed)
    return Deep(TASKS[task](), layers, arm.endswith(SMALL), **NORMS[arm.removesuffix(SMALL)])


# --- one run -------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One model, trained once, and where its result is kept. Without layers it is one of the roles."""

    task: str
    arm: str
    layers: int | None
    rate: float
    seed: int
    steps: int | None
    folder: Path

    @property
    def file(self) -> Path:
        return run_file(self.folder, self.task, self.arm, self.layers, self.rate, self.seed, self.steps or "all")


def carry_out(run: Run) -> dict[str, Any]:
    """Train from the beginning, unless that was done before; keep what it ended with."""
    return kept(run.file, trained, run)


def trained(run: Run) -> dict[str, Any]:
    """The share of right answers after parts of the training, and their mean; chance once a loss is not finite."""
    task, began = TASKS[run.task](), time.process_time()
    if run.layers is None:
        model = with_roles(run.task, run.arm, run.seed)
    else:
        model = with_norms(run.task, run.arm, run.layers, run.seed)
    steps = task.steps if run.steps is None else run.steps
    checks = [max(steps // part, 1) for part in CHECKS]
    curve: list[float] = []
    loss = math.nan

    def drawn_loss(generator: torch.Generator) -> Tensor:
        return loss_of(model, *task.draw(task.batch, generator))

    for i, loss in enumerate(steps_of_training(model, drawn_loss, run.rate, steps, run.seed), 1):
        if math.isfinite(loss) and i in checks:
            curve += [judged(model, task)] * checks.count(i)
    curve += [task.chance] * (len(CHECKS) - len(curve))
    return {
        "rate": run.rate,
        "seed": run.seed,
        "outcome": round(mean(curve), 5),
        "curve": [round(each, 5) for each in curve],
        "finite": math.isfinite(loss),
        "parameters": size(model),
        "seconds": round(time.process_time() - began, 1),
    }
