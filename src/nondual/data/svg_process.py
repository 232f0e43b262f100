"""Draw SVGs of unknown origin in a process of their own, which may take so much time and memory and no more.

`Painter` starts the process, and `main` is what runs in it. A drawing that takes too long ends the process; the next
one starts another.
"""

import contextlib
import subprocess
import sys
import threading
from types import TracebackType
from typing import IO

from nondual.data.svg import rgb

SECONDS = 20.0  # for one drawing; the slowest of Open Clip Art takes a tenth of one on a slow machine
BYTES = 2 << 30  # of memory for the process


class Painter:
    """Draws one SVG after another in another process: `with Painter(32) as painter: painter.draw(svg)`.

    Attributes:
        size: height and width of the pictures, in pixels.
        seconds: the time that one drawing may take.
    """

    size: int
    seconds: float

    def __init__(self, size: int, *, seconds: float = SECONDS):
        self.size = size
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Painter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()
            self._process.wait(10)
            self._process = None

    def draw(self, svg: str) -> bytes:
        """The drawing without its empty margin, on white: size rows of size pixels of 3 bytes each, RGB.

        Raises:
            TimeoutError: it took longer than `seconds`.
            ValueError: it cannot be drawn, takes too much memory, or nothing is to be seen.
        """
        if self._process is None:
            code = f"from nondual.data.svg_process import main; main({self.size})"
            command = [sys.executable, "-c", code]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if _read(self._process.stdout, 1) != b"+":  # what it needs is imported: the time begins now
                self.close()
                raise ImportError("resvg_py and PIL are needed to draw: pip install 'nondual[pictures]'")
        process = self._process
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self.seconds, end)
        timer.start()
        try:
            assert process.stdin is not None
            process.stdin.write(_framed(svg.encode("utf-8", "replace")))
            process.stdin.flush()
            answer = _receive(process.stdout)
        except OSError:
            answer = None
        finally:
            timer.cancel()
        if answer is None:
            self.close()
            if late.is_set():
                raise TimeoutError(f"the drawing took longer than {self.seconds} seconds")
            raise ValueError("the drawing ended the process that drew it")
        kind, content = answer[:1], answer[1:]
        if kind != b"+":
            raise ValueError(content.decode())
        return content


def main(size: int) -> None:
    """Draw what comes in on standard input, until it ends, and write it to standard output."""
    import resvg_py  # noqa: F401  # so that the time of a drawing does not include this
    from PIL import Image  # noqa: F401

    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    out = sys.stdout.buffer
    out.write(b"+")
    out.flush()
    while (svg := _receive(sys.stdin.buffer)) is not None:
        try:
            answer = b"+" + rgb(svg.decode(), size, crop=True)
        except (ValueError, MemoryError, OSError) as why:
            answer = b"-" + (str(why) or type(why).__name__).encode()
        out.write(_framed(answer))
        out.flush()


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _receive(pipe: IO[bytes] | None) -> bytes | None:
    """One message, or None where the other side is gone."""
    length = _read(pipe, 4)
    data = _read(pipe, int.from_bytes(length, "big")) if len(length) == 4 else b""
    return data if len(length) == 4 and len(data) == int.from_bytes(length, "big") else None


def _read(pipe: IO[bytes] | None, count: int) -> bytes:
    return pipe.read(count) if pipe is not None else b""
