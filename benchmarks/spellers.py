"""Two real networks that spell words aloud, one with attention and one without.

docs/assets/models/spell.bin holds the one with attention (hama) for the Latin letters, as the page loads it.
"""

import json
import unicodedata
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.record import MEASURED
from nondual.pretrained.hama import hama
from nondual.pretrained.hama_network import AttentiveSpeller, HamaNetwork

MODEL = MEASURED.parent / "assets" / "models" / "spell.bin"


def latin(letter: str) -> bool:
    """Whether it is one small Latin letter, with or without a mark, or the apostrophe."""
    return len(letter) == 1 and (letter == "'" or unicodedata.name(letter, "").startswith("LATIN SMALL LETTER"))


def store(speller: AttentiveSpeller, file: Path) -> None:
    """Write the network for the Latin letters, in the package's own float16 numbers, with its letters and phonemes."""
    letters = [letter for letter in speller.letters if latin(letter)]
    state = {name: weight.to(torch.float16) for name, weight in speller.model.state_dict().items()}
    rows = torch.tensor([speller.letters[letter] for letter in letters])
    state["embedding.weight"] = state["embedding.weight"][rows]
    metadata = {
        "letters": "".join(letters),
        "phonemes": json.dumps(speller.phonemes, ensure_ascii=False),
        "source": "hama 1.7.0, https://pypi.org/project/hama/1.7.0/: letters to phonemes, Latin letters only",
        "author": "Seongmin Park",
        "licence": "Apache-2.0",
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file, metadata=metadata)


def load(file: Path) -> AttentiveSpeller:
    """The network of such a file, in float32."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    phonemes = json.loads(metadata["phonemes"])
    model = HamaNetwork(len(metadata["letters"]), len(phonemes))
    model.load_state_dict(load_file(file))
    return AttentiveSpeller(model.eval(), {letter: row for row, letter in enumerate(metadata["letters"])}, phonemes)


def main(options: list[str]) -> None:
    store(hama(), MODEL)
