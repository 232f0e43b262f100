"""What only a GPU would show, from the compiler's own code: addresses beyond 32 bits, tf32, and missing barriers.

`intervals.py` beside this file brings every kernel to Triton's intermediate code, by the launchers themselves, for
tensors of more than 2³¹ elements (state space duality with L 65,536, B 16, H 80 among them), and bounds its integers.
Linear attention without the delta rule runs on the kernels of state space duality.
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
    "delta rule": {"steps", "solve", "carry", "read", "written", "carry_back", "chunk_back"},
    "tiles": {"forward", "delta", "dq", "dkdv"},
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
    for case in ("delta rule", "tiles"):  # which share names with the others
        of_case = {name.split(",")[0].removesuffix("_kernel") for name in launches if f", {case}" in name}
        assert of_case == KERNELS[case]
    assert all(0 < found["grid"] < 2**31 for found in launches.values()), "more programs than a grid holds"


def test_no_integer_leaves_its_width(launches):
    """No sum or product in 32 bits can be larger than 32 bits hold, for tensors of any size that a GPU holds."""
    assert {name: found["faults"] for name, found in launches.items() if found["faults"]} == {}


def test_no_product_is_rounded_to_tf32(launches):
    """In float32 as in half precision: `tl.dot` would do it unless it is told not to. The inverse of a chunk is joined
    from such products where what it multiplies is in half precision, and only there."""
    assert sum(found["dots"] > 0 and "float32" in name for name, found in launches.items()) >= 12
    rounded = {name.rstrip("'") for name, found in launches.items() if found["tf32"]}
    assert rounded == {"solve_kernel, delta rule"}


def test_what_is_written_and_read_in_one_kernel_has_its_barriers(launches):
    """S a store, B a barrier, L a load, in their order. Scratch of the scan's backward, which other threads read: a
    barrier after it is written, and one before the next chunk overwrites it. The states that state space duality
    passes on, and what the delta rule writes: read before it is written, by one program, which reads it no more."""
    scratch, in_place = {"p_scratch": "SBLB"}, {"pass": {"p_states": "LS"}, "pass_back": {"p_grads": "LS"}}
    written = {"carry": {"p_u": "LS"}, "carry_back": {"p_du": "LS"}}
    for name, found in launches.items():
        kernel, case = name.split(", ", 1)
        kernel = kernel.removesuffix("_kernel")
        overwritten = in_place if "Mamba-2" in case else written if "delta rule" in case else {}
        expected = scratch if kernel == "backward" else overwritten.get(kernel, {})
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


LARGEST = """
module {
  tt.func public @k(%p: !tt.ptr<i32> loc("p"(#loc)), %n: i32 loc("n"(#loc))) {
    %c0 = arith.constant 0 : i32 loc(#loc)
    %r = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32> loc(#loc)
    scf.for %i = %c0 to %n step %c1  : i32 {
      %s = tt.splat %i : i32 -> tensor<64xi32> loc(#loc)
      %o = arith.addi %s, %r : tensor<64xi32> loc(#loc)
      %m = "tt.reduce"(%o) <{axis = 0 : i32}> ({
      ^bb0(%a: i32 loc(#loc), %b: i32 loc(#loc)):
        %g = arith.maxsi %a, %b : i32 loc(#loc)
        tt.reduce.return %g : i32 loc(#loc)
      }) : (tensor<64xi32>) -> i32 loc(#loc)
      %e = arith.addi %m, %m : i32 loc(#loc)
    }
    %l = tt.load %p : !tt.ptr<i32> loc(#loc)
  }
}
"""


def test_the_analysis_of_a_loop_without_results_and_of_a_largest_number_by_hand(monkeypatch):
    """i from 0 to n - 1 and a step of 64 from there; the largest of them; a number from memory, which is told."""
    monkeypatch.syspath_prepend(str(HERE))
    from intervals import Kernel

    found = Kernel(LARGEST, {"n": 1000}, 1, {"p": (3, 7)})
    assert found.known["i"] == (0, 999) and found.known["o"] == (0, 1062) == found.known["m"]
    assert found.known["e"] == (0, 2124) and found.known["l"] == (3, 7) and found.faults == []
    summed = Kernel(LARGEST.replace("maxsi", "addi"), {"n": 1000}, 1)
    assert summed.known["m"] == (-float("inf"), float("inf")) and len(summed.faults) == 1
