"""The claims of docs/ledger, one file an essay: their fields, what is wrong in the list by itself, and claims.json."""

import json
import re
import subprocess
import tomllib
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml

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
    """One entry of docs/ledger; the top of ledger/__init__.py says what each field holds."""

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


def faults_of_figures(claims: list[Claim], root: Path) -> list[str]:
    """Where a claim names a figure that its chapter does not draw."""
    return [
        f"{claim.where}: docs/{claim.chapter} draws no figure named {claim.figure!r}"
        for claim in claims
        if claim.figure and claim.chapter and (root / "docs" / claim.chapter).is_file()
        if f'name="{claim.figure}"' not in (root / "docs" / claim.chapter).read_text(encoding="utf-8")
    ]


def said(verdict: str) -> str:
    """The verdict as the end of a sentence: 'does not hold', 'is a reading'."""
    if verdict in ("reading", "slip"):
        return f"is a {verdict}"
    return f"is {verdict}" if verdict == "contested" else verdict


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


def published(root: Path) -> str:
    """claims.json, as a text."""
    return json.dumps(as_json(root), ensure_ascii=False, indent=1) + "\n"


def commit(root: Path) -> str | None:
    """The commit that the site was built from, where there is one."""
    try:
        ran = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip() or None if ran.returncode == 0 else None
