"""A Python that has loaded torch, and runs files in processes that it forks: two seconds less for each of them.

`python hooks/snippets/forking.py` reads orders from its input, one line of JSON each, and answers with one:

    {"file": the file to run, "place": the folder to run it in, "out": a file for what it prints, "errors": likewise}
    {"status": as subprocess has it}

Before the first it says that it is ready.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
from pathlib import Path


def main() -> None:
    import torch  # noqa: F401 (the processes to come have it)

    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            break
        _, status = os.waitpid(child, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)
    else:
        return
    become(**order)
    # Nothing stands around this: the process ends as that of `python file` does, with what it prints then.
    runpy.run_path(order["file"], run_name="__main__")


def become(file: str, place: str, out: str, errors: str) -> None:
    """Be as a fresh Python that is about to run this file."""
    os.chdir(place)
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, errors, os.O_WRONLY)):
        os.dup2(os.open(path, flags | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
    sys.argv[:] = [file]
    sys.path[0] = os.path.dirname(file)


LOADING = 120  # seconds in which torch is loaded, on a busy machine too


class Forking:
    """Such a Python. It starts when it is first asked, and again after a file that did not end in time."""

    def __init__(self, env: dict[str, str]):
        self.env = env
        self.process: subprocess.Popen[str] | None = None

    def run(self, file: Path, place: Path, timeout: float) -> subprocess.CompletedProcess:
        """Run a file in a folder, as subprocess.run does, with what it prints as text.

        Raises:
            subprocess.TimeoutExpired: if it has not ended in `timeout` seconds; it is ended then.
        """
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__], env=self.env, encoding="utf-8", start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            self.answer(LOADING)
        texts = [file.with_name(name) for name in ("printed.txt", "errors.txt")]
        order = {"file": file, "place": place, "out": texts[0], "errors": texts[1]}
        self.process.stdin.write(json.dumps({name: str(path) for name, path in order.items()}) + "\n")
        self.process.stdin.flush()
        status = json.loads(self.answer(timeout))["status"]
        out, errors = (text.read_text(encoding="utf-8", errors="replace") for text in texts)
        return subprocess.CompletedProcess(str(file), status, out, errors)

    def answer(self, timeout: float) -> str:
        """Its next line; where none comes in time it is ended."""
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            self.end()
            raise subprocess.TimeoutExpired(__file__, timeout)
        return self.process.stdout.readline()

    def end(self) -> None:
        """End it, and what it has forked."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate(timeout=30)
            self.process = None


if __name__ == "__main__":
    main()
