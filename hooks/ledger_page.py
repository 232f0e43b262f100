"""The two generated pages: the table of docs/ledger.md, with its count and its filters, and the table of docs/map.md.

Each is made where the page has its placeholder, from what is in docs/ledger and on disk at that moment. The filters
are docs/assets/js/ledger.js; without it the whole table shows.
"""

import json
import re
from html import escape
from pathlib import Path

from ledger import ESSAYS, OPEN, VERDICTS, Claim, counts, load, root_of

LEDGER_HERE, MAP_HERE, COUNT_HERE = "<!-- ledger -->", "<!-- map -->", "<!-- ledger count -->"
VERDICTS_HERE = re.compile(r"<!-- verdicts (?P<which>[^<>]+?) -->")
PATHS = [  # the code in the essay's 'Codebase References', without its folder ml_research/attention/
    "attention_mechanism", "self_attention", "transformer", "positional_encoding",
    "efficient_attention/flash_attention", "efficient_attention/sparse_attention",
    "efficient_attention/linear_attention", "efficient_attention/mamba", "vision_transformers/vit",
    "multimodal/clip", "multimodal/flamingo", "multimodal/llava", "language_models/gpt_family",
]  # fmt: skip
TEXT = "27-altered-state/info/meditation/non-dualism/02_kashmir_shaivism.md"  # the last row there: a text, and no code


def on_page_markdown(markdown, page, config, files):
    """Put each table in its place."""
    root, link = root_of(config), linker(page, files)
    if LEDGER_HERE in markdown:
        markdown = markdown.replace(LEDGER_HERE, ledger_html(load(root), link, root / "docs/measured"))
    if COUNT_HERE in markdown:
        markdown = markdown.replace(COUNT_HERE, sentence(load(root)))
    if MAP_HERE in markdown:
        markdown = markdown.replace(MAP_HERE, map_html(root, link))
    return VERDICTS_HERE.sub(lambda m: verdicts_html(load(root), m["which"].split(), link), markdown)


def linker(page, files):
    """A function from a page's path under docs to its address as seen from this page, or None where there is none."""
    from mkdocs.utils import get_relative_url

    def link(uri: str) -> str | None:
        path, _, anchor = uri.partition("#")
        file = files.get_file_from_path(path)
        if file is None:
            return None
        return get_relative_url(file.url, page.file.url) + (f"#{anchor}" if anchor else "")

    return link


# --- the ledger page -----------------------------------------------------------------------------------------------


