"""One run of `in_context`: a small model, trained once, and what it says beside predictors in closed form.

    functions 16       a transformer that reads examples of linear functions, trained on 16 tasks; with 0, on endless
    layer 32           one layer of linear attention with all its matrices free, trained on 32 tasks; likewise
    coins 4            a transformer that reads flips of coins whose bias is drawn from Beta(4, 4)

A task is a vector of weights. Each seed has its own table of tasks, its own first weights and its own batches.
"""

import itertools
import json
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.record import keep
from nondual.language_models.gpt import GPT
from nondual.language_models.in_context_learning import (
    DescentByAttention,
    InContextRegressor,
    coins,
    curriculum,
    errors,
    fingerprint,
    gradient_descent,
    least_squares,
    optimal_matrix,
    predict,
    prompts,
    ridge,
    stored_tasks,
)
from nondual.language_models.in_context_learning.functions import (
    Functions,
    Inputs,
    Prompts,
    dense,
    linear,
    normal,
    quadratic,
    relu_network,
    sparse,
    stored,
)
from nondual.training import optimiser, train

D, NOISE, LENGTH, LONGEST = 5, 0.25, 16, 32
"""Inputs; the noise of the answers; the examples of a prompt in training, and when tested."""
WIDTH, LAYERS, HEADS, BATCH = 32, 3, 2, 32
FIRST = {"dims": (2, D), "lengths": (6, LENGTH), "rises": 0.3}
"""The curriculum."""
TESTED = 1000
PENALTY = D * NOISE**2
"""With which ridge is the mean of w given the examples: σ² over the variance of a weight, 1/D."""
DESCENT = (1, 2, 3, 5, 10)
"""After how many steps of gradient descent."""
MAPPED = 6
"""After how many examples models are put on the map of three corners."""
LAYER_D, LAYER_N, LAYER_NOISE, LAYER_BATCH, LAYER_QUESTIONS = 16, 64, 0.25, 64, 16
FLIPS, LONGEST_FLIPS, COIN_WIDTH, COIN_BATCH, COINS = 32, 256, 32, 64, 1000

FAMILIES: dict[str, dict[str, Any]] = {
    "as trained": {},
    "one input counts": {"functions": linear(sparse(1))},
    "weights three times as large": {"functions": linear(lambda b, d, g: 3 * dense(b, d, g))},
    "inputs shifted by 1": {"inputs": partial(normal, mean=1.0)},
    "inputs twice as large": {"inputs": partial(normal, scale=2.0)},
    "a ReLU network": {"functions": relu_network(8)},
    "squares of the inputs": {"functions": quadratic},
}
"""Families of functions and inputs that a model is tested on."""


class Run(NamedTuple):
    """One model, trained once, and where its result is kept."""

    task: str
    rate: float
    seed: int
    steps: int
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / f"{self.task.replace(' ', '-')}_{self.rate}_{self.seed}_{self.steps}.json"

    @property
    def count(self) -> int:
        """How many tasks there are, 0 for endless ones; of coins, a and b of their Beta."""
        return int(self.task.split()[1])


def carry_out(run: Run) -> dict[str, Any]:
    """Train from the beginning, unless it was done before; keep the result."""
    if not run.file.exists():
        torch.manual_seed(run.seed)
        try:
            result = {"functions": functions, "layer": layer, "coins": of_coins}[run.task.split()[0]](run)
        except FloatingPointError as error:  # a rate that is too high
            result = {"loss": float("inf"), "failed": str(error)}
        run.folder.mkdir(parents=True, exist_ok=True)
        keep(run.file, {"rate": run.rate, "seed": run.seed, **result})
    return json.loads(run.file.read_text())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(run: Run, d: int) -> Tensor | None:
    """The run's tasks (M, D); None for endless ones."""
    return dense(run.count, d, seeded(1000 + run.seed)) if run.count else None


def family(tasks: Tensor | None) -> Functions:
    return linear() if tasks is None else linear(stored(tasks))


def rounded(values: Tensor, digits: int = 5) -> list[float]:
    return [round(value, digits) for value in values.tolist()]


# --- a transformer on functions ------------------------------------------------------------------------------------


