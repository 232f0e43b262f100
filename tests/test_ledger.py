"""The ledger keeps its word: each verdict agrees with its page and with a test that can fail, and a breach is seen."""

import json
import re
from pathlib import Path

import pytest
from ledger import agreement, essay_map, evidence, table
from ledger import claims as ledger

ROOT = Path(__file__).parent.parent

COUNTED = {"A": 81, "B": 19, "C": 11, "D": 23, "E": 17}  # the claims of each essay; one may be added, none may be lost


# --- the ledger as it stands ---------------------------------------------------------------------------------------


def test_every_claim_of_the_essays_is_listed():
    claims = ledger.load(ROOT)
    for essay, count in COUNTED.items():
        assert sum(claim.essay == essay for claim in claims) >= count, f"a claim of essay {essay} was lost"
    for essay in "BCDE":  # B1, B2, …: no number is missing
        numbers = sorted(int(claim.id[1:]) for claim in claims if claim.essay == essay)
        assert numbers == list(range(1, len(numbers) + 1))
    sections: dict[int, list[int]] = {}
    for claim in claims:
        if claim.essay == "A":
            section, _, number = claim.id[1:].partition(".")
            sections.setdefault(int(section), []).append(int(number))
    assert sorted(sections) == list(range(10))
    for section, numbers in sections.items():
        assert sorted(numbers) == list(range(1, len(numbers) + 1)), f"section A{section}"


