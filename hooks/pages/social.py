"""What a link to a page looks like elsewhere: the picture that is shown beside it, with the page's title and thesis.

The pictures are drawn while the site is built, in the site's own type. The same words give the same bytes.
"""

import functools
import tempfile
from io import BytesIO
from pathlib import Path

WIDTH, HEIGHT = 1200, 630
FOLDER = "assets/cards"
PAPER, INK, SOFT, LINK = "#fbfaf7", "#1b1f24", "#4a525b", "#0b5c63"
COLOURS = 32  # flat areas and grey edges: more colours make a file larger and nothing clearer


def name(uri: str) -> str:
    """The picture of a page in the site: `essay/mamba.md` has `assets/cards/essay-mamba.png`.

    The pages of the reference have the one of home.
    """
    stem = "index" if uri.startswith("reference/") else uri.rpartition(".")[0].replace("/", "-")
    return f"{FOLDER}/{stem}.png"


@functools.cache
def card(title: str, thesis: str, site: str, fonts: Path) -> bytes:
    """A picture of 1200 by 630 points, as a PNG.

    Args:
        title: the page's title.
        thesis: one or two sentences, in plain text; what does not fit is cut after a word.
        site: the name of the site.
        fonts: the folder of the site's fonts.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle
    from PIL import Image

    families = {kind: _families(fonts, kind) for kind in ("source-serif-4", "source-sans-3")}
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor=PAPER)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.axis("off")
    renderer = canvas.get_renderer()

    def say(text: str, x: float, y: float, kind: str, size: float, colour: str, weight: int = 400):
        font = {"family": families[kind], "size": size * 0.72, "weight": weight}  # 100 dots an inch, 72 points
        return axes.text(x, y, text, color=colour, va="baseline", parse_math=False, **font)

    def lines(text: str, kind: str, size: float, weight: int = 400) -> list[str]:
        """The text in lines that fit between the margins."""
        out: list[str] = []
        for word in text.split():
            longer = f"{out[-1]} {word}" if out else word
            tried = say(longer, 0, 0, kind, size, INK, weight)
            fits = tried.get_window_extent(renderer).width <= WIDTH - 2 * 90
            tried.remove()
            out[-1:] = [longer] if fits or not out else [out[-1], word]
        return out

    for x in (117, 141):  # the site's mark: two circles and what they share
        axes.add_patch(Circle((x, 92), 26, fill=False, edgecolor=LINK, linewidth=3))
    say(site, 188, 103, "source-sans-3", 34, INK, 600)
    y = 236.0
    named = lines(title, "source-sans-3", 68, 600)[:2]
    for line in named:
        say(line, 88, y, "source-sans-3", 68, INK, 600)
        y += 78
    told = lines(thesis, "source-serif-4", 36)
    shown = told[: 5 - len(named)]
    if len(told) > len(shown):
        shown[-1] = shown[-1].rstrip(",;:.") + " …"
    for line in shown:
        say(line, 90, y + 2, "source-serif-4", 36, SOFT)
        y += 52
    axes.plot((90, 210), (HEIGHT - 62, HEIGHT - 62), color=LINK, linewidth=4, solid_capstyle="butt")
    canvas.draw()
    picture = Image.fromarray(_rgb(canvas)).quantize(COLOURS, dither=Image.Dither.NONE)
    out = BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()


def _rgb(canvas):
    """What was drawn, as rows of red, green and blue."""
    import numpy as np

    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


@functools.cache
def _families(fonts: Path, kind: str) -> list[str]:
    """Families for matplotlib, which reads no woff2 and looks for a letter in one family after another."""
    from fontTools.ttLib import TTFont
    from matplotlib.font_manager import FontEntry, fontManager

    families = []
    for script in ("latin", "latin-ext"):
        for file in sorted(fonts.glob(f"{kind}-{script}-*-normal.woff2")):
            weight = int(file.stem.split("-")[-2])
            font = TTFont(file)
            font.flavor = None
            font.save(made := Path(_unpacked().name, f"{file.stem}.ttf"))
            family = f"{kind} {script}"
            fontManager.ttflist.append(FontEntry(fname=str(made), name=family, weight=weight))
            families += [family] if family not in families else []
    return families


@functools.cache
def _unpacked() -> tempfile.TemporaryDirectory:
    """A folder for fonts that matplotlib can read, which is deleted when the build ends."""
    return tempfile.TemporaryDirectory(prefix="nondual-cards-")
