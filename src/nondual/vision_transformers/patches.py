"""An image as a sequence: N = H W / P² patches of P x P pixels, read row by row, each a vector.

Source: Dosovitskiy et al. 2020 (2010.11929), section 3.1 and, for positions at another resolution, section 3.2.
Symbols: images (B, C, H, W), P the side of a patch, N patches, E width.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nondual.ops.checks import check_tensors
from nondual.ops.dtypes import at_least_float32
from nondual.positional_encoding import Sinusoidal
from nondual.token_ids import has_values

Size = int | tuple[int, int]


def pair(name: str, size: Size) -> tuple[int, int]:
    """(height, width) of a size that may be given as one number.

    Raises:
        ValueError: a size that is no positive integer, or two.
    """
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 and side is not True for side in sides):
        raise ValueError(f"{name} must be a positive integer, or (height, width), got {size!r}")
    return sides


def patchify(images: Float[Tensor, "b c h w"], patch_size: Size) -> Float[Tensor, "b n d"]:
    """The pixels of each patch in a row: (B, C, H, W) -> (B, N, C P²), in the order channel, row, column.

    A product with a matrix (C P², E) is then the strided convolution whose weight is that matrix.

    Args:
        images: (B, C, H, W), any dtype.
        patch_size: P, or (height, width) of a patch.

    Raises:
        TypeError: images are not a tensor.
        ValueError: not (B, C, H, W), or sides that the patch does not divide.
    """
    high, wide = pair("patch_size", patch_size)
    check_whole(images, (high, wide))
    b, c, h, w = images.shape
    # --8<-- [start:patchify]
    x = images.reshape(b, c, h // high, high, w // wide, wide)
    x = x.permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, P, P)
    return x.reshape(b, (h // high) * (w // wide), c * high * wide)
    # --8<-- [end:patchify]


def unpatchify(x: Float[Tensor, "b n d"], patch_size: Size, image_size: Size) -> Float[Tensor, "b c h w"]:
    """What `patchify` took apart: (B, N, C P²) -> (B, C, H, W).

    Args:
        x: the patches, row by row.
        patch_size: P, or (height, width) of a patch.
        image_size: H = W, or (H, W).

    Raises:
        TypeError: x is not a tensor.
        ValueError: a shape that is not of whole patches of such an image.
    """
    (high, wide), (h, w) = pair("patch_size", patch_size), pair("image_size", image_size)
    check_tensors({"x": x})
    rows, columns = h // high, w // wide
    if x.ndim != 3 or h % high or w % wide or x.shape[1] != rows * columns or x.shape[2] % (high * wide):
        raise ValueError(
            f"x must be (B, N, C P²) with N = {rows} · {columns} patches of {high} x {wide} pixels in an image of "
            f"{h} x {w}, got {tuple(x.shape)}"
        )
    x = x.reshape(x.shape[0], rows, columns, -1, high, wide).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(x.shape[0], x.shape[1], h, w)


def check_images(images: Tensor, n_channels: int) -> None:
    """Refuse what is no batch of images that a model can read.

    Raises:
        TypeError: images are not a tensor.
        ValueError: not floating point (B, C, H, W), or another number of channels.
    """
    check_tensors({"images": images})
    if images.ndim != 4:
        remedy = "; a single image goes in as image[None]" if images.ndim == 3 else ""
        raise ValueError(f"images must be (B, C, H, W), got {tuple(images.shape)}{remedy}")
    if images.shape[1] != n_channels:
        last = images.shape[3] == n_channels
        remedy = "; move the channels with images.permute(0, 3, 1, 2)" if last else ""
        raise ValueError(f"images must have {n_channels} channels, (B, C, H, W), got {tuple(images.shape)}{remedy}")
    if not images.is_floating_point():
        raise ValueError(
            f"images must be floating point, got {images.dtype}: divide by 255 and normalise them as the model was "
            "trained"
        )


def check_whole(images: Tensor, patch_size: tuple[int, int]) -> None:
    """Refuse images that are not of whole patches.

    Raises:
        TypeError: images are not a tensor.
        ValueError: not (B, C, H, W), or sides that the patch does not divide.
    """
    check_tensors({"images": images})
    if images.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), got {tuple(images.shape)}")
    (high, wide), (h, w) = patch_size, images.shape[2:]
    if h < high or w < wide or h % high or w % wide:
        raise ValueError(
            f"images must be of whole patches of {high} x {wide} pixels, got {h} x {w}: resize or crop them"
        )


def check_finite(images: Tensor) -> None:
    """Refuse images with NaN or infinity, of which one spoils a whole batch's loss; named, where values can be seen.

    Raises:
        ValueError: a number that is not finite. Compiled, exported, on meta and inside torch.func it is not looked for.
    """
    if has_values(images):
        finite = images.isfinite().flatten(1).all(1)
        if not finite.all():
            raise ValueError(f"images must be finite, got NaN or infinity in image {int((~finite).nonzero()[0])}")


class PatchEmbedding(nn.Module):
    """Each patch to a vector by one linear map: (B, C, H, W) -> (B, N, E), row by row.

    It is a convolution whose stride is its size: each pixel is read once (2010.11929, section 3.1).

    Args:
        patch_size: P, or (height, width) of a patch.
        d_model: width E.
        n_channels: C.
        bias: whether the map has one.
    """

    patch_size: tuple[int, int]
    n_channels: int
    projection: nn.Conv2d

    def __init__(self, patch_size: Size, d_model: int, *, n_channels: int = 3, bias: bool = True):
        super().__init__()
        self.patch_size, self.n_channels = pair("patch_size", patch_size), n_channels
        self.projection = nn.Conv2d(n_channels, d_model, self.patch_size, stride=self.patch_size, bias=bias)

    def grid(self, images: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        """How many rows and columns of patches the images have."""
        return images.shape[2] // self.patch_size[0], images.shape[3] // self.patch_size[1]

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n e"]:
        """(B, C, H, W) -> (B, N, E).

        Raises:
            TypeError: images are not a tensor.
            ValueError: not floating point (B, C, H, W), another number of channels, or sides of no whole patches.
        """
        check_images(images, self.n_channels)
        check_whole(images, self.patch_size)
        # --8<-- [start:embed]
        return self.projection(images).flatten(2).mT  # (B, E, rows, columns) -> (B, N, E)
        # --8<-- [end:embed]

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, images: Tensor) -> Tensor: ...


def grid_code(rows: int, columns: int, d_model: int) -> Float[Tensor, "n e"]:
    """Fixed positions of a grid, row by row, (rows · columns, E): sines of the row, then sines of the column, E/2 each.

    As in Chen et al. 2021 (2104.02057): the code of `positional_encoding.Sinusoidal` in two dimensions.

    Args:
        rows: of the grid.
        columns: of the grid.
        d_model: width E, a multiple of 4.

    Raises:
        ValueError: another width.
    """
    if d_model % 4:
        raise ValueError(f"d_model must be a multiple of 4 for fixed positions of a grid, got {d_model}")
    # --8<-- [start:grid_code]
    index = torch.arange(rows * columns)
    code = Sinusoidal(d_model // 2)
    return torch.cat([code.at(index // columns), code.at(index % columns)], 1)
    # --8<-- [end:grid_code]


def is_grid(grid: tuple[int, int], to: tuple[int, int]) -> bool:
    """Whether two grids are known to be the same.

    Of sizes that are symbols, in a program exported for every size, it is not: the positions are then interpolated in
    each case, which leaves those of the same grid as they are.
    """
    return not any(isinstance(side, torch.SymInt) for side in to) and tuple(grid) == tuple(to)


def resampled(
    positions: Float[Tensor, "n e"], grid: tuple[int, int], to: tuple[int, int], *, antialias: bool = False
) -> Float[Tensor, "m e"]:
    """Learned positions of a grid of patches, interpolated for another grid: bicubic, in float32 or better.

    Args:
        positions: (rows · columns, E), row by row.
        grid: rows and columns of these positions.
        to: rows and columns that are wanted.
        antialias: whether a smaller grid averages over what it leaves out, as DINOv2 with registers does.

    Returns:
        The positions of the other grid, in the dtype of these; these themselves where the grids agree.

    Raises:
        ValueError: positions that are not those of the grid.
    """
    if positions.ndim != 2 or positions.shape[0] != grid[0] * grid[1]:
        raise ValueError(
            f"positions must be (rows · columns, E) = ({grid[0]} · {grid[1]}, E), got {tuple(positions.shape)}"
        )
    if is_grid(grid, to):
        return positions
    # --8<-- [start:resampled]
    # (1, E, rows, columns)
    table = at_least_float32(positions).mT.unflatten(-1, grid)[None]
    table = F.interpolate(
        table,
        to,
        mode="bicubic",
        align_corners=False,
        antialias=antialias,
    )
    return table[0].flatten(1).mT.to(positions.dtype)
    # --8<-- [end:resampled]
