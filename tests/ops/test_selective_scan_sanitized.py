"""scan.c under AddressSanitizer and UndefinedBehaviorSanitizer, its tensors ending at pages that may not be touched.

Needs a C compiler with its sanitizers' runtime: on Debian the packages gcc and libc6-dev.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from nondual.ops import c_loop
from nondual.ops.selective_scan.cpu import LOOP

DRIVER = Path(__file__).with_name("selective_scan_guarded.c")
OPTIONS = "-g -ffp-contract=fast -fno-math-errno -fno-trapping-math -pthread -Werror=incompatible-pointer-types"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"


def run(
    source: Path, folder: Path, *, dtype=torch.float32, native=True, level="-O1"
) -> subprocess.CompletedProcess[str]:
    """Compile the driver with this scan.c, and run it."""
    compiler = next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))))
    program = folder / "guarded"
    options = [level, *OPTIONS.split(), *SANITIZERS.split(), *(["-march=native"] if native else [])]
    command = [
        compiler,
        *options,
        *c_loop.defines(dtype, LOOP),
        f'-DSOURCE="{source}"',
        str(DRIVER),
        "-o",
        str(program),
        "-lm",
    ]
    compiled = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert compiled.returncode == 0, compiled.stderr[-4000:]
    # Nothing is leaked, and looking for leaks needs a right (ptrace) that a container may not have.
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([program], capture_output=True, text=True, env=env, timeout=300)


@pytest.mark.timeout(650)  # seconds of a compiler, minutes of one on a busy machine
@pytest.mark.parametrize("dtype, native", [(torch.float32, True), (torch.float64, True), (torch.float32, False)])
def test_nothing_is_touched_beyond_a_tensor_and_everything_is_written(tmp_path, dtype, native):
    """Both passes; 1, 7, 17, 33 and 67 channels, 1 to 17 states, rows apart, one thread and three."""
    ran = run(LOOP.source, tmp_path, dtype=dtype, native=native)
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
    text = LOOP.source.read_text(encoding="utf-8")
    assert text.count(was) == 1
    source = tmp_path / "planted.c"
    source.write_text(text.replace(was, planted), encoding="utf-8")
    ran = run(source, tmp_path, level="-O0")  # compiled sooner
    assert ran.returncode != 0 and says in ran.stdout + ran.stderr, (ran.stdout + ran.stderr)[-6000:]
