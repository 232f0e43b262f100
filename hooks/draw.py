"""Draw the figures of the pages before a build, on all cores, and keep them; the build then takes them from the store.

python hooks/draw.py               every page
python hooks/draw.py docs/x.md     some pages
python hooks/draw.py --anew        as if nothing were kept
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # what the pages run is small: more threads only wait for each other
os.environ["MPLBACKEND"] = "Agg"

from drawing.pages import draw_pages

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> int:
    pages = [Path(argument).resolve() for argument in arguments if argument != "--anew"]
    try:
        draw_pages(ROOT, anew="--anew" in arguments, pages=pages or None)
    except ValueError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
