"""Ask the sentence: the percentages beside the words are the weights that torch computed, in whole percents."""

import re
import string

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib").use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from nondual import figures  # noqa: E402

DIGITS = string.digits + string.ascii_letters + "".join(map(chr, range(0xC0, 0xE7)))
TEXTS = {"the cat saw the cow": 2, "it was warm": 1}  # and which of its words is chosen at first
TOKENS = [["start", *text.split(), "end"] for text in TEXTS]
LAYERS, HEADS = 2, 3
PRESETS = [
    {"label": "one", "layer": 1, "head": 2, "sentence": 0, "word": 5},
    {"label": "another", "layer": 0, "head": 1},
    {"label": "the other sentence", "layer": 0, "head": 0, "sentence": 1, "word": 3},
]


@pytest.fixture
def figure(live_page):
    """A page with the figure over random weights: a function that opens it, and the weights (L, H, N, N)."""
    torch.manual_seed(0)
    weights = [(3 * torch.randn(LAYERS, HEADS, len(tokens), len(tokens))).softmax(-1) for tokens in TOKENS]
    weights[0][1, 2, 5] = torch.eye(7)[1]  # all to one word: 100 percent is a digit too
    rows = ["".join(DIGITS[round(100 * w)] for w in table[:, :, 1:-1].flatten().tolist()) for table in weights]
    sentences = [
        {"text": text, "tokens": tokens, "start": start, "rows": given}
        for (text, start), tokens, given in zip(TEXTS.items(), TOKENS, rows, strict=True)
    ]
    data = {"digits": DIGITS, "layers": LAYERS, "heads": HEADS, "sentences": sentences, "presets": PRESETS}
    figures.style()
    html = figures.live(plt.figure(figsize=(3, 2)), script="ask", data=data, name="ask", alt="weights", caption="So.")
    return live_page(html, styled=True), weights


def shown(page):
    return [int(share.strip().removesuffix("%")) for share in page.locator(".ask-line .share").all_text_contents()]


def percents(row):
    return [round(100 * w) for w in row.tolist()]


def set_to(page, name, value):
    """Move a range with the keyboard."""
    slider = page.get_by_role("slider", name=name)
    slider.press("Home")
    for _ in range(value):
        slider.press("ArrowRight")


@pytest.mark.browser
def test_every_word_and_head_shows_its_own_weights_and_says_the_largest(figure):
    opened, weights = figure
    page = opened()
    for number, (text, first) in enumerate(TEXTS.items()):
        page.get_by_label("Sentence", exact=True).select_option(text)
        words = page.get_by_role("group", name="A word of the sentence").get_by_role("button")
        assert words.count() == len(TOKENS[number]) - 2
        assert words.nth(first - 1).get_attribute("aria-pressed") == "true"
        for layer in range(LAYERS):
            for head in range(HEADS):
                set_to(page, "Layer", layer)
                set_to(page, "Head", head)
                for i in range(words.count()):
                    words.nth(i).click() if i % 2 else words.nth(i).press("Enter")
                    assert shown(page) == percents(weights[number][layer, head, i + 1])
                    said = page.locator(".said").inner_text()
                    assert f"In layer {layer}, head {head}, " in said
                    assert f" gives {max(shown(page))}% of its attention to " in said
                    assert page.locator("path.arc").count() == sum(share > 0 for share in shown(page))
    page.wait_for_function(
        "document.querySelector('.spoken').textContent.startsWith('In layer 1, head 2, “warm” gives')"
    )


@pytest.mark.browser
def test_words_that_stand_twice_are_told_apart_and_markers_are_no_buttons(figure):
    page = figure[0]()
    page.get_by_role("group", name="A word of the sentence").get_by_role("button").nth(3).click()
    assert "the second “the” gives" in page.locator(".said").inner_text()
    assert page.get_by_role("button", name=re.compile("^(start|end)")).count() == 0
    assert page.locator(".ask-line .marker").all_text_contents()[0].startswith("start")


@pytest.mark.browser
def test_a_preset_sets_the_head_and_what_it_names_and_keeps_the_rest(figure):
    opened, weights = figure
    page = opened()
    assert shown(page) == percents(weights[0][1, 2, 5]) == [0, 100, 0, 0, 0, 0, 0]  # the first preset is the first view
    page.get_by_role("button", name="another").press("Space")
    assert shown(page) == percents(weights[0][0, 1, 5])
    assert page.get_by_role("slider", name="Layer").input_value() == "0"
    assert page.get_by_role("slider", name="Head").input_value() == "1"
    page.get_by_role("button", name="the other sentence").click()
    assert shown(page) == percents(weights[1][0, 0, 3])
    assert page.get_by_label("Sentence", exact=True).input_value() == "it was warm"
    found = page.get_by_role("group", name="Heads that we found")
    assert found.locator("[aria-pressed=true]").all_inner_texts() == ["the other sentence"]
    set_to(page, "Head", 2)
    assert found.locator("[aria-pressed=true]").count() == 0


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1440])
def test_it_fits_the_screen_in_a_line_or_in_a_column(figure, width):
    page = figure[0](width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    tops = page.locator(".ask-line button").evaluate_all("all => new Set(all.map(b => b.offsetTop)).size")
    words = page.locator(".ask-line button").count()
    assert tops in (1, words)
    page.set_viewport_size({"width": 230, "height": 844})
    page.wait_for_selector(".ask-line.column")
    sizes = page.locator(".stage *").evaluate_all("all => all.map(x => parseFloat(getComputedStyle(x).fontSize))")
    assert min(sizes) >= 11


@pytest.mark.browser
def test_without_a_script_the_drawing_stays(figure):
    page = figure[0](scripts=False)
    assert page.locator("figure svg").is_visible() and page.locator("button").count() == 0
