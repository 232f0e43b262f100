"""A download that another process holds: waited for while it makes progress, and no longer."""

import subprocess
import sys

import pytest

from nondual.store import FetchError, fetch, partial_file


def test_a_process_that_makes_no_progress_is_not_waited_for(index, monkeypatch, tiny, right):
    index("json")
    monkeypatch.setattr(partial_file, "STALLED", 0.3)
    part = tiny.part
    part.parent.mkdir()
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", hold, str(part)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"1\n"
            with pytest.raises(FetchError, match=r"held by another process that makes no progress: end that one"):
                fetch(tiny)
        finally:
            other.kill()
    fetch(tiny)
    assert right(tiny)
