"""Finding or compiling a loop in C: the cache of compiled libraries, the compiler, locks that outlive a fork.

An engine for a CPU describes its file as a `Loop`. It is compiled at the first use, for the processor at hand, and kept
in the cache folder.
"""

import contextlib
import ctypes
import hashlib
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
from typing import NamedTuple

import torch

from nondual.store import cache_folder

FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread")
NATIVE = ("-march=native", "-mcpu=native", "")  # the first that the compiler accepts
SECONDS_TO_ANSWER, SECONDS_TO_COMPILE = 20, 120  # after these a compiler is taken to hang

_loops: dict[tuple[str, torch.dtype], ctypes.CDLL | None] = {}  # what `library` has found; None: there is no loop
_compiling = threading.Lock()  # held while a loop is looked for or compiled: seconds
_opening = threading.RLock()  # held while the system opens a library: an instant


class Loop(NamedTuple):
    """A file in C that has the functions forward and backward, for float32 or, where DOUBLE is defined, float64.

    Attributes:
        name: what the names of its libraries start with.
        source: the file.
        sizes: the constants that it wants defined.
        variable: an environment variable; where it is "torch", the loop is not used.
        told: what a warning says of it where it cannot be compiled.
    """

    name: str
    source: Path
    sizes: dict[str, int]
    variable: str
    told: str


def library(dtype: torch.dtype, of: Loop) -> ctypes.CDLL | None:
    """The compiled loop for float32 or float64, or None where there is none and plain torch must serve.

    It is None where the loop's environment variable says "torch", and where the loop could not be compiled: then the
    first call warns, and none tries again.
    """
    if os.environ.get(of.variable) == "torch":
        return None
    key = (of.name, dtype)
    if key not in _loops:
        with _compiling:
            if key not in _loops:
                _loops[key] = _load_or_warn(dtype, of)
    return _loops[key]


def _renew_locks() -> None:
    """In a forked child: the thread that held a lock does not exist there, and would never release it."""
    global _compiling, _opening
    _compiling, _opening = threading.Lock(), threading.RLock()


if hasattr(os, "register_at_fork"):
    # A fork waits until no library is being opened, since the lock that the system's loader takes would stay held in
    # the child. It does not wait for a compiler: the child finds no loop yet, and compiles one itself.
    os.register_at_fork(
        before=lambda: _opening.acquire(), after_in_parent=lambda: _opening.release(), after_in_child=_renew_locks
    )


def _load_or_warn(dtype: torch.dtype, of: Loop) -> ctypes.CDLL | None:
    try:
        return _load(dtype, of)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error))[-1000:]
        if not any(name == of.name and loop is None for (name, _), loop in _loops.items()):  # once, not for each dtype
            warnings.warn(
                f"{of.told}: {said}. Install a C compiler (gcc or clang), or name one in the environment variable CC",
                RuntimeWarning,
                stacklevel=4,
            )
        return None


def _load(dtype: torch.dtype, of: Loop) -> ctypes.CDLL:
    """The loop from the cache folder (`nondual.store.cache_folder`), compiled into it where it is not there.

    A library's name holds a hash of all that it was made from and a hash of its bytes: one that was cut short or
    replaced is not opened, but removed and compiled again. The library is made under another name and then moved, so
    that no process ever sees a part of it. Where the folder cannot be written to, what it holds is still used; what it
    lacks is compiled among the temporary files, for this process alone.

    Raises:
        OSError: no compiler, or nowhere to write.
        subprocess.CalledProcessError: the compiler refuses.
        subprocess.TimeoutExpired: the compiler hangs.
    """
    compiler = find_compiler()
    start = f"{of.name}-{key_of(compiler, dtype, of)}"
    with contextlib.suppress(OSError):
        folder = cache_folder()
        for path in sorted(folder.glob(f"{start}-*.so")):
            try:
                return _open(path)
            except OSError:
                with contextlib.suppress(OSError):
                    path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        return _open(compile_loop(compiler, dtype, folder, start, of))
    try:
        private = tempfile.TemporaryDirectory(prefix="nondual-", ignore_cleanup_errors=True)
    except OSError as error:
        raise OSError(f"no folder to write to: neither the cache nor {tempfile.tempdir}; set NONDUAL_CACHE") from error
    with private as folder:  # an open library stays in memory when its file is gone
        return _open(compile_loop(compiler, dtype, Path(folder), start, of))


def _open(path: Path) -> ctypes.CDLL:
    """The library at this path, if its bytes are those that its name has the hash of.

    Raises:
        OSError: it was cut short or replaced, is not for this machine, or lacks one of the two functions.
    """
    if digest(path.read_bytes()) != path.stem.rpartition("-")[2]:
        raise OSError(f"{path} was changed since it was compiled")
    with _opening:
        loop = ctypes.CDLL(str(path))
    if not (hasattr(loop, "forward") and hasattr(loop, "backward")):
        raise OSError(f"{path} has no functions forward and backward")
    return loop


def digest(data: bytes) -> str:
    """A hash that a file's name can hold."""
    return hashlib.sha256(data).hexdigest()[:24]


def find_compiler() -> list[str]:
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


def key_of(compiler: list[str], dtype: torch.dtype, of: Loop) -> str:
    """A hash of all that the compiled loop depends on."""
    version = _run([*compiler, "--version"], SECONDS_TO_ANSWER)
    source = of.source.read_text(encoding="utf-8")
    return digest(repr([source, compiler, version, FLAGS, NATIVE, defines(dtype, of), processor()]).encode())


def defines(dtype: torch.dtype, of: Loop) -> list[str]:
    """What the loop wants to be told: its sizes, and float64 where the dtype is that."""
    return [*(f"-D{name}={size}" for name, size in of.sizes.items()), *(["-DDOUBLE"] if dtype == torch.float64 else [])]


def compile_loop(compiler: list[str], dtype: torch.dtype, folder: Path, start: str, of: Loop) -> Path:
    """Compile a loop for this machine into the folder, whole or not at all; its mode is any new file's (umask)."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{of.name}-") as private:
        new = Path(private) / "new.so"
        for native in NATIVE:
            options = [*FLAGS, *filter(None, [native]), *defines(dtype, of)]
            try:
                _run([*compiler, *options, str(of.source), "-o", str(new), "-lm"], SECONDS_TO_COMPILE)
                break
            except subprocess.CalledProcessError:
                if native == NATIVE[-1]:
                    raise
        if not new.exists():
            raise FileNotFoundError(f"{shlex.join(compiler)} ran, and compiled nothing")
        path = folder / f"{start}-{digest(new.read_bytes())}.so"
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


def processor() -> str:
    """What "native" means here: the processor's name and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return " ".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
