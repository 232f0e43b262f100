"""A transformer trained on three tasks alone: does it answer a new task with the stored one that fits best?

The transformer, its training, its sweep of rates and its tests are those of `in_context`; only the number of tasks
differs. On new tasks and on stored ones the distance of its answers is taken from those of stored tasks (Bayes' rule
with the three tasks as its prior), of ridge, of least squares and of steps of gradient descent.

    nox -s bench -- in_context_few           some fifteen minutes of one core
    nox -s bench -- in_context_few --tiny    a few steps of a few, which writes nothing to docs/measured

A run is kept as it ends, in `runs/in_context` of the cache folder or in --runs=FOLDER: call again, and it goes on.
"""

import tempfile
from pathlib import Path

import torch

from benchmarks.in_context import arm, judged
from benchmarks.in_context_run import LENGTH, MAPPED, TESTED, D
from benchmarks.record import write
from nondual.store import cache_folder

TASKS = 3


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    if tiny:
        folder = Path(tempfile.mkdtemp())
    torch.set_num_threads(1)
    few = {str(TASKS): arm(f"functions {TASKS}", folder or cache_folder() / "runs" / "in_context", tiny)}
    figures = {
        "arms": few,
        "judged": judged(few),
        "settings": {"d": D, "length": LENGTH, "mapped": MAPPED, "tested": TESTED},
    }
    if tiny:
        print(list(figures))
        return
    write("in_context_few", "nox -s bench -- in_context_few", figures, threads=1)
