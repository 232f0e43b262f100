"""Hold or forget, the Mamba chapter's figure: states, matrices and sentence are what torch computes from the gates."""

import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib").use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from nondual import figures  # noqa: E402
from nondual.ops.selective_scan import selective_scan  # noqa: E402

X = [0.3, -0.5, 0.2, 0.9, -0.4, 0.6]
READ = [0.06, 0.03, 0.29, 0.07, 0.381, 0.165]
PRESETS = [
    {"name": "hold input 2", "gates": [0, 1, 0, 0, 0, 0], "read": False},
    {"name": "all open", "gates": [1] * 6, "read": False},
    {"name": "all closed", "gates": [0] * 6, "read": False},
    {"name": "trained", "gates": READ, "read": True},
]
DATA = {"x": X, "step": 0.2, "text": [".", "c", ".", "a", ".", "?"], "presets": PRESETS}


@pytest.fixture
def page_of(live_page):
    """A function that opens a page with one such figure, with or without scripts."""
    figures.style()
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.bar(range(6), X)
    html = figures.live(fig, script="hold", data=DATA, name="hold", alt="six inputs", caption="Six inputs.")
    return live_page(html)


def told(gates):
    """The state after each step, and what is left at each step (row) of each input: the scan of one state."""
    gates = torch.tensor(gates, dtype=torch.float64)
    inputs = torch.cat([torch.tensor([X], dtype=torch.float64), torch.eye(len(X), dtype=torch.float64)])[..., None]
    delta = -torch.log1p(-gates.clamp(max=1 - 1e-15)).expand(len(inputs), -1)[..., None]
    one = torch.ones(1, 1, dtype=torch.float64)
    h, _ = selective_scan(inputs, delta, -one, one, one, discretization="zoh")
    return h[0, :, 0], h[1:, :, 0].T


def shown(page):
    return page.locator(".said > [aria-hidden]").inner_text()


def number(x):
    return f"{x:.2f}".replace("-", "−")


def colours(page, weights):
    """The colours that the figures' own scale gives these weights."""
    script = "async (w) => { const { cividis } = await import('/assets/js/live/core.js'); return w.map(cividis); }"
    return page.evaluate(script, weights)


def check(page, gates, step):
    """Everything that the page shows for these gates and this step of the twin."""
    (h, left), (twin, twin_left) = told(gates), told([step] * len(X))
    labels = page.locator(".hold-strip .spoken").all_inner_texts()
    for t, label in enumerate(labels):
        assert label == f"Input {t + 1}: {number(X[t])}; gate {number(gates[t])}; state {number(h[t])}; " + (
            f"the twin's {number(twin[t])}"
        )
    assert page.locator(".end").all_inner_texts() == [f"at the end h = {number(v)}" for v in (h[-1], twin[-1])]
    for at, (states, weights) in enumerate(((h, left), (twin, twin_left))):
        panel = page.locator(".panel").nth(at)
        bars = panel.locator(".states rect").evaluate_all(
            "(all) => all.map((b) => [+b.getAttribute('y'), +b.getAttribute('height')])"
        )
        for (top, height), state in zip(bars, states.tolist(), strict=True):
            assert height == pytest.approx(abs(state) / 0.9, abs=1e-9)
            assert top == pytest.approx(min(0, -state / 0.9), abs=1e-9)
        fills = panel.locator(".matrix rect:not(.chosen)").evaluate_all(
            "(all) => all.map((c) => c.getAttribute('fill'))"
        )
        rows, columns = torch.tril_indices(len(X), len(X))
        expected = ["none"] * len(X) ** 2
        for place, colour in zip(
            (rows * len(X) + columns).tolist(), colours(page, weights[rows, columns].tolist()), strict=True
        ):
            expected[place] = colour
        assert shades(fills) == pytest.approx(shades(expected), abs=1)
    last = left[-1]
    said = shown(page)
    if last.max() == 0:
        assert said == "All gates are closed: no input has entered, and the state stays zero."
        return said
    top = int(last.argmax())
    assert f"At the end the gates have left {last[top]:.0%} of input {top + 1}, more than of any other." in said
    assert f"The twin, with g = {step:.2f}, has left {twin_left[-1, top]:.0%} of it." in said
    off = torch.stack([(told([i / 100] * len(X))[1][-1] - last).abs() for i in range(1, 101)])
    best = int(off.amax(1).argmin())
    if off[best].max() < 0.005:
        assert said.endswith(f"With g = {(best + 1) / 100:.2f} it weighs every input as the gates do.")
    else:
        where = int(off[best].argmax())
        assert said.endswith(
            f"No single step weighs the inputs as the gates do: the nearest, g = {(best + 1) / 100:.2f}, is off by "
            f"{100 * off[best, where]:.0f} percentage points for input {where + 1}."
        )
    return said


def shades(fills):
    """Red, green and blue of each; -9 for what is not filled."""
    return [float(part) for fill in fills for part in re.findall(r"[\d.]+", fill) or (-9, -9, -9)]


@pytest.mark.browser
def test_each_preset_shows_torchs_states_and_matrices(page_of):
    page = page_of()
    for preset in PRESETS:
        button = page.get_by_role("button", name=preset["name"], exact=True)
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        said = check(page, preset["gates"], 0.2)
        heads = page.locator(".hold-strip button .token").all_inner_texts()
        assert heads == (DATA["text"] if preset["read"] else list("123456"))
        behind, elsewhere = (0.29 + 0.381) / 2, (0.06 + 0.03 + 0.07 + 0.165) / 4
        its = f"Its gate is {behind:.2f} on average just after a letter, and {elsewhere:.2f} elsewhere. "
        assert said.startswith(its) == preset["read"]


@pytest.mark.browser
def test_gates_open_and_close_by_mouse_and_by_keyboard_and_the_twins_step_by_its_range(page_of):
    page = page_of()
    gates, places = [0, 1, 0, 0, 0, 0], page.locator(".hold-strip button")
    page.get_by_role("button", name="Input 4: 0.90; gate 0.00; state −0.50; the twin's").click()
    gates[3] = 1
    check(page, gates, 0.2)
    assert page.locator(".controls [aria-pressed=true]").count() == 0  # the gates are no preset any more
    places.nth(3).press("Enter")
    places.nth(1).press("Space")
    check(page, [0] * 6, 0.2)
    page.get_by_role("button", name="trained").press("Enter")
    places.nth(0).press("Space")
    check(page, [1, *READ[1:]], 0.2)
    assert not shown(page).startswith("Its gate")
    twin = page.get_by_label("Twin's step g")
    twin.press("ArrowRight")
    assert twin.get_attribute("aria-valuetext") == "0.21"
    check(page, [1, *READ[1:]], 0.21)
    twin.press("End")
    check(page, [1, *READ[1:]], 1)
    page.wait_for_function("(text) => document.querySelector('.said .spoken').textContent === text", arg=shown(page))
    assert page.locator("[aria-live=polite]").count() == 1


@pytest.mark.browser
def test_without_a_script_the_drawing_stays(page_of):
    page = page_of(scripts=False)
    assert page.locator("figure svg").is_visible() and page.locator("button, input").count() == 0
