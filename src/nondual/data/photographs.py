"""Two photographs, 427 x 640 pixels each, fetched once and checked by their hashes.

    china    a temple in the Summer Palace near Beijing, danielbuechele, flickr.com/photos/danielbuechele/6061409035
    flower   a dahlia, vultilion, flickr.com/photos/vultilion/6056698931

Source: scikit-learn's sample images. Licence: CC BY 2.0, each by its photographer; the package's README.txt, which says
so, is kept beside them.
"""

import io
from typing import TYPE_CHECKING

from nondual.data.digits import SCIKIT_LEARN
from nondual.store import read

if TYPE_CHECKING:
    from torch import Tensor


def photographs() -> "dict[str, Tensor]":
    """Each photograph by its name: (3, 427, 640) uint8, RGB.

    Raises:
        WeightsMissing: they were not fetched yet; the message says how.
        ImportError: Pillow is not installed.
    """
    return {name: decoded(read(SCIKIT_LEARN, f"images/{name}.jpg")) for name in ("china", "flower")}


def decoded(data: bytes) -> "Tensor":
    """A JPEG or PNG file as (3, H, W) uint8, RGB.

    Raises:
        ImportError: Pillow is not installed.
    """
    import torch

    try:
        from PIL import Image
    except ImportError:
        raise ImportError("PIL is needed to read photographs: pip install 'nondual[pictures]'") from None
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()
