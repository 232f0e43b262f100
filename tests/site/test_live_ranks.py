"""The figure of the ring's steps: tiles, pairs and who waits are what nondual.parallel.cost counts."""

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib").use("Agg")

from nondual.parallel import contiguous, zigzag  # noqa: E402
from nondual.parallel.cost import pairs  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "workshop" / "ring_attention.md"
LENGTH = 120
LAYOUTS = {"contiguous": contiguous, "zig-zag": zigzag}
CAUSAL = "only keys before it (causal)"


@pytest.fixture(scope="module")
def drawn(figure_in):
    """The figure as the page's own code prints it."""
    return figure_in(PAGE, "ranks")


@pytest.fixture
def page_of(live_page, drawn):
    """A function that opens a page with that figure, with or without scripts."""
    return live_page(drawn, styled=True)


def said(page):
    return page.locator(".said > [aria-hidden]").inner_text()


def check(page, name, ranks, step, causal):
    """Compare what the page shows of this step (from 1) with the library's count."""
    layout = LAYOUTS[name](LENGTH, ranks)
    table = pairs(layout, causal=causal)
    steps = [[int(table[rank, (rank - t) % ranks]) for rank in range(ranks)] for t in range(ranks)]
    now = steps[step - 1]
    cells = page.locator(".ranks-table tbody td:last-child").all_inner_texts()
    assert cells == [f"{count:,}" if count else "waits" for count in now]
    come_from = page.locator(".ranks-table tbody td:nth-child(2)").all_inner_texts()
    assert come_from == ["its own" if step == 1 else f"rank {(rank - step + 1) % ranks}" for rank in range(ranks)]

    side = LENGTH // (2 * ranks)
    holder = torch.empty(LENGTH, dtype=torch.int64)
    for rank in range(ranks):
        holder[layout.positions(rank)] = rank
    holder = holder[::side].tolist()
    tiles = [(i, j) for i in range(2 * ranks) for j in range(2 * ranks) if not causal or j <= i]
    kinds = {tile: (holder[tile[0]] - holder[tile[1]]) % ranks + 1 - step for tile in tiles}
    classes = page.locator(".ranks-tiles rect").evaluate_all("(all) => all.map((x) => x.getAttribute('class'))")
    assert classes == ["now" if kinds[t] == 0 else "done" if kinds[t] < 0 else "later" for t in tiles]

    sentence = said(page)
    assert sentence.startswith(f"Step {step} of {ranks}, {name}{', causal' if causal else ''}: ")
    idle = [rank for rank, count in enumerate(now) if not count]
    if idle:
        names = re.search(r": ranks? ([\d, and]+) waits? for the others", sentence)
        assert [int(x) for x in re.findall(r"\d+", names[1])] == idle and f"up to {max(now):,} pairs" in sentence
    elif min(now) == max(now):
        assert f"every rank computes {max(now):,} pairs." in sentence
    else:
        assert f"each rank computes {min(now):,} to {max(now):,} pairs." in sentence
    lasts = sum(map(max, steps))
    assert f"All {ranks} steps last as long as {lasts:,} pairs" in sentence
    assert f"busy for {round(100 * int(table.sum()) / ranks / lasts)}% of that" in sentence


@pytest.mark.browser
def test_every_step_of_both_layouts_is_what_the_library_counts(page_of):
    page = page_of()
    check(page, "contiguous", 4, 2, True)
    for name in LAYOUTS:
        page.get_by_role("button", name=name, exact=True).press("Enter")
        for causal in (False, True):
            page.get_by_label(CAUSAL).set_checked(causal)
            for ranks in (2, 3, 6):
                page.get_by_label("Ranks").fill(str(ranks))
                for step in range(1, ranks + 1):
                    page.get_by_label("Step").fill(str(step))
                    check(page, name, ranks, step, causal)


@pytest.mark.browser
def test_steps_and_ranks_are_chosen_with_the_keyboard(page_of):
    page = page_of()
    page.get_by_label("Step").press("End")
    assert page.get_by_label("Step").get_attribute("aria-valuetext") == "4 of 4"
    page.get_by_label("Ranks").press("ArrowLeft")  # the fourth step is not there any more
    assert page.get_by_label("Step").get_attribute("aria-valuetext") == "3 of 3"
    check(page, "contiguous", 3, 3, True)
    page.get_by_role("button", name="zig-zag").press("Space")
    page.get_by_label(CAUSAL).press("Space")
    check(page, "zig-zag", 3, 3, False)
    page.wait_for_function("document.querySelector('.spoken').textContent.includes('Step 3 of 3, zig-zag')")


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1440])
def test_it_fits_the_screen_and_its_text_is_large_enough(page_of, width):
    page = page_of(width)
    for ranks in ("6", "2"):
        page.get_by_label("Ranks").fill(ranks)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        sizes = page.locator(".stage *").evaluate_all(
            """all => all.map(node => {
                const scale = node.ownerSVGElement ? node.ownerSVGElement.getScreenCTM().a : 1;
                return scale * parseFloat(getComputedStyle(node).fontSize);
            })"""
        )
        assert min(sizes) >= 11


@pytest.mark.browser
def test_without_a_script_the_drawing_stays(page_of):
    page = page_of(scripts=False)
    assert page.locator("figure svg").first.is_visible() and page.get_by_role("slider").count() == 0
