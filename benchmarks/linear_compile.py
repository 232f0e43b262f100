"""Every kernel of the delta rule, in every line of its table of tiles, compiled for chips that are not here.

`nox -s bench -- linear_compile`; the options are in benchmarks/compiled.py. --brief keeps the widths that are each line
of the table once. Linear attention without the delta rule runs on the kernels of state space duality: ssd_compile.
"""

import sys

import torch

from benchmarks import compiled
from benchmarks.compiled import Case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = ((64, 64), (128, 128), (256, 256), (128, 256), (59, 111))  # D and Dv; Gated DeltaNet's own are (256, 256)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def cases(target: str, brief: bool = False):
    """What the launchers ask for on a chip: with resets, and for two widths without, called "bare".

    `brief` takes three widths alone, which are each line of the table once, and but for bfloat16 one width on one chip.
    """
    from nondual.ops.linear_attention import triton as kernels

    for label, sizes in (("bf16", SIZES), ("fp16", SIZES[:1]), ("fp32", SIZES[:3])):
        for d, v in sizes:
            if brief and ((d, v) not in SIZES[:3] or (label != "bf16" and (target != "sm_90" or d != 64))):
                continue
            for bare in (False, True):
                if bare and (brief or label != "bf16" or (d, v) not in SIZES[:2]):
                    continue
                for name in kernels.KERNELS:
                    chunk = kernels.CHUNK["float32" if label == "fp32" else "half"]
                    config = kernels.configuration(name, target, d, v, DTYPES[label], chunk)
                    warps, stages = config.pop("num_warps"), config.pop("num_stages")
                    function = getattr(kernels, f"{name}_kernel")
                    constants = {"RESET": not bare, "D": d, "V": v} | config
                    size = f"{name} D{d} Dv{v} {label}{' bare' if bare else ''}"
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