def sentence(claims: list[Claim]) -> str:
    """'106 claims, 9 of them answered: 5 hold, 1 does not hold, …; 97 are not reached yet.'"""
    many = {
        "holds": ("holds", "hold"),
        "holds if": ("holds on conditions", "hold on conditions"),
        "does not hold": ("does not hold", "do not hold"),
        "contested": ("is contested", "are contested"),
        "reading": ("is a reading", "are readings"),
        "slip": ("is a slip", "are slips"),
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


def text_html(text: str) -> str:
    """Plain text with `code` in it."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def ledger_html(claims: list[Claim], link, measured: Path) -> str:
    """The count, its bar, the filters and the table. One block of HTML without an empty line, as Markdown wants it."""
    n = counts(claims)
    bar = "".join(
        f'<span class="{VERDICTS.get(name, "verdict-open")}" style="flex-grow:{count}" title="{count} {name}"></span>'
        for name, count in n.items()
        if count
    )
    essays = "".join(f'<option value="{key}">{key}. {escape(title)}</option>' for key, title in ESSAYS.items())
    verdicts = "".join(f"<option>{name}</option>" for name in VERDICTS)
    rows = []
    for key, title in ESSAYS.items():
        rows += ['<tbody role="rowgroup">', '<tr role="row" class="ledger-essay">']
        rows.append(f'<th role="columnheader" colspan="3" scope="colgroup">Essay {key}. {escape(title)}</th></tr>')
        rows += [row_html(claim, link, measured) for claim in claims if claim.essay == key]
        rows.append("</tbody>")
    return "\n".join(
        [
            '<div class="ledger">',
            f'<p class="ledger-count">{sentence(claims)}</p>',
            f'<div class="ledger-bar" role="img" aria-label="{escape(sentence(claims))}">{bar}</div>',
            '<form class="ledger-filter" hidden>',
            f'<label>Essay <select name="essay"><option value="">all five</option>{essays}</select></label>',
            '<label>Verdict <select name="verdict"><option value="">any or none</option>'
            f'<option value="answered">answered</option><option value="{OPEN}">{OPEN}</option>'
            f"{verdicts}</select></label>",
            '<output class="ledger-shown" aria-live="polite"></output>',
            "</form>",
            '<table class="ledger-table" role="table" data-search-exclude>',
            '<thead role="rowgroup"><tr role="row"><th role="columnheader" scope="col">Claim</th>'
            '<th role="columnheader" scope="col">What the essay says</th>'
            '<th role="columnheader" scope="col">What came of it</th></tr></thead>',
            *rows,
            "</table>",
            "</div>",
        ]
    )


def row_html(claim: Claim, link, measured: Path) -> str:
    verdict = claim.verdict or OPEN
    kind = VERDICTS.get(verdict, "verdict-open")
    if claim.verdict:
        told = f'<span class="ledger-finding">{text_html(claim.finding or "")}</span>'
        if claim.confounder:
            told += f'<span class="ledger-more">Not ruled out: {text_html(claim.confounder)}</span>'
        told += "".join(measured_html(measured / name) for name in claim.measured) + evidence_html(claim, link)
    else:
        told = f"<details><summary>one way to test it</summary>{text_html(claim.how)}</details>"
        if claim.guess == "reading":
            told = told.replace("one way to test it", "what to look up")
    return (
        f'<tr role="row" id="{claim.id}" data-essay="{claim.essay}" data-verdict="{verdict}">'
        f'<td role="cell" class="ledger-id"><a href="#{claim.id}">{claim.id}</a></td>'
        f'<td role="cell" class="ledger-gist">{text_html(claim.gist)}</td>'
        f'<td role="cell" class="ledger-told"><strong class="{kind}">{verdict}</strong> {told}</td></tr>'
    )


def measured_html(file: Path) -> str:
    """Where a stored measurement comes from, and the one command that takes it again."""
    run = json.loads(file.read_text(encoding="utf-8"))
    return (
        f'<span class="ledger-more">Rests on a stored measurement, <code>{broken(file.name)}</code>: '
        f"{escape(run['device'])}, commit {escape(run['commit'])}, {escape(run['date'])}. "
        f"To measure again: <code>{escape(run['command'])}</code></span>"
    )


def evidence_html(claim: Claim, link) -> str:
    out = []
    chapter = link(f"{claim.chapter}#verdict-{claim.id}")
    if chapter:
        out.append(f'<a href="{chapter}">chapter</a>')
    if claim.figure:
        out.append(f'<a href="{link(f"{claim.chapter}#{claim.figure}")}">figure</a>')
    for node in claim.test:
        file, _, name = node.partition("::")
        out.append(f"test <code>{broken(file.rpartition('/')[2])}::<wbr>{broken(name)}</code>")
    if claim.source:
        out.append(f"source: {text_html(claim.source)}")
    return f'<span class="ledger-evidence">{" · ".join(out)}</span>'


# --- the map page --------------------------------------------------------------------------------------------------


def map_rows(root: Path) -> list[dict]:
    """For each file of code that the essay names: our module, chapter and test, each None until it exists."""
    rows = []
    for path in PATHS:
        stem = path.rpartition("/")[2]
        module = root / "src" / "nondual" / f"{path}.py"
        tests = sorted((root / "tests").rglob(f"test_{stem}.py"))
        rows.append(
            {
                "essay": f"ml_research/attention/{path}.py",
                "module": f"src/nondual/{path}.py" if module.exists() else None,
                "chapter": chapter_of(root, path),
                "test": tests[0].relative_to(root).as_posix() if tests else None,
            }
        )
    return rows


def chapter_of(root: Path, path: str) -> str | None:
    """The chapter of the module's own stem, or the first whose text names the module: one chapter may hold two."""
    pages = sorted((root / "docs" / "essay").glob("*.md"))
    own = [page for page in pages if page.stem == path.rpartition("/")[2]]
    name = f"`nondual.{path.replace('/', '.')}`"
    found = own or [page for page in pages if name in page.read_text(encoding="utf-8")]
    return f"essay/{found[0].name}" if found else None


def map_html(root: Path, link) -> str:
    rows = map_rows(root)
    built = sum(all(row.values()) for row in rows)
    open_ = '<span class="verdict-open">not built yet</span>'

    def cells(row: dict) -> list[tuple[str, str]]:
        path = row["essay"].removeprefix("ml_research/attention/")
        module = f"<code>{broken(row['module'].removeprefix('src/nondual/'))}</code>" if row["module"] else open_
        if row["module"] and (page := link(f"reference/{path.removesuffix('.py')}.md")):
            module = f'<a href="{page}">{module}</a>'
        title = title_of(root / "docs" / row["chapter"]) if row["chapter"] else None
        chapter = f'<a href="{link(row["chapter"])}">{escape(title)}</a>' if title else open_
        test = f"<code>{broken(row['test'].removeprefix('tests/'))}</code>" if row["test"] else open_
        return [
            ("The essay’s file", f"<code>{broken(path)}</code>"),
            ("Module", module),
            ("Chapter", chapter),
            ("Test", test),
        ]

    readings = f'<a href="{link("ledger.md")}?verdict=reading">the readings of the ledger</a>'
    text = [
        ("The essay’s file", f"<code>{broken(TEXT)}</code>"),
        ("Module", "none: it is a text on Kashmir Shaivism, not code"),
        ("Chapter", f"<span>what the essay says of the tradition is compared with its sources in {readings}</span>"),
        ("Test", "none: a text is compared with texts"),
    ]
    heads = [name for name, _ in text]
    body = [
        '<tr role="row">' + "".join(f'<td role="cell" data-label="{name}">{cell}</td>' for name, cell in row) + "</tr>"
        for row in [*map(cells, rows), text]
    ]
    return "\n".join(
        [
            '<div class="ledger">',
            f'<p class="ledger-count">The essay names {len(body)} files: {len(rows)} of code and one text. Of the '
            f"code, {built or 'none'} {'has' if built == 1 else 'have'} a module, a chapter and a test here.</p>",
            '<table class="ledger-table ledger-map" role="table">',
            '<thead role="rowgroup"><tr role="row">'
            + "".join(f'<th role="columnheader" scope="col">{name}</th>' for name in heads)
            + "</tr></thead>",
            '<tbody role="rowgroup">',
            *body,
            "</tbody>",
            "</table>",
            "</div>",
        ]
    )


def broken(path: str) -> str:
    """A path that may wrap at its slashes."""
    return escape(path).replace("/", "/<wbr>").replace("_", "_<wbr>")


def title_of(page: Path) -> str:
    found = re.search(r"^# (.+?)\s*(?:\{.*\})?$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else page.stem
