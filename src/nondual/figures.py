"""Figures for a page: inline SVG whose text is real text, in the page's own colours and type, the same at every build.

A chapter draws with matplotlib and ends with `print(show(fig, ...))`. Black becomes `currentColor`, so one drawing
serves the light page and the dark one; every id is made the figure's own, so many figures share a page.

Palettes: Okabe and Ito (2008) for categories, cividis (Nuñez et al., 2018) for magnitudes, `SIGNED` for values about
zero. matplotlib is imported when a function is called; `pip install 'nondual[figures]'` brings it.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray
    from torch import Tensor

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#999999")
"""Colours that a colour-blind reader can tell apart, in the order in which lines take them."""

SIGNED = "RdBu_r"
"""The colour map for signed values; give it limits that are symmetric about zero."""

_INK = "#010101"  # stands for the page's text colour until `show` writes the SVG


def _matplotlib() -> ModuleType:
    """matplotlib, imported when it is needed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("nondual.figures draws with matplotlib: pip install 'nondual[figures]'.") from error
    return matplotlib


def style() -> None:
    """Set matplotlib's defaults for a figure about 7 inches wide, which a page shows at its own size.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    from cycler import cycler

    matplotlib.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=OKABE_ITO),
            "image.cmap": "cividis",
            "image.interpolation": "none",
            "figure.figsize": (7.0, 3.6),
            "figure.constrained_layout.use": True,
            "font.family": "sans-serif",
            "font.sans-serif": ["Source Sans 3", "DejaVu Sans"],
            "font.size": 11,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.labelsize": 11,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "legend.fontsize": 10,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.8,
            "lines.linewidth": 1.8,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "svg.fonttype": "none",
            **dict.fromkeys(
                ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"),
                _INK,
            ),
        }
    )


def attention(
    ax: Axes,
    weights: Tensor | NDArray[Any],
    queries: Sequence[str],
    keys: Sequence[str] | None = None,
    *,
    vmax: float | None = None,
) -> AxesImage:
    """Draw an attention matrix: queries as rows, keys as columns, the first of each at the top left.

    Args:
        ax: Where to draw.
        weights: (N, M) attention weights, a tensor or an array, each row summing to one.
        queries: N labels, one a row.
        keys: M labels, one a column; the queries' own when left out.
        vmax: The weight shown as the brightest colour; the largest weight when left out.

    Returns:
        The image, for a colour bar.

    Raises:
        ValueError: If there are not as many labels as rows and columns.
    """
    table = weights if isinstance(weights, np.ndarray) else weights.detach().cpu().numpy()
    keys = queries if keys is None else keys
    if table.shape != (len(queries), len(keys)):
        raise ValueError(f"weights must be (queries, keys) = {(len(queries), len(keys))}, got {tuple(table.shape)}.")
    image = ax.imshow(table, cmap="cividis", vmin=0.0, vmax=vmax, interpolation="none")
    ax.set_xticks(range(len(keys)), keys, rotation=90)
    ax.set_yticks(range(len(queries)), queries)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return image


def differences(
    found: Mapping[str, Mapping[str, Mapping[str, Any]]],
    arms: Mapping[str, str] | Sequence[str],
    *,
    in_bits: Sequence[str] = ("Shakespeare", "Gita"),
) -> list[Figure]:
    """A panel for each arm of an experiment: its paired differences from its control, a row for each task.

    What lies to the right of 0 is better. Right answers have their scale below, bits above; 2 points stand over 0.01
    bit, the effects that docs/measured/protocol.md names. The band between them is shaded, and the scale is linear in
    it and logarithmic outside. A filled mark remains with Holm's correction, an open one does not.

        panels = differences(run["figures"]["compared"], {"symmetric less base": "symmetric"})
        print(show(panels, name="table", alt=..., caption=...))

    Args:
        found: for each comparison and task a row of `mean`, `interval`, `is` and `remains with Holm`, as
            benchmarks/proposals.py writes them in "compared".
        arms: the comparisons to draw, with the title of each panel; its own name where they are a sequence.
        in_bits: the tasks whose differences are bits; those of all others are shares of right answers.

    Returns:
        The panels, 3 inches wide, in the order of `arms`, all with the same scale.

    Raises:
        ValueError: no comparison is asked for, or one that was not made, or whose rows are empty.
    """
    _matplotlib()
    from matplotlib import pyplot

    titles = dict(arms) if isinstance(arms, Mapping) else {arm: arm for arm in arms}
    if not titles:
        raise ValueError("arms must name at least one comparison, got none.")
    if missing := [arm for arm in titles if not found.get(arm)]:
        raise ValueError(f"arms must be among {', '.join(found) or 'none'}, got {', '.join(missing)}.")
    rows = {  # in the effects that were named: 1 is 2 points, or 0.01 bit
        arm: [
            (task, row, [x / (0.01 if task in in_bits else 0.02) for x in (row["mean"], *row["interval"])])
            for task, row in found[arm].items()
        ]
        for arm in titles
    }
    widest = max(abs(x) for of_arm in rows.values() for _, _, found_here in of_arm for x in found_here)
    reach = max(1.6 * widest, 3.0)
    far = 10 if reach > 10 else 5 if reach > 5 else 1
    ticks = sorted({-far, -1, 0, 1, far})
    return [_differences(pyplot, titles[arm], rows[arm], in_bits, reach, ticks) for arm in titles]


_WORDS = {"better": (2, ">"), "worse": (3, "<"), "equivalent": (0, "o"), "not decided": (6, "D")}
"""For each word of the protocol a colour of OKABE_ITO and a mark."""


def _differences(
    pyplot: Any,
    title: str,
    rows: Sequence[tuple[str, Mapping[str, Any], list[float]]],
    in_bits: Sequence[str],
    reach: float,
    ticks: Sequence[float],
) -> Figure:
    """One panel of `differences`."""
    fig, ax = pyplot.subplots(figsize=(3.0, 1.1 + 0.2 * len(rows)))
    ax.axvspan(-1, 1, color=OKABE_ITO[6], alpha=0.25, linewidth=0)
    ax.axvline(0, linewidth=0.8, color="black")
    for at, (_, row, (middle, low, high)) in enumerate(rows):
        number, mark = _WORDS[row["is"].removesuffix(" as named")]
        colour = OKABE_ITO[number]
        ax.plot([low, high], [at, at], color=colour, linewidth=1.8)
        face = colour if row["remains with Holm"] else "none"
        ax.plot(middle, at, mark, color=colour, markerfacecolor=face, markersize=5.5)
    ax.set_yticks(range(len(rows)), [task for task, _, _ in rows])
    ax.set(ylim=(len(rows) - 0.4, -0.6), title=title)
    ax.set_xscale("symlog", linthresh=1.0, linscale=0.8)
    ax.set(xlim=(-reach, reach))
    ax.set_xticks(ticks, _signed(2 * tick for tick in ticks), fontsize=8.5)
    ax.set_xlabel("points of right answers", fontsize=9)
    ax.minorticks_off()
    ax.tick_params(axis="y", length=0)
    if texts := [task for task, _, _ in rows if task in in_bits]:
        above = ax.twiny()
        above.set_xscale("symlog", linthresh=1.0, linscale=0.8)
        above.set(xlim=(-reach, reach))
        above.set_xticks(ticks, _signed(tick / 100 for tick in ticks), fontsize=8.5)
        above.minorticks_off()
        above.spines["top"].set_visible(True)
        above.set_xlabel(f"bits fewer ({', '.join(texts)})", fontsize=9)
    return fig


def _signed(numbers: Iterable[float]) -> list[str]:
    """Each with its sign, as a tick's label."""
    return [f"{each:+g}".replace("-", "\N{MINUS SIGN}") if each else "0" for each in numbers]


