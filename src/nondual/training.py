"""Training that can be stopped and gone on with: an optimiser, a schedule, and one loop with a log and checkpoints.

    ids = torch.randint(80, (100_000,))

    def windows(generator):
        starts = torch.randint(len(ids) - 256, (8, 1), generator=generator)
        return ids[starts + torch.arange(257)]

    model = MambaLM(80, 64, 2)
    history = train(model, model.loss, windows, optimiser=optimiser(model, 3e-3), steps=1000, checkpoint="run.pt")

Sources: decoupled weight decay, Loshchilov and Hutter 2019 (1711.05101); no decay for A, the released code of Mamba;
warm-up, and the fall that follows it in the transformer, Vaswani et al. 2017 (1706.03762), equation 3; cosine,
Loshchilov and Hutter 2017 (1608.03983), equation 5; clipping, Pascanu et al. 2013 (1211.5063), algorithm 1.
"""

import contextlib
import datetime
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import nondual

Batch = TypeVar("Batch")

TIME_CONSTANTS = {"A_log", "log_A_real", "A_imag"}
"""What state space models call the parameters of A: weight decay would change how long their states last."""


def optimiser(
    model: nn.Module, rate: float, *, decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient, in the two groups of `decay_groups`.

    Args:
        model: what is trained.
        rate: the highest learning rate; `train` multiplies it by the schedule.
        decay: weight decay of the group that has it.
        betas: as in `torch.optim.AdamW`.

    Raises:
        ValueError: a rate not above 0, a decay below 0, or a model without a parameter that requires a gradient.
    """
    if not 0 < rate < math.inf:
        raise ValueError(f"rate must be above 0, got {rate}")
    return torch.optim.AdamW(decay_groups(model, decay), lr=rate, betas=betas)


def decay_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimiser, of (name, parameter) pairs: those with weight decay, and those without.

    No decay: vectors and scalars (biases, scales), embeddings (also where they are tied to the scores), the parameters
    of norms, those of A in state space models, those that their module names in an attribute `no_weight_decay`, and
    each parameter whose attribute `_no_weight_decay` is True. (`copy.deepcopy` loses attributes of parameters.)

    Raises:
        ValueError: a decay below 0, or a model without a parameter that requires a gradient.
    """
    if not 0 <= decay < math.inf:
        raise ValueError(f"decay must be 0 or more, got {decay}")
    exempt = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm))
        for parameter in module.parameters()
    }
    for module in model.modules():
        if own := getattr(module, "no_weight_decay", ()):
            exempt |= {
                id(parameter)
                for name, parameter in module.named_parameters()
                if name.removeprefix("parametrizations.").split(".")[0] in own
            }
    with_decay: list[tuple[str, nn.Parameter]] = []
    without: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            no_decay = (
                parameter.ndim < 2
                or id(parameter) in exempt
                or not TIME_CONSTANTS.isdisjoint(name.split("."))  # also "parametrizations.A_log.original"
                or getattr(parameter, "_no_weight_decay", False)
            )
            (without if no_decay else with_decay).append((name, parameter))
    if not with_decay and not without:
        raise ValueError("model must have a parameter that requires a gradient, got none")
    groups = [{"params": with_decay, "weight_decay": decay}, {"params": without, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def warmup_cosine(step: int, steps: int, *, warmup: float = 0.1, last: float = 0.1) -> float:
    """The share of the learning rate at a step: up along a line, then down along half a cosine.

    Args:
        step: 0 for the first of the steps.
        steps: how many there are.
        warmup: the share of the steps in which the rate rises; the last of these has the whole rate.
        last: the share towards which the cosine falls: the one that step `steps` would have.

    Raises:
        ValueError: a step that is not one of 0 to steps - 1, a warmup outside of [0, 1), a last outside of [0, 1].
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must lie in 0 to steps - 1, got {step} of {steps}")
    if not 0 <= warmup < 1 or not 0 <= last <= 1:
        raise ValueError(f"warmup must lie in [0, 1) and last in [0, 1], got {warmup} and {last}")
    rising = int(steps * warmup)
    if step < rising:
        return (step + 1) / rising
    return last + (1 - last) * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


def warmup_inverse_root(step: int, steps: int, *, warmup: int = 4000) -> float:
    """The share of the learning rate at a step: up along a line, then down as one over the root of the step.

    The transformer's own schedule. The paper counts steps from 1 and gives the rate itself,
    d_model^-0.5 · min(step^-0.5, step · warmup^-1.5), which is this share of a rate of 1 / √(d_model · warmup):

        schedule = partial(warmup_inverse_root, warmup=400)
        train(model, loss, draw, optimiser=optimiser(model, rate, betas=(0.9, 0.98)), steps=2000, schedule=schedule)

    Unlike the cosine, it does not depend on how many steps there are: a run can be made longer without having to begin
    again.

    Args:
        step: 0 for the first of the steps.
        steps: how many there are.
        warmup: in how many steps the rate rises; the last of these has the whole rate. A number of steps, as in the
            paper, not a share of them.

    Raises:
        ValueError: a step that is not one of 0 to steps - 1, or a warmup below 1.

    Source: 1706.03762, equation 3.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must lie in 0 to steps - 1, got {step} of {steps}")
    if warmup < 1:
        raise ValueError(f"warmup must be 1 step or more, got {warmup}")
    return min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))


