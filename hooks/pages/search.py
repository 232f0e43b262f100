"""What the search finds, and what comes first: changes to the index that the search plugin wrote.

The search in the page takes every word that is typed for the beginning of a word. So it needs no stemmer, which would
make `recognitio` find nothing on the way to `recognition`; but `windows` does not find window by itself. The forms of
a word that occur anywhere on the site are therefore added, unseen, to the entries that have another form of it. The
same is done with the plain form of marked words: `samskara` finds saṃskāra.

An entry of the index is a section of a page: its `location`, its `title`, and its `text`, which is HTML.
"""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

# What parts words, for JavaScript. A dot before a digit parts nothing, so that A1.4 is one word.
SEPARATOR = (
    r"""(?:[\s\-\u00a0\u00ad\u200b,:;!?=()\[\]{}"'“”‘’/|*+<>…–—·→←↔~^#%$@\\`]|&(?:lt|gt|amp|quot|#39);|&|\.(?!\d))+"""
)
TITLE = 8.0  # a word in a title counts so many times as much as one in the text below it
CLAIM = 100.0  # and the number of a claim, at its own entry: chapters name many in one section
WEIGHTS = {  # by the beginning of the location: whoever looks for Mamba wants its chapter before its reference
    "essay/": 4.0,  # what the texts say, beside a chapter, counts half of it
    "companions/": 2.0,
    "workshop/": 2.0,
    "guides/": 2.0,
    "glossary/": 2.5,
    "ledger/": 1.0,
    "notation/": 1.0,
    "notebooks/": 0.6,
    "map/": 0.4,
    "reference/": 0.2,
    "changelog/": 0.1,
    "contributing/": 0.1,
}

ENGLISH = {"Mushin": "no-mind", "Pratyabhijñā": "recognition", "Spanda": "throb"}
"""What a chapter's first word means: whoever looks for no mind finds the chapter on mushin."""


class Row(NamedTuple):
    """A claim for the index: its id, what the essay says, its verdict and what was found."""

    id: str
    gist: str
    verdict: str
    finding: str = ""


def complete(path: Path, rows: Iterable[Row] = ()) -> None:
    """Write the finished index in place of the one in this file, with an entry for each of these claims."""
    index = finished(json.loads(path.read_text(encoding="utf-8")), rows)
    path.write_text(json.dumps(index, ensure_ascii=False, separators=(",", ":"), sort_keys=True), encoding="utf-8")


def finished(index: dict[str, Any], rows: Iterable[Row] = ()) -> dict[str, Any]:
    """The index with the claims, with weights, and with the other forms of its words.

    Args:
        index: what search/search_index.json holds: `config` and `docs`.
        rows: the claims of the ledger.
    """
    config = index["config"] | {
        "separator": SEPARATOR,
        "pipeline": [],  # no stop words: "no" is half of no-mind
        "fields": {"title": {"boost": TITLE}, "text": {"boost": 1.0}, "tags": {"boost": CLAIM}},
    }
    entries = [translated(shortened(entry)) for entry in index["docs"]] + claims(rows)
    families = kin(word for entry in entries for word in words_of(entry))
    return index | {"config": config, "docs": [with_forms(weighted(entry), families) for entry in entries]}


