"""One run of `vit`: pictures, augmentation, a Vision Transformer and a convolutional network of its size, a training.

Pictures:

    fashion   Fashion-MNIST, 28 x 28, in patches of 7 x 7; 5,000 of its 60,000 pictures for training choose the rates
    digits    scikit-learn's 1,797 digits, 8 x 8, in patches of 2 x 2; 200 choose the rates, 400 test

Both have 16 patches. Each can be had with its patches in another order, one and the same order for all pictures; and
with the pixels inside each patch in another order as well, one and the same for all patches of all pictures.

Models, whose parameters agree to 1 % (on digits to 3 %) and whose multiply-adds to a fifth (on digits to a third):

    ViT   `VisionTransformer`: width 48, four heads, three layers, pre-norm, class token, learned positions
    CNN   four convolutions of 3 x 3, three of them with stride 2 (on digits one), each with batch norm and ReLU; the
          mean over all places; a linear read-out

Augmentation: a shift by up to 2 pixels and, for fashion, a flip from left to right in one half of the pictures and a
grey square of 6 x 6 pixels in another; digits are shifted by up to 1 pixel.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import keep
from nondual.data import digits, fashion
from nondual.training import optimiser, train
from nondual.vision_transformers import VisionTransformer, patchify, unpatchify

WIDTH, HEADS, LAYERS = 48, 4, 3
CHANNELS, STRIDES = (18, 36, 58, 66), {28: (2, 2, 2, 1), 8: (1, 1, 2, 1)}  # by the side of a picture
BATCH, DECAY = 64, 0.05
TUNE = {"fashion": 5000, "digits": 200}


class Pictures(NamedTuple):
    """Pictures (N, 1, H, W) of mean 0 and variance 1 over all to train on, and their classes (N,)."""

    x: Tensor
    y: Tensor


class Task(NamedTuple):
    """Pictures to train on, to choose the rate on and to test on, and how they are augmented and shown."""

    train: Pictures
    tune: Pictures
    test: Pictures
    patch: int
    """The side of a patch, in pixels."""
    shift: int
    """By how many pixels augmentation shifts a picture at the most."""
    flip: bool
    """Whether it also mirrors pictures from left to right."""
    hide: bool
    """Whether it also puts out a square."""
    order: Tensor | None = None
    """Of the patches, as the models see them, where it is not that of the picture."""
    pixels: Tensor | None = None
    """The order of the pixels inside each patch, where it is not that of the picture."""

    @property
    def side(self) -> int:
        """Of a picture, in pixels."""
        return self.train.x.shape[-1]

    @property
    def grid(self) -> int:
        """How many patches stand side by side."""
        return self.side // self.patch

    def shown(self, x: Tensor) -> Tensor:
        """Pictures (N, 1, S, S) as the models see them."""
        return x if self.order is None else reorder(x, self.patch, self.order, self.pixels)


@cache
def task_of(name: str) -> Task:
    """The pictures of a task, those to choose the rate on taken from the end of those to train on."""
    if name == "fashion":
        train_on, test_on = ((part.images, part.labels) for part in (fashion("train"), fashion("test")))
    else:
        every = digits()
        order = torch.randperm(len(every.labels), generator=torch.Generator().manual_seed(0))
        images, labels = every.images[order], every.labels[order]
        train_on, test_on = (images[:-400], labels[:-400]), (images[-400:], labels[-400:])
    held = TUNE[name]
    seen = train_on[0][:-held].float()
    mean, std = seen.mean(), seen.std()
    scaled = [Pictures((images.float() - mean) / std, labels) for images, labels in (train_on, test_on)]
    (x, y), test = scaled
    train_part, tune_part = Pictures(x[:-held], y[:-held]), Pictures(x[-held:], y[-held:])
    if name == "fashion":
        return Task(train_part, tune_part, test, patch=7, shift=2, flip=True, hide=True)
    return Task(train_part, tune_part, test, patch=2, shift=1, flip=False, hide=False)


def shuffled(task: Task, *, pixels: bool = False) -> Task:
    """The task with the patches of every picture in one other order; with `pixels`, also the pixels inside each."""
    inside = shuffled_order(task.patch**2) if pixels else None
    return task._replace(order=shuffled_order(task.grid**2), pixels=inside)


def shuffled_order(n: int) -> Tensor:
    """The order of n patches or pixels: place i shows what stood at order[i]."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(7))


def reorder(x: Tensor, patch: int, order: Tensor, pixels: Tensor | None = None) -> Tensor:
    """(N, C, H, W) -> the same shape, cut into patches that are put into another order, and so their pixels."""
    cells = patchify(x, patch)[:, order]
    if pixels is not None:
        cells = cells.unflatten(-1, (x.shape[1], -1))[..., pixels].flatten(-2)
    return unpatchify(cells, patch, (x.shape[2], x.shape[3]))


