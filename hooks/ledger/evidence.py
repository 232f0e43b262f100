"""The tests that are a claim's evidence, read and not run: what each is marked with, trains, reads and asserts."""

import ast
from dataclasses import dataclass, field
from pathlib import Path

from ledger.claims import OPEN, Claim, said


@dataclass
class Test:
    """A test function as its source has it."""

    node: str  # tests/test_x.py::test_name
    line: int
    claims: list[tuple]  # the arguments of its claim marks
    escapes: list[str]  # skip, skipif, xfail, gpu: the ways in which it might not run
    asserts: bool
    # Of the test, with the fixtures, functions, classes and constants of its file that it uses:
    runs: bool = False  # something of the library
    trains: bool = False  # by an optimiser, or by a function named train…
    reads: set[str] = field(default_factory=set)  # files of docs/measured

    @property
    def where(self) -> str:
        return f"{self.node.partition('::')[0]}:{self.line}"


def scan(root: Path) -> dict[str, Test]:
    """Every test function of tests/, by its node id, read and not run."""
    out = {}
    for file in sorted((root / "tests").rglob("test_*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        whole = [mark for node in tree.body if is_for_all(node) for mark in ast.walk(node.value)]
        name = file.relative_to(root).as_posix()
        for path, node in functions(tree.body):
            test = read_test(f"{name}::{path}", node)
            if test.claims:
                look_into(test, node, tree, root)
            test.escapes += [mark.attr for mark in whole if isinstance(mark, ast.Attribute) and mark.attr in ESCAPES]
            out[test.node] = test
    return out


ESCAPES = ("skip", "skipif", "xfail", "gpu", "importorskip")


def is_for_all(node: ast.stmt) -> bool:
    """Whether a statement of a file marks or skips all of its tests: pytestmark = …, or pytest.importorskip(…)."""
    if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "pytestmark" for t in node.targets):
        return True
    if isinstance(node, ast.Assign | ast.Expr):
        calls = [ast.unparse(part.func) for part in ast.walk(node.value) if isinstance(part, ast.Call)]
        return any(call in ("pytest.importorskip", "pytest.skip") for call in calls)
    return False


def functions(body: list[ast.stmt], prefix: str = ""):
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield from functions(node.body, f"{prefix}{node.name}::")


def read_test(name: str, node: ast.FunctionDef) -> Test:
    test = Test(name, node.lineno, [], [], any(can_fail(part) for part in ast.walk(node)))
    for mark in node.decorator_list:
        call = mark if isinstance(mark, ast.Call) else None
        kind = ast.unparse(call.func if call else mark)
        if kind == "pytest.mark.claim":
            arguments = [*(call.args if call else []), *(k.value for k in (call.keywords if call else []))]
            test.claims.append(tuple(ast.literal_eval(argument) for argument in arguments))
        elif kind.startswith("pytest.mark.") and kind.split(".")[2] in ESCAPES:
            test.escapes.append(kind.split(".")[2])
    return test


def look_into(test: Test, node: ast.FunctionDef, tree: ast.Module, root: Path) -> None:
    """What a test runs, trains and reads, as far as its own file tells."""
    parts = [part for used in used_by(node, tree) for part in ast.walk(used)]
    library = {
        alias.asname or alias.name.partition(".")[0]
        for part in ast.walk(tree)
        if isinstance(part, ast.Import | ast.ImportFrom)
        for alias in part.names
        if (part.module or "" if isinstance(part, ast.ImportFrom) else alias.name).partition(".")[0] == "nondual"
    }
    test.runs = any(isinstance(part, ast.Name) and part.id in library for part in parts)
    for part in parts:
        if isinstance(part, ast.Attribute) and part.attr == "optim":
            test.trains = True
        elif isinstance(part, ast.Call) and part.args:  # model.train() alone only switches dropout on
            test.trains |= ast.unparse(part.func).rpartition(".")[2].startswith("train")
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.endswith(".json"):
            name = part.value.rpartition("/")[2]
            if (root / "docs/measured" / name).is_file():
                test.reads.add(name)


def used_by(node: ast.FunctionDef, tree: ast.Module) -> list[ast.stmt]:
    """The function, and every statement at the top of its file that it needs: by name, or as a fixture."""
    defined: dict[str, list[ast.stmt]] = {}
    for top in tree.body:
        for name in names_defined(top):
            defined.setdefault(name, []).append(top)
    found: list[ast.stmt] = [node]
    for each in found:  # grows as it goes
        names = {part.id for part in ast.walk(each) if isinstance(part, ast.Name)}
        names |= {part.arg for part in ast.walk(each) if isinstance(part, ast.arg)}
        found += [top for name in names for top in defined.get(name, []) if top not in found]
    return found


def names_defined(top: ast.stmt) -> list[str]:
    if isinstance(top, ast.FunctionDef | ast.ClassDef):
        return [top.name]
    if isinstance(top, ast.Assign | ast.AnnAssign):
        targets = top.targets if isinstance(top, ast.Assign) else [top.target]
        return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    return []


def can_fail(node: ast.AST) -> bool:
    """An assert of something that is not a constant, pytest.raises, or a call of assert_… or check_…"""
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant)
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).rpartition(".")[2].startswith(("assert_", "check_", "raises"))
    return False


