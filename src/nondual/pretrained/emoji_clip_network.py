"""The image tower of `nondual.pretrained.emoji_clip`: pictures of 32 x 32 pixels to vectors.

Source: Dosovitskiy et al. 2020 (2010.11929), section 3.1; the mean over the patches in place of a class token, appendix
D.3. Symbols: B pictures, N patches, E width.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from nondual.multimodal.towers import VisionTower
from nondual.ops.checks import check_tensors

SIZE, D_IMAGE, D_TEXT, D_JOINT = 32, 128, 384, 96


class Mean(nn.Module):
    """The mean of a picture's vectors: (B, N, E) -> (B, E)."""

    def forward(self, x: Float[Tensor, "b n e"]) -> Float[Tensor, "b e"]:
        """(B, N, E) -> (B, E)."""
        return x.mean(1)


class PictureTower(nn.Module):
    """Pictures as they are stored, 0 to 255, to one vector each: scaled, then read by a `VisionTower`.

    A picture's values are divided by 255, less 0.75, divided by 0.3: drawings on white are bright.
    """

    vit: VisionTower

    def __init__(self):
        super().__init__()
        self.vit = VisionTower(
            SIZE,
            8,
            D_IMAGE,
            n_heads=4,
            d_ff=3 * D_IMAGE,
            n_layers=3,
            class_token=False,
            norm_before=False,
            patch_bias=True,
            pool=Mean(),
            activation=F.gelu,
        )

    def forward(self, pictures: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """(B, 3, 32, 32), RGB from 0 to 255, uint8 or floating point -> (B, 128).

        Raises:
            TypeError: pictures are not a tensor.
            ValueError: pictures of another shape, or of integers other than uint8.
        """
        check_tensors({"pictures": pictures})
        known = pictures.dtype == torch.uint8 or pictures.is_floating_point()
        if pictures.ndim != 4 or pictures.shape[1:] != (3, SIZE, SIZE) or not known:
            raise ValueError(
                f"pictures must be (B, 3, {SIZE}, {SIZE}), RGB from 0 to 255, uint8 or floating point, got "
                f"{pictures.dtype} {tuple(pictures.shape)}"
            )
        weight = self.vit.patches.weight
        return self.vit((pictures.to(weight.dtype) / 255 - 0.75) / 0.3)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, pictures: Tensor) -> Tensor: ...
