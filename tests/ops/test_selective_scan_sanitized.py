"""scan.c under AddressSanitizer and UndefinedBehaviorSanitizer, its tensors ending at pages that may not be touched.

Needs a C compiler with its sanitizers' runtime: on Debian the packages gcc and libc6-dev.
"""

from pathlib import Path

import pytest
import torch
from sanitized import run, run_planted

from nondual.ops.selective_scan.cpu import LOOP

DRIVER = Path(__file__).with_name("selective_scan_guarded.c")


@pytest.mark.timeout(650)  # seconds of a compiler, minutes of one on a busy machine
@pytest.mark.parametrize("dtype, native", [(torch.float32, True), (torch.float64, True), (torch.float32, False)])
def test_nothing_is_touched_beyond_a_tensor_and_everything_is_written(tmp_path, dtype, native):
    """Both passes; 1, 7, 17, 33 and 67 channels, 1 to 17 states, rows apart, one thread and three."""
    ran = run(DRIVER, LOOP, tmp_path, dtype=dtype, native=native)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
    assert ran.stdout == "1021 cases\n"


@pytest.mark.timeout(650)
@pytest.mark.parametrize("was, planted, says", [
    ("return lanes == LANES ? (vec)*(const loose *)from", "return 1 ? (vec)*(const loose *)from", "AddressSanitizer"),
    ("if (lanes == LANES) *(loose *)to = x;", "if (1) *(loose *)to = x;", "AddressSanitizer"),
    ("(k.batch * between + chunk - 1)", "(k.batch * between + chunk)", "AddressSanitizer"),
    ("blocks * bytes_of_tables(states));", "blocks * bytes_of_tables(states) - 64);", "heap-buffer-overflow"),
    ("t < steps; t++)\n    for (int64_t n", "t <= steps; t++)\n    for (int64_t n", "AddressSanitizer"),
    ("v < k.vectors; v++) {\n      int64_t at =", "v < 0; v++) {\n      int64_t at =", "dD was not written"),
], ids=["read", "write", "saved states", "scratch", "rows", "unwritten"])  # fmt: skip
def test_a_planted_fault_is_found(tmp_path, was, planted, says):
    said = run_planted(DRIVER, LOOP, tmp_path, was, planted)
    assert says in said, said[-6000:]
