"""The figure of the Continuous Thought Machine: in the browser it thinks as it does in torch."""

import base64
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib").use("Agg")

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.ctm import ENOUGH, load  # noqa: E402
from nondual.data import fashion  # noqa: E402

PAGE = ROOT / "docs" / "essay" / "ctm.md"
WEIGHTS = ROOT / "docs" / "assets" / "models" / "ctm.safetensors"
TRAINED, TICKS, COUNT, FIRST = 8, 16, 18, 1000


@pytest.fixture(scope="module")
def drawn(figure_in):
    """The figure as the chapter's own code prints it."""
    return figure_in(PAGE, "ctm")


@pytest.fixture(scope="module")
def data(drawn):
    return json.loads(drawn.partition('class="data">')[2].partition("</script>")[0])


@pytest.fixture(scope="module")
def model():
    return load(WEIGHTS).double().eval()


@pytest.fixture(scope="module")
def every(data):
    """The first test pictures as the model gets them, and their labels."""
    test = fashion("test")
    return (test.images[:FIRST].double() - data["mean"]) / data["deviation"], test.labels[:FIRST]


@pytest.fixture(scope="module")
def chosen(model, every):
    """Which of them the page's rule chooses: at even distances in the order of the tick at which each is sure."""
    with torch.no_grad():
        sure = model(every[0]).certainties

    def order(i):
        reached = (sure[i] >= ENOUGH).nonzero()
        return (reached[0].item() if len(reached) else TRAINED, -sure[i, -1].item())

    ranked = sorted(range(FIRST), key=order)
    return [ranked[int((i + 0.5) * FIRST / COUNT)] for i in range(COUNT)]


@pytest.fixture
def page_of(live_page, drawn, tmp_path):
    """A function that opens a page with that figure, with or without scripts, and with or without its weights."""
    opened = live_page(drawn, styled=True)

    def with_weights(*, scripts=True, weights=True, width=390):
        (tmp_path / "assets" / "models").mkdir(exist_ok=True)
        if weights:
            shutil.copyfile(WEIGHTS, tmp_path / "assets" / "models" / WEIGHTS.name)
        return opened(width, scripts=scripts)

    return with_weights


def thoughts_of(model, x):
    """Chances, certainties and the mean of the heads' weights at all ticks."""
    with torch.no_grad():
        found = model(x, ticks=TICKS, return_attention=True)
    return found.predictions.softmax(-1), found.certainties, found.attention.mean(2)


def said(page):
    return page.locator(".said > [aria-hidden]").inner_text()


def shares(page):
    """The percents of the ten bars."""
    return [int(x.rstrip("%")) for x in page.locator(".ctm-panels .share").all_text_contents()]


def loaded(page):
    page.get_by_role("button", name=re.compile("^Load")).press("Enter")
    page.wait_for_function("document.querySelector('.said').textContent.includes('The machine is loaded.')")
    return page


def go_to(page, tick):
    page.get_by_label("Tick").fill(str(tick))


# --- the numbers ---------------------------------------------------------------------------------------------------

THINK = """async ([pictures, ticks]) => {
    const { Machine } = await import("./assets/js/live/ctm.js");
    const { tensors } = await import("./assets/js/live/weights.js");
    const answer = await fetch("./assets/models/ctm.safetensors");
    const machine = new Machine(tensors(await answer.arrayBuffer()));
    return pictures.map((x) => machine.think(Float64Array.from(x), ticks)
        .map(({ chances, sure, looks }) => [chances, [sure], [...looks]]));
}"""


@pytest.mark.browser
def test_the_machine_in_the_page_thinks_as_in_torch(page_of, model, every):
    x = every[0][:2]
    found = page_of().evaluate(THINK, [x.flatten(1).tolist(), TICKS])
    wanted = thoughts_of(model, x)
    for i in range(2):
        for tick in range(TICKS):  # 1, 8 and 16 among them
            for now, right in zip(found[i][tick], wanted, strict=True):
                right = right[i, tick].reshape(-1)
                torch.testing.assert_close(torch.tensor(now, dtype=torch.float64), right, atol=1e-9, rtol=0)


