"""Draw an SVG as pixels, the same on every machine: resvg draws it, without the fonts of the machine.

`pip install 'nondual[pictures]'` brings resvg (as resvg-py) and Pillow. What was drawn is kept in the cache folder by
`kept`, so that thousands of drawings are made once.
"""

import contextlib
import io
import math
import os
import secrets
import zipfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from nondual.store import cache_folder

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

DPI = 96  # pixels an inch, for drawings whose size is given in millimetres
SMALL = 128  # pixels of a page that is drawn to see where on it the drawing is
LARGE = 4096  # pixels of the largest page that is drawn


def drawn(svg: str, size: int) -> "Tensor":
    """A drawing on white, as large as a square of `size` pixels holds, and in its middle: (3, size, size) uint8, RGB.

    Text in it is not drawn, since fonts differ between machines.

    Raises:
        ImportError: resvg-py or Pillow is not installed.
        ValueError: it is no SVG that can be drawn.
    """
    import torch

    return (
        torch.frombuffer(bytearray(rgb(svg, size)), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1).contiguous()
    )


def rgb(svg: str, size: int, *, crop: bool = False) -> bytes:
    """What `drawn` returns, as bytes: size rows of size pixels of 3 bytes each.

    Args:
        svg: the drawing.
        size: height and width of the picture, in pixels.
        crop: leave out the empty margin, as of a small drawing on a large page. The page is drawn twice for this:
            small, to see where the drawing is, then so large that the drawing has twice the size, and is scaled down.

    Raises:
        ImportError: resvg-py or Pillow is not installed.
        ValueError: it is no SVG that can be drawn, or it is empty, and was to be cropped.
    """
    try:
        from PIL import Image
        from resvg_py import svg_to_bytes
    except ImportError as missing:
        raise ImportError(f"{missing.name} is needed to draw: pip install 'nondual[pictures]'") from None

    def picture(width: int | None, height: int | None) -> "Image.Image":
        png = svg_to_bytes(svg_string=svg, skip_system_fonts=True, dpi=DPI, width=width, height=height)
        return Image.open(io.BytesIO(png)).convert("RGBA")

    def page(side: int) -> "Image.Image":
        found = picture(side, None)
        return found if found.height <= side else picture(None, side)

    def cropped(side: int) -> "Image.Image":
        found = page(side)
        box = found.getchannel("A").getbbox()
        if box is None:
            raise ValueError("nothing is drawn")
        return found.crop(box)

    if crop:
        found = cropped(SMALL)
        found = cropped(min(LARGE, math.ceil(SMALL * 2 * size / max(found.size))))
    else:
        found = page(size)
    white = Image.new("RGBA", found.size, "white")
    found = Image.alpha_composite(white, found).convert("RGB")
    if crop:
        scale = size / max(found.size)
        width, height = (max(1, round(side * scale)) for side in found.size)
        found = found.resize((width, height), Image.Resampling.LANCZOS)
    ground = Image.new("RGB", (size, size), "white")
    ground.paste(found, ((size - found.width) // 2, (size - found.height) // 2))
    return ground.tobytes()


def renderer() -> str:
    """The version of what draws, for the names of the files in which drawings are kept.

    Raises:
        ImportError: resvg-py is not installed.
    """
    try:
        import resvg_py
    except ImportError:
        raise ImportError("resvg_py is needed to draw: pip install 'nondual[pictures]'") from None
    return resvg_py.__resvg_version__


def kept(name: str, make: "Callable[[], Mapping[str, np.ndarray]]") -> "dict[str, np.ndarray]":
    """Arrays that were made once and are kept in the cache folder; what is damaged there is made again.

    Two processes may make the same file at once: each writes one of its own, and the later takes the place of the
    earlier in one step.

    Args:
        name: of the file, without ".npz". All that the arrays depend on has to be in it, as a hash.
        make: makes them.
    """
    import numpy as np

    file = cache_folder() / "drawn" / f"{name}.npz"
    with contextlib.suppress(OSError, ValueError, zipfile.BadZipFile, EOFError), np.load(file) as found:
        return {key: found[key] for key in found.files}
    arrays = dict(make())
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with open(fresh, "wb") as opened:
            np.savez_compressed(opened, **arrays)  # type: ignore[arg-type]
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)
    return arrays
