"""Run the code of one figure in a process of its own, and note which files of the project it depended on.

A fresh process is what makes the note true: a module that an earlier figure had imported would not be imported again,
and so would not be seen. On Unix it is forked from a server that has torch and matplotlib already, which takes some
hundredths of a second; elsewhere it starts from nothing.
"""

import contextlib
import io
import multiprocessing
import os
import sys
import time
import traceback
import types
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

SECONDS = 600  # of the clock, for one figure; on a busy machine one that needs 15 s alone can take minutes
HOOKS = str(Path(__file__).resolve().parent.parent)
_CONTEXT = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
if os.name != "nt":
    _CONTEXT.set_forkserver_preload(["torch", "matplotlib.pyplot"])  # nothing of the library, which may change


class Drawing(NamedTuple):
    """What came of a figure's code.

    Attributes:
        output: what it printed: the figure's HTML.
        files: the files of the project that it imported or read, as paths from the root.
        seconds: the processor time that it took.
        error: where it failed: "docs/x.md:12: ValueError: …" and the traceback; "" where it did not.
    """

    output: str
    files: tuple[str, ...]
    seconds: float
    error: str = ""


def draw(code: str, page: str, line: int, root: Path) -> Drawing:
    """Run a figure's code at the root of the project.

    Args:
        code: the fence's text.
        page: the page's path from the root, for the error.
        line: the line of the page on which the fence opens.
        root: the root of the project.

    Returns:
        The drawing; one with an `error` where the code raised, ended the process or ran for more than SECONDS.
    """
    if HOOKS not in sys.path:  # the new process has this list, and finds this module in it; MkDocs takes it off again
        sys.path.append(HOOKS)
    receive, send = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_run, args=(send, code, page, line, str(root)), daemon=True)
    process.start()
    send.close()
    try:
        if receive.poll(SECONDS):
            return Drawing(*receive.recv())
        fault = f"still running after {SECONDS} s"
    except EOFError:
        process.join(10)
        fault = f"its process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join(10)
    return Drawing("", (), 0.0, f"{page}:{line}: {fault}")


def _run(send: Connection, code: str, page: str, line: int, root: str) -> None:
    """In the new process: run the code and send the fields of its Drawing."""
    opened: set[str] = set()

    def note(event: str, given: tuple) -> None:
        if event == "open" and isinstance(given[0], str) and given[2] & (os.O_WRONLY | os.O_RDWR) == 0:
            opened.add(given[0])

    os.chdir(root)
    sys.addaudithook(note)
    printed, error = io.StringIO(), ""
    module = types.ModuleType("figure")  # so that a class of the fence has a module, as dataclasses ask
    sys.modules["figure"] = module
    try:
        # Empty lines before the code give each of its lines the number that it has on the page.
        program = compile("\n" * line + code, page, "exec")
        with contextlib.redirect_stdout(printed):
            exec(program, module.__dict__)
    except BaseException as raised:
        error = _told(raised, page, line)
    loaded = {file for each in list(sys.modules.values()) if (file := getattr(each, "__file__", None))}
    files = sorted({file for path in opened | loaded if (file := _in_project(path, root))} - {page})
    send.send((printed.getvalue(), tuple(files), time.process_time(), error))


def _in_project(path: str, root: str) -> str | None:
    """The path from the root, of a file that is the project's own; None for any other, and for this tool's."""
    whole = os.path.realpath(path)
    inside = os.path.relpath(whole, os.path.realpath(root))
    parts = Path(inside).parts
    if whole.startswith(HOOKS) or any(part.startswith(".") or part == "__pycache__" for part in parts):
        return None
    return Path(inside).as_posix() if os.path.isfile(whole) else None


def _told(error: BaseException, page: str, line: int) -> str:
    """The error with its place on the page, and the traceback from there on."""
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename != page:
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.filename == page:
        at = error.lineno or line
    else:
        inside = [number for frame, number in traceback.walk_tb(trace) if frame.f_code.co_filename == page]
        at = inside[-1] if inside else line
    frames = "".join(traceback.format_exception(type(error), error, trace))
    said = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    return f"{page}:{at}: {said}\n\n{frames}".rstrip()
