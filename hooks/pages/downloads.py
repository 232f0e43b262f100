"""What a reader can take away: a page as a program and as a notebook, and each figure as a file.

A page's snippets run one after the other in its .py and .ipynb; its prose stands between them as comments or Markdown.
Excerpts of the library are Markdown too, since they do not run alone, and so is what a snippet prints. A figure is a
link to its SVG file, which is black on white, for a slide or for print.

Colab opens notebooks of a repository. So the notebooks are in ours too, in notebooks/: a build at a desk writes those
that changed, and tests/site/test_downloads.py finds one whose programs are not those of its page.
"""

import html as html_
import json
import posixpath
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

from snippets.reading import Fence, fences_of

from pages.blocks import KINDS, lines_of
from pages.links import REPOSITORY, folder_of

COLAB = "https://colab.research.google.com/github"
SITE = "https://nondual.github.io/nondual/"  # as in pyproject.toml: links in a file on a reader's disk lead there
INSTALL = f"nondual[pretrained] @ git+{REPOSITORY}"
FOLDERS = ("essay/", "companions/", "workshop/")
WIDTH = 100

INK, PAPER = "#1a1a1a", "#ffffff"


class Cell(NamedTuple):
    """Prose in Markdown, or code with what it prints."""

    code: bool
    text: str


# --- a page as a program and as a notebook -------------------------------------------------------------------------


def has_program(markdown: str, uri: str) -> bool:
    """Whether the page `uri` is a chapter or a workshop with a snippet in it."""
    return uri.startswith(FOLDERS) and any(fence.kind == "snippet" for fence in fences_of(markdown, Path(uri)))


def name_of(uri: str) -> str:
    """The files' name without its ending: `essay/mamba.md` gives `mamba`."""
    return posixpath.basename(folder_of(uri))


def kept(uri: str) -> str:
    """Where the repository has the notebook of a page."""
    return f"notebooks/{folder_of(uri)}.ipynb"


def keep(files: dict[str, str], root: Path) -> list[str]:
    """Write the notebooks among these files of the site to where the repository has them; names those that changed."""
    changed = []
    for path, text in files.items():
        if path.endswith(".ipynb"):
            file = root / kept(posixpath.dirname(path) + ".md")
            if not file.exists() or file.read_text(encoding="utf-8") != text:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
                changed.append(file.relative_to(root).as_posix())
    return changed


def address_of(uri: str) -> str:
    """The address of a page of the published site."""
    return f"{SITE}{folder_of(uri)}/"


def cells(markdown: str, uri: str, root: Path) -> list[Cell]:
    """The page in order, prose and code.

    Args:
        markdown: its text, as the author wrote it.
        uri: its path under docs.
        root: the root of the project, where its excerpts are read.
    """
    address = address_of(uri)
    lines = markdown.splitlines()
    if lines and lines[0] == "---":
        lines[: lines.index("---", 1) + 1] = [""] * (lines.index("---", 1) + 1)
    found: list[Cell] = []
    prose: list[str] = []

    def end_prose() -> None:
        if text := as_markdown("\n".join(prose), uri):
            found.append(Cell(False, text))
        prose.clear()

    at = 0
    for fence in fences_of(markdown, Path(uri)):
        if not fence.end or fence.hidden or fence.kind == "html":
            continue
        prose += lines[at : fence.line - 1]
        at = fence.end
        opening = lines[fence.line - 1]
        indent = " " * (len(opening) - len(opening.lstrip(" ")))
        if fence.kind == "snippet":
            end_prose()
            found.append(Cell(True, fence.code.rstrip() + printed(fence)))
        elif fence.kind == "figure":
            prose += [indent + line for line in figure(fence, address)]
        elif fence.kind == "include":
            prose += [indent + line for line in excerpt(fence, root)]
        elif fence.kind != "output":
            prose += lines[fence.line - 1 : fence.end]
    prose += lines[at:]
    end_prose()
    return found


def printed(fence: Fence) -> str:
    """What a snippet prints, as a comment under it."""
    if not fence.output:
        return ""
    return "\n\n# It prints:\n" + "\n".join(f"#   {line}".rstrip() for line in fence.output.rstrip("\n").splitlines())


def figure(fence: Fence, address: str) -> list[str]:
    """A figure as an image at its address on the site, or a table as a link to the page."""
    named = re.search(r'\bname="([a-z][a-z0-9-]*)"', fence.code)
    if named is None:
        return [f"(Here stands a table: [see the page]({address}).)"]
    return [f"[![Figure]({address}figures/{named[1]}.svg)]({address}#{named[1]})"]


