"""Turn the clock: hands, angles, curve and scores in the browser are those of our own modules."""

import json
import math
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib").use("Agg")

from nondual.positional_encoding import Rotary, Sinusoidal  # noqa: E402

PAGE = Path(__file__).parent.parent.parent / "docs" / "essay" / "positional_encoding.md"
E, FAR = 16, 40
PLACES = [(0, 0), (1, 4), (51, 4), (5, -4), (100, 40), (17, -40), (3, 1)]


@pytest.fixture(scope="module")
def drawn(figure_in):
    """The figure as the chapter's own code prints it."""
    return figure_in(PAGE, "turn")


@pytest.fixture(scope="module")
def data(drawn):
    found = re.search(r'class="data">(.*?)</script>', drawn)
    assert found
    return json.loads(found[1])


@pytest.fixture
def page_of(live_page, drawn):
    """A function that opens a page with that figure, with or without scripts."""
    return live_page(drawn, styled=True)


def code(position):
    """The pairs (sine, cosine) of a position, (E/2, 2), which may be negative."""
    return Sinusoidal(E).double().at(torch.tensor(position)).view(-1, 2)


def rotated(pairs, place):
    """Pairs (E/2, 2) turned as rotary encoding turns a query or key at this place. Places there are 0 or more."""
    x = torch.tensor(pairs, dtype=torch.float64).view(1, 1, 1, E)
    return Rotary(E, order="interleaved").turn(x, place).view(-1, 2)


def printed(x, digits=2):
    return f"{x:.{digits}f}".replace("-", "−")


def move(page, p, k):
    for name, value in (("Position p", p), ("Offset k", k)):
        page.get_by_role("slider", name=name, exact=True).evaluate(
            "(node, value) => { node.value = value; node.dispatchEvent(new Event('input')); }", value
        )


def hands(page):
    """The tips of all first hands and of all second ones, (2, dials, 2): to the right, and up."""
    tips = page.locator(".dial .hand").evaluate_all(
        "all => all.map(h => [+h.getAttribute('x2'), -h.getAttribute('y2')])"
    )
    return torch.tensor(tips, dtype=torch.float64).view(-1, 2, 2).transpose(0, 1)


def rings(page):
    found = page.locator(".dial .ring").evaluate_all(
        "all => all.map(r => [+r.getAttribute('cx'), -r.getAttribute('cy')])"
    )
    return torch.tensor(found, dtype=torch.float64)


def angles(page):
    return [float(text.rstrip("°").replace("−", "-")) for text in page.locator(".dial .angle").all_text_contents()]


def curve(page):
    """The heights of the curve at whole offsets, in the plot's own units, from the top."""
    points = page.locator(".curve").get_attribute("d").removeprefix("M").split("L")
    pairs = torch.tensor([[float(x) for x in point.split()] for point in points], dtype=torch.float64)
    assert pairs[0, 0] == -FAR and pairs[-1, 0] == FAR
    return pairs[::2, 1]


def check_curve(page, scores):
    """The curve is the scores, scaled so that the highest and the lower of 0 and the lowest lie at its edges."""
    high, drawn = scores.max(), curve(page)
    # the scale is set by what lies between the whole offsets too, so it is read off two points
    top, low = drawn[scores.argmax()], drawn[scores.argmin()]
    expected = top + (low - top) * (high - scores) / (high - scores.min())
    assert (drawn - expected).abs().max() < 2e-3
    assert 0 <= drawn.min() and drawn.max() <= 30


