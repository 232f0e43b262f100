"""A benchmark of several stages, each of several parts, that goes on where it was stopped."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import keep
from nondual.store import cache_folder


def carried_out(
    source: str, stages: Mapping[str, Sequence[Any]], ask: Callable[[str, Any], Any], tiny: bool
) -> dict[str, Any]:
    """What each part of each stage found; what this version of the benchmark has found before is only read.

    Args:
        source: the benchmark's file, by whose hash what it found is kept.
        stages: their parts, by name.
        ask: (stage, part) -> what is found.
        tiny: keep nothing.
    """
    file = Path(source)
    folder = cache_folder() / "runs" / f"{file.stem}-{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    found: dict[str, Any] = {}
    for stage, parts in stages.items():
        found[stage] = {}
        for part in parts:
            kept = folder / f"{stage}_{part}.json"
            if tiny:
                found[stage][str(part)] = ask(stage, part)
                continue
            if not kept.exists():
                folder.mkdir(parents=True, exist_ok=True)
                keep(kept, ask(stage, part))
                print(stage, part, flush=True)
            found[stage][str(part)] = json.loads(kept.read_text())
    return found
