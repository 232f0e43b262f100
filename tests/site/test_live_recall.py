"""The figure of the list of names and digits: each cell, answer and sentence is what was measured."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib").use("Agg")

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "essay" / "recurrent.md"
MEASURED = json.loads((ROOT / "docs" / "measured" / "phone_list.json").read_text(encoding="utf-8"))["figures"]
LABELS = ["8 numbers", "32 numbers", "every pair"]


@pytest.fixture(scope="module")
def drawn(figure_in):
    """The figure as the chapter's own code prints it."""
    return figure_in(PAGE, "recall")


@pytest.fixture
def page_of(live_page, drawn):
    """A function that opens a page with that figure, with or without scripts."""
    return live_page(drawn, styled=True)


def said(page):
    return page.locator(".said > [aria-hidden]").inner_text()


def choose(page, model, number, read):
    """Choose what is kept, a list and how many pairs are read, with the keyboard."""
    page.get_by_role("button", name=LABELS[model]).press("Enter")
    page.get_by_label("List", exact=True).select_option(index=number)
    pairs = page.get_by_label("Pairs read")
    pairs.press("Home")
    for _ in range(read - 1):
        pairs.press("ArrowRight")


@pytest.mark.browser
@pytest.mark.parametrize("model", range(len(LABELS)))
def test_cells_and_answers_are_those_that_were_measured(page_of, model):
    page = page_of()
    for number, read in ((0, 12), (1, 1), (2, 7)):
        choose(page, model, number, read)
        pairs, found = MEASURED["pairs"][number], MEASURED["models"][model]["lists"][number]
        rows = page.locator("table.recall tbody tr")
        assert rows.locator("th").all_text_contents() == [f"{n} {d}" for n, d in zip(pairs["names"], pairs["digits"])]
        cells = rows.locator("td[title]").evaluate_all("(all) => all.map((cell) => parseInt(cell.title))")
        assert cells == [found["sure"][t][i] for i in range(12) for t in range(i, 12)]
        answers = [text.split() for text in rows.locator(".answer").all_text_contents() if text]
        right = [int(digit) == pairs["digits"][i] for i, digit in enumerate(found["answers"][read - 1])]
        assert answers == [[d, "✓" if hit else "✗"] for d, hit in zip(found["answers"][read - 1], right)]
        count = "one pair" if read == 1 else f"{read} pairs"
        assert f", after {count}: {sum(right)} of {read} right." in said(page)
        if not all(right):
            i = right.index(False)
            asked = f"Asked for {pairs['names'][i]}, {pairs['digits'][i]}, it says {found['answers'][read - 1][i]}."
            assert said(page).endswith(asked)


@pytest.mark.browser
def test_a_press_on_a_cell_chooses_its_moment(page_of):
    page = page_of(width=1000)
    page.locator("table.recall tbody tr").nth(0).locator("td[title]").nth(4).click()
    assert page.get_by_label("Pairs read").input_value() == "5" and "after 5 pairs" in said(page)
    page.locator("table.recall thead th").nth(1).click()
    assert page.get_by_label("Pairs read").input_value() == "1"
    assert page.locator("table.recall td.now").count() == 1


@pytest.mark.browser
def test_it_fits_a_phone(page_of):
    page = page_of(width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.browser
def test_without_a_script_the_drawing_stays(page_of):
    page = page_of(scripts=False)
    assert page.locator("figure .narrow svg").is_visible() and page.locator("table.recall").count() == 0
