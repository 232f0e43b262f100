"""One run of `clip`: a small CLIP, its training, and for each test concept whether it was found.

The model is that of nondual.pretrained.emoji_clip; the text tower, MiniLM, is not trained, so that captions come as the
vectors that it gave. For nine tenths of the steps the image tower sees half of the patches of each picture, drawn anew
each time: a step takes half the time, and no picture is ever quite the same (Li et al. 2022, 2212.00794). In the last
tenth, and in every test, it sees them all.
"""

import json
import math
import time
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.clip_data import COMPLETE, HELD_STYLE, Draw, Pairs, clipart_pairs, emoji_pairs, one_a_family
from benchmarks.record import keep
from nondual.multimodal.clip import CLIP, SigLIP
from nondual.multimodal.retrieval import found
from nondual.pretrained.emoji_clip_network import D_IMAGE, D_JOINT, D_TEXT, PictureTower
from nondual.training import optimiser, train, warmup_cosine

BATCH, DECAY, TEXT_DROPOUT = 128, 0.1, 0.1
CHECKPOINT_EVERY = 50
KEPT, WHOLE = 0.5, 0.1
"""The share of the patches that is kept, and of the steps, the last ones, in which all are."""


def model_of(loss: str) -> CLIP:
    """An untrained model: both losses have the same towers, and with one seed the same first weights."""
    kind = {"softmax": CLIP, "sigmoid": SigLIP}[loss]
    return kind(PictureTower(), nn.Identity(), D_JOINT, d_image=D_IMAGE, d_text=D_TEXT)


