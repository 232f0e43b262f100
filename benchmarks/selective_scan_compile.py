"""Every selective scan kernel, compiled for four chips, and the instructions of its inner loops counted.

`nox -s bench -- selective_scan_compile`; the options are in benchmarks/compiled.py. --brief keeps Mamba's own sizes.

An element is one state of one channel at one step, (b, l, d, n). The instructions of a loop's body, as ptxas issues
them for a warp, are divided by the elements that a thread of it handles in one turn. A kernel's figure is the sum over
its loops, since every element goes through each of them once (through the first of the backward's two only where a
chunk's last STEPS steps are not computed again: 15 of 16).
"""

import re
import sys

from benchmarks import compiled
from benchmarks.compiled import Case

CHANNELS = 2048
FULL = {"D": True, "z": True, "bias": True, "reset": False, "B": 1, "C": 1}
PLAIN = {"D": False, "z": False, "bias": False, "reset": False, "B": 1, "C": 1}


def cases(target: str, brief: bool = False):
    """All that the launchers ask for, in samples; the same on every chip."""
    for label, name, states, dtype, given in samples(brief):
        kernel, signature, constants, warps, stages = arguments(name, states, dtype, given)
        yield Case(label, kernel, signature, constants, warps, stages)


def samples(brief: bool):
    """(name of the case, kernel, N, dtype of u, what is given) of each."""
    for name in ("forward", "first level", "adjoint", "backward"):
        yield f"{name} N16 bf16", name, 16, "bf16", FULL
        if brief:
            continue
        for states in (3, 64, 256) if name in ("first level", "adjoint") else (1, 3, 8, 32, 64, 128, 256):
            yield f"{name} N{states} bf16", name, states, "bf16", FULL
        if name in ("forward", "backward"):
            yield f"{name} N16 fp16", name, 16, "fp16", FULL
            yield f"{name} N16 fp32", name, 16, "fp32", FULL
            yield f"{name} N16 bf16, neither D, z nor bias", name, 16, "bf16", PLAIN
            yield f"{name} N16 bf16, groups", name, 16, "bf16", FULL | {"B": 4, "C": 2}
            yield f"{name} N16 bf16, B and C constant", name, 16, "bf16", FULL | {"B": 0, "C": 0}
        yield f"{name} N16 bf16, resets", name, 16, "bf16", FULL | {"reset": True}
    yield "pass", "pass", 16, "bf16", FULL


def arguments(name: str, states: int, dtype: str, given: dict):
    """The kernel, Triton's type of each argument, the constants, warps and stages."""
    from nondual.ops.selective_scan import triton as scan

    kernel = {"first level": scan.forward_kernel}.get(name) or getattr(scan, f"{name}_kernel")
    if name == "pass":
        constants = {"REVERSE": False, "BLOCK": 256, "num_warps": 4, "num_stages": 1}
    else:
        constants = scan.configuration("forward" if name == "first level" else name, states)
        sizes = {
            "S_U": CHANNELS,
            "S_DELTA": CHANNELS,
            "S_Z": 2 * CHANNELS,
            "S_DY": CHANNELS,
            "D": CHANNELS,
            "N": states,
        }
        sizes |= {"B_GROUPS": given["B"], "C_GROUPS": given["C"], "GROUPS": max(1, given["B"], given["C"])}
        constants |= sizes | {"SOFTPLUS": True, "CHUNK": scan.CHUNK}
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    absent = {"p_start", "p_initial"} if name == "forward" else {"p_initial"}
    absent |= {"p_D", "p_dD"} if not given["D"] else set()
    absent |= {"p_z", "p_ungated", "p_dz"} if not given["z"] else set()
    absent |= {"p_bias", "p_dbias"} if not given["bias"] else set()
    absent |= {"p_reset"} if not given["reset"] else set()
    absent |= {"p_decay"} if name == "forward" else set()
    if name == "first level":
        absent |= {"p_C", "p_D", "p_z", "p_start", "p_y", "p_ungated", "p_checkpoint"}
    constants = {x: constants[x] for x in kernel.arg_names if x in constants}
    constants |= {x: None for x in kernel.arg_names if x in absent}
    return kernel, types(kernel, dtype), constants, warps, stages


def types(kernel, dtype: str) -> dict[str, str]:
    """Triton's type for each argument, by its name."""
    inputs = {"p_u", "p_delta", "p_z", "p_dy", "p_y", "p_du", "p_ddelta", "p_dz"}
    own = {"p_reset": "*u8", "p_ungated": "*fp32" if dtype == "fp16" else f"*{dtype}"}
    return {
        name: own.get(name, f"*{dtype}" if name in inputs else "*fp32" if name.startswith("p_") else "i32")
        for name in kernel.arg_names
    }


def loops(sass: str) -> list[list[str]]:
    """The instructions of each innermost loop: from where a branch goes back to, to the branch."""
    lines = [(int(at, 16), text.strip()) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", sass)]
    found = []
    for at, text in lines:
        back = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if back and int(back[1], 16) < at:
            found.append((int(back[1], 16), at))
    inner = [x for x in found if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in found)]
    return [[text for at, text in lines if low <= at <= high] for low, high in inner]


def per_element(sass: str, constants: dict, warps: int) -> list[float]:
    """Instructions for an element in each loop that walks STEPS steps at a time, the shortest first.

    A kernel's loop over the steps that are left over, one at a time, has no exponential for each element of STEPS
    steps: it is told by its count of them.
    """
    lanes = constants.get("BLOCK_D") or constants["D_LO"] * constants["D_HI"]
    states = constants.get("BLOCK_N") or constants["N_HI"] * constants["N_LO"]
    elements = constants["STEPS"] * lanes * states / (32 * warps)
    bodies = [body for body in loops(sass) if sum("MUFU.EX2" in text for text in body) >= elements]
    return sorted(round(len(body) / elements, 2) for body in bodies)


def configuration(case: Case) -> dict:
    """What a row says of a case's warps and of how many steps it takes in a turn."""
    return {"warps": case.warps, "steps": case.constants.get("STEPS")}


def report(case: Case, kernel) -> dict:
    """What every kernel reports but for matrix instructions, and the instructions for an element in each loop."""
    from benchmarks import aot

    row = aot.report(kernel)
    del row["tensor"]
    if case.name != "pass" and "cubin" in kernel.asm:  # the pass from chunk to chunk has no such loop
        row["per_element"] = per_element(aot.sass(kernel), case.constants, case.warps)
    return row


def main(options: list[str]) -> None:
    """Write docs/measured/selective_scan_compile.json, or print it."""
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    compiled.main("selective_scan_compile", cases, configuration, options, targets=targets, report=report)


if __name__ == "__main__":
    main(sys.argv[1:])
