"""The fences of a page, read on our own: what a reader could paste, what is run, and what would slip through.

pytest-codeblocks runs a fence whose info string is exactly `python`, and passes over any other in silence. So this file
reads the pages by itself and names every fence that looks like Python and would not be run. Three kinds are right:

    python              a snippet: run by pytest, and alone by `main` below; what it prints is shown under it
    python exec="on" …  a figure: run by the site build, and alone by `main`
    py                  source shown by inclusion: one or more `--8<--` lines and nothing else; tested where it lives

    python hooks/fences.py               run every snippet and figure alone, as `python snippet.py`
    python hooks/fences.py docs/x.md     the same for some pages
"""

import ast
import builtins
import os
import re
import subprocess
import symtable
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON_WORDS = {"python", "python2", "python3", "py", "py2", "py3", "pycon", "pycon3", "ipython", "ipython3", "pyodide"}
SHELL_WORDS = {"sh", "bash"}  # pytest-codeblocks executes them
OUTPUT = "<!--pytest-codeblocks:expected-output-->"
SECONDS = 120  # a snippet runs in seconds; this is the limit

OPENING = re.compile(r"^(?P<lead>(?:[ \t>]|[-*+][ \t]+|\d+[.)][ \t]+)*)(?P<ticks>`{3,}(?=[^`]*$)|~{3,})(?P<info>.*)$")
HTML = re.compile(r"<(?:pre|code)\b[^>]*\b(?:language|lang|highlight)[-=\"']+(?P<word>[\w.+-]+)", re.IGNORECASE)
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)")


@dataclass
class Fence:
    """One fence of a page. `output` is the text shown under it as its expected output, or None."""

    page: Path
    line: int  # of the opening line, counted from 1
    info: str  # what follows the backticks, as written
    code: str
    output: str | None = None
    kind: str = "other"  # snippet | figure | include | output | html | other
    marks: tuple[str, ...] = ()  # the pytest directives above it
    hidden: bool = False  # inside an HTML comment
    end: int = 0  # of the closing line; one past the page where there is none
    closed: bool = True

    @property
    def word(self) -> str:
        """The language, however it is written: `python`, ` Python`, `{.python title="x"}` are all "python"."""
        found = re.search(r"\.([\w+-]+)", self.info) if self.info.lstrip().startswith("{") else None
        found = found or re.search(r"([\w+-]+)", self.info)
        return found[1].lower() if found else ""

    @property
    def where(self) -> str:
        return f"{shown(self.page)}:{self.line}"


def shown(page: Path) -> str:
    """The page's path from the root of the project where it lies in it."""
    page = Path(page).resolve()
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else str(page)


def pages(root: Path = ROOT) -> list[Path]:
    """Every page whose fences a reader may paste."""
    front = [root / "README.md", root / "CONTRIBUTING.md"]
    return [page for page in front if page.exists()] + sorted((root / "docs").rglob("*.md"))


# --- reading -------------------------------------------------------------------------------------------------------


def fences(page: str | Path) -> list[Fence]:
    """The fences of a page in order: backticks or tildes, three or more, at any depth of list, tab, box or quote."""
    return fences_of(Path(page).read_text(encoding="utf-8"), Path(page))


def fences_of(text: str, page: Path) -> list[Fence]:
    """The same, of a text in hand."""
    lines = text.splitlines()
    found: list[Fence] = []
    marks: list[str] = []
    comment = awaiting_output = False
    i = 0
    while i < len(lines):
        line = lines[i]
        if line.strip() == OUTPUT:
            awaiting_output = True
        elif directive := re.match(r"\s*<!--[-\s]*(pytest[-.].*?)\s*-*->", line):
            marks.append(directive[1])
        elif opening := OPENING.match(line):
            body, end = block(lines, i, opening)
            fence = Fence(page, i + 1, opening["info"].rstrip(), body, marks=tuple(marks), hidden=comment)
            fence.end, fence.closed = end + 1, end < len(lines)
            if awaiting_output:
                fence.kind = "output"
                if found and found[-1].output is None:
                    found[-1].output = body
            else:
                fence.kind = kind(fence, plain=opening["ticks"][0] == "`" and not opening["lead"].strip())
            found.append(fence)
            marks, awaiting_output, i = [], False, end
        else:
            prose = CODE_SPAN.sub("", line)
            if tag := HTML.search(prose):
                found.append(Fence(page, i + 1, tag["word"].removeprefix("language-"), "", kind="html", hidden=comment))
            comment = still_comment(prose, comment)
        i += 1
    if marks or awaiting_output:
        left = "pytest-codeblocks:expected-output" if awaiting_output else marks[0]
        found.append(Fence(page, len(lines), "", "", marks=(left,)))
    return found


