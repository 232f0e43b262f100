"""Every kernel of block-sparse attention, compiled for four chips.

`nox -s bench -- sparse_compile`; the options are in benchmarks/compiled.py. --brief takes one width of heads in each of
two dtypes.
"""

import sys
from collections.abc import Iterator

from benchmarks import compiled
from benchmarks.compiled import Case
from benchmarks.flash_attention_compile import DTYPES, types

TILES = ((128, 128), (64, 64))  # of the mask
KERNELS = ("forward", "dkdv", "dq")
MORE = (("bf16", 128, (16, 16)), ("bf16", 111, TILES[0]), *(("fp32", d, TILES[0]) for d in (64, 128, 256)))


def cases(target: str, brief: bool = False) -> Iterator[Case]:
    """Every kernel for heads of 64, 128 and 256 in bfloat16, and for one chip what more the launchers can ask for.

    Heads of 111 stand for those that no power of two holds; float16 is compiled as bfloat16 is, and float32 has the
    same blocks on every chip. delta is flash attention's own kernel, and stands in its report.
    """
    usual = [("bf16", d, tile) for d in (64, 128, 256) for tile in TILES]
    wanted = [*usual, *(MORE if target == "sm_90" else ())]
    if brief:
        wanted = [("bf16", 128, TILES[0]), ("fp32", 64, TILES[0])]
    for name in KERNELS:
        for label, d, tile in wanted:
            yield case(name, target, d, label, tile)


def case(name: str, target: str, d: int, label: str, tile: tuple[int, int]) -> Case:
    """A kernel for heads of width d and tiles of the mask of this size."""
    from nondual.ops.sparse_attention import triton as sparse

    kernel = getattr(sparse, f"{name}_kernel")
    config = sparse.configuration(name, target, d, d, DTYPES[label], *tile)
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    block = max(16, 1 << (d - 1).bit_length())
    constants = {"SHARE": 4, "D": d, "DV": d, "BLOCK_D": block, "BLOCK_DV": block, **config}
    constants |= {"TILE_Q": tile[0], "TILE_KV": tile[1]}
    lists = dict.fromkeys(("p_start", "p_part", "p_columns", "p_rows", "p_kinds"), "*i32") | {"p_masks": "*u8"}
    given = {x: lists.get(x, kind) for x, kind in types(kernel, label).items()}
    return Case(f"{name} D{d} {label}, tiles of {tile[0]} x {tile[1]}", kernel, given, constants, warps, stages)


def configuration(case: Case) -> dict:
    """What a row says of a case's blocks."""
    return {"blocks": [case.constants["BLOCK_Q"], case.constants["BLOCK_KV"], case.warps, case.stages]}


def report(_: Case, kernel) -> dict:
    """What `aot.report` says, and the copies to shared memory that run ahead of their use."""
    from benchmarks import aot

    asm = kernel.asm
    return aot.report(kernel) | ({"ahead": asm["ptx"].count("cp.async.cg")} if "ptx" in asm else {})


def main(options: list[str]) -> None:
    """Write docs/measured/sparse_compile.json, or print it."""
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    compiled.main("sparse_compile", cases, configuration, options, targets=targets, report=report)


if __name__ == "__main__":
    main(sys.argv[1:])
