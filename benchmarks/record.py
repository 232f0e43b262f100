"""A measurement as a file: the figures, and everything one needs to take them again."""

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

MEASURED = Path(__file__).parent.parent / "docs" / "measured"


def _now() -> float:
    """The clock, once all that a GPU was told to do is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(
    runs: dict[str, Callable[[], object]], rounds: int = 15, clock: Callable[[], float] = _now
) -> dict[str, list[float]]:
    """Seconds of each run in each round, the runs taking turns, so that a busy machine slows all alike.

    With time.process_time for the clock they are the processor's, in which other programs have no part.
    """
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return times


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """The median of the rounds' ratios and their quartiles, rounded."""
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    quarter = len(ratios) // 4
    return {
        "median": round(median(ratios), 3),
        "low": round(ratios[quarter], 3),
        "high": round(ratios[-1 - quarter], 3),
    }


def values_of(options: list[str]) -> dict[str, str]:
    """The options of a benchmark that have a value, `--name=value`, by name."""
    return dict(option.removeprefix("--").split("=", 1) for option in options if "=" in option)


def run_file(folder: Path, *parts: object) -> Path:
    """Where one run is kept: what tells it from other runs, joined by underscores, without spaces and commas."""
    name = "_".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)
    return folder / f"{name}.json".replace(" ", "-").replace(",", "")


def keep(file: Path, result: dict[str, Any]) -> None:
    """Write what one run ended with, so that the file's name never stands for a part of it."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result, ensure_ascii=False))
    os.replace(part, file)


def kept(file: Path, measure: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """What the file has; where there is none, what measure(*given) gives now, and kept there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        keep(file, measure(*given))
    return json.loads(file.read_text())


def write(name: str, command: str, figures: dict, *, device: str = "cpu", **more) -> None:
    """docs/measured/<name>.json: the figures, with device, versions, commit, command and date.

    `command` is the one by which a reader measures again, `nox -s bench -- NAME`; tests/test_measured.py looks for it.
    """
    commit, changed = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "src", "benchmarks")
    record = {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **_driver(device)},
        "commit": commit + ("+changes" if changed else ""),
        "command": command,
        "date": datetime.date.today().isoformat(),
        **more,
        "figures": figures,
    }
    path = MEASURED / f"{name}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(path.relative_to(MEASURED.parent.parent))
    if changed:
        print("  measured with changes that no commit has: commit src and benchmarks, and measure again")


def _git(*arguments: str) -> str:
    """What git says, run where these files are."""
    ran = subprocess.run(
        ["git", *arguments], cwd=MEASURED.parent.parent, capture_output=True, text=True, check=True, timeout=60
    )
    return ran.stdout.strip()


def _driver(device: str) -> dict[str, str]:
    """The version of a GPU's driver, where its own tool tells it."""
    if device != "cuda":
        return {}
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        ran = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=60)
        return {"driver": ran.stdout.split()[0]}
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}


def processor() -> str:
    """The processor's own name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
