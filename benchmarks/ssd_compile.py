"""Every kernel of state space duality, in every line of its table of tiles, compiled for chips that are not here.

`nox -s bench -- ssd_compile` needs no GPU, and some minutes. With --json it prints the figures and writes nothing;
--brief keeps one case for each line of the table; --targets=sm_90 some chips.
"""

import json
import os
import sys

import torch

from benchmarks import record

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = ("steps", "states", "states_back", "pass", "output", "pass_back", "rows", "columns", "steps_back")
PRODUCTS = ("states", "output", "rows", "columns")
ELSEWHERE = (("fp32", "sm_80"), ("fp32", "sm_100"))
SIZES = ((64, 128), (64, 64), (128, 128), (64, 256), (59, 111))  # P and N; the first is Mamba-2's


def cases(target: str, brief: bool = False):
    """(name, kernel, types, constants, warps and stages) of what the launchers ask for on a chip.

    With D, z and resets, unless it is called "bare". A head that a chip has no room for is compiled in the parts into
    which the launchers take it. float16, which alone scales its tiles, is compiled at Mamba-2's size and with twice its
    states. `brief` takes those two sizes alone, which are each line of the table once; and but for bfloat16 only what
    multiplies, float32, which has the same tiles everywhere, for one chip.
    """
    from nondual.ops.ssd import triton as kernels

    for label, sizes in (("bf16", SIZES), ("fp16", SIZES[:4:3]), ("fp32", SIZES)):
        for whole, n in sizes:
            if brief and (whole, n) not in ((64, 128), (64, 256)):
                continue
            p = -(-whole // kernels.parts_of(target, whole, n, DTYPES[label]))
            for bare in (False, True):
                if bare and (brief or (whole, n) != (64, 128)):
                    continue
                for name in KERNELS:
                    if brief and label != "bf16" and (name not in PRODUCTS or (label, target) in ELSEWHERE):
                        continue
                    kernel = "states" if name == "states_back" else name
                    config = kernels.configuration(kernel, target, p, n, DTYPES[label], kernels.CHUNK[_kind(label)])
                    warps, stages = config.pop("num_warps"), config.pop("num_stages")
                    function = getattr(kernels, f"{kernel}_kernel")
                    given = {"SKIP": not bare, "GATED": not bare, "RESET": not bare, "SOFTPLUS": not bare}
                    given |= {"BACKWARD": name == "states_back", "SHARE": 24, "PER": 3, "P": p, "N": n, "SIZE": p * n}
                    given |= {"BLOCK_PIECES": -(-p * n // kernels.PIECE)} | config
                    given["BLOCK_PIECES"] = 1 << (given["BLOCK_PIECES"] - 1).bit_length()
                    constants = {key: value for key, value in given.items() if key in function.arg_names}
                    size = f"{name} P{whole} N{n} {label}{' bare' if bare else ''}"
                    yield size, function, types(function, label), constants, warps, stages


def _kind(label: str) -> str:
    return "float32" if label == "fp32" else "half"


def types(kernel, label: str) -> dict[str, str]:
    """Triton's type for each argument, by its name."""
    inputs = {"p_x", "p_b", "p_c", "p_z", "p_dy", "p_v", "p_m", "p_y", "p_delta", "p_dx", "p_dz", "p_ddelta"}
    return {
        name: (f"*{label}" if name in inputs else "*i32" if name == "p_start" else "*fp32")
        if name.startswith("p_")
        else "i32"
        for name in kernel.arg_names
    }


def figures(targets: list[str], brief: bool = False) -> dict:
    """What the compiler made of each case on each chip, or why it did not."""
    from benchmarks import aot

    found: dict = {}
    for target in targets:
        for name, kernel, signature, constants, warps, stages in cases(target, brief):
            row = {"tiles": [constants.get("P"), constants.get("CHUNK"), constants.get("BLOCK"), warps, stages]}
            try:
                row |= aot.report(aot.compile_for(target, kernel, signature, constants, warps, stages))
            except Exception as error:  # a compiler's error has no type of its own; the tests refuse any
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            found.setdefault(name, {})[target] = row
            print(target, name, row, file=sys.stderr, flush=True)
    return found


def main(options: list[str]) -> None:
    """Write docs/measured/ssd_compile.json, or print it."""
    if os.environ.pop("TRITON_INTERPRET", "0") != "0" and "triton" in sys.modules:
        sys.exit("unset TRITON_INTERPRET: a kernel made for the interpreter cannot be compiled")
    chosen = dict(option.lstrip("-").split("=", 1) for option in options if "=" in option)
    found = figures(chosen.get("targets", "sm_80,sm_90,sm_100").split(","), "--brief" in options)
    if "--json" in options:
        print(json.dumps(found))
        return
    import triton

    record.write("ssd_compile", "nox -s bench -- ssd_compile", found, triton=triton.__version__)


if __name__ == "__main__":
    main(sys.argv[1:])
