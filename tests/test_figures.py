"""nondual.figures: what a page needs of a drawing."""

import json
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("matplotlib").use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from nondual import figures  # noqa: E402


@pytest.fixture(autouse=True)
def own_style():
    with plt.rc_context():
        figures.style()
        yield
    plt.close("all")


def drawn(name="heads", **given):
    fig, (left, right) = plt.subplots(1, 2)
    figures.attention(left, torch.eye(3), ["a", "b", "c"])
    right.plot([0, 1], [1, 0], color="black")
    right.scatter([0.5], [0.5])
    right.set_title("saṃskāra & co")
    return figures.show(fig, **{"name": name, "alt": 'a "diagonal"', "caption": "A diagonal."} | given)


def test_the_same_drawing_gives_the_same_bytes():
    assert drawn() == drawn()


def test_ids_are_numbered_and_so_the_same_in_every_process():
    """matplotlib names a clip path by its address in memory."""
    fig, ax = plt.subplots()
    (line,) = ax.plot([0, 1], [1, 0])
    line.set_clip_path(plt.Circle((0.5, 0.5), 0.2, transform=ax.transData))
    html = figures.show(fig, **WORDS)
    referenced = re.findall(r'(?:url\(#|href="#)([^")]+)', html)
    assert "clipPath" in html and set(referenced) == {f"pair-id{i + 1}" for i in range(len(set(referenced)))}


def test_text_is_text_and_black_is_the_ink_of_the_page():
    html = drawn()
    assert ">saṃskāra &amp; co</text>" in html
    assert "currentColor" in html and not re.search("#000000|#010101|<metadata|<!DOCTYPE", html)


def test_it_brings_no_style_sheet_and_its_lines_still_join_round():
    """The style sheet is the one that matplotlib writes today: where that changes, `figures._inline` has to follow."""
    assert "<style" not in drawn() and 'stroke-linejoin="round"' in drawn()


def test_it_is_named_and_described():
    html = drawn()
    assert 'id="heads"' in html and 'role="img"' in html
    assert 'aria-label="a &quot;diagonal&quot;"' in html and "<figcaption>A diagonal.</figcaption>" in html


def test_two_figures_of_a_page_share_no_id_and_every_reference_has_its_own():
    first, second = drawn("first"), drawn("second")
    ids = re.findall(r' id="([^"]+)"', first + second)
    assert len(ids) == len(set(ids))
    for html in (first, second):
        referenced = re.findall(r'(?:url\(#|href="#)([^")]+)', html)
        assert referenced and set(referenced) <= set(re.findall(r' id="([^"]+)"', html))


def test_queries_are_rows_and_keys_are_columns_from_the_top_left():
    _, ax = plt.subplots()
    figures.attention(ax, torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]]), ["q0", "q1"], ["k0", "k1", "k2"])
    assert ax.yaxis_inverted() and not ax.xaxis_inverted()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["q0", "q1"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["k0", "k1", "k2"]


def test_labels_must_match_the_weights():
    _, ax = plt.subplots()
    with pytest.raises(ValueError, match=r"\(queries, keys\) = \(2, 2\), got \(3, 3\)"):
        figures.attention(ax, torch.eye(3), ["a", "b"])


@pytest.mark.parametrize("given, told", [({"name": "Bad name"}, "name must be"), ({"alt": " "}, "finding in words")])
def test_a_figure_without_name_or_words_is_refused(given, told):
    with pytest.raises(ValueError, match=told):
        drawn(**given)


def test_without_matplotlib_one_sentence_says_what_to_install():
    program = "import sys; sys.modules['matplotlib'] = None; from nondual import figures; figures.style()"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert run.returncode == 1
    assert "ImportError: nondual.figures draws with matplotlib: pip install 'nondual[figures]'." in run.stderr


def frames(count):
    made = []
    for number in range(count):
        fig, ax = plt.subplots()
        ax.plot([0, number])
        made.append((f"tile {number + 1}", fig))
    return made


def test_steps_show_one_plate_a_button_and_the_first_is_chosen():
    html = figures.steps(frames(3), name="walk", alt="It grows.", caption="It grows.")
    assert html.count('type="radio" name="walk"') == html.count("<svg") == html.count("<label") == 3
    assert html.count(" checked") == 1 and html.index(" checked") < html.index("walk-2")
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("count", [0, 13])
def test_steps_are_one_to_twelve(count):
    with pytest.raises(ValueError, match=f"frames must be 1 to 12, got {count}"):
        figures.steps(frames(count), name="walk", alt="It grows.", caption="It grows.")


def panel(width=3.0):
    fig, ax = plt.subplots(figsize=(width, 2))
    ax.plot([0, 1], [1, 0])
    return fig


WORDS = {"name": "pair", "alt": "two lines fall", "caption": "Two lines fall."}


def test_panels_are_drawings_of_their_own_under_one_description():
    html = figures.show([panel(), panel()], **WORDS)
    assert html.count("<svg") == 2 and html.count('aria-label="two lines fall"') == 1
    assert html.count('aria-hidden="true"') == 2
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids)) and not plt.get_fignums()
    with pytest.raises(ValueError, match="at least one panel"):
        figures.show([], **WORDS)


