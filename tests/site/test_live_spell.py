"""The figure that spells a word in sounds: in the browser the network writes torch's phonemes with torch's weights."""

import json
import re
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib").use("Agg")

from nondual.pretrained import hama  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "essay" / "attention_mechanism.md"
WEIGHTS = ROOT / "docs" / "assets" / "models" / "spell.bin"
WORDS = ["o'clock", "phthisis", "straße", "a", "mississippi", "abhinavagupta"]


@pytest.fixture(scope="module")
def drawn(figure_in):
    """The figure as the chapter's own code prints it."""
    return figure_in(PAGE, "spell")


@pytest.fixture(scope="module")
def data(drawn):
    return json.loads(drawn.partition('class="data">')[2].partition("</script>")[0])


@pytest.fixture(scope="module")
def speller():
    return hama()


@pytest.fixture
def page_of(live_page, drawn, tmp_path):
    """A function that opens a page with that figure, with or without scripts, and with or without its weights."""
    opened = live_page(drawn, styled=True)

    def with_weights(*, scripts=True, weights=True, width=390):
        if weights:
            (tmp_path / "assets" / "models").mkdir(exist_ok=True)
            shutil.copyfile(WEIGHTS, tmp_path / "assets" / "models" / "spell.bin")
        page = opened(width, scripts=scripts)
        page.set_default_timeout(60_000)
        return page

    return with_weights


def said(page):
    return page.locator(".said > [aria-hidden]")


def loaded(page):
    page.get_by_role("button", name=re.compile("^Load the model")).press("Enter")
    page.wait_for_function("document.querySelector('.said').textContent.includes('The model is loaded')")
    return page


def sounds(page):
    return page.locator("table.spell tbody th").all_text_contents()


def shares(page):
    """The percents under the letters, 0 where nothing is written."""
    return [int(text or 0) for text in page.locator("table.spell .shares td").all_text_contents()]


def percents(row):
    """A row of weights in percent, as `shares` reads them: a half may be rounded up or down."""
    return pytest.approx([100 * weight for weight in row], abs=0.51)


# --- the network ---------------------------------------------------------------------------------------------------

SPELL = """async (words) => {
    const { Speller } = await import("./assets/js/live/spell.js");
    const { tensors } = await import("./assets/js/live/weights.js");
    const answer = await fetch("./assets/models/spell.bin");
    const model = new Speller(tensors(await answer.arrayBuffer()));
    const terms = [0, 1, 2, 3].map((i) => ({ location: i > 1, pull: i % 2 === 1 }));
    return words.map((word) => terms.map((each) => model.spell(word, each)));
}"""


def in_torch(speller, word):
    """The phonemes and weights of a word in the order in which the page's data has them."""

    def unlocated(attention, s, memory, past):
        return attention.scores(s, memory.h, projected=memory.projected, past=torch.zeros_like(past))

    for scores in ({"scores": unlocated}, {}):
        for pull in ({"pull": torch.zeros_like}, {}):
            yield speller.spell(word, **scores, **pull)


@pytest.mark.browser
def test_phonemes_and_weights_are_torchs_with_each_term_and_without_it(page_of, speller):
    found = page_of().evaluate(SPELL, WORDS)
    for word, runs in zip(WORDS, found, strict=True):
        for run, (phonemes, weights) in zip(runs, in_torch(speller, word), strict=True):
            assert run["sounds"] == phonemes, word
            torch.testing.assert_close(torch.tensor(run["rows"], dtype=torch.float32), weights, atol=1e-4, rtol=0)


@pytest.mark.browser
def test_half_precision_is_read_as_torch_reads_it(page_of):
    numbers = torch.tensor([0.0, -0.0, 1.0, -2.5, 65504.0, 6.1e-5, 6e-8, -3e-6, 0.1, float("inf")], dtype=torch.float16)
    script = """async (bytes) => {
        const { tensors } = await import("./assets/js/live/weights.js");
        const x = { dtype: "F16", shape: [bytes.length / 2], data_offsets: [0, bytes.length] };
        const header = JSON.stringify({ __metadata__: {}, x });
        const whole = new Uint8Array(8 + header.length + bytes.length);
        new DataView(whole.buffer).setBigUint64(0, BigInt(header.length), true);
        whole.set(new TextEncoder().encode(header), 8);
        whole.set(bytes, 8 + header.length);
        return [...tensors(whole.buffer).weights.x.data].map(String);
    }"""
    found = page_of().evaluate(script, list(numbers.numpy().tobytes()))
    assert [float(text) for text in found] == numbers.tolist()


