"""The table of docs/ledger.md, with its count and its filters, and the verdicts that the home page lists.

Each is made where a page has its placeholder, from what is in docs/ledger at that moment. The filters are
docs/assets/js/ledger.js; without it the whole table shows.
"""

import json
import re
from pathlib import Path

from markupsafe import Markup
from pages.links import Link, line_of, source
from templates import breakable, render, text

from ledger.claims import ESSAYS, OPEN, VERDICTS, Claim, counts, load

LEDGER_HERE, COUNT_HERE = "<!-- ledger -->", "<!-- ledger count -->"
VERDICTS_HERE = re.compile(r"<!-- verdicts (?P<which>[^<>]+?) -->")


def with_tables(markdown: str, root: Path, link: Link) -> str:
    """Put each table in its place."""
    if LEDGER_HERE in markdown:
        markdown = markdown.replace(LEDGER_HERE, ledger_html(load(root), link, root / "docs/measured"))
    if COUNT_HERE in markdown:
        markdown = markdown.replace(COUNT_HERE, sentence(load(root)))
    return VERDICTS_HERE.sub(lambda m: verdicts_html(load(root), m["which"].split(), link), markdown)


def sentence(claims: list[Claim]) -> str:
    """'106 claims, 9 of them answered: 5 hold, 1 does not hold, …; 97 are not reached yet.'"""
    many = {
        "holds": ("holds", "hold"),
        "holds if": ("holds on conditions", "hold on conditions"),
        "does not hold": ("does not hold", "do not hold"),
        "contested": ("is contested", "are contested"),
        "reading": ("is a reading of a text", "are readings of texts"),
        "slip": ("is a slip of code, notation or date", "are slips of code, notation or date"),
    }
    n = counts(claims)
    answered = len(claims) - n[OPEN]
    parts = [f"{n[v]} {one if n[v] == 1 else more}" for v, (one, more) in many.items() if n[v]]
    listed = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + (parts[-1] if parts else "")
    open_ = f"{n[OPEN]} {'is' if n[OPEN] == 1 else 'are'} not reached yet"
    if not answered:
        return f"{len(claims)} claims, none of them answered yet."
    if not n[OPEN]:
        return f"{len(claims)} claims, all of them answered: {listed}."
    return f"{len(claims)} claims, {answered} of them answered: {listed}; {open_}."


def ledger_html(claims: list[Claim], link: Link, measured: Path) -> str:
    """The count, its bar, the filters and the table; `measured` is docs/measured, the folder of stored measurements."""
    root = measured.parent.parent

    def stored(claim: Claim) -> list[tuple[str, dict]]:
        """Where each stored measurement of a claim comes from."""
        return [(name, json.loads((measured / name).read_text(encoding="utf-8"))) for name in claim.measured]

    return render(
        "ledger.html",
        claims=claims,
        sentence=sentence(claims),
        counts=counts(claims),
        essays=ESSAYS,
        verdicts=VERDICTS,
        open=OPEN,
        measured=stored,
        evidence=lambda claim: evidence(claim, link, root),
    )


def evidence(claim: Claim, link: Link, root: Path) -> list[str]:
    """What a verdict rests on: the chapter, the figure, the tests with their lines in the repository, the source."""
    out = []
    if chapter := link(f"{claim.chapter}#verdict-{claim.id}"):
        out.append(Markup('<a href="{}">chapter</a>').format(chapter))
    if claim.figure:
        out.append(Markup('<a href="{}">figure</a>').format(link(f"{claim.chapter}#{claim.figure}")))
    for node in claim.test:
        file, _, name = node.partition("::")
        line = line_of(root / file, name) if (root / file).is_file() else None
        shown = Markup("<code>{}::<wbr>{}</code>").format(breakable(Path(file).name), breakable(name))
        out.append(Markup('test <a href="{}">{}</a>').format(source(file, line), shown))
    if claim.source:
        out.append(Markup("source: {}").format(text(claim.source)))
    return out


def verdicts_html(claims: list[Claim], which: list[str], link) -> str:
    """The verdicts of a chapter, or of some claims, each kind once with the claims that came to it.

    `which` holds the chapter's page or the ids of claims, then maybe "except" and ids to leave out.
    """
    at = which.index("except") if "except" in which else len(which)
    wanted, left_out = which[:at], which[at + 1 :]
    unknown = {name for name in wanted + left_out if "/" not in name} - {claim.id for claim in claims}
    if unknown:
        raise ValueError(f"a placeholder for verdicts names no claim: {', '.join(sorted(unknown))}")
    found = [c for c in claims if c.verdict and (c.id in wanted or c.chapter in wanted) and c.id not in left_out]
    parts = []
    for name, kind in VERDICTS.items():
        links = [f'<a href="{link(f"{c.chapter}#verdict-{c.id}")}">{c.id}</a>' for c in found if c.verdict == name]
        if links:
            parts.append(f'<span class="verdict-line"><strong class="{kind}">{name}</strong> {", ".join(links)}</span>')
    return " ".join(parts)
