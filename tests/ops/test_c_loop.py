"""A loop in C, that of the selective scan: how it is found, compiled and kept, and what a fork does to it."""

import contextlib
import ctypes
import os
import pickle
import re
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch

from nondual.ops import c_loop
from nondual.ops.selective_scan import cpu, selective_scan
from nondual.ops.selective_scan.cpu import loop

FAST = ("-O0", *c_loop.FLAGS[1:])  # compiled in a sixth of the time; what the loop computes is tested elsewhere


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache folder, in a process that has loaded nothing; temporary files have a folder of their own."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(c_loop, "FLAGS", FAST)
    monkeypatch.setattr(c_loop, "_loops", {})
    return tmp_path / "cache"


def scans(dtype=torch.float32):
    """Whether impl="cpu" gives what the reference gives."""
    draw = torch.Generator().manual_seed(0)
    u, delta, B, C = (torch.randn(1, 70, n, generator=draw).to(dtype) for n in (5, 5, 3, 3))
    given = (u, delta.exp(), -torch.ones(5, 3, dtype=dtype), B, C)
    return torch.allclose(selective_scan(*given, impl="cpu")[0], selective_scan(*given, impl="reference")[0], atol=1e-5)


def works(dtype=torch.float32):
    """Whether the loop is there, and right."""
    return cpu.library(dtype) is not None and scans(dtype)


def anew():
    """As a process that starts now, with the same files."""
    c_loop._loops.clear()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def libraries(folder: Path) -> list[Path]:
    """All that a cache folder holds: libraries, and nothing half made."""
    assert all(path.suffix == ".so" for path in folder.iterdir()), list(folder.iterdir())
    return list(folder.iterdir())


# --- the stored library ----------------------------------------------------------------------------------------------


def test_it_is_compiled_once_and_then_found(cache, monkeypatch):
    assert works()
    (path,) = libraries(cache)
    anew()
    monkeypatch.setattr(c_loop, "compile_loop", None)
    assert works() and libraries(cache) == [path]