def show(
    fig: Figure | Sequence[Figure],
    *,
    name: str,
    alt: str,
    caption: str,
    wide: bool = False,
    phone: Figure | None = None,
) -> str:
    """`fig` as an HTML figure; closes it. Print it: a fence with `exec="on" html="on"` puts what it prints on the page.

    A phone shows 3.7 inches at their own size; what is wider scrolls sideways there. So give the panels as several
    figures, which stand side by side where there is room and below each other where there is none, or give the whole
    once more, drawn narrow.

    Args:
        fig: The figure, or its panels, drawn after `style()`.
        name: Its id on the page, and the seed of the ids inside it: letters, digits and hyphens.
        alt: The finding in a sentence, for a reader who cannot see it.
        caption: The finding, for all; may hold HTML.
        wide: Whether it may use the page's margin.
        phone: The same, drawn at most 3.7 inches wide; shown in its place on a phone.

    Returns:
        A `<figure>` with inline SVG and a caption, the same text at every build.

    Raises:
        ValueError: If `name` is not an id, if `alt` or `caption` is empty, or if there are no panels.
    """
    _check_words(name, alt, caption)
    return _figure(_plate(fig, name, alt, phone), name, caption, wide)


def live(
    fig: Figure | Sequence[Figure],
    *,
    script: str,
    data: Mapping[str, Any],
    name: str,
    alt: str,
    caption: str,
    wide: bool = False,
    phone: Figure | None = None,
) -> str:
    """`show`, and beside the drawing the numbers from which a script of the page makes an interactive figure.

    Where scripts run, what `docs/assets/js/live/<script>.js` makes of `data` takes the drawing's place.

    Args:
        fig: What is shown without a script; as in `show`, like the rest.
        script: The name of its script: lower-case letters.
        data: What the script gets: numbers (finite), strings, lists and dicts of them. Round what needs few digits.
        name: As in `show`.
        alt: The finding in a sentence.
        caption: The finding, for all; may hold HTML.
        wide: Whether it may use the page's margin.
        phone: The drawing for a phone.

    Returns:
        A `<figure>` as from `show`, with the data as JSON inside.

    Raises:
        ValueError: As in `show`; if `script` is not such a name, or if `data` holds infinity or NaN.
    """
    _check_words(name, alt, caption)
    if not re.fullmatch("[a-z]+", script):
        raise ValueError(f"script must be lower-case letters, got {script!r}.")
    numbers = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    inside = f'{_plate(fig, name, alt, phone)}<script type="application/json" class="data">{numbers}</script>'
    return _figure(inside, name, caption, wide, attributes=f' data-live="{script}"')