def test_a_figure_for_a_phone_stands_beside_the_wide_one():
    html = figures.show(panel(6), phone=panel(3), **WORDS)
    wide, narrow = re.findall(r"--natural:(\d+)px", html)
    assert (wide, narrow) == ("576", "288") and html.index('class="roomy"') < html.index("narrow")
    assert not plt.get_fignums()


def test_an_interactive_figure_carries_its_drawing_and_its_numbers():
    html = figures.live(panel(), script="ask", data={"words": ["</script>", "प्रकाश"], "w": [0.25]}, **WORDS)
    assert 'data-live="ask"' in html and html.count("<svg") == 1
    (inside,) = re.findall('<script type="application/json" class="data">(.*?)</script>', html)
    assert json.loads(inside) == {"words": ["</script>", "प्रकाश"], "w": [0.25]}
    with pytest.raises(ValueError, match="lower-case"):
        figures.live(panel(), script="../ask", data={}, **WORDS)
    with pytest.raises(ValueError):
        figures.live(panel(), script="ask", data={"x": float("nan")}, **WORDS)


def compared(**changes):
    """What an experiment on two tasks found for two arms, as benchmarks/proposals.py writes it."""
    row = {"mean": -0.05, "interval": [-0.07, -0.03], "p": 0.001, "is": "worse as named", "remains with Holm": True}
    text = {"mean": 0.002, "interval": [-0.004, 0.008], "p": 0.4, "is": "equivalent", "remains with Holm": False}
    return {"a less base": {"copy": row | changes, "Gita": text}, "b less base": {"copy": row}}


def test_differences_are_drawn_in_units_of_the_effects_that_were_named():
    first, second = figures.differences(compared(), {"a less base": "a", "b less base": "b"})
    ax, above = first.axes
    lines = [line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_color() != "black"]
    assert [[round(x, 6) for x in line.get_xdata()] for line in lines] == [[-3.5, -1.5], [-0.4, 0.8]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["copy", "Gita"]
    ticks = dict(zip(ax.get_xticks(), zip(*([t.get_text() for t in x.get_xticklabels()] for x in (ax, above)))))
    assert ticks[1] == ("+2", "+0.01") and ticks[0] == ("0", "0") and ticks[-1] == ("−2", "−0.01")
    assert ax.get_xlim() == above.get_xlim() == second.axes[0].get_xlim()
    assert (ax.get_title("left"), second.axes[0].get_title("left"), len(second.axes)) == ("a", "b", 1)
    assert set(ax.get_xticks()) == {-5, -1, 0, 1, 5}
    wide = compared(mean=-0.3, interval=[-0.4, -0.2])
    assert set(figures.differences(wide, ["a less base"])[0].axes[0].get_xticks()) == {-10, -1, 0, 1, 10}
    band = ax.patches[0]
    assert (band.get_x(), band.get_x() + band.get_width()) == (-1, 1)


def test_differences_show_the_word_and_whether_it_remains():
    panels = figures.differences(compared(), ["a less base"])
    (worse, equivalent) = (line for line in panels[0].axes[0].lines if line.get_marker() not in ("None", None))
    assert (worse.get_marker(), equivalent.get_marker()) == ("<", "o")
    assert worse.get_markerfacecolor() == figures.OKABE_ITO[3] and equivalent.get_markerfacecolor() == "none"
    for word in ("better", "better as named", "worse", "equivalent", "not decided"):
        figures.differences(compared(**{"is": word}), ["a less base"])


def test_differences_that_were_not_found_are_refused():
    with pytest.raises(ValueError, match="at least one comparison"):
        figures.differences(compared(), [])
    with pytest.raises(ValueError, match="arms must be among a less base, b less base, got c"):
        figures.differences(compared(), ["c"])
    with pytest.raises(ValueError, match="got a"):
        figures.differences({"a": {}}, ["a"])
