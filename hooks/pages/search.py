"""Let plain letters find marked ones: `samskara` finds saṃskāra, `pratyabhijna` finds pratyabhijñā.

A result shows formulas without their delimiters.
"""

import json
import re
import unicodedata
from pathlib import Path

_WORD = re.compile(r"\w+")
_DELIMITER = re.compile(r"\\[()\[\]]")
_TAG = re.compile(r"<[^>]+>")


def fold(path: Path) -> None:
    """Append to each entry of the search index, a file, the plain form of every marked word that it holds."""
    index = json.loads(path.read_text(encoding="utf-8"))
    for entry in index["docs"]:
        entry["text"] = _DELIMITER.sub("", entry["text"])
        plain = folded_words(entry["title"] + " " + _TAG.sub(" ", entry["text"]))
        if plain:
            entry["text"] += f"<p>{' '.join(plain)}</p>"
    path.write_text(json.dumps(index, ensure_ascii=False, separators=(",", ":"), sort_keys=True), encoding="utf-8")


def folded_words(text: str) -> list[str]:
    """The words of `text` that carry marks, without them, each once and sorted."""
    words = {}
    for word in _WORD.findall(unicodedata.normalize("NFC", text)):
        plain = "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))
        if plain != word and plain.isascii():
            words[plain.lower()] = None
    return sorted(words)