def constant(step: int, steps: int) -> float:
    """The whole learning rate at every step."""
    return 1.0


def train(
    model: nn.Module,
    loss_of_batch: Callable[[Batch], Tensor],
    draw_batch: Callable[[torch.Generator], Batch],
    *,
    optimiser: torch.optim.Optimizer,
    steps: int,
    schedule: Callable[[int, int], float] = warmup_cosine,
    clip: float | None = 1.0,
    seed: int = 0,
    measure: Callable[[], Mapping[str, float]] | None = None,
    log_every: int = 50,
    log: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    arguments: Mapping[str, Any] | None = None,
    name: str | None = "training",
) -> list[dict[str, float]]:
    """Train a model for a number of steps, or go on from a checkpoint as if it had never been interrupted.

    The seed starts torch's own random numbers (dropout) and the generator that batches are drawn from. A checkpoint has
    the state of both, of the model and of the optimiser, so that a run that goes on from it ends with the same weights
    and the same history, to the bit, on the same machine and versions. Python's and NumPy's random numbers are not in
    it. A checkpoint of the last step makes the call return at once, with the trained weights in the model.

    A bar on standard error shows how far it is, where that is a terminal and tqdm is installed.

    Args:
        model: what is trained, in place. It is in training mode meanwhile, and afterwards in the mode that it had.
        loss_of_batch: a batch -> its loss, a scalar Tensor; a method of the model or a function that calls it.
        draw_batch: a generator on the CPU -> one batch, of any type, all of its randomness from the generator.
        optimiser: of the model's parameters; see `optimiser`.
        steps: how many there are in all, those before a checkpoint included.
        schedule: (step from 0, steps) -> what each learning rate is multiplied by.
        clip: the norm that all gradients together are clipped to; None to leave them as they are.
        seed: for a run that starts at the beginning.
        measure: numbers to log besides the loss, such as one on held-out data; called in evaluation mode, without
            gradients.
        log_every: after how many steps a line is logged; the last step always is.
        log: a file of JSON lines. The first is the provenance: versions, commit, device, seed, arguments, and where and
            when the run went on from a checkpoint; then one line a logged step.
        checkpoint: a file that is written whole or not at all. If it is there, the run goes on from it.
        checkpoint_every: after how many steps it is written; at the last step it always is.
        arguments: what else should stand in the provenance, such as the sizes of the model. A checkpoint made with
            others is refused. Whatever JSON can hold.
        name: what stands before the bar; None for no bar, as where several processes train at once.

    Returns:
        For each logged step: "step", from 1; "loss", the mean over the steps since the line before; "rate", the
        learning rate of the first group; "norm", that of the gradients before clipping, if clipped; what was measured.

    Raises:
        ValueError: arguments out of range, a loss that is not a scalar with a gradient, or a checkpoint of another run.
        FloatingPointError: a loss or a gradient that is not finite. The weights are those before that step.
    """
    for what, value in {"steps": steps, "log_every": log_every, "checkpoint_every": checkpoint_every}.items():
        if value < 1:
            raise ValueError(f"{what} must be 1 or more, got {value}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0, or None, got {clip}")
    told = {"steps": steps, "clip": clip, "log_every": log_every, **(arguments or {})}
    run = _Run(model, optimiser, torch.Generator().manual_seed(seed), seed, told)
    torch.manual_seed(seed)
    rates, was_training = [group["lr"] for group in optimiser.param_groups], model.training
    if checkpoint is not None and Path(checkpoint).exists():
        run.load(Path(checkpoint))
    try:
        model.train()
        with _open_log(log, run) as write, _bar(name, run.step, steps) as show:
            while run.step < steps:
                share = schedule(run.step, steps)
                for group, rate in zip(optimiser.param_groups, rates):
                    group["lr"] = rate * share
                loss, norm = _step(run, loss_of_batch, draw_batch, clip)
                run.step += 1
                run.losses.append(loss)
                if run.step % log_every == 0 or run.step == steps:
                    row = {"step": run.step, "loss": sum(run.losses) / len(run.losses), "rate": rates[0] * share}
                    row |= {} if norm is None else {"norm": norm}
                    row |= _measured(model, measure)
                    run.history.append(row)
                    run.losses.clear()
                    write(row)
                show(loss)
                if checkpoint is not None and (run.step % checkpoint_every == 0 or run.step == steps):
                    run.save(Path(checkpoint))
    finally:
        model.train(was_training)
        for group, rate in zip(optimiser.param_groups, rates):
            group["lr"] = rate
    return run.history


