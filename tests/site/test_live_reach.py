"""The figure of sparse attention: what can reach a word after some layers is what nondual's own functions say."""

import json
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib").use("Agg")

from nondual.efficient_attention import sparse_attention as sparse  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "essay" / "sparse_attention.md"
PATTERNS = {
    "window": lambda **how: sparse.local(4, **how),
    "stride": lambda **how: sparse.strided(6, **how),
    "fixed": lambda **how: sparse.fixed(8, **how),
    "blocks": lambda **how: sparse.blocks(8, **how),
    "global": lambda **how: sparse.local(4, **how) | sparse.global_tokens(1, **how),
    "random": lambda **how: (
        sparse.local(4, **how) | sparse.global_tokens(1, **how) | sparse.random_blocks(1, size=4, **how)
    ),
}
CAUSAL = "only words before it (causal)"


@pytest.fixture(scope="module")
def drawn(figure_in):
    """The figure as the chapter's own code prints it."""
    return figure_in(PAGE, "reach")


@pytest.fixture(scope="module")
def words(drawn):
    return json.loads(re.search(r'class="data">(.*?)</script>', drawn)[1])["words"]


@pytest.fixture
def page_of(live_page, drawn):
    """A function that opens a page with that figure, with or without scripts."""
    return live_page(drawn, styled=True)


def said(page):
    return page.locator(".said > [aria-hidden]").inner_text()


def cells(page, n):
    """Which cells of the table are filled, by row and column."""
    fills = page.locator(".reach-pair svg rect:not(.chosen)").evaluate_all(
        "(all) => all.map((cell) => cell.getAttribute('fill') !== 'none')"
    )
    return torch.tensor(fills).view(n, n)


def least(found):
    """The first number of layers of which this is so, from 1 on, or None."""
    return next((count for count, all_reached in found.items() if all_reached), None)


def after(count):
    return "one layer" if count == 1 else f"{count} layers"


@pytest.mark.browser
@pytest.mark.parametrize("name", PATTERNS)
def test_table_words_and_sentence_are_what_reach_says(page_of, words, name):
    page, n = page_of(), len(words)
    page.get_by_role("button", name=name, exact=True).press("Enter")
    for causal in (True, False):
        page.get_by_label(CAUSAL).set_checked(causal)
        mask = PATTERNS[name](causal=causal).mask(n)
        wanted = torch.ones(n, n, dtype=torch.bool).tril() if causal else torch.ones(n, n, dtype=torch.bool)
        powers = {layers: sparse.reach(mask, layers) for layers in range(1, n + 1)}
        share, all_ = int(mask.sum()) / int(wanted.sum()), sparse.layers_to_reach_all(mask)
        for layers, word in ((1, 28), (2, 28), (9, 31), (3, 4)):
            page.get_by_label("Layers").fill(str(layers))
            page.get_by_label("Word", exact=True).fill(str(word))
            assert torch.equal(cells(page, n), powers[layers])
            lit = page.locator(".reach-words span").evaluate_all("(all) => all.map((x) => x.style.background !== '')")
            assert lit == powers[layers][word].tolist()
            bare = words[word].strip(",.")
            count = int(powers[layers][word].sum())
            if causal:
                begin = f"After {after(layers)}, {count} of the {word + 1} words up to “{bare}” can have reached it"
            else:
                begin = f"After {after(layers)}, {count} of the {n} words can have reached “{bare}”"
            letters = f", “letters” {'' if powers[layers][word][1] else 'not '}among them. "
            own = least({count: torch.equal(power[word], wanted[word]) for count, power in powers.items()})
            others = "all before it" if causal else "all others"
            end = (
                "Some never reach it, however many layers there are."
                if own is None
                else f"All of them can after {after(own)}; "
                + (
                    f"some other word is never reached by {others}."
                    if all_ is None
                    else f"after {after(all_)} every word can have been reached by {others}."
                )
            )
            assert said(page) == f"{round(100 * share)}% of the pairs are computed. {begin}{letters}{end}"


@pytest.mark.browser
def test_layers_and_words_are_chosen_with_the_keyboard(page_of):
    page = page_of()
    page.get_by_label("Layers").press("ArrowRight")
    assert "After 2 layers, 7 of the 29 words up to “were”" in said(page)
    page.get_by_label("Word", exact=True).press("ArrowLeft")
    assert "After 2 layers, 7 of the 28 words up to “bed”" in said(page)
    page.get_by_label(CAUSAL).press("Space")
    assert "After 2 layers, 11 of the 32 words can have reached “bed”" in said(page)


@pytest.mark.browser
def test_a_word_or_a_row_can_be_pressed(page_of, words):
    page = page_of(width=1000)
    page.locator(".reach-words span", has_text="river").click()
    assert page.get_by_label("Word", exact=True).get_attribute("aria-valuetext") == "river"
    assert page.locator(".reach-words .chosen").inner_text() == "river,"
    box = page.locator(".reach-pair svg").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] * (28 + 0.7) / (len(words) + 0.4))
    assert page.locator(".reach-words .chosen").inner_text() == "were"
    page.wait_for_function("document.querySelector('.spoken').textContent.includes('up to “were”')")


@pytest.mark.browser
def test_it_fits_a_phone_and_its_words_can_be_read(page_of):
    page = page_of(width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    sizes = page.locator(".stage :is(span, p, label, button, output)").evaluate_all(
        "(all) => all.map((node) => parseFloat(getComputedStyle(node).fontSize))"
    )
    assert min(sizes) >= 11


@pytest.mark.browser
def test_without_a_script_the_drawing_stays(page_of):
    page = page_of(scripts=False)
    assert page.locator("figure .narrow svg").is_visible() and page.locator(".reach-words").count() == 0
