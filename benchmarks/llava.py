"""One linear layer between a frozen image tower and a frozen language model: does it write the names of new pictures?

The tower's vector of a picture, 128 numbers, becomes one vector of SmolLM2's width and stands in the text as a token.
Only the projector is trained. benchmarks/captions.py has pictures, training and what is asked. The plan:

    linear       one linear layer, as in the first LLaVA
    MLP          two layers with GELU between, as in 1.5, for as many steps
    deaf         as linear, but each caption is trained with the picture of another: what names alone teach
    untrained    the linear layer as it starts

The rate of each of the first two is chosen by the loss on 100 other concepts, by whole trainings with one more seed, of
which the best has worse neighbours on both sides; deaf takes that of linear. Then SEEDS, which fix first weights and
batches alike for all arms.

The first seed's linear layer goes to docs/assets/models/llava.safetensors in float16, for the chapter and its tests.

    nox -s bench -- llava           about an hour of one core
    nox -s bench -- llava --tiny    two steps of each, which writes nothing
"""

from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from benchmarks.captions import (
    Captions,
    Plan,
    Run,
    Task,
    all_written,
    captions,
    compared,
    difference,
    language_model,
    plan,
    shares,
    summed_up,
    tiny,
)
from benchmarks.record import MEASURED, write
from nondual.multimodal.llava import Llava, Projector

STEPS, SEEDS = 150, (1, 2, 3)
ARMS = ("linear", "deaf", "MLP")
FIRST = {"linear": 1e-1, "MLP": 3e-3}
"""The rates that are tried first."""
MARK, BEGIN, D_IMAGE = -200, 1, 128
MODEL = MEASURED.parent / "assets" / "models" / "llava.safetensors"


def made(arm: str) -> Llava:
    """An untrained model of an arm."""
    model, _ = language_model()
    projector = Projector(D_IMAGE, model.embeddings.embedding_dim, layers=2 if arm == "MLP" else 1)
    return Llava(nn.Identity(), model, projector, mark=MARK, d_vision=D_IMAGE)


TASK = Task(made, [BEGIN, MARK], True, lambda model: {}, lambda model, data: {})


def ship(whole: Plan) -> None:
    """Store the linear layer of the first seed."""
    rate = whole.best("linear")
    trained = Run("llava", "linear", rate, SEEDS[0], STEPS, whole.folder, "all").file.with_suffix(".pt")
    weights = torch.load(trained, weights_only=True)
    MODEL.write_bytes(save({name.removeprefix("projector.linear1."): w.half() for name, w in weights.items()}))


def main(options: list[str]) -> None:
    if "--tiny" in options:
        return tiny("llava", TASK, ARMS, FIRST["linear"])
    whole = plan(options, "llava", TASK, STEPS, SEEDS, first=FIRST, of={"deaf": "linear"})
    results = whole.results(ARMS)
    untrained = whole.run("untrained", 0.0, SEEDS[0], steps=0)
    ship(whole)
    record(whole, results, untrained, captions(whole.folder))


def record(whole: Plan, results: dict[str, list[dict[str, Any]]], untrained: dict[str, Any], data: Captions) -> None:
    """Write what was found to docs/measured."""
    test, clip = data.test.tolist(), data.clip.tolist()
    gained = {arm: runs[0]["gained"] for arm, runs in results.items()}
    figures = {
        "arms": {
            **{arm: summed_up(runs, data) for arm, runs in results.items()},
            "untrained": summed_up([untrained], data),
        },
        "sweep": whole.sweeps(),
        "linear - deaf": difference(results["linear"], results["deaf"]),
        "linear - MLP": difference(results["linear"], results["MLP"]),
        "linear - untrained": difference(results["linear"][:1], [untrained]),
        "CLIP's nearest name": shares(data, clip),
        "choices": {
            "concepts": [{"hexcode": data.hexcodes[i], "name": data.names[i], "group": data.groups[i]} for i in test],
            "chosen": {**gained, "CLIP": clip},
            **{f"linear - {other}": compared(data, gained["linear"], gained[other]) for other in ("deaf", "MLP")},
            "linear - CLIP": compared(data, gained["linear"], clip),
        },
        "written": {arm: all_written(whole, arm, data) for arm in ("linear", "deaf")},
    }
    write("llava", "nox -s bench -- llava", figures, **whole.settings(data))