def test_the_stored_numbers_are_torchs_of_pictures_chosen_by_the_rule(data, model, every, chosen):
    x, labels = every
    chances, sure, looks = thoughts_of(model, x[chosen])
    assert [picture["label"] for picture in data["pictures"]] == labels[chosen].tolist()
    assert data["threshold"] == ENOUGH and data["trained"] == TRAINED and data["ticks"] == TICKS
    for i, picture in enumerate(data["pictures"]):
        pixels = torch.tensor(list(base64.b64decode(picture["pixels"])), dtype=torch.float64)
        torch.testing.assert_close((pixels - data["mean"]) / data["deviation"], x[chosen[i]].flatten())
        torch.testing.assert_close(torch.tensor(picture["chances"]).double(), chances[i], atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(picture["sure"]).double(), sure[i], atol=1e-4, rtol=0)
        share = torch.tensor(list(base64.b64decode(picture["looks"]))).view(TICKS, 49) / 255
        torch.testing.assert_close(share * torch.tensor(picture["most"])[:, None], looks[i].float(), atol=1e-3, rtol=0)


def test_the_pictures_stand_in_the_order_that_the_page_names(data):
    """By the tick at which each is sure; then those that are not by tick 8, by their certainty there."""
    sure = [torch.tensor(picture["sure"]) for picture in data["pictures"]]
    ticks = [(each >= ENOUGH).nonzero().flatten().tolist() for each in sure]
    early = [each[0] + 1 for each in ticks if each and each[0] < TRAINED]
    last = [each[TRAINED - 1].item() for each in sure[len(early) :]]
    assert early == sorted(early) and 0 < len(early) < COUNT and max(last) < ENOUGH
    assert last == sorted(last, reverse=True)
    assert all(each[0] < TRAINED for each in ticks[: len(early)])


# --- the figure ----------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_sentence_bars_and_glow_are_those_of_the_picture_and_the_tick(page_of, data, model, every, chosen):
    page, names = page_of(weights=False), data["names"]
    chances, sure, looks = thoughts_of(model, every[0][chosen])
    labels, says = every[1][chosen].tolist(), chances.argmax(-1)
    for i in (0, 7, data["start"]["picture"], COUNT - 1):
        page.get_by_role("radio").nth(i).click()
        assert page.get_by_role("radio", checked=True).count() == 1
        for tick in (1, 8, 16):
            go_to(page, tick)
            t = tick - 1
            assert shares(page) == pytest.approx((100 * chances[i, t]).tolist(), abs=0.511)
            past = f", {tick - TRAINED} past its training" if tick > TRAINED else ""
            right = says[i, t] == labels[i]
            verdict = "and is right" if right else f"but the right answer is {names[labels[i]]}"
            share = round(100 * chances[i, t].max().item())
            stops = (sure[i] >= ENOUGH).nonzero()
            stop = "It is never sure enough to stop."
            if len(stops):
                when = stops[0].item() + 1
                early = (
                    "Sure enough to stop" if when <= TRAINED else "Not sure enough by tick 8; going on, it would stop"
                )
                stop = f"{early} at tick {when}, saying {names[says[i, stops[0]].item()]}."
            count = sum(says[j, t].item() == labels[j] for j in range(COUNT))
            assert said(page) == (
                f"Tick {tick}{past}: it says {names[says[i, t].item()]} ({share}%), {verdict}. Certainty "
                f"{sure[i, t]:.2f}. {stop} At this tick it is right on {count} of the {COUNT} pictures."
            )
            glow = page.locator(".ctm-picture td").evaluate_all(
                "(all) => all.map((x) => +x.style.cssText.slice(8, -1))"
            )
            wanted = 0.8 * looks[i, t] / looks[i].max()
            torch.testing.assert_close(torch.tensor(glow).double(), wanted, atol=5e-3, rtol=0)
            dots = page.locator(".ctm-panels circle:not(.now)").evaluate_all("(all) => all.map((x) => x.classList[0])")
            assert dots == ["right" if k == labels[i] else "wrong" for k in says[i].tolist()]
            marked = page.get_by_role("radio").evaluate_all("(all) => all.map((x) => x.className)")
            assert marked == ["right" if says[j, t] == labels[j] else "wrong" for j in range(COUNT)]
            mark = page.locator(".ctm-panels svg .stop + text").text_content()
            assert mark == {"N": "would stop, if it went on", "S": "would stop", "I": "never sure enough"}[stop[0]]
    page.wait_for_function("document.querySelector('.spoken').textContent.startsWith('Tick 16')")


