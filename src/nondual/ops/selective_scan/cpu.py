"""The selective scan on a CPU: a loop over time in C, compiled at its first use; without a C compiler, in plain torch.

Source: Gu and Dao 2023 (2312.00752), equation 2, Algorithm 2 and, for the backward pass, section 3.3.2; the equations
are written out in cpu.c. Symbols: B batch, L steps, D channels, N states of a channel, G groups of channels that share
B and C.

Both ways take time and memory linear in L: the forward pass saves the state once every `CHUNK` steps, and the backward
pass computes the states between again. Why C: forward at B2 L2048 D512 N16, float32, one thread with AVX-512,
torch.compile over chunks of 16 steps took 3.0 times as long, numba's loop 8.9 times with an exponential of its own and
10.4 with the library's (AMD EPYC, torch 2.13, numba 0.68, November 2026). How long the way in plain torch takes stands
in docs/measured/selective_scan_cpu.json.

A result of the compiled loop does not depend on the number of threads. That of the way in torch may differ in the last
place, as torch's own exponential does.
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import mmap
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path
from typing import TypeVarTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nondual.ops.discretize import step_length
from nondual.ops.dtypes import accumulation_dtype
from nondual.ops.impl import refuses_transforms
from nondual.store import cache_folder

Given = TypeVarTuple("Given")  # each of them Tensor, or Tensor | None
CHUNK = 64  # steps between two saved states
BLOCK = 64  # channels that go through a chunk together
SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread")
NATIVE = ("-march=native", "-mcpu=native", "")  # the first that the compiler accepts
SECONDS_TO_ANSWER, SECONDS_TO_COMPILE = 20, 120  # after these a compiler is taken to hang

# --- finding or compiling the loop -----------------------------------------------------------------------------------

SIZES = (
    "batch length channels states unit u_b u_l delta_b delta_l z_b z_l dy_b dy_l "
    "b_b b_l b_g b_unit c_b c_l c_g c_unit softplus threads"
).split()
POINTERS = "u delta A B C D z bias state reset y last kept dy dlast du ddelta dz dstate dA dB dC dD dbias".split()


class Scan(ctypes.Structure):
    """`struct scan` of cpu.c."""

    _fields_ = [(name, ctypes.c_int64) for name in SIZES] + [(f"p_{name}", ctypes.c_void_p) for name in POINTERS]


_loops: dict[torch.dtype, ctypes.CDLL | None] = {}  # what `library` has found; None where there is no loop
_compiling = threading.Lock()  # held while a loop is looked for or compiled: seconds
_opening = threading.RLock()  # held while the system opens a library: an instant


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled loop for float32 or float64, or None where there is none and plain torch must serve.

    It is None where the environment says NONDUAL_CPU_SCAN=torch, and where the loop could not be compiled: then the
    first call warns, and none tries again.
    """
    if os.environ.get("NONDUAL_CPU_SCAN") == "torch":
        return None
    if dtype not in _loops:
        with _compiling:
            if dtype not in _loops:
                _loops[dtype] = _load_or_warn(dtype)
    return _loops[dtype]


def _renew_locks() -> None:
    """In a forked child: the thread that held a lock is not there to release it."""
    global _compiling, _opening
    _compiling, _opening = threading.Lock(), threading.RLock()


if hasattr(os, "register_at_fork"):
    # A fork waits until no library is being opened, since the system's own lock would stay held in the child. It does
    # not wait for a compiler: the child finds no loop yet, and looks for it itself.
    os.register_at_fork(
        before=lambda: _opening.acquire(), after_in_parent=lambda: _opening.release(), after_in_child=_renew_locks
    )


def _load_or_warn(dtype: torch.dtype) -> ctypes.CDLL | None:
    try:
        return _load(dtype)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error))[-1000:]
        if not any(loop is None for loop in _loops.values()):  # once, not for each dtype
            warnings.warn(
                f"the selective scan's loop could not be compiled, and runs in plain torch, several times slower: "
                f"{said}. Install a C compiler (gcc or clang), or name one in the environment variable CC",
                RuntimeWarning,
                stacklevel=4,
            )
        return None