def block(lines: list[str], start: int, opening: re.Match) -> tuple[str, int]:
    """The text of the fence that opens on line `start`, and the index of its closing line."""
    ticks, lead = opening["ticks"], opening["lead"]
    closing = re.compile(rf"^[ \t>]*{re.escape(ticks[0])}{{{len(ticks)},}}[ \t]*$")
    quoted, width = ">" in lead, len(lead)
    body = []
    for end in range(start + 1, len(lines)):
        line = lines[end]
        if closing.match(line):
            return "".join(body), end
        if quoted:
            line = re.sub(r"^[ \t]*>[ \t]?", "", line)
        indent = len(line) - len(line.lstrip())
        body.append(line[min(width, indent) :] + "\n")
    return "".join(body), len(lines)


def kind(fence: Fence, plain: bool) -> str:
    """What a fence is for. `plain`: backticks at the start of their line, which pytest-codeblocks insists on."""
    if fence.info == "python" and plain:
        return "snippet"
    if re.match(r'python\s(.*\s)?exec="(on|1|true|yes)"(\s|$)', fence.info):
        return "figure"
    if fence.info == "py" and fence.code.strip():
        if all(re.fullmatch(r'--8<--\s+".+"', line.strip()) for line in fence.code.strip().splitlines()):
            return "include"
    return "other"


def still_comment(prose: str, inside: bool) -> bool:
    """Whether an HTML comment is open after this line."""
    while True:
        at = prose.find("-->" if inside else "<!--")
        if at < 0:
            return inside
        prose, inside = prose[at + (3 if inside else 4) :], not inside


# --- judging -------------------------------------------------------------------------------------------------------


def faults(page: str | Path) -> list[str]:
    """What is wrong with the fences of a page, each as 'docs/x.md:12: what, and what to do'."""
    return [f"{fence.where}: {fault}" for fence in fences(page) for fault in faults_of(fence)]


def faults_of(fence: Fence) -> list[str]:
    out = [] if fence.closed else ["the fence is never closed"]
    if fence.hidden and (fence.word in PYTHON_WORDS or fence.kind == "snippet"):
        out.append("a fence inside an HTML comment is run and never seen: show it or delete it")
    for mark in fence.marks:
        if mark.startswith("pytest-codeblocks:cont"):
            out.append("needs the fence before it (cont): write one that runs alone")
        elif mark.startswith("pytest-codeblocks:expected-output"):
            out.append(f"only {OUTPUT} is read, with a fence after it")
        elif re.search(r"skip|xfail|expect-", mark):
            out.append(f"<!--{mark}--> would hide a failure: every fence runs, everywhere")
        else:
            out.append(f"<!--{mark}-->: no mark is needed on a fence")
    if fence.kind == "output":
        if fence.word in PYTHON_WORDS:
            out.append("a shown output is a fence without a language, not Python")
        return out
    if fence.output is not None and fence.kind != "snippet":
        out.append("has a shown output, and is not a `python` fence that could print it")
    if fence.kind in ("snippet", "figure"):
        out += faults_of_code(fence)
    elif fence.kind == "include":
        pass
    elif fence.word in PYTHON_WORDS:
        out.append(f"`{fence.info.strip()}` looks like Python and would not be run: " + remedy(fence))
    elif fence.word in SHELL_WORDS:
        out.append(f"`{fence.word}` would be executed by the tests: commands belong in a `console` fence")
    elif not fence.info and reads_as_python(fence.code):
        out.append("a fence without a language that holds Python would not be run: write exactly ```python")
    return out


def remedy(fence: Fence) -> str:
    if fence.info == "py":
        return "write exactly ```python (a `py` fence holds `--8<--` lines alone)"
    if fence.info == "python" and fence.kind != "html":
        return "open it with backticks on a line of their own, not with tildes, a list's dash or a quotation's >"
    return "write exactly ```python"


