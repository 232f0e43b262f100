"""A test that hangs is ended and shows where, however it hangs; and the settings that see to it."""

import ast
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]

RUN = "import sys, pytest; sys.exit(pytest.main(['-p', 'no:cacheprovider', '-rA', *sys.argv[1:]]))"
KEEPS_THE_LOCK = """
import ctypes, pytest

def keeps_the_lock():
    mutex = ctypes.create_string_buffer(64)
    library = ctypes.PyDLL(None)  # a PyDLL does not give up the interpreter's lock while it runs
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)
"""


@pytest.fixture
def pytest_says(tmp_path, in_a_process_of_its_own, light_pytest):
    """A function: what pytest says of these files, with our conftest.py and short limits. It fails if pytest hangs.

    `whole` gives it torch and every plugin that is installed.
    """
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "hooks").symlink_to(ROOT / "hooks")

    def run(files, *arguments, timeout=2, last=40, whole=False):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        (tmp_path / "pytest.ini").write_text(
            f"[pytest]\ntimeout = {timeout}\nfaulthandler_timeout = {last}\nfaulthandler_exit_on_timeout = true\n"
            "addopts = --strict-markers\nmarkers =\n    gpu\n    claim(id, verdict)\n"
        )
        env = {} if whole else light_pytest
        ran = in_a_process_of_its_own(RUN, *arguments, cwd=tmp_path, timeout=170, check=False, env=env)
        return ran.stdout + ran.stderr

    return run


PLACES = {  # where a test can wait for ever
    "in the test": "def test_it():\n    where_it_waits()\n",
    "in a fixture": "@pytest.fixture(scope='session')\ndef f():\n    where_it_waits()\ndef test_it(f):\n    pass\n",
    "in a fixture's end": "@pytest.fixture\ndef f():\n    yield\n    where_it_waits()\ndef test_it(f):\n    pass\n",
}


@pytest.mark.parametrize("workers", ["-n0", "-n1"])
def test_a_test_that_waits_fails_with_all_stacks_and_the_rest_are_run(pytest_says, workers):
    text = (
        "import threading, pytest\nhold = threading.Event()\n"
        "def where_it_waits():\n    hold.wait(600)\n"
        "def where_the_thread_waits():\n    hold.wait(600)\n"
        "@pytest.fixture(autouse=True)\n"
        "def thread():\n    threading.Thread(target=where_the_thread_waits, daemon=True).start()\n"
    )
    files = {f"test_{i}.py": text + place for i, place in enumerate(PLACES.values())}
    said = pytest_says({**files, "test_z.py": "def test_z():\n    pass\n"}, workers)
    assert said.count("Timeout (>2.0s) from pytest-timeout") >= 3
    assert said.count(": in where_it_waits") == said.count("Stack of Thread-1 (where_the_thread_waits)") == 3
    assert re.search(r"1 failed, 2 passed, 2 errors", said), said[-3000:]


def test_a_snippet_that_waits_fails_too(pytest_says):
    page = "```python\nimport time\n\ntime.sleep(600)\n```\n\n```python\nx = 1\n```\n"
    said = pytest_says({"page.md": page}, "--codeblocks", "page.md", whole=True)
    assert "Timeout (>2.0s) from pytest-timeout" in said and "page.md:4" in said
    assert "1 failed, 1 passed" in said


@pytest.mark.parametrize("workers", ["-n0", "-n1"])
def test_a_test_that_keeps_the_interpreters_lock_is_ended_with_its_process(pytest_says, workers):
    """No Python runs any more: not pytest-timeout's, and not this process's own signal handler."""
    said = pytest_says({"test_a.py": KEEPS_THE_LOCK + "def test_a():\n    keeps_the_lock()\n"}, workers, last=3)
    assert "Timeout (0:00:03)!" in said and "in keeps_the_lock" in said
    assert workers == "-n0" or "crashed while running 'test_a.py::test_a'" in said


@pytest.mark.parametrize("where", ["in the teardown of a test that failed", "as Python exits"])
def test_what_hangs_after_the_test_is_ended_too(pytest_says, where):
    text = {
        "in the teardown of a test that failed": (
            "@pytest.fixture\ndef f():\n    yield\n    keeps_the_lock()\ndef test_a(f):\n    assert 0\n"
        ),
        "as Python exits": "import atexit\natexit.register(keeps_the_lock)\ndef test_a():\n    pass\n",
    }[where]
    said = pytest_says({"test_a.py": KEEPS_THE_LOCK + text}, last=3)
    assert "Timeout (0:00:03)!" in said and "in keeps_the_lock" in said


def test_without_plugins_the_settings_are_no_mistake(pytest_says):
    """`nox -s gpu_tests` runs where pytest is alone."""
    plugins = ["timeout", "xdist", "codeblocks"]
    files = {"test_a.py": "import pytest\n@pytest.mark.gpu\ndef test_a():\n    pytest.skip('x')\n"}
    said = pytest_says(files, *(f"-pno:{name}" for name in plugins), "-W", "error", whole=True)
    assert "1 skipped" in said and "warning" not in said.lower(), said


