"""Home's interactive figure: what is read beside each table is the row that torch computed."""

import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib").use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from nondual import figures  # noqa: E402

LIVE = Path(__file__).parent.parent.parent / "docs" / "assets" / "js" / "live"
TOKENS = ["a", "b", "c", "d", "e"]


@pytest.fixture
def figure(browser, serve, small):
    """A page with one such figure over random tables: the page, and the tables."""
    torch.manual_seed(0)
    tables = [torch.randn(4, 5).softmax(-1), torch.randn(5, 5).softmax(-1), torch.rand(5, 5).tril()]
    panels = [{"title": f"20{14 + i}: way {i}", "note": "so", "rows": table.tolist()} for i, table in enumerate(tables)]
    figures.style()
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.imshow(tables[1])
    data = {"tokens": TOKENS, "start": 2, "panels": panels}
    html = figures.live(fig, script="arc", data=data, name="arc", alt="three tables", caption="Three tables.")
    folder = small(html + '<script type="module" src="live/start.js"></script>')
    shutil.copytree(LIVE, folder / "live")
    with serve(folder) as address:
        context = browser.new_context(viewport={"width": 390, "height": 844})
        context.set_default_timeout(30_000)
        page = context.new_page()
        page.goto(address)
        yield page, tables
        context.close()


@pytest.mark.browser
def test_each_word_reads_its_row_by_mouse_and_by_keyboard(figure):
    page, tables = figure
    page.wait_for_selector("figure.alive")
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
def test_without_a_script_the_drawing_stays(browser, figure):
    address = figure[0].url
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator("figure svg").is_visible() and page.locator("button").count() == 0
    context.close()
