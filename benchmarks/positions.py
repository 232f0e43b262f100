"""What position codes do: for length, for what a word's vector comes from, and for where attention goes.

Five parts:

    length    small causal models on Shakespeare by character, trained on windows of 64 and read up to 512: without
              positions, with a learned table, with the sinusoidal code, rotary, ALiBi, T5's bias. Each is trained to
              the end at five rates with one seed; its rate is the one with the lowest loss on a play that none trains
              on. Three other seeds are reported, on two other plays. Rotary is also read with its angles rescaled.
    place     does a causal model without positions know where it is? A linear probe of the position, and its controls
    words     MiniLM: the shares of a word's vector that come from the word, its company and its place
    recency   SmolLM2: where attention goes as the context grows; and the same in the small models
    cost      how many times as long one layer of attention takes with rotary, ALiBi and T5's bias as without

    nox -s bench -- positions

Trainings, and what MiniLM and SmolLM2 gave, are kept as they end, in `runs/positions` of the cache folder or in
--runs=FOLDER, and are not made again; delete the folder to measure all of it anew.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks import positions_recency, positions_words
from benchmarks.positions_run import ARMS, BATCH, BIN, CONTEXT, HEADS, LONGEST, WIDTH, Run, by_bin, carry_out, read
from benchmarks.record import alternate, ratio, write
from benchmarks.shakespeare import difference
from nondual.language_models.causal import CausalLM
from nondual.positional_encoding import ALiBi, RelativeBias, Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.store import cache_folder

STEPS, RATES, SWEEP_SEED, SEEDS = 800, (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2), 0, (1, 2, 3)
FACTOR = LONGEST / CONTEXT
RESCALED = {
    "rotary, linear": Rotary(WIDTH // HEADS, scaling="linear", factor=FACTOR),
    "rotary, NTK": Rotary(WIDTH // HEADS, scaling="ntk", factor=FACTOR),
    "rotary, YaRN": Rotary(WIDTH // HEADS, scaling="yarn", factor=FACTOR, trained_length=CONTEXT),
}
NEAR = 8


def main(options: list[str]) -> None:
    folder = next((Path(o.removeprefix("--runs=")) for o in options if o.startswith("--runs=")), None)
    folder = folder or cache_folder() / "runs" / "positions"
    torch.set_num_threads(1)
    lengths, chosen = length(folder)
    figures = {
        "length": lengths,
        "place": place(chosen["none"]),
        "recency": {"small": small(chosen), "smollm2": positions_recency.measure(folder)},
        "words": kept(folder / "words.json", positions_words.measure),
        "cost": cost(),
    }
    write("positions", "nox -s bench -- positions", figures, threads=1)


def kept(file: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file has; where there is none, what is measured now, and kept there."""
    if not file.exists():
        file.write_text(json.dumps(measure()))
    return json.loads(file.read_text())


# --- length --------------------------------------------------------------------------------------------------------


def length(folder: Path) -> tuple[dict[str, Any], dict[str, list[Run]]]:
    """What is reported of the trainings, and the runs at each arm's best rate."""
    arms, chosen = {}, {}
    for arm in ARMS:
        sweep = [Run(arm, rate, SWEEP_SEED, STEPS, folder) for rate in RATES]
        for run in sweep:
            carry_out(run)
        bits = {run.rate: run.result()["chosen_on_bits"] for run in sweep}
        rate = min(bits, key=bits.__getitem__)
        chosen[arm] = [Run(arm, rate, seed, STEPS, folder) for seed in SEEDS]
        for run in chosen[arm]:
            carry_out(run)
        results = [run.result() for run in chosen[arm]]
        arms[arm] = {
            "parameters": results[0]["parameters"],
            "sweep_bits": {str(rate): value for rate, value in bits.items()},
            "learning_rate": rate,
            "held_out_bits": [result["held_out_bits"] for result in results],
            "commits": sorted({str(result["commit"]) for result in results}),
        }
        print(arm, bits, rate, flush=True)
    for name, positions in RESCALED.items():
        models = [rescaled(run, positions) for run in chosen["rotary"]]
        arms[name] = {"held_out_bits": [by_bin(model) for model in models]}
    return {
        "trained_at": CONTEXT,
        "read_at": LONGEST,
        "bin": BIN,
        "steps": STEPS,
        "batch": BATCH,
        "seeds": SEEDS,
        "characters_held_out": read().held_out[:, 1:].numel(),
        "arms": arms,
        "differences": differences(arms),
    }, chosen


def rescaled(run: Run, positions: Rotary) -> CausalLM:
    """The model as it was trained, with the angles of other lengths."""
    model = run.model()
    for layer in model.layers:
        cast(MultiHeadAttention, layer.mixer).positions = positions
    return model


