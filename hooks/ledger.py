"""The ledger: what each claim came to, and the tie between its verdict, its page and its test.

docs/ledger/A.yml to E.yml are the list, one file an essay. This file reads them, says where they disagree with the
pages and the tests, and publishes them as claims.json; ledger_page.py draws the table. As an mkdocs hook it stops the
build where a page disagrees; tests/test_ledger.py asks that and the rest.

An entry that nobody has reached yet:

    - id: A1.4                 stable: chapters, tests and pages name the claim by it; the letter names the essay
      gist: …                  what the essay says, in our words, with its qualifiers
      how: …                   one way to put it to the test; a better one is welcome
      guess: corrected         our guess before any run: holds, conditional, corrected or reading; it is not evidence
      verdict: null

The same entry, answered. `verdict` is what the run showed, and these lines are added:

      verdict: does not hold   holds | holds if | does not hold | contested | reading | slip
      finding: …               one line: what was found ("holds if": the conditions; "does not hold": what is right)
      confounder: …            where something was trained or timed: the other explanation that it did not rule out
      chapter: essay/self_attention.md
      test: tests/test_self_attention.py::test_equal_projections_score_no_direction      (or a list of them)
      figure: fig-symmetry     optional: the anchor of a figure in that chapter
      measured: selective_scan_cpu.json    where it rests on a stored measurement: its file in docs/measured (or a list)
      source: …                a reading has this in place of a test: the locus, and the scholar whose edition was read

On a page, a verdict is a sentence in a `!!! verdict` box: **A1.4 does not hold.**, **A1.3 holds if** …, **A1.6 is a
reading.**; a claim is its id in a `!!! claim` box: **A1.4**. Both get an anchor here. On a test it is a mark:
@pytest.mark.claim("A1.4", "does not hold").
"""

import ast
import json
import os
import re
import subprocess
import tomllib
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml
from fences import fences_of

ESSAYS = {
    "A": "Transformers and Attention Through the Non-Dual Lens",
    "B": "Transformer Tantra",
    "C": "The Attention Mechanism as Meditation",
    "D": "Attention Mechanism deep dive",
    "E": "04: Attention Mechanism",
}
VERDICTS = {  # in the ledger and on a page: its class
    "holds": "verdict-holds",
    "holds if": "verdict-holds-if",
    "does not hold": "verdict-fails",
    "contested": "verdict-contested",
    "reading": "verdict-reading",
    "slip": "verdict-slip",
}
UNTESTED = ("reading", "slip")  # a text's locus, or the printed error itself, may be all the evidence there is
OPEN = "not reached yet"


@dataclass
class Claim:
    """One entry of docs/ledger; the top of this file says what each field holds."""

    id: str
    gist: str
    how: str
    guess: str
    verdict: str | None = None
    finding: str | None = None
    confounder: str | None = None
    chapter: str | None = None
    test: list[str] = field(default_factory=list)
    figure: str | None = None
    measured: list[str] = field(default_factory=list)
    source: str | None = None
    line: int = 0  # in its file

    @property
    def essay(self) -> str:
        return self.id[0]

    @property
    def where(self) -> str:
        return f"{ledger_file(self.essay)}:{self.line}: {self.id}"


def ledger_file(essay: str) -> str:
    return f"docs/ledger/{essay}.yml"


# --- the list ------------------------------------------------------------------------------------------------------


def load(root: Path) -> list[Claim]:
    """The claims of all essays, in the order of the files. ValueError, naming the line, for what is not an entry."""
    return [claim for essay in ESSAYS for claim in load_essay(root, essay)]


def load_essay(root: Path, essay: str) -> list[Claim]:
    file = ledger_file(essay)
    text = (root / file).read_text(encoding="utf-8")
    try:
        entries = yaml.safe_load(text)["claims"]
    except yaml.YAMLError as error:
        at = error.problem_mark.line + 1 if getattr(error, "problem_mark", None) else 1
        raise ValueError(f"{file}:{at}: not YAML: {getattr(error, 'problem', error)}") from None
    lines = [i for i, line in enumerate(text.splitlines(), 1) if re.match(r"\s*- id:", line)]
    known = {f.name for f in fields(Claim)} - {"line"}
    claims = []
    for entry, line in zip(entries or [], lines, strict=True):
        where = f"{file}:{line}: {entry.get('id')}"
        if extra := set(entry) - known:
            raise ValueError(f"{where}: unknown field {', '.join(sorted(extra))}")
        if missing := {"id", "gist", "how", "guess", "verdict"} - set(entry):
            raise ValueError(f"{where}: without {', '.join(sorted(missing))}")
        if not str(entry["id"]).startswith(essay):
            raise ValueError(f"{where}: this file holds the claims of essay {essay}")
        for name in ("test", "measured"):  # one, or a list of them
            given = entry.pop(name, None) or []
            entry[name] = [given] if isinstance(given, str) else given
        claims.append(Claim(**entry, line=line))
    return claims


