"""What recurrence makes wait, how far back it reaches, and how much its gates vary with what is read.

Five parts:

    chain     the most matrix products, and the most operations, that must wait for one another, against the length
    time      how many times as long a forward pass and a training step take when the length doubles; and N products of
              a state with U, one after another, against one product of the same arithmetic
    newton    a GRU's states found for all positions at once, by Newton's method: how many rounds it takes
    distance  a cue among noise that must be named at the end: six networks trained alike (recurrence_run.py), what they
              name at each distance, and how their scores change with the cue, before and after training; and the same
              networks trained without near cues. Each arm's rate: four are tried on two seeds; then, from the best on,
              on all seeds, until one is below SOLVED; those that taught nothing are left out. The one with the lowest
              mean loss is reported. All these losses are of rows that serve for nothing else
    gates     of these: the shares of a gate's variance, and how much what is kept varies from row to row

    nox -s bench -- recurrence

Trainings, and the rounds of Newton's method, are kept as they end, in `runs/recurrence` of the cache folder or in
--runs=FOLDER, and are not made again.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor, nn

from benchmarks.record import alternate, kept, ratio, write
from benchmarks.recurrence_run import (
    ARMS,
    BATCH,
    CUES,
    DISTANCES,
    FAR,
    LENGTH,
    NEAR,
    NOISE,
    SLOPES,
    WIDTH,
    Run,
    carry_out,
    draw,
    looked_at,
)
from nondual.analysis.critical_path import is_arithmetic, longest_chain
from nondual.ops.linear_recurrence import linear_recurrence, parallel, sequential
from nondual.recurrent import GRU, LSTM, RNN, RecurrentNetwork, gru_step
from nondual.self_attention import MultiHeadAttention
from nondual.store import cache_folder

STEPS, RATES, SWEEP_SEEDS, SEEDS = 400, (2e-3, 6e-3, 2e-2, 6e-2), (0, 6), {NEAR: (1, 2, 3, 4, 5), FAR: (1, 2, 3)}
SOLVED, NOTHING = 0.01, 2.0  # nats; guessing one of 8 cues costs ln 8 = 2.08
LENGTHS, D = (64, 128, 256, 512, 1024, 2048), 64
PRECISE, MOST = 1e-6, 100  # what Newton's method must come to, of a state, and in how many rounds at most


def main(options: list[str]) -> None:
    folder = next((Path(o.removeprefix("--runs=")) for o in options if o.startswith("--runs=")), None)
    folder = folder or cache_folder() / "runs" / "recurrence"
    torch.set_num_threads(1)
    setup = {"steps": STEPS, "batch": BATCH, "length": LENGTH, "cues": CUES, "noise": NOISE, "width": WIDTH}
    setup |= {"rates": RATES, "distances": DISTANCES, "gradient_at": SLOPES, "nearest": {"any": NEAR, "far": FAR}}
    reported, chosen = distance(folder, NEAR)
    figures = {
        "distance": {
            "setup": setup | {"sweep_seeds": SWEEP_SEEDS, "seeds": {"any": SEEDS[NEAR], "far": SEEDS[FAR]}},
            "any": reported,
            "far": distance(folder, FAR)[0],
        },
        "gates": {arm: gates(chosen[arm]) for arm in ("LSTM, forget bias 1", "GRU")},
        "newton": kept(folder / "newton.json", lambda: newton(chosen["GRU"][:3])),
        "chain": chain(),
        "time": times(),
    }
    write("recurrence", "nox -s bench -- recurrence", figures, threads=1)


# --- what must wait, counted ---------------------------------------------------------------------------------------


def linear(x: Tensor, run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """h_t = a_t h_{t-1} + b_t, where a_t and b_t come from x_t by one product each."""
    torch.manual_seed(0)
    a, b = nn.Linear(D, D), nn.Linear(D, D)
    return run(torch.sigmoid(a(x)), b(x), x.new_zeros(len(x), D))


def runs() -> dict[str, Callable[[Tensor], Tensor]]:
    """Each of them x (B, N, D) -> (B, N, D)."""
    torch.manual_seed(0)
    named: dict[str, Callable[[Tensor], Tensor]] = {}
    for kind in (RNN, GRU, LSTM):
        network = kind(D, D)
        named[kind.__name__] = lambda x, network=network: network(x)[0]
    named["attention"] = MultiHeadAttention(D, 1, causal=True)
    named["linear recurrence, one after another"] = partial(linear, run=sequential)
    named["linear recurrence, in parallel"] = partial(linear, run=parallel)
    return named


def chain() -> list[dict[str, Any]]:
    """The longest chains of matrix products and of operations, for each length."""
    rows = []
    named = runs()
    attention = MultiHeadAttention(D, 1, causal=True)
    named["attention"] = lambda x: attention(x, return_weights=True)[0]  # not torch's fused one, which is a single node
    for n in LENGTHS[:5]:
        x = torch.randn(1, n, D)
        for name, run in named.items():
            y = run(x)
            rows.append({"n": n, "of": name, "products": longest_chain(y), "all": longest_chain(y, is_arithmetic)})
    return rows


# --- time ----------------------------------------------------------------------------------------------------------


def times() -> dict[str, Any]:
    """How time grows from each length to the next, and one product against N."""
    growth = []
    for name, run in timed().items():
        passes: dict[str, Callable[[], object]] = {}
        for n in LENGTHS:
            x = torch.randn(1, n, D, requires_grad=True)
            passes[f"forward {n}"] = partial(without_graph, run, x.detach())
            passes[f"training {n}"] = partial(with_gradient, run, x)
        taken = alternate(passes, rounds=5)
        for kind in ("forward", "training"):
            each = [ratio(taken[f"{kind} {2 * n}"], taken[f"{kind} {n}"]) for n in LENGTHS[:-1]]
            growth.append({"of": name, "pass": kind, "growth": each})
            print(name, kind, [of["median"] for of in each], flush=True)
    n = 1024
    torch.manual_seed(0)
    u, rows, state = torch.randn(D, D) / D**0.5, torch.randn(n, D), torch.randn(1, D)

    def one_after_another() -> Tensor:
        h = state
        for _ in range(n):
            h = h @ u
        return h

    taken = alternate({"loop": one_after_another, "once": lambda: rows @ u}, rounds=25)
    return {"lengths": LENGTHS, "width": D, "growth": growth, "loop_over_once": ratio(taken["loop"], taken["once"])}


def timed() -> dict[str, Callable[[Tensor], Tensor]]:
    """Those of `runs`, and torch's own networks; linear recurrences by the operation and its engines."""
    named = runs()
    for kind in (nn.RNN, nn.GRU, nn.LSTM):
        network = kind(D, D, batch_first=True)
        named[f"torch's {kind.__name__}"] = lambda x, network=network: network(x)[0]
    for name, impl in (("one after another", "sequential"), ("in parallel", "parallel")):
        run = partial(linear_recurrence, impl=impl)
        named[f"linear recurrence, {name}"] = partial(linear, run=lambda a, b, h, run=run: run(a, b, h)[0])
    return named


