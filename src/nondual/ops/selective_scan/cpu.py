"""The selective scan on a CPU: a loop over time in C, compiled when first used; where it cannot be, the same in torch.

Source: Gu and Dao 2023 (2312.00752), equation 2, Algorithm 2 and, for the backward pass, section 3.3.2; the equations
stand in cpu.c. Symbols: B batch, L steps, D channels, N states of a channel, G groups of channels that share B and C.

Both ways take time and memory linear in L: the state is kept once every `CHUNK` steps, and the states between are
computed anew in the backward pass. Why C: forward at B2 L2048 D512 N16, float32, one thread with AVX-512, torch.compile
over chunks of 16 steps took 3.0 times as long, numba's loop 8.9 times with an exponential of its own and 10.4 with the
library's (AMD EPYC, torch 2.13, numba 0.68, November 2026), and the way in plain torch below about nine times
(docs/measured/selective_scan_cpu.json).

A result of the compiled loop does not depend on the number of threads. In torch it may in the last place, as torch's
own exponential does.
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nondual.ops.selective_scan.reference import step_length

CHUNK = 64  # steps between two kept states
BLOCK = 64  # channels that one thread takes at a time
SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread")
NATIVE = ("-march=native", "-mcpu=native", "")  # the first that the compiler knows

# --- the compiled loop ---------------------------------------------------------------------------------------------

SIZES = (
    "batch length channels states unit u_b u_l delta_b delta_l z_b z_l dy_b dy_l "
    "b_b b_l b_g b_unit c_b c_l c_g c_unit softplus threads"
).split()
POINTERS = "u delta A B C D z bias state reset y last kept dy dlast du ddelta dz dstate dA dB dC dD dbias".split()


class Scan(ctypes.Structure):
    """`struct scan` of cpu.c."""

    _fields_ = [(name, ctypes.c_int64) for name in SIZES] + [(f"p_{name}", ctypes.c_void_p) for name in POINTERS]


_building = threading.Lock()


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled loop for float32 or float64, or None where it is to be done without.

    NONDUAL_CPU_SCAN=torch in the environment asks for that.
    """
    if os.environ.get("NONDUAL_CPU_SCAN") == "torch":
        return None
    with _building:
        return _library(dtype)


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(build(dtype)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(
            f"the selective scan's loop could not be compiled, and runs in plain torch, several times slower: {said}. "
            "Install a C compiler (gcc or clang), or name one in the environment variable CC",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def build(dtype: torch.dtype) -> Path:
    """Compile cpu.c for this machine into the user's cache, unless it is there, and return where that is.

    The cache is NONDUAL_CACHE, or nondual/ under XDG_CACHE_HOME or ~/.cache; the file's name is a hash of all that it
    depends on. It is written under another name and then moved, so that no process ever sees half of it.

    Raises:
        OSError: no compiler, or nowhere to write.
        subprocess.CalledProcessError: the compiler's refusal.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or [next(filter(shutil.which, ("cc", "gcc", "clang")), "")]
    if not shutil.which(compiler[0]):
        raise FileNotFoundError(f"no C compiler found: {compiler[0] or 'cc, gcc or clang'}")
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    defines = [f"-DSTEPS={CHUNK}", f"-DWIDTH={BLOCK}", *(["-DDOUBLE"] if dtype == torch.float64 else [])]
    told = [SOURCE.read_text(encoding="utf-8"), compiler, version, FLAGS, NATIVE, defines, _processor()]
    name = f"selective_scan-{hashlib.sha256(repr(told).encode()).hexdigest()[:24]}.so"
    for folder in (_cache, lambda: Path(tempfile.mkdtemp(prefix="nondual-"))):
        with contextlib.suppress(OSError):
            to = folder() / name
            to.parent.mkdir(parents=True, exist_ok=True)
            if not to.exists():
                _compile(compiler, defines, to)
            return to
    raise OSError(f"no folder to write to: neither {_cache()} nor {tempfile.gettempdir()}; set NONDUAL_CACHE")


def _compile(compiler: list[str], defines: list[str], to: Path) -> None:
    """One library, whole or not at all."""
    handle, new = tempfile.mkstemp(dir=to.parent, prefix=to.stem, suffix=".part")
    os.close(handle)
    try:
        for native in NATIVE:
            command = [*compiler, *FLAGS, *filter(None, [native]), *defines, str(SOURCE), "-o", new, "-lm"]
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode == 0:
                os.replace(new, to)
                return
        raise subprocess.CalledProcessError(ran.returncode, command, stderr=ran.stderr.strip())
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)


def _cache() -> Path:
    cache = os.environ.get("NONDUAL_CACHE")
    return Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nondual"


def _processor() -> str:
    """What "native" means here: the processor's name and all that it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return " ".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _rows(*tensors: Tensor | None) -> list[Tensor | None]:
    """What changes with time: its last axis dense, as the loop reads it. What does not, (D, N): dense altogether."""
    return [x if x is None or (x.ndim > 2 and x.stride(-1) == 1) else x.contiguous() for x in tensors]


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


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
    # A few tens of microseconds are what a thread costs: one for each 100,000 states.
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
    dlast, A, D, bias, state, reset = _dense(dlast, A, D, bias, state, reset)
    (batch, length, channels), states = u.shape, A.shape[1]
    sizes = _shape(u, A, B, C, softplus)
    tasks = channels // sizes["unit"] * -(-sizes["unit"] // BLOCK)

    def like(x, *shape):
        return None if x is None else u.new_empty(shape)

    def sums(x):  # of each task over its channels, or of each batch over time
        return like(x, batch, length, tasks, states) if x.ndim == 4 else like(x, batch, channels, states)

    def whole(sums, x):
        if x.ndim == 2:
            return sums.sum(0)
        return sums if tasks == x.shape[2] else sums.unflatten(2, (x.shape[2], -1)).sum(3)

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


# --- the same in torch ---------------------------------------------------------------------------------------------
# Time first within a chunk of T steps, so that a step's numbers lie together: x (T, B, D), states (T, B, D, N), and B
# or C (T, B, G, N), or (D, N). Each of the next three functions has its gradients from the other two.


def _spread(x: Tensor, B: Tensor) -> Tensor:
    """B x: from channels to their states."""
    if B.ndim == 2:
        return x[..., None] * B
    return (x.unflatten(2, (B.shape[2], -1))[..., None] * B[..., None, :]).flatten(2, 3)


def _gather(h: Tensor, C: Tensor) -> Tensor:
    """Σ_n C h: from the states to their channel."""
    if C.ndim == 2:
        return (h * C).sum(-1)
    return (h.unflatten(2, (C.shape[2], -1)) @ C[..., None]).flatten(2)


def _meet(h: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """Σ h x over the channels that share a row of B or C, or over time."""
    if like.ndim == 2:
        return (h * x[..., None]).sum((0, 1))
    groups = (like.shape[2], -1)
    return (x.unflatten(2, groups)[..., None, :] @ h.unflatten(2, groups)).squeeze(-2)


def _chunk(start: int, *tensors: Tensor | None) -> list[Tensor | None]:
    """CHUNK steps of tensors (B, L, …), time first; (D, N) as it is."""
    return [x if x is None or x.ndim == 2 else x[:, start : start + CHUNK].transpose(0, 1) for x in tensors]


def _states(h, delta, x, A, B, resets) -> tuple[Tensor, Tensor]:
    """a and the states of a chunk, from the state before it."""
    a, hs = torch.exp(delta[..., None] * A), _spread(x, B)
    for t, (a_t, h_t) in enumerate(zip(a, hs)):
        if t in resets:
            h = h.masked_fill(resets[t], 0)
        h = torch.addcmul(h_t, a_t, h, out=h_t)
    return a, hs


def _resets(start: int, reset: Tensor | None) -> dict[int, Tensor]:
    """The steps of a chunk at which some sequence begins, and for which of the batch (B, 1, 1)."""
    (reset,) = _chunk(start, None if reset is None else reset[..., None, None])
    return {} if reset is None else {t: reset[t] for t in reset.flatten(1).any(1).nonzero().flatten().tolist()}


def _forward_plain(u, delta, A, B, C, D, z, bias, state, reset, softplus):
    delta = step_length(delta, bias, softplus)
    y, last, kept = _outputs(u, A)
    h = torch.zeros_like(last) if state is None else state
    for start in range(0, u.shape[1], CHUNK):
        if start:
            kept[:, start // CHUNK - 1] = h
        u_, delta_, B_, C_ = _chunk(start, u, delta, B, C)
        _, hs = _states(h, delta_, delta_ * u_, A, B_, _resets(start, reset))
        h = hs[-1]
        y[:, start : start + CHUNK] = _gather(hs, C_).transpose(0, 1)
    if D is not None:
        y = y + D * u
    return y if z is None else y * F.silu(z), last.copy_(h), kept


def _backward_plain(dout, dlast, kept, u, delta, A, B, C, D, z, bias, state, reset, softplus):
    raw = delta if bias is None else delta + bias
    delta = F.softplus(raw) if softplus else raw
    dy = dout if z is None else dout * F.silu(z)
    y, dx, ddelta = (torch.empty_like(u) for _ in range(3))
    dA = torch.zeros_like(A)
    dB, dC = (torch.zeros_like(x) for x in (B, C))
    g = A.new_zeros(u.shape[0], *A.shape) if dlast is None else dlast
    for start in reversed(range(0, u.shape[1], CHUNK)):
        here, resets = slice(start, start + CHUNK), _resets(start, reset)
        u_, delta_, B_, C_, dy_ = _chunk(start, u, delta, B, C, dy)
        h = kept[:, start // CHUNK - 1] if start else torch.zeros_like(g) if state is None else state
        a, hs = _states(h, delta_, delta_ * u_, A, B_, resets)
        gs = _spread(dy_, C_)
        for t in reversed(range(len(gs))):
            g = torch.add(gs[t], g, out=gs[t]) * a[t]
            if t in resets:
                g = g.masked_fill(resets[t], 0)
        before = torch.cat([h[None], hs[:-1]])
        for t, at in resets.items():
            before[t].masked_fill_(at, 0)
        for d, like, sums in ((dB, B_, _meet(gs, delta_ * u_, B_)), (dC, C_, _meet(hs, dy_, C_))):
            if like.ndim == 2:
                d += sums
            else:
                d[:, here] = sums.transpose(0, 1)
        dx[:, here] = _gather(gs, B_).transpose(0, 1)
        y[:, here] = _gather(hs, C_).transpose(0, 1)
        dstep = gs.mul_(a).mul_(before)  # of Δ A
        dA += _meet(dstep, delta_, A)
        ddelta[:, here] = _gather(dstep, A).transpose(0, 1)
    ddelta += u * dx
    if softplus:
        ddelta *= torch.sigmoid(raw).masked_fill_(raw > 20, 1)  # where torch's softplus is the identity
    du = delta * dx
    if D is not None:
        du += D * dy
        y += D * u
    dD, dbias = (None if x is None else d.sum((0, 1)) for x, d in ((D, dy * u), (bias, ddelta)))
    dz = None
    if z is not None:
        gate = torch.sigmoid(z)
        dz = dout * y * gate * (1 + z * (1 - gate))
    return du, ddelta, dA, dB, dC, dD, dz, dbias, None if state is None else g


# --- as an operator of torch ---------------------------------------------------------------------------------------


def _outputs(u: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for y (B, L, D), the last state (B, D, N) and the states between chunks (B, chunks - 1, D, N)."""
    (batch, length, channels), states = u.shape, A.shape[1]
    wide = torch.promote_types(u.dtype, torch.float32)
    last = u.new_empty(batch, channels, states, dtype=wide)
    return u.new_empty(u.shape), last, last.new_empty(batch, (length - 1) // CHUNK, channels, states)


def _wide(like: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """All numbers in float32, or in float64 where `like` is."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return [x if x is None or x.dtype == torch.bool else x.to(wide) for x in tensors]


@torch.library.custom_op("nondual::selective_scan_cpu", mutates_args=(), device_types="cpu")
def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, state: Tensor | None, reset: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given = _wide(u, u, delta, A, B, C, D, z, bias, state, reset)
    compiled = library(given[0].dtype)
    with torch.autocast("cpu", enabled=False):
        y, last, kept = _forward_compiled(compiled, *given, softplus) if compiled else _forward_plain(*given, softplus)
    return y.to(u.dtype), last, kept


@_forward.register_fake
def _(u, delta, A, B, C, D, z, bias, state, reset, softplus):
    return _outputs(u, A)


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
    return tuple(u.new_empty(0) if x is None else grad.to(x.dtype) for grad, x in zip(grads, inputs))


@_backward.register_fake
def _(dy, dlast, kept, u, delta, A, B, C, D, z, bias, state, reset, softplus):
    return tuple(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in (u, delta, A, B, C, D, z, bias, state))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no zeros for what nobody asked after, the states between chunks least of all
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
        RuntimeError: a second derivative.
        MemoryError: no memory for what a thread works in.
    """
    y, last, _ = _forward(u, delta, A, B, C, D, z, delta_bias, state, reset, delta_softplus)
    return y, last