def test_the_ledger_the_pages_and_the_tests_agree():
    found = agreement.faults(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_the_map_has_every_path_that_the_essay_names():
    rows = essay_map.map_rows(ROOT)
    assert len(rows) == 13
    for row in rows:
        for kind in ("module", "test"):
            assert row[kind] is None or (ROOT / row[kind]).exists()
    html = essay_map.map_html(ROOT, lambda uri: uri)
    assert html.count('<tr role="row"><td') == 14 and "The essay names 14 files: 13 of code and one text." in html
    last = html[html.rindex('<tr role="row">') :].replace("<wbr>", "")
    assert "27-altered-state/info/meditation/non-dualism/02_kashmir_shaivism.md" in last and "not code" in last


def test_the_ledger_reads_well_for_machines():
    whole = json.loads(json.dumps(ledger.as_json(ROOT)))
    assert [claim["id"] for claim in whole["claims"]] == [claim.id for claim in ledger.load(ROOT)]
    assert list(whole["essays"]) == sorted({claim["essay"] for claim in whole["claims"]})
    assert len(whole["claims"]) == sum(whole["counts"].values()) >= 151
    assert whole["version"] == "0.1.0"
    assert re.fullmatch(r"[0-9a-f]{40}", whole["commit"] or "0" * 40)


# --- a small project, right in everything, and then wrong in one ---------------------------------------------------

ENTRY = """
  - id: A1.4
    gist: the structure is self-reflection
    how: look
    guess: corrected
    verdict: does not hold
    finding: no direction can be scored
    chapter: essay/self_attention.md
    test: tests/test_self_attention.py::test_no_direction
  - id: A1.6
    gist: three powers
    how: read
    guess: reading
    verdict: reading
    finding: tattvas three to five
    chapter: essay/self_attention.md
    source: Tantrasāra 8
  - id: A1.7
    gist: the stone
    how: read
    guess: reading
    verdict: null
"""
CHAPTER = """# Self-attention

!!! claim "A1.4"

    **A1.4** The structure is self-reflection.

!!! verdict

    **A1.4 does not hold.** No direction can be scored.

    **A1.6 is a reading.** Tattvas three to five.

```text
**A1.7 holds.**
```
"""
TEST = """import pytest


@pytest.mark.claim("A1.4", "does not hold")
def test_no_direction():
    assert sum([1, 1]) == 2
"""


RUN = {"device": "A processor", "commit": "0123456789ab", "command": "nox -s bench -- time", "date": "2026-01-02"}


@pytest.fixture
def project(tmp_path):
    for folder in ("docs/essay", "docs/ledger", "docs/measured", "tests", "src/nondual"):
        (tmp_path / folder).mkdir(parents=True)
    for essay in ledger.ESSAYS:
        (tmp_path / f"docs/ledger/{essay}.yml").write_text("claims:\n" + (ENTRY if essay == "A" else ""))
    (tmp_path / "docs/measured/time.json").write_text(json.dumps(RUN))
    (tmp_path / "docs/essay/self_attention.md").write_text(CHAPTER)
    (tmp_path / "tests/test_self_attention.py").write_text(TEST)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "nondual"\nversion = "0.1.0"\n')
    return tmp_path


def test_a_project_in_agreement_has_no_fault(project):
    assert agreement.faults(project) == []


@pytest.fixture
def measuring(project):
    """The same project, where A1.4 rests on a stored measurement, on a run of the library and on something trained."""
    file = project / "docs/ledger/A.yml"
    more = "    measured: time.json\n    confounder: one `processor`, one seed\n    test: "
    file.write_text(file.read_text().replace("    test: ", more, 1))
    file = project / "tests/test_self_attention.py"
    body = "STORED = json.loads(Path('docs/measured/time.json').read_text())\n\n\n@pytest"
    text = file.read_text().replace("import pytest\n", "import pytest\nfrom nondual import masks\n")
    text = text.replace("@pytest", body, 1).replace("sum([1, 1]) == 2", "train(masks.causal, 3) < STORED['seconds']")
    file.write_text(text)
    return project


def test_a_measurement_that_is_named_beside_a_run_of_the_library_has_no_fault(measuring):
    assert agreement.faults(measuring) == []
    assert evidence.scan(measuring)["tests/test_self_attention.py::test_no_direction"].reads == {"time.json"}


def test_the_page_says_what_a_measurement_is_and_how_to_take_it_again(measuring):
    html = table.ledger_html(ledger.load(measuring), lambda uri: uri, measuring / "docs/measured")
    row = html[html.index('id="A1.4"') : html.index('id="A1.6"')]
    assert "Not ruled out: one <code>processor</code>, one seed" in row
    assert "<code>time.json</code>: A processor, commit 0123456789ab, 2026-01-02." in row
    assert "To measure again: <code>nox -s bench -- time</code>" in row
    assert html.count("stored measurement") == html.count("Not ruled out") == 1
    first, second = ledger.as_json(measuring)["claims"][:2]
    assert first["essay"] == "A" and first["measured"] == ["time.json"] and first["confounder"].startswith("one `pro")
    assert second["measured"] == [] and second["confounder"] is None


PAGE, YML, TESTS = "docs/essay/self_attention.md", "docs/ledger/A.yml", "tests/test_self_attention.py"
MARK = '@pytest.mark.claim("A1.4", "does not hold")\n'

WRONG = {  # name: (file, what is replaced, by what, the fault)
    "the page states another verdict": (
        PAGE,
        "**A1.4 does not hold.**",
        "**A1.4 holds if** so.",
        f"{PAGE}:9: A1.4 holds if on this page and does not hold in the ledger",
    ),
    "the page states no verdict": (PAGE, "**A1.4 does not hold.**", "", "docs/essay/self_attention.md does not say so"),
    "the page states it outside a verdict box": (PAGE, "!!! verdict", "!!! limit", "does not say so"),
    "the page answers what nobody reached": (
        PAGE,
        "**A1.6 is",
        "**A1.7 holds.** **A1.6 is",
        f"{PAGE}:11: A1.7 holds on this page; the ledger has it not reached yet",
    ),
    "the page names an unknown claim": (PAGE, "**A1.6 is", "**A7.9 holds.** **A1.6 is", "A7.9 is not a claim"),
    "the page answers twice": (PAGE, "**A1.6 is", "**A1.4 does not hold.** **A1.6 is", "A1.4 is answered 2 times"),
    "a box elsewhere says otherwise": (PAGE, "# Self", "**A1.6 holds.**\n\n# Self", ":1: A1.6 holds on this page"),
    "the ledger has another verdict": (
        YML,
        "verdict: does not hold",
        "verdict: holds",
        f"{TESTS}:5: A1.4 does not hold in this test and holds in the ledger",
    ),
    "an unknown verdict": (
        YML,
        "verdict: does not hold",
        "verdict: perhaps",
        "docs/ledger/A.yml:3: A1.4: unknown verdict",
    ),
    "an unknown field": (YML, "how: look", "how: look\n    tset: a", "docs/ledger/A.yml:3: A1.4: unknown field tset"),
    "a missing field": (YML, "    how: look\n", "", "docs/ledger/A.yml:3: A1.4: without how"),
    "an id twice": (YML, "id: A1.7", "id: A1.6", "docs/ledger/A.yml:19: A1.6 is listed 2 times"),
    "an id of another essay": (
        YML,
        "id: A1.7",
        "id: B1.7",
        "docs/ledger/A.yml:19: B1.7: this file holds the claims of",
    ),
    "an id of another form": (YML, "id: A1.7", "id: A1.7b", "an id is a letter A to E"),
    "no finding": (YML, "    finding: no direction can be scored\n", "", "A1.4 does not hold and has no finding"),
    "no chapter": (
        YML,
        "essay/self_attention.md\n    test",
        "essay/other.md\n    test",
        "there is no chapter docs/essay/other",
    ),
    "no test": (
        YML,
        "    test: tests/test_self_attention.py::test_no_direction\n",
        "",
        "does not hold and has no test",
    ),
    "no such measurement": (
        YML,
        "    test: ",
        "    measured: gone.json\n    test: ",
        "A1.4: there is no docs/measured/gone",
    ),
    "no such figure": (
        YML,
        "    test: ",
        "    figure: fig-arcs\n    test: ",
        "A1.4: docs/essay/self_attention.md draws no figure named 'fig-arcs'",
    ),
    "a measurement alone": (
        YML,
        "    test: ",
        "    measured: time.json\n    confounder: one machine\n    test: ",
        "docs/ledger/A.yml:3: A1.4 rests on a stored measurement alone: let a test of it also run",
    ),
    "a measurement with no word of what it leaves open": (
        YML,
        "    test: ",
        "    measured: time.json\n    test: ",
        "A1.4: something was measured for it, and it names no `confounder`",
    ),
    "a measurement that is not named": (
        TESTS,
        "sum([1, 1]) == 2",
        'Path("docs/measured/time.json").read_text()',
        f"A1.4: {TESTS}::test_no_direction reads docs/measured/time.json: write `measured: time.json`",
    ),
    "a measurement that a constant of the file reads": (
        TESTS,
        f"\n\n{MARK}def test_no_direction():\n    assert sum([1, 1]) == 2",
        '\n\nSTORED = Path("docs/measured", "time.json").read_text()\n\n\n'
        f"{MARK}def test_no_direction():\n    assert STORED",
        "reads docs/measured/time.json",
    ),
    "training with no word of what it leaves open": (
        TESTS,
        "sum([1, 1]) == 2",
        "trained(RING, 3)",
        "A1.4: something is trained for it, and it names no `confounder`",
    ),
    "training in a fixture": (
        TESTS,
        f"\n\n{MARK}def test_no_direction():",
        "\n\n@pytest.fixture\ndef learned():\n    return torch.optim.Adam([])\n\n\n"
        f"{MARK}def test_no_direction(learned):",
        "A1.4: something is trained for it, and it names no `confounder`",
    ),
    "a missing test": (YML, "::test_no_direction", "::test_gone", f"there is no test {TESTS}::test_gone"),
    "a reading with a test": (
        YML,
        "    source: Tant",
        f"    test: {TESTS}::x\n    source: Tant",
        "a source, and no test",
    ),
    "a reading without a source": (YML, "    source: Tantrasāra 8\n", "", "A1.6 is a reading and has no source"),
    "evidence without a verdict": (
        YML,
        "verdict: null",
        "verdict: null\n    finding: x",
        "has a finding and no verdict",
    ),
    "broken yaml": (YML, "gist: three powers", "gist: three: powers", "docs/ledger/A.yml:12: not YAML"),
    "the test was renamed": (TESTS, "def test_no_direction", "def test_direction", "there is no test"),
    "the test has no mark": (
        TESTS,
        MARK,
        "",
        f"{TESTS}:4: {TESTS}::test_no_direction is the evidence for A1.4 and has no",
    ),
    "the test has another verdict": (
        TESTS,
        "does not hold",
        "holds",
        f"{TESTS}:5: A1.4 holds in this test and does not",
    ),
    "the test asserts nothing": (TESTS, "assert sum([1, 1]) == 2", "sum([1, 1])", "asserts nothing: it cannot fail"),
    "the test asserts a constant": (TESTS, "sum([1, 1]) == 2", "True", "asserts nothing: it cannot fail"),
    "the test is skipped": (TESTS, MARK, MARK + "@pytest.mark.skip\n", "may not run: skip"),
    "the test is expected to fail": (TESTS, MARK, MARK + "@pytest.mark.xfail(strict=True)\n", "may not run: xfail"),
    "the test needs a gpu": (TESTS, MARK, MARK + "@pytest.mark.gpu\n", "may not run: gpu"),
    "its whole file is skipped": (
        TESTS,
        "import pytest\n",
        "import pytest\npytestmark = pytest.mark.skip\n",
        "may not run",
    ),
    "its whole file is skipped where a package is missing": (
        TESTS,
        "import pytest\n",
        "import pytest\npytest.importorskip('no_such_package')\n",
        "may not run: importorskip",
    ),
    "a mark without a verdict": (TESTS, '("A1.4", "does not hold")', '("A1.4")', "id and verdict"),
    "a mark for an unknown claim": (TESTS, "A1.4", "A9.9", "A9.9 is not a claim of docs/ledger"),
    "a mark for a claim not reached": (TESTS, "A1.4", "A1.7", "A1.7 does not hold in this test and is not reached yet"),
    "a marked test that the ledger does not name": (
        TESTS,
        MARK,
        f"{MARK}def test_more():\n    assert sum([])\n\n\n{MARK}",
        f"{TESTS}::test_more carries its mark and is not named as its test",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_disagreement_is_named(project, name):
    file, old, new, fault = WRONG[name]
    text = (project / file).read_text()
    assert old in text
    (project / file).write_text(text.replace(old, new, 1))
    found = agreement.faults(project)
    assert any(fault in one for one in found), found


def test_a_page_in_disagreement_stops_the_build(project, caplog):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    (project / "docs/index.md").write_text("# Home\n")
    (project / "docs/ledger.md").write_text("# Ledger\n\n<!-- ledger -->\n")
    (project / "docs/map.md").write_text("# Map\n\n<!-- map -->\n")
    (project / "docs/glossary.yml").write_text("[]\n")
    (project / "mkdocs.yml").write_text(
        "site_name: x\nplugins: [search]\nmarkdown_extensions: [admonition, attr_list]\nvalidation: {anchors: warn}\n"
        f"hooks: [{ROOT / 'hooks/build.py'}]\n"
    )

    def site():
        build(load_config(str(project / "mkdocs.yml"), strict=True))

    site()
    chapter = (project / "site/essay/self_attention/index.html").read_text()
    assert '<strong class="verdict-fails" id="verdict-A1.4">A1.4 does not hold.</strong>' in chapter
    assert 'href="../../ledger/#A1.4" id="claim-A1.4"' in chapter
    assert "**A1.7 holds.**" in chapter  # a fence is left as it was
    table = (project / "site/ledger/index.html").read_text()
    assert 'href="../essay/self_attention/#verdict-A1.4"' in table
    assert "3 claims, 2 of them answered: 1 does not hold and 1 is a reading of a text; 1 is not reached yet." in table
    assert json.loads((project / "site/claims.json").read_text())["counts"]["reading"] == 1
    assert (
        "14 files: 13 of code and one text. Of the code, none have a module"
        in (project / "site/map/index.html").read_text()
    )

    page = project / PAGE
    page.write_text(page.read_text().replace("A1.4 does not hold", "A1.4 holds"))
    with pytest.raises(Abort):
        site()
    assert f"{PAGE}:9: A1.4 holds on this page and does not hold in the ledger" in caplog.text
