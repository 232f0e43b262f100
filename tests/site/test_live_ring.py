"""The ring's interactive figure: weights, right looks and named cards are torch's, with symmetric and free scores."""

import itertools
import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib").use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from nondual import figures  # noqa: E402
from nondual.tasks import RING  # noqa: E402

NAMES = ["rock", "scissors", "paper"]
THIRD = (2, 0, 1)  # the one that beats each
CARDS = 8
START = [[0.0, 0.0, 2.0], [0.0, 0.0, 1.0], [2.0, 1.0, 0.0]]


@pytest.fixture
def figure(live_page):
    """A function that opens a page with the figure."""
    data = {"names": NAMES, "beats": RING, "scores": START, "cards": CARDS}
    figures.style()
    html = figures.live(plt.figure(figsize=(3, 2)), script="ring", data=data, name="ring", alt="a ring", caption="So.")
    return live_page(html, styled=True)


def move(page, label, value):
    page.get_by_role("slider", name=label, exact=True).evaluate(
        "(node, value) => { node.value = value; node.dispatchEvent(new Event('input')); }", value
    )


def expected(scores):
    """By torch: what each gives to the one it beats and to the third (3, 2), how many are right, cards named."""
    weights = torch.tensor(scores, dtype=torch.float64)
    weights = weights.masked_fill(torch.eye(3, dtype=torch.bool), float("-inf")).softmax(-1)
    given = torch.stack([weights[range(3), RING], weights[range(3), THIRD]], -1)
    right, alike = given[:, 0] > given[:, 1], given[:, 0] == given[:, 1]
    luck = 1 / CARDS
    named = torch.where(right, 1.0, torch.where(alike, luck + (1 - luck) / 2, luck)).mean()
    return given, int(right.sum()), named.item()


def check(page, scores):
    """Compare what the page shows with torch, and return how many look right."""
    given, right, named = expected(scores)
    lines = page.locator(".looks li").all_inner_texts()
    for i, (line, (to_prey, to_third)) in enumerate(zip(lines, given.tolist(), strict=True)):
        word = "right." if to_prey > to_third else "wrong." if to_prey < to_third else "both alike."
        shares = [round(100 * to_prey), round(100 * to_third)]
        assert [int(x) for x in re.findall(r"(\d+)%", line)] == shares, (line, scores)
        assert line.startswith(NAMES[i].capitalize()) and line.endswith(word), (line, scores)
    texts = page.locator("g.right > text, g.wrong > text").all_text_contents()
    drawn = [int(text.removesuffix("%")) for text in texts]
    assert drawn == [round(100 * x) for x in given.flatten().tolist()]
    said = page.locator(".said").inner_text()
    assert f"{right} of 3 look" in said and f"{round(100 * named)}% of the cards" in said, (said, scores)
    return right


@pytest.mark.browser
def test_symmetric_scores_get_two_of_three_in_every_order_and_free_ones_three(figure):
    page = figure()
    assert check(page, START) == 2
    assert page.get_by_role("slider").count() == 3
    reached = set()
    for a, b, c in itertools.product((-1.5, 0.3, 2), repeat=3):
        for label, value in (("Rock and scissors", a), ("Scissors and paper", b), ("Paper and rock", c)):
            move(page, label, value)
        reached.add(check(page, [[0, a, c], [a, 0, b], [c, b, 0]]))
    assert reached == {0, 1, 2}
    assert page.locator(".record").inner_text() == "Your best so far: 2 of 3 with symmetric scores."

    page.get_by_role("checkbox").press("Space")  # the scores stay, and each direction gets a slider
    assert page.get_by_role("slider").count() == 6
    assert check(page, [[0, 2, 2], [2, 0, 2], [2, 2, 0]]) == 0
    scores = [[0, 1.1, -0.4], [0.2, 0, 0.9], [2.2, -2.6, 0]]
    for i, j in itertools.permutations(range(3), 2):
        move(page, f"{NAMES[i].capitalize()} to {NAMES[j]}", scores[i][j])
    assert check(page, scores) == 3
    assert "100% of the cards" in page.locator(".said").inner_text()
    assert "3 of 3 with free ones" in page.locator(".record").inner_text()

    page.get_by_role("checkbox").press("Space")  # symmetric again: the scores along the ring count for both directions
    assert check(page, [[0, 1.1, 2.2], [1.1, 0, 0.9], [2.2, 0.9, 0]]) == 1
    page.get_by_role("button", name="Start again").press("Enter")
    assert check(page, START) == 2


@pytest.mark.browser
def test_the_keyboard_moves_a_score_and_the_result_is_spoken(figure):
    page = figure()
    slider = page.get_by_role("slider", name="Rock and scissors")
    for _ in range(3):
        slider.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "0.3"
    assert check(page, [[0, 0.3, 2], [0.3, 0, 1], [2, 1, 0]]) == 2
    slider.press("Home")
    assert slider.get_attribute("aria-valuetext") == "−3.0"
    page.wait_for_function("document.querySelector('.spoken').textContent.includes('2 of 3 look')")


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1440])
def test_it_fits_the_screen_and_its_text_is_large_enough(figure, width):
    page = figure(width)
    page.get_by_role("checkbox").check()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.locator(".stage *").evaluate_all(
        """all => all.map(node => {
            const scale = node.ownerSVGElement ? node.ownerSVGElement.getScreenCTM().a : 1;
            return scale * parseFloat(getComputedStyle(node).fontSize);
        })"""
    )
    assert min(sizes) >= 11


@pytest.mark.browser
def test_without_a_script_the_drawing_stays(figure):
    page = figure(scripts=False)
    assert page.locator("figure svg").is_visible() and page.get_by_role("slider").count() == 0
