"""`python hooks/limited.py MINUTES COMMAND ...`: run a command, and end it when its time is over.

It is ended with every process that it started, and each Python among them first writes the stacks of its threads. The
exit status is the command's, or 124 when its time was over. Ctrl-C and a polite request to stop (SIGTERM, SIGHUP) are
passed on, so that nothing is left running. noxfile.py runs its commands through this.
"""

import os
import signal
import subprocess
import sys
import time

GRACE = 10  # seconds for the processes to write their stacks, or to tidy up after Ctrl-C
DEPTH = "NONDUAL_LIMITS_AROUND"  # how many such limits this one runs in: .ci/run's holds nox, whose own hold pytest


def run(command: list[str], seconds: float) -> int:
    """The exit status of the command; 124 if it went on for longer than `seconds`, 128 + N if signal N stopped us."""
    if os.name == "nt":  # without process groups: the command alone is ended
        try:
            return subprocess.run(command, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return too_long(command, seconds)

    stops: list[int] = []  # the signals that asked us to stop
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: stops.append(number))
    around = int(os.environ.get(DEPTH, "0"))
    # An outer limit waits for its inner one, which needs time to end what it holds: each has half the time of the last.
    grace = GRACE / 2**around
    inner = os.environ | {"PYTHONFAULTHANDLER": "1", DEPTH: str(around + 1)}
    # A session of its own is a process group too, and one with no terminal: it may read the terminal's keys (pdb).
    process = subprocess.Popen(command, start_new_session=True, env=inner)
    limit = time.monotonic() + seconds
    try:
        while process.poll() is None and not stops and time.monotonic() < limit:
            time.sleep(0.05)
        if process.poll() is not None:
            return process.returncode
        end(process, stops[0] if stops else signal.SIGABRT, grace)  # at SIGABRT Python writes its stacks
        return 128 + stops[0] if stops else too_long(command, seconds)
    finally:
        signal_group(process, signal.SIGKILL)


def end(process: subprocess.Popen, number: int, grace: float) -> None:
    """Send a signal to the whole group, and give all of it `grace` seconds: one of them may be such a limit itself."""
    signal_group(process, number)
    limit = time.monotonic() + grace
    while signal_group(process, 0) and time.monotonic() < limit:
        process.poll()  # an ended process counts as there until somebody has asked for its status
        time.sleep(0.05)


def signal_group(process: subprocess.Popen, number: int) -> bool:
    """Send a signal to the process and all that it started; whether any of them was left to get it."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def too_long(command: list[str], seconds: float) -> int:
    print(f"ended after {seconds / 60:g} minutes: {' '.join(command)}", file=sys.stderr)
    return 124


if __name__ == "__main__":
    status = run(sys.argv[2:], 60 * float(sys.argv[1]))
    sys.exit(status if status >= 0 else 128 - status)  # a negative one names the signal that ended the command