def faults_of_list(claims: list[Claim]) -> list[str]:
    """What is wrong in the ledger by itself."""
    out = []
    seen = Counter(claim.id for claim in claims)
    for claim in claims:
        if seen[claim.id] > 1:
            out.append(f"{claim.where} is listed {seen[claim.id]} times")
        if not re.fullmatch(r"[A-E]\d+(\.\d+)?", claim.id):
            out.append(f"{claim.where}: an id is a letter A to E and a number, as A1.4 or B3")
        if claim.verdict is None:
            for name in ("finding", "confounder", "chapter", "test", "figure", "measured", "source"):
                if getattr(claim, name):
                    out.append(f"{claim.where} has a {name} and no verdict")
            continue
        if claim.verdict not in VERDICTS:
            out.append(f"{claim.where}: unknown verdict {claim.verdict!r}; one of {', '.join(VERDICTS)}")
            continue
        for name in ("finding", "chapter"):
            if not getattr(claim, name):
                out.append(f"{claim.where} {said(claim.verdict)} and has no {name}")
        if claim.verdict == "reading" and claim.test:
            out.append(f"{claim.where} is a reading: it has a source, and no test")
        if claim.verdict in ("reading", "contested") and not claim.source:
            out.append(f"{claim.where} {said(claim.verdict)} and has no source")
        if claim.verdict not in UNTESTED and not claim.test:
            out.append(f"{claim.where} {said(claim.verdict)} and has no test")
        if claim.verdict == "slip" and not (claim.test or claim.source):
            out.append(f"{claim.where} is a slip and has neither test nor source")
    return out


def faults_of_measured(claims: list[Claim], root: Path) -> list[str]:
    """Where a claim names a stored measurement that is not there."""
    return [
        f"{claim.where}: there is no docs/measured/{name}"
        for claim in claims
        for name in claim.measured
        if not (root / "docs/measured" / name).is_file()
    ]


def said(verdict: str) -> str:
    """The verdict as the end of a sentence: 'does not hold', 'is a reading'."""
    if verdict in ("reading", "slip"):
        return f"is a {verdict}"
    return f"is {verdict}" if verdict == "contested" else verdict


# --- the pages -----------------------------------------------------------------------------------------------------

ID = r"(?P<id>[A-E]\d+(?:\.\d+)?)"
VERDICT = re.compile(
    rf"\*\*{ID} (?:is (?:an? )?)?(?P<verdict>holds if|holds|does not hold|contested|reading|slip)\b[^*\n]*\*\*"
)
CLAIM = re.compile(rf"\*\*{ID}\*\*")
BOX = re.compile(r"^(?P<indent>\s*)(?:!!!|\?\?\?\+?)\s+(?P<kind>[\w-]+)")


@dataclass
class Stated:
    """A verdict that a page states. Only one in a verdict box answers the claim; any other must merely agree."""

    page: str
    line: int
    id: str
    verdict: str
    boxed: bool


def lines_with_box(text: str, page: Path) -> list[tuple[str, str | None]]:
    """Each line with the kind of the innermost box it lies in, or None; the lines of a fence count as 'fence'."""
    fenced = {i for fence in fences_of(text, page) if fence.end for i in range(fence.line, fence.end + 1)}
    boxes: list[tuple[int, str]] = []
    out = []
    for i, line in enumerate(text.splitlines(), 1):
        indent = len(line.expandtabs(4)) - len(line.expandtabs(4).lstrip())
        if line.strip():
            while boxes and indent < boxes[-1][0] + 4:
                boxes.pop()
        out.append((line, "fence" if i in fenced else boxes[-1][1] if boxes else None))
        if i not in fenced and (opening := BOX.match(line)):
            boxes.append((indent, opening["kind"]))
    return out


