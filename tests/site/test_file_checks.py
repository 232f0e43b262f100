"""The checks of the site's files fail when they should."""

import pytest
from documents import broken, foreign, read_site

NOWHERE = "http://nowhere.invalid/x.js"


@pytest.mark.parametrize(
    "body, check, fault",
    [
        (f'<script src="{NOWHERE}"></script>', foreign, NOWHERE),
        ('<img src="//nowhere.invalid/x.png">', foreign, "nowhere.invalid"),
        ('<p style="background: url(https://nowhere.invalid/x.png)">', foreign, "nowhere.invalid"),
        ("<style>@import 'https://nowhere.invalid/x.css';</style>", foreign, "nowhere.invalid"),
        ('<a href="gone.html">', broken, "gone.html"),
        ('<a href="#gone">', broken, "#gone"),
        ('<img src="gone.png">', broken, "gone.png"),
    ],
)
def test_a_faulty_file_is_caught(small, body, check, fault):
    folder = small(body)
    assert [found for found in check(read_site(folder), folder) if fault in found]


def test_a_faulty_style_sheet_is_caught(small):
    folder = small("", a_css="a { background: url(gone.woff2) } b { background: url(https://nowhere.invalid/x) }")
    pages = read_site(folder)
    assert foreign(pages, folder) and broken(pages, folder)


def test_a_sound_file_passes(small):
    folder = small(
        '<a href="#top">top</a> <a href="https://example.org">a plain link out is the reader\'s own step</a>'
    )
    pages = read_site(folder)
    assert not foreign(pages, folder) and not broken(pages, folder)
