"""The fixtures of tests/conftest.py: a process that hangs is ended and shows where; the quick interpreter is right."""

import os
import time

import pytest
import torch

# --- processes of their own ------------------------------------------------------------------------------------------


def test_a_process_of_its_own_says_what_it_printed(in_a_process_of_its_own):
    code = """
        import os, sys
        print(sys.argv[1:], os.environ.get("NEW"), "HOME" in os.environ)
        print("aside", file=sys.stderr)
    """
    ran = in_a_process_of_its_own(code, "a", "b c", env={"NEW": "1", "HOME": None})
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "['a', 'b c'] 1 False\n", "aside\n")


def test_a_process_that_fails_fails_the_test_unless_the_test_looks_itself(in_a_process_of_its_own):
    with pytest.raises(pytest.fail.Exception, match=r"(?s)ended with status 1.*ZeroDivisionError"):
        in_a_process_of_its_own("1 / 0")
    assert in_a_process_of_its_own("raise SystemExit(3)", check=False).returncode == 3


HANGS = """
    import os, sys, threading, time

    def where_the_thread_waits():
        time.sleep(600)

    def where_the_child_waits():
        time.sleep(600)

    threading.Thread(target=where_the_thread_waits).start()
    child = os.fork()
    if child == 0:
        where_the_child_waits()
    print("child", child, flush=True)
    os.waitpid(child, 0)
"""


def test_a_process_that_hangs_is_killed_with_its_children_and_shows_all_stacks(in_a_process_of_its_own):
    with pytest.raises(pytest.fail.Exception) as failed:
        in_a_process_of_its_own(HANGS, timeout=3)
    said = str(failed.value)
    assert "did not end in 3 s" in said
    assert "where_the_thread_waits" in said and "where_the_child_waits" in said
    assert gone(int(said.split("child ")[1].split()[0]))


def test_a_process_left_behind_is_killed_and_not_waited_for(in_a_process_of_its_own):
    """A child that outlives its parent and holds its stdout open."""
    code = """
        import subprocess, sys
        print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)
    """
    began = time.monotonic()
    ran = in_a_process_of_its_own(code, timeout=60)
    assert time.monotonic() - began < 60
    assert gone(int(ran.stdout))


def test_a_server_lives_as_long_as_its_block(a_server_of_its_own):
    code = "import os, time; print('ready', os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(KeyError), a_server_of_its_own(code, ready=r"ready (\d+)\n") as found:
        os.kill(int(found[1]), 0)
        raise KeyError
    assert gone(int(found[1]))
    with pytest.raises(pytest.fail.Exception, match=r"(?s)ended with status 1.*ZeroDivisionError"):
        with a_server_of_its_own("1 / 0", ready="ready"):
            pass
    with pytest.raises(pytest.fail.Exception, match=r"(?s)was not ready in 1 s.*most recent call first"):
        with a_server_of_its_own("import time; time.sleep(600)", ready="ready", timeout=1):
            pass


def gone(process: int) -> bool:
    """Whether a process has ended: it is not there, or it waits to be reaped by the system's first process."""
    for _ in range(100):
        try:
            with open(f"/proc/{process}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


# --- Triton's interpreter --------------------------------------------------------------------------------------------

KERNELS = """
import torch
from nondual.ops.ssd import ssd

def results():
    draw = torch.Generator().manual_seed(0)
    x, z = (torch.randn(1, 5, 2, 3, generator=draw, requires_grad=True) for _ in range(2))
    b, c = (torch.randn(1, 5, 1, 2, generator=draw).half().requires_grad_() for _ in range(2))
    y, _ = ssd(x, torch.rand(1, 5, 2, generator=draw), -torch.ones(2), b.float(), c.float(), z=z, impl="triton")
    return y, *torch.autograd.grad(y.sum(), (x, z, b, c))
"""


def test_the_quick_interpreter_computes_what_triton_s_own_does(in_a_process_of_its_own, tmp_path):
    """Bit for bit, both passes. The process has none of tests/conftest.py."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here")  # on a machine with a CUDA device
    in_a_process_of_its_own(f"{KERNELS}\nimport sys\ntorch.save(results(), sys.argv[1])", tmp_path / "own.pt")
    exec(KERNELS, here := {})
    for ours, own in zip(here["results"](), torch.load(tmp_path / "own.pt"), strict=True):
        assert torch.equal(ours, own)
