"""The verdicts and claims that a page states: where each stands, whether the ledger agrees, and its anchor."""

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from snippets.reading import fences_of

from ledger.claims import VERDICTS, Claim, said

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
