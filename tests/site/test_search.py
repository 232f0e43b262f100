"""What a reader finds: the index that the search reads, and twelve words typed into the search of the built site."""

import re
from urllib.parse import urlsplit

import pytest
from documents import base_of
from pages import search

FIRST = {  # what is typed: the page that comes first, and its section where one is meant
    "A1.4": "ledger/#A1.4",
    "A2.1": "ledger/#A2.1",
    "mamba": "essay/mamba/",
    "selective scan": "workshop/selective_scan/",
    "no mind": "essay/flash_attention/",
    "mushin": "essay/flash_attention/",
    "recognition": "essay/self_attention/",
    "recurrence": "essay/recurrent/",
    "additive attention": "essay/attention_mechanism/",
    "windows": "glossary/#sliding-window",
    "vimarsa": "glossary/#vimarsa",
    "pratyabhijna": "essay/self_attention/",
    "flash attention": "essay/flash_attention/",
    "kv cache": "glossary/#kv-cache",
    "log-sum-exp": "glossary/#log-sum-exp",
}


@pytest.fixture(scope="module")
def reader(browser, site):
    context = browser.new_context(viewport={"width": 1440, "height": 900}, reduced_motion="reduce")
    context.set_default_timeout(30_000)
    page = context.new_page()
    page.goto(site)
    page.keyboard.press("/")
    yield page
    context.close()


def ask(page, typed: str):
    """Put it in at once, so that no results for a part of it come before its own, and wait until these stand."""
    box = page.locator(".md-search__input")
    before = page.locator(".md-search-result__list").inner_html()
    box.press("ControlOrMeta+a")
    box.press("Backspace")
    box.fill(typed)
    box.press("End")  # the search listens to keys
    page.wait_for_function(
        "before => { const list = document.querySelector('.md-search-result__list');"
        " return list.innerHTML !== before && list.querySelector('a'); }",
        arg=before,
    )
    last, still = None, 0  # they come in several parts
    while still < 3:
        page.wait_for_timeout(150)
        now = page.locator(".md-search-result__list").inner_html()
        last, still = now, still + 1 if now == last else 0


def found(page, pages) -> list[str]:
    """The links of the first result: the page, then its sections, the best one first; the others are folded."""
    links = page.locator(".md-search-result__item").first.locator("a.md-search-result__link")
    base = base_of(pages)
    parts = [urlsplit(links.nth(i).get_attribute("href")) for i in range(links.count())]
    return [part.path.removeprefix(base).lstrip("/") + ("#" + part.fragment) * bool(part.fragment) for part in parts]


@pytest.mark.browser
@pytest.mark.parametrize("typed", FIRST)
def test_what_is_typed_comes_first(reader, pages, typed):
    ask(reader, typed)
    links = found(reader, pages)
    assert links[0] == FIRST[typed].partition("#")[0]
    assert "#" not in FIRST[typed] or links[1] == FIRST[typed], links


@pytest.mark.browser
def test_all_claims_of_a_section_are_found_by_its_beginning(reader, pages):
    ask(reader, "A2.*")
    claims = found(reader, pages)[1:]
    assert len(claims) > 3 and all(link.startswith("ledger/#A2.") for link in claims), claims


@pytest.mark.browser
def test_enter_leads_to_the_row_of_the_claim(reader, site, pages):
    ask(reader, "A2.1")
    reader.keyboard.press("Enter")
    reader.wait_for_url("**/ledger/*#A2.1")
    row = reader.locator("tr[id='A2.1']")
    row.wait_for(state="visible")
    top = row.evaluate("row => row.getBoundingClientRect().top")
    assert 0 < top < 900
    reader.goto(site)
    reader.keyboard.press("/")


# --- the index -----------------------------------------------------------------------------------------------------


def index_of(*entries: dict) -> dict:
    return {"config": {"lang": ["en"]}, "docs": [{"title": "", "text": "", "location": "x/"} | one for one in entries]}


def told(entry: dict) -> str:
    return entry["text"]