class Drop:
    """Takes half of the patches from a picture tower's layers, drawn anew for each picture, in training and while on.

    Args:
        tower: whose vision transformer's encoder is given fewer patches from now on.
    """

    def __init__(self, tower: PictureTower):
        self.on = True
        tower.vit.encoder.register_forward_pre_hook(self)

    def __call__(self, encoder: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        """(B, N, E) -> (B, N / 2, E), in the order in which they stood; as it is otherwise."""
        (x,) = given
        if not (encoder.training and self.on):
            return given
        b, n, e = x.shape
        rows = torch.rand(b, n).argsort(1)[:, : int(n * KEPT)].sort(1).values
        return (x.gather(1, rows[..., None].expand(-1, -1, e)),)


# --- what is found -------------------------------------------------------------------------------------------------


@cache
def pairs_of(data: str) -> Pairs:
    """The pictures and captions of a task."""
    return {"emoji": emoji_pairs, "clipart": clipart_pairs}[data]()


@torch.no_grad()
def looked_for(model: CLIP, pictures: Tensor, captions: Tensor) -> dict[str, list[float]]:
    """For each of M pairs, whether its own is among the first 1 or 5 of the M, and one over its place, both ways."""
    logits = model.logits(model.encode_images(pictures), model.encode_texts(captions))
    result: dict[str, list[float]] = {}
    for way, scores in (("picture to name", logits), ("name to picture", logits.T)):
        place = 1 + (scores > scores.diagonal()[:, None]).sum(1)
        result |= {f"{way}, {k}": found(scores, k).tolist() for k in (1, 5)}
        result[f"{way}, reciprocal"] = (1 / place.double()).tolist()
    return result


def judged(model: CLIP, pairs: Pairs) -> dict[str, dict[str, list[float]]]:
    """What is found of concepts and styles that were trained on and of those that were not."""
    model.eval()
    if len(pairs.styles) == 1:
        parts = {"unseen concept": (pairs.test, pairs.styles)}
    else:
        seen = one_a_family(pairs, len(pairs.test))
        parts = {
            "seen style, unseen concept": (pairs.test, COMPLETE),
            "unseen style, seen concept": (seen, (HELD_STYLE,)),
            "unseen style, unseen concept": (pairs.test, (HELD_STYLE,)),
            "seen style, seen concept": (seen, COMPLETE),
        }
    result = {}
    for part, (concepts, styles) in parts.items():
        for style in styles:
            for caption, column in (("name", 0), ("name and tags", 1)):
                name = f"{part}, {style}, {caption}"
                result[name] = looked_for(model, pairs.of(concepts, style), pairs.captions[concepts, column])
    return result


@torch.no_grad()
def tuned_on(model: CLIP, pairs: Pairs) -> float:
    """The mean of one over the place of the right one, both ways, on the concepts to choose on, in known styles."""
    styles = pairs.styles if len(pairs.styles) == 1 else COMPLETE
    each = [looked_for(model, pairs.of(pairs.tune, style), pairs.captions[pairs.tune, 0]) for style in styles]
    return sum(sum(x[f"{way}, reciprocal"]) for x in each for way in ("picture to name", "name to picture")) / (
        2 * len(each) * len(pairs.tune)
    )


# --- one run -------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One model, trained once to the end, and where its result is kept.

    Attributes:
        data: "emoji" or "clipart".
        loss: "softmax" or "sigmoid".
        arm: "all" of the styles that are trained on, "one style", "shuffled" for captions of other concepts, or as
            "scale 50", in which exp(τ) is 50 from the beginning to the end and is not learnt.
        rate, seed, steps: of the training. The seed fixes the first weights, the batches and the patches that are kept.
    """

    data: str
    loss: str
    arm: str
    rate: float
    seed: int
    steps: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.data}_{self.loss}_{self.arm.replace(' ', '-')}_{self.rate}_{self.seed}_{self.steps}"

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def weights(self) -> Path:
        """The checkpoint of the training, which has the weights too."""
        return self.folder / f"{self.name}.pt"

    def result(self) -> dict[str, Any]:
        """What the run ended with."""
        return json.loads(self.file.read_text())

    def model(self) -> CLIP:
        """The model as it was trained, in evaluation mode."""
        model = model_of(self.loss)
        model.load_state_dict(torch.load(self.weights, weights_only=True)["model"])
        return model.eval()


def styles_of(run: Run, pairs: Pairs) -> tuple[str, ...]:
    """The styles that a run is trained on."""
    if run.arm == "one style":
        return COMPLETE[:1]
    return tuple(style for style in pairs.styles if style != HELD_STYLE)


def carry_out(run: Run) -> None:
    """Train on one thread and keep the result; a run that has ended is not made again, one that was stopped goes on."""
    if run.file.exists():
        return
    torch.set_num_threads(1)
    pairs = pairs_of(run.data)
    torch.manual_seed(run.seed)
    model = model_of(run.loss)
    if run.arm.startswith("scale "):
        model.log_scale.data.fill_(math.log(float(run.arm.removeprefix("scale "))))
        model.log_scale.requires_grad_(False)
    adam = optimiser(model, run.rate, decay=DECAY, betas=(0.9, 0.98))
    adam.register_step_post_hook(lambda *_: model.clamp_scale())
    drop, whole_from = Drop(cast(PictureTower, model.image_tower)), round((1 - WHOLE) * run.steps)
    draw = Draw(pairs, styles_of(run, pairs), BATCH, shuffled=run.arm == "shuffled")
    began: list[float] = []  # when each step began, of those that are made here

    def share(step: int, steps: int) -> float:
        drop.on = step < whole_from  # asked at each step, also where a training goes on that was stopped
        return schedule(step, steps)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        pictures, captions = batch
        began.append(time.process_time())
        return model.loss(pictures, F.dropout(captions, TEXT_DROPOUT))

    history = train(
        model, loss_of, draw, optimiser=adam, steps=run.steps, schedule=share, seed=run.seed,
        measure=lambda: {"tune": tuned_on(model, pairs), "scale": model.scale.item()},
        log_every=max(1, run.steps // 8), checkpoint=run.weights, checkpoint_every=CHECKPOINT_EVERY,
        arguments={"run": run.name}, name=run.name,
    )  # fmt: skip
    result = {
        **{name: getattr(run, name) for name in ("data", "loss", "arm", "rate", "seed", "steps")},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tune": round(history[-1]["tune"], 4),
        "curve": {key: [round(row[key], 4) for row in history] for key in ("step", "loss", "tune", "scale")},
        "found": judged(model, pairs),
        "seconds a step": round(median(b - a for a, b in pairwise(began)), 4) if len(began) > 1 else None,
    }
    keep(run.file, result)
    print(run.name, "tune", result["tune"], result["seconds a step"], "s a step", flush=True)


def schedule(step: int, steps: int) -> float:
    """Up along a line in the first tenth, then down to nothing along half a cosine."""
    return warmup_cosine(step, steps, warmup=0.1, last=0.0)
