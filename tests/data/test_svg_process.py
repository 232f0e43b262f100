"""Drawings in a process of their own: right, bad and too slow ones, one after another."""

import pytest

from nondual.data.svg import rgb
from nondual.data.svg_process import Painter

SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="4" height="8" fill="red"/></svg>'
BLUR = "".join(f'<feGaussianBlur stdDeviation="{900 + i}"/>' for i in range(400))
SLOW = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="3000" height="3000">'
    f'<filter id="f" x="0" y="0" width="1" height="1">{BLUR}</filter>'
    '<rect width="3000" height="3000" filter="url(#f)"/></svg>'
)


def test_good_bad_and_slow_drawings_one_after_another():
    with Painter(16, seconds=1.0) as painter:
        assert painter.draw(SQUARE) == rgb(SQUARE, 16, crop=True)
        with pytest.raises(ValueError, match="nothing is drawn"):
            painter.draw('<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>')
        with pytest.raises(ValueError):
            painter.draw("no svg")
        first = painter._process
        assert painter.draw(SQUARE) == rgb(SQUARE, 16, crop=True)
        assert painter._process is first  # a bad drawing does not end the process
        painter.size = 512  # of the next process, which draws the filter at 2,048 pixels
        painter.close()
        with pytest.raises(TimeoutError, match=r"the drawing took longer than 1\.0 seconds"):
            painter.draw(SLOW)
        painter.size = 16
        assert painter.draw(SQUARE) == rgb(SQUARE, 16, crop=True)
        last = painter._process
    assert last is not None and last.poll() is not None


def test_a_process_that_is_gone_is_one_bad_drawing():
    with Painter(16) as painter:
        painter.draw(SQUARE)
        painter._process.kill()
        painter._process.wait(10)
        with pytest.raises(ValueError, match="the drawing ended the process that drew it"):
            painter.draw(SQUARE)
        assert painter.draw(SQUARE) == rgb(SQUARE, 16, crop=True)
