"""A small CLIP of emoji: pictures of 32 x 32 pixels and their names in one space of 96 numbers.

It was trained for this project and is a part of the package: 0.6 million parameters for pictures, in float16. Its text
tower is MiniLM, which is fetched (`python -m nondual.pretrained minilm`) and was not trained further.

    picture  32 x 32, RGB -> 16 patches of 8 x 8 -> three layers, width 128, four heads -> mean -> 96 numbers
    text     MiniLM's vector, 384 numbers -> 96 numbers

Model card.
    Training: some 1,300 emoji concepts in six styles, turned, scaled, shifted, mirrored and recoloured by chance; a
    caption is the name, the name with its tags, or one tag. Softmax loss, batches of 128, one thread of a CPU.
    `nox -s bench -- clip` trains it again, and docs/measured/clip.json says how well it does, with intervals: on 150
    concepts and a seventh style that it never met.
    For: showing how such a model works. It knows small drawings on white and English, and no photographs. Its answers
    repeat how these drawings and tags show people: do not use it to sort any.
    Drawings: Noto Emoji (Google, Apache-2.0), Twemoji (Twitter and others, CC BY 4.0), OpenMoji (HfG Schwäbisch Gmünd,
    CC BY-SA 4.0), Firefox OS Emoji (Mozilla, Apache-2.0), Emoji One 1 (CC BY-SA 4.0) and 2 (CC BY 4.0). Names and tags:
    emojibase-data (MIT), from Unicode's CLDR. Text vectors: all-MiniLM-L6-v2 (Apache-2.0).
    Licence of the weights: CC BY-SA 4.0, as the most demanding of the drawings.

torch is imported by the function: `python -m nondual.pretrained` starts without it.

Sources: Radford et al. 2021 (2103.00020); the image tower, Dosovitskiy et al. 2020 (2010.11929).
"""

import json
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from nondual.pretrained.minilm import minilm

if TYPE_CHECKING:
    import torch

    from nondual.multimodal.clip import CLIP

STYLES_MET = ("noto", "twemoji", "openmoji", "fxemoji", "emojione-v1", "emojione")
"""The styles of its training."""
STYLE_NOT_MET = "fluent-emoji-flat"
"""The style that was held out."""


def emoji_clip(device: "torch.device | str | None" = None) -> "CLIP":
    """The small CLIP of emoji, in float32 and evaluation mode.

        model = emoji_clip()
        pictures = emoji(["noto"]).pictures["noto"]          # nondual.data.emoji: (C, 3, 32, 32) uint8
        model(pictures, ["a red apple", "a cat"])            # (C, 2)

    Args:
        device: where it runs; the CPU where left out.

    Returns:
        A `CLIP`: `encode_images` takes (B, 3, 32, 32) from 0 to 255, `encode_texts` strings, or MiniLM's unit vectors
        (T, 384). Both give unit vectors of 96 numbers.

    Raises:
        WeightsMissing: MiniLM's weights were not fetched yet; the message says how.
        ImportError: safetensors or tokenizers is not installed.
    """
    encoder = minilm(device)
    from safetensors.torch import load

    from nondual.multimodal.clip import CLIP, SentenceTower
    from nondual.pretrained.emoji_clip_network import D_IMAGE, D_JOINT, D_TEXT, PictureTower

    model = CLIP(PictureTower(), SentenceTower(encoder), D_JOINT, d_image=D_IMAGE, d_text=D_TEXT)
    model.load_state_dict({name: tensor.float() for name, tensor in load(_stored()).items()})
    return model.to(device).eval()


def unseen_concepts() -> tuple[str, ...]:
    """The 150 concepts that it never met in any style, by their code points, as `nondual.data.emoji` has them.

    Nor did it meet any that differ from them only in who a person is ("man farmer", "woman farmer").
    """
    content = _stored()
    size = int.from_bytes(content[:8], "little")  # a safetensors file begins with the length of its JSON header
    return tuple(json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["unseen"]))


@cache
def _stored() -> bytes:
    return files("nondual.pretrained").joinpath("emoji_clip.safetensors").read_bytes()