def functions(run: Run) -> dict[str, Any]:
    """Errors by the number of examples, on stored and new tasks and on other families, and distances to predictors."""
    tasks = table(run, D)
    model = InContextRegressor(D, WIDTH, LAYERS, HEADS)
    untrained = error_by_examples(model, tested(linear()))
    numbers = itertools.count()

    def draw(generator: torch.Generator) -> Prompts:
        dims, n = curriculum(next(numbers), run.steps, **FIRST)
        inputs: Inputs = partial(normal, dims=dims)
        return prompts(BATCH, n, D, functions=family(tasks), inputs=inputs, noise=NOISE, generator=generator)

    train(
        model,
        lambda batch: (model(batch.x, batch.y) - batch.y).square().mean(),
        draw,
        optimiser=optimiser(model, run.rate, decay=0.0),
        steps=run.steps,
        seed=run.seed,
        log_every=run.steps,
        name=None,
    )
    model.eval()
    own = error_by_examples(model, tested(family(tasks), seed=8))  # other prompts than those that are reported
    before = fingerprint(model)
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss": round(own[:LENGTH].mean().item(), 5),
        "untrained": rounded(untrained),
        "errors": {name: rounded(error_by_examples(model, tested(**given))) for name, given in FAMILIES.items()},
    }
    if tasks is not None:
        result["stored"] = rounded(error_by_examples(model, tested(family(tasks))))
    result["distances"] = {
        "new": distances(model, tested(linear()), tasks),
        **({} if tasks is None else {"stored": distances(model, tested(family(tasks)), tasks)}),
    }
    result["map"] = on_the_map(said_at(model, tested(linear())), tested(linear()), tasks)
    return result | {"unchanged": fingerprint(model) == before}


def tested(functions: Functions | None = None, inputs: Inputs = normal, seed: int = 7) -> Prompts:
    """The prompts that every model is tested on."""
    return prompts(TESTED, LONGEST, D, functions=functions, inputs=inputs, noise=NOISE, generator=seeded(seed))


@torch.no_grad()
def error_by_examples(model: nn.Module, given: Prompts) -> Tensor:
    """The mean square error after 0 to LONGEST - 1 examples, without the noise of the answer: (LONGEST,)."""
    return (model(given.x, given.y) - given.target).square().double().mean(0)


def predictors(given: Prompts, tasks: Tensor | None) -> dict[str, Tensor]:
    """What each predictor says of the same prompts, (B, N)."""
    weights = {
        "ridge": ridge(given.x, given.y, PENALTY),
        "least squares": least_squares(given.x, given.y),
        **{f"descent {k}": gradient_descent(given.x, given.y, steps=k, rate=best_rates(k)) for k in DESCENT},
    }
    if tasks is not None:
        weights["stored tasks"] = stored_tasks(given.x, given.y, tasks, NOISE)
    return {name: predict(w, given.x) for name, w in weights.items()}


RATES_OF_DESCENT = [0.03 * 1.2**i for i in range(22)]


@cache
def best_rates(steps: int) -> Tensor:
    """For each number of examples the rate with which so many steps have the least error on other prompts."""
    given = prompts(2000, LONGEST, D, noise=NOISE, generator=seeded(9))

    def error(rate: float) -> Tensor:
        w = gradient_descent(given.x, given.y, steps=steps, rate=rate)
        return (predict(w, given.x) - given.target).square().mean(0)

    best = torch.stack([error(rate) for rate in RATES_OF_DESCENT]).nan_to_num(torch.inf).argmin(0)
    return torch.tensor(RATES_OF_DESCENT)[best]


@torch.no_grad()
def distances(model: nn.Module, given: Prompts, tasks: Tensor | None) -> dict[str, list[float]]:
    """The mean square difference of what the model and each predictor say, by the number of examples."""
    said = model(given.x, given.y)
    return {name: rounded((said - other).square().mean(0)) for name, other in predictors(given, tasks).items()}


@torch.no_grad()
def said_at(model: nn.Module, given: Prompts) -> Tensor:
    """What a model says after MAPPED examples: (B,)."""
    return model(given.x, given.y)[:, MAPPED].double()


def on_the_map(said: Tensor, given: Prompts, tasks: Tensor | None) -> dict[str, Any]:
    """Shares of three corners, which sum to 1, whose mixture is nearest to what a model says; and what is left over.

    The corners: stored tasks (of a table of 16 where the model has none), ridge, and one step of descent at the best
    rate for so many examples. What is left over is the mean square difference from the best mixture.
    """
    tasks = dense(16, D, seeded(1000)) if tasks is None else tasks
    first = torch.arange(LONGEST) == MAPPED
    corners = torch.stack(
        [
            predict(stored_tasks(given.x, given.y, tasks, NOISE), given.x)[:, first],
            predict(ridge(given.x, given.y, PENALTY), given.x)[:, first],
            predict(gradient_descent(given.x, given.y, steps=1, rate=one_step(MAPPED)), given.x)[:, first],
        ]
    )[..., 0]  # (3, B)
    apart = (corners[1:] - corners[0]).mT  # (B, 2): the plane through the corners
    solved = torch.linalg.lstsq(apart, (said - corners[0])[:, None]).solution[:, 0]
    nearest = corners[0] + apart @ solved
    return {
        "shares": rounded(torch.cat([1 - solved.sum()[None], solved]), 4),
        "left over": round((said - nearest).square().mean().item(), 5),
        "distances": rounded((corners - said).square().mean(1)),
        "sides": rounded((corners - corners.roll(1, 0)).square().mean(1)),
        "error": round((said - given.target[:, MAPPED]).square().mean().item(), 5),
    }


