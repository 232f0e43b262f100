"""What N numbers remember, the Mamba chapter's figure: state, drawing and loss are those of nondual's HiPPO-LegT."""

import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib").use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from nondual import figures  # noqa: E402
from nondual.efficient_attention.hippo import legt_states, reconstruct  # noqa: E402

SIZES, WINDOW, LENGTH, RATE = [2, 4, 8, 16, 32, 64], 160, 400, 80


@pytest.fixture
def signal():
    """Slow and fast swings with noise."""
    t = torch.arange(LENGTH).double() / RATE
    noise = torch.randn(LENGTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((3 * t).sin() + (11 * t).sin() / 2 + 0.3 * noise).round(decimals=3)


@pytest.fixture
def page_of(live_page, signal):
    """A function that opens a page with one such figure, with or without scripts."""
    figures.style()
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.plot(signal)
    data = {
        "signal": signal.tolist(),
        "rate": RATE,
        "window": WINDOW,
        "sizes": SIZES,
        "start": {"now": 240, "size": 16},
    }
    html = figures.live(fig, script="remember", data=data, name="eeg", alt="a signal", caption="A signal.")
    return live_page(html)


def heights(page, name):
    """The heights of a curve's points."""
    path = page.locator(f".lately > svg .{name}").get_attribute("d")
    return torch.tensor([-float(y) for y in re.findall(r" (-?[\d.]+)", path)], dtype=torch.float64)


def check(page, signal, now, size):
    """Everything that the page shows of this state."""
    points = (torch.arange(WINDOW, dtype=torch.float64) + 0.5) / WINDOW
    state = legt_states(signal, size, WINDOW)[now - 1]
    was, guess = signal[now - WINDOW : now], reconstruct(state, points)
    torch.testing.assert_close(heights(page, "signal"), was, atol=6e-4, rtol=0)
    torch.testing.assert_close(heights(page, "drawn"), guess, atol=6e-4, rtol=0)
    bars = page.locator(".held rect").evaluate_all(
        "(all) => all.map((b) => +b.getAttribute('height') * (+b.getAttribute('y') < 0 ? 1 : -1))"
    )
    torch.testing.assert_close(torch.tensor(bars, dtype=torch.float64), state, atol=1e-9, rtol=0)
    lost = ((was - guess).square().sum() / was.square().sum()).sqrt()
    assert page.locator(".error").inner_text() == f"{lost:.0%} of the signal lost"
    assert page.locator(".said > [aria-hidden]").inner_text() == (
        f"At {now / RATE:.2f} s the state has been told {now} samples. Drawn from its {size} numbers alone, "
        f"the last 2 seconds lose {lost:.0%} of the signal (root mean square)."
    )
    assert page.get_by_label("now").get_attribute("aria-valuetext") == f"{now / RATE:.2f} s"
    return lost


@pytest.mark.browser
def test_what_is_drawn_from_each_state_is_what_torch_draws(page_of, signal):
    page = page_of()
    check(page, signal, 240, 16)
    lost = []
    for size in SIZES:
        button = page.get_by_role("button", name=str(size), exact=True)
        button.click() if size % 4 else button.press("Enter")
        assert button.get_attribute("aria-pressed") == "true"
        lost.append(check(page, signal, 240, size))
    assert lost == sorted(lost, reverse=True)


@pytest.mark.browser
def test_now_moves_by_keyboard_and_by_dragging(page_of, signal):
    page = page_of()
    now = page.get_by_label("now")
    for key, at in (("ArrowRight", 244), ("ArrowLeft", 240), ("Home", WINDOW), ("End", LENGTH)):
        now.press(key)
        check(page, signal, at, 16)
    box = now.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] - 4, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.up()
    assert abs(int(now.input_value()) - (WINDOW + LENGTH) / 2) < 20
    check(page, signal, int(now.input_value()), 16)
    spoken = (
        "document.querySelector('.spoken').textContent === document.querySelector('.said > [aria-hidden]').textContent"
    )
    page.wait_for_function(spoken)
    assert page.locator("[aria-live=polite]").count() == 1


@pytest.mark.browser
def test_without_a_script_the_drawing_stays(page_of):
    page = page_of(scripts=False)
    assert page.locator("figure svg").is_visible() and page.locator("button, input").count() == 0
