"""Every kernel of the delta rule, in every line of its table of tiles, compiled for chips that are not here.

`nox -s bench -- linear_compile`; the options are in benchmarks/compiled.py. --brief keeps the widths that are each line
of the table once. Linear attention without the delta rule runs on the kernels of state space duality: ssd_compile.
"""

import sys

import torch

from benchmarks import compiled
from benchmarks.compiled import Case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = ((64, 64), (128, 128), (256, 256))  # D and Dv, each of them a column of the table; Gated DeltaNet has the last
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def cases(target: str, brief: bool = False):
    """What the launchers ask for on a chip: bfloat16 with resets, at each width.

    On "sm_90" also without resets, called "bare", in float16, and in float32, whose tiles are the same on every chip.
    `brief` leaves out what is no line of the table.
    """
    from nondual.ops.linear_attention import triton as kernels

    wanted = [("bf16", size, True) for size in SIZES]
    if target == "sm_90":
        wanted += [] if brief else [("bf16", (128, 128), False)]
        wanted += [("fp16", (64, 64), True), ("fp32", (64, 64), True)]
    for label, (d, v), reset in wanted:
        for name in kernels.KERNELS:
            chunk = kernels.CHUNK["float32" if label == "fp32" else "half"]
            config = kernels.configuration(name, target, d, v, DTYPES[label], chunk)
            warps, stages = config.pop("num_warps"), config.pop("num_stages")
            function = getattr(kernels, f"{name}_kernel")
            constants = {"RESET": reset, "D": d, "V": v} | config
            size = f"{name} D{d} Dv{v} {label}{'' if reset else ' bare'}"
            yield Case(size, function, types(function, label), constants, warps, stages)


def types(kernel, label: str) -> dict[str, str]:
    """Triton's type for each argument, by its name."""
    narrow = {f"p_{name}" for name in ("q", "k", "v", "dy", "t", "w", "u", "du", "y", "dq", "dk", "dv")}
    states = {"p_states", "p_grads"}  # in bfloat16 with it, in float32 else

    def kind(name: str) -> str:
        if not name.startswith("p_"):
            return "fp32" if name == "factor" else "i32"
        if name == "p_start":
            return "*i32"
        return f"*{label}" if name in narrow or (name in states and label == "bf16") else "*fp32"

    return {name: kind(name) for name in kernel.arg_names}


def configuration(case: Case) -> dict:
    """What a row says of a case's tiles."""
    sizes = [case.constants[name] for name in ("CHUNK", "BLOCK_D", "BLOCK_V")]
    return {"tiles": [*sizes, case.warps, case.stages]}


def main(options: list[str]) -> None:
    """Write docs/measured/linear_compile.json, or print it."""
    compiled.main("linear_compile", cases, configuration, options, targets=TARGETS)


if __name__ == "__main__":
    main(sys.argv[1:])
