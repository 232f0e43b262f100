"""The command, in processes of its own: interrupted, twice at once, with names, and where nothing can be had."""

import signal
import subprocess
import sys
import time

from nondual.store import Package
from nondual.store.command import main

RUN = """
import sys
from nondual.store import Package
from nondual.store.command import main
sys.exit(main({{"tiny": Package({!r}, {!r}, {!r}, {!r}, {!r}, size={!r})}}))
"""


def start(tiny: Package, *arguments: str) -> subprocess.Popen:
    code = RUN.format(tiny.name, tiny.version, tiny.sha256, tiny.root, tiny.files, tiny.size)
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def arrived(tiny: Package, process: subprocess.Popen) -> None:
    """Wait until something has been downloaded."""
    part, until = tiny.part, time.monotonic() + 120
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None, end(process)
        assert time.monotonic() < until
        time.sleep(0.02)


def test_ctrl_c_leaves_a_part_and_no_traceback_and_the_next_run_goes_on(index, tiny, right, requests):
    server = index("slow")
    process = start(tiny)
    arrived(tiny, process)
    process.send_signal(signal.SIGINT)
    code, out, err = end(process)
    assert (code, out) == (130, "")
    assert err.strip() == "Interrupted. What has arrived is kept: run the command again to go on."
    here = (tiny.part).stat().st_size
    assert 0 < here < tiny.size
    code, out, err = end(start(tiny, "--list"))
    assert code == 0 and "not here, 0 MB, 0 MB of which have arrived" in out
    requests(server)
    index("json")
    code, out, err = end(start(tiny, "tiny"))
    assert (code, out, err) == (0, f"tiny 1.2: {tiny.folder}\n", "")  # and no bar, since this is no terminal
    assert [one["range"] for one in requests(server) if one["path"].endswith(".whl")] == [f"bytes={here}-"]
    assert right(tiny)


def test_two_processes_at_once_download_it_once(index, tiny, right, requests):
    server = index("slow")
    both = [start(tiny), start(tiny)]
    for code, out, err in map(end, both):
        assert (code, out, err) == (0, f"tiny 1.2: {tiny.folder}\n", "")
    assert right(tiny)
    assert len([one for one in requests(server) if one["path"].endswith(".whl")]) == 1


def test_what_could_not_be_had_is_one_sentence_and_exit_status_1(index, tiny):
    index("missing")
    code, out, err = end(start(tiny))
    assert (code, out) == (1, "") and err.count("\n") == 1 and "does not have it (HTTP 404)" in err


def test_names_choose_what_is_fetched(index, tiny, capsys):
    index("json")
    known = {"other": Package("other", "1", "0" * 64, "", {"none": "0" * 64}), "tiny": tiny}
    assert main(known, ["tiny"]) == 0
    said = capsys.readouterr()
    assert said.out == f"tiny 1.2: {tiny.folder}\n" and said.err == ""
    parts = {"tiny": tiny, "tiny/more": known["other"], "tinyother": known["other"]}
    assert main(parts, ["tiny", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["tiny", "tiny/more"]
    assert main(known, ["tiny", "--list"]) == 0
    assert capsys.readouterr().out == f"tiny (tiny 1.2): in {tiny.folder}\n"
