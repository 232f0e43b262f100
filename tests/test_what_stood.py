"""The chapter that sums up: a claim linked there stands under the heading of its verdict; no failure is missing."""

import re
from pathlib import Path

import pytest
import yaml

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "essay/what_stood.md").read_text(encoding="utf-8")
LEDGER = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in (DOCS / "ledger").glob("*.yml")]
VERDICT = {claim["id"]: claim["verdict"] for essay in LEDGER for claim in essay["claims"]}


def linked(heading):
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return re.findall(r"#verdict-([A-E][\d.]+)\)", section)


@pytest.mark.parametrize(
    "heading, verdicts",
    [
        ("What held", {"holds"}),
        ("What held on a condition, or in part", {"holds if"}),
        ("What did not hold", {"does not hold"}),
        ("Contested, and slips", {"contested", "slip"}),
        ("What the texts say", {"reading"}),
    ],
)
def test_a_claim_stands_under_its_verdict(heading, verdicts):
    found = linked(heading)
    assert found and {VERDICT[id] for id in found} == verdicts


def test_what_failed_is_told_whole():
    told = linked("What did not hold") + linked("Contested, and slips")
    assert sorted(told) == sorted(id for id, v in VERDICT.items() if v in ("does not hold", "contested", "slip"))
