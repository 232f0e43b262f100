"""The map of all heads: its numbers, the table beside it and its sentence are those that torch computes."""

import json
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib").use("Agg")

from nondual.data import BANK  # noqa: E402
from nondual.pretrained import minilm  # noqa: E402

PAGE = Path(__file__).parent.parent.parent / "docs" / "essay" / "heads.md"
LAYERS, HEADS = 6, 12


@pytest.fixture(scope="module")
def drawn(figure_in):
    """The figure as the chapter's own code prints it."""
    return figure_in(PAGE, "heads")


@pytest.fixture(scope="module")
def data(drawn):
    found = re.search(r'class="data">(.*?)</script>', drawn)
    assert found
    return json.loads(found[1])


@pytest.fixture
def page_of(live_page, drawn):
    """A function that opens a page with that figure, with or without scripts."""
    return live_page(drawn, styled=True)


@pytest.fixture(scope="module")
def measured():
    """The six measures, each (layers, heads), counted word by word over the sentences with "bank"."""
    encoder, rows = minilm(), []
    for sentence in [*BANK["river"], *BANK["money"]]:
        weights = encoder.attention(sentence)[1].double()
        n = weights.shape[-1]
        for i in range(1, n - 1):
            row, missing = weights[:, :, i], torch.full((LAYERS, HEADS), torch.nan, dtype=torch.float64)
            before = row[..., i - 1] if i > 1 else missing
            after = row[..., i + 1] if i < n - 2 else missing
            away = sum(row[..., j] * abs(i - j) for j in range(n))
            spread = -(row * row.clamp(min=1e-300).log2()).sum(-1)
            rows.append(torch.stack([before, after, row[..., i], row[..., 0] + row[..., -1], away, spread]))
    return torch.stack(rows).nanmean(0)


def printed(x, share):
    return str(round(100 * x)) if share else f"{x:.1f}"


def cells(page):
    return page.locator(".heads-map td")


def chosen(page):
    """The index of the one chosen cell, which alone can be reached with the Tab key."""
    selected = cells(page).evaluate_all(
        "all => all.map((c, i) => c.ariaSelected === 'true' ? i : -1).filter(i => i >= 0)"
    )
    reachable = cells(page).evaluate_all("all => all.map((c, i) => c.tabIndex === 0 ? i : -1).filter(i => i >= 0)")
    assert selected == reachable and len(selected) == 1
    return selected[0]


def weights_shown(page):
    titles = page.locator(".heads-matrix td").evaluate_all("all => all.map(c => parseInt(c.title))")
    rows = page.locator(".heads-matrix tbody tr").count()
    return torch.tensor(titles).view(rows, -1)


def test_the_page_has_the_measures_that_counting_gives(data, measured):
    assert [m["label"] for m in data["measures"]] == [
        "word before",
        "word after",
        "itself",
        "markers",
        "distance",
        "spread",
    ]
    assert [m["share"] for m in data["measures"]] == [True] * 4 + [False] * 2
    for given, wanted in zip(data["measures"], measured, strict=True):
        torch.testing.assert_close(torch.tensor(given["values"]).double(), wanted.flatten(), atol=1e-4, rtol=0)


@pytest.mark.browser
def test_each_measure_fills_the_map_and_chooses_its_highest_head(page_of, data):
    page = page_of()
    names = page.get_by_role("group", name="Colour the map by").get_by_role("button")
    assert cells(page).count() == LAYERS * HEADS
    for number, measure in enumerate(data["measures"]):
        names.nth(number).click() if number % 2 else names.nth(number).press("Enter")
        assert cells(page).all_text_contents() == [printed(x, measure["share"]) for x in measure["values"]]
        highest = measure["values"].index(max(measure["values"]))
        assert chosen(page) == highest
        assert (
            page.locator(".heads-pair .ask").first.inner_text() == f"{measure['title']} (rows: layers, columns: heads)"
        )
        label = cells(page).nth(highest).get_attribute("aria-label")
        assert label.startswith(f"Layer {highest // HEADS}, head {highest % HEADS}: {measure['label']} ")
        assert label.rstrip("%").endswith(f" {printed(max(measure['values']), measure['share'])}")
        assert cells(page).nth(highest).evaluate("c => getComputedStyle(c).backgroundColor") == "rgb(254, 232, 56)"


@pytest.mark.browser
def test_every_head_shows_its_own_weights_of_every_sentence(page_of, data):
    page, encoder = page_of(), minilm()
    picked = [0, 2, 13, 35, 58, 71]
    for given in data["sentences"]:
        page.get_by_label("Sentence", exact=True).select_option(given["text"])
        assert page.locator(".heads-matrix tbody th").all_text_contents() == given["tokens"][1:-1]
        assert page.locator(".heads-matrix thead .weight").all_text_contents() == given["tokens"]
        weights = encoder.attention(given["text"])[1]
        for index in picked:
            layer, head = divmod(index, HEADS)
            cells(page).nth(index).click()
            wanted = weights[layer, head, 1:-1]
            found = weights_shown(page)
            assert (found / 100 - wanted).abs().max() < 0.0051
            said = page.locator(".said > [aria-hidden]").inner_text()
            assert said.startswith(f"Layer {layer}, head {head}. ")
            for measure in data["measures"]:
                value = printed(measure["values"][index], measure["share"]) + ("%" if measure["share"] else "")
                assert measure["said"].replace("#", value) in said
            assert f"the largest weight is {found.max()}%, from " in said
    page.wait_for_function("document.querySelector('.said .spoken').textContent.startsWith('Layer 5, head 11.')")


@pytest.mark.browser
def test_the_map_is_walked_with_the_arrow_keys(page_of):
    page = page_of()
    cells(page).nth(0).click()
    for key, index in (
        ("ArrowUp", 0),
        ("ArrowLeft", 0),
        ("ArrowRight", 1),
        ("ArrowDown", 13),
        ("End", 23),
        ("ArrowRight", 23),
        ("ArrowDown", 35),
        ("Home", 24),
        ("ArrowUp", 12),
    ):
        page.keyboard.press(key)
        assert chosen(page) == index
        assert page.evaluate("[...document.querySelectorAll('.heads-map td')].indexOf(document.activeElement)") == index


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1440])
def test_it_fits_the_screen_and_its_text_is_large_enough(page_of, width):
    page = page_of(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.locator(".stage *").evaluate_all("all => all.map(x => parseFloat(getComputedStyle(x).fontSize))")
    assert min(sizes) >= 11


@pytest.mark.browser
def test_without_a_script_the_drawing_stays(page_of):
    page = page_of(scripts=False)
    assert page.locator("figure svg").first.is_visible()
    assert page.locator("button, select, .heads-map").count() == 0