def faults_of_code(fence: Fence) -> list[str]:
    """The faults that can be seen without running: syntax, a print without an output, a name from nowhere."""
    try:
        tree = ast.parse(fence.code)
    except SyntaxError as error:
        return [f"SyntaxError on line {fence.line + (error.lineno or 1)}: {error.msg}"]
    out = []
    if fence.kind == "snippet":
        if fence.output is None and (line := first_print(tree)):
            out.append(f"prints (line {fence.line + line}) and shows no output: put {OUTPUT} and a ``` fence under it")
        if fence.output is not None and not fence.output:
            out.append("its shown output is empty: delete it")
    if re.search(r'\bsession="', fence.info):
        out.append('session="…" lets a fence lean on the one before it: write one that runs alone')
    for name, line in unbound(fence.code, tree):
        if name == "__name__":
            out.append(
                f"`__name__` (line {fence.line + line}) is not __main__ where the tests run it: leave the guard out"
            )
            continue
        out.append(f"`{name}` (line {fence.line + line}) is never defined in it: write a fence that runs alone")
    return out


def first_print(tree: ast.AST) -> int | None:
    """The line of the first call that writes to standard output, called or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            to_file = any(keyword.arg == "file" for keyword in node.keywords)
            if (name == "print" and not to_file) or name in ("sys.stdout.write", "pprint", "pprint.pprint"):
                return node.lineno
    return None


def unbound(code: str, tree: ast.AST) -> list[tuple[str, int]]:
    """Names that a fence reads and neither defines nor imports, each with its first line."""
    if any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(tree)):
        return []
    bound = set(dir(builtins)) - {"__name__", "__doc__", "__loader__", "__spec__", "__package__"}
    read = set()

    def visit(table: symtable.SymbolTable, top: bool) -> None:
        for symbol in table.get_symbols():
            if (top or symbol.is_declared_global()) and (symbol.is_assigned() or symbol.is_imported()):
                bound.add(symbol.get_name())
            if symbol.is_referenced() and (top or symbol.is_global()):
                read.add(symbol.get_name())
        for child in table.get_children():
            if top and child.get_type() in ("function", "class"):
                bound.add(child.get_name())
            visit(child, False)

    visit(symtable.symtable(code, "<fence>", "exec"), True)
    lines = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            lines[node.id] = min(node.lineno, lines.get(node.id, node.lineno))
    return sorted(((name, lines.get(name, 1)) for name in read - bound), key=lambda pair: pair[1])


def reads_as_python(code: str) -> bool:
    if re.search(r"^>>> ", code, re.MULTILINE):
        return True
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return any(isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef) for node in tree.body)


# --- running alone -------------------------------------------------------------------------------------------------


def run_alone(fence: Fence) -> str | None:
    """Run a fence as a file of its own. None, or what went wrong with page and line.

    A snippet runs in an empty folder; a figure, as in the build, at the root of the project, where docs/measured is.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "snippet.py"
        file.write_text(fence.code, encoding="utf-8")
        place = ROOT if fence.kind == "figure" else folder
        try:
            ran = subprocess.run(
                [sys.executable, str(file)], cwd=place, env=env, capture_output=True, encoding="utf-8",
                errors="replace", timeout=SECONDS, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"{fence.where}: still running after {SECONDS} s"
    if ran.returncode:
        return failure(fence, ran)
    if fence.kind == "snippet" and ran.stdout != (fence.output or ""):
        if fence.output is None:
            return f"{fence.where}: prints, and no output is shown:\n{indented(ran.stdout)}"
        return f"{fence.where}: shows\n{indented(fence.output)}\n  and prints\n{indented(ran.stdout)}"
    return None


def failure(fence: Fence, ran: subprocess.CompletedProcess) -> str:
    """The exception's own lines, at the line of the page that raised it."""
    error = ran.stderr.rstrip().splitlines()
    frames = [int(m[1]) for line in error if (m := re.match(r'  File ".*snippet\.py", line (\d+)', line))]
    line = fence.line + frames[-1] if frames else fence.line
    after = max((i for i, text in enumerate(error) if text.startswith(" ")), default=-1)
    said = error[after + 1 :] or [f"exit code {ran.returncode}"]
    return f"{shown(fence.page)}:{line}: {said[0]}" + "".join(f"\n    {text}" for text in said[1:6])


def indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines()) or "    (nothing)"


def main(arguments: list[str]) -> int:
    chosen = [Path(argument) for argument in arguments] or pages()
    runnable = [fence for page in chosen for fence in fences(page) if fence.kind in ("snippet", "figure")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = [fault for fault in pool.map(run_alone, runnable) if fault]
    for fault in failed:
        print(fault)
    print(f"{len(runnable)} fences run alone: {len(runnable) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
