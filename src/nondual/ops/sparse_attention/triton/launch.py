"""How the kernels of block-sparse attention are launched: lists, memory for results, numbers of programs.

Symbols as in `nondual.ops.sparse_attention.triton`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from nondual.ops.flash_attention.triton.backward import delta_kernel
from nondual.ops.flash_attention.triton.launch import LOG2_E, configuration_for, empty_as, empty_outputs
from nondual.ops.kernels import block_size, chip_of, contiguous_rows, strides
from nondual.ops.sparse_attention.triton.backward import dkdv_kernel, dq_kernel
from nondual.ops.sparse_attention.triton.forward import forward_kernel
from nondual.ops.sparse_attention.triton.tiles import configuration


class Lists(NamedTuple):
    """The listed tiles of each row, or of each column: those that need no mask first.

    Attributes:
        start: (Bm, Gm, T + 1) int32, where the tiles of each row begin in the list; Bm is 1 or B, Gm is 1 or G.
        part: (Bm, Gm, T) int32, where those begin that need one: partly allowed, or cut by the last query or key.
        across: (K,) int32, the columns of the tiles of a row, or the rows of those of a column.
        kinds: (K,) int32, which tile mask a partly allowed tile has; -1 for a whole one.
    """

    start: Tensor
    part: Tensor
    across: Tensor
    kinds: Tensor


def whole_first(start: Tensor, across: Tensor, kinds: Tensor, cut: int) -> Lists:
    """The lists of a `BlockMask`, by row or by column, each with the tiles that need no mask before the others.

    Nothing is asked of the device, so that the host need not wait for it.

    Args:
        start: (Bm, Gm, T + 1), `row_start` or `col_start`.
        across: (K,), `columns` or `rows`.
        kinds: (K,), in the same order.
        cut: the column (or row) of tiles that the last key (or query) cuts; -1 where it cuts none.
    """
    begins, ends = start[..., :-1].reshape(-1), start[..., 1:].reshape(-1)  # of each line
    masked = (kinds >= 0) | (across == cut)
    before = F.pad((~masked).cumsum(0), (1, 0))  # how many tiles without a mask stand before each entry
    part = begins + before[ends] - before[begins]
    entry = torch.arange(len(across), device=across.device)
    line = torch.searchsorted(ends.contiguous(), entry, right=True)
    without = begins[line] + before[:-1] - before[begins[line]]  # the new place of an entry, if it needs no mask
    place = torch.where(masked, part[line] + (entry - begins[line]) - (before[:-1] - before[begins[line]]), without)
    moved = [torch.empty_like(x).scatter_(0, place, x) for x in (across, kinds)]
    return Lists(start.contiguous(), part.int().view(start[..., 1:].shape), *moved)


class Mask(NamedTuple):
    """A `BlockMask` as the kernels read it.

    Attributes:
        rows: the tiles of keys of each row of tiles.
        columns: the tiles of queries of each column of tiles.
        masks: (U, TILE_Q, TILE_KV) bool, the tile masks that occur.
    """

    rows: Lists
    columns: Lists
    masks: Tensor

    @classmethod
    def of(cls, tensors: list[Tensor]) -> "Mask":
        """From the nine tensors in the order in which an operator of torch takes them."""
        return cls(Lists(*tensors[:4]), Lists(*tensors[4:8]), tensors[8])

    def tensors(self) -> list[Tensor]:
        """The nine tensors, for `of`."""
        return [*self.rows, *self.columns, self.masks]


def _given(lists: Lists, mask: Mask, q: Tensor, v: Tensor) -> dict:
    """The arguments that name the lists, the sizes of a tile, and the head widths with the powers of two above."""
    start, part = lists.start, lists.part
    batches, groups = start.shape[:2]
    across = {"p_start": start, "p_part": part, "p_kinds": lists.kinds, "p_masks": mask.masks.view(torch.uint8)}
    across |= {"s_mb": groups if batches > 1 else 0, "s_mg": 1 if groups > 1 else 0, "lines": part.shape[-1]}
    sizes = {"TILE_Q": mask.masks.shape[1], "TILE_KV": mask.masks.shape[2]}
    d, dv = q.shape[-1], v.shape[-1]
    return across | sizes | {"D": d, "DV": dv, "BLOCK_D": block_size(d), "BLOCK_DV": block_size(dv)}


def _configured(kernel: str, mask: Mask, q: Tensor, v: Tensor) -> dict[str, int]:
    tile_q, tile_kv = mask.masks.shape[1:]
    return configuration(kernel, chip_of(q.device), q.shape[-1], v.shape[-1], q.dtype, tile_q, tile_kv)


def launch_forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """out, top and total: one program for each block of queries of each head."""
    (b, h, n, _), m = q.shape, k.shape[2]
    out, top, total = empty_outputs(q, v)
    if top.numel():
        q, k, v = (contiguous_rows(x) for x in (q, k, v))
        config = _configured("forward", mask, q, v)
        with torch.cuda.device_of(q):
            forward_kernel[(triton.cdiv(n, config["BLOCK_Q"]) * b * h,)](
                p_q=q, p_k=k, p_v=v, p_out=out, p_top=top, p_total=total, p_columns=mask.rows.across,
                **strides("bhn", q=q, k=k, v=v, o=out),
                n=n, m=m, heads=h, scale=scale * LOG2_E, SHARE=h // k.shape[1],
                **_given(mask.rows, mask, q, v), **config,
            )  # fmt: skip
    return out, top, total


def launch_backward(
    d_out: Tensor, d_total: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, top: Tensor, total: Tensor,
    mask: Mask, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv: delta first, then dq by one kernel, and dk and dv by another."""
    (b, h, n, _), (_, g, m, _) = q.shape, k.shape
    dq, dk, dv = (empty_as(x, *x.shape) for x in (q, k, v))
    q, k, v, d_out = (contiguous_rows(x) for x in (q, k, v, d_out))
    delta = torch.empty(top.shape, dtype=torch.float32, device=top.device)
    given = {"p_q": q, "p_k": k, "p_v": v, "p_do": d_out, "p_top": top, "p_total": total, "p_delta": delta}
    given |= strides("bhn", q=q, k=k, v=v, g=d_out)
    given |= {"n": n, "m": m, "scale": scale * LOG2_E, "factor": scale, "SHARE": h // max(g, 1)}
    with torch.cuda.device_of(q):
        if top.numel():
            config, dv_width = configuration_for("delta", q, v), v.shape[-1]
            delta_kernel[(triton.cdiv(n, config["BLOCK_Q"]) * b * h,)](
                p_out=out, p_do=d_out, p_dtotal=d_total.contiguous(), p_delta=delta,
                **strides("bhn", o=out, g=d_out), n=n, heads=h, DV=dv_width, BLOCK_DV=block_size(dv_width), **config,
            )  # fmt: skip
            config = _configured("dq", mask, q, v)
            dq_kernel[(triton.cdiv(n, config["BLOCK_Q"]) * b * h,)](
                p_dq=dq, p_columns=mask.rows.across, **strides("bhn", dq=dq), heads=h,
                **given, **_given(mask.rows, mask, q, v), **config,
            )  # fmt: skip
        if k.numel():
            config = _configured("dkdv", mask, q, v)
            dkdv_kernel[(triton.cdiv(m, config["BLOCK_KV"]) * b * g,)](
                p_dk=dk, p_dv=dv, p_rows=mask.columns.across, **strides("bhn", dk=dk, dv=dv), groups=g,
                **given, **_given(mask.columns, mask, q, v), **config,
            )  # fmt: skip
    return dq, dk, dv
