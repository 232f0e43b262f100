"""The figure that finds pictures by words: in the browser a word has torch's cosines with the pictures."""

import json
import re
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib").use("Agg")

from nondual.data import emoji  # noqa: E402
from nondual.pretrained import emoji_clip  # noqa: E402
from nondual.pretrained.emoji_clip import STYLE_NOT_MET, unseen_concepts  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "essay" / "clip.md"
MODELS = ROOT / "docs" / "assets" / "models"
WORDS = ["fruit", "strawberry", "smiling cat with heart-eyes", "music", "!?"]


@pytest.fixture(scope="module")
def drawn(figure_in):
    """The figure as the chapter's own code prints it."""
    return "<figure" + figure_in(PAGE, "clip").rpartition("<figure")[2]


@pytest.fixture(scope="module")
def data(drawn):
    return json.loads(drawn.partition('class="data">')[2].partition("</script>")[0])


@pytest.fixture
def page_of(live_page, drawn, tmp_path):
    """A function that opens a page with that figure, with or without scripts, and with or without its words."""
    opened = live_page(drawn, styled=True)

    def with_words(*, scripts=True, words=True, width=390):
        (tmp_path / "assets" / "models").mkdir(exist_ok=True)
        for name in ("clip.webp", *(("clip.bin",) if words else ())):
            shutil.copyfile(MODELS / name, tmp_path / "assets" / "models" / name)
        page = opened(width, scripts=scripts)
        page.set_default_timeout(60_000)
        return page

    return with_words


def said(page):
    return page.locator(".said > [aria-hidden]").inner_text()


def loaded(page):
    page.get_by_role("button", name=re.compile("^Load")).press("Enter")
    page.wait_for_function("document.querySelector('.said').textContent.includes('The words are loaded')")
    return page


def shown(page):
    """The names under the pictures, and the cosines under them."""
    names = page.locator(".clip-name").all_text_contents()
    return names, [float(x.replace("−", "-")) for x in page.locator(".clip-cosine").all_text_contents()]


# --- the numbers ---------------------------------------------------------------------------------------------------

COSINES = """async (words) => {
    const { Finder } = await import("./assets/js/live/clip.js");
    const { tensors } = await import("./assets/js/live/weights.js");
    const answer = await fetch("./assets/models/clip.bin");
    const finder = new Finder(tensors(await answer.arrayBuffer()));
    return words.map((word) => [0, 1].map((style) => finder.cosines(word, style, 150)));
}"""


@pytest.mark.browser
def test_cosines_are_torchs_of_the_stored_vectors_and_near_the_models_own(page_of):
    from safetensors.torch import load_file, safe_open

    found = torch.tensor(page_of().evaluate(COSINES, WORDS), dtype=torch.float64)
    stored = load_file(MODELS / "clip.bin")
    with safe_open(MODELS / "clip.bin", framework="pt") as file:
        words = json.loads(file.metadata()["words"])
    x = {name: stored[name].double() * stored[f"{name}.scale"].double()[:, None] for name in ("words", "pictures")}
    x = {name: each / each.norm(dim=1, keepdim=True) for name, each in x.items()}
    right = x["words"][[words.index(word) for word in WORDS]] @ x["pictures"].T
    torch.testing.assert_close(found.flatten(1), right, atol=1e-6, rtol=0)
    model, pictures = emoji_clip(), emoji(["noto", STYLE_NOT_MET])
    row = {concept.hexcode: i for i, concept in enumerate(pictures.concepts)}
    rows = torch.tensor([row[code] for code in unseen_concepts()])
    with torch.no_grad():
        z = torch.cat([model.encode_images(pictures.pictures[style][rows]) for style in pictures.pictures])
        exact = model.encode_texts(WORDS) @ z.T
    assert (found.flatten(1) - exact).abs().max() < 0.02


