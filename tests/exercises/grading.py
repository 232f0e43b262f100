"""Grade what a reader wrote in exercises/: one line for each exercise, done or what is not right yet.

nox -s exercises                 all of them
nox -s exercises -- mamba        those of one chapter

Each check runs the reader's function on cases that its docstring allows, and compares with what the library computes.
Where they differ, it looks for the mistakes that are made most, and names the one it finds.
"""

import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checks_of_contexts as contexts
import checks_of_decoding as decoding
import checks_of_depth as depth
import checks_of_fading as fading
import checks_of_images as images
import checks_of_meeting as meeting
import checks_of_memories as memories
import checks_of_pairs as pairs
import checks_of_roles as roles
import checks_of_sequences as sequences
import checks_of_texts as texts
import checks_of_ticks as ticks
import torch
from checking import NotYetError

FOLDER = Path(__file__).parent.parent.parent / "exercises"

CHECKS: dict[str, dict[str, Callable[[Callable[..., Any]], None]]] = {
    "self_attention": {"largest": sequences.check_largest},
    "flash_attention": {"join": sequences.check_join},
    "mamba": {"steps": sequences.check_steps, "in_pieces": sequences.check_in_pieces},
    "positional_encoding": {"onward": sequences.check_onward},
    "heads": {"added": sequences.check_added},
    "attention_mechanism": {"read": sequences.check_read},
    "recurrent": {"forget_bias": sequences.check_forget_bias},
    "evolution": {"effective_keys": sequences.check_effective_keys},
    "linear_attention": {"overwrite": sequences.check_overwrite},
    "in_context_learning": {"matrices": contexts.check_matrices},
    "in_context_real": {"put": contexts.check_put},
    "recognition_aim": {"recall": contexts.check_recall},
    "continuous": {"antisymmetric_share": roles.check_antisymmetric_share, "step": roles.check_step},
    "head_fusion": {"fused": meeting.check_fused},
    "proposals": {"interval": pairs.check_interval},
    "self_liberating": {"kept": fading.check_kept},
    "ctm": {"one_tick": ticks.check_one_tick, "when_to_stop": ticks.check_when_to_stop},
    "denseformer": {"without": depth.check_without, "average": depth.check_average},
    "ttt": {"dual": memories.check_dual},
    "bytes": {"spread": texts.check_spread},
    "sparse_attention": {"two_layers": sequences.check_two_layers},
    "gpt_family": {"step": decoding.check_step, "prefix_mask": decoding.check_prefix_mask},
    "clip": {"symmetric_loss": images.check_symmetric_loss, "class_weights": images.check_class_weights},
    "flamingo": {"may_attend": images.check_may_attend},
    "llava": {"spliced": images.check_spliced, "expanded_labels": images.check_expanded_labels},
    "vit": {"cut": images.check_cut, "mean_distance": images.check_mean_distance},
}


def verdict(check: Callable[[Callable[..., Any]], None], function: Callable[..., Any] | None) -> str:
    """Whether an exercise is done, and if not, why."""
    if function is None:
        return "not yet: the function is not in the file any more; git can bring it back"
    try:
        check(function)
    except NotImplementedError as todo:
        return f"not yet begun: {todo}"
    except NotYetError as fault:
        return f"not yet: {fault}"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).stem in CHECKS]
        where = f" at line {lines[-1]}" if lines else ""
        return f"not yet: it stops{where} with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return "done"


def grade(chapters: list[str], folder: Path = FOLDER) -> list[str]:
    """A line for each exercise of these chapters."""
    lines = []
    for chapter in chapters:
        try:
            written = runpy.run_path(str(folder / f"{chapter}.py"))
        except Exception as error:
            lines.append(f"{chapter}: not yet: the file does not run: {type(error).__name__}: {error}")
            continue
        lines += [f"{chapter}, {name}: {verdict(check, written.get(name))}" for name, check in CHECKS[chapter].items()]
    return lines


def main(arguments: list[str]) -> int:
    if unknown := [chapter for chapter in arguments if chapter not in CHECKS]:
        print(f"There are no exercises for {', '.join(unknown)}; there are some for {', '.join(CHECKS)}.")
        return 2
    torch.set_num_threads(1)
    print("\n".join(grade(arguments or list(CHECKS))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
