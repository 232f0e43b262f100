"""Formulas are typeset while the site is built: a page holds what KaTeX makes of them, and needs no script for it.

KaTeX's own JavaScript, hooks/katex/katex.min.js, is run by QuickJS. Each formula becomes HTML to look at and MathML for
a screen reader. The search index is made before this step, so a search result shows the formula's source.
"""

import re
from functools import cache
from html import unescape
from pathlib import Path

import quickjs

KATEX = Path(__file__).parent.parent / "katex" / "katex.min.js"
SECONDS = 10  # for one formula; the usual one takes a thousandth of that

# What the mathematics extension writes: \( \) in a line, \[ \] on lines of its own.
_FORMULA = re.compile(r'(<(?P<tag>span|div) class="arithmatex">)(?P<source>\s*\\[(\[].*?)(?=</(?P=tag)>)', re.S)
_CODE = re.compile(r"<(pre|code|script|style|annotation)\b.*?</\1>|<!--.*?-->", re.S)
_TAG = re.compile(r"<[^>]*>")
_LEFT = re.compile(r"\\[(\[]")

# A string that was put together from pieces is copied into one: quickjs-ng hands over no other.
_TYPESET = """
function typeset(source, display) {
  return [katex.renderToString(source, {displayMode: display, throwOnError: true, strict: "error"})].join("");
}
"""


def typeset(page: str) -> str:
    """The page with every formula typeset.

    Args:
        page: its HTML.

    Raises:
        ValueError: If KaTeX cannot read a formula, or if a formula is left over where none is typeset: in the title of
            a section, which the table of contents repeats as plain text.
    """

    def replace(match: re.Match) -> str:
        source = unescape(match["source"]).strip()
        try:
            return match[1] + typeset_formula(source[2:-2].strip(), source.startswith("\\["))
        except quickjs.JSException as error:
            reason = str(error).partition("\n")[0].removeprefix("ParseError: ")
            raise ValueError(f"the formula {source} cannot be typeset. {reason}") from None

    page = _FORMULA.sub(replace, page)
    text = _TAG.sub("", _CODE.sub("", page))
    if left := _LEFT.search(text):
        raise ValueError(f"a formula is not typeset: {text[left.start() :][:60].strip()}")
    return page


@cache
def typeset_formula(source: str, display: bool) -> str:
    """One formula as HTML and MathML; `display` for one on a line of its own.

    Its TeX stands in the MathML too. A screen reader would speak that as well while the formula is not laid out, so it
    is told not to.
    """
    return _katex()(source, display).replace("<annotation ", '<annotation aria-hidden="true" ')


@cache
def _katex() -> quickjs.Function:
    """KaTeX, loaded once; the function runs it in a thread of its own, as QuickJS needs."""
    function = quickjs.Function("typeset", KATEX.read_text(encoding="utf-8") + _TYPESET)
    function.set_time_limit(SECONDS)
    return function