def augment(x: Tensor, generator: torch.Generator, shift: int, *, flip: bool, hide: bool) -> Tensor:
    """(B, C, S, S) -> pictures shifted; half of them mirrored with `flip`, half with a square put out with `hide`."""
    count, _, side, _ = x.shape
    down, right = torch.randint(2 * shift + 1, (2, count, 1), generator=generator)
    mirrored, hidden = torch.rand(2, count, 1, generator=generator) < 0.5
    corner = torch.randint(side - 5, (2, count, 1), generator=generator)
    at = torch.arange(side)
    rows, columns = down + at, right + at
    if flip:
        columns = torch.where(mirrored, columns.flip(-1), columns)
    around = F.pad(x, (shift,) * 4, value=x.min().item())
    moved = around[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if not hide:
        return moved
    inside = (at >= corner) & (at < corner + 6)  # (2, B, S): in the rows, in the columns
    square = (inside[0][:, :, None] & inside[1][:, None, :] & hidden[..., None])[:, None]
    return moved.masked_fill(square, 0.0)


# --- the models ----------------------------------------------------------------------------------------------------


def vit(side: int, patch: int, *, width: int = WIDTH, layers: int = LAYERS) -> VisionTransformer:
    """The Vision Transformer of this benchmark, for grey pictures of ten classes."""
    return VisionTransformer(
        side, patch, 10, d_model=width, n_heads=HEADS, d_ff=2 * width, n_layers=layers, n_channels=1
    )


class ConvNet(nn.Module):
    """Four convolutions of 3 x 3, each with batch norm and ReLU; the mean over all places; a linear read-out."""

    layers: nn.ModuleList
    out: nn.Linear

    def __init__(self, side: int):
        super().__init__()
        pairs = zip((1, *CHANNELS), CHANNELS, STRIDES[side])
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b, stride in pairs
        )
        self.out = nn.Linear(CHANNELS[-1], 10)

    def states(self, x: Tensor) -> list[Tensor]:
        """What each layer gives, (B, C, H, W) each."""
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) -> scores of the classes (B, 10)."""
        return self.out(self.states(x)[-1].mean((2, 3)))


def model_of(arm: str, task: Task) -> nn.Module:
    """A new model of an arm, its numbers drawn from torch's own generator."""
    return vit(task.side, task.patch) if arm.startswith("ViT") else ConvNet(task.side)


# --- one training --------------------------------------------------------------------------------------------------


def subset(task: Task, count: int, seed: int) -> Tensor:
    """Which pictures are trained on: the first `count` of an order drawn with the seed."""
    return torch.randperm(len(task.train.y), generator=torch.Generator().manual_seed(1000 + seed))[:count]


def batches(task: Task, chosen: Tensor, augmented: bool) -> Callable[[torch.Generator], Pictures]:
    """A function that draws the next batch: all chosen pictures once before any again."""
    waiting: list[Tensor] = []

    def draw(generator: torch.Generator) -> Pictures:
        while sum(map(len, waiting)) < BATCH:
            waiting.append(chosen[torch.randperm(len(chosen), generator=generator)])
        ready = torch.cat(waiting)
        waiting[:] = [ready[BATCH:]]
        x, y = task.train.x[ready[:BATCH]], task.train.y[ready[:BATCH]]
        if augmented:
            x = augment(x, generator, task.shift, flip=task.flip, hide=task.hide)
        return Pictures(task.shown(x), y)

    return draw


def fit(model: nn.Module, task: Task, chosen: Tensor, augmented: bool, rate: float, seed: int, steps: int) -> None:
    """Train in place: AdamW, a tenth of the steps up, then along a cosine down to a tenth of the rate."""
    train(
        model,
        lambda batch: F.cross_entropy(model(batch.x), batch.y),
        batches(task, chosen, augmented),
        optimiser=optimiser(model, rate, decay=DECAY),
        steps=steps,
        seed=seed,
        log_every=steps,
        name=None,
    )
    model.eval()


@torch.no_grad()
def scores(model: nn.Module, task: Task, pictures: Pictures) -> tuple[float, float]:
    """The share of pictures whose class is named, and the loss in nats."""
    found = torch.cat([model(task.shown(part)) for part in pictures.x.split(500)])
    return (found.argmax(-1) == pictures.y).float().mean().item(), F.cross_entropy(found, pictures.y).item()


class Run(NamedTuple):
    """One model, trained once to the end, and where its result is kept."""

    task: str
    """"fashion" or "digits"."""
    arm: str
    """"ViT" or "CNN", with ", shuffled" where the patches stand in another order, or ", shuffled pixels" where those do
    too."""
    pictures: int
    """How many there are to train on."""
    augmented: bool
    rate: float
    seed: int
    steps: int
    folder: Path
    scored: int = 10_000
    """How many pictures of each part are scored, at the most."""

    @property
    def file(self) -> Path:
        arm, how = self.arm.replace(", ", "-").replace(" ", "-"), "augmented" if self.augmented else "plain"
        return self.folder / f"{self.task}_{arm}_{self.pictures}_{how}_{self.rate:g}_{self.seed}_{self.steps}.json"

    def result(self) -> dict[str, Any]:
        """What the run ended with."""
        return json.loads(self.file.read_text())


def carry_out(run: Run) -> dict[str, Any]:
    """Train on one thread and keep the result; a run that has ended is not made again."""
    if run.file.exists():
        return run.result()
    torch.set_num_threads(1)
    task = task_of(run.task)
    if "shuffled" in run.arm:
        task = shuffled(task, pixels=run.arm.endswith("pixels"))
    torch.manual_seed(run.seed)
    model, chosen = model_of(run.arm, task), subset(task, run.pictures, run.seed)
    fit(model, task, chosen, run.augmented, run.rate, run.seed, run.steps)
    seen = Pictures(task.train.x[chosen[:2000]], task.train.y[chosen[:2000]])
    tested, tuned, seen = (Pictures(*(half[: run.scored] for half in part)) for part in (task.test, task.tune, seen))
    accuracy, loss = scores(model, task, tested)
    found = {
        "parameters": sum(x.numel() for x in model.parameters()),
        "test": round(accuracy, 5),
        "test_loss": round(loss, 5),
        "tune": round(scores(model, task, tuned)[0], 5),
        "trained_on": round(scores(model, task, seen)[0], 5),
    }
    keep(run.file, {"rate": run.rate, "seed": run.seed, **found})
    print(*run[:-2], found["test"], flush=True)
    return run.result()
