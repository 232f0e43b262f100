"""A page's Content-Security-Policy: a browser lets it load and run what this site serves, and nothing else.

The theme writes a few small scripts into each page, and a figure a style sheet of its own; the policy names them by
their hashes. A `style` attribute has no hash, and KaTeX places every part of a formula by one, so `style` attributes
are allowed. They can load images and fonts from this site alone.
"""

import base64
import hashlib
import re

_SCRIPT = re.compile(r"<script\b([^>]*)>(.*?)</script>", re.S)
_STYLE = re.compile(r"<style\b[^>]*>(.*?)</style>", re.S)
_TYPE = re.compile(r"""\btype=["']?([\w/+-]+)""")
_CODE = ("", "module", "text/javascript", "application/javascript")  # other types are data
_TAG = re.compile(r"""<[a-z](?:[^>"']|"[^"]*"|'[^']*')*>""", re.I)
_HANDLER = re.compile(r"""\son\w+\s*=|=\s*["']?javascript:""", re.I)
_QUOTED = re.compile(r"""(=\s*["'](?:javascript:)?)[^"']*""", re.I)
_COMMENT = re.compile(r"<!--.*?-->", re.S)
_CHARSET = re.compile(r"<meta charset=[^>]*>")


def with_policy(page: str) -> str:
    """The page with its policy in its head.

    Args:
        page: the whole page. What is done to its scripts or style sheets after this makes them fail.

    Raises:
        ValueError: If the page has a script in an attribute, such as `onclick`, which no hash can name, or no
            `<meta charset>`, after which the policy goes.
    """
    body = _COMMENT.sub("", page)
    for tag in _TAG.findall(_SCRIPT.sub("", body)):
        if _HANDLER.search(_QUOTED.sub(r"\1", tag)):
            raise ValueError(f"a script in an attribute, which the site's policy forbids: {tag[:80]}")
    scripts = [text for given, text in _SCRIPT.findall(body) if _is_code(given)]
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy(scripts, _STYLE.findall(body))}">'
    page, count = _CHARSET.subn(lambda found: found[0] + meta, page, count=1)
    if not count:
        raise ValueError("the page has no <meta charset>")
    return page


def policy(scripts: list[str], styles: list[str]) -> str:
    """The policy of a page that has these scripts and style sheets in its own text."""
    allowed = {
        "default-src": ["'none'"],
        "script-src": ["'self'", *_hashes(scripts)],
        "style-src": ["'self'", *_hashes(styles)],
        "style-src-attr": ["'unsafe-inline'"],
        "img-src": ["'self'", "data:"],  # the icons of the style sheets are data
        "font-src": ["'self'"],
        "connect-src": ["'self'"],  # the search index, and the weights of a model that runs in the page
        "worker-src": ["'self'"],  # the search
        "manifest-src": ["'self'"],
        "base-uri": ["'none'"],
        "form-action": ["'self'"],
    }
    return "; ".join(" ".join([name, *sources]) for name, sources in allowed.items())


def _is_code(attributes: str) -> bool:
    """Whether a script without an address is run, and not data for another."""
    kind = _TYPE.search(attributes)
    return "src=" not in attributes and (kind[1].lower() if kind else "") in _CODE


def _hashes(texts: list[str]) -> list[str]:
    """Each text once, as a policy names it."""
    return [f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in dict.fromkeys(texts)]
