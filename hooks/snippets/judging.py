"""What is wrong with the fences of a page, seen without running them, each with its file, its line and the remedy."""

import ast
import builtins
import re
import symtable
from pathlib import Path

from snippets.reading import OUTPUT, Fence, fences

PYTHON_WORDS = {"python", "python2", "python3", "py", "py2", "py3", "pycon", "pycon3", "ipython", "ipython3", "pyodide"}
SHELL_WORDS = {"sh", "bash"}  # pytest-codeblocks executes them


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