@pytest.mark.browser
def test_hands_rings_and_the_dot_product_are_those_of_the_sinusoidal_code(page_of, data):
    page = page_of()
    torch.testing.assert_close(torch.tensor(data["wavelengths"]).double(), Sinusoidal(E).wavelengths, rtol=1e-6, atol=0)
    offsets = range(-FAR, FAR + 1)
    for p, k in PLACES:
        move(page, p, k)
        a, b = code(p), code(p + k)
        first, second = hands(page)
        torch.testing.assert_close(first, a, atol=1e-9, rtol=0)
        torch.testing.assert_close(second, b, atol=1e-9, rtol=0)
        torch.testing.assert_close(rings(page), b, atol=1e-9, rtol=0)  # the hands of p turned by k meet those of p + k
        for shown, length in zip(angles(page), data["wavelengths"], strict=True):
            assert shown == pytest.approx(360 * k / length, abs=0.51 if abs(360 * k / length) >= 10 else 0.051)
        dot = (a * b).sum().item()
        assert page.locator(".turn-plot .value").inner_text() == f"k = {printed(k, 0)}: {printed(dot)}"
        said = page.locator(".said > [aria-hidden]").inner_text()
        assert "meet those of p + k on all 8 dials" in said
        assert said.endswith(f"The dot product is {printed(dot)}, the same as at every other p.")
        check_curve(page, torch.stack([(a * code(p + k)).sum() for k in offsets]))


@pytest.mark.browser
def test_rotary_turns_a_query_and_a_key_and_their_score_depends_on_the_offset_alone(page_of, data):
    page = page_of()
    page.get_by_role("button", name="rotary: a query and a key are turned").press("Enter")
    for p, k in PLACES:
        move(page, p, k)
        # the score is the same wherever both stand, so negative places are moved on by 100
        a, b = rotated(data["query"], p + 100), rotated(data["key"], p + k + 100)
        score = (a * b).sum().item()
        assert page.locator(".turn-plot .value").inner_text() == f"k = {printed(k, 0)}: {printed(score)}"
        said = page.locator(".said > [aria-hidden]").inner_text()
        assert said == (
            f"Query at {p}, key at {printed(p + k, 0)}. Their score is {printed(score)}, the same as at every other p."
        )
        if p + k >= 0:
            a, b = rotated(data["query"], p), rotated(data["key"], p + k)
            longest = max(a.norm(dim=-1).max(), b.norm(dim=-1).max())
            first, second = hands(page)
            torch.testing.assert_close(first, a.flip(-1) / longest, atol=1e-6, rtol=0)
            torch.testing.assert_close(second, b.flip(-1) / longest, atol=1e-6, rtol=0)
        between = torch.atan2(b[:, 1], b[:, 0]) - torch.atan2(a[:, 1], a[:, 0])
        for shown, angle in zip(angles(page), between.tolist(), strict=True):
            apart = math.remainder(math.radians(shown) - angle, 2 * math.pi)
            assert abs(math.degrees(apart)) < 0.51
        places = [(rotated(data["query"], 100) * rotated(data["key"], 100 + k)).sum() for k in range(-FAR, FAR + 1)]
        check_curve(page, torch.stack(places))
    assert page.locator(".ring").first.is_hidden()


@pytest.mark.browser
def test_places_and_ranges_move_both_and_the_sentence_is_spoken(page_of):
    page = page_of()
    assert (page.get_by_label("Position p").input_value(), page.get_by_label("Offset k").input_value()) == (
        "1",
        "4",
    )
    found = page.get_by_role("group", name="Two places")
    before = angles(page)
    found.get_by_role("button", name="50 words later").press("Space")
    assert page.get_by_label("Position p").input_value() == "51" and angles(page) == before
    page.get_by_label("Offset k").press("ArrowLeft")
    assert page.get_by_label("Offset k").get_attribute("aria-valuetext") == "3" and angles(page) != before
    assert found.locator("[aria-pressed=true]").count() == 0
    page.wait_for_function("document.querySelector('.spoken').textContent.startsWith('From p = 51 to p + k = 54')")


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1440])
def test_it_fits_the_screen_and_its_text_is_large_enough(page_of, width):
    page = page_of(width)
    for mode in ("added", "rotary"):
        page.get_by_role("button", name=f"{mode}:").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.locator(".stage *").evaluate_all("all => all.map(x => parseFloat(getComputedStyle(x).fontSize))")
    assert min(sizes) >= 11


@pytest.mark.browser
def test_without_a_script_the_drawing_stays(page_of):
    page = page_of(scripts=False)
    assert page.locator("figure svg:visible").count() == 1
    assert page.locator("input, button").count() == 0
