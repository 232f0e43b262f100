"""Fashion-MNIST: 70,000 grey pictures of clothes, 28 x 28 pixels, fetched once and checked by their hashes.

Source: H. Xiao, K. Rasul and R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms" (2017), arXiv:1708.07747, as the Debian package dataset-fashion-mnist carries it. Licence: Expat (the MIT
licence), Zalando SE, 2017; its text is kept beside the pictures.
"""

import gzip
import struct
from typing import TYPE_CHECKING, Literal

from nondual.data.pictures import Pictures
from nondual.store import Package, read

if TYPE_CHECKING:
    from torch import Tensor

FASHION_MNIST = Package(
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    size=30_900_652,
    root="usr/share/",
    files={
        "datasets/fashion-mnist/train-images-idx3-ubyte.gz": (
            "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"
        ),
        "datasets/fashion-mnist/train-labels-idx1-ubyte.gz": (
            "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"
        ),
        "datasets/fashion-mnist/t10k-images-idx3-ubyte.gz": (
            "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
        ),
        "datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz": (
            "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
        ),
        "doc/dataset-fashion-mnist/copyright": "193c9c47fa3dc7e614dcd5f4ea5315d69c0a542b698b64dc34ac5bc4b09d5c3a",
    },
    holds="pictures",
    source="debian",
    pool="main/d/dataset-fashion-mnist",
)

NAMES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""The classes, by their labels 0 to 9."""


def fashion(split: Literal["train", "test"]) -> Pictures:
    """The training or the test pictures: images (60000, 1, 28, 28) or (10000, 1, 28, 28) uint8.

    Every class is there 6,000 or 1,000 times. The ground is 0 and the brightest cloth 255.

    Raises:
        ValueError: `split` is neither "train" nor "test".
        WeightsMissing: they were not fetched yet; the message says how.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    file = f"datasets/fashion-mnist/{'train' if split == 'train' else 't10k'}"
    images = parsed(gzip.decompress(read(FASHION_MNIST, f"{file}-images-idx3-ubyte.gz")))
    labels = parsed(gzip.decompress(read(FASHION_MNIST, f"{file}-labels-idx1-ubyte.gz")))
    return Pictures(images.unsqueeze(1), labels.long(), NAMES)


def parsed(data: bytes) -> "Tensor":
    """An array of bytes in the IDX format of MNIST, as uint8: two zeros, the type 8, the rank, each size, the values.

    Raises:
        ValueError: it is no such array.
    """
    import torch

    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"an IDX file of bytes must begin with 00 00 08, got {data[:3].hex(' ')}")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=4 + 4 * data[3])
    return values.view(shape)
