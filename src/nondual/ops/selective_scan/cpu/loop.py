"""The compiled loop, called: layouts, memory for results, `struct scan` of scan.c."""

import ctypes
import math
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from nondual.ops import c_loop
from nondual.ops.selective_scan.cpu.memory import CHUNK, Given, dense, empty, empty_outputs
from nondual.ops.selective_scan.inputs import Inputs

BLOCK = 64  # channels that go through a chunk together
LOOP = c_loop.Loop(
    "selective_scan",
    Path(__file__).with_name("scan.c"),
    {"STEPS": CHUNK, "WIDTH": BLOCK},
    "NONDUAL_CPU_SCAN",
    "the selective scan's loop could not be compiled, and runs in plain torch, several times slower",
)

SIZES = (
    "batch length channels states unit u_b u_l delta_b delta_l z_b z_l dy_b dy_l "
    "b_b b_l b_g b_unit c_b c_l c_g c_unit softplus threads"
).split()
POINTERS = (
    "u delta A B C D z bias state reset y last checkpoints dy dlast du ddelta dz dstate dA dB dC dD dbias".split()
)


class Scan(ctypes.Structure):
    """`struct scan` of scan.c."""

    _fields_ = [(name, ctypes.c_int64) for name in SIZES] + [(f"p_{name}", ctypes.c_void_p) for name in POINTERS]


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The loop for float32 or float64. None where plain torch must serve: without a C compiler, and where the
    environment says NONDUAL_CPU_SCAN=torch."""
    return c_loop.library(dtype, LOOP)


def forward(library: ctypes.CDLL, given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state and the checkpoints. All inputs are in float32, or all in float64, as the library is.

    Raises:
        MemoryError: no memory for what a thread works in.
    """
    given = _as_read(given)
    y, last, checkpoints = empty_outputs(given.u, given.A)
    _call(
        library.forward,
        **_inputs(given),
        **_sizes(given),
        **_strides(u=given.u, delta=given.delta, z=given.z),
        y=y,
        last=last,
        checkpoints=checkpoints,
    )
    return y, last, checkpoints


def backward(
    library: ctypes.CDLL, dy: Tensor, dlast: Tensor | None, checkpoints: Tensor, given: Inputs
) -> tuple[Tensor | None, ...]:
    """The gradients of u, delta, A, B, C, D, z, bias and the initial state; None for what was not given.

    Raises:
        MemoryError: no memory for what a thread works in.
    """
    given = _as_read(given)
    (dy,), (dlast, checkpoints) = _rows(dy), dense(dlast, checkpoints)
    (batch, length, channels), states = given.u.shape, given.A.shape[1]
    sizes = _sizes(given)
    blocks = channels // sizes["unit"] * -(-sizes["unit"] // BLOCK)

    def like(x, *shape):
        return None if x is None else empty(given.u, *shape)

    def sums(x):  # of each block over its channels, or of each sequence over time
        return empty(given.u, *((batch, length, blocks, states) if x.ndim == 4 else (batch, channels, states)))

    def whole(sums, x):
        if x.ndim == 2:
            return sums.sum(0)
        return sums if blocks == x.shape[2] else sums.unflatten(2, (x.shape[2], -1)).sum(3)

    du, ddelta, dz = (like(x, batch, length, channels) for x in (given.u, given.delta, given.z))
    dA, dB, dC = (sums(x) for x in (given.A, given.B, given.C))
    dD, dbias = (like(x, batch, channels) for x in (given.D, given.delta_bias))
    dstate = like(given.state, batch, channels, states)
    _call(
        library.backward,
        **_inputs(given),
        **sizes,
        **_strides(u=given.u, delta=given.delta, z=given.z, dy=dy),
        checkpoints=checkpoints,
        dy=dy,
        dlast=dlast,
        du=du,
        ddelta=ddelta,
        dz=dz,
        dstate=dstate,
        dA=dA,
        dB=dB,
        dC=dC,
        dD=dD,
        dbias=dbias,
    )
    dD, dbias = (None if x is None else x.sum(0) for x in (dD, dbias))
    return du, ddelta, dA.sum(0), whole(dB, given.B), whole(dC, given.C), dD, dz, dbias, dstate


def _call(run, **fields: Tensor | int | None) -> None:
    """Fill `struct scan` and run one of the two passes. Tensors go in by their address; None stays null."""
    scan = Scan()
    for name, value in fields.items():
        if isinstance(value, Tensor):
            setattr(scan, f"p_{name}", value.data_ptr())
        elif value is not None:
            setattr(scan, name, value)
    if run(ctypes.byref(scan)):
        raise MemoryError("the selective scan found no memory to work in")


def _as_read(given: Inputs) -> Inputs:
    """The inputs in the layout that the loop reads: what depends on time by rows, all else contiguous."""
    u, delta, B, C, z = _rows(given.u, given.delta, given.B, given.C, given.z)
    A, D, bias, state, reset = dense(given.A, given.D, given.delta_bias, given.state, given.reset)
    return given._replace(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=bias, state=state, reset=reset)


def _rows(*tensors: *Given) -> tuple[*Given]:
    """The tensors with the numbers of their last axis side by side; a B or C of (D, N) contiguous."""
    given = cast("tuple[Tensor | None, ...]", tensors)
    rows = (x if x is None or (x.ndim > 2 and x.stride(-1) == 1) else dense(x)[0] for x in given)
    return cast("tuple[*Given]", tuple(rows))


def _inputs(given: Inputs) -> dict[str, Tensor | None]:
    """The inputs by the names of `struct scan`."""
    return {
        "u": given.u,
        "delta": given.delta,
        "A": given.A,
        "B": given.B,
        "C": given.C,
        "D": given.D,
        "z": given.z,
        "bias": given.delta_bias,
        "state": given.state,
        "reset": given.reset,
    }


def _sizes(given: Inputs) -> dict[str, int]:
    """The sizes, and the strides of B and C; no stride where they are (D, N)."""
    (batch, length, channels), states = given.u.shape, given.A.shape[1]
    parts = {"b": given.B, "c": given.C}
    unit = math.gcd(*(channels // x.shape[2] for x in parts.values() if x.ndim == 4)) or channels
    # A thread costs some tens of microseconds to start: one for each 100,000 steps of a state.
    threads = min(torch.get_num_threads(), 1 + batch * length * channels * states // 100_000)
    sizes = {"batch": batch, "length": length, "channels": channels, "states": states, "unit": unit}
    sizes |= {"softplus": int(given.delta_softplus), "threads": threads}
    for name, x in parts.items():
        if x.ndim == 4:
            sizes |= {f"{name}_{axis}": x.stride(i) for i, axis in enumerate("blg")}
            sizes[f"{name}_unit"] = channels // x.shape[2]
    return sizes


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    """The strides over batch and time, by the names of `struct scan`."""
    given = {name: x for name, x in tensors.items() if x is not None}
    return {f"{name}_{axis}": x.stride(i) for name, x in given.items() for i, axis in enumerate("bl")}