def _load(dtype: torch.dtype) -> ctypes.CDLL:
    """The loop from the cache folder (`nondual.store.cache_folder`), compiled into it where it is not there.

    A library's name holds a hash of all that it was made from and a hash of its bytes: what was cut short or replaced
    is not opened, but removed and compiled again. The library is made under another name and then moved, so that no
    process ever sees a part of it. Where the folder cannot be written to, what it holds is still used; what it lacks is
    compiled among the temporary files, for this process alone.

    Raises:
        OSError: no compiler, or nowhere to write.
        subprocess.CalledProcessError: the compiler refuses.
        subprocess.TimeoutExpired: the compiler hangs.
    """
    compiler = _compiler()
    start = f"selective_scan-{_key(compiler, dtype)}"
    with contextlib.suppress(OSError):
        folder = cache_folder()
        for path in sorted(folder.glob(f"{start}-*.so")):
            try:
                return _open(path)
            except OSError:
                with contextlib.suppress(OSError):
                    path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        return _open(_compile(compiler, dtype, folder, start))
    try:
        private = tempfile.TemporaryDirectory(prefix="nondual-", ignore_cleanup_errors=True)
    except OSError as error:
        raise OSError(f"no folder to write to: neither the cache nor {tempfile.tempdir}; set NONDUAL_CACHE") from error
    with private as folder:  # an open library stays in memory when its file is gone
        return _open(_compile(compiler, dtype, Path(folder), start))


def _open(path: Path) -> ctypes.CDLL:
    """The library at this path, if it is the one that its name tells of.

    Raises:
        OSError: it was cut short or replaced, is not for this machine, or has not the two functions.
    """
    if _digest(path.read_bytes()) != path.stem.rpartition("-")[2]:
        raise OSError(f"{path} was changed since it was compiled")
    with _opening:
        loop = ctypes.CDLL(str(path))
    if not (hasattr(loop, "forward") and hasattr(loop, "backward")):
        raise OSError(f"{path} has no functions forward and backward")
    return loop


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def _compiler() -> list[str]:
    """The command that CC names, with its options, or else the first of cc, gcc and clang that is there.

    Raises:
        OSError: CC cannot be read as a command, or there is no such compiler.
    """
    try:
        command = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise OSError(f"CC must be a command, got {os.environ['CC']!r} ({error})") from None
    command = command or [next(filter(shutil.which, ("cc", "gcc", "clang")), "")]
    if not shutil.which(command[0]):
        raise FileNotFoundError(f"no C compiler found: {command[0] or 'cc, gcc or clang'}")
    return command


def _key(compiler: list[str], dtype: torch.dtype) -> str:
    """A hash of all that the compiled loop depends on."""
    version = _run([*compiler, "--version"], SECONDS_TO_ANSWER)
    source = SOURCE.read_text(encoding="utf-8")
    return _digest(repr([source, compiler, version, FLAGS, NATIVE, _defines(dtype), _processor()]).encode())


def _defines(dtype: torch.dtype) -> list[str]:
    return [f"-DSTEPS={CHUNK}", f"-DWIDTH={BLOCK}", *(["-DDOUBLE"] if dtype == torch.float64 else [])]


def _compile(compiler: list[str], dtype: torch.dtype, folder: Path, start: str) -> Path:
    """Compile cpu.c for this machine into the folder, whole or not at all; its mode is that of any new file (umask)."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".selective_scan-") as private:
        new = Path(private) / "new.so"
        for native in NATIVE:
            options = [*FLAGS, *filter(None, [native]), *_defines(dtype)]
            try:
                _run([*compiler, *options, str(SOURCE), "-o", str(new), "-lm"], SECONDS_TO_COMPILE)
                break
            except subprocess.CalledProcessError:
                if native == NATIVE[-1]:
                    raise
        if not new.exists():
            raise FileNotFoundError(f"{shlex.join(compiler)} ran, and compiled nothing")
        path = folder / f"{start}-{_digest(new.read_bytes())}.so"
        os.replace(new, path)
    return path


def _run(command: list[str], seconds: float) -> str:
    """What a command prints. It is stopped, with all that it has started, when its time is over.

    Raises:
        OSError: it cannot be run.
        subprocess.CalledProcessError: it fails; stderr is what it said.
        subprocess.TimeoutExpired: its time is over.
    """
    with subprocess.Popen(
        command, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            out, said = process.communicate(timeout=seconds)
        except BaseException:  # an interrupt too
            with contextlib.suppress(OSError):
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=said.strip())
    return out


def _processor() -> str:
    """What "native" means here: the processor's name and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return " ".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