def test_a_longer_limit_of_one_test_puts_the_last_one_off(pytest_says):
    files = {"test_a.py": "import pytest, time\n@pytest.mark.timeout(60)\ndef test_a():\n    time.sleep(4)\n"}
    assert "1 passed" in pytest_says(files, last=2)


def test_the_limits_go_up_from_the_gentlest_to_the_last():
    assert 0 < SETTINGS["timeout"] < SETTINGS["faulthandler_timeout"]
    assert SETTINGS["faulthandler_exit_on_timeout"] is True


def test_every_setting_that_a_plugin_reads_is_known_without_it():
    markers = [text.partition(":")[0].partition("(")[0] for text in SETTINGS["markers"]]
    assert "timeout" in markers
    assert "-n" not in SETTINGS["addopts"] and "--dist" not in SETTINGS["addopts"]


# --- commands: hooks/limited.py --------------------------------------------------------------------------------------

LIMITED = f"""
    import os, runpy, sys
    sys.argv = [{str(ROOT / "hooks/limited.py")!r}, *sys.argv[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
COMMAND = """
import os, sys, threading, time

def where_it_waits():
    time.sleep(600)

if os.fork() == 0:
    if sys.argv[1:]:  # stacks of its own file: two processes that write into one at the same time mix their letters
        os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), 2)
    where_it_waits()
print(os.getpgid(0), flush=True)
where_it_waits()
"""


def group_is_gone(group: str) -> bool:
    for _ in range(600):
        try:
            os.killpg(int(group), 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_command_is_ended_with_all_that_it_started_and_says_where_it_waited(in_a_process_of_its_own, tmp_path):
    child = tmp_path / "child.txt"
    ran = in_a_process_of_its_own(LIMITED, "0.1", sys.executable, "-c", COMMAND, child, check=False)
    assert ran.returncode == 124 and "ended after 0.1 minutes" in ran.stderr
    assert "in where_it_waits" in ran.stderr and "in where_it_waits" in child.read_text()
    assert group_is_gone(ran.stdout)


@pytest.mark.parametrize("code, status", [("", 0), ("raise SystemExit(3)", 3), ("import os; os.abort()", 134)])
def test_a_command_that_ends_in_time_has_its_own_status(in_a_process_of_its_own, code, status):
    ran = in_a_process_of_its_own(LIMITED, "1", sys.executable, "-c", code, check=False)
    assert ran.returncode == status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_limit_that_is_stopped_leaves_nothing_running(a_server_of_its_own, number):
    code = f"print('limit', os.getpid(), flush=True)\n{textwrap.dedent(LIMITED)}"
    inner = [sys.executable, str(ROOT / "hooks/limited.py"), "5", sys.executable, "-c", COMMAND]  # nox, within .ci/run
    with a_server_of_its_own(f"import os\n{code}", "5", *inner, ready=r"limit (\d+)\n(\d+)\n") as found:
        os.kill(int(found[1]), number)
        assert group_is_gone(found[2])


def test_what_does_not_listen_is_ended_by_the_innermost_limit(a_server_of_its_own):
    """A child may miss Ctrl-C: Python forgets what came between the fork and the child's first line."""
    deaf = f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{COMMAND}"
    code = f"print('limit', os.getpid(), flush=True)\n{textwrap.dedent(LIMITED)}"
    inner = [sys.executable, str(ROOT / "hooks/limited.py"), "5", sys.executable, "-c", deaf]
    with a_server_of_its_own(f"import os\n{code}", "5", *inner, ready=r"limit (\d+)\n(\d+)\n") as found:
        os.kill(int(found[1]), signal.SIGINT)
        assert group_is_gone(found[2])


def test_every_command_of_a_session_has_a_limit():
    """But for `nox -s serve`, which goes on until its reader stops it."""
    source = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    bare = re.findall(r"^ *(?:return )?session\.run\((.*)", source, re.MULTILINE)
    assert [words for words in bare if "serve" not in words and "http.server" not in words] == [bare[0]]
    assert bare[0].startswith("*limit,")


# --- the code of the project -----------------------------------------------------------------------------------------


def waits_without_a_limit(source: str) -> list[int]:
    """The lines that wait for another process, thread or host, and give no time limit.

    A `work` is torch.distributed's handle of what is sent or received: its wait ends with its group's own timeout.
    """
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "timeout" for keyword in node.keywords):
            continue
        called = ast.unparse(node.func)
        if called in ("subprocess.run", "subprocess.call", "subprocess.check_call", "subprocess.check_output"):
            lines.append(node.lineno)
        elif called == "work.wait":
            continue
        elif called.endswith(("urlopen", ".communicate")) or (called.endswith((".join", ".wait")) and not node.args):
            lines.append(node.lineno)
    return lines


def test_nothing_waits_without_a_limit():
    assert waits_without_a_limit(
        "import subprocess\nsubprocess.run([1])\nsubprocess.run([1], timeout=1)\nprocess.join()\n','.join(words)\n"
        "process.wait()\nprocess.wait(3)\nrequest.urlopen(x)\nwork.wait()\n"
    ) == [2, 4, 6, 8]
    found = {}
    for folder in ("tests", "hooks", "benchmarks", "src"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if lines := waits_without_a_limit(file.read_text(encoding="utf-8")):
                found[str(file.relative_to(ROOT))] = lines
    assert not found
