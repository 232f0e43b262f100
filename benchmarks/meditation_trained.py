"""Is attention a weighting or a spotlight: soft, hard and fixed weights trained on small tasks.

The models and tasks are those of `proposals_run`: two causal layers of width 64 with four heads. The arms differ in
what stands between the scores and the values, and in nothing else:

    soft              the softmax of the scores
    hard              the largest score has the weight 1; no gradient reaches the scores
    straight-through  the same weights, with the gradient of the softmax (Bengio et al. 2013, 1308.3432)
    sampled           one key is drawn by the softmax; scores learn by the score function, as hard attention in Xu et
                      al. 2015 (1502.03044), with the mean loss of the batch's other sequences as baseline
    fixed             the softmax of a learned table of scores by position, the same for every input: the random
                      Synthesizer of Tay et al. 2020 (2005.00743), section 3.2; queries and keys are not used

What was sampled in training is judged by its largest score. "soft, judged hard" is the soft model judged so too. The
learning rate of each arm is the best of a sweep with another seed; arms of one seed start alike and see the same data.

    nox -s bench -- meditation_trained

Some 2 minutes of one core. Each run is kept in runs/meditation_trained of the cache folder. --tiny takes two steps
of each and keeps nothing.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.meditation import interval
from benchmarks.proposals_run import HEADS, TASKS, Arm, Reader, judged
from benchmarks.record import kept, run_file, write
from benchmarks.steps import steps_of_training
from nondual.ops import masks
from nondual.ops.attention import masked_softmax
from nondual.store import cache_folder

STEPS = {"recall": 200, "copy": 200}
RATES = (0.003, 0.01, 0.03)
SEEDS, TUNING = (0, 1, 2, 3), 100
LENGTH = 32
"""The longest sequence of these tasks, which the fixed table must hold."""


class Weighting(nn.Module):
    """Attention whose weights are made of its scores by `weigh`; `log_prob` (B,) is what a drawing adds up."""

    def __init__(self, weigh: Callable[[Tensor], tuple[Tensor, Tensor | None]], *, fixed: bool = False):
        super().__init__()
        self.weigh, self.log_prob = weigh, None
        self.table = nn.Parameter(torch.zeros(HEADS, LENGTH, LENGTH)) if fixed else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        """q, k, v (B, H, N, D) -> (B, H, N, D), causal."""
        n = q.shape[2]
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if self.table is not None:
            scores = self.table[:, :n, :n].expand_as(scores)
        soft = masked_softmax(scores, masks.causal(n, device=q.device))  # (B, H, N, N)
        weights, self.log_prob = self.weigh(soft)
        return weights @ v


def one_hot(which: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).scatter(-1, which[..., None], 1.0)


def soft(weights: Tensor) -> tuple[Tensor, None]:
    return weights, None


def hard(weights: Tensor) -> tuple[Tensor, None]:
    return one_hot(weights.argmax(-1), weights), None


def straight_through(weights: Tensor) -> tuple[Tensor, None]:
    return hard(weights)[0] + weights - weights.detach(), None


def sampled(weights: Tensor) -> tuple[Tensor, Tensor | None]:
    if not torch.is_grad_enabled():
        return hard(weights)
    drawn = torch.multinomial(weights.detach().flatten(0, -2), 1).view(weights.shape[:-1])
    log_prob = weights.gather(-1, drawn[..., None]).clamp(min=1e-30).log()
    return one_hot(drawn, weights), log_prob.flatten(1).sum(1)


ARMS: dict[str, Callable[[], Weighting]] = {
    "soft": lambda: Weighting(soft),
    "hard": lambda: Weighting(hard),
    "straight-through": lambda: Weighting(straight_through),
    "sampled": lambda: Weighting(sampled),
    "fixed": lambda: Weighting(soft, fixed=True),
}


TRAINED = {"recall": tuple(ARMS), "copy": ("soft", "fixed")}


class Run(NamedTuple):
    """One model, trained once, and where its result is kept."""

    task: str
    arm: str
    rate: float
    seed: int
    steps: int
    folder: Path


def carry_out(run: Run) -> dict[str, Any]:
    """Train from the beginning, unless that was done before; keep what it ended with."""
    return kept(run_file(run.folder, run.task, run.arm, run.rate, run.seed, run.steps), trained, run)


def trained(run: Run) -> dict[str, Any]:
    """The share of right answers at the end, and what else is kept of a run."""
    began, task = time.process_time(), TASKS[run.task]()
    torch.manual_seed(run.seed)
    model = Reader(task, Arm(ARMS[run.arm]))
    losses: list[float] = []

    def drawn_loss(generator: torch.Generator) -> Tensor:
        given, answers = task.draw(task.batch, generator)
        said = model(given)[:, -answers.shape[1] :]
        each = F.cross_entropy(said.transpose(1, 2), answers, reduction="none").mean(1)  # (B,)
        losses.append(each.mean().item())
        return each.mean() + score_function(model, each.detach())

    for _ in steps_of_training(model, drawn_loss, run.rate, run.steps, run.seed):
        pass
    ended = {
        "rate": run.rate,
        "seed": run.seed,
        "right": round(judged(model, task), 5),
        "loss": [round(x, 4) for x in losses[:: max(run.steps // 20, 1)]],
    }
    if run.arm == "soft":
        for one in model.modules():
            if isinstance(one, Weighting):
                one.weigh = hard
        ended["right, judged hard"] = round(judged(model, task), 5)
    return ended | {"seconds": round(time.process_time() - began, 1)}


def score_function(model: nn.Module, each: Tensor) -> Tensor | float:
    """What has the gradient of the drawings: their log-probabilities, each times how much worse its sequence went."""
    drawn = [one.log_prob for one in model.modules() if isinstance(one, Weighting) and one.log_prob is not None]
    if not drawn:
        return 0.0
    others = (each.sum() - each) / max(len(each) - 1, 1)
    return ((each - others) * torch.stack(drawn).sum(0)).mean()


# --- all together ----------------------------------------------------------------------------------------------------


def small_tasks(part: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """Each arm at the rate that was best with one other seed, then with all seeds; differences from soft, paired."""
    rates, seeds, steps = (RATES[2:3], SEEDS[:2], 2) if tiny else (RATES, SEEDS, STEPS[part])
    found: dict[str, Any] = {"steps": steps}
    right: dict[str, list[float]] = {}
    for arm in TRAINED[part]:
        tuning = {rate: carry_out(Run(part, arm, rate, TUNING, steps, folder)) for rate in rates}
        best = max(tuning, key=lambda rate: (tuning[rate]["right"], -tuning[rate]["loss"][-1]))
        runs = [carry_out(Run(part, arm, best, seed, steps, folder)) for seed in seeds]
        right[arm] = [run["right"] for run in runs]
        found[arm] = {"rate": best, "tuning": {f"{rate:g}": run["right"] for rate, run in tuning.items()}}
        found[arm] |= {"right": interval(right[arm]), "each": right[arm]}
        if arm == "soft":
            right["soft, judged hard"] = [run["right, judged hard"] for run in runs]
            found["soft, judged hard"] = {"right": interval(right["soft, judged hard"])}
    for arm in right:
        if arm != "soft" and "soft" in right:
            found[arm]["less soft"] = interval([a - b for a, b in zip(right[arm], right["soft"])])
    return found


def main(options: list[str]) -> None:
    torch.set_num_threads(1)
    if "--tiny" in options:
        with TemporaryDirectory() as folder:
            print("tiny", {task: list(small_tasks(task, True, Path(folder))) for task in TRAINED})
        return
    folder = cache_folder() / "runs" / "meditation_trained"
    figures = {}
    for task in TRAINED:
        figures[task] = small_tasks(task, False, folder)
        print(task, flush=True)
    setup = {"rates": RATES, "seeds": SEEDS, "steps": STEPS}
    write("meditation_trained", "nox -s bench -- meditation_trained", figures, threads=1, setup=setup)
