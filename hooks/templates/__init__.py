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


def breakable(path: str) -> Markup:
    """A path that may wrap after its slashes and underscores."""
    return Markup(escape(path).replace("/", "/<wbr>").replace("_", "_<wbr>"))


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
)
_TEMPLATES.filters |= {"text": text, "breakable": breakable}