# --- the figure ----------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_every_stored_word_finds_its_pictures_before_the_words_come(page_of, data):
    page = page_of(words=False)
    for style in (1, 0):
        page.get_by_role("button", name=data["styles"][style]).press("Enter")
        for i, each in enumerate(data["words"]):
            page.get_by_label("Word", exact=True).select_option(index=i)
            names, cosines = shown(page)
            ranked = sorted(each["cosines"][style], reverse=True)
            assert cosines == pytest.approx(ranked[:10], abs=0.0051) and len(set(names)) == 10
            assert names[0] == data["names"][each["cosines"][style].index(ranked[0])]
            assert said(page).startswith(f"“{each['word']}” is nearest to {', '.join(names[:3])}: cosines ")


@pytest.mark.browser
def test_a_picture_names_what_it_chooses(page_of, data):
    page = page_of(words=False)
    page.locator(".clip-found button").first.press("Enter")
    name = shown(page)[0][0]
    chosen = [data["names"][j] for j in data["nearest"][data["start"]["style"]][data["names"].index(name)]]
    listed = ", ".join(f"“{each}”" for each in chosen)
    assert said(page) == f"The picture of “{name}” is nearest to these of the 150 names: {listed}."


@pytest.mark.browser
def test_a_typed_word_finds_pictures_and_one_that_is_not_stored_is_said_to_be(page_of, data):
    page = page_of()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    find, typed = page.get_by_role("button", name="Find pictures"), page.get_by_label("A word of your own")
    assert not find.is_enabled() and not typed.is_enabled() and not asked
    loaded(page)
    assert any("clip.bin" in url for url in asked) and page.get_by_role("button", name="Load").count() == 0
    assert page.locator("datalist option").count() == data["known"]
    own = data["names"][0].lower()
    typed.fill(f"  {own.upper()} ")
    typed.press("Enter")
    assert re.search(r"Its own picture is in place \d+ of 150\.$", said(page)) and said(page).startswith(f"“{own}”")
    before = shown(page)
    typed.fill("fruitt")
    find.click()
    assert said(page).startswith(
        f"“fruitt” is not among the {data['known']:,} words that were stored. Some that are: “"
    )
    assert "“fruit”" in said(page) and shown(page) == before
    typed.fill("   ")
    find.click()
    assert said(page) == "Type a word first."
    page.get_by_label("Word", exact=True).select_option(index=0)
    assert shown(page) != before
    page.get_by_label("Word", exact=True).select_option(own)  # what was typed can be chosen again
    assert shown(page) == before


@pytest.mark.browser
def test_each_picture_is_cut_from_its_place_in_the_file(page_of, data):
    page = page_of(words=False, width=1000)
    for style in (0, 1):
        page.get_by_role("button", name=data["styles"][style]).press("Enter")
        places = page.locator(".clip-picture").evaluate_all("(all) => all.map((x) => x.style.backgroundPosition)")
        for name, place in zip(shown(page)[0], places, strict=True):
            i = data["names"].index(name)
            x, y = (float(each.rstrip("%")) for each in place.split())
            assert x == pytest.approx(100 * (i % 15) / 14, abs=0.01)
            assert y == pytest.approx(100 * (i // 15 + 10 * style) / 19, abs=0.01)


@pytest.mark.browser
def test_words_that_do_not_come_can_be_asked_for_again(page_of):
    page = page_of(words=False)
    page.get_by_role("button", name=re.compile("^Load")).click()
    page.wait_for_function("document.querySelector('.said').textContent.includes('could not be loaded. Try again.')")
    assert page.get_by_role("button", name=re.compile("^Load")).is_enabled()


@pytest.mark.browser
def test_it_fits_a_phone_and_its_words_can_be_read(page_of):
    page = loaded(page_of(width=390))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    sizes = page.locator(".stage :is(span, p, label, button, input, select)").evaluate_all(
        "(all) => all.map((node) => parseFloat(getComputedStyle(node).fontSize))"
    )
    assert min(sizes) >= 11


@pytest.mark.browser
def test_without_a_script_the_drawing_stays(page_of):
    page = page_of(scripts=False)
    assert page.locator("figure .narrow svg").is_visible() and page.locator(".clip-found").count() == 0