def excerpt(fence: Fence, root: Path) -> list[str]:
    """An excerpt of the library as a block of Markdown, under its file and lines."""
    out = []
    for file, section in re.findall(r'--8<-- "([^":]+)(?::(\w+))?"', fence.code):
        first, last = lines_of(root / file, section or None)
        source = (root / file).read_text(encoding="utf-8").splitlines()[first - 1 : last]
        source = [line for line in source if "--8<--" not in line]
        out += [f"From `{file}`, lines {first} to {last}:", "", "```python"]
        out += [*textwrap.dedent("\n".join(source)).splitlines(), "```"]
    return out


_TAG = re.compile(r"</?(?:div|figure|span|p|br|a)\b[^>]*>")
_BOX = re.compile(r'^( *)(?:!!!|\?\?\?\+?) +([\w-]+)(?: +"(.*)")? *$')
_LINK = re.compile(r"(?<=\]\()(?!\w+:|//)([^)\s#]*)(#[^)\s]*)?(?=\))")


def as_markdown(text: str, uri: str) -> str:
    """Prose as any notebook shows it: boxes as headed paragraphs, formulas in dollars, links that lead to the site."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'<div class="card".*?</div>', "", text, flags=re.S)
    parts = re.split(r"(^ *```.*?^ *```$)", unboxed(text), flags=re.M | re.S)  # excerpts, at odd places
    parts[::2] = [as_prose(part, uri) for part in parts[::2]]
    return re.sub(r"\n{3,}", "\n\n", "".join(parts)).strip()


def as_prose(text: str, uri: str) -> str:
    """The same, of what lies between excerpts."""

    def link(m: re.Match) -> str:
        here = posixpath.normpath(posixpath.join(posixpath.dirname(uri), m[1])) if m[1] else uri
        page = folder_of(here) + "/" if here.endswith((".md", ".ipynb")) else here
        return SITE + page.removeprefix("/") + (m[2] or "")

    text = _LINK.sub(link, _TAG.sub("", text))
    text = re.sub(r"\\\((.+?)\\\)", lambda m: f"${m[1].strip()}$", text)
    return re.sub(r"\{:? ?[.#][\w -]+\}", "", text)


def unboxed(text: str) -> str:
    """The text with boxes as paragraphs: `!!! claim "A1.4"` becomes **Claim A1.4**, and what is in it moves left."""
    out: list[str] = []
    boxes: list[int] = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip(" "))
        while boxes and line.strip() and indent < boxes[-1] + 4:
            boxes.pop()
        if box := _BOX.match(line):
            kind = box[2].capitalize() if box[2] in KINDS else ""
            head = f"{kind}: {box[3]}" if kind and box[3] else kind or box[3]
            out += ["", f"**{head}**", ""] if head else [""]
            boxes.append(indent)
        else:
            out.append(line[min(4 * len(boxes), indent) :])
    return "\n".join(out)


def program(found: list[Cell], address: str) -> str:
    """The page as a Python file, with marks at which an editor shows its cells."""
    parts = [f"# {address}\n# To run it:  pip install '{INSTALL}'"]
    for cell in found:
        if cell.code:
            parts.append(f"# %%\n{cell.text}")
        else:
            parts.append("# %% [markdown]\n" + "\n".join(f"# {line}".rstrip() for line in wrapped(cell.text)))
    return "\n\n".join(parts) + "\n"


def wrapped(text: str) -> list[str]:
    """Lines of prose no longer than WIDTH; formulas, tables and excerpts are left as they are."""
    out: list[str] = []
    fenced = formula = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if fenced or formula or line.lstrip().startswith(("|", "$$", "[![")):
            out.append(line)
        else:
            hang = " " * (len(line) - len(re.sub(r"^\s*(?:[-*+] +|\d+\. +)?", "", line)))
            wrap = textwrap.TextWrapper(
                WIDTH - 2, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False
            )
            out += wrap.wrap(line) or [""]
        if line.count("$$") % 2:
            formula = not formula
    return out


def notebook(found: list[Cell], address: str) -> str:
    """The page as a notebook. Its first cell installs the library where it is missing, as on Colab."""
    installs = f'try:\n    import nondual\nexcept ImportError:\n    %pip install -q "{INSTALL}"'
    every = [Cell(False, f"From [{address}]({address})."), Cell(True, installs), *found]
    made = []
    for number, cell in enumerate(every):
        one = {"cell_type": "code" if cell.code else "markdown", "id": f"cell-{number}", "metadata": {}}
        if cell.code:
            one |= {"execution_count": None, "outputs": []}
        made.append(one | {"source": cell.text.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps(
        {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, ensure_ascii=False, indent=1
    )


def offered(html: str, uri: str) -> str:
    """The page with links to its program and notebook: last in its card, or at its end where it has none."""
    name = name_of(uri)
    colab = f"{COLAB}/{REPOSITORY.partition('github.com/')[2]}/blob/main/{kept(uri)}"
    links = (
        f'Download as <a href="{name}.py" download>.py</a> or <a href="{name}.ipynb" download>.ipynb</a>; '
        f'open in <a href="{colab}">Colab</a>'
    )
    card = re.search(r'<div class="card"[^>]*>.*?(?=</dl>)', html, re.S)
    if card:
        return f"{html[: card.end()]}<dt>Take it away</dt><dd><p>{links}</p></dd>{html[card.end() :]}"
    return f'{html}<p class="download">{links}.</p>'


# --- figures -------------------------------------------------------------------------------------------------------

_FIGURE = re.compile(r'<figure class="drawn[^>]* id="(?P<name>[^"]+)".*?(?=</figure>)', re.S)
_SVG = re.compile(r"<svg\b.*?</svg>", re.S)
_NARROW = re.compile(r'<div class="plate narrow">.*?</svg></div>', re.S)
_BOUNDS = re.compile(r'viewBox="0 0 ([\d.]+) ([\d.]+)"')
_GAP = 12


def with_figures(html: str) -> tuple[str, dict[str, str]]:
    """A page whose drawn figures have a link to their file each, and those files: {"figures/NAME.svg": its text}."""
    files: dict[str, str] = {}

    def link(m: re.Match) -> str:
        drawings = [as_xml(svg) for svg in _SVG.findall(_NARROW.sub("", m[0]))]
        if not drawings:
            return m[0]
        file = f"figures/{m['name']}.svg"
        said = re.search(r'role="img" aria-label="([^"]+)"', m[0])
        files[file] = alone(drawings, said[1] if said else m["name"], row='class="plate panels"' in m[0])
        return f'{m[0]}<p class="download" data-search-exclude><a href="{file}" download>Save as SVG</a></p>'

    return _FIGURE.sub(link, html), files


_CASED = {
    name.lower(): name
    for name in ("viewBox", "clipPath", "clipPathUnits", "linearGradient", "gradientUnits", "preserveAspectRatio")
}
_NAMES = re.compile(rf"(?<=[<\s/])(?:{'|'.join(_CASED)})(?=[\s=>])")


def as_xml(svg: str) -> str:
    """A drawing whose names an HTML parser, as for a notebook's page, may have written in lower-case letters."""
    return re.sub(r"<[^>]*>", lambda tag: _NAMES.sub(lambda name: _CASED[name[0]], tag[0]), svg)