def _step(
    run: "_Run",
    loss_of_batch: Callable[[Batch], Tensor],
    draw_batch: Callable[[torch.Generator], Batch],
    clip: float | None,
) -> tuple[float, float | None]:
    """One step of the optimiser: the loss, and the norm of the gradients if they are clipped."""
    run.optimiser.zero_grad()
    loss = loss_of_batch(draw_batch(run.generator))
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = f"{tuple(loss.shape)} without a gradient" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_of_batch must return a scalar Tensor that has a gradient, got {found}")
    value, norm = loss.item(), None
    _check_finite("loss", value, run.step)
    loss.backward()
    if clip is not None:
        trained = [parameter for group in run.optimiser.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, clip).item()
        _check_finite("norm of the gradients", norm, run.step)
    run.optimiser.step()
    return value, norm


def _check_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {what} is {value} at step {step + 1}: try a lower learning rate or a longer warm-up"
        )


@torch.no_grad()
def _measured(model: nn.Module, measure: Callable[[], Mapping[str, float]] | None) -> dict[str, float]:
    if measure is None:
        return {}
    model.eval()
    try:
        return {key: float(value) for key, value in measure().items()}
    finally:
        model.train()


class _Run:
    """All that decides how a run goes on, and its file."""

    def __init__(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        generator: torch.Generator,
        seed: int,
        arguments: dict[str, Any],
    ):
        self.model, self.optimiser, self.generator = model, optimiser, generator
        self.step = 0
        self.losses: list[float] = []  # since the last line of the history
        self.history: list[dict[str, float]] = []
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        # Through JSON and back, so that what a checkpoint holds (lists, not tuples) compares equal.
        self.provenance = json.loads(json.dumps({**_where(device), "seed": seed, "arguments": arguments}))

    def save(self, file: Path) -> None:
        """Write the checkpoint: beside its place first, then moved there, so that it is never half written."""
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "step": self.step,
            "losses": self.losses,
            "history": self.history,
            "provenance": self.provenance,
        }
        _write_whole(file, lambda beside: torch.save(state, beside))

    def load(self, file: Path) -> None:
        """Go on from a checkpoint; refuses one of another run."""
        state = torch.load(file, map_location="cpu", weights_only=True)
        before = state["provenance"]
        now, then = ({"seed": each["seed"], **each["arguments"]} for each in (self.provenance, before))
        differing = [key for key in {**then, **now} if now.get(key) != then.get(key)]
        if differing:
            said = ", ".join(f"{key} {then.get(key)!r}, not {now.get(key)!r}" for key in differing)
            raise ValueError(f"{file} is the checkpoint of another run, with {said}: delete it, or name another file")
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        self.step, self.losses, self.history = state["step"], state["losses"], state["history"]
        here = {key: value for key, value in self.provenance.items() if key not in ("seed", "arguments")}
        self.provenance = {**before, "resumed": [*before.get("resumed", []), {"step": self.step, **here}]}


def _where(device: torch.device) -> dict[str, Any]:
    """Versions, the commit of the working folder if it is in a git checkout, the device and the date."""
    return {
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "nondual": nondual.__version__,
        },
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _commit() -> str | None:
    """The commit that is checked out here, with "+changes" where files that git tracks differ from it."""
    try:
        said = [
            subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=20).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0] + ("+changes" if said[1] else "")


@contextlib.contextmanager
def _open_log(log: str | os.PathLike[str] | None, run: _Run) -> Iterator[Callable[[Mapping[str, float]], object]]:
    """A function that logs a row. What a checkpoint holds is written first: lines of steps after it are dropped."""
    if log is None:
        yield lambda row: None
        return
    lines = "".join(json.dumps(row) + "\n" for row in [run.provenance, *run.history])
    _write_whole(Path(log), lambda beside: beside.write_text(lines, encoding="utf-8"))
    with open(log, "a", encoding="utf-8", buffering=1) as file:  # a line at a time, to be read while it trains
        yield lambda row: file.write(json.dumps(row) + "\n")


def _write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that its name never stands for a part of it, even where the process is killed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        write(beside)
        with open(beside, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _bar(name: str | None, done: int, steps: int) -> Iterator[Callable[[float], object]]:
    """A function that shows one step more; it shows nothing without a name, a terminal, or tqdm."""
    if name is None or not (sys.stderr.isatty() and find_spec("tqdm")):
        yield lambda loss: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(desc=name, initial=done, total=steps, unit="step", leave=False) as bar:

        def show(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        yield show
