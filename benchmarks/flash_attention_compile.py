"""Every flash attention kernel in every configuration, compiled for four chips: `python -m benchmarks flash_attention_compile`.

Needs no GPU. With --json it prints the figures and writes nothing; `--only=WORD` keeps the cases whose name has the word.
"""

import json
import os
import sys

import torch

from benchmarks import record

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = HALF | {"fp32": torch.float32}
MASKS = {"full": (False, False), "causal": (True, False), "window": (True, True)}


def cases():
    """(name, kernel, types, constants, warps and stages) of all that the launchers can ask for.

    Heads of 59 stand for those that no power of two holds. float16 is compiled as bfloat16 is, so once is enough.
    """
    from nondual.ops.flash_attention import triton as flash

    for name in ("forward", "decode", "dkdv", "dq"):
        kernel = getattr(flash, f"{name}_kernel")
        for label, widths in (("bf16", (64, 128, 256, 16, 59)), ("fp16", (128,)), ("fp32", (64, 128, 256))):
            for d in widths:
                for mask, (causal, windowed) in MASKS.items():
                    if (d in (16, 59) or label == "fp16") and mask != "causal":
                        continue
                    block = max(16, 1 << (d - 1).bit_length())
                    config = flash.configuration(name, block, DTYPES[label])
                    warps, stages = config.pop("num_warps"), config.pop("num_stages")
                    constants = {"SHARE": 1 if name != "decode" else 8, "D": d, "DV": d, "BLOCK_D": block}
                    constants |= {"BLOCK_DV": block, "CAUSAL": causal, "WINDOWED": windowed, **config}
                    yield f"{name} D{d} {label} {mask}", kernel, types(kernel, label), constants, warps, stages
    yield "delta D128 bf16", flash.delta_kernel, types(flash.delta_kernel, "bf16"), {"DV": 128, "BLOCK_DV": 128, "BLOCK_Q": 64}, 4, 1
    for splits, warps in ((16, 4), (64, 4), (128, 8)):
        constants = {"SHARE": 8, "DV": 128, "BLOCK_DV": 128, "BLOCK_S": splits}
        yield f"combine D128 bf16 {splits} splits", flash.combine_kernel, types(flash.combine_kernel, "bf16"), constants, warps, 3


def types(kernel, label: str) -> dict[str, str]:
    """Triton's type for each argument, by its name."""
    float32 = {"p_lse", "p_delta", "p_dlse", "p_part", "p_part_lse"}
    return {
        name: ("*fp32" if name in float32 else f"*{label}")
        if name.startswith("p_")
        else "fp32" if name in ("scale", "factor") else "i32"
        for name in kernel.arg_names
    }


def figures(only: str = "", targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")) -> dict:
    """What the compiler made of each case on each chip, or why it did not."""
    from benchmarks import aot

    found = {}
    for name, kernel, signature, constants, warps, stages in cases():
        if only in name:
            row = {"tiles": [constants.get("BLOCK_Q"), constants.get("BLOCK_KV"), warps, stages]}
            for target in targets:
                try:
                    row[target] = aot.report(aot.compile_for(target, kernel, signature, constants, warps, stages))
                except Exception as error:  # a compiler's error has no type of its own; the tests refuse any
                    row[target] = {"error": f"{type(error).__name__}: {error}"[:300]}
            found[name] = row
            print(name, row, file=sys.stderr)
    return found


def main(options: list[str]) -> None:
    """Write docs/measured/flash_attention_compile.json, or print it."""
    if os.environ.pop("TRITON_INTERPRET", "0") != "0" and "triton" in sys.modules:
        sys.exit("unset TRITON_INTERPRET: a kernel made for the interpreter cannot be compiled")
    chosen = dict(option.lstrip("-").split("=", 1) for option in options if "=" in option)
    found = figures(chosen.get("only", ""), tuple(chosen.get("targets", "sm_80,sm_90,sm_100,gfx942").split(",")))
    if "--json" in options:
        print(json.dumps(found))
        return
    import triton

    command = "python -m benchmarks flash_attention_compile"
    record.write("flash_attention_compile", command, found, triton=triton.__version__)


if __name__ == "__main__":
    main(sys.argv[1:])