def spoilt(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut short":
        data = data[: len(data) // 2]
    if how == "cut at a page":
        data = data[:4096]
    if how == "empty":
        data = b""
    if how == "text":
        data = b"no library at all"
    if how == "one bit changed":
        data[len(data) // 2] ^= 1
    if how == "zeros at the end":
        data[-4096:] = bytes(4096)
    path.unlink()  # not written over: this process may hold it open
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how", ["cut short", "cut at a page", "empty", "text", "one bit changed", "zeros at the end", "a folder"]
)
def test_a_spoilt_library_is_not_opened_but_compiled_again(cache, monkeypatch, how):
    assert works()
    (path,) = libraries(cache)
    good = path.read_bytes()
    if how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        spoilt(path, how)
    anew()
    opened, system = [], ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: opened.append(Path(name).read_bytes()) or system(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert works()
    assert opened == [good]
    assert how == "a folder" or path.read_bytes() == good


def foreign(how: str, key: str, tmp_path: Path, good: bytes) -> bytes:
    if how == "of another architecture":
        assert good[:4] == b"\x7fELF"
        return good[:18] + (183 if good[18] != 183 else 62).to_bytes(2, "little") + good[20:]  # e_machine
    source = tmp_path / "other.c"
    source.write_text("int other(void) { return 1; }")
    command = ["cc", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "other.so")]
    subprocess.run(command, check=True, timeout=60)
    return (tmp_path / "other.so").read_bytes()


@pytest.mark.parametrize("how", ["of another architecture", "without the two functions"])
def test_a_foreign_library_is_compiled_anew_even_if_its_name_fits_its_bytes(cache, tmp_path, how):
    assert works()
    (path,) = libraries(cache)
    key = path.stem.rpartition("-")[0]
    data = foreign(how, key, tmp_path, path.read_bytes())
    path.unlink()
    wrong = cache / f"{key}-{c_loop.digest(data)}.so"
    wrong.write_bytes(data)
    anew()
    assert works() and libraries(cache) == [path]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_another_user_can_read_it_where_the_umask_says_so(cache, mask, mode):
    before = os.umask(mask)
    try:
        assert works()
    finally:
        os.umask(before)
    (path,) = libraries(cache)
    assert path.stat().st_mode & 0o777 == mode


def test_a_cache_that_cannot_be_written_to_is_still_used(cache, monkeypatch):
    """Also by root, whom no mode keeps from writing: here whatever would write or remove fails."""
    assert works()
    (path,) = libraries(cache)
    anew()
    refusing = {"mkdtemp": tempfile, "replace": os}
    for name, module in refusing.items():
        monkeypatch.setattr(module, name, lambda *a, **k: (_ for _ in ()).throw(PermissionError("read-only")))
    assert works()
    monkeypatch.undo()
    assert libraries(cache) == [path]


def test_a_spoilt_library_in_a_read_only_cache_is_replaced_for_this_process_alone(cache, monkeypatch):
    assert works()
    (path,) = libraries(cache)
    spoilt(path, "cut short")
    cut = path.read_bytes()
    anew()
    mkdtemp = tempfile.mkdtemp

    def not_there(suffix=None, prefix=None, dir=None):
        if dir and Path(dir) == cache:
            raise PermissionError("read-only")
        return mkdtemp(suffix, prefix, dir)

    def unlink(self, missing_ok=False):
        raise PermissionError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", not_there)
        patch.setattr(Path, "unlink", unlink)
        assert works()
    assert path.read_bytes() == cut
    # What was compiled there is removed once it is open; torch's compiler may have made a folder of its own.
    assert not list(Path(tempfile.gettempdir()).glob("*nondual*"))


# --- the cache folder ------------------------------------------------------------------------------------------------


def test_the_working_folder_as_cache(cache, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("NONDUAL_CACHE", ".")
    assert works()
    monkeypatch.chdir(tmp_path / "there")
    assert works() and len(libraries(tmp_path / "here")) == 1 and not libraries(tmp_path / "there")


@pytest.mark.parametrize("name", ["with a space", 'quote\'d "twice"', "-dash", "[a]*", "ünïcode"])
def test_any_name_of_a_folder(cache, tmp_path, monkeypatch, name):
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path / name))
    assert works() and len(libraries(tmp_path / name)) == 1


@pytest.mark.parametrize("case", ["no home", "a home that is not there", "the cache is a file"])
def test_where_nothing_can_be_kept_it_is_compiled_for_this_process(cache, tmp_path, monkeypatch, case):
    for name in ("NONDUAL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if case == "no home":

        def home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", staticmethod(home))
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("HOME", str(tmp_path / "file" / "gone"))
    if case == "the cache is a file":
        monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path / "file"))
    assert works() and works(torch.float64)
    left = list((tmp_path / "temporary").iterdir())
    if case == "no home":  # the folder that stands in for it
        assert left == [tmp_path / "temporary" / f"nondual-{os.getuid()}"] and len(libraries(left[0])) == 2
    else:
        assert not left


def test_without_any_folder_to_write_to_it_runs_in_torch_and_says_so(cache, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match=r"no folder to write to.*set NONDUAL_CACHE"):
        assert scans()
    assert cpu.library(torch.float32) is None


# --- the compiler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, says", [
    ("missing", "no C compiler found: none-of-this-name"),
    ("unbalanced", r"CC must be a command, got '\"gcc -O2' \(No closing quotation\)"),
    ("unbalanced at the end", r"CC must be a command, got 'gcc \\\\' \(No escaped character\)"),
    ("refuses", "out of paper"),
    ("makes nothing", "ran, and compiled nothing"),
    ("has no version", "I am no compiler"),
    ("cannot be run", "[Ee]xec format error|cannot execute"),
    ("hangs", "timed out after 0.5 seconds"),
    ("hangs at its version", "timed out after 0.5 seconds"),
    ("speaks no UTF-8", "out of paper"),
    ("makes no library", "invalid ELF header|file too short"),
])  # fmt: skip
def test_without_a_compiler_it_runs_in_torch_and_says_so_once(cache, tmp_path, monkeypatch, case, says):
    """For both dtypes, with one warning, and with nothing left in the cache folder or running."""
    sleep = f"sleep 77777.{os.getpid()}"
    answers = "case $1 in --version) echo 1;;"
    text = {
        "refuses": f"{answers} *) echo 'out of paper' >&2; exit 1;; esac",
        "makes nothing": f"{answers} esac",
        "has no version": "echo 'I am no compiler' >&2; exit 1",
        "hangs": f"{answers} *) {sleep} & wait;; esac",
        "hangs at its version": f"{sleep} & wait",
        "speaks no UTF-8": f"{answers} *) printf 'out of paper \\377\\376' >&2; exit 1;; esac",
        "makes no library": f'{answers} *) while [ "$1" != -o ]; do shift; done; echo no > "$2";; esac',
    }
    given = {"missing": "none-of-this-name", "unbalanced": '"gcc -O2', "unbalanced at the end": "gcc \\"}.get(case)
    given = given or script(tmp_path / "cc", text.get(case, ""))
    if case == "cannot be run":
        Path(given).write_bytes(b"\x7fELF nothing")
    monkeypatch.setenv("CC", given)
    if case.startswith("hangs"):
        monkeypatch.setattr(c_loop, "SECONDS_TO_ANSWER", 0.5)
        monkeypatch.setattr(c_loop, "SECONDS_TO_COMPILE", 0.5)
    with pytest.warns(RuntimeWarning, match=f"(?s)({says}).*. Install a C compiler .* variable CC") as seen:
        assert scans() and scans(torch.float64)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scans() and cpu.library(torch.float32) is None
    if case != "makes no library":
        assert not cache.exists() or not libraries(cache)
    assert not running(sleep)


