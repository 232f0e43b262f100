"""What only a GPU would show, from the compiler's own code: addresses beyond 32 bits, tf32, and missing barriers.

`intervals.py` beside this file brings every kernel to Triton's intermediate code, by the launchers themselves, for
tensors of more than 2³¹ elements (state space duality with L 65,536, B 16, H 80 among them), and bounds its integers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)  # seven seconds of one core, on a busy machine
HERE = Path(__file__).parent
KERNELS = {
    "flash": {"forward", "decode", "combine", "delta", "dq", "dkdv"},
    "scan": {"forward", "pass", "adjoint", "backward"},
    "dual": {"steps", "states", "pass", "output", "pass_back", "rows", "columns", "steps_back"},
}


@pytest.fixture(scope="module")
def launches() -> dict[str, dict]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(HERE.parents[1] / "src")]))}
    ran = subprocess.run(
        [sys.executable, str(HERE / "intervals.py")], env=env, capture_output=True, text=True, timeout=280
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


def test_every_kernel_is_looked_at(launches):
    names = {name.split(",")[0].removesuffix("_kernel") for name in launches}
    assert names == set().union(*KERNELS.values())
    assert all(0 < found["grid"] < 2**31 for found in launches.values()), "more programs than a grid holds"


def test_no_integer_leaves_its_width(launches):
    """No sum or product in 32 bits can be larger than 32 bits hold, for tensors of any size that a GPU holds."""
    assert {name: found["faults"] for name, found in launches.items() if found["faults"]} == {}


def test_no_product_is_rounded_to_tf32(launches):
    """In float32 as in half precision: `tl.dot` would do it unless it is told not to."""
    assert sum(found["dots"] > 0 and "float32" in name for name, found in launches.items()) >= 8
    assert {name: found["tf32"] for name, found in launches.items() if found["tf32"]} == {}


def test_what_is_written_and_read_in_one_kernel_has_its_barriers(launches):
    """S a store, B a barrier, L a load, in their order. Scratch of the scan's backward, which other threads read: a
    barrier after it is written, and one before the next chunk overwrites it. The states that state space duality
    passes on: each thread reads its own number before it writes there, and no other does."""
    scratch, in_place = {"p_scratch": "SBLB"}, {"pass": {"p_states": "LS"}, "pass_back": {"p_grads": "LS"}}
    for name, found in launches.items():
        kernel, case = name.split(", ", 1)
        kernel = kernel.removesuffix("_kernel")
        expected = scratch if kernel == "backward" else in_place.get(kernel, {}) if "Mamba-2" in case else {}
        assert found["both"] == expected, name


SAID = """
module {
  tt.func public @k(%p: !tt.ptr<f32> loc("p"(#loc)), %s: i32 loc("s"(#loc))) {
    %c2 = arith.constant 2 : i32 loc(#loc1)
    %i = tt.get_program_id x : i32 loc(#loc1)
    %a = arith.muli %i, %s : i32 loc(#loc1)
    %b = arith.extsi %i : i32 to i64 loc(#loc1)
    %d = arith.extsi %s : i32 to i64 loc(#loc1)
    %e = arith.muli %b, %d : i64 loc(#loc1)
    %f = arith.divsi %a, %c2 : i32 loc(#loc1)
    %q = tt.addptr %p, %e : !tt.ptr<f32>, i64 loc(#loc1)
    tt.store %q, %x : !tt.ptr<f32> loc(#loc1)
    %y = tt.load %q : !tt.ptr<f32> loc(#loc1)
  }
}
#loc1 = loc("a/b.py":7:3)
"""


def test_the_analysis_itself_by_hand(monkeypatch):
    """Program i of 100 times a stride s, in 32 and in 64 bits; memory that is written and read without a barrier."""
    monkeypatch.syspath_prepend(str(HERE))
    from intervals import Kernel

    small, large = (Kernel(SAID, {"s": s}, 100) for s in (2**20, 2**25))
    assert small.known["a"] == (0, 99 * 2**20) == small.known["e"] and small.known["f"] == (0, 99 * 2**19)
    assert small.faults == [] and small.both_ways() == {"p": "SL"}
    assert large.faults == [f"a/b.py:7: arith.muli in 32 bits reaches {99 * 2**25}"]
    assert large.known["e"] == (0, 99 * 2**25)
