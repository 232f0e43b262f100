"""Six colour photographs, fetched once and checked by their hashes.

    astronaut   Eileen Collins before a shuttle and a flag, 512 x 512: NASA, public domain
    cat         Chelsea, 300 x 451: Stefan van der Walt, CC0
    coffee      a cup, a saucer and a spoon on a table, 400 x 600: Rachel Michetti, CC0
    rocket      a launch of Falcon 9, 427 x 640: SpaceX, public domain
    china       a Chinese temple, 427 x 640: danielbuechele, CC BY 2.0, flickr.com/photos/danielbuechele/6061409035
    flower      a dahlia, 427 x 640: vultilion, CC BY 2.0, flickr.com/photos/vultilion/6056698931

Sources: the first four from scikit-image 0.17.1, the others from scikit-learn. The files that name their authors and
licences are kept beside them; none of the packages' code runs. A page that shows one of the last two names its author.
"""

import io
from typing import TYPE_CHECKING

from nondual.data.digits import SCIKIT_LEARN
from nondual.store import Package, read

if TYPE_CHECKING:
    from torch import Tensor

SCIKIT_IMAGE = Package(
    name="scikit-image",
    version="0.17.1",
    sha256="11bcc65ca2927c1842212b37ab64fe589a3eb6de375ea09cea0d7cd99bbde418",
    size=10_554_666,
    root="",
    files={
        "skimage/data/astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        "skimage/data/chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
        "skimage/data/coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        "skimage/data/rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
        "skimage/data/__init__.py": "80c1ecfa934f4ef115ccf2ea3754048172f7c54890f611c7c989f3e7e4a939cb",
        "scikit_image-0.17.1.dist-info/LICENSE.txt": "8d4841b4114954c3926cb0a2274763c87c5ae5fdb2868901463f298a3a6dd401",
    },
    holds="photographs",
)

_FILES = {
    "astronaut": (SCIKIT_IMAGE, "skimage/data/astronaut.png"),
    "cat": (SCIKIT_IMAGE, "skimage/data/chelsea.png"),
    "coffee": (SCIKIT_IMAGE, "skimage/data/coffee.png"),
    "rocket": (SCIKIT_IMAGE, "skimage/data/rocket.jpg"),
    "china": (SCIKIT_LEARN, "images/china.jpg"),
    "flower": (SCIKIT_LEARN, "images/flower.jpg"),
}


def photographs() -> "dict[str, Tensor]":
    """Each photograph by its name: (3, H, W) uint8, RGB, of the height and width given at the top of this file.

    Raises:
        WeightsMissing: they were not fetched yet; the message says how.
        ImportError: Pillow is not installed.
    """
    return {name: decoded(read(package, file)) for name, (package, file) in _FILES.items()}


def decoded(data: bytes) -> "Tensor":
    """A JPEG or PNG file as (3, H, W) uint8, RGB.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: it is no picture that Pillow can read.
    """
    import torch

    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ImportError("PIL is needed to read photographs: pip install 'nondual[pictures]'") from None
    try:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
    except (UnidentifiedImageError, OSError) as why:
        raise ValueError(f"data must be a JPEG or PNG file, got {len(data)} bytes that cannot be read: {why}") from None
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()
