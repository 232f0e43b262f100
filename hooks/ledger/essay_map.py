"""The table of docs/map.md: each file that the essay names, and the module, chapter and test that stand in its place.

It is made where the page has its placeholder, from what is on disk at that moment.
"""

import re
from pathlib import Path

from pages.links import Link, source
from templates import render

MAP_HERE = "<!-- map -->"
PATHS = [  # the code in the essay's 'Codebase References', without its folder ml_research/attention/
    "attention_mechanism", "self_attention", "transformer", "positional_encoding",
    "efficient_attention/flash_attention", "efficient_attention/sparse_attention",
    "efficient_attention/linear_attention", "efficient_attention/mamba", "vision_transformers/vit",
    "multimodal/clip", "multimodal/flamingo", "multimodal/llava", "language_models/gpt_family",
]  # fmt: skip
TEXT = "27-altered-state/info/meditation/non-dualism/02_kashmir_shaivism.md"  # the last row there: a text, and no code


def with_map(markdown: str, root: Path, link: Link) -> str:
    """Put the table in its place."""
    return markdown.replace(MAP_HERE, map_html(root, link)) if MAP_HERE in markdown else markdown


def map_rows(root: Path) -> list[dict]:
    """For each file of code that the essay names: our module, chapter and test, each None until it exists."""
    rows = []
    for path in PATHS:
        stem = path.rpartition("/")[2]
        place = root / "src" / "nondual" / path
        module = place.with_suffix(".py") if place.with_suffix(".py").exists() else place / "__init__.py"
        tests = sorted((root / "tests").rglob(f"test_{stem}.py"))
        rows.append(
            {
                "essay": f"ml_research/attention/{path}.py",
                "module": module.relative_to(root).as_posix() if module.exists() else None,
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


def map_html(root: Path, link: Link) -> str:
    """The table: a row for each file of code, and one for the text that the essay names beside them."""
    found = map_rows(root)
    rows = []
    for row in found:
        path = row["essay"].removeprefix("ml_research/attention/")
        title = title_of(root / "docs" / row["chapter"]) if row["chapter"] else None
        rows.append(
            {
                "path": path,
                "module": row["module"] and row["module"].removeprefix("src/nondual/"),
                "reference": link(f"reference/{path.removesuffix('.py')}.md"),
                "chapter": row["chapter"] and link(row["chapter"]),
                "title": title,
                "test": row["test"] and row["test"].removeprefix("tests/"),
                "in_repository": row["test"] and source(row["test"]),
            }
        )
    built = sum(all(row.values()) for row in found)
    return render("map.html", rows=rows, built=built, text=TEXT, readings=f"{link('ledger.md')}?verdict=reading")


def title_of(page: Path) -> str:
    found = re.search(r"^# (.+?)\s*(?:\{.*\})?$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else page.stem
