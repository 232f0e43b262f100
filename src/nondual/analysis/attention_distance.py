"""How far a head looks across an image: the mean distance in pixels, weighted by attention.

Source: Dosovitskiy et al. 2020 (2010.11929), section 4.5, figure 7 (right) and appendix D.7. Symbols: H heads,
N = rows · columns patches, S tokens before them.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nondual.ops.checks import check_tensors
from nondual.ops.dtypes import at_least_float32
from nondual.vision_transformers.patches import Size, pair


def patch_distances(grid: Size, patch_size: Size = 1) -> Float[Tensor, "n n"]:
    """How far apart the centres of any two patches are, (N, N), in float32.

    Args:
        grid: rows and columns of patches, or one number for both.
        patch_size: P in pixels, or (height, width) of a patch; 1 counts in patches.

    Raises:
        ValueError: sizes that are no positive integers.
    """
    (rows, columns), (high, wide) = pair("grid", grid), pair("patch_size", patch_size)
    # --8<-- [start:patch_distances]
    row, column = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    centre = torch.stack([row * high, column * wide], 1).float()
    return (centre[:, None] - centre).norm(dim=-1)
    # --8<-- [end:patch_distances]


def attention_distance(
    weights: Float[Tensor, "*heads n n"], grid: Size, patch_size: Size = 1, *, n_special: int = 1
) -> Float[Tensor, "*heads"]:
    """The mean distance from a patch to the patches that it attends to, for each head; the mean over all patches.

    Tokens that are no patches have no place: their rows are left out, and each row's weights on patches are scaled to
    sum to 1, so that a head that looks at the class token most of the time is not taken for a head that looks near.
    Beside it belongs what even attention gives: `patch_distances(grid, patch_size).mean()`.

    Args:
        weights: (..., S + N, S + N), such as (layers, B, H, S + N, S + N). Where the whole row of a patch is on tokens
            that are no patches, the distance is NaN.
        grid: rows and columns of patches, or one number for both: `model.grid`.
        patch_size: P in pixels, or (height, width) of a patch; 1 counts in patches.
        n_special: S, how many tokens stand before the patches: `model.n_special`.

    Returns:
        (...), such as (layers, B, H), in float32, or float64 where the weights are.

    Raises:
        TypeError: weights are not a tensor.
        ValueError: not floating point (..., S + N, S + N), or sizes that are no positive integers.
    """
    check_tensors({"weights": weights})
    rows, columns = pair("grid", grid)
    n = rows * columns + n_special
    if n_special < 0 or weights.ndim < 2 or tuple(weights.shape[-2:]) != (n, n) or not weights.is_floating_point():
        raise ValueError(
            f"weights must be floating point (..., {n}, {n}) for a grid of {rows} x {columns} patches after "
            f"{n_special} other tokens, got {weights.dtype} {tuple(weights.shape)}"
        )
    # --8<-- [start:attention_distance]
    among = at_least_float32(weights)[..., n_special:, n_special:]  # (..., N, N)
    among = among / among.sum(-1, keepdim=True)
    return (among * patch_distances(grid, patch_size).to(among)).sum(-1).mean(-1)
    # --8<-- [end:attention_distance]
