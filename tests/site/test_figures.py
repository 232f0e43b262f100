"""Figures as the built pages carry them: the same to look at, and alive with data that lie in a file."""

import base64
import io
import json
import re

import numpy as np
import pytest
from documents import SITE
from pages import figures as carried
from PIL import Image

plt = pytest.importorskip("matplotlib.pyplot")

from nondual import figures  # noqa: E402


@pytest.fixture(scope="module")
def drawing():
    """A figure with what drawings have: ticks, a grid, words, marks, an area, a picture, and parts that are cut off."""
    figures.style()
    fig, (first, second) = plt.subplots(1, 2, figsize=(6, 2.5))
    first.plot([0, 1, 2.5, 3], [1, 10, 35, 1000], "o-", label="rising")
    first.fill_between([0, 3], [1, 1], [5, 50], alpha=0.3, edgecolor="black")
    first.set(yscale="log", xlabel="$x_1$", title="left of two", xlim=(0.2, 2.9))
    first.grid(alpha=0.3)
    first.legend()
    second.imshow([[0.0, 0.5], [1.0, 0.2]])
    second.scatter([0, 1], [0, 1], facecolors="none", edgecolors="white")
    second.text(0, 1, "turned", rotation=30, color="white")
    return figures.show(fig, name="all", alt="All kinds.", caption="All kinds.")


def test_a_lighter_figure_looks_the_same(drawing, browser):
    light = carried.lighter(drawing)
    count = [len(re.findall("<[a-z]", text)) for text in (drawing, light)]
    assert len(light) < 0.8 * len(drawing) and count[1] < 0.75 * count[0]
    page = browser.new_page(viewport={"width": 700, "height": 420})
    shots = []
    for html in (drawing, light):
        page.set_content(f"<style>svg text {{ font-family: sans-serif !important }}</style>{html}")
        shots.append(page.screenshot())
    page.close()
    assert shots[0] == shots[1]


def test_what_has_no_effect_goes_and_the_rest_stays():
    opening = '<svg viewBox="0 0 1 1" xmlns:xlink="x">'

    def light(inside):
        return carried.lighter(f"{opening}{inside}</svg>").removeprefix(opening).removesuffix("</svg>")

    assert (
        light('<g> <g clip-path="url(#a)"> <g/> <g> <use x="1"/> </g> </g> </g>')
        == '<g clip-path="url(#a)"><g/><use x="1"/></g>'
    )
    assert light('<path d="M 0 1 " style="fill: none"/> <defs> </defs>') == ""
    assert light('<g style="stroke: red"> <path d="M 0 1 " style="fill: none"/> </g>').count("<path") == 1
    assert light('<path d="M 0 1 L 2.50 3.00 L 10 -4.05 z M 7 7 L 8 100 C 1 2 3 4 5 6 L 1 1 "/>') == (
        '<path d="M0 1 2.5 3 10 -4.05zM7 7 8 100C1 2 3 4 5 6L1 1"/>'
    )
    face = "font-family: 'A B', serif; "
    words = (
        f'<text style="font-size: 9px; {face}fill: red" x="1" transform="rotate({{}} 1 2)">a <tspan>b</tspan> c</text>'
    )
    assert light(words.format("-0")) == '<text style="font-size: 9px; fill: red" x="1">a <tspan>b</tspan> c</text>'
    assert "rotate(-0.5 1 2)" in light(words.format("-0.5")) and "rotate(90 1 2)" in light(words.format("90"))
    assert carried.lighter("<svg><g><path/></g></svg>") == "<svg><g><path/></g></svg>"  # an icon, not a drawing


def a_live_figure(script="ring", **data):
    figures.style()
    fig, _ = plt.subplots(figsize=(2, 1))
    return figures.live(fig, script=script, data=data, name="x-y", alt="Alt.", caption="Words.")


def test_large_data_go_into_a_file_and_small_ones_stay():
    small, large = a_live_figure(numbers=[1.5]), a_live_figure(numbers=list(range(9000)), less="a<b")
    assert carried.with_data_apart(small) == (small, {})
    html, files = carried.with_data_apart(small + large + small)
    assert html.startswith(small) and html.endswith(small) and len(html) < 3 * len(small)
    assert 'id="x-y" data-live="ring" data-from="figures/x-y.json">' in html.removeprefix(small)
    assert list(files) == ["figures/x-y.json"]
    assert json.loads(files["figures/x-y.json"]) == {"numbers": list(range(9000)), "less": "a<b"}


def test_each_file_that_a_figure_fetches_is_there_and_keeps_its_page_short(pages):
    found = 0
    for name, page in pages.items():
        for at in re.findall(r'data-from="([^"]*)"', page.text):
            found += bool(json.loads((SITE / name).parent.joinpath(at).read_text(encoding="utf-8")))
        data = re.findall(r'<script type="application/json" class="data">(.*?)</script>', page.text)
        assert all(len(each) <= carried.LARGEST for each in data), name
    assert found >= 2


@pytest.mark.parametrize("name", ["essay/heads/", "essay/self_attention/"])
def test_a_figure_whose_data_lie_in_a_file_comes_alive(browser, site, name):
    page = browser.new_page()
    page.goto(site + name)
    page.wait_for_selector("figure[data-from].alive", timeout=30_000)
    page.close()


def test_without_its_file_the_drawing_stays(browser, site):
    page = browser.new_page()
    page.route("**/figures/*.json", lambda route: route.fulfill(status=404))
    with page.expect_console_message(lambda said: "figures/map-of-heads.json: 404" in said.text):
        page.goto(f"{site}essay/heads/")
    assert page.locator("figure[data-from] > .plate svg, figure[data-from] > .plates svg").count()
    page.close()


def test_pictures_in_a_drawing_become_webp_without_loss_or_as_photographs_are_kept():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(noise[:8, :8]).resize((128, 128), Image.Resampling.BICUBIC))
    flat = np.kron(noise[:16, :16], np.ones((8, 8, 1), dtype=np.uint8))
    flat[:, :, 0] = noise[0, 0, 0]
    for pixels, exact in ((np.tile(flat, (4, 4, 1)), True), (smooth, False)):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=0)
        png = base64.b64encode(file.getvalue()).decode()
        svg = f'<svg viewBox="0 0 9 9" xmlns:xlink="x"><image xlink:href="data:image/png;base64,{png}"/></svg>'
        short = carried.lighter(svg)
        webp = re.search(r"data:image/webp;base64,([^\"]+)", short)
        assert webp and len(short) < len(svg) / 2
        got = np.asarray(Image.open(io.BytesIO(base64.b64decode(webp[1]))).convert("RGB")).astype(int)
        off = abs(got - pixels).mean()
        assert off == 0 if exact else 0 < off < 6