def alone(drawings: list[str], title: str, *, row: bool = False) -> str:
    """Drawings of a page as one SVG file, dark on white.

    Args:
        drawings: each an SVG element.
        title: what the file shows, as HTML.
        row: whether they stand side by side; otherwise below each other.
    """
    sizes = [(float(w), float(h)) for drawing in drawings for w, h in _BOUNDS.findall(drawing)[:1]]
    gaps = _GAP * (len(sizes) - 1)
    widths, heights = zip(*sizes)
    width, height = (sum(widths) + gaps, max(heights)) if row else (max(widths), sum(heights) + gaps)
    parts, at = [], 0.0
    for drawing, (w, h) in zip(drawings, sizes):
        x, y = (at, 0) if row else (0, at)
        place = f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" viewBox="0 0 {w:g} {h:g}"'
        opening = f'<svg {place} fill="{INK}" stroke-linejoin="round">'
        parts.append(re.sub(r"<svg\b[^>]*>", opening, drawing, count=1).replace("currentColor", INK))
        at += (w if row else h) + _GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{width:g}pt" '
        f'height="{height:g}pt" viewBox="0 0 {width:g} {height:g}"><title>{html_.escape(html_.unescape(title))}</title>'
        f'<rect width="100%" height="100%" fill="{PAPER}"/>{"".join(parts)}</svg>\n'
    )


# --- all of it, for one page ---------------------------------------------------------------------------------------


def taken_away(html: str, markdown: str, uri: str, root: Path) -> tuple[str, dict[str, str]]:
    """A page with its links, and the files that they lead to, by their paths in the site.

    Args:
        html: its content.
        markdown: its text, as the author wrote it.
        uri: its path under docs.
        root: the root of the project.
    """
    html, files = with_figures(html)
    if has_program(markdown, uri):
        html, address, found = offered(html, uri), address_of(uri), cells(markdown, uri, root)
        files[f"{name_of(uri)}.py"] = program(found, address)
        files[f"{name_of(uri)}.ipynb"] = notebook(found, address)
    return html, {posixpath.join(folder_of(uri), file): text for file, text in files.items()}