def running(command: str) -> list[str]:
    """The processes of this command line that have not ended; one that was killed may need a moment."""
    for _ in range(50):
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if path.read_bytes().replace(b"\0", b" ").decode(errors="replace").strip() == command:
                    found.append(path.parent.name)
        if not found:
            break
        time.sleep(0.1)
    return found


@pytest.mark.parametrize("given", ["", "   ", "gcc", "gcc -DUNUSED='1 2'", "env gcc"])
def test_a_compiler_with_options_or_none_named(cache, monkeypatch, given):
    monkeypatch.setenv("CC", given)
    assert works()


def test_the_key_changes_with_all_that_the_loop_is_made_from(cache, tmp_path, monkeypatch):
    """Source, options, compiler, its version, processor, sizes of chunk and block, dtype."""
    monkeypatch.setenv("CC", script(tmp_path / "cc", "echo version 1"))

    def key(dtype=torch.float32, of=cpu.LOOP):
        return c_loop.key_of(c_loop.find_compiler(), dtype, of)

    first = key()
    assert key() == first
    keys = {"dtype": key(torch.float64)}
    other = tmp_path / "other.c"
    other.write_text(cpu.LOOP.source.read_text() + "\n")
    keys["source"] = key(of=cpu.LOOP._replace(source=other))
    for size in cpu.LOOP.sizes:
        keys[size] = key(of=cpu.LOOP._replace(sizes=cpu.LOOP.sizes | {size: 32}))
    for name, value in {
        "FLAGS": (*c_loop.FLAGS, "-g"), "NATIVE": ("",), "processor": lambda: "another",
    }.items():  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(c_loop, name, value)
            keys[name] = key()
    monkeypatch.setenv("CC", str(tmp_path / "cc") + " -mtune=generic")
    keys["compiler's options"] = key()
    monkeypatch.setenv("CC", script(tmp_path / "cc2", "echo version 1"))
    keys["compiler"] = key()
    monkeypatch.setenv("CC", script(tmp_path / "cc", "echo version 2"))
    keys["compiler's version"] = key()
    assert first not in keys.values() and len(set(keys.values())) == len(keys), keys