def differences(arms: dict[str, Any]) -> dict[str, Any]:
    """By arm, paired by seed: the last bin less the second half of the trained length; and that half less rotary's."""

    def within(arm: str) -> list[float]:
        bins = slice(CONTEXT // BIN // 2, CONTEXT // BIN)
        return [mean(bits[bins]) for bits in arms[arm]["held_out_bits"]]

    found = {}
    for arm in arms:
        last = [mean(bits[-2:]) for bits in arms[arm]["held_out_bits"]]
        found[arm] = {"within, less rotary": difference(within(arm), within("rotary"))}
        if arm != "learned":
            found[arm]["at the end, less within"] = difference(last, within(arm))
    return found


# --- place ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def layer_by_layer(model: CausalLM, ids: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The vectors before the first layer and after each (B, N, E), and that layer's weights (B, H, N, N)."""
    x = model.embeddings(ids)
    if model.positions is not None:
        x = x + model.positions.of_sequences(ids)
    yield x, None
    for layer in model.layers:
        x, weights = layer(x, return_weights=True)
        yield x, weights


def place(runs: list[Run]) -> dict[str, Any]:
    """How well a linear probe tells a token's position from its vector, on a play that it was not fitted to."""
    text = read().held_out[:, :LONGEST].reshape(2, -1, CONTEXT)  # one play to fit, one to test
    found: dict[str, Any] = {}
    for run in runs:
        free = run.model()
        for layer in free.layers:
            cast(MultiHeadAttention, layer.mixer).causal = False
        arms = {
            "trained": (run.model(), False),
            "untrained": (run.model(trained=False), False),
            "trained, mask lifted": (free, False),
            "trained, labels shuffled": (run.model(), True),
        }
        for arm, (model, shuffled) in arms.items():
            rows = zip(*(layer_by_layer(model, part) for part in text))
            found.setdefault(arm, []).append([probed(a, b, shuffled) for (a, _), (b, _) in rows])
    return {"windows": text.shape[1], "length": CONTEXT, "layers": found}


def probed(fit: Tensor, test: Tensor, shuffled: bool) -> dict[str, float]:
    """Ridge regression of the position: the share of its variance that is told, and how far off it is on average."""
    where = torch.arange(CONTEXT, dtype=torch.float64)
    y = where.repeat(len(fit))
    if shuffled:
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]

    def columns(x: Tensor) -> Tensor:
        x = (x.flatten(0, 1).double() - centre) / scale
        return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)

    rows = fit.flatten(0, 1).double()
    centre, scale = rows.mean(0), rows.std(0).clamp(min=1e-9)
    a, b = columns(fit), columns(test)
    weight = torch.linalg.solve(a.mT @ a + 1e-3 * len(a) * torch.eye(a.shape[1], dtype=a.dtype), a.mT @ y)
    error = b @ weight - where.repeat(len(test))
    return {
        "r2": round(1 - (error.square().mean() / where.var(correction=0)).item(), 4),
        "off_by": round(error.abs().mean().item(), 3),
    }


# --- recency in the small models -------------------------------------------------------------------------------------


def small(chosen: dict[str, list[Run]]) -> dict[str, Any]:
    """The share of attention on the last NEAR keys and on the first, of queries in the second half of a window."""
    text = read().held_out[::2, :CONTEXT]
    queries = torch.arange(CONTEXT // 2, CONTEXT)
    age = queries[:, None] - torch.arange(CONTEXT)
    near = (age >= 0) & (age < NEAR)

    def shares(model: CausalLM) -> dict[str, float]:
        seen = torch.stack([w.mean((0, 1))[queries] for _, w in layer_by_layer(model, text) if w is not None]).mean(0)
        return {"near": round((seen * near).sum(-1).mean().item(), 4), "first": round(seen[:, 0].mean().item(), 4)}

    arms = {arm: [shares(run.model()) for run in runs] for arm, runs in chosen.items()}
    arms["none, untrained"] = [shares(run.model(trained=False)) for run in chosen["none"]]
    even = {
        "near": round((NEAR / (queries + 1)).mean().item(), 4),
        "first": round((1 / (queries + 1)).mean().item(), 4),
    }
    return {"near": NEAR, "even": even, "arms": arms}


# --- cost ----------------------------------------------------------------------------------------------------------


def cost(d_model: int = 384, n_heads: int = 12) -> dict[str, Any]:
    """One layer of causal attention, forward, at the width of MiniLM: its time over that of one without positions."""
    codes = {
        "none": None,
        "rotary": Rotary(d_model // n_heads),
        "ALiBi": ALiBi(n_heads),
        "T5": RelativeBias(n_heads, causal=True),
    }
    layers = {name: MultiHeadAttention(d_model, n_heads, causal=True, positions=code) for name, code in codes.items()}
    rows = []
    for n in (128, 512, 2048):
        x = torch.randn(1, n, d_model)
        with torch.inference_mode():
            times = alternate({name: partial(layer, x) for name, layer in layers.items()}, rounds=11)
        rows.append({"n": n} | {name: ratio(times[name], times["none"]) for name in codes if name != "none"})
    return {"d_model": d_model, "n_heads": n_heads, "rows": rows}
