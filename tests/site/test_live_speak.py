"""The model that writes in the Mamba chapter: its scores and steps in the browser are torch's on the same weights."""

import importlib
import json
import math
import shutil
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib").use("Agg")
pytest.importorskip("safetensors")

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "essay" / "mamba.md"
WEIGHTS = ROOT / "docs" / "assets" / "models" / "speak.bin"
MEASURED = json.loads((ROOT / "docs" / "measured" / "speak.json").read_text(encoding="utf-8"))
TEXT = "ROMEO:\nBut soft, what light through yonder window breaks? 'Tis 1597"


@pytest.fixture(scope="module")
def speak():
    """benchmarks/speak.py, which stores the model and reads it back."""
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module("benchmarks.speak")
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def stored(speak):
    return speak.load(WEIGHTS)


@pytest.fixture(scope="module")
def drawn(figure_in):
    """The figure as the chapter's own code prints it."""
    return figure_in(PAGE, "speak")


@pytest.fixture
def page_of(live_page, drawn, tmp_path):
    """A function that opens a page with that figure, with or without scripts, and with or without its weights."""
    opened = live_page(drawn)

    def with_weights(*, scripts=True, weights=True):
        if weights:
            (tmp_path / "assets" / "models").mkdir(exist_ok=True)
            shutil.copyfile(WEIGHTS, tmp_path / "assets" / "models" / "speak.bin")
        page = opened(scripts=scripts)
        page.set_default_timeout(60_000)
        return page

    return with_weights


def said(page):
    return page.locator(".said > [aria-hidden]")


# --- the weights ---------------------------------------------------------------------------------------------------


def test_the_weights_are_small_and_what_was_measured():
    assert WEIGHTS.stat().st_size == MEASURED["figures"]["bytes"] < 400_000
    assert abs(MEASURED["figures"]["held_out_bits_as_stored"] - MEASURED["figures"]["held_out_bits"]) < 0.001


def test_rounding_keeps_each_entry_within_half_a_unit_of_its_row(speak):
    weights = {"a": torch.randn(5, 7), "b": torch.randn(3, 1, 4), "c": torch.randn(6), "d": torch.zeros(2, 2)}
    stored = speak.rounded(weights)
    assert stored["a"].dtype == stored["b"].dtype == torch.int8 and "c.scale" not in stored
    assert torch.equal(stored["c"], weights["c"])
    for name in "abd":
        off = (stored[name] * stored[f"{name}.scale"] - weights[name]).abs()
        assert (off <= 0.5001 * stored[f"{name}.scale"]).all(), name
        assert stored[name].abs().max() <= 127
    assert stored["a"].abs().amax(1).tolist() == [127] * 5


