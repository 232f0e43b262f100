"""What a small Vision Transformer learns of place and of surroundings, beside one that sees patches in another order.

All are trained on the 55,000 augmented pictures of fashion of benchmarks/vit_run.py, 1,500 steps of 64 pictures, with
three seeds:

    ViT                 patches of 4 x 4, so 49 of them in a grid of 7 x 7; otherwise the one of vit_run.py
    ViT, shuffled       the same, with the patches of all pictures in one other order, and the same first numbers
    ViT, not mirrored   the first, but for one thing: its pictures are never mirrored
    CNN                 that of vit_run.py, for what a convolution makes of a moved patch

and measured before and after:

    positions  the share of patches whose position vector is most alike (cosine, the mean of all positions taken off) to
               that of a patch which stands next to it: above, below, left or right. For the shuffled twin, next to it
               in its own grid, and next to it in the picture before it was shuffled. Beside it the share of those most
               alike to that of the mirrored place. (Added when a first model was seen to find both; and so was the arm
               that is not mirrored.)
    distances  how far each head looks in pixels, and how much of its attention leaves the 3 x 3 patches around.
    a patch    set into another picture: by how much its vector then differs, as a share of how far the vectors of the
               two pictures lie apart at that place (squared distances); and the same where the patch is exchanged and
               the surroundings stay. The other picture is of the same class or of another.
    rollout    whether the patches to which the class token's rollout gives most weight are those without which the
               right class loses most: the rank correlation over patches, picture by picture, and beside it that of the
               patch's brightness.

Nothing is chosen here: the rate of each model is one that did well in vit.py's sweep, with patches of 7 x 7.

The first seed's ViT goes to docs/assets/models/vit.safetensors in float16, which the chapter's figures read.

    nox -s bench -- vit_inside           some ten minutes of one idle core
    nox -s bench -- vit_inside --tiny    a few steps, which writes nothing

Weights are kept as a training ends, in `runs/vit_inside` of the cache folder or in --runs=FOLDER.
"""

import tempfile
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.heads_trained import difference
from benchmarks.record import MEASURED, write
from benchmarks.vit_run import TUNE, ConvNet, Pictures, Task, fit, scores, shuffled_order, subset, task_of, vit
from nondual.analysis import attention_distance, attention_rollout, patch_distances, weights_of
from nondual.data import fashion
from nondual.store import cache_folder
from nondual.transformer import Encoder
from nondual.vision_transformers import VisionTransformer

PATCH, STEPS, SEEDS = 4, 1500, (1, 2, 3)
RATE = {"ViT": 2e-3, "CNN": 8e-3}
ARMS = ("ViT", "ViT, shuffled", "ViT, not mirrored", "CNN")
MODEL = MEASURED.parent / "assets" / "models" / "vit.safetensors"


class Trained(NamedTuple):
    """A model before and after its training, and the pictures as it sees them."""

    before: nn.Module
    after: nn.Module
    task: Task


def new(arm: str, task: Task, seed: int) -> nn.Module:
    """A model with its first numbers."""
    torch.manual_seed(seed)
    return vit(task.side, PATCH) if arm.startswith("ViT") else ConvNet(task.side)


def trained(arm: str, seed: int, steps: int, folder: Path) -> Trained:
    """The model of an arm and a seed, trained unless its weights are in the folder."""
    torch.set_num_threads(1)
    task = task_of("fashion")._replace(patch=PATCH)
    if arm.endswith("shuffled"):
        task = task._replace(order=shuffled_order(task.grid**2))
    if arm.endswith("not mirrored"):
        task = task._replace(flip=False)
    before, after = new(arm, task, seed).eval(), new(arm, task, seed)
    file = folder / f"{arm.replace(', ', '-').replace(' ', '-')}_{seed}_{steps}.safetensors"
    if not file.exists():
        fit(after, task, subset(task, len(task.train.y), seed), True, RATE[arm[:3]], seed, steps)
        part = file.with_suffix(".part")
        save_file(after.state_dict(), part)
        part.replace(file)
        print(arm, seed, "trained", flush=True)
    after.load_state_dict(load_file(file))
    return Trained(before, after.eval(), task)


# --- positions -----------------------------------------------------------------------------------------------------


def next_to(grid: int) -> Tensor:
    """(N, N), True where two places of a square grid touch above, below, left or right."""
    return patch_distances(grid) == 1


