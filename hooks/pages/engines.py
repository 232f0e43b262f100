"""The tables of engines in the reference: made of the lines by which the library itself chooses.

A page has `<!-- engines nondual.ops.flash_attention -->` where the table of that operation goes.
"""

import importlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from templates import render, text

from pages.glossary import curled

if TYPE_CHECKING:
    from nondual.ops.impl import Engine

PLACE = re.compile(r"<!-- engines (?P<module>[\w.]+) -->")


def with_tables(markdown: str) -> str:
    """Put each table in its place."""
    return PLACE.sub(lambda m: table(importlib.import_module(m["module"]).ENGINES), markdown)


def table(engines: "Mapping[str, Engine]") -> str:
    """A row for each engine: what it is, what it takes, and when "auto" takes it."""
    return render("engines.html", engines=engines, say=lambda words: text(curled(words)))
