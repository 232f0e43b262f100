"""Handwritten digits: 1,797 pictures of 8 x 8 pixels, fetched once and checked by their hash.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits" (UCI Machine Learning Repository, 1998),
its test set, written by 13 people, as scikit-learn carries it. The wheel of release 0.15.2 is read as an archive
and none of its code runs: the file is the same, byte for byte, in the releases of today, whose wheels are three times
as large. Licences: the digits CC BY 4.0 (UCI), scikit-learn's files BSD (3 clauses).
"""

import gzip

from nondual.data.pictures import Pictures
from nondual.store import Package, read

SCIKIT_LEARN = Package(
    name="scikit-learn",
    version="0.15.2",
    sha256="6b46372e4eb53d98f876e7be4443d52710ec491edf1ff553de6c5f763d406849",
    size=2_592_306,
    root="sklearn/datasets/",
    files={
        "data/digits.csv.gz": "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
        "images/china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
        "images/flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
        "images/README.txt": "a8bd3058e25f09fdcfea87b38515a9027382f7e61102c9ae685f27d98ad640eb",
    },
    holds="pictures",
)
"""The digits, and two of the photographs of `nondual.data.photographs`."""

INK = 16  # the largest value of a pixel in the file: how many of 4 x 4 finer pixels are dark


def digits() -> Pictures:
    """All digits, in the order of the file: images (1797, 1, 8, 8) uint8, classes "0" to "9" of 174 to 183 each.

    A pixel of the file counts ink from 0 to 16; here it is round(255 / 16 of it), so that 255 is the darkest stroke, as
    in `fashion`. Pictures of one writer stand together, so a random split puts every writer on both sides.

    Raises:
        WeightsMissing: they were not fetched yet; the message says how.
    """
    import torch

    rows = gzip.decompress(read(SCIKIT_LEARN, "data/digits.csv.gz")).decode().splitlines()
    table = torch.tensor([[int(value) for value in row.split(",")] for row in rows])
    ink, labels = table[:, :64], table[:, 64]
    images = ((ink * 255 + INK // 2) // INK).to(torch.uint8).view(-1, 1, 8, 8)
    return Pictures(images, labels.contiguous(), tuple("0123456789"))
