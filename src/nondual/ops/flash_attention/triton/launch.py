"""Which tiles each of flash attention's kernels takes on each chip, and how the kernels are launched.

Symbols as in `nondual.ops.flash_attention.triton`.
"""

import math

import torch
import triton
from torch import Tensor

from nondual.ops.flash_attention.triton.backward import delta_kernel, dkdv_kernel, dq_kernel
from nondual.ops.flash_attention.triton.forward import combine_kernel, decode_kernel, forward_kernel
from nondual.ops.kernels import block_size, chip_of, contiguous_rows, multiprocessors, strides

INTERPRETED = not isinstance(forward_kernel, triton.runtime.JITFunction)
LOG2_E = math.log2(math.e)

# --- tiles -----------------------------------------------------------------------------------------------------------

TILES = {  # BLOCK_Q, BLOCK_KV, num_warps, num_stages for heads up to 64, 128 and 256 wide
    "sm_80": {  # and every chip that is not listed: fits the 99 KiB of shared memory of consumer GPUs
        "forward": ((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2)),
        "forward, cut": ((128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        "decode": ((16, 128, 4, 3), (16, 64, 4, 3), (16, 32, 8, 2)),
        "dkdv": ((32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
        "dq": ((64, 64, 4, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    },
    "sm_90": {
        "forward": ((128, 128, 8, 3), (128, 128, 8, 2), (128, 32, 8, 2)),
        "forward, cut": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        "decode": ((16, 128, 4, 3), (16, 64, 4, 3), (16, 32, 4, 3)),
        "dkdv": ((64, 128, 8, 2), (32, 128, 8, 2), (32, 32, 8, 1)),
        "dq": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 1)),
    },
    "sm_100": {
        "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
        "forward, cut": ((128, 64, 8, 3), (64, 32, 8, 2), (64, 32, 8, 2)),
        "decode": ((16, 128, 4, 3), (16, 64, 4, 3), (16, 32, 4, 3)),
        "dkdv": ((64, 128, 8, 2), (64, 128, 8, 2), (32, 64, 8, 1)),
        "dq": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1)),
    },
    "gfx942": {
        "forward": ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
        "forward, cut": ((128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        "decode": ((16, 64, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2)),
        "dkdv": ((32, 64, 8, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
        "dq": ((64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
    },
    "float32": {  # on every chip: on plain multipliers, since a tensor core would round to TF32
        "forward": ((64, 32, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1)),
        "forward, cut": ((32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        "decode": ((16, 32, 4, 1), (16, 16, 8, 1), (16, 16, 4, 1)),
        "dkdv": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        "dq": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
}


def configuration(kernel: str, chip: str, d: int, dv: int, dtype: torch.dtype) -> dict[str, int]:
    """The tiles, warps and pipeline stages of a kernel.

    Chosen from what compiles without a spill and keeps its tensor-core instructions in flight, as
    docs/measured/flash_attention_compile.json shows, not yet from timings.

    Args:
        kernel: "forward", "decode", "delta", "dkdv" or "dq".
        chip: a key of TILES, as `nondual.ops.kernels.chip_of` gives it.
        d: D. A head that does not fill its power of two is cut by a mask, which costs the forward kernel registers.
        dv: Dv.
        dtype: of q.
    """
    if kernel == "delta":
        return {"BLOCK_Q": 64, "num_warps": 4, "num_stages": 1}
    width = max(block_size(d), block_size(dv))
    line = "forward, cut" if kernel == "forward" and not width == d == dv else kernel
    tiles = TILES["float32" if dtype == torch.float32 else chip][line][(width > 64) + (width > 128)]
    if INTERPRETED:  # small tiles, so that tests with short sequences have many, whole and cut
        tiles = (32, 16, 4, 1)
    return dict(zip(("BLOCK_Q", "BLOCK_KV", "num_warps", "num_stages"), tiles))


def configuration_for(kernel: str, q: Tensor, v: Tensor) -> dict[str, int]:
    """The configuration of a kernel for these tensors, where they are."""
    return configuration(kernel, chip_of(q.device), q.shape[-1], v.shape[-1], q.dtype)


# --- what the launchers share ----------------------------------------------------------------------------------------


def _widths(q: Tensor, v: Tensor) -> dict[str, int]:
    """The head widths, and the powers of two that hold them."""
    d, dv = q.shape[-1], v.shape[-1]
    return {"D": d, "DV": dv, "BLOCK_D": block_size(d), "BLOCK_DV": block_size(dv)}


def _masks(causal: bool, window: int) -> dict[str, bool]:
    return {"CAUSAL": causal, "WINDOWED": window > 0}


def empty_as(x: Tensor, *shape: int) -> Tensor:
    """An empty tensor of shape (B, heads, length, width), laid out in memory as x is: (B, N, H, D) or (B, H, N, D).

    A module's projections give the first; it can then join the heads of the output without a copy.
    """
    b, h, n, d = shape
    if x.stride(1) < x.stride(2):
        return torch.empty(b, n, h, d, dtype=x.dtype, device=x.device).transpose(1, 2)
    return torch.empty(b, h, n, d, dtype=x.dtype, device=x.device)


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for out (B, H, N, Dv), top and total (B, H, N)."""
    top, total = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    return empty_as(q, *q.shape[:3], v.shape[-1]), top, total


# --- launchers -------------------------------------------------------------------------------------------------------


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out, top and total: one program for each tile of queries of each head. A window of 0 is none."""
    (b, h, n, _), m = q.shape, k.shape[2]
    out, top, total = empty_outputs(q, v)
    if top.numel():
        q, k, v = (contiguous_rows(x) for x in (q, k, v))
        config = configuration_for("forward", q, v)
        with torch.cuda.device_of(q):
            forward_kernel[(triton.cdiv(n, config["BLOCK_Q"]) * b * h,)](
                p_q=q, p_k=k, p_v=v, p_out=out, p_top=top, p_total=total,
                **strides("bhn", q=q, k=k, v=v, o=out),
                n=n, m=m, heads=h, window=window, scale=scale * LOG2_E, SHARE=h // k.shape[1],
                **_widths(q, v), **_masks(causal, window), **config,
            )  # fmt: skip
    return out, top, total


MOST_ROWS = 64  # queries of one key head that decoding holds in one tile
FEWEST_KEYS = 256  # in a part: fewer are not worth a program of their own
MOST_SPLITS = 128


def splits_of(q: Tensor, k: Tensor, window: int) -> int:
    """Into how many parts the keys are split; 0 where the plain kernel is used.

    The rule: decoding takes over where the N · H / G queries of a key head fit one tile of 64 and they see 512 keys or
    more. It splits the keys until there are two programs for each multiprocessor, into parts of at least 256 keys, and
    at most 128 parts.
    """
    (b, _, n, _), (_, g, m, _) = q.shape, k.shape
    seen = min(m, window + n - 1) if window else m
    if n * (q.shape[1] // max(g, 1)) > MOST_ROWS or seen < 2 * FEWEST_KEYS:
        return 0
    programs = 2 * multiprocessors(q.device, otherwise=8)
    return max(1, min(MOST_SPLITS, triton.cdiv(programs, b * g), seen // FEWEST_KEYS))


def launch_decode(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scale: float, splits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """out, top and total for few queries and many keys: a program for each key head and part of its keys, then one
    for each row. A window of 0 is none."""
    (b, h, n, _), (_, g, m, _) = q.shape, k.shape
    out, top, total = empty_outputs(q, v)
    if not top.numel():
        return out, top, total
    q, k, v = (contiguous_rows(x) for x in (q, k, v))
    widths, rows = _widths(q, v), n * (h // g)
    config = configuration_for("decode", q, v)
    config["BLOCK_Q"] = block_size(rows)
    first = max(0, m - n - window + 1) // config["BLOCK_KV"] * config["BLOCK_KV"] if window else 0
    length = triton.cdiv(triton.cdiv(max(1, m - first), splits), config["BLOCK_KV"]) * config["BLOCK_KV"]
    splits = triton.cdiv(max(1, m - first), length)
    part = torch.empty(b, g, splits, rows, v.shape[-1], dtype=torch.float32, device=q.device)
    part_m, part_l = (torch.empty(b, g, splits, rows, dtype=torch.float32, device=q.device) for _ in range(2))
    with torch.cuda.device_of(q):
        decode_kernel[(splits * b * g,)](
            p_q=q, p_k=k, p_v=v, p_part=part, p_part_m=part_m, p_part_l=part_l,
            **strides("bhn", q=q, k=k, v=v),
            n=n, m=m, groups=g, window=window, scale=scale * LOG2_E,
            first=first, length=length, splits=splits, SHARE=h // g,
            **widths, **_masks(causal, window), **config,
        )  # fmt: skip
        combine_kernel[(b * h * n,)](
            p_part=part, p_part_m=part_m, p_part_l=part_l, p_out=out, p_top=top, p_total=total,
            **strides("bhn", o=out),
            n=n, heads=h, splits=splits, SHARE=h // g, DV=widths["DV"], BLOCK_DV=widths["BLOCK_DV"],
            BLOCK_S=block_size(splits), num_warps=4 if splits <= 64 else 8,
        )  # fmt: skip
    return out, top, total


def launch_backward(
    d_out: Tensor, d_total: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, top: Tensor, total: Tensor,
    causal: bool, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv: delta first, then dq by one kernel, and dk and dv by another. A window of 0 is none."""
    (b, h, n, _), (_, g, m, _) = q.shape, k.shape
    dq, dk, dv = (empty_as(x, *x.shape) for x in (q, k, v))
    q, k, v, d_out = (contiguous_rows(x) for x in (q, k, v, d_out))
    delta = torch.empty(top.shape, dtype=torch.float32, device=top.device)
    given = {"p_q": q, "p_k": k, "p_v": v, "p_do": d_out, "p_top": top, "p_total": total, "p_delta": delta}
    given |= strides("bhn", q=q, k=k, v=v, g=d_out)
    numbers = {"n": n, "m": m, "window": window, "scale": scale * LOG2_E, "factor": scale}
    numbers |= {"SHARE": h // max(g, 1), **_widths(q, v), **_masks(causal, window)}
    with torch.cuda.device_of(q):
        if top.numel():
            config = configuration_for("delta", q, v)
            delta_kernel[(triton.cdiv(n, config["BLOCK_Q"]) * b * h,)](
                p_out=out, p_do=d_out, p_dtotal=d_total.contiguous(), p_delta=delta,
                **strides("bhn", o=out, g=d_out),
                n=n, heads=h, DV=numbers["DV"], BLOCK_DV=numbers["BLOCK_DV"], **config,
            )  # fmt: skip
            config = configuration_for("dq", q, v)
            dq_kernel[(triton.cdiv(n, config["BLOCK_Q"]) * b * h,)](
                p_dq=dq, **strides("bhn", dq=dq), **given, heads=h, **numbers, **config
            )
        if k.numel():
            config = configuration_for("dkdv", q, v)
            dkdv_kernel[(triton.cdiv(m, config["BLOCK_KV"]) * b * g,)](
                p_dk=dk, p_dv=dv, **strides("bhn", dk=dk, dv=dv), **given, groups=g, **numbers, **config
            )
    return dq, dk, dv
