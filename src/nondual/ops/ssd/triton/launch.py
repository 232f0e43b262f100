"""One call of the operator, from its inputs to the launches: layouts, memory for results, numbers of programs."""

import torch
import triton
from torch import Tensor

from nondual.ops.kernels import chip_of, contiguous_rows, strides
from nondual.ops.ssd.triton.backward import columns_kernel, pass_back_kernel, rows_kernel, steps_back_kernel
from nondual.ops.ssd.triton.forward import output_kernel, pass_kernel, states_kernel, steps_kernel
from nondual.ops.ssd.triton.tiles import configuration, heads_of_a_program, parts_of

KERNELS = {
    "steps": steps_kernel,
    "states": states_kernel,
    "pass": pass_kernel,
    "output": output_kernel,
    "pass_back": pass_back_kernel,
    "rows": rows_kernel,
    "columns": columns_kernel,
    "steps_back": steps_back_kernel,
}


class Launcher:
    """The inputs of one call as the kernels take them, and the launch of each kernel.

    A head whose state is too large for one program is split into `parts` heads of fewer channels at the start, and the
    results are merged at the end.
    """

    def __init__(
        self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        delta_bias: Tensor | None, state: Tensor | None, reset: Tensor | None, softplus: bool, chunk: int,
    ):  # fmt: skip
        chip, self.width = chip_of(x.device), x.shape[3]
        self.parts = parts_of(chip, self.width, B.shape[3], x.dtype)
        x, z, D, state = (split_heads(v, axis, self.parts) for v, axis in ((x, 2), (z, 2), (D, 0), (state, 1)))
        delta, A, delta_bias = (repeat_heads(v, self.parts) for v in (delta, A, delta_bias))

        self.batch, self.length, self.heads, self.p = x.shape
        self.groups, self.n = B.shape[2:]
        self.chunks = triton.cdiv(self.length, chunk)
        self.tiled_by = chip, self.p, self.n, x.dtype, chunk
        self.y_dtype = x.dtype
        self.given = {"SKIP": D is not None, "GATED": z is not None, "RESET": reset is not None}
        self.softplus = softplus

        # D, z and start are read only where they were given; elsewhere another tensor fills the argument.
        self.x, self.B, self.C = contiguous_rows(x), contiguous_rows(B), contiguous_rows(C)
        self.z = self.x if z is None else contiguous_rows(z)
        self.delta, self.A = delta, A.contiguous()
        self.D = self.A if D is None else D.contiguous()
        self.bias = self.empty(self.heads).zero_() if delta_bias is None else delta_bias.contiguous()
        self.initial = self.empty_state().zero_() if state is None else state.contiguous()
        self.start = self.A if reset is None else sequence_starts(reset)

    def forward(self) -> tuple[Tensor, Tensor]:
        """y and the last state."""
        self.steps()
        states, last = self.pass_on()
        y = self.output(states)
        return merge_heads(y, 2, self.parts, self.width), merge_heads(last, 1, self.parts, self.width)

    def backward(self, dy: Tensor, dlast: Tensor) -> tuple[Tensor, ...]:
        """The gradients of x, delta, A, B, C, D, z, delta_bias and the initial state; those of D and z are without
        meaning where these were not given."""
        dy, dlast = contiguous_rows(split_heads(dy, 2, self.parts)), split_heads(dlast, 1, self.parts)
        self.steps()
        states, _ = self.pass_on()
        grads, dinitial, through = self.pass_back(dy, dlast, states)
        dc, dz, row_parts = self.rows(dy, states)
        db, dx, dd, dstep, column_parts = self.columns(dy, grads)
        ddelta, da, dbias = self.steps_back(p_through=through, p_dstep=dstep, **row_parts, **column_parts)
        dx, dinitial = merge_heads(dx, 2, self.parts, self.width), merge_heads(dinitial, 1, self.parts, self.width)
        dd = merge_heads(dd, 0, self.parts, self.width) if self.given["SKIP"] else torch.empty_like(da)
        if self.given["GATED"]:
            dz = merge_heads(dz, 2, self.parts, self.width)
        return dx, ddelta, da, db, dc, dd, dz, dbias, dinitial

    # --- one method for each kernel --------------------------------------------------------------------------------

    def steps(self) -> None:
        """The length of each step, and the log of the decay up to it in two parts."""
        self.step, self.high, self.low = (self.empty(self.batch, self.heads, self.length) for _ in range(3))
        self.launch(
            "steps",
            programs=self.batch * self.heads * self.chunks,
            p_delta=self.delta,
            p_a=self.A,
            p_bias=self.bias,
            **self.decays(),
            **strides("blh", d=self.delta),
            **self.sizes(),
            SOFTPLUS=self.softplus,
            RESET=self.given["RESET"],
        )

    def states(self, v: Tensor, m: Tensor, backward: bool) -> Tensor:
        """What each chunk adds to the state, or to its gradient."""
        states = self.empty(self.batch, self.chunks, self.heads, self.p, self.n)
        tiles = triton.cdiv(self.n, self.tile("states", "BLOCK_N"))
        self.launch(
            "states",
            programs=self.batch * self.heads * self.chunks * tiles,
            p_v=v,
            p_z=self.z,
            p_m=m,
            **self.decays(),
            p_states=states,
            **strides("blh", v=v, z=self.z),
            **strides("blg", m=m),
            **self.sizes(),
            **self.widths(),
            BACKWARD=backward,
            GATED=self.given["GATED"],
            RESET=self.given["RESET"],
        )
        return states

    def pass_on(self) -> tuple[Tensor, Tensor]:
        """The state before each chunk, and the last."""
        states, last = self.states(self.x, self.B, backward=False), self.empty_state()
        self.launch(
            "pass",
            programs=self.batch * self.heads * self.pieces(),
            p_states=states,
            p_initial=self.initial,
            p_high=self.high,
            p_low=self.low,
            p_start=self.start,
            p_last=last,
            **self.sizes(),
            RESET=self.given["RESET"],
            SIZE=self.p * self.n,
        )
        return states, last

    def output(self, states: Tensor) -> Tensor:
        """y."""
        y = torch.empty(self.x.shape, dtype=self.y_dtype, device=self.x.device)
        tiles = self.tiles("output")
        self.launch(
            "output",
            programs=self.batch * self.heads * tiles,
            **self.inputs(),
            p_states=states,
            p_y=y,
            tiles=tiles,
        )
        return y

    def pass_back(self, dy: Tensor, dlast: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of the state after each chunk and of the initial state, and what backward.py calls through."""
        grads, dinitial = self.states(dy, self.C, backward=True), self.empty_state()
        through = self.empty(self.batch, self.heads, self.chunks, self.pieces())
        self.launch(
            "pass_back",
            programs=self.batch * self.heads * self.pieces(),
            p_states=states,
            p_grads=grads,
            p_dlast=dlast.contiguous(),
            p_high=self.high,
            p_low=self.low,
            p_start=self.start,
            p_dinitial=dinitial,
            p_through=through,
            **self.sizes(),
            RESET=self.given["RESET"],
            SIZE=self.p * self.n,
        )
        return grads, dinitial, through

    def rows(self, dy: Tensor, states: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """dC, dz (empty where there is no z), and what backward.py calls rows, diagonal, across and from_state."""
        tiles, per, splits = self.shares("rows")
        dc = self.empty(splits, *self.C.shape)
        dz = torch.empty(self.x.shape if self.given["GATED"] else (0,), dtype=self.x.dtype, device=self.x.device)
        parts = {name: torch.empty_like(self.step) for name in ("p_rows", "p_diagonal", "p_from_state")}
        tiles_of_chunk = triton.cdiv(self.tile("rows", "CHUNK"), self.tile("rows", "BLOCK"))
        parts["p_across"] = self.empty(self.batch, self.heads, tiles, tiles_of_chunk)
        self.launch(
            "rows",
            programs=self.batch * self.groups * tiles * splits,
            **self.inputs(),
            p_dy=dy,
            **strides("blh", dy=dy),
            p_states=states,
            p_dc=dc,
            p_dz=dz,
            **parts,
            batch=self.batch,
            tiles=tiles,
            splits=splits,
            PER=per,
        )
        return dc.sum(0).to(self.C.dtype), dz, parts

    def columns(self, dy: Tensor, grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """dB, dx, dD (without meaning where there is no D), the gradient of Δ as a factor of x, and what backward.py
        calls columns and into_state."""
        tiles, per, splits = self.shares("columns")
        db, dx = self.empty(splits, *self.B.shape), torch.empty_like(self.x, memory_format=torch.contiguous_format)
        dd = self.empty(*((self.batch * tiles, self.heads, self.p) if self.given["SKIP"] else (0,)))
        dstep = torch.empty_like(self.step)
        parts = {name: torch.empty_like(self.step) for name in ("p_columns", "p_into_state")}
        self.launch(
            "columns",
            programs=self.batch * self.groups * tiles * splits,
            **self.inputs(),
            p_dy=dy,
            **strides("blh", dy=dy),
            p_grads=grads,
            p_db=db,
            p_dx=dx,
            p_dd=dd,
            p_dstep=dstep,
            **parts,
            batch=self.batch,
            tiles=tiles,
            splits=splits,
            PER=per,
        )
        return db.sum(0).to(self.B.dtype), dx, dd.sum(0), dstep, parts

    def steps_back(self, **received: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ddelta, dA and dbias, from the seven parts of the log decay's gradient and that of Δ as a factor of x."""
        dtype = self.delta.dtype if self.parts == 1 else torch.float32  # the parts of a head are added up below
        ddelta = torch.empty(self.delta.shape, dtype=dtype, device=self.delta.device)
        da, dbias = (self.empty(self.batch, self.heads, self.chunks) for _ in range(2))
        self.launch(
            "steps_back",
            programs=self.batch * self.heads * self.chunks,
            p_delta=self.delta,
            p_a=self.A,
            p_bias=self.bias,
            p_step=self.step,
            **received,
            p_ddelta=ddelta,
            p_da=da,
            p_dbias=dbias,
            **strides("blh", d=self.delta),
            **self.sizes(),
            tiles=self.tiles("rows"),
            pieces=self.pieces(),
            SOFTPLUS=self.softplus,
            BLOCK_PIECES=triton.next_power_of_2(self.pieces()),
        )
        da, dbias = da.sum((0, 2)), dbias.sum((0, 2))
        if self.parts > 1:
            ddelta, da, dbias = (v.unflatten(-1, (-1, self.parts)).sum(-1) for v in (ddelta, da, dbias))
        return ddelta.to(self.delta.dtype), da, dbias

    # --- what the launches share -----------------------------------------------------------------------------------

    def launch(self, name: str, programs: int, **arguments) -> None:
        """Run a kernel with its own tiles; the arguments are the kernel's, by name."""
        with torch.cuda.device_of(self.x):
            KERNELS[name][(programs,)](**arguments, **configuration(name, *self.tiled_by))

    def inputs(self) -> dict:
        """The arguments that output, rows and columns have in common."""
        return {
            "p_x": self.x,
            "p_b": self.B,
            "p_c": self.C,
            "p_d": self.D,
            "p_z": self.z,
            **strides("blh", x=self.x, z=self.z),
            **strides("blg", b=self.B, c=self.C),
            **self.decays(),
            **self.sizes(),
            **self.widths(),
            **self.given,
        }

    def decays(self) -> dict[str, Tensor]:
        """The step lengths, the log of the decay up to each in two parts, and where sequences start."""
        return {"p_step": self.step, "p_high": self.high, "p_low": self.low, "p_start": self.start}

    def sizes(self) -> dict[str, int]:
        return {"length": self.length, "heads": self.heads, "chunks": self.chunks}

    def widths(self) -> dict[str, int]:
        return {"P": self.p, "N": self.n, "SHARE": self.heads // self.groups}

    def tile(self, kernel: str, name: str) -> int:
        """A number of the kernel's configuration: "BLOCK", "BLOCK_N" and so on."""
        return configuration(kernel, *self.tiled_by)[name]

    def tiles(self, kernel: str) -> int:
        """Tiles of steps from the first to the last; a chunk is a whole number of them."""
        return triton.cdiv(self.length, self.tile(kernel, "BLOCK"))

    def pieces(self) -> int:
        """Programs that carry one head's state from chunk to chunk."""
        return triton.cdiv(self.p * self.n, self.tile("pass", "BLOCK"))

    def shares(self, kernel: str) -> tuple[int, int, int]:
        """Tiles of steps, heads of a program, and over how many programs a group's heads are split."""
        tiles, share = self.tiles(kernel), self.heads // self.groups
        per = heads_of_a_program(self.batch * self.groups * tiles, share, self.x.device)
        return tiles, per, triton.cdiv(share, per)

    def empty(self, *shape: int) -> Tensor:
        """An empty float32 tensor."""
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def empty_state(self) -> Tensor:
        """An empty tensor for a state of each head."""
        return self.empty(self.batch, self.heads, self.p, self.n)


def split_heads(v: Tensor | None, axis: int, parts: int) -> Tensor | None:
    """(…, H, P, …) as (…, H · parts, P / parts, …), with zeros where P does not divide; `axis` is that of H."""
    if v is None or parts == 1:
        return v
    if missing := -v.shape[axis + 1] % parts:
        v = torch.cat([v, v.new_zeros(*v.shape[: axis + 1], missing, *v.shape[axis + 2 :])], axis + 1)
    return v.unflatten(axis + 1, (parts, -1)).flatten(axis, axis + 1)


def repeat_heads(v: Tensor | None, parts: int) -> Tensor | None:
    """(…, H) as (…, H · parts): what the parts of a head share."""
    return v if v is None or parts == 1 else v.repeat_interleave(parts, -1)


def merge_heads(v: Tensor, axis: int, parts: int, p: int) -> Tensor:
    """The inverse of `split_heads`, for heads of p channels."""
    if parts == 1:
        return v
    return v.unflatten(axis, (-1, parts)).flatten(axis + 1, axis + 2).narrow(axis + 1, 0, p).contiguous()


def sequence_starts(reset: Tensor) -> Tensor:
    """For each step the first step of its own sequence, -1 where that lies before this call: int32 (B, L)."""
    at = torch.arange(reset.shape[1], device=reset.device, dtype=torch.int32)
    return torch.where(reset, at, -1).cummax(1).values.to(torch.int32)