def test_a_marked_word_is_found_by_its_plain_letters_and_shown_as_it_is():
    index = search.finished(index_of({"title": "Saṃskāra", "text": "<p>of pratyabhijñā, and प्रकाश</p>"}))
    assert index["docs"][0]["title"] == "Saṃskāra<i hidden>samskara</i>"
    assert told(index["docs"][0]) == "<p>of pratyabhijñā, and प्रकाश<i hidden>pratyabhijna</i></p>"


def test_a_form_of_a_word_finds_the_others_that_the_site_has():
    docs = index_of({"text": "<p>a window</p>"}, {"text": "<p>windows</p>"}, {"text": "<p>glass</p>"})
    first, second, third = search.finished(docs)["docs"]
    assert told(first) == "<p>a window<i hidden>windows</i></p>"
    assert told(second) == "<p>windows</p>"  # it begins with window, and so is found by it
    assert told(third) == "<p>glass</p>"


@pytest.mark.parametrize(
    "word, known, root",
    [
        ("windows", {"window"}, "window"),
        ("queries", {"query"}, "query"),
        ("masking", {"mask"}, "mask"),
        ("running", {"run"}, "run"),
        ("stored", {"store"}, "store"),
        ("mass", {"mas"}, "mass"),
        ("needed", {"other"}, "needed"),
        ("this", {"thi"}, "this"),
    ],
)
def test_an_ending_goes_where_what_is_left_is_a_word_of_the_site(word, known, root):
    assert search.stem(word, known) == root


def test_a_chapter_weighs_more_than_the_reference_and_a_title_more_than_text():
    docs = index_of({"location": "essay/mamba/"}, {"location": "reference/mamba/"}, {"location": ""})
    index = search.finished(docs)
    chapter, reference, home = index["docs"]
    assert chapter["boost"] > 1 > reference["boost"] and "boost" not in home
    assert index["config"]["fields"]["title"]["boost"] > index["config"]["fields"]["text"]["boost"]


def test_the_source_under_a_signature_of_the_reference_is_not_searched():
    text = "<pre><code>f(x)</code></pre> <p>Says.</p> <pre><code>def f(x):</code></pre>"
    reference, chapter = search.finished(
        index_of({"location": "reference/x/#f", "text": text}, {"location": "essay/x/", "text": text})
    )["docs"]
    assert told(reference) == "<pre><code>f(x)</code></pre> <p>Says.</p> " and told(chapter) == text


@pytest.mark.parametrize(
    "formula, line",
    [
        (r"N \neq M", "N ≠ M"),
        (r"\Delta_t \in \mathbb{R}^{B \times N}", "Δ_t ∈ R^(B × N)"),
        (r"\frac{q k^\top}{\sqrt{D}}", "q k^T/√D"),
        (r"\frac{1}{2}\,\lambda", "1/2 λ"),
        (r"e^{m_1 - m}\ell_1", "e^(m_1 - m)ℓ_1"),
    ],
)
def test_a_formula_reads_as_one_line(formula, line):
    index = search.finished(index_of({"text": rf"<p>so \({formula}\), and</p>"}))
    assert told(index["docs"][0]) == f"<p>so {line}, and</p>"


def test_each_claim_is_an_entry_that_leads_to_its_row():
    rows = [search.Row("E1", "a `head` < all", "holds", "yes"), search.Row("E10", "b", "not reached yet")]
    first, second = search.finished(index_of(), rows)["docs"]
    assert first["location"] == "ledger/#E1" and told(first) == "<p>A head &lt; all</p><p>Holds: yes</p>"
    assert first["title"] == "E1<i hidden>E1</i>" and second["title"] == "E10"  # E1 comes before E10
    assert told(second) == "<p>B</p><p>Not reached yet</p>"


def test_the_number_of_a_claim_is_one_word_and_a_path_is_several():
    parts = re.compile(search.SEPARATOR)
    assert parts.split("A1.4") == ["A1.4"] and parts.split("log-sum-exp") == ["log", "sum", "exp"]
    assert parts.split("nondual.ops.masks") == ["nondual", "ops", "masks"]
    assert [word for word in parts.split("(A1.4), a &lt; b.") if word] == ["A1.4", "a", "b"]