def stated(root: Path) -> list[Stated]:
    """Every verdict that the pages of docs state."""
    out = []
    for page in sorted((root / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        for i, (line, box) in enumerate(lines_with_box(text, page), 1):
            if box != "fence":
                for m in VERDICT.finditer(line):
                    name = page.relative_to(root).as_posix()
                    out.append(Stated(name, i, m["id"], m["verdict"], box == "verdict"))
    return out


def faults_of_pages(claims: list[Claim], root: Path) -> list[str]:
    """Where a page and the ledger disagree."""
    out = []
    by_id = {claim.id: claim for claim in claims}
    said_here = stated(root)
    for one in said_here:
        claim, where = by_id.get(one.id), f"{one.page}:{one.line}: {one.id}"
        if claim is None:
            out.append(f"{where} is not a claim of docs/ledger")
        elif claim.verdict is None:
            out.append(f"{where} {said(one.verdict)} on this page; the ledger has it not reached yet")
        elif claim.verdict != one.verdict:
            out.append(f"{where} {said(one.verdict)} on this page and {said(claim.verdict)} in the ledger")
    for (page, id), times in Counter((one.page, one.id) for one in said_here if one.boxed).items():
        if times > 1:
            out.append(f"{page}: {id} is answered {times} times: once, in one verdict box")
    for claim in claims:
        if claim.verdict and claim.chapter:
            page = root / "docs" / claim.chapter
            if not page.exists():
                out.append(f"{claim.where}: there is no chapter docs/{claim.chapter}")
            elif not any(one.boxed and one.id == claim.id and one.page == f"docs/{claim.chapter}" for one in said_here):
                out.append(
                    f"{claim.where} {said(claim.verdict)}, and docs/{claim.chapter} does not say so: "
                    f"write **{claim.id} {said(claim.verdict)}** in a `!!! verdict` box"
                )
    return out


# --- the tests -----------------------------------------------------------------------------------------------------


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


def faults(root: Path, tests: bool = True) -> list[str]:
    """Every disagreement there is, each with its file and line; without those of the tests where `tests` is False."""
    try:
        claims = load(root)
    except ValueError as error:
        return [str(error)]
    found = faults_of_list(claims) + faults_of_measured(claims, root) + faults_of_pages(claims, root)
    return found + faults_of_tests(claims, root) if tests else found


# --- the build -----------------------------------------------------------------------------------------------------


def root_of(config) -> Path:
    return Path(config.docs_dir).parent


def on_config(config):
    """Let a served site follow the ledger."""
    config.watch.append(str(Path(config.docs_dir) / "ledger"))
    return config


def on_pre_build(config):
    """Stop here if ledger and pages disagree. (That the tests agree, and pass, is for the tests to say.)"""
    from mkdocs.exceptions import PluginError

    if found := faults(root_of(config), tests=False):
        raise PluginError("ledger:\n  " + "\n  ".join(found))


def on_page_markdown(markdown, page, config, files):
    """Give each claim and verdict on a page its anchor."""
    return with_anchors(markdown, page.file.src_uri)


def on_post_build(config):
    """Publish the ledger for machines."""
    text = json.dumps(as_json(root_of(config)), ensure_ascii=False, indent=1)
    (Path(config.site_dir) / "claims.json").write_text(text + "\n", encoding="utf-8")


def with_anchors(markdown: str, uri: str) -> str:
    """Anchors #verdict-A1.4 and #claim-A1.4, a class for the verdict, and a link from the claim to its ledger row."""
    if "**" not in markdown:
        return markdown
    ledger = os.path.relpath("ledger.md", os.path.dirname(uri) or ".").replace(os.sep, "/")
    given: set[str] = set()

    def verdict(m: re.Match) -> str:
        anchor, kind = f"verdict-{m['id']}", VERDICTS[m["verdict"]]
        name = "" if anchor in given else f"#{anchor} "
        given.add(anchor)
        return f"{m[0]}{{ {name}.{kind} }}"

    def claim(m: re.Match) -> str:
        anchor = f"claim-{m['id']}"
        name = "" if anchor in given else f"#{anchor} "
        given.add(anchor)
        return f"[{m[0]}]({ledger}#{m['id']}){{ {name}.claim-id }}"

    out = []
    for line, box in lines_with_box(markdown, Path(uri)):
        if box == "verdict":
            line = VERDICT.sub(verdict, line)
        elif box == "claim":
            line = CLAIM.sub(claim, line)
        out.append(line)
    return "\n".join(out)


# --- for machines --------------------------------------------------------------------------------------------------


def counts(claims: list[Claim]) -> dict[str, int]:
    """How many claims came to each verdict, in the order of VERDICTS, and how many are not reached yet."""
    counted = Counter(claim.verdict or OPEN for claim in claims)
    return {name: counted[name] for name in [*VERDICTS, OPEN]}


def as_json(root: Path) -> dict:
    """claims.json: which version it was made from, how the counts stand, and every claim with all its fields."""
    claims = load(root)
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = [{"essay": claim.essay, **asdict(claim)} for claim in claims]
    for row in rows:
        del row["line"]
    return {
        "project": project["name"],
        "version": project["version"],
        "commit": commit(root),
        "essays": ESSAYS,
        "counts": counts(claims),
        "claims": rows,
    }


def commit(root: Path) -> str | None:
    """The commit that the site was built from, where there is one."""
    try:
        ran = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip() or None if ran.returncode == 0 else None
