"""What a page says that Markdown cannot: the word on a box, the fold under a figure, the search dialog's name; where a
module's name may break over two lines, and a comma that stays with its formula."""

import os
import re

os.environ.setdefault("OMP_NUM_THREADS", "1")  # what the pages run is small: more threads only wait for each other

KINDS = ("claim", "measured", "verdict", "limit", "exercise", "source")

_BOX = re.compile(
    r'(<(?:div class="admonition |details class=")(?:[^"]* )?(?P<kind>' + "|".join(KINDS) + r')(?=[" ])[^>]*>\s*'
    r'<(?P<tag>p class="admonition-title"|summary)>)(?P<title>.*?)(?=</(?:p|summary)>)',
    re.S,
)  # fmt: skip
_DRAWN = re.compile(r'(</figure>)\s*(?:<p></p>\s*)?(<div class="language-python highlight">.*?</pre></div>)', re.S)


def on_page_content(html, page, config, files):
    """Give the page its boxes and folds, break long names at their dots, keep punctuation with short formulas."""
    return hold_punctuation(break_titles(fold_drawings(name_boxes(html))))


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


def on_post_page(output, page, config):
    """Tell a screen reader what the search dialog is; the theme leaves it nameless."""
    return output.replace(_SEARCH, f'{_SEARCH} aria-label="Search"')


def on_post_template(output_content, template_name, config):
    """The same for 404.html, which is no page."""
    return output_content.replace(_SEARCH, f'{_SEARCH} aria-label="Search"')
