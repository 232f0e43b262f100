"""Every kernel of state space duality, in every line of its table of tiles, compiled for chips that are not here.

`nox -s bench -- ssd_compile`; the options are in benchmarks/compiled.py. --brief keeps one case for each line of the
table.
"""

import sys

import torch

from benchmarks import compiled
from benchmarks.compiled import Case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = ("steps", "states", "states_back", "pass", "output", "pass_back", "rows", "columns", "steps_back")
PRODUCTS = ("states", "output", "rows", "columns")
ELSEWHERE = (("fp32", "sm_80"), ("fp32", "sm_100"))
SIZES = ((64, 128), (64, 64), (128, 128), (64, 256), (59, 111))  # P and N; the first is Mamba-2's


def cases(target: str, brief: bool = False):
    """What the launchers ask for on a chip.

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
                    yield Case(size, function, types(function, label), constants, warps, stages)


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


def configuration(case: Case) -> dict:
    """What a row says of a case's tiles."""
    sizes = [case.constants.get(name) for name in ("P", "CHUNK", "BLOCK")]
    return {"tiles": [*sizes, case.warps, case.stages]}


def main(options: list[str]) -> None:
    """Write docs/measured/ssd_compile.json, or print it."""
    compiled.main("ssd_compile", cases, configuration, options, targets=("sm_80", "sm_90", "sm_100"))


if __name__ == "__main__":
    main(sys.argv[1:])
