"""Inside a trained Vision Transformer of a usual size: DINOv2's small one, on six photographs.

The measures are those of benchmarks/vit_inside.py: what the positions are most alike to, how far heads look, how far a
patch moves with its surroundings. The photographs of `nondual.data.photographs` are scaled so that the shorter side has
224 pixels, and the middle is cut out: 16 x 16 patches of 14 x 14. Beside it stands a twin of the same sizes with its
first, random numbers.

    a patch    each of the 30 ordered pairs of photographs, six places each, drawn at random
    left out   2 x 2 patches at a time are put to grey (0 after scaling), at 64 places; what is lost is how far the
               class token's vector turns (1 less the cosine). Over the places of a photograph its rank correlation with
               what rollout and the last layer's attention of the class token give those patches, and with their
               contrast (the deviation of their pixels)

    nox -s bench -- vit_dinov2           some four minutes of one idle core
    nox -s bench -- vit_dinov2 --tiny    one pair and one place, which writes nothing
"""

from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import write
from benchmarks.vit_inside import Moves, mirrored, nearest_is, next_to, of_moves, outside, rank_correlation, rounded
from nondual.analysis import attention_distance, attention_rollout, patch_distances
from nondual.data import photographs
from nondual.pretrained.dinov2 import DINOV2, dinov2, normalised
from nondual.vision_transformers import VisionTransformer

SIDE, PATCH, PLACES, BLOCK = 224, 14, 6, 2
GRID = SIDE // PATCH


def middle(photograph: Tensor, side: int = SIDE) -> Tensor:
    """(3, H, W) uint8 -> (3, side, side): scaled so that the shorter side fits, the longer one cut on both sides."""
    scale = side / min(photograph.shape[1:])
    size = [round(length * scale) for length in photograph.shape[1:]]
    x = F.interpolate(photograph[None].float(), size, mode="bilinear", antialias=True)[0]
    top, left = ((length - side) // 2 for length in size)
    return x[:, top : top + side, left : left + side].round().clamp(0, 255).to(torch.uint8)


def twin(seed: int = 0) -> VisionTransformer:
    """The same network before any training, but for layer scales of 1: each branch counts in full."""
    torch.manual_seed(seed)
    model = VisionTransformer(
        37 * PATCH, PATCH, 0, d_model=384, n_heads=6, d_ff=1536, n_layers=12, layer_scale=1.0, eps=1e-6
    )
    return model.eval()


def of_positions(model: VisionTransformer) -> dict[str, float]:
    """The share of the 37 x 37 places that are most alike to one that touches, and to the mirror image."""
    vectors = model.positions.detach()[1:]
    grid = model.grid[0]
    related = {"touching": next_to(grid), "mirrored": mirrored(grid)}
    return {name: round(nearest_is(vectors, pairs), 4) for name, pairs in related.items()}


@torch.no_grad()
def of_distances(model: VisionTransformer, x: Tensor) -> dict[str, Any]:
    """Of each layer's heads: the mean distance in pixels, and the share outside of the 3 x 3 patches around."""
    _, weights = model.features(x, return_weights=True)
    among = weights[..., 1:, 1:] / weights[..., 1:, 1:].sum(-1, keepdim=True)
    return {
        "pixels": rounded(attention_distance(weights, GRID, PATCH).mean(1)),
        "outside": rounded((among * outside(GRID)).sum(-1).mean((1, 3))),
    }


def pairs(x: Tensor, places: int) -> Moves:
    """Every ordered pair of photographs, each at some random places."""
    chosen = [pair for pair in permutations(range(len(x)), 2) for _ in range(places)]
    a, b = torch.tensor(chosen).T
    row, column = torch.randint(GRID, (2, len(chosen)), generator=torch.Generator().manual_seed(11))
    return Moves(x[a], x[b], row, column, PATCH)


def of_surroundings(model: VisionTransformer, moved: Moves, batch: int = 30) -> dict[str, list[float]]:
    """`of_moves`, over parts of the pairs: the mean of their shares."""
    found: dict[str, list[Tensor]] = {}
    for at in range(0, len(moved.row), batch):
        part = slice(at, at + batch)
        some = Moves(moved.a[part], moved.b[part], moved.row[part], moved.column[part], moved.patch)
        for name, shares in of_moves(model, some).items():
            found.setdefault(name, []).append(torch.tensor(shares))
    return {name: [round(x, 4) for x in torch.stack(shares).mean(0).tolist()] for name, shares in found.items()}


@torch.no_grad()
def of_rollout(model: VisionTransformer, x: Tensor, blocks: int) -> dict[str, list[float]]:
    """For each photograph the rank correlations of what is lost without a block, and the greatest share of a patch."""
    whole, weights = model.features(x, return_weights=True)
    rolled, last = attention_rollout(weights)[:, 0, 1:], weights[-1].mean(1)[:, 0, 1:]
    side, across = BLOCK * PATCH, GRID // BLOCK
    lost = []
    for at in range(blocks):
        row, column = (side * place for place in divmod(at, across))
        without = x.clone()
        without[:, :, row : row + side, column : column + side] = 0
        lost.append(1 - F.cosine_similarity(model.features(without)[:, 0], whole[:, 0], dim=-1))

    def of_blocks(patches: Tensor) -> Tensor:
        return F.avg_pool2d(patches.unflatten(-1, (GRID, GRID)), BLOCK).flatten(1)[:, :blocks]

    cells = x.unflatten(3, (across, side)).unflatten(2, (across, side))
    contrast = cells.std((1, 3, 5)).flatten(1)[:, :blocks]
    compared = {"rollout": of_blocks(rolled), "last_layer": of_blocks(last), "contrast": contrast}
    without_block = torch.stack(lost, 1)
    found = {name: [round(r, 3) for r in rank_correlation(without_block, x).tolist()] for name, x in compared.items()}
    greatest = {"greatest_in_rollout": rolled, "greatest_in_last_layer": last}
    return found | {name: [round(s, 3) for s in (x.amax(1) / x.sum(1)).tolist()] for name, x in greatest.items()}


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    torch.set_num_threads(1)
    names, pictures = zip(*photographs().items())
    pictures = pictures[: 2 if tiny else None]
    x = normalised(torch.stack([middle(picture) for picture in pictures]))
    moved, figures = pairs(x, 1 if tiny else PLACES), {}
    for name, model in (("trained", dinov2()), ("untrained", twin())):
        figures[name] = {
            "positions": of_positions(model),
            "distances": of_distances(model, x),
            "moves": of_surroundings(model, moved),
        }
        if name == "trained":
            figures[name]["left_out"] = of_rollout(model, x, 1 if tiny else (GRID // BLOCK) ** 2)
        print(name, "measured", flush=True)
    figures["even_pixels"] = round(patch_distances(GRID, PATCH).mean().item(), 3)
    if not tiny:
        setup = {
            "weights": f"{DINOV2.name} {DINOV2.version}",
            "photographs": names,
            "side": SIDE,
            "patch": PATCH,
            "pairs": len(moved.row),
            "block": BLOCK,
        }
        write("vit_dinov2", "nox -s bench -- vit_dinov2", figures, setup=setup)