def test_what_is_stored_is_read_back(speak, tmp_path):
    from nondual.language_models.mamba import MambaLM

    torch.manual_seed(0)
    model = MambaLM(5, 16, 2)
    speak.store(model, list('ab\né"'), tmp_path / "m.bin")
    again, alphabet = speak.load(tmp_path / "m.bin")
    assert alphabet == 'ab\né"'
    ids = torch.tensor([[0, 1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids), model(ids), atol=0.02, rtol=0.05)


# --- the browser ---------------------------------------------------------------------------------------------------

SCORES = """async (ids) => {
    const { Mamba } = await import("./assets/js/live/speak.js");
    const { tensors } = await import("./assets/js/live/weights.js");
    const answer = await fetch("./assets/models/speak.bin");
    const model = new Mamba(tensors(await answer.arrayBuffer()));
    const read = () => ids.map((id) => ({ scores: [...model.step(id)], steps: model.steps() }));
    const first = read();
    model.clear();
    return { alphabet: model.alphabet.join(""), first, again: read() };
}"""


@pytest.mark.browser
def test_scores_and_steps_are_torchs_on_the_same_weights(page_of, stored):
    model, alphabet = stored
    ids = [alphabet.index(character) for character in TEXT if character in alphabet]
    found = page_of().evaluate(SCORES, ids)
    taken = []
    for layer in model.layers:
        layer.mixer.x_proj.register_forward_hook(
            lambda _, given, out, mixer=layer.mixer: taken.append(
                torch.nn.functional.softplus(mixer.dt_proj(out[0, :, : mixer.dt_rank])).mean(-1)
            )
        )
    with torch.no_grad():
        scores = model(torch.tensor([ids]))[0]
    assert found["alphabet"] == alphabet and len(ids) > 60
    for read in (found["first"], found["again"]):  # the second time after it has forgotten the first
        torch.testing.assert_close(torch.tensor([one["scores"] for one in read]), scores, atol=1e-3, rtol=0)
        torch.testing.assert_close(
            torch.tensor([one["steps"] for one in read]).T, torch.stack(taken), atol=1e-5, rtol=0
        )


@pytest.mark.browser
def test_a_draw_follows_the_odds_and_a_seed_decides_it(page_of):
    script = """async () => {
        const { draw, random } = await import("./assets/js/live/speak.js");
        const chance = random(7), again = random(7), counts = [0, 0, 0], same = [];
        for (let i = 0; i < 20000; i++) {
            const c = chance();
            same.push(c === again());
            counts[draw([0, 1, 2], 0.5, c)]++;
        }
        const other = random(8)() === random(7)();
        return { counts, same: same.every(Boolean), other, last: draw([0, 1, 2], 1, 0.9999999) };
    }"""
    found = page_of().evaluate(script)
    odds = [math.exp(2 * s) for s in range(3)]
    for count, p in zip(found["counts"], odds, strict=True):
        assert count / 20000 == pytest.approx(p / sum(odds), abs=0.015)
    assert found["same"] and not found["other"] and found["last"] == 2


@pytest.mark.browser
def test_weights_load_on_a_click_and_the_reader_sees_it_write_and_stops_it(page_of):
    page = page_of()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    assert not page.get_by_role("button", name="Write").is_enabled() and not any("speak.bin" in url for url in asked)
    page.get_by_role("button", name="Load the model (194 kB)").click()
    page.wait_for_function("document.querySelector('.said').textContent.includes('The model is loaded')")
    assert any("speak.bin" in url for url in asked) and page.get_by_role("button", name="Load").count() == 0
    texts = []
    for seed in ("3", "3", "4"):
        page.get_by_label("Beginning").fill("JULIET:\n†O ")
        page.get_by_label("Seed").fill(seed)
        page.get_by_role("button", name="Write").press("Enter")
        page.wait_for_function("document.querySelector('pre.written span').textContent.length >= 20")
        page.get_by_role("button", name="Stop").press("Enter")
        page.wait_for_function("/^[0-9]+ characters written/.test(document.querySelector('.said').textContent)")
        text = page.locator("pre.written").evaluate("(node) => node.textContent")
        count = len(text) - len("JULIET:\nO ")
        assert text.startswith("JULIET:\nO ") and 20 <= count < 400
        assert said(page).inner_text() == (
            f"{count} characters written; 1 of the beginning left out, which the model does not know."
        )
        texts.append(text[:30])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.browser
def test_the_strip_has_a_bar_for_each_of_the_last_characters_and_follows_the_layer(page_of, drawn):
    page = page_of()

    def heights():
        return page.locator(".speak-strip rect").evaluate_all("(all) => all.map((bar) => +bar.getAttribute('height'))")

    data = json.loads(drawn.partition('class="data">')[2].partition("</script>")[0])
    for layer in (4, 2):
        page.get_by_role("button", name=f"Layer {layer}").click()
        assert heights() == pytest.approx([min(58, 550 * step) for step in data["steps"][layer - 1]])
    letters = page.locator(".speak-strip text").all_text_contents()
    assert "".join(letters) == data["text"][-32:].replace("\n", "↵").replace(" ", "␣")


@pytest.mark.browser
def test_weights_that_do_not_come_can_be_asked_for_again(page_of):
    page = page_of(weights=False)
    page.get_by_role("button", name="Load").click()
    page.wait_for_function("document.querySelector('.said').textContent.includes('could not be loaded. Try again.')")
    assert page.get_by_role("button", name="Load").is_enabled()


@pytest.mark.browser
def test_without_a_script_the_drawing_stays(page_of):
    page = page_of(scripts=False)
    assert page.locator("figure svg").first.is_visible() and page.locator("textarea").count() == 0
