"""Every flash attention kernel in every configuration, compiled for four chips.

`nox -s bench -- flash_attention_compile` needs no GPU, and some minutes. With --json it prints the figures and
writes nothing; --brief keeps one mask of three, powers of two, some float32; --targets=sm_90 some chips.
"""

import json
import os
import sys

import torch

from benchmarks import record

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = HALF | {"fp32": torch.float32}
BRIEF = {"forward": "window", "decode": "full", "dkdv": "full", "dq": "full"}
MASKS = {"full": (False, False), "causal": (True, False), "window": (True, True)}


def cases(target: str, brief: bool = False):
    """(name, kernel, types, constants, warps and stages) of all that the launchers can ask for on a chip.

    Heads of 59, 111 and 200 stand for those that no power of two holds; masks differ only where tiles are skipped.
    float16 is compiled as bfloat16 is: once is enough. `brief` takes each line of tiles once, with one mask, and
    of float32, which has the same tiles on every chip, a sample.
    """
    from nondual.ops.flash_attention import triton as flash

    for name in ("forward", "decode", "dkdv", "dq"):
        kernel = getattr(flash, f"{name}_kernel")
        for label, widths in (("bf16", (16, 64, 128, 256, 59, 111, 200)), ("fp16", (128,)), ("fp32", (64, 128, 256))):
            for d in widths:
                for mask, (causal, windowed) in MASKS.items():
                    usual = label == "bf16" and d in (64, 128, 256)
                    if not usual and mask != ("window" if label == "bf16" else "causal"):
                        continue
                    if brief and (label == "fp16" or d not in (64, 128, 256) or (usual and mask != BRIEF[name])):
                        continue
                    if brief and label == "fp32" and (target, d) != ("sm_90", 64):
                        continue
                    block = max(16, 1 << (d - 1).bit_length())
                    config = flash.configuration(name, target, d, d, DTYPES[label])
                    warps, stages = config.pop("num_warps"), config.pop("num_stages")
                    constants = {"SHARE": 8 if name == "decode" else 1, "D": d, "DV": d, "BLOCK_D": block}
                    constants |= {"BLOCK_DV": block, "CAUSAL": causal, "WINDOWED": windowed, **config}
                    yield f"{name} D{d} {label} {mask}", kernel, types(kernel, label), constants, warps, stages
    for d in (128, 256):
        config = flash.configuration("decode", target, d, d, torch.bfloat16) | {"BLOCK_Q": flash.MOST_ROWS}
        warps, stages = config.pop("num_warps"), config.pop("num_stages")
        constants = {"SHARE": 8, "D": d, "DV": d, "BLOCK_D": d, "BLOCK_DV": d, "CAUSAL": True, "WINDOWED": False}
        kernel = flash.decode_kernel
        yield f"decode D{d} bf16 causal, 64 rows", kernel, types(kernel, "bf16"), constants | config, warps, stages
    for d in (64, 128, 256):
        config = flash.configuration("delta", target, d, d, torch.bfloat16)
        constants = {"DV": d, "BLOCK_DV": d, "BLOCK_Q": config["BLOCK_Q"]}
        yield (
            f"delta D{d} bf16",
            flash.delta_kernel,
            types(flash.delta_kernel, "bf16"),
            constants,
            config["num_warps"],
            1,
        )
    for d, splits, warps in ((128, 16, 4), (256, 64, 4), (256, 128, 8)):
        constants = {"SHARE": 8, "DV": d, "BLOCK_DV": d, "BLOCK_S": splits}
        name = f"combine D{d} bf16, {splits} splits"
        yield name, flash.combine_kernel, types(flash.combine_kernel, "bf16"), constants, warps, 3


def types(kernel, label: str) -> dict[str, str]:
    """Triton's type for each argument, by its name."""
    float32 = {"p_top", "p_total", "p_delta", "p_dtotal", "p_part", "p_part_m", "p_part_l"}
    return {
        name: ("*fp32" if name in float32 else f"*{label}")
        if name.startswith("p_")
        else "fp32"
        if name in ("scale", "factor")
        else "i32"
        for name in kernel.arg_names
    }


def figures(targets: list[str], brief: bool = False) -> dict:
    """What the compiler made of each case on each chip, or why it did not."""
    from benchmarks import aot

    found: dict = {}
    for target in targets:
        for name, kernel, signature, constants, warps, stages in cases(target, brief):
            row = {"tiles": [constants.get("BLOCK_Q"), constants.get("BLOCK_KV"), warps, stages]}
            try:
                row |= aot.report(aot.compile_for(target, kernel, signature, constants, warps, stages))
            except Exception as error:  # a compiler's error has no type of its own; the tests refuse any
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            found.setdefault(name, {})[target] = row
            print(target, name, row, file=sys.stderr, flush=True)
    return found


def main(options: list[str]) -> None:
    """Write docs/measured/flash_attention_compile.json, or print it."""
    if os.environ.pop("TRITON_INTERPRET", "0") != "0" and "triton" in sys.modules:
        sys.exit("unset TRITON_INTERPRET: a kernel made for the interpreter cannot be compiled")
    chosen = dict(option.lstrip("-").split("=", 1) for option in options if "=" in option)
    found = figures(chosen.get("targets", "sm_80,sm_90,sm_100,gfx942").split(","), "--brief" in options)
    if "--json" in options:
        print(json.dumps(found))
        return
    import triton

    command = "nox -s bench -- flash_attention_compile"
    record.write("flash_attention_compile", command, found, triton=triton.__version__)


if __name__ == "__main__":
    main(sys.argv[1:])