# --- the figure ----------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_every_stored_word_is_stepped_through_before_the_weights_come(page_of, data):
    page = page_of(weights=False)
    for i, word in enumerate(data["words"]):
        page.get_by_label("Word", exact=True).select_option(index=i)
        run = word["runs"][3]
        assert sounds(page) == [s.replace("͡", "") for s in run["sounds"]]
        assert page.locator("table.spell .letters b").all_text_contents() == list(word["word"])
        assert shares(page) == percents(run["rows"][0])
        page.get_by_label("Sound").press("End")
        assert shares(page) == percents(run["rows"][-1])
        assert said(page).inner_text().startswith(f"Sound {len(run['sounds'])} of {len(run['sounds'])}: ")


@pytest.mark.browser
def test_the_sentence_names_the_sound_and_the_two_letters_looked_at_most(page_of):
    page = page_of(weights=False)
    assert said(page).inner_text() == "Sound 1 of 3: n, as in “no”, with 82% of the attention on “n” and 18% on “k”."
    page.get_by_label("Sound").press("ArrowRight")
    assert said(page).inner_text().startswith("Sound 2 of 3: aɪ, as in “my”, with 95% of the attention on “i”")
    page.get_by_label("Word", exact=True).select_option("banana")
    assert "on “b” and " in said(page).inner_text() or said(page).inner_text().endswith("on “b”.")
    page.locator("table.spell tbody tr").nth(3).click()
    assert page.get_by_label("Sound").input_value() == "3" and "“a” (letter 4)" in said(page).inner_text()


@pytest.mark.browser
def test_a_term_is_switched_off_and_on(page_of, data):
    page = page_of(weights=False)
    page.get_by_label("Word", exact=True).select_option("recognition")
    runs = next(word["runs"] for word in data["words"] if word["word"] == "recognition")
    assert runs[1]["sounds"] != runs[3]["sounds"]
    place, pull = page.get_by_label("location term"), page.get_by_label("fixed pull")
    for box, index in ((place, 1), (pull, 0), (place, 2), (pull, 3)):
        box.press("Space")
        assert sounds(page) == runs[index]["sounds"], index


@pytest.mark.browser
def test_a_typed_word_is_spelled_and_letters_that_are_not_known_are_named(page_of, speller):
    page = page_of()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    spell, typed = page.get_by_role("button", name="Spell it"), page.get_by_label("A word of your own")
    assert not spell.is_enabled() and not typed.is_enabled() and not asked
    loaded(page)
    assert any("spell.bin" in url for url in asked) and page.get_by_role("button", name="Load").count() == 0
    typed.fill("Phthi字sis 7字")
    typed.press("Enter")
    phonemes, weights = speller.spell("phthisis")
    assert sounds(page) == phonemes and shares(page) == percents(weights[0].tolist())
    assert (
        said(page)
        .inner_text()
        .startswith(f"Left out, because the model does not know it: 字 7. Sound 1 of {len(phonemes)}")
    )
    typed.fill("字")
    spell.press("Enter")
    assert said(page).inner_text() == "Type a word of at least one letter that the model knows first."
    assert sounds(page) == phonemes
    typed.fill("knight")
    spell.click()
    assert sounds(page) == ["n", "aɪ", "t"] and page.get_by_label("Word", exact=True).input_value() == "knight"
    page.get_by_label("Word", exact=True).select_option("phthisis")  # what was typed can be chosen again
    assert sounds(page) == phonemes and "Left out" not in said(page).inner_text()


@pytest.mark.browser
def test_the_longest_word_fits_a_phone_and_a_desk(page_of):
    for width in (390, 1000):
        page = loaded(page_of(width=width))
        page.get_by_label("A word of your own").fill("antidisestablishmentarianism")
        page.get_by_role("button", name="Spell it").click()
        assert page.locator("table.spell .letters b").count() == 20
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        holder, table = (page.locator(name).bounding_box() for name in (".spell-table", "table.spell"))
        assert table["height"] <= holder["height"] + 1 and table["width"] <= holder["width"] + 1


@pytest.mark.browser
def test_weights_that_do_not_come_can_be_asked_for_again(page_of):
    page = page_of(weights=False)
    page.get_by_role("button", name="Load").click()
    page.wait_for_function("document.querySelector('.said').textContent.includes('could not be loaded. Try again.')")
    assert page.get_by_role("button", name="Load").is_enabled()


@pytest.mark.browser
def test_without_a_script_the_drawing_stays(page_of):
    page = page_of(scripts=False)
    assert page.locator("figure .narrow svg").is_visible() and page.locator("table.spell").count() == 0
