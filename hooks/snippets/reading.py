"""The fences of a page, read on our own: what a reader could paste, what is run, and what would slip through.

pytest-codeblocks runs a fence whose info string is exactly `python`, and passes over any other in silence. So this file
reads the pages by itself; judging.py names every fence that looks like Python and would not be run. Three kinds are
right:

    python              a snippet: run by pytest, and alone by alone.py; what it prints is shown under it
    python exec="on" …  a figure: run before the build by hooks/drawing, and alone by alone.py
    py                  source shown by inclusion: one or more `--8<--` lines and nothing else; tested where it lives
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
OUTPUT = "<!--pytest-codeblocks:expected-output-->"

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


def notebooks(root: Path = ROOT) -> list[Path]:
    """Every notebook of the site."""
    return sorted((root / "docs").rglob("*.ipynb"))


def cells(notebook: Path) -> list[tuple[int, str]]:
    """The cells of code of a notebook, each with its number; a line for IPython alone, `%time`, is left empty."""
    found = enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"])
    codes = [(i, "".join(cell["source"])) for i, cell in found if cell["cell_type"] == "code"]
    return [(i, "\n".join("" if line.lstrip()[:1] in "%!" else line for line in code.split("\n"))) for i, code in codes]


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