def without_graph(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """A forward pass."""
    with torch.inference_mode():
        run(x)


def with_gradient(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """A forward and a backward pass."""
    torch.autograd.grad(run(x).sum(), x)


# --- Newton's method -----------------------------------------------------------------------------------------------


def newton_errors(network: GRU, x: Tensor, most: int = MOST) -> list[float]:
    """The largest error of the states after each round of Newton's method, until it is below PRECISE.

    All states are guessed at first (0). A round takes the step and its Jacobian at every position at once, from the
    guess of the state before it, and solves the linear recurrence that these give. Source: Lim et al. 2023
    (2309.12252), section 3.

    Args:
        network: of one layer and one direction, in float64.
        x: (N, I), one sequence.
        most: how many rounds at most.
    """
    u, bias = network.weight_hh_l0, network.bias_hh_l0
    given = x @ network.weight_ih_l0.T + network.bias_ih_l0

    def step(given: Tensor, h: Tensor) -> Tensor:
        return gru_step(given[None], h[None], u, bias)[0]

    slopes = torch.func.vmap(torch.func.jacrev(step, argnums=1))
    with torch.no_grad():
        states = network(x[None])[0][0]
        h, errors = torch.zeros_like(states), []
        while len(errors) < most and (not errors or errors[-1] > PRECISE):
            before = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
            a = slopes(given, before)
            h = scan(a, gru_step(given, before, u, bias) - (a @ before[..., None])[..., 0])
            errors.append((h - states).abs().max().item())
    return errors


def scan(a: Tensor, b: Tensor) -> Tensor:
    """h_t = A_t h_{t-1} + b_t for matrices A (N, H, H) and vectors b (N, H), from zero, in log₂ N rounds (doubling)."""
    reach = 1
    while reach < len(b):
        b = torch.cat([b[:reach], b[reach:] + (a[reach:] @ b[:-reach, :, None])[..., 0]])
        a = torch.cat([a[:reach], a[reach:] @ a[:-reach]])
        reach *= 2
    return b


def newton(chosen: list[Run]) -> dict[str, Any]:
    """Rounds to PRECISE by length, for the GRUs of `distance`, before and after training."""
    found: dict[str, Any] = {"precise": PRECISE, "most": MOST, "width": WIDTH, "lengths": [64, 256, 1024]}
    for name, trained in (("before", False), ("after", True)):
        rounds = []
        for run in chosen:
            network, embeddings = run.ours(trained=trained)
            row = []
            for n in found["lengths"]:
                ids, _ = draw(torch.Generator().manual_seed(run.seed), 1, n)
                errors = newton_errors(network.double(), embeddings(ids[0]).detach().double())
                row.append(len(errors) if errors[-1] <= PRECISE else None)
            rounds.append(row)
        found[name] = rounds
        print("newton", name, rounds, flush=True)
    return found


# --- distance ------------------------------------------------------------------------------------------------------


def distance(folder: Path, nearest: int) -> tuple[dict[str, Any], dict[str, list[Run]]]:
    """What is reported of the trainings, and the runs at each arm's best rate."""
    arms: dict[str, Any] = {}
    chosen: dict[str, list[Run]] = {}
    for arm in ARMS:
        swept = {}
        for rate in RATES:
            sweep = [Run(arm, nearest, rate, seed, STEPS, folder) for seed in SWEEP_SEEDS]
            for run in sweep:
                carry_out(run)
            swept[rate] = mean(run.result()["chosen_on_loss"] for run in sweep)
        finals: dict[float, list[Run]] = {}
        for rate in sorted(swept, key=swept.__getitem__):
            if finals and swept[rate] > NOTHING:
                break
            finals[rate] = [Run(arm, nearest, rate, seed, STEPS, folder) for seed in SEEDS[nearest]]
            for run in finals[rate]:
                carry_out(run)
            if mean(run.result()["chosen_on_loss"] for run in finals[rate]) < SOLVED:
                break
        losses = {rate: [run.result()["chosen_on_loss"] for run in of] for rate, of in finals.items()}
        rate = min(losses, key=lambda rate: mean(losses[rate]))
        chosen[arm] = finals[rate]
        results, looks = [run.result() for run in chosen[arm]], [looked_at(run) for run in chosen[arm]]
        arms[arm] = {
            "parameters": results[0]["parameters"],
            "sweep_loss": {str(rate): float(f"{loss:.4g}") for rate, loss in swept.items()},
            "loss_on_all_seeds": {str(rate): each for rate, each in losses.items()},
            "rate": rate,
            "rate_is_at_the_edge": rate in (min(RATES), max(RATES)),
            "commits": sorted({str(result["commit"]) for result in results}),
            "loss": [result["chosen_on_loss"] for result in results],
            "accuracy": [look["accuracy"] for look in looks],
        }
        for when in ("before", "after") if nearest == NEAR else ():
            of = [look[f"gradient_{when}"][: len(SLOPES)] for look in looks]
            curves = [[value / curve[0] for value in curve] for curve in of]
            arms[arm][f"gradient_{when}"] = [[float(f"{value:.3g}") for value in curve] for curve in curves]
            arms[arm][f"half_distance_{when}"] = [half_distance(curve) for curve in curves]
        print(arm, swept, [mean(each) for each in zip(*arms[arm]["accuracy"])], flush=True)
    last = {arm: [row[-1] for row in of["accuracy"]] for arm, of in arms.items()}
    less = {arm: difference(last["attention"], last[arm]) for arm in ARMS if arm != "attention"}
    return {"arms": arms, "attention_less_at_the_farthest": less}, chosen


def half_distance(curve: list[float]) -> float | None:
    """The distance at which a curve over SLOPES first falls below half its first value; None where it does not."""
    for (near, far), (high, low) in zip(pairwise(SLOPES), pairwise(curve)):
        if low < curve[0] / 2:
            share = math.log(2 * high / curve[0]) / math.log(high / low) if high > low > 0 else 0.0
            return round(near * (far / near) ** share, 1)
    return None


def difference(a: list[float], b: list[float], sure: float = 0.95) -> dict[str, Any]:
    """a less b, paired by seed: the mean and its interval by Student's t."""
    each = [x - y for x, y in zip(a, b, strict=True)]
    half = float(student.ppf((1 + sure) / 2, len(each) - 1)) * stdev(each) / math.sqrt(len(each))
    return {"mean": round(mean(each), 4), "interval": [round(mean(each) - half, 4), round(mean(each) + half, 4)]}


# --- gates ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def gate_of(network: RecurrentNetwork[Any], x: Tensor) -> Tensor:
    """What is kept of the state, (B, N, H): an LSTM's forget gate, a GRU's z. For one layer, read forward."""
    h = network.d_hidden
    before = torch.cat([x.new_zeros(len(x), 1, h), network(x)[0][:, :-1]], 1)
    given = x @ network.weight_ih_l0.T + network.bias_ih_l0 + before @ network.weight_hh_l0.T + network.bias_hh_l0
    return given[..., h : 2 * h].sigmoid()


def shares(gate: Tensor, ids: Tensor) -> dict[str, float]:
    """How the variance of a gate (B, N, H) divides: between units, by place, by the token read (B, N), by the rest.

    The first two are fixed beforehand; the last two come from the input, at this position or through the state.
    """
    unit = gate.mean((0, 1), keepdim=True)
    place = gate.mean(0, keepdim=True) - unit
    rest = (gate - unit - place).flatten(0, 1)
    token = torch.zeros_like(rest)
    for number in ids.unique():
        token[ids.flatten() == number] = rest[ids.flatten() == number].mean(0)
    parts = {"unit": unit - gate.mean(), "place": place, "token": token, "state": rest - token}
    sums = {name: part.square().mean().item() for name, part in parts.items()}
    return {name: round(value / sum(sums.values()), 4) for name, value in sums.items()}


def factor(gate: Tensor, span: int = 16) -> float:
    """By what factor the product of a gate over the last `span` noise positions varies from row to row.

    From the row at the first tenth to the row at the ninth, in the median over units.
    """
    kept = gate[:, -1 - span : -1].double().clamp(min=1e-300).log().sum(1)  # the last position is the question
    low, high = kept.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64), dim=0)
    return (high - low).exp().median().item()


def gates(chosen: list[Run]) -> dict[str, Any]:
    """The shares and the factor for each seed, before and after training; rows differ in cue, noise and distance."""
    found: dict[str, Any] = {"rows": 256, "span": 16}
    ids, _ = draw(torch.Generator().manual_seed(4), 256)
    for name, trained in (("before", False), ("after", True)):
        each = []
        for run in chosen:
            network, embeddings = run.ours(trained=trained)
            gate = gate_of(network, embeddings(ids).detach())
            each.append(
                {"shares": shares(gate, ids), "factor": round(factor(gate), 3), "mean": round(gate.mean().item(), 3)}
            )
        found[name] = each
        print("gates", name, each[0], flush=True)
    return found
