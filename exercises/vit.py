"""Exercises of the chapter on the Vision Transformer. Write what each function asks for, then: nox -s exercises"""

from torch import Tensor


def cut(images: Tensor, p: int) -> Tensor:
    """Images cut into patches of p x p pixels, each patch a row of numbers; by reshaping, without a loop.

    Patches come row by row of the image, as one reads; the numbers of a patch in the order channel, row, column.

    Args:
        images: (B, C, H, W); p divides H and W.
        p: the side of a patch.

    Returns:
        (B, H W / p², C p²).
    """
    raise NotImplementedError("give rows and columns of patches axes of their own, move them forward, and flatten")


def mean_distance(weights: Tensor, columns: int, p: int) -> Tensor:
    """How many pixels away each head looks: the distance from a patch to what it attends to, weighted by attention.

    The distance of two patches is that of their centres, straight across. The mean is over all patches.

    Args:
        weights: (H, N, N), of H heads; row i says how much patch i attends to each patch. Rows sum to 1.
        columns: how many patches there are in a row of the image; N is a multiple of it.
        p: the side of a patch in pixels.

    Returns:
        (H,).
    """
    raise NotImplementedError("patch i is in row i // columns and column i % columns; weigh all distances, take means")