def faults_of_tests(claims: list[Claim], root: Path) -> list[str]:
    """Where a test and the ledger disagree."""
    out = []
    tests, by_id = scan(root), {claim.id: claim for claim in claims}
    for claim in claims:
        if claim.verdict is None:
            continue
        for node in claim.test:
            test, want = tests.get(node), (claim.id, claim.verdict)
            mark = f'@pytest.mark.claim("{claim.id}", "{claim.verdict}")'
            if test is None:
                out.append(f"{claim.where}: there is no test {node}")
                continue
            if want not in test.claims:
                out.append(f"{test.where}: {node} is the evidence for {claim.id} and has no {mark}")
            if test.escapes:
                out.append(f"{test.where}: {node} is the evidence for {claim.id} and may not run: {test.escapes[0]}")
            if not test.asserts:
                out.append(f"{test.where}: {node} is the evidence for {claim.id} and asserts nothing: it cannot fail")
        out += faults_of_evidence(claim, [tests[node] for node in claim.test if node in tests])
    for test in tests.values():
        for mark in test.claims:
            id, verdict = mark if len(mark) == 2 else (mark[0] if mark else None, None)
            claim = by_id.get(id)
            if verdict is None:
                out.append(f'{test.where}: a claim mark is written claim("A1.4", "holds"): id and verdict')
            elif claim is None:
                out.append(f"{test.where}: {id} is not a claim of docs/ledger")
            elif claim.verdict != verdict:
                in_ledger = said(claim.verdict) if claim.verdict else f"is {OPEN}"
                out.append(f"{test.where}: {id} {said(verdict)} in this test and {in_ledger} in the ledger")
            elif test.node not in claim.test:
                out.append(f"{claim.where}: {test.node} carries its mark and is not named as its test")
    return out


def faults_of_evidence(claim: Claim, tests: list[Test]) -> list[str]:
    """A stored measurement is named, and is not all that a claim rests on; an experiment says what it leaves open."""
    out = []
    for test in tests:
        for name in sorted(test.reads - set(claim.measured)):
            out.append(f"{claim.where}: {test.node} reads docs/measured/{name}: write `measured: {name}`")
    if claim.measured and tests and not any(test.runs for test in tests):
        out.append(
            f"{claim.where} rests on a stored measurement alone: let a test of it also run what was measured, "
            "at a small size, and assert what it can there"
        )
    if not claim.confounder and (claim.measured or any(test.trains for test in tests)):
        done = "something was measured" if claim.measured else "something is trained"
        out.append(f"{claim.where}: {done} for it, and it names no `confounder`: what else could explain the result")
    return out
