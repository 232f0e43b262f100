"""Gated layers in a frozen language model that look at pictures of emoji: what they learn, and what the gates are for.

The tower's 16 vectors of a picture become R tokens, which gated layers before layers 6, 12, 18 and 24 of SmolLM2 attend
to. Resampler and gated layers are trained. benchmarks/captions.py has pictures, training and what is asked. The plan:

    gated        every gate starts at 0
    ungated      the same without gates: both terms count in full from the first step
    gated deaf   as gated, but each caption is trained with the picture of another: what names alone teach

The rate of gated and of ungated is chosen by the loss on 100 other concepts, by whole trainings with one more seed, of
which the best has worse neighbours on both sides; deaf takes that of gated. Then SEEDS, which fix first weights and
batches alike for all arms.

    nox -s bench -- flamingo           about an hour of one core
    nox -s bench -- flamingo --tiny    two steps of each, which writes nothing
"""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.captions import (
    DECAY,
    FULL_STOP,
    Captions,
    Plan,
    Task,
    all_written,
    captions,
    difference,
    language_model,
    nats,
    plan,
    shares,
    summed_up,
    tiny,
)
from benchmarks.clip_judge import interval
from benchmarks.record import write
from nondual.multimodal.flamingo import Flamingo, PerceiverResampler
from nondual.training import decay_groups

STEPS, SEEDS = 200, (1, 2, 3)
ARMS = ("gated", "gated deaf", "ungated")
FIRST = {"gated": 1e-3, "ungated": 1e-3}
"""The rates that are tried first."""
GATE_RATE = 30
"""How much faster gates learn: one number that has to come from 0 to about 1 in few steps. Chosen by one training."""
BEGIN, MARK, D_IMAGE, LATENTS = 1, 4, 128, 4
INTRODUCTION = (1117, 649, 33777, 282)
"""` An emoji of`: without it the language model does not expect a name, and learns little else in so few steps."""
BEFORE = (6, 12, 18, 24)
"""Layers of the language model, from 0, that a gated layer stands before; no gradient is needed below the first."""


def made(arm: str) -> Flamingo:
    """An untrained model of an arm. Its mark is a token of SmolLM2 that no text has."""
    resampler = PerceiverResampler(D_IMAGE, LATENTS, n_layers=1, n_heads=4, d_head=32)
    with torch.no_grad():
        resampler.latents.mul_(0.02)  # so that what a picture adds to them is not lost in the norm that follows
    return Flamingo(
        nn.Identity(), language_model()[0], resampler, mark=MARK, d_vision=D_IMAGE, before=BEFORE, n_heads=4,
        d_head=64, d_ff=576, gated=arm != "ungated",
    )  # fmt: skip


def adam(model: Flamingo, rate: float) -> torch.optim.AdamW:
    """AdamW, with GATE_RATE times the rate for the gates."""
    groups = decay_groups(model, DECAY)
    named = [pair for group in groups for pair in group["params"] if pair[0].endswith("_gate")]
    rest = [group | {"params": [pair for pair in group["params"] if not pair[0].endswith("_gate")]} for group in groups]
    gates = [{"params": named, "weight_decay": 0.0, "lr": GATE_RATE * rate}] if named else []
    return torch.optim.AdamW([*rest, *gates], lr=rate, betas=(0.9, 0.95))


def opened(model: Flamingo) -> dict[str, float]:
    """tanh of every gate."""
    return {
        f"{what} {before}": float(gate)
        for before, layer in zip(model.before, model.gated_layers)
        for what, gate in zip(("attention", "feed-forward"), layer.openness())  # pyright: ignore[reportCallIssue]
    }


@torch.no_grad()
def swapped(model: Flamingo, data: Captions) -> dict[str, Any]:
    """Two pictures and two captions in a row: how the loss of each caption rises when either picture is another's.

    The test concepts in pairs; a swapped picture is that of the next pair. [mean, low, high] over pairs, in nats a
    caption, and the largest change of any single loss.
    """
    half = len(data.test) // 2
    first, second = data.test[:half].tolist(), data.test[half : 2 * half].tolist()
    rows, labels, until = [], [], []
    for a, b in zip(first, second):
        row, label = [BEGIN], [-100]
        for name in (data.tokens[a], data.tokens[b]):
            row += [MARK, *INTRODUCTION, *name, FULL_STOP]
            label += [-100] * (1 + len(INTRODUCTION)) + [*name, FULL_STOP]
            until.append(len(row) - 1)
        rows.append(row)
        labels.append(label)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [FULL_STOP] * (longest - len(row)) for row in rows])
    label_ids = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])
    is_first = torch.arange(longest - 1) < torch.tensor(until[::2])[:, None]  # (half, N - 1)
    own = [data.patches[data.pictures[0, which], 0] for which in (first, second)]

    def loss(pictures: list[Tensor]) -> Tensor:
        each = nats(model, ids, torch.stack(pictures, 1).flatten(0, 1), label_ids)  # (half, N - 1)
        return torch.stack([(each * is_first).sum(1), (each * ~is_first).sum(1)])

    usual = loss(own)
    found: dict[str, Any] = {}
    for k, name in enumerate(("first", "second")):
        others = [x.roll(1, 0) if i == k else x for i, x in enumerate(own)]
        change = loss(others) - usual
        found[f"{name} picture swapped"] = {
            f"{caption} caption": {"interval": interval(x), "largest": float(x.abs().max())}
            for caption, x in zip(("first", "second"), change)
        }
    return found


TASK = Task(
    made, [BEGIN, MARK, *INTRODUCTION], False, opened, lambda model, data: {"swapped": swapped(model, data)}, adam
)


def main(options: list[str]) -> None:
    if "--tiny" in options:
        return tiny("flamingo", TASK, ARMS, FIRST["gated"])
    whole = plan(options, "flamingo", TASK, STEPS, SEEDS, first=FIRST, of={"gated deaf": "gated"})
    record(whole, whole.results(ARMS), captions(whole.folder))


def record(whole: Plan, results: dict[str, list[dict[str, Any]]], data: Captions) -> None:
    """Write what was found to docs/measured."""
    figures = {
        "arms": {arm: summed_up(runs, data) for arm, runs in results.items()},
        "sweep": whole.sweeps(),
        "gated - deaf": difference(results["gated"], results["gated deaf"]),
        "gated - ungated": difference(results["gated"], results["ungated"]),
        "written": {arm: all_written(whole, arm, data) for arm in ("gated", "ungated")},
        "swapped": {arm: runs[0]["swapped"] for arm, runs in results.items()},
        "CLIP's nearest name": shares(data, data.clip.tolist()),
    }
    more = {"before": list(BEFORE), "latents": LATENTS, "gate_rate": GATE_RATE}
    write("flamingo", "nox -s bench -- flamingo", figures, **more, **whole.settings(data))
