"""Every flash attention kernel in every configuration, compiled for four chips.

`nox -s bench -- flash_attention_compile`; the options are in benchmarks/compiled.py. --brief keeps one mask of three,
powers of two, some float32. Forget gates: with one mask, in bfloat16, for two chips.
"""

import sys

import torch

from benchmarks import compiled
from benchmarks.compiled import Case

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = HALF | {"fp32": torch.float32}
BRIEF = {"forward": "window", "decode": "full", "dkdv": "full", "dq": "full"}
MASKS = {"full": (False, False), "causal": (True, False), "window": (True, True)}
GATES = {"p_high": "*fp32", "p_low": "*fp32", "p_first": "*i32", "p_dc": "*fp32"}


def cases(target: str, brief: bool = False):
    """All that the launchers can ask for on a chip.

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
                    title = f"{name} D{d} {label} {mask}"
                    yield Case(title, kernel, types(kernel, label), constants | without_gates(kernel), warps, stages)
        for d in (64, 128) if target in ("sm_80", "sm_90") else ():
            config = flash.configuration(name, target, d, d, torch.bfloat16, gates=True)
            warps, stages = config.pop("num_warps"), config.pop("num_stages")
            constants = {"SHARE": 8 if name == "decode" else 1, "D": d, "DV": d, "BLOCK_D": d, "BLOCK_DV": d}
            constants |= {"CAUSAL": True, "WINDOWED": False, **config}
            yield Case(f"{name} D{d} bf16 causal, gates", kernel, types(kernel, "bf16"), constants, warps, stages)
    for d in (128, 256):
        config = flash.configuration("decode", target, d, d, torch.bfloat16) | {"BLOCK_Q": flash.MOST_ROWS}
        warps, stages = config.pop("num_warps"), config.pop("num_stages")
        constants = {"SHARE": 8, "D": d, "DV": d, "BLOCK_D": d, "BLOCK_DV": d, "CAUSAL": True, "WINDOWED": False}
        kernel = flash.decode_kernel
        title = f"decode D{d} bf16 causal, 64 rows"
        yield Case(title, kernel, types(kernel, "bf16"), constants | config | without_gates(kernel), warps, stages)
    for d in (64, 128, 256):
        config = flash.configuration("delta", target, d, d, torch.bfloat16)
        constants = {"DV": d, "BLOCK_DV": d, "BLOCK_Q": config["BLOCK_Q"]}
        kernel = flash.delta_kernel
        yield Case(f"delta D{d} bf16", kernel, types(kernel, "bf16"), constants, config["num_warps"], 1)
    for d, splits, warps in ((128, 16, 4), (256, 64, 4), (256, 128, 8)):
        constants = {"SHARE": 8, "DV": d, "BLOCK_DV": d, "BLOCK_S": splits}
        title, kernel = f"combine D{d} bf16, {splits} splits", flash.combine_kernel
        yield Case(title, kernel, types(kernel, "bf16"), constants, warps, 3)


def without_gates(kernel) -> dict[str, None]:
    """The constants of a kernel that is compiled without forget gates."""
    return {name: None for name in GATES if name in kernel.arg_names}


def types(kernel, label: str) -> dict[str, str]:
    """Triton's type for each argument, by its name."""
    float32 = {"p_top", "p_total", "p_delta", "p_dtotal", "p_part", "p_part_m", "p_part_l"}
    return {
        name: GATES[name]
        if name in GATES
        else ("*fp32" if name in float32 else f"*{label}")
        if name.startswith("p_")
        else "fp32"
        if name in ("scale", "factor")
        else "i32"
        for name in kernel.arg_names
    }


def configuration(case: Case) -> dict:
    """What a row says of a case's tiles."""
    return {"tiles": [case.constants.get("BLOCK_Q"), case.constants.get("BLOCK_KV"), case.warps, case.stages]}


def main(options: list[str]) -> None:
    """Write docs/measured/flash_attention_compile.json, or print it."""
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    compiled.main("flash_attention_compile", cases, configuration, options, targets=targets)


if __name__ == "__main__":
    main(sys.argv[1:])