def shortened(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with plain formulas, and in the reference with the signature and without the source below it."""
    text = _FORMULA.sub(lambda m: read_aloud(m[1] or m[2]), entry["text"])
    if entry["location"].startswith("reference/"):
        first, *_ = [*_BLOCK.finditer(text), None]
        text = text[: first.end()] + _BLOCK.sub("", text[first.end() :]) if first else text
    return entry | {"text": text}


_SIGNS = {
    "times": "×", "neq": "≠", "ne": "≠", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "cdot": "·", "approx": "≈",
    "in": "∈", "sum": "Σ", "prod": "Π", "partial": "∂", "infty": "∞", "to": "→", "top": "T", "dots": "…", "ldots": "…",
    "pm": "±", "odot": "⊙", "sqrt": "√", "propto": "∝", "ell": "ℓ",
}  # fmt: skip
_GROUP = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
_DRESS = {"mathrm", "mathbf", "mathbb", "mathcal", "operatorname", "text", "left", "right", "bar", "hat", "tilde"}


def read_aloud(formula: str) -> str:
    """A formula in one line without markup, good enough to recognise it by: `N \\neq M` as `N ≠ M`."""
    formula = re.sub(r"\\(?:begin|end)\{\w+\*?\}|\\\\|\\[,;:! ]|(?:&amp;|&)(?!\w+;)", " ", formula)
    formula = re.sub(rf"\\[dt]?frac{_GROUP}{_GROUP}", r"\1/\2", formula)

    def sign(m: re.Match) -> str:
        kind = "CAPITAL" if m[1][0].isupper() else "SMALL"
        try:
            return unicodedata.lookup(f"GREEK {kind} LETTER {m[1].upper().replace('LAMBDA', 'LAMDA')}")
        except KeyError:
            return _SIGNS.get(m[1], "" if m[1] in _DRESS else m[1])

    line = re.sub(r"\\([A-Za-z]+)", sign, formula)
    line = re.sub(r"([\^_])\{([^{}]*[-+ ][^{}]*)\}", r"\1(\2)", line)  # e^{a - b} as e^(a - b)
    return " ".join(re.sub(r"[{}\\]", "", line).split())


def translated(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with the English of its title's first word, hidden, where it is a chapter's."""
    english = ENGLISH.get(entry["title"].partition(":")[0])
    return entry | {"title": entry["title"] + hidden([english])} if english else entry


def weighted(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with the weight of its part of the site; a page or section that is told nothing counts as 1."""
    for part, weight in WEIGHTS.items():
        if entry["location"].startswith(part):
            return entry | {"boost": weight / 2 if "_texts/" in entry["location"] else weight}
    return entry


def claims(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """An entry for each claim, which leads to its own row in the ledger."""
    rows = list(rows)
    entries = []
    for row in rows:
        longer = any(other.id != row.id and other.id.startswith(row.id) for other in rows)
        title = row.id + (hidden([row.id]) if longer else "")  # said twice, so that E1 comes before E10
        found = f"{row.verdict}{'' if row.verdict == 'holds if' else ':'} {row.finding}" if row.finding else row.verdict
        told = "".join(f"<p>{escape(text[0].upper() + text[1:], quote=False)}</p>" for text in (row.gist, found))
        told = told.replace("`", "")
        entries.append({"location": f"ledger/#{row.id}", "title": title, "text": told, "tags": [row.id]})
    return entries


# --- the forms of a word -------------------------------------------------------------------------------------------

_WORD = re.compile(r"\w+")
_PLAIN = re.compile(r"[a-z]{3,}")
_FORMULA = re.compile(r"\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
_BLOCK = re.compile(r"<pre>.*?</pre>", re.S)
_TAG = re.compile(r"<[^>]+>")
_PIECE = re.compile(r"(?<=>)[^<]+|^[^<]+")


def words_of(entry: dict[str, Any]) -> list[str]:
    """The words of an entry in lower case, marks and all."""
    told = f"{entry['title']} {entry['text']}"
    return _WORD.findall(unicodedata.normalize("NFC", _TAG.sub(" ", told)).lower())


def kin(words: Iterable[str]) -> dict[str, list[str]]:
    """For each of these words that has other forms among them: all forms, itself included, sorted."""
    known = {word for word in words if _PLAIN.fullmatch(word)}
    families = defaultdict(set)
    for word in known:
        families[stem(word, known)].add(word)
    return {word: sorted(family) for family in families.values() if len(family) > 1 for word in family}


def stem(word: str, known: set[str]) -> str:
    """The word without the endings -s, -es, -ies, -ed and -ing, where what is left is one of the known words."""
    for ending, others in (("ies", ("y",)), ("es", ("e", "")), ("s", ("",)), ("ing", ("", "e")), ("ed", ("", "e"))):
        if word.endswith(ending) and not word.endswith(("ss", "us", "is")) and len(word) > len(ending) + 2:
            rest = word.removesuffix(ending)
            doubled = (rest[:-1],) if rest[-1] == rest[-2] else ()  # running, run
            for shorter in (*(rest + other for other in others), *doubled):
                if shorter in known:
                    return stem(shorter, known)
    return word


def folded(word: str) -> str:
    """The word without its marks."""
    return "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))


def with_forms(entry: dict[str, Any], families: dict[str, list[str]]) -> dict[str, Any]:
    """The entry with other forms of its words beside them, hidden: each once, and none that it begins with anyway."""
    given = set(words_of(entry))

    def more(match: re.Match) -> str:
        forms = []
        for word in _WORD.findall(unicodedata.normalize("NFC", match[0]).lower()):
            plain = folded(word)
            forms += [plain] if plain != word and plain.isascii() else families.get(word, [])
        new = []
        for form in sorted(set(forms), key=lambda form: (-len(form), form)):  # running also stands for run
            if not any(word.startswith(form) for word in given):
                new.append(form)
                given.add(form)
        return match[0] + (hidden(sorted(new)) if new else "")

    return entry | {name: _PIECE.sub(more, entry[name]) for name in ("title", "text")}


def hidden(words: list[str]) -> str:
    """Words that are searched and not shown."""
    return f"<i hidden>{' '.join(words)}</i>"