@pytest.mark.browser
def test_more_ticks_make_it_surer_and_right_less_often_as_the_page_says(data):
    right = [[row.index(max(row)) == each["label"] for row in each["chances"]] for each in data["pictures"]]
    sure = [each["sure"] for each in data["pictures"]]
    assert sum(row[15] for row in right) < sum(row[7] for row in right)
    assert sum(row[15] for row in sure) > sum(row[7] for row in sure)
    third = data["pictures"][2]  # not for every picture: this one becomes less sure
    assert data["names"][third["label"]] == "trouser"
    assert (round(third["sure"][7], 2), round(third["sure"][15], 2)) == (0.99, 0.70)
    first = data["start"]["picture"]
    assert right[first][7] and not right[first][15] and sure[first][15] > 0.99


@pytest.mark.browser
def test_it_is_led_by_the_keyboard_alone(page_of, data):
    page = page_of()
    page.get_by_label("Tick").press("ArrowRight")
    assert said(page).startswith("Tick 9, 1 past its training:")
    page.get_by_role("button", name="Next").press("Enter")
    page.get_by_role("button", name="Next").press("Enter")
    page.get_by_role("button", name="Back").press("Enter")
    assert said(page).startswith("Tick 10, 2 past its training:")
    page.get_by_label("Tick").press("Home")
    page.get_by_role("button", name="Back").press("Enter")
    assert said(page).startswith("Tick 1:")
    radios = page.get_by_role("radio")
    assert page.locator("[role=radio][tabindex='0']").count() == 1
    radios.nth(data["start"]["picture"]).press("End")
    for key, i in (("ArrowRight", 0), ("ArrowLeft", COUNT - 1), ("Home", 0), ("ArrowDown", 1)):
        page.keyboard.press(key)
        assert radios.nth(i).get_attribute("aria-checked") == "true"
        assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith(f"{i + 1}: ")
    loaded(page)
    cells = page.get_by_role("gridcell")
    assert page.locator("[role=gridcell][tabindex='0']").count() == 1
    cells.nth(24).press("ArrowUp")
    for key in ("ArrowLeft", "Space", "Home", "Enter", "ArrowLeft"):
        page.keyboard.press(key)
    hidden = cells.evaluate_all("(all) => all.flatMap((x, i) => x.ariaSelected === 'true' ? [i] : [])")
    assert hidden == [14, 16] and page.evaluate("document.activeElement.ariaLabel").startswith("Row 3, column 1: ")
    page.keyboard.press("Enter")
    assert cells.nth(14).get_attribute("aria-selected") == "false"


@pytest.mark.browser
def test_it_plays_to_the_last_tick_and_not_where_motion_is_unwelcome(page_of):
    page = page_of()
    go_to(page, 15)
    page.get_by_role("button", name="Play").press("Enter")
    page.wait_for_function("document.querySelector('.said').textContent.startsWith('Tick 16')")
    page.get_by_role("button", name="Play").press("Enter")  # again, from the first
    assert said(page).startswith("Tick 1:")
    page.get_by_role("button", name="Pause").press("Enter")
    assert page.get_by_role("button", name="Play").is_visible()
    page.emulate_media(reduced_motion="reduce")
    page.reload()
    page.wait_for_selector("figure.alive")
    assert page.get_by_role("button", name="Play").count() == 0
    page.get_by_role("button", name="Next").press("Enter")
    assert said(page).startswith("Tick 9,")


