"""The table of results: it sorts by any column, either way as the column asks, and shows one kind of row or all."""

import pytest

pytest.importorskip("matplotlib").use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from nondual import figures  # noqa: E402

NAMES = ("base", "window", "LSTM", "Mamba")
POINTS, BITS = (0.7, 0.2, None, 0.9), (3.1, 3.4, 2.8, 2.9)
KINDS = ("attention", "attention", "recurrent", "recurrent")


def cell(value, unit):
    if value is None:
        return None
    text = f"{value:.0%}" if unit == "points" else f"{value:.1f}"
    word = "control" if value == 3.4 else "better" if value > 0.8 else "worse"
    return {"value": value, "text": text, "is": word, "more": f"{value} of eight seeds"}


@pytest.fixture
def opened(live_page):
    rows = [
        {"name": name, "group": kind, "cells": [cell(one, "points"), cell(two, "bits")]}
        for name, kind, one, two in zip(NAMES, KINDS, POINTS, BITS, strict=True)
    ]
    columns = [{"name": "recall", "lowest": False}, {"name": "Shakespeare", "lowest": True}]
    figures.style()
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.imshow([[0.7, 3.1], [0.2, 3.4]])
    data = {"corner": "mechanism", "columns": columns, "groups": ["all", "attention", "recurrent"], "rows": rows}
    return live_page(
        figures.live(fig, script="sorted", data=data, name="t", alt="a table", caption="A table."), styled=True
    )


def names(page):
    return page.locator("tbody th").all_inner_texts()


@pytest.mark.browser
def test_it_sorts_by_every_column_and_back(opened):
    page = opened()
    assert names(page) == list(NAMES)
    page.get_by_role("button", name="recall").click()
    assert names(page) == ["Mamba", "base", "window", "LSTM"]  # what was not tried comes last
    page.wait_for_function(
        "document.querySelector('.said .spoken').textContent.includes('first Mamba (90%), last window (20%)')"
    )
    page.get_by_role("button", name="Shakespeare").press("Enter")  # bits: the lowest first
    assert names(page) == ["LSTM", "Mamba", "base", "window"]
    heads = page.locator("thead th")
    assert [heads.nth(i).get_attribute("aria-sort") for i in range(3)] == ["none", "none", "ascending"]
    page.get_by_role("button", name="mechanism").click()
    assert names(page) == list(NAMES)


@pytest.mark.browser
def test_it_shows_one_kind_of_row_and_says_how_many(opened):
    page = opened()
    page.get_by_role("button", name="recurrent").click()
    assert names(page) == ["LSTM", "Mamba"]
    page.get_by_role("button", name="recall").click()
    assert names(page) == ["Mamba", "LSTM"]
    assert page.locator(".said > [aria-hidden]").inner_text().startswith("2 of 4 rows, by recall: first Mamba")


@pytest.mark.browser
def test_a_word_says_what_the_colour_shows(opened):
    page = opened()
    cells = page.locator("tbody tr").first.locator("td")
    assert (
        cells.first.inner_text().split() == ["70%", "▼", "worse"]
        and cells.first.get_attribute("title") == "0.7 of eight seeds"
    )
    assert page.locator("tbody tr").nth(2).locator("td").first.inner_text() == "–"


@pytest.mark.browser
def test_the_row_that_others_are_compared_with_is_a_row_like_the_others(opened):
    page = opened()
    cells = page.locator("tbody tr").nth(1).locator("td")
    assert cells.nth(1).inner_text().split() == ["3.4", "control"]
    assert cells.nth(1).evaluate("(node) => getComputedStyle(node).display") == "table-cell"


@pytest.mark.browser
def test_on_a_phone_the_table_scrolls_and_the_page_does_not(opened):
    page = opened(width=320)
    wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1]


@pytest.mark.browser
def test_without_a_script_the_drawing_stays(opened):
    page = opened(scripts=False)
    assert page.locator("figure svg").is_visible() and page.locator("table").count() == 0