def alike(vectors: Tensor) -> Tensor:
    """(N, E) -> cosines (N, N) of the vectors less their mean, each with itself left out (-inf)."""
    unit = F.normalize(vectors - vectors.mean(0), dim=-1)
    return (unit @ unit.T).fill_diagonal_(-torch.inf)


def mirrored(grid: int) -> Tensor:
    """(N, N), True where one place is the other's image if left and right change places."""
    at = torch.arange(grid**2).view(grid, grid)
    return torch.eye(grid**2, dtype=torch.bool)[at.flip(1).flatten()]


def nearest_is(vectors: Tensor, related: Tensor) -> float:
    """The share of places whose most alike vector is that of a place related to them."""
    best = alike(vectors).argmax(-1)
    return related.gather(1, best[:, None]).float().mean().item()


def ranks(x: Tensor) -> Tensor:
    """The ranks along the last axis, ties in the middle of the ranks they share, less their mean."""
    below = (x[..., None, :] < x[..., :, None]).sum(-1)
    up_to = (x[..., None, :] <= x[..., :, None]).sum(-1)
    middle = (below + up_to - 1) / 2
    return middle - middle.mean(-1, keepdim=True)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's, along the last axis; 0 where one of the two is constant."""
    return F.cosine_similarity(ranks(a), ranks(b), dim=-1)


def of_positions(run: Trained) -> dict[str, Any]:
    """What the position vectors know of the grid, before and after."""
    touching, image, found = next_to(run.task.grid), mirrored(run.task.grid), {}
    for when, model in (("before", run.before), ("after", run.after)):
        vectors = positions_of(model)
        found[when] = {"in_its_grid": round(nearest_is(vectors, touching), 4)}
        if run.task.order is None:
            order = torch.arange(len(vectors))
        else:
            order = run.task.order  # place i shows the patch that stood at order[i]
        theirs, image_of_theirs = (of[order][:, order] for of in (touching, image))
        found[when]["in_the_picture"] = round(nearest_is(vectors, theirs), 4)
        found[when]["mirrored"] = round(nearest_is(vectors, image_of_theirs), 4)
    return found


def positions_of(model: nn.Module) -> Tensor:
    """The position vectors of the patches, (N, E), without that of the class token."""
    assert isinstance(model, VisionTransformer)
    return model.positions.detach()[-model.n_patches :]


# --- distances -----------------------------------------------------------------------------------------------------


def of_distances(model: nn.Module, task: Task, count: int) -> dict[str, Any]:
    """Of each layer's heads: mean distance in pixels, share outside of the 3 x 3 patches around, share on the class."""
    weights = weights_of(model, task.shown(task.test.x[:count]))  # (layers, B, H, 1 + N, 1 + N)
    patches = weights[..., 1:, 1:] / weights[..., 1:, 1:].sum(-1, keepdim=True)
    return {
        "pixels": rounded(attention_distance(weights, task.grid, task.patch).mean(1)),
        "outside": rounded((patches * outside(task.grid)).sum(-1).mean((1, 3))),
        "least_weight": [f"{x:.1e}" for x in patches.amin((1, 2, 3, 4)).tolist()],
    }


def outside(grid: int) -> Tensor:
    """(N, N): 1 where a place is not among the 3 x 3 around another, else 0."""
    return (patch_distances(grid) >= 2).float()


def rounded(x: Tensor) -> list[Any]:
    return [[round(value, 4) for value in row] for row in x.tolist()]


# --- a patch in other surroundings ---------------------------------------------------------------------------------


class Moves(NamedTuple):
    """Pictures a and b (B, 1, S, S), and the row and column (B,) of a patch in the grid; neither patch is empty."""

    a: Tensor
    b: Tensor
    row: Tensor
    column: Tensor
    patch: int

    def patched(self, into: Tensor, of: Tensor) -> Tensor:
        """The pictures `into`, with the patch of `of` in its place."""
        inside = torch.zeros(len(into), 1, into.shape[-1], into.shape[-1], dtype=torch.bool)
        for i, (row, column) in enumerate(zip(self.row.tolist(), self.column.tolist())):
            top, left = row * self.patch, column * self.patch
            inside[i, :, top : top + self.patch, left : left + self.patch] = True
        return torch.where(inside, of, into)


