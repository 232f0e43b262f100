"""`nox -s bench -- WORD ...`: the benchmark of that name, or else all whose names have the word in them; or all.

`selective_scan` is one, `scan` is that with what it compiles to and its run on a CPU. In an environment that has what
they need, `python -m benchmarks WORD ...` is the same. Commit first: a file that was measured with changes in src or
benchmarks that no commit has is refused by tests/test_measured.py.
"""

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
HELPERS = (
    "__init__",
    "__main__",
    "record",
    "aot",
    "compiled",
    "ceilings",
    "scaling",
    "intervals",
    "sweeps",
    "stages",
    "steps",
    "plays",
)
HELPERS += (
    "shakespeare_run",
    "heads_trained_run",
    "recall_run",
    "recurrence_run",
    "summary_run",
    "positions_run",
    "positions_words",
    "positions_recency",
)
HELPERS += ("spellers_words", "spellers_looks", "spellers_gates", "whisper_speech")
HELPERS += ("sparse_stream", "vit_run")
HELPERS += ("clip_data", "clip_run", "clip_judge", "clip_ship")
HELPERS += ("captions",)
HELPERS += ("ttt_run",)
HELPERS += ("in_context_run",)
HELPERS += ("depth_run",)
HELPERS += ("retrieval_run",)
HELPERS += ("ctm_run",)
HELPERS += ("bytes_run", "bytes_cuts")
HELPERS += ("proposals_run", "self_liberating_run")
HELPERS += ("assignments_smollm2", "assignments_words", "assignments_prompt", "assignments_tiny")
HELPERS += ("tantra_run",)
HELPERS += ("routing_run", "routing_read", "routing_statements")
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in HELPERS)


def chosen(word: str) -> list[str]:
    """The benchmarks that a word names."""
    return [word] if word in NAMES else [name for name in NAMES if word in name]


def main() -> None:
    asked = [word for word in sys.argv[1:] if not word.startswith("-")]
    options = [word for word in sys.argv[1:] if word.startswith("-")]
    if unknown := [word for word in asked if not chosen(word)]:
        sys.exit(f"no benchmark has {', '.join(unknown)} in its name; there are: {', '.join(NAMES)}")
    for name in dict.fromkeys(name for word in asked for name in chosen(word)) if asked else NAMES:
        importlib.import_module(f"benchmarks.{name}").main(options)


if __name__ == "__main__":
    main()
