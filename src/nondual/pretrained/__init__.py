"""Real weights: fetched once, checked by hash, read from safe formats only.

`python -m nondual.pretrained` brings them into the user's cache. `minilm()` is a sentence encoder in our own classes,
`smollm2()` a causal language model in those of transformers, `our_smollm2()` the same in ours, `rxnmapper()` an encoder
of chemical reactions in those of transformers, `hama()` a speller with additive attention in ours, `hama_p2g()` a
prefix language model that spells back, `g2p_en()` a speller without attention, `whisper()` a transformer that hears
speech and `dinov2()` one that sees, in ours too. `emoji_clip()`, a small CLIP, was trained for this library and is a
part of it. `load_mamba()` and `load_mamba2()` read checkpoints of Mamba models from a folder of yours, `load_gpt2()`
those of GPT-2 and GPT-1, `load_clip()`, `load_siglip()` and `load_llava()` those of models of images and texts,
`load_vit()` those of Vision Transformers; `from_llama()`, `from_gpt2()`, `from_clip()`, `from_siglip()`, `from_llava()`
and `from_vit()` copy a model of transformers into our classes.

To add a model, write its file, with the package and the function that reads it, and name both here. Such a file imports
torch within the function, so that the command answers at once; for the same reason, what needs torch at its top is
imported when it is first asked for (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from nondual.pretrained.dinov2 import DINOV2, dinov2
from nondual.pretrained.emoji_clip import emoji_clip
from nondual.pretrained.g2p_en import G2P_EN, g2p_en
from nondual.pretrained.hama import HAMA, hama
from nondual.pretrained.hama_p2g import hama_p2g
from nondual.pretrained.minilm import MINILM, minilm
from nondual.pretrained.rxnmapper import RXNMAPPER, rxnmapper
from nondual.pretrained.smollm2 import SMOLLM2, our_smollm2, smollm2
from nondual.pretrained.whisper import WHISPER, whisper
from nondual.store import FetchError, Package, WeightsMissing, fetch, read

if TYPE_CHECKING:
    from nondual.pretrained.causal_lm import from_llama
    from nondual.pretrained.clip import from_clip, from_siglip, load_clip, load_siglip
    from nondual.pretrained.encoder import SentenceEncoder, from_bert
    from nondual.pretrained.gpt2 import from_gpt2, load_gpt2
    from nondual.pretrained.llava import from_llava, load_llava
    from nondual.pretrained.mamba import load_mamba, load_mamba2
    from nondual.pretrained.vit import from_vit, load_vit

__all__ = [
    "DINOV2",
    "G2P_EN",
    "HAMA",
    "MINILM",
    "PACKAGES",
    "RXNMAPPER",
    "SMOLLM2",
    "WHISPER",
    "FetchError",
    "Package",
    "SentenceEncoder",
    "WeightsMissing",
    "dinov2",
    "emoji_clip",
    "fetch",
    "from_bert",
    "from_clip",
    "from_gpt2",
    "from_llama",
    "from_llava",
    "from_siglip",
    "from_vit",
    "g2p_en",
    "hama",
    "hama_p2g",
    "load_clip",
    "load_gpt2",
    "load_llava",
    "load_mamba",
    "load_mamba2",
    "load_siglip",
    "load_vit",
    "minilm",
    "our_smollm2",
    "read",
    "rxnmapper",
    "smollm2",
    "whisper",
]

PACKAGES: dict[str, Package] = {
    "minilm": MINILM,
    "smollm2": SMOLLM2,
    "rxnmapper": RXNMAPPER,
    "hama": HAMA,
    "g2p_en": G2P_EN,
    "whisper": WHISPER,
    "dinov2": DINOV2,
}
"""What is fetched, by the name of the function that reads it."""

# The module that a name is taken from when it is first asked for.
_HOME = {
    "SentenceEncoder": "encoder",
    "from_bert": "encoder",
    "from_clip": "clip",
    "from_gpt2": "gpt2",
    "from_llama": "causal_lm",
    "from_llava": "llava",
    "from_siglip": "clip",
    "from_vit": "vit",
    "load_clip": "clip",
    "load_gpt2": "gpt2",
    "load_llava": "llava",
    "load_mamba": "mamba",
    "load_mamba2": "mamba",
    "load_siglip": "clip",
    "load_vit": "vit",
}

if not TYPE_CHECKING:  # a type checker reads the imports above, and should go on to report a name that does not exist

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value  # the next look-up finds it without this function
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
