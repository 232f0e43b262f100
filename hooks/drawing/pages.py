"""Every figure of every page, by the code that draws it: taken from the store, or drawn on all cores at once."""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from snippets.reading import Fence, fences

from drawing.process import Drawing, draw
from drawing.store import Store

STORE = Path(".cache", "figures")  # under the root of the project, and not in git
LIMIT = 20  # seconds of processor time for all figures of a page


def draw_pages(
    root: Path, *, anew: bool = False, pages: Iterable[Path] | None = None, say: Callable[[str], object] = print
) -> dict[str, str]:
    """What each figure prints.

    Args:
        root: the root of the project.
        anew: whether to draw every figure, whatever the store has.
        pages: those whose figures are wanted; all under docs when left out.
        say: told how many were drawn, and which pages take more than LIMIT.

    Returns:
        The output of each figure by its code, as `normal` writes it.

    Raises:
        ValueError: if the code of a figure fails; names page, line and error of each that does.
    """
    began, store = time.monotonic(), Store(root / STORE, root)
    wanted = [figure for page in pages or sorted((root / "docs").rglob("*.md")) for figure in figures_of(page)]
    drawings: dict[str, Drawing] = {}
    first: dict[str, Fence] = {}  # the figures to draw; what stands on two pages is drawn once
    for figure in wanted:
        code = normal(figure.code)
        if code not in drawings and code not in first:
            kept = None if anew else store.get(code)
            if kept is None:
                first[code] = figure
            else:
                drawings[code] = kept

    def draw_and_keep(code: str) -> Drawing:
        figure = first[code]
        drawing = draw(figure.code, figure.page.relative_to(root).as_posix(), figure.line, root)
        if not drawing.error:
            store.put(code, drawing)
        return drawing

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a thread only waits for its process
        drawings |= zip(first, pool.map(draw_and_keep, first))
    store.forget()
    if errors := [drawings[code].error for code in first if drawings[code].error]:
        raise ValueError("\n\n".join(errors))
    say(f"{len(first)} of {len(drawings)} figures drawn, in {time.monotonic() - began:.0f} s")
    for page, seconds in times(wanted, drawings).items():
        if seconds > LIMIT:
            name = page.relative_to(root).as_posix()
            say(f"{name}: its figures take {seconds:.0f} s of processor time; the limit for a page is {LIMIT} s")
    return {code: drawing.output for code, drawing in drawings.items()}


def figures_of(page: Path) -> list[Fence]:
    """The fences of a page whose code draws a figure."""
    return [fence for fence in fences(page) if fence.kind == "figure"]


def times(wanted: list[Fence], drawings: dict[str, Drawing]) -> dict[Path, float]:
    """The processor time of each page's figures, in seconds, as it was when they were drawn."""
    spent: dict[Path, float] = {}
    for figure in wanted:
        spent[figure.page] = spent.get(figure.page, 0.0) + drawings[normal(figure.code)].seconds
    return spent


def normal(code: str) -> str:
    """The code without empty lines around it and blanks at the ends of lines: readers of Markdown differ in these."""
    return "\n".join(line.rstrip() for line in code.strip("\n").splitlines())