@pytest.mark.browser
def test_hidden_places_and_noise_change_the_answer_as_in_torch(page_of, data, model, every, chosen):
    page, start, names = page_of(width=1000), data["start"]["picture"], data["names"]
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    cells = page.get_by_role("gridcell")
    cells.nth(0).click()
    assert said(page).startswith("To hide parts of the picture, load the machine first. Tick 8: it says ") and not asked
    assert page.get_by_label("Noise").is_hidden() and page.get_by_role("button", name="Reset").is_hidden()
    before = shares(page)
    loaded(page)
    assert any("ctm.safetensors" in url for url in asked)
    places = [row * 7 + column for row in range(3) for column in range(4)]
    cells.nth(0).hover()
    page.mouse.down()
    for i in (1, 2, 3, 10, 9, 8, 7, 14, 15, 16, 17):  # drawn with the mouse
        cells.nth(i).hover()
    page.mouse.up()
    assert cells.evaluate_all("(all) => all.flatMap((x, i) => x.ariaSelected === 'true' ? [i] : [])") == places
    x = every[0][chosen[start]].clone()
    x[:, :12, :16] = 0
    chances, sure, _ = thoughts_of(model, x[None])
    assert shares(page) == pytest.approx((100 * chances[0, 7]).tolist(), abs=0.501)
    says, was = names[chances[0, 7].argmax()], names[before.index(max(before))]
    chosen_one = page.get_by_role("radio", checked=True)
    assert chosen_one.get_attribute("class") == "wrong"
    assert chosen_one.get_attribute("aria-label").endswith(f", here named {says}")
    assert says != was and f"it says {says} (" in said(page) and f"Certainty {sure[0, 7]:.2f}." in said(page)
    assert said(page).endswith(
        f"Of the picture as it was it says {was} here, certainty {data['pictures'][start]['sure'][7]:.2f}."
    )
    page.get_by_label("Noise").fill("0.5")
    grain = page.evaluate("async () => [...(await import('./assets/js/live/ctm.js')).noiseOf(784)]")
    grain = torch.tensor(grain, dtype=torch.float64)
    assert abs(grain.mean()) < 0.1 and abs(grain.std() - 1) < 0.1
    x = every[0][chosen[start]] + 0.5 * grain.view(1, 28, 28)
    x[:, :12, :16] = 0
    assert shares(page) == pytest.approx((100 * thoughts_of(model, x[None])[0][0, 7]).tolist(), abs=0.501)
    page.get_by_role("button", name="Reset").press("Enter")
    assert shares(page) == before and page.locator("[role=gridcell][aria-selected=true]").count() == 0
    assert chosen_one.get_attribute("class") == "right"
    cells.nth(24).click()
    page.get_by_role("radio").first.click()  # another picture is whole
    assert page.locator("[role=gridcell][aria-selected=true]").count() == 0


@pytest.mark.browser
def test_a_finger_hides_one_place_and_the_curve_can_be_pressed(page_of):
    page = loaded(page_of())
    page.get_by_role("gridcell").nth(30).dispatch_event("pointerdown", {"pointerType": "touch", "bubbles": True})
    page.get_by_role("gridcell").nth(30).dispatch_event("click")
    assert page.get_by_role("gridcell").nth(30).get_attribute("aria-selected") == "true"
    curve = page.locator(".ctm-panels svg")
    curve.scroll_into_view_if_needed()
    box = curve.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 318 / 330, box["y"] + box["height"] / 2)
    assert said(page).startswith("Tick 16, 8 past its training")
    page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
    assert said(page).startswith("Tick 1:")


@pytest.mark.browser
def test_weights_that_do_not_come_can_be_asked_for_again(page_of):
    page = page_of(weights=False)
    page.get_by_role("button", name=re.compile("^Load")).click()
    page.wait_for_function("document.querySelector('.said').textContent.includes('could not be loaded. Try again.')")
    assert page.get_by_role("button", name=re.compile("^Load")).is_enabled()


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1440])
def test_it_fits_the_screen_without_a_complaint_and_a_finger_finds_its_places(page_of, width):
    page, complaints = page_of(width=width), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.reload()
    page.wait_for_selector("figure.alive")
    loaded(page)
    assert not complaints
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.locator(".stage :is(span, p, label, button, output, li), .stage text").evaluate_all(
        "(all) => all.map((x) => parseFloat(getComputedStyle(x).fontSize))"
    )
    assert min(sizes) >= 11
    places = page.locator(".stage :is(button, td, input)").evaluate_all(
        """(all) => all.filter((x) => x.checkVisibility()).map((x) => x.getBoundingClientRect())
            .map((x) => [x.width, x.height])"""
    )
    assert len(places) > 49 + COUNT and min(min(each) for each in places) >= 43.5


@pytest.mark.browser
def test_without_a_script_the_drawing_stays(page_of):
    page = page_of(scripts=False)
    assert page.locator("figure .narrow svg").is_visible() and page.locator(".ctm").count() == 0
