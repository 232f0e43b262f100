"""One list of terms, docs/glossary.yml, read twice: as tooltips on every page and as the glossary itself.

A word of a tradition is marked where a section first uses it; a word of machine learning, which is everywhere, where
the page first uses it. Neither is marked in a heading or in a link, nor where a page says that a word has another
meaning there: <span class="plain">gates</span>, of a town.
"""

import re
import unicodedata
from functools import cache
from html import escape
from pathlib import Path

import yaml

PLACE = re.compile(r"<!-- glossary: (?P<which>[\w ]+) -->")  # the field, or "traditions" for the terms without one
_SECTION = re.compile(r"(?=<h2\b)")
_UNMARKED = re.compile(
    r"<h[1-6]\b.*?</h[1-6]>|<summary>.*?</summary>|<a\b.*?</a>" + r'|<span class="plain">.*?</span>', re.S
)
_ABBR = re.compile(r"<abbr\b[^>]*>(.*?)</abbr>", re.S)


def terms(docs: Path) -> list[dict]:
    """The terms in the order of docs/glossary.yml."""
    return _parsed((docs / "glossary.yml").read_text(encoding="utf-8"))


@cache
def _parsed(text: str) -> list[dict]:
    """Every page asks for the terms, and the file takes half a second to be read."""
    return yaml.safe_load(text)


def with_terms(markdown: str, terms: list[dict]) -> str:
    """The glossary page gets the lists; every other page gets the tooltips."""
    if PLACE.search(markdown):
        return PLACE.sub(lambda m: as_list([e for e in terms if e.get("field", "traditions") == m["which"]]), markdown)
    return markdown + "\n\n" + as_tooltips(terms) + "\n"


def marks(entry: dict) -> list[str]:
    """The forms of a term that get its tooltip, also at the beginning of a sentence."""
    forms = entry.get("marks", [entry["term"]])
    return list(dict.fromkeys(form for mark in forms for form in (mark, mark[0].upper() + mark[1:])))


def as_tooltips(terms: list[dict]) -> str:
    """Abbreviation definitions, each a block of its own: Python-Markdown tests a block anew after every one in it."""
    return "\n\n".join(f"*[{form}]: {curled(entry['gloss'])}" for entry in terms for form in marks(entry))


def as_list(terms: list[dict]) -> str:
    """A section for each term, in alphabetical order, with its script, its meaning and its place in the texts."""
    out = ['<div class="glossary" markdown>', ""]
    for entry in sorted(terms, key=lambda entry: folded(entry["term"])):
        term = entry["term"]
        script = f' <span class="native" lang="{entry["lang"]}">{entry["script"]}</span>' if "script" in entry else ""
        out += [f'### {term}{script} {{ #{anchor(term)} data-toc-label="{term}" }}', "", entry["meaning"]]
        out += ["", f'<p class="locus">{escape(entry["locus"], quote=False)}</p>'] if "locus" in entry else []
        out += [""]
    return "\n".join([*out, "</div>"])


def curled(text: str) -> str:
    """Typographic quotation marks, as the pages have them."""
    return re.sub(r"'(?=\w)(?<!\w')", "‘", text).replace("'", "’")


def folded(text: str) -> str:
    """Lower case, without marks."""
    return "".join(c for c in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(c))


def anchor(term: str) -> str:
    """The term's address on the glossary page: `pratyabhijna`, `rang-grol`."""
    return re.sub(r"\W+", "-", folded(term))


def thinned(html: str, terms: list[dict]) -> str:
    """Keep a term's mark where a section, or for a word of machine learning the page, first uses it."""
    entries = {mark.lower(): entry for entry in terms for mark in marks(entry)}
    on_page: set[str] = set()
    in_section: set[str] = set()

    def once(match: re.Match) -> str:
        entry = entries.get(match[1].lower(), {"term": match[1]})
        seen = on_page if "field" in entry else in_section
        if entry["term"] in seen:
            return match[1]
        seen.add(entry["term"])
        return match[0]

    out = []
    for section in _SECTION.split(html):
        in_section.clear()
        section = _UNMARKED.sub(lambda match: _ABBR.sub(r"\1", match[0]), section)
        out.append(_ABBR.sub(once, section))
    return "".join(out)
