"""tiles.c under AddressSanitizer and UndefinedBehaviorSanitizer, its tensors ending at pages that may not be touched.

Needs a C compiler with its sanitizers' runtime: on Debian the packages gcc and libc6-dev.
"""

from pathlib import Path

import pytest
import torch
from sanitized import run, run_planted

from nondual.ops.sparse_attention.compiled import LOOP

DRIVER = Path(__file__).with_name("sparse_attention_guarded.c")


@pytest.mark.timeout(650)  # seconds of a compiler, minutes of one on a busy machine
@pytest.mark.parametrize("dtype, native", [(torch.float32, True), (torch.float64, True), (torch.float32, False)])
def test_nothing_is_touched_beyond_a_tensor_and_everything_is_written(tmp_path, dtype, native):
    """Both passes; 1 to 131 queries and keys, tiles of 1 to 130, one to six vectors a row, one thread and three."""
    ran = run(DRIVER, LOOP, tmp_path, dtype=dtype, native=native)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
    assert ran.stdout == "108 cases\n"


@pytest.mark.timeout(650)
@pytest.mark.parametrize("was, planted, says", [
    ("if (stop > t->m) stop = t->m;", "", "AddressSanitizer"),
    ("if (stop > t->n) stop = t->n;", "", "AddressSanitizer"),
    ("head + 3 * part)", "head + 3 * part - 64)", "heap-buffer-overflow"),
    ("d < t->given_v; d++) to[d]", "d < t->width_v; d++) to[d]", "AddressSanitizer"),
    ("t->given * sizeof(real));", "t->width * sizeof(real));", "AddressSanitizer"),
    ("if (k.count) forward_band(t, k, r);", "if (k.count > 1) forward_band(t, k, r);", "out was not written"),
], ids=["keys", "queries", "scratch", "out", "dq", "unwritten"])  # fmt: skip
def test_a_planted_fault_is_found(tmp_path, was, planted, says):
    said = run_planted(DRIVER, LOOP, tmp_path, was, planted)
    assert says in said, said[-6000:]