def one_step(n: int, d: int = D, noise: float = NOISE) -> float:
    """The rate with which one step from n examples has the least error, for w from N(0, I/D)."""
    return 1 / (1 + 1 / n + d * (1 + noise**2) / n)


# --- one layer of linear attention ---------------------------------------------------------------------------------


def layer(run: Run) -> dict[str, Any]:
    """Trained on tasks: errors on stored and on new ones, beside those of the exact optimum. Endless: on the map."""
    d, n, noise = (LAYER_D, LAYER_N, LAYER_NOISE) if run.count else (D, MAPPED, NOISE)
    tasks = table(run, d)
    model = DescentByAttention(d, n=n, steps=1, rate=1.0)
    for name, matrix in model.named_parameters():
        with torch.no_grad():
            matrix.normal_(std=(1 / n if "out_proj" in name else 1) / (d + 1) ** 0.5)

    def draw(generator: torch.Generator) -> Prompts:
        size = n + LAYER_QUESTIONS
        return prompts(LAYER_BATCH, size, d, functions=family(tasks), noise=noise, generator=generator)

    def off(batch: Prompts) -> Tensor:
        return (model(batch.x[:, :n], batch.y[:, :n], batch.x[:, n:]) - batch.target[:, n:]).square().mean()

    train(
        model,
        off,
        draw,
        optimiser=optimiser(model, run.rate, decay=0.0),
        steps=run.steps,
        seed=run.seed,
        log_every=run.steps,
        name=None,
    )
    with torch.no_grad():
        found = {
            name: off(prompts(4000, n + 16, d, functions=functions, noise=noise, generator=seeded(7))).item()
            for name, functions in {"stored": family(tasks), "new": linear()}.items()
        }
    if tasks is not None:
        exact = errors(optimal_matrix(tasks, n, noise), tasks, n, noise)
        return {"loss": round(found["stored"], 5), **found, "exact stored": exact.stored, "exact new": exact.new}
    given = tested(linear())
    with torch.no_grad():
        said = model(given.x[:, :n], given.y[:, :n], given.x[:, n : n + 1])[:, 0].double()
    return {"loss": round(found["new"], 5), **found, "map": on_the_map(said, given, tasks)}


# --- coins ---------------------------------------------------------------------------------------------------------


def coin_model() -> GPT:
    """A GPT without positions, which reads sequences of any length."""
    return GPT(coins.VOCABULARY, COIN_WIDTH, 2, 2)


def of_coins(run: Run) -> dict[str, Any]:
    """The divergence from the exact probability after 0 to LONGEST_FLIPS flips, of the own prior and of the other."""
    model, prior = coin_model(), float(run.count)
    test = {other: coins.flips(COINS, LONGEST_FLIPS, a=other, b=other, generator=seeded(7)) for other in PRIORS}
    with torch.no_grad():
        untrained = coins.divergence(coins.posterior_predictive(test[prior], a=prior, b=prior), model(test[prior]))
    train(
        model,
        model.loss,
        lambda generator: coins.flips(COIN_BATCH, FLIPS, a=prior, b=prior, generator=generator),
        optimiser=optimiser(model, run.rate, decay=0.0),
        steps=run.steps,
        seed=run.seed,
        log_every=run.steps,
        name=None,
    )
    model.eval()
    before = fingerprint(model)
    held_out = coins.flips(COINS, FLIPS, a=prior, b=prior, generator=seeded(8))
    with torch.no_grad():
        loss = coins.divergence(coins.posterior_predictive(held_out, a=prior, b=prior), model(held_out)).mean().item()
        said = model(test[prior])
    far = {
        f"from Beta({other:g}, {other:g})": rounded(
            coins.divergence(coins.posterior_predictive(test[prior], a=other, b=other), said).mean(0), 7
        )
        for other in PRIORS
    }
    exact = coins.posterior_predictive(test[prior], a=prior, b=prior)
    never = torch.stack([1 - exact[:, :1], exact[:, :1], torch.zeros(COINS, 1)], -1).log()
    return {
        "loss": loss,
        "untrained": rounded(untrained.mean(0)),
        "divergence": far,
        "of a belief that never moves": rounded(coins.divergence(exact, never.expand(-1, exact.shape[1], -1)).mean(0)),
        "unchanged": fingerprint(model) == before,
    }


PRIORS = (1.0, 4.0)
"""a and b of the two priors."""