def test_the_processor_is_told_by_its_name_and_its_instruction_sets(monkeypatch):
    said = "model name\t: A\nflags\t\t: fma avx\nbogomips\t: 1\n"
    names = []
    for text in (said, said.replace("A", "B"), said.replace("avx", "avx2"), said.replace(": 1", ": 2")):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", lambda self, text=text, **_: text)
            names.append(c_loop.processor())
    assert len(set(names[:3])) == 3 and names[3] == names[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_two_dtypes_have_loops_of_their_own(cache, dtype):
    assert works(dtype) and len(libraries(cache)) == 1
    assert works(torch.float64) and works(torch.float32) and len(libraries(cache)) == 2


def test_the_source_travels_with_the_package_and_its_struct_is_ours():
    text = cpu.LOOP.source.read_text(encoding="utf-8")
    struct = text[text.index("struct scan {") : text.index("\n};", text.index("struct scan {"))]
    words = re.sub(r"/\*.*?\*/|\b(const|int64_t|real|uint8_t)\b|[*]", "", struct.split("\n", 1)[1], flags=re.DOTALL)
    declared = [name.strip() for name in re.split("[,;]", words)]
    assert [name for name in declared if name] == [*loop.SIZES, *loop.POINTERS]


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(220)
def test_processes_that_compile_at_once_do_not_collide(in_a_process_of_its_own, tmp_path):
    """From an empty cache, which is left with one library that works, and nothing half made."""
    code = """
        import multiprocessing, torch
        from nondual.ops.selective_scan import cpu

        context = multiprocessing.get_context("fork")

        def load():
            assert cpu.library(torch.float32) is not None

        started = [context.Process(target=load) for _ in range(3)]
        for process in started:
            process.start()
        for process in started:
            process.join(timeout=150)
        assert [process.exitcode for process in started] == [0, 0, 0]
        load()
    """
    in_a_process_of_its_own(code, env={"NONDUAL_CACHE": str(tmp_path / "new"), "NONDUAL_CPU_SCAN": None}, timeout=200)
    assert len(libraries(tmp_path / "new")) == 1


WHILE_ANOTHER_THREAD = """
    import os, sys, threading, time, torch
    from pathlib import Path
    from nondual.ops.selective_scan import cpu

    {before}
    thread = threading.Thread(target=cpu.library, args=(torch.float32,))
    thread.start()
    while not Path(sys.argv[1]).exists():  # until the thread is in the midst of it
        time.sleep(0.01)
    child = os.fork()
    if child == 0:
        os._exit(0 if cpu.library(torch.float32) is not None else 1)
    _, status = os.waitpid(child, 0)
    thread.join()
    assert status == 0 and cpu.library(torch.float32) is not None
"""


@pytest.mark.timeout(220)
def test_a_fork_while_another_thread_compiles(in_a_process_of_its_own, tmp_path):
    """The thread and its lock are not there in the child, which compiles for itself."""
    began = tmp_path / "began"
    slow = script(tmp_path / "cc", f'case $1 in --version) ;; *) touch {began}; sleep 2;; esac; exec cc "$@"')
    env = {"NONDUAL_CACHE": str(tmp_path / "new"), "CC": slow, "NONDUAL_CPU_SCAN": None}
    in_a_process_of_its_own(WHILE_ANOTHER_THREAD.format(before=""), str(began), env=env, timeout=100)
    assert len(libraries(tmp_path / "new")) == 1


@pytest.mark.timeout(220)
def test_a_fork_while_another_thread_opens_the_library_waits_for_it(in_a_process_of_its_own, tmp_path):
    """The lock that the system takes to open a library would stay held in the child for ever."""
    before = """
    import ctypes
    system = ctypes.CDLL
    lock = threading.Lock()  # the system's: nothing renews it in a child

    def slow(name):
        with lock:
            Path(sys.argv[1]).touch()
            time.sleep(1)
            return system(name)

    ctypes.CDLL = slow
    """
    env = {"NONDUAL_CACHE": str(tmp_path / "new"), "NONDUAL_CPU_SCAN": None}
    code = WHILE_ANOTHER_THREAD.format(before=before.strip())
    in_a_process_of_its_own(code, str(tmp_path / "began"), env=env, timeout=100)


@pytest.mark.timeout(220)
def test_a_forked_child_and_a_loader_s_worker(in_a_process_of_its_own):
    """Work for two threads before the fork and after it, and nothing of torch's: its threads do not outlive a fork."""
    code = """
        import multiprocessing, pickle, sys, torch
        from nondual.ops.selective_scan import cpu, selective_scan

        def made(seed):
            draw = torch.Generator().manual_seed(seed)
            u, delta, B, C = (torch.randn(2, 60, n, generator=draw) for n in (100, 100, 16, 16))
            return u, delta, -torch.ones(100, 16), B, C

        class Scans(torch.utils.data.Dataset):
            def __len__(self):
                return 2

            def __getitem__(self, i):
                return selective_scan(*made(i), delta_softplus=True)[0]

        def child(queue):
            queue.put(pickle.dumps(Scans()[7].tolist()))

        if __name__ == "__main__":
            torch.set_num_threads(2)
            assert cpu.library(torch.float32) is not None
            here = Scans()[7].tolist()
            context = multiprocessing.get_context("fork")
            queue = context.Queue()
            process = context.Process(target=child, args=(queue,))
            process.start()
            assert pickle.loads(queue.get(timeout=60)) == here
            process.join(timeout=60)
            loader = torch.utils.data.DataLoader(Scans(), batch_size=None, num_workers=1, timeout=60)
            for i, y in enumerate(loader):
                assert torch.equal(y, Scans()[i])
    """
    in_a_process_of_its_own(code, env={"NONDUAL_CPU_SCAN": None}, timeout=150)


def test_a_function_of_it_can_be_pickled():
    assert pickle.loads(pickle.dumps((selective_scan, cpu.selective_scan)))[0] is selective_scan
