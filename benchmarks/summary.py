"""What a summary of fixed size can hold: a law for random pairs, overwriting, parity, and recall by trained models.

law          m pairs of random unit keys and random values go into a d x d state, and each is read by its key. Squared
             error over the value's square: of a plain sum r = (m - 1) / d, and r / (1 + r) if it is multiplied by the
             best factor; of the delta rule with β = 1 in one pass a recursion (`delta_law`); of the best state there
             is, by least squares, max(0, 1 - d / m); and of softmax attention over the pairs, which keeps them all.
             Beside it, how often the value is named rightly of 16.
overwriting  one key is written twice with other writes between, and read; or once, with other writes after.
parity       whether the ones are odd in number, trained on 32 bits, read to 256. The delta rule with eigenvalues of its
             transition from 0 to 1 and from -1 to 1, Mamba-2 (0 to 1), and LSTM.
recall       values by their keys, with 2 to 64 pairs, for softmax attention and six states of one size; and for the
             delta rule with a smaller and a larger one.

The first two train nothing. benchmarks/summary_run.py describes the others: arms of one frame that differ in the rule.
Each arm is trained to the end at every rate of a grid with one seed, and at rates beyond it where the best is at the
edge. Of recall the rate with the lowest training loss is taken, of parity that with the lowest loss on new rows of 64.
At that rate it is trained with eight other seeds. Where their mean is more than 0.3 worse than the sweep's seed, the
second-best rate is tried with the same eight as well, and the better is reported. A seed fixes the batches, so that
arms are paired by it.

    nox -s bench -- summary           some twenty minutes of one core
    nox -s bench -- summary --tiny    a few steps of a few, which writes nothing to docs/measured

A run is kept as it ends, in `runs/summary` of the cache folder or in --runs=FOLDER: call again, and it goes on. With
--arm=NAME only that arm is trained, and nothing is written.
"""

import math
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.heads_trained import difference
from benchmarks.intervals import normal
from benchmarks.record import write
from benchmarks.summary_run import (
    BATCH,
    BITS,
    CHOSEN_ON,
    KEYS,
    QUESTIONS,
    READ,
    STATE,
    TESTED_ON,
    TRAINED_ON,
    VALUES,
    WIDTH,
    Run,
    carry_out,
)
from nondual.ops.attention import attention
from nondual.ops.linear_attention import linear_attention
from nondual.store import cache_folder

SWEEP_SEED, SEEDS = 0, tuple(range(1, 9))
RATES = (3e-3, 1e-2, 3e-2)
STEPS = {"recall": 1200, "parity": 600}
UNLIKE = 0.3
"""How far above the sweep's the eight runs' mean may lie before the second-best rate is tried with them too."""
ARMS = {
    "recall": ("softmax", "linear", "sum", "delta", "gated", "Mamba", "Mamba-2"),
    "parity": ("delta", "delta 2", "LSTM", "Mamba-2"),
}
BY_WIDTH = ("delta, d = 8", "delta, d = 32")
"""Arms of recall with a smaller and a larger state than the others, and with fewer and more parameters."""
WIDTHS, SHARES = (16, 64, 128), (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 3 / 2, 2, 4)
"""Of the law: the widths d, and the numbers of pairs over d."""
DRAWS, NAMES = 64, 16
"""How many times the pairs are drawn anew, and of how many values each is one where it must be named."""
BETWEEN, OVERWRITTEN, DECAY = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256), 64, 0.95


# --- the law -------------------------------------------------------------------------------------------------------


def interval(each: Tensor) -> list[float]:
    """The mean over draws, and the 95 % interval of it by the normal distribution."""
    return [round(x, 5) for x in normal(each.tolist())]


