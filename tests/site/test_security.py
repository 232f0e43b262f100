"""A page's Content-Security-Policy: what it allows, and that each page's own scripts run under it."""

import base64
import hashlib
import re

import pytest
from pages import security

PAGE = '<html><head><meta charset="utf-8"><title>t</title></head><body>{}</body></html>'


def hash_of(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def policy_of(page):
    (content,) = re.findall('<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    return {name: sources.split() for name, _, sources in (one.partition(" ") for one in content.split("; "))}


def test_a_page_may_load_what_its_own_site_serves_and_nothing_else():
    allowed = policy_of(security.with_policy(PAGE.format("")))
    assert allowed["default-src"] == ["'none'"]
    assert {source for sources in allowed.values() for source in sources} <= {
        "'none'", "'self'", "data:", "'unsafe-inline'",
    }  # fmt: skip
    assert [name for name, sources in allowed.items() if "'unsafe-inline'" in sources] == ["style-src-attr"]
    assert [name for name, sources in allowed.items() if "data:" in sources] == ["img-src"]


def test_a_pages_own_scripts_and_style_sheets_are_allowed_by_their_hashes():
    body = "<script>one()</script><script>one()</script><script type='module'>two()</script><style>p { x: y }</style>"
    allowed = policy_of(security.with_policy(PAGE.format(body)))
    assert allowed["script-src"] == ["'self'", hash_of("one()"), hash_of("two()")]
    assert allowed["style-src"] == ["'self'", hash_of("p { x: y }")]


def test_data_and_scripts_with_an_address_need_no_hash():
    body = '<script type="application/json">{"x": 1}</script><script src="x.js"></script><!-- <script>x</script> -->'
    assert policy_of(security.with_policy(PAGE.format(body)))["script-src"] == ["'self'"]


def test_the_policy_stands_before_all_that_it_governs():
    page = security.with_policy(PAGE.format("<script>x</script>"))
    assert page.index("Content-Security-Policy") < min(page.index("<script"), page.index("<title"))
    with pytest.raises(ValueError, match="meta charset"):
        security.with_policy("<html></html>")


@pytest.mark.parametrize("tag", ['<a onclick="x()">', "<a href='javascript:x()'>", "<body class=x onload = y>"])
def test_a_script_in_an_attribute_stops_the_build(tag):
    with pytest.raises(ValueError, match="attribute"):
        security.with_policy(PAGE.format(tag))


def test_words_that_look_like_a_script_do_not():
    body = """<img alt="once = twice, javascript: x > onto = y"><p title='a onclick="x"'>onclick="x"</p>"""
    assert policy_of(security.with_policy(PAGE.format(body)))


def test_every_page_of_the_site_has_a_policy_for_the_scripts_that_it_holds(pages):
    for name, page in pages.items():
        without = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.text)
        assert without != page.text and security.with_policy(without) == page.text, name