def moves(task: Task, same: bool, count: int) -> Moves:
    """Pairs of test pictures of the same class or of two, each with a patch that is not empty in either."""
    draw = torch.Generator().manual_seed(11)
    first = torch.randperm(len(task.test.y), generator=draw)
    other = torch.randperm(len(task.test.y), generator=draw)
    chosen = []
    cells = task.test.x.unflatten(3, (task.grid, task.patch)).unflatten(2, (task.grid, task.patch))
    varied = cells.std((3, 5))[:, 0] > 0.2  # (pictures, rows, columns)
    for i, j in zip(first.tolist(), other.tolist()):
        both = (varied[i] & varied[j]).nonzero()
        if i != j and (task.test.y[i] == task.test.y[j]) == same and len(both):
            at = both[int(torch.randint(len(both), (), generator=draw))]
            chosen.append((i, j, *at.tolist()))
        if len(chosen) == count:
            break
    i, j, row, column = torch.tensor(chosen).T
    return Moves(task.test.x[i], task.test.x[j], row, column, task.patch)


@torch.no_grad()
def states_of(model: nn.Module, x: Tensor, moved: Moves) -> list[Tensor]:
    """The vectors at the patches' places, (B, E) each: before the first layer (not of a ConvNet) and after each."""
    if isinstance(model, ConvNet):
        found = []
        for state in model.states(x):
            stride = x.shape[-1] / state.shape[-1]
            centre = [((at * moved.patch + (moved.patch - 1) / 2) / stride).round().long() for at in moved[2:4]]
            row, column = (at.clamp(max=state.shape[-1] - 1) for at in centre)
            found.append(state[torch.arange(len(x)), :, row, column])
        return found
    encoder = next(part for part in model.modules() if isinstance(part, Encoder))
    found, hooks = [], []
    hooks.append(encoder.layers[0].register_forward_pre_hook(lambda _, args: found.append(args[0])))
    hooks += [layer.register_forward_hook(lambda _, args, out: found.append(out)) for layer in encoder.layers]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    place = 1 + moved.row * (x.shape[-1] // moved.patch) + moved.column  # the class token stands first
    return [state[torch.arange(len(x)), place] for state in found]


def of_moves(model: nn.Module, moved: Moves) -> dict[str, list[float]]:
    """How far a patch's vector moves with its surroundings, and with the patch, as shares of the pictures' distance."""
    a, b = states_of(model, moved.a, moved), states_of(model, moved.b, moved)
    set_into_b = states_of(model, moved.patched(moved.b, moved.a), moved)
    exchanged = states_of(model, moved.patched(moved.a, moved.b), moved)

    def share(other: list[Tensor]) -> list[float]:
        return [
            round((((x - y) ** 2).sum() / ((x - z) ** 2).sum()).item(), 4) for x, y, z in zip(a, other, b, strict=True)
        ]

    return {"surroundings": share(set_into_b), "patch": share(exchanged)}


# --- rollout -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def of_rollout(model: nn.Module, task: Task, count: int) -> dict[str, list[float]]:
    """The rank correlation over patches of what is lost without a patch, with its rollout and with its brightness."""
    x, y = (half[:count] for half in task.test)
    weights = weights_of(model, x)
    rolled = attention_rollout(weights)[:, 0, 1:]
    n = task.grid**2
    whole = F.log_softmax(model(x), -1).gather(1, y[:, None])
    lost = []
    for place in range(n):
        without = x.clone()
        top, left = (task.patch * at for at in divmod(place, task.grid))
        without[:, :, top : top + task.patch, left : left + task.patch] = x.min()
        lost.append(whole - F.log_softmax(model(without), -1).gather(1, y[:, None]))
    lost_without = torch.cat(lost, 1)
    bright = F.avg_pool2d(x, task.patch).flatten(1)
    last = weights[-1].mean(1)[:, 0, 1:]
    compared = {"rollout": rolled, "last_layer": last, "brightness": bright}
    return {name: rank_correlation(lost_without, values).tolist() for name, values in compared.items()}


# --- all of it -----------------------------------------------------------------------------------------------------


def measured(arm: str, seed: int, steps: int, folder: Path, count: int) -> dict[str, Any]:
    """What a trained model and its first numbers are found to do."""
    run = trained(arm, seed, steps, folder)
    part = Pictures(*(half[: 20 * count] for half in run.task.test))
    found: dict[str, Any] = {"seed": seed, "test": round(scores(run.after, run.task, part)[0], 4)}
    if arm.startswith("ViT"):
        found["positions"] = of_positions(run)
    if arm == "ViT":
        both = {"before": run.before, "after": run.after}
        found["distances"] = {when: of_distances(model, run.task, count) for when, model in both.items()}
        rolled = of_rollout(run.after, run.task, count)
        found["rollout"] = {name: round(mean(each), 4) for name, each in rolled.items()}
    if arm in ("ViT", "CNN"):
        found["moves"] = {
            when: {
                kind: of_moves(model, moves(run.task, kind == "same class", count))
                for kind in ("same class", "other class")
            }
            for when, model in (("before", run.before), ("after", run.after))
        }
    return found


def store(model: nn.Module, file: Path) -> None:
    """Write the model's weights in float16."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.half() for name, x in model.state_dict().items()}, file)
    file.chmod(0o644)


def load(file: Path) -> VisionTransformer:
    """The model that `store` wrote, in float32."""
    model = vit(28, PATCH)
    model.load_state_dict({name: x.float() for name, x in load_file(file).items()})
    return model.eval()


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    if tiny:
        with tempfile.TemporaryDirectory() as beside:
            for arm in ARMS:
                measured(arm, 1, 2, Path(beside), 10)
        return
    folder = folder or cache_folder() / "runs" / "vit_inside"
    folder.mkdir(parents=True, exist_ok=True)
    arms = {}
    for arm in ARMS:
        arms[arm] = [measured(arm, seed, STEPS, folder, 500) for seed in SEEDS]
        print(arm, "measured", flush=True)
    record(arms, folder)


def record(arms: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Store the first seed's model, and write what was found to docs/measured."""
    run = trained("ViT", SEEDS[0], STEPS, folder)
    store(run.after, MODEL)
    stored = load(MODEL)
    touched = next_to(run.task.grid).float()
    plain, twin, unmirrored = (arms[arm] for arm in ARMS[:3])
    figures = {
        "arms": arms,
        "chance": {
            "neighbour": round((touched.sum() / (run.task.grid**2 * (run.task.grid**2 - 1))).item(), 4),
            "mirrored": round((run.task.grid - 1) / run.task.grid / (run.task.grid**2 - 1), 4),
            "pixels": round(patch_distances(run.task.grid, PATCH).mean().item(), 3),
            "outside": round(outside(run.task.grid).mean().item(), 4),
        },
        "positions": {
            "after - before": difference(*(of_arm(plain, when, "in_its_grid") for when in ("after", "before"))),
            "shuffled: picture - its grid": difference(
                *(of_arm(twin, "after", where) for where in ("in_the_picture", "in_its_grid"))
            ),
            "mirrored: mirrored in training - not": difference(
                *(of_arm(runs, "after", "mirrored") for runs in (plain, unmirrored))
            ),
        },
        "stored": {
            "file": MODEL.name,
            "bytes": MODEL.stat().st_size,
            "parameters": sum(x.numel() for x in stored.parameters()),
            "seed": SEEDS[0],
            "test": round(scores(run.after, run.task, run.task.test)[0], 4),
            "test_as_stored": round(scores(stored, run.task, run.task.test)[0], 4),
        },
    }
    setup = {
        "patch": PATCH,
        "steps": STEPS,
        "rates": RATE,
        "augmented": True,
        "pictures": len(run.task.train.y),
        "measured_on": "500 test pictures for distances and rollout, 500 pairs for the patch; 10,000 for accuracy",
        "model": "tells the 10 classes of Fashion-MNIST (MIT licence, Zalando SE) apart, in grey pictures of 28 x 28 "
        "less the mean and over the deviation; for the figures of the chapter, no other use is intended",
        "mean_and_deviation": [round(x, 4) for x in scale()],
    }
    write("vit_inside", "nox -s bench -- vit_inside", figures, setup=setup)


def of_arm(runs: list[dict[str, Any]], when: str, where: str) -> list[float]:
    """The share of neighbours found, seed by seed."""
    return [run["positions"][when][where] for run in runs]


def scale() -> tuple[float, float]:
    """Of the pictures to train on, as bytes: what is subtracted, and what is divided by."""
    seen = fashion("train").images[: -TUNE["fashion"]].float()
    return seen.mean().item(), seen.std().item()
