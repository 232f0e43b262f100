"""One list of terms, docs/glossary.yml, read twice: as tooltips on every page and as the glossary itself.

A term is marked once a section, where a reader first meets it there, and never in a heading.
"""

import re
import unicodedata
from html import escape
from pathlib import Path

import yaml

PLACE = "<!-- glossary -->"
_TERMS: list[dict] = []
_SECTION = re.compile(r"(?=<h2\b)")
_HEADING = re.compile(r"<h[1-6]\b.*?</h[1-6]>|<summary>.*?</summary>", re.S)
_ABBR = re.compile(r"<abbr\b[^>]*>(.*?)</abbr>", re.S)


def on_config(config):
    """Read the list anew, so that a served site follows it."""
    _TERMS[:] = terms(Path(config.docs_dir))
    config.watch.append(str(Path(config.docs_dir) / "glossary.yml"))
    return config


def terms(docs: Path) -> list[dict]:
    """The terms in the order of docs/glossary.yml."""
    return yaml.safe_load((docs / "glossary.yml").read_text(encoding="utf-8"))


def on_page_markdown(markdown, page, config, files):
    """The glossary page gets the list; every other page gets the tooltips."""
    if PLACE in markdown:
        return markdown.replace(PLACE, as_list(_TERMS))
    return markdown + "\n\n" + as_tooltips(_TERMS) + "\n"


def as_tooltips(terms: list[dict]) -> str:
    """Abbreviation definitions, also for a term that begins a sentence."""
    lines = []
    for entry in terms:
        for form in dict.fromkeys((entry["term"], entry["term"][0].upper() + entry["term"][1:])):
            lines.append(f"*[{form}]: {curled(entry['gloss'])}")
    return "\n".join(lines)


def as_list(terms: list[dict]) -> str:
    """A section for each term, in alphabetical order, with its script, its meaning and its place in the texts."""
    out = ['<div class="glossary" markdown>', ""]
    for entry in sorted(terms, key=lambda entry: folded(entry["term"])):
        term = entry["term"]
        script = f' <span class="native" lang="{entry["lang"]}">{entry["script"]}</span>' if "script" in entry else ""
        out += [f'## {term}{script} {{ #{anchor(term)} data-toc-label="{term}" }}', "", entry["meaning"]]
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


def on_page_content(html, page, config, files):
    """Keep a term's mark where a section first uses it."""
    return "".join(_thin(section) for section in _SECTION.split(html))


def _thin(section: str) -> str:
    section = _HEADING.sub(lambda match: _ABBR.sub(r"\1", match[0]), section)
    seen = set()

    def once(match: re.Match) -> str:
        term = match[1].lower()
        if term in seen:
            return match[1]
        seen.add(term)
        return match[0]

    return _ABBR.sub(once, section)
