"""A figure's words state no number that its code neither computes nor asserts; and the guard fails when it should."""

import json
from pathlib import Path

import pytest
from snippets import captions, reading

ROOT = Path(__file__).parent.parent
PAGES = [*reading.pages(ROOT), *captions.notebooks(ROOT)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_number_in_a_figures_words_is_computed_or_asserted(page):
    found = captions.faults(page)
    assert not found, "\n" + "\n".join(found)


def test_the_figures_are_found():
    read = [fence for page in reading.pages(ROOT) for fence in reading.fences(page) if "figures.s" in fence.code]
    assert len([fence for fence in read if fence.kind == "figure"]) >= 10
    assert captions.notebooks(ROOT)


# --- figures with one number that nothing backs --------------------------------------------------------------------

SHOW = 'print(figures.show(fig, name="x", alt="It rises.", caption={}))'

PLANTED = {  # name: (the fence's code, the line in it, the number that is named)
    "a decimal": (SHOW.format('"Heads reach 0.71."'), 1, "0.71"),
    "a decimal without its nought": (SHOW.format('"Heads reach .71."'), 1, ".71"),
    "a percentage": (SHOW.format('"Chance is 17 %."'), 1, "17 %"),
    "a percentage without a space": (SHOW.format('"Below 65%."'), 1, "65%"),
    "a percentage in words": (SHOW.format('"Below 65 percent."'), 1, "65 percent"),
    "a thousand": (SHOW.format('"Over 4,096 characters."'), 1, "4,096"),
    "an exponent": (SHOW.format('"It errs by 3e-8."'), 1, "3e-8"),
    "a live figure": (SHOW.replace("show(fig", "live(fig, script='x'").format('"Heads reach 0.71."'), 1, "0.71"),
    "a word": (SHOW.format('"Three seeds agree."'), 1, "Three"),
    "a compound word": ("n = 70 + 2\nm = 70\n" + SHOW.format('"All seventy-three heads."'), 3, "seventy-three"),
    "the alt text": ('print(figures.show(fig, name="x", alt="Of 72 heads.", caption="It rises."))', 1, "72"),
    "steps": ('print(figures.steps(fs, name="x", alt="Of 72 heads.", caption="It rises."))', 1, "72"),
    "beside a computed one": (SHOW.format('f"From {low:.2f} to 0.61."'), 1, "0.61"),
    "a constant in braces": (SHOW.format('f"From {low:.2f} to {0.61}."'), 1, "0.61"),
    "on the second line of a text": (SHOW.format('(\n    f"From {low}, "\n    "under 0.61."\n)'), 3, "0.61"),
    "in a name": ('words = "Heads reach 0.71."\n' + SHOW.format("words"), 1, "0.71"),
    "in a joined list": ('parts = ["a", "b 0.71"]\n' + SHOW.format('"".join(parts)'), 1, "0.71"),
    "in a sum": ('more = "to 0.71"\nmore += " or 3"\n' + SHOW.format('"It rises " + more'), 2, "3"),
    "in either branch": (SHOW.format('"It rises" if up else "It falls to 0.5"'), 1, "0.5"),
    "in a function of the fence": (
        'def told(x):\n    return f"{x} of 72"\n' + SHOW.format('f"{told(3)} heads"'),
        2,
        "72",
    ),
    "between tags": (SHOW.format('"At <b>0.71</b> or <i>below</i>."'), 1, "0.71"),
    "assigned and not asserted": ("most = 0.71\n" + SHOW.format('"Heads reach 0.71."'), 2, "0.71"),
    "asserted of nothing": ("assert 0.71 == 0.71\n" + SHOW.format('"Heads reach 0.71."'), 2, "0.71"),
    "in an assert's message": ('assert low, "0.71"\n' + SHOW.format('"Heads reach 0.71."'), 2, "0.71"),
    "another number asserted": ("assert share < 0.7\n" + SHOW.format('"Heads stay below 0.71."'), 2, "0.71"),
    "a word that stands in a string alone": ('x = "3"\n' + SHOW.format('"Three seeds."'), 2, "Three"),
    "words that are not given by name": ('print(figures.show(fig, name="x", caption="It rises.", **more))', 1, "alt"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_number_that_nothing_backs_is_named_with_its_page_and_line(tmp_path, name):
    code, line, number = PLANTED[name]
    page = tmp_path / "page.md"
    page.write_text(f'# A page\n\n```python exec="on" html="on"\n{code}\n```\n')
    found = captions.faults(page)
    assert any(fault.startswith(f"{page}:{3 + line}: ") and number in fault for fault in found), found


RIGHT = {
    "a formatted value": SHOW.format('f"Heads reach {share:.2f}, {share:.0%} of {n:,}."'),
    "an assert": "assert share < 0.71\n" + SHOW.format('"Heads stay below 0.71, or 71 %."'),
    "an assert of a percentage": "assert share < 56\n" + SHOW.format('"Below 0.56."'),
    "an assert of many": "assert all(0.13 < s < 0.61 for s in shares)\n" + SHOW.format('"From 0.13 to 0.61."'),
    "an assert of a fraction": "assert abs(share - 17 / 24) < 1e-3\n" + SHOW.format('"At 17 in 24."'),
    "an assert of a length": "assert len(heads) == 72\n" + SHOW.format('"All 72, seventy-two, heads."'),
    "an assert of a thousand": "assert n == 4_096\n" + SHOW.format('"Over 4,096 characters."'),
    "an assert of less than nothing": "assert slope < -1.5\n" + SHOW.format('"It falls by 1.5 a step."'),
    "a word in a loop": "for seed in range(3): run(seed)\n" + SHOW.format('"Three seeds agree."'),
    "small words": SHOW.format('"One head of two looks back; a half does not."'),
    "a small fraction": SHOW.format('"By less than a ten-millionth."'),
    "names with digits": SHOW.format('"SmolLM2 in float32, GPT-4, Mamba-2 and commit d61d034."'),
    "a tag and a link": SHOW.format("'<a href=\"x-3.html#a4\">h</a> and [t](p-17.md), &#160;<br>.'"),
    "an index of a computed value": SHOW.format("f\"{held[3]} at {run['n 17']} of {told(3, 'a')}\""),
    "a version of a run": SHOW.format("f\"torch {run['versions']['torch']}, commit {run['commit']}\""),
    "another call": 'ax.set_title("0.71")\nprint(fig)',
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_number_that_the_code_computes_or_asserts_is_let_pass(tmp_path, name):
    page = tmp_path / "page.md"
    page.write_text(f'```python exec="on" html="on"\n{RIGHT[name]}\n```\n')
    assert captions.faults(page) == []


def test_a_notebooks_cell_is_read_like_a_fence(tmp_path):
    cell = {"cell_type": "code", "source": ["%matplotlib inline\n", SHOW.format('"Heads reach 0.71."')]}
    words = {"cell_type": "markdown", "source": [SHOW.format('"Heads reach 0.71."')]}
    page = tmp_path / "x.ipynb"
    page.write_text(json.dumps({"cells": [words, cell]}))
    assert captions.main([str(page)]) == 1
    found = captions.faults(page)
    assert len(found) == 1 and found[0].startswith(f"{page}: cell 1, line 2: the caption states 0.71")
    cell["source"].insert(1, "assert most < 0.71\n")
    page.write_text(json.dumps({"cells": [words, cell]}))
    assert captions.main([str(page)]) == 0


def test_a_snippet_that_a_reader_pastes_is_no_figure(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\n" + SHOW.format('"Heads reach 0.71."') + "\n```\n")
    assert captions.faults(page) == []
