"""What a page says that Markdown cannot: the word on a box, the fold under a figure, the search dialog's name; where a
module's name may break over two lines, and a comma that stays with its formula. And over each block of code, whether it
runs alone or is an excerpt from the library, and from which lines."""

import re
from pathlib import Path

from pages.links import source

KINDS = ("claim", "measured", "verdict", "limit", "exercise", "source")

_BOX = re.compile(
    r'(<(?:div class="admonition |details class=")(?:[^"]* )?(?P<kind>' + "|".join(KINDS) + r')(?=[" ])[^>]*>\s*'
    r'<(?P<tag>p class="admonition-title"|summary)>)(?P<title>.*?)(?=</(?:p|summary)>)',
    re.S,
)  # fmt: skip
_DRAWN = re.compile(r'(</figure>)\s*(?:<p></p>\s*)?(<div class="language-python highlight">.*?</pre></div>)', re.S)

_SNIPPET = re.compile(r"^(?P<indent> *)```python[ ]*$", re.M)
_EXCERPT = re.compile(
    r'^(?P<indent> *)```py[ ]*\n(?P<include> *--8<-- "(?P<file>[^":]+)(?::(?P<section>\w+))?"[ ]*)$', re.M
)
_FROM = re.compile(r'<span class="filename">From (?P<file>src/[\w/.]+), lines (?P<first>\d+)–(?P<last>\d+)</span>')


def label_code(markdown: str, root: Path) -> str:
    """Head ```python fences with "Complete: copy and run" and ```py fences with file and lines that they show."""

    def excerpt(m: re.Match) -> str:
        first, last = lines_of(root / m["file"], m["section"])
        title = f"From {m['file']}, lines {first}–{last}"
        return f'{m["indent"]}``` {{ .python .excerpt .no-copy title="{title}" }}\n{m["include"]}'

    markdown = _EXCERPT.sub(excerpt, markdown)
    return _SNIPPET.sub(r'\g<indent>``` { .python .alone title="Complete: copy and run" }', markdown)


def lines_of(file: Path, section: str | None) -> tuple[int, int]:
    """The first and last line of a file's named section, its two markers not counted, or of the whole file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    if section is None:
        return 1, len(lines)
    start, end = (
        next(i for i, line in enumerate(lines, 1) if f"--8<-- [{mark}:{section}]" in line) for mark in ("start", "end")
    )
    return start + 1, end - 1


def finish(html: str, *, cells: bool = False) -> str:
    """Give the page its boxes and folds, break long names at their dots, keep punctuation with short formulas.

    Args:
        html: the page's content.
        cells: whether its blocks of code are a notebook's cells or a reference's examples, which are not folded.
    """
    html = fold_drawings(name_boxes(html))
    if not cells:
        html = fold_makings(html)
    return unmark_plain(link_excerpts(hold_punctuation(break_titles(html))))


_PLAIN = re.compile(r'<span class="(?:n|p|o|w)">([^<]*)</span>')


def unmark_plain(html: str) -> str:
    """Take the marks off names, punctuation, operators and spaces in code: they are set in the colour of all text.

    They are a third of a chapter's elements, and a phone takes its time for each.
    """
    return _PLAIN.sub(r"\1", html)


def link_excerpts(html: str) -> str:
    """Lead from an excerpt's heading to those lines in the repository."""

    def link(m: re.Match) -> str:
        name = m["file"].replace("/", "/<wbr>").replace("_", "_<wbr>")
        address = source(m["file"], int(m["first"]), int(m["last"]))
        lines = f"lines {m['first']}–{m['last']}"
        return f'<span class="filename">From <a href="{address}">{name}</a>, {lines}: an excerpt</span>'

    return _FROM.sub(link, html)


def name_boxes(html: str) -> str:
    """Head a box with its kind's own word: `!!! claim "A1.4"` with "Claim A1.4", `!!! claim` with "Claim"."""

    def head(match: re.Match) -> str:
        word, title = match["kind"].capitalize(), match["title"].strip()
        rest = "" if title == word else f' <span class="title">{title}</span>'
        return f'{match[1]}<span class="kind">{word}</span>{rest}'

    return _BOX.sub(head, html)


def fold_drawings(html: str) -> str:
    """Fold the code that drew a figure under it."""
    return _DRAWN.sub(
        r'\1<details class="drawn" data-search-exclude><summary>The code that drew this</summary>\2</details>', html
    )


_MADE = re.compile(r'(?<!</summary>)<div class="language-python highlight">.*?</pre></div>', re.S)


def fold_makings(html: str) -> str:
    """Fold the code that made a table: what is headed neither as running alone nor as an excerpt ran at the build."""
    return _MADE.sub(
        r'<details class="drawn" data-search-exclude><summary>The code that made this</summary>\g<0></details>', html
    )


_NAME = re.compile(r"(<h1[^>]*><code>)(.*?)(?=</code>)")


def break_titles(html: str) -> str:
    """Let a title that is a module's name break over two lines after a dot, not within a word."""
    return _NAME.sub(lambda m: m[1] + m[2].replace(".", ".<wbr>"), html)


_FORMULA = re.compile(r'([(“‘]?)(<span class="arithmatex">\\\(.{1,24}?\\\)</span>)([,.;:!?)”’]*)')


def hold_punctuation(html: str) -> str:
    """Keep what touches a short formula on its line: typeset, it is a box, and a line may break beside it."""
    held = '<span class="held">{}</span>'.format
    return _FORMULA.sub(lambda m: held(m[0]) if m[1] or m[3] else m[0], html)


_SEARCH = 'data-md-component="search" role="dialog"'


def name_search(page: str) -> str:
    """Tell a screen reader what the search dialog is; the theme leaves it nameless."""
    return page.replace(_SEARCH, f'{_SEARCH} aria-label="Search"')