def delta_law(m: int, d: int) -> float:
    """The expected squared error of m values read back after one pass of the delta rule with β = 1, over their square.

    Values have a square of 1 on average and keys are random unit vectors. With F = |S|², a = |Sᵀk|² and b = v · Sᵀk for
    a key k that was written n writes ago, the mean over the next key gives

        F' = F (1 - 1/d) + 1      b' = b (1 - 1/d)      a' = a (1 - 2/d + 2 / (d (d + 2))) + 1/d + F / (d (d + 2))

    from b = a = 1, and the error is a - 2 b + 1.
    """
    size, a, b = 0.0, torch.ones(0, dtype=torch.float64), torch.ones(0, dtype=torch.float64)
    for _ in range(m):
        a = a * (1 - 2 / d + 2 / (d * (d + 2))) + 1 / d + size / (d * (d + 2))
        b = b * (1 - 1 / d)
        a, b = (torch.cat([x, torch.ones(1, dtype=torch.float64)]) for x in (a, b))
        size = size * (1 - 1 / d) + 1
    return (a - 2 * b + 1).mean().item()


def read_back(keys: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Each value read by its own key, (T, m, d), from keys and values (T, m, d), by the rule of writing."""
    k, v = keys[:, None], values[:, None]
    _, total = linear_attention(k, k, v)
    _, corrected = linear_attention(k, k, v, beta=torch.ones(k.shape[:3], dtype=k.dtype))
    m, d = keys.shape[1:]
    best = torch.linalg.lstsq(keys, values).solution if m > d else None
    found = {
        "sum": keys @ total[:, 0],
        "sum, best factor": keys @ total[:, 0] * d / (d + m - 1),
        "delta": keys @ corrected[:, 0],
        "least squares": values if best is None else keys @ best,
    }
    for name, sharpness in (("softmax", 1), ("softmax, 4 times as sharp", 4)):
        found[name] = attention(k, k, v, scale=sharpness * math.sqrt(d))[:, 0]
    return found


def law(draws: int) -> dict[str, Any]:
    """Errors and names by width, number of pairs and rule, with what is expected."""
    found: dict[str, Any] = {}
    for d in WIDTHS:
        generator = torch.Generator().manual_seed(d)
        found[str(d)] = {}
        for m in (round(share * d) for share in SHARES):
            keys, values = (torch.randn(draws, m, d, generator=generator, dtype=torch.float64) for _ in range(2))
            keys, values = F.normalize(keys, dim=-1), values / math.sqrt(d)
            codes = F.normalize(torch.randn(draws, NAMES, d, generator=generator, dtype=torch.float64), dim=-1)
            which = torch.randint(NAMES, (draws, m), generator=generator)
            chosen = codes.gather(1, which[..., None].expand(-1, -1, d))
            errors = {rule: (read - values).square().sum(-1) for rule, read in read_back(keys, values).items()}
            named = {rule: (read @ codes.mT).argmax(-1) == which for rule, read in read_back(keys, chosen).items()}
            if m <= d:
                upright = torch.linalg.qr(torch.randn(draws, d, m, generator=generator, dtype=torch.float64)).Q.mT
                read = read_back(upright, values)
                errors |= {
                    f"{rule}, orthogonal keys": (read[rule] - values).square().sum(-1) for rule in ("sum", "delta")
                }
            found[str(d)][str(m)] = {
                "error": {rule: interval(each.mean(1)) for rule, each in errors.items()},
                "named": {rule: interval(each.double().mean(1)) for rule, each in named.items()},
                "expected": {
                    "sum": round((m - 1) / d, 5),
                    "sum, best factor": round((m - 1) / (d + m - 1), 5),
                    "delta": round(delta_law(m, d), 5),
                    "least squares": round(max(0, 1 - d / m), 5),
                },
            }
    return found


# --- overwriting ---------------------------------------------------------------------------------------------------


def overwriting(draws: int) -> dict[str, Any]:
    """How much of the old and of the new value is read, by the number of writes between them; and how long one lasts.

    The read is laid out along the two values, which are orthogonal: 1 is the whole value. Means and standard deviations
    over draws.
    """
    d, generator = OVERWRITTEN, torch.Generator().manual_seed(0)
    rules: dict[str, dict[str, Any]] = {
        "sum": {},
        "decay": {"decay": DECAY},
        "delta": {"beta": 1.0},
        "delta, β = 1/2": {"beta": 0.5},
        "delta and decay": {"beta": 1.0, "decay": DECAY},
        "softmax": {},
    }
    found: dict[str, Any] = {
        "between": list(BETWEEN),
        "rules": {rule: {"old": [], "new": [], "kept": []} for rule in rules},
    }
    for n in BETWEEN:
        keys = F.normalize(torch.randn(draws, n + 2, d, generator=generator, dtype=torch.float64), dim=-1)
        values = F.normalize(torch.randn(draws, n + 2, d, generator=generator, dtype=torch.float64), dim=-1)
        values[:, 0], values[:, -1] = torch.eye(d, dtype=torch.float64)[:2]
        twice = keys.clone()
        twice[:, -1] = keys[:, 0]
        for rule, how in rules.items():
            read = _read(rule, twice, values, **how)
            once = _read(rule, keys[:, :-1], values[:, :-1], **how)
            for what, each in (("old", read[:, 0]), ("new", read[:, 1]), ("kept", once[:, 0])):
                found["rules"][rule][what].append([round(each.mean().item(), 4), round(each.std().item(), 4)])
    return found


def _read(rule: str, keys: Tensor, values: Tensor, beta: float | None = None, decay: float | None = None) -> Tensor:
    """What the first key reads in the end, (T, d)."""
    first = keys[:, None, :1]
    k, v = keys[:, None], values[:, None]
    if rule == "softmax":
        return attention(first, k, v, scale=4 * math.sqrt(keys.shape[2]))[:, 0, 0]
    _, state = linear_attention(
        k,
        k,
        v,
        beta=None if beta is None else torch.full(k.shape[:3], beta, dtype=k.dtype),
        log_decay=None if decay is None else torch.full((1,), math.log(decay), dtype=k.dtype),
    )
    return (first @ state)[:, 0, 0]


# --- what is trained -----------------------------------------------------------------------------------------------


def merit(result: dict[str, Any]) -> float:
    """By which rates are chosen, the lower the better: the loss, of parity on longer rows, of recall in training."""
    return math.inf if "failed" in result else result.get("choose", result["loss"])


def swept(task: str, arm: str, rates: tuple[float, ...], steps: int, folder: Path) -> tuple[dict[float, float], float]:
    """The merit of each rate, with two at most beyond the grid where the best is at the edge; and the best rate."""
    sweep = {rate: merit(carry_out(Run(task, arm, rate, SWEEP_SEED, steps, folder))) for rate in rates}
    while True:
        best = min(sweep, key=lambda rate: sweep[rate])
        if len(rates) == 1 or len(sweep) == len(rates) + 2 or min(sweep) < best < max(sweep):
            return dict(sorted(sweep.items())), best
        rate = float(f"{best * (3 if best == max(sweep) else 1 / 3):.0e}")
        sweep[rate] = merit(carry_out(Run(task, arm, rate, SWEEP_SEED, steps, folder)))


def trained(task: str, arm: str, folder: Path, tiny: bool) -> dict[str, Any]:
    """An arm: its sweep, its rate or rates, and its runs at the best of them."""
    steps, seeds = (8, SEEDS[:1]) if tiny else (STEPS[task], SEEDS)
    sweep, rate = swept(task, arm, RATES[:1] if tiny else RATES, steps, folder)

    def runs_at(rate: float) -> list[dict[str, Any]]:
        return [carry_out(Run(task, arm, rate, seed, steps, folder)) for seed in seeds]

    found = {rate: runs_at(rate)}
    if len(sweep) > 1 and mean(map(merit, found[rate])) > sweep[rate] + UNLIKE:
        second = min((other for other in sweep if other != rate), key=lambda rate: sweep[rate])
        found[second] = runs_at(second)
    means = {rate: mean(map(merit, runs)) for rate, runs in found.items()}
    best = min(means, key=lambda rate: means[rate])
    print(task, arm, {rate: round(value, 4) for rate, value in sweep.items()}, means, best, flush=True)
    return {
        "rate": best,
        "steps": steps,
        "sweep": {str(rate): round(value, 5) for rate, value in sweep.items()},
        "tried_with_eight_seeds": {str(rate): round(value, 5) for rate, value in means.items()},
        "best_is_at_the_edge_of_the_grid": rate in (min(sweep), max(sweep)),
        "parameters": found[best][0].get("parameters"),
        "state": found[best][0].get("state"),
        "runs": [{k: x for k, x in run.items() if k not in ("rate", "parameters", "state")} for run in found[best]],
    }


def paired(arms: dict[str, Any]) -> dict[str, Any]:
    """Differences of right answers, by seed, at each number of pairs: of each arm and softmax, and of other pairs."""

    def right(arm: str, i: int) -> list[float]:
        return [run["right"][i] for run in arms[arm]["runs"]]

    couples = [(arm, "softmax") for arm in arms if arm != "softmax"]
    couples += [("delta", "linear"), ("delta", "sum"), ("sum", "linear"), ("gated", "linear")]
    return {
        f"{a} less {b}": {str(m): difference(right(a, i), right(b, i)) for i, m in enumerate(TESTED_ON)}
        for a, b in couples
        if a in arms and b in arms
    }


def beyond(arms: dict[str, Any]) -> dict[str, Any]:
    """Of parity: the share of right answers past the trained length, and its difference from that of the smaller β."""
    right = {arm: [mean(run["right"][BITS:]) for run in found["runs"]] for arm, found in arms.items()}
    others = [arm for arm in arms if arm != "delta"]
    return {
        "beyond": {arm: [round(share, 4) for share in each] for arm, each in right.items()},
        "differences": {f"{arm} less delta": difference(right[arm], right["delta"]) for arm in others},
    }


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    if tiny:
        folder = Path(tempfile.mkdtemp())
    folder = folder or cache_folder() / "runs" / "summary"
    torch.set_num_threads(1)
    if only := [x.removeprefix("--arm=") for x in options if x.startswith("--arm=")]:
        for task, arms in {**ARMS, "recall": ARMS["recall"] + BY_WIDTH}.items():
            for arm in (arm for arm in arms if arm in only):
                trained(task, arm, folder, tiny)
        return
    recall, parity = ({arm: trained(task, arm, folder, tiny) for arm in ARMS[task]} for task in ("recall", "parity"))
    by_width = {arm: trained("recall", arm, folder, tiny) for arm in BY_WIDTH}
    figures: dict[str, Any] = {
        "law": law(4 if tiny else DRAWS),
        "overwriting": overwriting(4 if tiny else DRAWS),
        "parity": {"arms": parity, **beyond(parity)},
        "recall": {"arms": recall, "differences": paired(recall), "by_width": by_width},
        "settings": {
            "width": WIDTH,
            "d": STATE,
            "batch": BATCH,
            "keys": KEYS,
            "values": VALUES,
            "questions": QUESTIONS,
            "trained_on": TRAINED_ON,
            "tested_on": TESTED_ON,
            "bits": BITS,
            "read": READ,
            "chosen_on": CHOSEN_ON,
            "draws": DRAWS,
            "names": NAMES,
            "overwritten": OVERWRITTEN,
            "decay": DECAY,
        },
    }
    if tiny:
        print({task: list(found) for task, found in figures.items()})
        return
    for arm, found in recall.items():
        print(arm, [round(mean(run["right"][i] for run in found["runs"]), 3) for i in range(len(TESTED_ON))])
    write("summary", "nox -s bench -- summary", figures, threads=1)