# --- memory ----------------------------------------------------------------------------------------------------------

LARGE = 8 * 2**20  # bytes: from here on malloc may give memory back to the system and take it anew at every call
HUGE_PAGE = 2 * 2**20


@functools.cache
def _madvise():
    """The system's madvise, or None where it has no huge pages."""
    try:
        function = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None
    except (OSError, AttributeError, TypeError):
        return None
    if function:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _new(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor, dense; where it is large, in huge pages if the system has them.

    The first touch of each page costs a page fault: for 32 MB 8,192 of them in pages of 4 KiB, and 16 in pages of
    2 MiB. Only whole huge pages within the tensor are asked for, so that it takes no more memory.
    """
    x = like.new_empty(shape, dtype=dtype)
    start, size = x.data_ptr(), x.numel() * x.element_size()
    if size >= LARGE and (madvise := _madvise()):
        first = -(-start // HUGE_PAGE) * HUGE_PAGE
        madvise(first, (start + size - first) // HUGE_PAGE * HUGE_PAGE, mmap.MADV_HUGEPAGE)
    return x


def _copy(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A dense copy."""
    return _new(x, *x.shape, dtype=dtype).copy_(x)


# --- the compiled loop -----------------------------------------------------------------------------------------------


def _rows(*tensors: *Given) -> tuple[*Given]:
    """As the loop reads them: what changes with time with its last axis dense; (D, N), which does not, dense wholly."""
    given = cast("tuple[Tensor | None, ...]", tensors)
    rows = (x if x is None or (x.ndim > 2 and x.stride(-1) == 1) else _dense(x)[0] for x in given)
    return cast("tuple[*Given]", tuple(rows))


def _dense(*tensors: *Given) -> tuple[*Given]:
    given = cast("tuple[Tensor | None, ...]", tensors)
    return cast("tuple[*Given]", tuple(x if x is None or x.is_contiguous() else _copy(x) for x in given))


def _call(run, **given: Tensor | int | None) -> None:
    """Fill `struct scan` and run one of the two passes. Tensors go in by their address; None stays null."""
    scan = Scan()
    for name, value in given.items():
        if isinstance(value, Tensor):
            setattr(scan, f"p_{name}", value.data_ptr())
        elif value is not None:
            setattr(scan, name, value)
    if run(ctypes.byref(scan)):
        raise MemoryError("the selective scan found no memory to work in")


def _shape(u: Tensor, A: Tensor, B: Tensor, C: Tensor, softplus: bool) -> dict[str, int]:
    """The sizes, and the strides of B and C; no stride where they are (D, N)."""
    (batch, length, channels), states = u.shape, A.shape[1]
    unit = math.gcd(*(channels // x.shape[2] for x in (B, C) if x.ndim == 4)) or channels
    # A thread costs some tens of microseconds to start: one for each 100,000 steps of a state.
    threads = min(torch.get_num_threads(), 1 + batch * length * channels * states // 100_000)
    sizes = dict(batch=batch, length=length, channels=channels, states=states, unit=unit)
    sizes |= dict(softplus=int(softplus), threads=threads)
    for name, x in (("b", B), ("c", C)):
        if x.ndim == 4:
            strides = dict(zip(("b", "l", "g"), x.stride()))
            sizes |= {f"{name}_{axis}": stride for axis, stride in strides.items()}
            sizes[f"{name}_unit"] = channels // x.shape[2]
    return sizes


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    """The strides over batch and time, by the names of `struct scan`."""
    given = {name: x for name, x in tensors.items() if x is not None}
    return {f"{name}_{axis}": x.stride(i) for name, x in given.items() for i, axis in enumerate("bl")}


def _forward_compiled(run, u, delta, A, B, C, D, z, bias, state, reset, softplus):
    (u, delta, B, C, z), (A, D, bias, state, reset) = _rows(u, delta, B, C, z), _dense(A, D, bias, state, reset)
    y, last, kept = _outputs(u, A)
    _call(
        run.forward, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, bias=bias, state=state, reset=reset,
        y=y, last=last, kept=kept, **_shape(u, A, B, C, softplus), **_strides(u=u, delta=delta, z=z),
    )  # fmt: skip
    return y, last, kept


def _backward_compiled(run, dy, dlast, kept, u, delta, A, B, C, D, z, bias, state, reset, softplus):
    dy, u, delta, B, C, z = _rows(dy, u, delta, B, C, z)
    dlast, kept, A, D, bias, state, reset = _dense(dlast, kept, A, D, bias, state, reset)
    (batch, length, channels), states = u.shape, A.shape[1]
    sizes = _shape(u, A, B, C, softplus)
    blocks = channels // sizes["unit"] * -(-sizes["unit"] // BLOCK)

    def like(x, *shape):
        return None if x is None else _new(u, *shape)

    def sums(x):  # of each block over its channels, or of each sequence over time
        return _new(u, batch, length, blocks, states) if x.ndim == 4 else _new(u, batch, channels, states)

    def whole(sums, x):
        if x.ndim == 2:
            return sums.sum(0)
        return sums if blocks == x.shape[2] else sums.unflatten(2, (x.shape[2], -1)).sum(3)

    du, ddelta, dz = (like(x, *u.shape) for x in (u, delta, z))
    dA, dB, dC = (sums(x) for x in (A, B, C))
    dD, dbias = (like(x, batch, channels) for x in (D, bias))
    dstate = like(state, batch, channels, states)
    _call(
        run.backward, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, bias=bias, state=state, reset=reset, kept=kept,
        dy=dy, dlast=dlast, du=du, ddelta=ddelta, dz=dz, dstate=dstate, dA=dA, dB=dB, dC=dC, dD=dD, dbias=dbias,
        **sizes, **_strides(u=u, delta=delta, z=z, dy=dy),
    )  # fmt: skip
    dD, dbias = (None if x is None else x.sum(0) for x in (dD, dbias))
    return du, ddelta, dA.sum(0), whole(dB, B), whole(dC, C), dD, dz, dbias, dstate


# --- the same in torch -----------------------------------------------------------------------------------------------
# Time first within a chunk of T steps, so that a step's numbers lie together: x (T, B, D), states (T, B, D, N), and B
# or C (T, B, G, N), or (D, N). The gradients of each of the next three functions are made of the other two. Results are
# dense, whatever the layout of the inputs, as they are from the compiled loop. Tensors (T, B, D, N) are made once for a
# call and written to again in each chunk (`out`, `room`): memory taken anew would cost page faults each time.


def _spread(x: Tensor, B: Tensor, out: Tensor) -> Tensor:
    """B x: from channels to their states."""
    if B.ndim == 2:
        return torch.mul(x[..., None], B, out=out)
    groups = (B.shape[2], -1)
    torch.mul(x.unflatten(2, groups)[..., None], B[..., None, :], out=out.unflatten(2, groups))
    return out


def _gather(h: Tensor, C: Tensor, room: Tensor) -> Tensor:
    """Σ_n C h: from the states to their channel."""
    if C.ndim == 2:
        return torch.mul(h, C, out=room).sum(-1)
    return (h.unflatten(2, (C.shape[2], -1)) @ C[..., None]).flatten(2)


def _meet(h: Tensor, x: Tensor, like: Tensor, room: Tensor) -> Tensor:
    """Σ h x over the channels that share a row of B or C, or over time."""
    if like.ndim == 2:
        return torch.mul(h, x[..., None], out=room).sum((0, 1))
    groups = (like.shape[2], -1)
    return (x.unflatten(2, groups)[..., None, :] @ h.unflatten(2, groups)).squeeze(-2)


def _chunk(start: int, *tensors: *Given) -> tuple[*Given]:
    """CHUNK steps of tensors (B, L, …), time first; (D, N) as it is."""
    given = cast("tuple[Tensor | None, ...]", tensors)
    parts = (x if x is None or x.ndim == 2 else x[:, start : start + CHUNK].transpose(0, 1) for x in given)
    return cast("tuple[*Given]", tuple(parts))


def _states(h, delta, x, A, B, resets, a, hs) -> tuple[Tensor, Tensor]:
    """a and the states of a chunk, from the state before it, into the last two arguments."""
    a, hs = torch.mul(delta[..., None], A, out=a).exp_(), _spread(x, B, hs)
    for t, (a_t, h_t) in enumerate(zip(a, hs)):
        if t in resets:
            h = h.masked_fill(resets[t], 0)
        h = torch.addcmul(h_t, a_t, h, out=h_t)
    return a, hs


def _rooms(count: int, u: Tensor, A: Tensor) -> list[Tensor]:
    """Room for the states of a chunk (T, B, D, N), so many times."""
    (batch, length, channels), states = u.shape, A.shape[1]
    return [_new(u, min(length, CHUNK), batch, channels, states) for _ in range(count)]


def _resets(start: int, reset: Tensor | None) -> dict[int, Tensor]:
    """The steps of a chunk at which some sequence begins, and in which of the batch (B, 1, 1)."""
    (reset,) = _chunk(start, None if reset is None else reset[..., None, None])
    return {} if reset is None else {t: reset[t] for t in reset.flatten(1).any(1).nonzero().flatten().tolist()}


def _forward_plain(u, delta, A, B, C, D, z, bias, state, reset, softplus):
    y, last, kept = _outputs(u, A)
    saved = _between(kept, u, A)
    rooms = _rooms(3, u, A)
    h = torch.zeros_like(last) if state is None else state
    for start in range(0, u.shape[1], CHUNK):
        if start:
            saved[:, start // CHUNK - 1] = h
        u_, delta_, B_, C_, z_ = _chunk(start, u, delta, B, C, z)
        delta_ = step_length(delta_, bias, softplus)
        a, hs, room = (x[: len(u_)] for x in rooms)
        _states(h, delta_, delta_ * u_, A, B_, _resets(start, reset), a, hs)
        h = hs[-1].clone()
        y_ = _gather(hs, C_, room)
        if D is not None:
            y_ += D * u_
        if z_ is not None:
            y_ *= F.silu(z_)
        y[:, start : start + CHUNK] = y_.transpose(0, 1)
    return y, last.copy_(h), kept


def _backward_plain(dout, dlast, kept, u, delta, A, B, C, D, z, bias, state, reset, softplus):
    du, ddelta = _new(u, *u.shape), _new(u, *u.shape)
    dz = None if z is None else _new(u, *u.shape)
    dA, dB, dC = (x.new_zeros(x.shape) for x in (A, B, C))
    dD, dbias = (None if x is None else x.new_zeros(x.shape) for x in (D, bias))
    saved = _between(kept, u, A)
    rooms = _rooms(4, u, A)
    g = A.new_zeros(u.shape[0], *A.shape) if dlast is None else dlast
    for start in reversed(range(0, u.shape[1], CHUNK)):
        here, resets = slice(start, start + CHUNK), _resets(start, reset)
        u_, raw, B_, C_, z_, dout_ = _chunk(start, u, delta, B, C, z, dout)
        raw = raw if bias is None else raw + bias
        delta_ = F.softplus(raw) if softplus else raw
        dy = dout_ if z_ is None else dout_ * F.silu(z_)
        h = saved[:, start // CHUNK - 1] if start else torch.zeros_like(g) if state is None else state
        a, hs, gs, room = (x[: len(u_)] for x in rooms)
        _states(h, delta_, delta_ * u_, A, B_, resets, a, hs)
        _spread(dy, C_, gs)
        for t in reversed(range(len(gs))):
            g = torch.add(gs[t], g, out=gs[t]) * a[t]
            if t in resets:
                g = g.masked_fill(resets[t], 0)
        for d, like, sums in ((dB, B_, _meet(gs, delta_ * u_, B_, room)), (dC, C_, _meet(hs, dy, C_, room))):
            if like.ndim == 2:
                d += sums
            else:
                d[:, here] = sums.transpose(0, 1)
        if dz is not None and z_ is not None:
            y = _gather(hs, C_, room)
            if D is not None:
                y += D * u_
            gate = torch.sigmoid(z_)
            dz[:, here] = (dout_ * y * gate * (1 + z_ * (1 - gate))).transpose(0, 1)
        dx = _gather(gs, B_, room)
        du_ = delta_ * dx
        if D is not None:
            du_ += D * dy
            dD += (dy * u_).sum((0, 1))
        du[:, here] = du_.transpose(0, 1)
        dstep = gs.mul_(a)  # of Δ A: g a times the state before
        dstep[0].mul_(h)
        dstep[1:].mul_(hs[:-1])
        for t, at in resets.items():
            dstep[t].masked_fill_(at, 0)
        dA += _meet(dstep, delta_, A, room)
        ddelta_ = _gather(dstep, A, room) + u_ * dx
        if softplus:
            ddelta_ *= torch.sigmoid(raw).masked_fill_(raw > 20, 1)  # torch's softplus is the identity above 20
        if bias is not None:
            dbias += ddelta_.sum((0, 1))
        ddelta[:, here] = ddelta_.transpose(0, 1)
    return du, ddelta, dA, dB, dC, dD, dz, dbias, None if state is None else _copy(g)


# --- as an operator of torch -----------------------------------------------------------------------------------------


def _sizes(u: Tensor, A: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of y (B, L, D), the last state (B, D, N), and the states between chunks (B, chunks - 1, D, N), flat.

    The last are two numbers longer than needed. torch asks of every size whether it is 0 or 1, and a graph compiled or
    exported for any length would otherwise be held to one chunk, or to several.
    """
    (batch, length, channels), states = u.shape, A.shape[1]
    between = batch * ((length - 1) // CHUNK) * channels * states
    return (batch, length, channels), (batch, channels, states), (between + 2,)


def _outputs(u: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the three results of the forward pass, in u's dtype, which is float32 or float64."""
    y, last, kept = (_new(u, *size) for size in _sizes(u, A))
    kept[-2:] = 0
    return y, last, kept


def _between(kept: Tensor, u: Tensor, A: Tensor) -> Tensor:
    """The states between chunks (B, chunks - 1, D, N), as a view."""
    return kept[:-2].view(u.shape[0], (u.shape[1] - 1) // CHUNK, *A.shape)


def _wide(like: Tensor, *tensors: *Given) -> tuple[*Given]:
    """All numbers in float32, or in float64 where `like` is."""
    wide = accumulation_dtype(like.dtype)
    given = cast("tuple[Tensor | None, ...]", tensors)
    cast_up = (x if x is None or x.dtype in (torch.bool, wide) else _copy(x, wide) for x in given)
    return cast("tuple[*Given]", tuple(cast_up))


@torch.library.custom_op("nondual::selective_scan_cpu", mutates_args=(), device_types="cpu")
def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, state: Tensor | None, reset: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given = _wide(u, u, delta, A, B, C, D, z, bias, state, reset)
    compiled = library(given[0].dtype)
    with torch.autocast("cpu", enabled=False):
        y, last, kept = _forward_compiled(compiled, *given, softplus) if compiled else _forward_plain(*given, softplus)
    return y if y.dtype == u.dtype else _copy(y, u.dtype), last, kept


@_forward.register_fake
def _(u, delta, A, B, C, D, z, bias, state, reset, softplus):
    y, last, kept = _sizes(u, A)
    wide = accumulation_dtype(u.dtype)
    return u.new_empty(y), u.new_empty(last, dtype=wide), u.new_empty(kept, dtype=wide)


@torch.library.custom_op("nondual::selective_scan_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor, dlast: Tensor | None, kept: Tensor,
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, state: Tensor | None, reset: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (u, delta, A, B, C, D, z, bias, state)
    given = [*_wide(u, dy, dlast, kept, *inputs, reset), softplus]
    compiled = library(given[0].dtype)
    with torch.autocast("cpu", enabled=False):
        grads = _backward_compiled(compiled, *given) if compiled else _backward_plain(*given)
    return tuple(  # pyright: ignore[reportReturnType] nine, as there are nine inputs
        u.new_empty(0) if x is None or grad is None else grad if grad.dtype == x.dtype else _copy(grad, x.dtype)
        for grad, x in zip(grads, inputs)
    )


@_backward.register_fake
def _(dy, dlast, kept, u, delta, A, B, C, D, z, bias, state, reset, softplus):
    return tuple(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in (u, delta, A, B, C, D, z, bias, state))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # an output that the loss does not depend on gets None, not a tensor of zeros
    *tensors, ctx.softplus = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx, dy, dlast, dkept):
    *inputs, kept = ctx.saved_tensors
    if dy is None:
        dy = inputs[0].new_zeros(()).expand(inputs[0].shape)
    grads = _backward(dy, dlast, kept, *inputs, ctx.softplus)
    return *(None if x is None else grad for grad, x in zip(grads, inputs)), None, None  # none for reset, softplus


def _refuse(ctx, *_):
    raise RuntimeError("selective_scan(impl='cpu') has no second derivative; impl='reference' has one")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


def _refuse_transforms(*tensors: Tensor | None) -> None:
    """
    Raises:
        RuntimeError: the tensors are under forward-mode differentiation or a transform of torch.func.
    """
    if refused := refuses_transforms(*tensors):
        raise RuntimeError(f"selective_scan(impl='cpu') {refused}; impl='reference' or 'auto' can do it")


def _guard(operator) -> None:
    """Have an operator refuse those transforms even where it is called by its own name, torch.ops.nondual.….

    Without a gradient to compute torch would go past its autograd formula and lose a tangent without a word.
    """
    try:
        from torch._library.autograd import make_autograd_impl
    except ImportError:  # torch has no public way to this; the check in `selective_scan` below stays
        return
    follow = make_autograd_impl(operator._opoverload, operator)

    def guarded(keyset, *inputs):
        _refuse_transforms(*(x for x in inputs if isinstance(x, Tensor)))
        return follow(keyset, *inputs)

    _library.impl(operator._opoverload._opname, guarded, "AutogradCPU", with_keyset=True)


_library = torch.library.Library("nondual", "FRAGMENT")
_guard(_forward)
_guard(_backward)

# --- public --------------------------------------------------------------------------------------------------------


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    state: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Every output and the last state; the input is taken as `nondual.ops.selective_scan` has checked it.

    Args:
        u: input (B, L, D), of one element or more, in float16, bfloat16, float32 or float64.
        delta: step lengths (B, L, D), before bias and softplus.
        A: (D, N).
        B: (B, L, G, N), or (D, N) where it does not depend on time.
        C: likewise.
        D: skip (D,).
        z: gate (B, L, D), before its SiLU.
        delta_bias: (D,), added to delta.
        delta_softplus: take the softplus of delta then.
        state: the state before the first step (B, D, N); zero where left out.
        reset: (B, L), True where a sequence begins and all that came before is forgotten.

    Returns:
        y (B, L, D) in u's dtype, and the last state (B, D, N) in float32 (float64 for float64).

    Raises:
        RuntimeError: a second derivative, a forward-mode derivative, or a transform of torch.func.
        MemoryError: no memory for what a thread works in.
    """
    _refuse_transforms(u, delta, A, B, C, D, z, delta_bias, state, reset)
    y, last, _ = _forward(u, delta, A, B, C, D, z, delta_bias, state, reset, delta_softplus)
    return y, last
