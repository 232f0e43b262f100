"""A loop in C under AddressSanitizer and UndefinedBehaviorSanitizer, driven by a program that guards its tensors.

Needs a C compiler with its sanitizers' runtime: on Debian the packages gcc and libc6-dev.
"""

import os
import shutil
import subprocess
from pathlib import Path

import torch

from nondual.ops import c_loop

# Lines are named in reports, variables are not: to follow these took a quarter of the compiler's time.
DEBUGGING = "-g -fno-var-tracking"
OPTIONS = "-ffp-contract=fast -fno-math-errno -fno-trapping-math -pthread -Werror=incompatible-pointer-types"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"


def run(
    driver: Path, loop: c_loop.Loop, folder: Path, *, dtype=torch.float32, native=True, level="-O1"
) -> subprocess.CompletedProcess[str]:
    """Compile the driver with the loop's source, and run it."""
    compiler = next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))))
    program = folder / "guarded"
    options = [level, *DEBUGGING.split(), *OPTIONS.split(), *SANITIZERS.split(), *(["-march=native"] if native else [])]
    files = [f'-DSOURCE="{loop.source}"', str(driver), "-o", str(program), "-lm"]
    command = [compiler, *options, *c_loop.defines(dtype, loop), *files]
    compiled = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert compiled.returncode == 0, compiled.stderr[-4000:]
    # Nothing is leaked, and looking for leaks needs a right (ptrace) that a container may not have.
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([program], capture_output=True, text=True, env=env, timeout=300)


def run_planted(driver: Path, loop: c_loop.Loop, folder: Path, was: str, planted: str) -> str:
    """What the driver says of the loop with a fault in it: it must fail."""
    text = loop.source.read_text(encoding="utf-8")
    assert text.count(was) == 1
    source = folder / "planted.c"
    source.write_text(text.replace(was, planted), encoding="utf-8")
    ran = run(driver, loop._replace(source=source), folder, level="-O0")  # compiled sooner
    assert ran.returncode != 0
    return ran.stdout + ran.stderr
