"""HTML of more than a line, as Jinja templates beside this file; and what they do to text."""

import re
from html import escape
from pathlib import Path

import jinja2
from markupsafe import Markup


def render(name: str, **values: object) -> str:
    """The template of this name, filled. A value that it names and is not given is an error."""
    return _TEMPLATES.get_template(name).render(**values)


def text(plain: str) -> Markup:
    """Plain text with `code` in it."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(plain, quote=False)))


def as_sentence(plain: str) -> str:
    """A line of the ledger as a sentence: with a full stop, and a capital letter unless it begins with a symbol."""
    first = plain.split(maxsplit=1)[0]
    word = first.rstrip(",:;").replace("-", "").replace("'", "")
    starts = word.isalpha() and word.islower() and (len(word) > 1 or word == "a")
    return (plain[0].upper() + plain[1:] if starts else plain) + ("" if plain.endswith((".", "?", "!")) else ".")


def breakable(path: str) -> Markup:
    """A path that may wrap after its slashes and underscores."""
    return Markup(escape(path).replace("/", "/<wbr>").replace("_", "_<wbr>"))


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
)
_TEMPLATES.filters |= {"text": text, "breakable": breakable, "as_sentence": as_sentence}