def steps(frames: Sequence[tuple[str, Figure]], *, name: str, alt: str, caption: str, wide: bool = False) -> str:
    """Figures of which one shows at a time, each under a button of its own: a thing to step through, without a script.

    Args:
        frames: For each step a word for its button and the figure, drawn after `style()`; 12 at most. All are closed.
        name: As in `show`.
        alt: The finding in a sentence.
        caption: The finding, for all; may hold HTML.
        wide: Whether it may use the page's margin.

    Returns:
        A `<figure>` with one radio button and one inline SVG a step; the first shows.

    Raises:
        ValueError: If there are no frames or more than 12, or as in `show`.
    """
    if not 1 <= len(frames) <= 12:
        raise ValueError(f"frames must be 1 to 12, got {len(frames)}.")
    _check_words(name, alt, caption)
    buttons, plates = [], []
    for number, (word, fig) in enumerate(frames, 1):
        checked = " checked" if number == 1 else ""
        buttons.append(
            f'<input type="radio" name="{name}" id="{name}-{number}"{checked}>'
            f'<label for="{name}-{number}">{escape(word)}</label>'
        )
        plates.append(f'<div class="plate">{_svg(fig, f"{name}-{number}", f"{alt} {word}")}</div>')
    inside = f'<fieldset><legend>Step</legend>{"".join(buttons)}<div class="plates">{"".join(plates)}</div></fieldset>'
    return _figure(inside, name, caption, wide, kind="drawn steps")


def _figure(inside: str, name: str, caption: str, wide: bool, *, kind: str = "drawn", attributes: str = "") -> str:
    """What a figure holds, with its caption below."""
    kind += " wide" if wide else ""
    return f'<figure class="{kind}" id="{name}"{attributes}>{inside}<figcaption>{caption}</figcaption></figure>'


def _check_words(name: str, alt: str, caption: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ValueError(f"name must be lower-case letters, digits and hyphens, got {name!r}.")
    if not alt.strip() or not caption.strip():
        raise ValueError("a figure needs its finding in words: give alt and caption.")


def _plate(fig: Figure | Sequence[Figure], name: str, alt: str, phone: Figure | None) -> str:
    """The drawing in its frame; panels together carry one description."""
    if phone is not None:
        whole, narrow = _plate(fig, name, alt, None), _svg(phone, f"{name}-phone", alt)
        return f'<div class="plates"><div class="roomy">{whole}</div><div class="plate narrow">{narrow}</div></div>'
    if not isinstance(fig, Sequence):
        return f'<div class="plate">{_svg(fig, name, alt)}</div>'
    if not fig:
        raise ValueError("fig must be a figure or at least one panel, got an empty list.")
    panels = "".join(
        _svg(panel, f"{name}-{number}", "").replace('role="img" aria-label=""', 'aria-hidden="true"', 1)
        for number, panel in enumerate(fig, 1)
    )
    return f'<div class="plate panels" role="img" aria-label="{escape(alt)}">{panels}</div>'


def _svg(fig: Figure, name: str, alt: str) -> str:
    """The figure as inline SVG; closes it."""
    matplotlib = _matplotlib()
    from matplotlib import pyplot

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(fig)
    return _inline(buffer.getvalue(), name, alt)


def _inline(svg: str, name: str, alt: str) -> str:
    """An SVG file as an element of a page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # This style sheet would have a browser style the whole page anew; what it says stands in the opening tag below.
    svg = re.sub(r"<style[^>]*>\*\{stroke-linejoin: round; stroke-linecap: butt\}</style>", "", svg)
    # matplotlib takes the id of a clip path from a memory address: ids are numbered in the order of their first use.
    used = dict.fromkeys(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    ids = {old: f"{name}-id{number}" for number, old in enumerate(used, 1)}
    svg = re.sub(r' id="([^"]+)"', lambda given: f' id="{ids[given[1]]}"' if given[1] in ids else "", svg)
    svg = re.sub(r'(url\(#|href="#)([^")]+)', lambda given: given[1] + ids[given[2]], svg)
    svg = re.sub(r"#010101|#000000", "currentColor", svg)
    ((width, height), *_) = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    width, height = float(width), float(height)
    opening = (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="--natural:{width * 4 / 3:.0f}px" fill="currentColor" '
        'stroke-linejoin="round" '
        f'role="img" aria-label="{escape(alt)}" data-search-exclude xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    svg = re.sub(r"<svg\b[^>]*>", opening, svg, count=1)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d{3,}", lambda x: f"{float(x[0]):.2f}", tag[0]), svg)
    return " ".join(line.strip() for line in svg.splitlines() if line.strip())
