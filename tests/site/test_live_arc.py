"""Home's interactive figure: what is read beside each table is the row that torch computed."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib").use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from nondual import figures  # noqa: E402

TOKENS = ["a", "b", "c", "d", "e"]


@pytest.fixture
def figure(live_page):
    """A function that opens a page with one such figure over random tables, and the tables."""
    torch.manual_seed(0)
    tables = [torch.randn(4, 5).softmax(-1), torch.randn(5, 5).softmax(-1), torch.rand(5, 5).tril()]
    panels = [{"title": f"20{14 + i}: way {i}", "note": "so", "rows": table.tolist()} for i, table in enumerate(tables)]
    figures.style()
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.imshow(tables[1])
    data = {"tokens": TOKENS, "start": 2, "panels": panels}
    html = figures.live(fig, script="arc", data=data, name="arc", alt="three tables", caption="Three tables.")
    return live_page(html), tables


@pytest.mark.browser
def test_each_word_reads_its_row_by_mouse_and_by_keyboard(figure):
    opened, tables = figure
    page = opened()
    for i, token in enumerate(TOKENS):
        button = page.get_by_role("button", name=token, exact=True)
        button.click() if i % 2 else button.press("Enter")
        assert button.get_attribute("aria-pressed") == "true"
        read = page.locator(".reading").all_inner_texts()
        assert read[0] == "none of these words asks"
        for text, table in zip(read[1:], tables[1:], strict=True):
            share = table[i] / table[i].sum()
            assert text == f"most from {TOKENS[int(share.argmax())]}: {round(100 * share.max().item())}%"
    page.wait_for_function("document.querySelector('.spoken').textContent.startsWith('What “e” takes most from.')")
    assert page.locator("button[aria-pressed=true]").count() == 1


@pytest.mark.browser
def test_without_a_script_the_drawing_stays(figure):
    page = figure[0](scripts=False)
    assert page.locator("figure svg").is_visible() and page.locator("button").count() == 0
