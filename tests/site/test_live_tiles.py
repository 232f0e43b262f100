"""The tile scrubber of the flash-attention chapter: every number that the browser shows is the one torch computes."""

import json
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib").use("Agg")

from nondual.ops.flash_attention import reference  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "essay" / "flash_attention.md"


@pytest.fixture(scope="module")
def drawn(figure_in):
    """The figure as the chapter's own code prints it."""
    return figure_in(PAGE, "tiles")


@pytest.fixture
def page_of(live_page, drawn):
    """A function that opens a page with that figure, with or without scripts."""
    return live_page(drawn)


def expected(data, forget):
    """For each tile: m, l, output, error against softmax over the keys so far, factor and what the tile adds to l."""
    scores, values = (torch.tensor(data[name], dtype=torch.float64) for name in ("scores", "values"))
    n, steps = len(scores), []
    one = torch.eye(n, dtype=torch.float64)[None, None]
    reference.flash_attention(scores[None, None], one, values[None, None], tile=(n, data["tile"]), trace=steps.append)
    out, m_before, l, a = [], torch.full((n,), -torch.inf, dtype=torch.float64), 0.0, 0.0
    for step in steps:
        s, m = step.scores[0, 0], step.highest[0, 0]
        p = (s - m[:, None]).exp()
        factor = torch.ones(n, dtype=torch.float64) if forget else (m_before - m).exp()
        l = factor * l + p.sum(-1)
        a = factor[:, None] * a + p @ values[step.keys.start : step.keys.stop]
        if not forget:
            torch.testing.assert_close(l, step.total[0, 0])
            torch.testing.assert_close(a, step.accumulator[0, 0])
        exact = scores[:, : step.keys.stop].softmax(-1) @ values[: step.keys.stop]
        output = a / l[:, None]
        out.append((m, l, output, (output - exact).abs().amax(-1), factor, p.sum(-1)))
        m_before = m
    return out


def printed(x, digits=2):
    return f"{x:.{digits}f}".replace("-", "−")


@pytest.mark.browser
def test_every_number_is_torchs_at_each_tile_for_each_query_with_and_without_rescaling(page_of, drawn):
    data = json.loads(re.search(r'class="data">(.*?)</script>', drawn)[1])
    page = page_of()
    tile, forget = page.get_by_label("Tile"), page.get_by_label("forget the rescaling")
    query = page.get_by_label("Query")
    tokens = query.locator("option").all_inner_texts()
    assert tokens == data["tokens"]
    worst = []
    for forgetting in (False, True):
        if forgetting:
            forget.press("Space")
        tile.press("Home")
        before = None
        for number, (m, l, output, error, factor, added) in enumerate(expected(data, forgetting), 1):
            if number > 1:
                tile.press("ArrowRight")
            assert tile.get_attribute("aria-valuetext") == f"{number} of 4"
            for name, wanted in (("m", m), ("l", l), ("error", error)):
                shown = page.locator(f"td.{name}").all_inner_texts()
                assert shown == [printed(x.item()) for x in wanted]
            widths = page.evaluate(
                "[...document.querySelectorAll('td.output svg')].map((s) =>"
                "[...s.children].map((bar) => [bar.getAttribute('fill'), +bar.getAttribute('fill-opacity')]))"
            )
            most = expected(data, False)[-1][2].abs().max().item()
            for bars, row in zip(widths, output, strict=True):
                for (fill, opacity), x in zip(bars, row.tolist(), strict=True):
                    assert fill == ("#0072B2" if x < 0 else "#D55E00")
                    assert opacity == pytest.approx(min(1, abs(x) / most), abs=1e-12)
            for i, token in enumerate(tokens):
                query.select_option(index=i)
                working = page.locator(".working").inner_text()
                begins = ", ".join(printed(x, 3) for x in output[i, :3].tolist())
                assert working.startswith(f"“{token}”: m = {printed(m[i], 3)};")
                assert working.endswith(f" = {printed(l[i], 3)}. The output begins {begins}.")
                if before is not None:
                    rose = m[i] > before[0][i]
                    assert (f"it rose from {printed(before[0][i], 3)}, so" in working) == bool(rose)
                    sum_ = f"ℓ = {printed(factor[i], 3)} × {printed(before[1][i], 3)} + {printed(added[i], 3)}"
                    assert sum_ in working
                said = page.locator(".said > [aria-hidden]").inner_text()
                assert said.startswith(f"After tile {number} of 4, “{token}” has read {3 * number} of 12 keys.")
                off = "is exact for these keys" if error[i] < 0.005 else f"is off by {printed(error[i])}"
                assert f"Its output {off}" in said
                wrong = int((error >= 0.005).sum())
                assert said.endswith(
                    f"{wrong} of 12 outputs are wrong, that of “{tokens[int(error.argmax())]}” most, "
                    f"by {printed(error.max())}."
                    if wrong
                    else ", like every other."
                )
            worst.append(error.max().item())
            before = m, l
    assert max(worst[:4]) < 1e-12 and worst[4] < 1e-12 < worst[5] < worst[6] < worst[7]  # forgotten, it grows


@pytest.mark.browser
def test_a_row_can_be_clicked_and_the_sentence_is_spoken_once_the_reader_stops(page_of):
    page = page_of()
    page.locator("table.tiles tbody tr").nth(2).click()
    assert page.get_by_label("Query").input_value() == "cat"
    assert page.locator("tr.chosen th").inner_text() == "cat"
    page.wait_for_function("document.querySelector('.spoken').textContent.startsWith('After tile 1 of 4, “cat”')")
    assert page.locator("[aria-live=polite] .spoken").count() == 1
    page.get_by_label("Tile").press("End")
    assert page.locator("td.here").count() == 3 * 12 and page.locator("td.dropped").count() == 9 * 12


@pytest.mark.browser
def test_without_a_script_the_drawing_stays(page_of):
    page = page_of(scripts=False)
    assert page.locator("figure svg").first.is_visible()
    assert page.locator("input, select").count() == 0
