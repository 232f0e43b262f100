"""How flash attention's kernels are launched: layouts, memory for results, numbers of programs.

Symbols as in `nondual.ops.flash_attention.triton`.
"""

import math

import torch
import triton
from torch import Tensor

from nondual.ops.flash_attention.triton.backward import delta_kernel, dkdv_kernel, dq_kernel
from nondual.ops.flash_attention.triton.decay import gates_of
from nondual.ops.flash_attention.triton.forward import combine_kernel, decode_kernel, forward_kernel
from nondual.ops.flash_attention.triton.tiles import configuration
from nondual.ops.kernels import block_size, chip_of, contiguous_rows, strides

LOG2_E = math.log2(math.e)
Forget = tuple[Tensor, Tensor]  # c in float64 and first, both (B, H, M): `nondual.ops.flash_attention.forget`

# --- what the launchers share ----------------------------------------------------------------------------------------


def configuration_for(kernel: str, q: Tensor, v: Tensor, forget: Forget | None = None) -> dict[str, int]:
    """The configuration of a kernel for these tensors, where they are, with forget gates or without."""
    return configuration(kernel, chip_of(q.device), q.shape[-1], v.shape[-1], q.dtype, forget is not None)


def _widths(q: Tensor, v: Tensor) -> dict[str, int]:
    """The head widths, and the powers of two that hold them."""
    d, dv = q.shape[-1], v.shape[-1]
    return {"D": d, "DV": dv, "BLOCK_D": block_size(d), "BLOCK_DV": block_size(dv)}


def _masks(causal: bool, window: int) -> dict[str, bool]:
    return {"CAUSAL": causal, "WINDOWED": window > 0}


def empty_as(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of shape (B, heads, length, width), laid out in memory as x is: (B, N, H, D) or (B, H, N, D).

    A module's projections give the first; it can then join the heads of the output without a copy. Its dtype is x's
    where none is named.
    """
    b, h, n, d = shape
    dtype = x.dtype if dtype is None else dtype
    if x.stride(1) < x.stride(2):
        return torch.empty(b, n, h, d, dtype=dtype, device=x.device).transpose(1, 2)
    return torch.empty(b, h, n, d, dtype=dtype, device=x.device)


def empty_outputs(q: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for out (B, H, N, Dv), in q's dtype or the one named, and for top and total (B, H, N)."""
    top, total = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    return empty_as(q, *q.shape[:3], v.shape[-1], dtype=dtype), top, total


# --- launchers -------------------------------------------------------------------------------------------------------


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scale: float, forget: Forget | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out, top and total: one program for each tile of queries of each head. A window of 0 is none.

    dtype is that of out; q's where it is None. The kernel rounds its float32 to it as it stores them.
    """
    (b, h, n, _), m = q.shape, k.shape[2]
    out, top, total = empty_outputs(q, v, dtype)
    if top.numel():
        q, k, v = (contiguous_rows(x) for x in (q, k, v))
        config = configuration_for("forward", q, v, forget)
        with torch.cuda.device_of(q):
            forward_kernel[(triton.cdiv(n, config["BLOCK_Q"]) * b * h,)](
                p_q=q, p_k=k, p_v=v, p_out=out, p_top=top, p_total=total,
                **strides("bhn", q=q, k=k, v=v, o=out),
                n=n, m=m, heads=h, window=window, scale=scale * LOG2_E, SHARE=h // k.shape[1],
                **_widths(q, v), **_masks(causal, window), **gates_of(forget), **config,
            )  # fmt: skip
    return out, top, total


def launch_decode(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scale: float, splits: int, forget: Forget | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """out, top and total for few queries and many keys: a program for each key head and part of its keys, then one
    for each row. A window of 0 is none."""
    (b, h, n, _), (_, g, m, _) = q.shape, k.shape
    out, top, total = empty_outputs(q, v)
    if not top.numel():
        return out, top, total
    q, k, v = (contiguous_rows(x) for x in (q, k, v))
    widths, rows = _widths(q, v), n * (h // g)
    config = configuration_for("decode", q, v, forget)
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
            **widths, **_masks(causal, window), **gates_of(forget), **config,
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
    causal: bool, window: int, scale: float, forget: Forget | None = None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk, dv and, with gates, dc: delta first, then dq by one kernel, and dk and dv by another. A window of 0 is
    none. dtype is that of dq, dk and dv; each has its input's where it is None.

    dc_l, in float64 (B, H, M), is the sum of dS over the keys of query l less its sum over the queries of key l. Both
    kernels take dS from the same delta, so that what rounding the output adds to it cancels when dc is summed.
    """
    (b, h, n, _), (_, g, m, _) = q.shape, k.shape
    dq, dk, dv = (empty_as(x, *x.shape, dtype=dtype) for x in (q, k, v))
    q, k, v, d_out = (contiguous_rows(x) for x in (q, k, v, d_out))
    delta = torch.empty(top.shape, dtype=torch.float32, device=top.device)
    given = {"p_q": q, "p_k": k, "p_v": v, "p_do": d_out, "p_top": top, "p_total": total, "p_delta": delta}
    given |= strides("bhn", q=q, k=k, v=v, g=d_out)
    numbers = {"n": n, "m": m, "window": window, "scale": scale * LOG2_E, "factor": scale}
    numbers |= {"SHARE": h // max(g, 1), **_widths(q, v), **_masks(causal, window), **gates_of(forget)}
    rows, columns = (None if forget is None else top.new_empty(b, h, length) for length in (n, m))
    with torch.cuda.device_of(q):
        if top.numel():
            config = configuration_for("delta", q, v)
            delta_kernel[(triton.cdiv(n, config["BLOCK_Q"]) * b * h,)](
                p_out=out, p_do=d_out, p_dtotal=d_total.contiguous(), p_delta=delta,
                **strides("bhn", o=out, g=d_out),
                n=n, heads=h, DV=numbers["DV"], BLOCK_DV=numbers["BLOCK_DV"], **config,
            )  # fmt: skip
            config = configuration_for("dq", q, v, forget)
            dq_kernel[(triton.cdiv(n, config["BLOCK_Q"]) * b * h,)](
                p_dq=dq, **strides("bhn", dq=dq), **given, heads=h, **numbers, **config, p_dc=rows
            )
        if k.numel():
            config = configuration_for("dkdv", q, v, forget)
            dkdv_kernel[(triton.cdiv(m, config["BLOCK_KV"]) * b * g,)](
                p_dk=dk, p_dv=dv, **strides("bhn", dk=dk, dv=dv), **given, groups=g, **numbers, **config, p_dc=columns
            )
    if rows is None or columns is None:
        return dq, dk, dv, None
    dc, both = -columns.double(), min(n, m)
    dc[..., m - both :] += rows[..., n - both :]
    return dq, dk, dv, dc
