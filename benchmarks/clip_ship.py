"""The files that come of the longest training: the weights of `nondual.pretrained.emoji_clip`, and what its page loads.

src/nondual/pretrained/emoji_clip.safetensors   the weights, float16; `unseen` of the metadata is a JSON list with the
                                                code points of the test concepts
docs/assets/models/clip.bin                     laid out as safetensors: `words` (W, 96) and `pictures` (300, 96), int8
                                                with a scale for each row; `words` of the metadata is a JSON list
docs/assets/models/clip.webp                    the 300 pictures, 15 in a row: the test concepts in a style that the
                                                model met, then the same in the one that it did not
"""

import json
from io import BytesIO
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from benchmarks.clip_data import HELD_STYLE, Pairs, encoded
from nondual.data import emoji_picture
from nondual.data.emoji import concepts
from nondual.multimodal.clip import CLIP
from nondual.pretrained import minilm

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "src" / "nondual" / "pretrained" / "emoji_clip.safetensors"
LIVE = ROOT / "docs" / "assets" / "models" / "clip.bin"
SPRITE = LIVE.with_suffix(".webp")
SHOWN = ("noto", HELD_STYLE)
"""The styles of the page; both licences ask for no more than a notice."""
COLUMNS, SIDE, QUALITY = 15, 40, 60


def ship(model: CLIP, pairs: Pairs) -> None:
    """Write the three files."""
    codes = {concept.name: concept.hexcode for concept in concepts()}
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    write(weights, MODEL, metadata={"unseen": json.dumps([codes[pairs.names[i]] for i in pairs.test.tolist()])})
    write_live(model, pairs, LIVE)
    SPRITE.write_bytes(sprite(pairs))


@torch.no_grad()
def write_live(model: CLIP, pairs: Pairs, file: Path) -> None:
    """The vectors of all names and tags, and of the unseen pictures."""
    words = vocabulary(pairs)
    texts = model.encode_texts(encoded(minilm(), words))
    pictures = torch.cat([model.encode_images(pairs.of(pairs.test, style)) for style in SHOWN])
    tensors: dict[str, Tensor] = {}
    for name, x in (("words", texts), ("pictures", pictures)):
        tensors[f"{name}.scale"] = x.abs().amax(1) / 127
        tensors[name] = (x / tensors[f"{name}.scale"][:, None]).round().to(torch.int8)
    write(tensors, file, metadata={"words": json.dumps(words, ensure_ascii=False)})


def write(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """A safetensors file that everyone may read; safetensors itself leaves it to its owner."""
    file.write_bytes(save(tensors, metadata=metadata))


def vocabulary(pairs: Pairs) -> list[str]:
    """All names and tags as they are looked up, in lower case and in alphabetical order."""
    return sorted({text.lower() for text in (*pairs.names, *(tag for each in pairs.tags for tag in each))})


def sprite(pairs: Pairs) -> bytes:
    """The pictures in one file, WebP."""
    from PIL import Image

    codes = {concept.name: concept.hexcode for concept in concepts()}
    rows = -(-len(pairs.test) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, len(SHOWN) * rows * SIDE), "white")
    for s, style in enumerate(SHOWN):
        for k, i in enumerate(pairs.test.tolist()):
            picture = emoji_picture(codes[pairs.names[i]], style, SIDE).permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(picture), (k % COLUMNS * SIDE, (s * rows + k // COLUMNS) * SIDE))
    file = BytesIO()
    sheet.save(file, "WEBP", quality=QUALITY, method=6)
    return file.getvalue()
