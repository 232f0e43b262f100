"""A0.4: what an essay's six assignments lead one to expect, looked at in two trained models and in the record.

How each was measured is in docs/measured/six_assignments.md; the program is benchmarks/assignments.py.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import assignments_words as words
from benchmarks.assignments import Bench, judged, ratio, verdict
from benchmarks.intervals import bootstrap
from nondual.ops.attention import attention

STORED = json.loads((Path(__file__).parent.parent / "docs/measured/assignments.json").read_text())["figures"]


@pytest.mark.claim("A0.4", "holds if")
def test_of_six_assignments_some_lead_one_to_expect_what_trained_models_do():
    found = judged(STORED)
    verdicts = {name: verdict(parts) for name, parts in found.items()}
    assert verdicts == {
        "powers": "survives in part",
        "doors": "survives",
        "positions": "fails",
        "tables": "survives",
        "state": "survives in part",
        "prompt": "survives in part",
    }
    assert sum(part["holds"] for parts in found.values() for part in parts.values()) == 8

    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()  # what the exchange of queries and keys is: scores transposed
    _, exchanged = attention(k, q, v, return_weights=True)
    torch.testing.assert_close(exchanged, (q @ k.mT / 2).mT.softmax(-1))

    # the same here, on fewer sentences and windows: places in MiniLM, and the pulse of a Mamba
    bench = Bench()
    with torch.no_grad():
        rows = [bench.ask_positions(number) for number in range(0, 72, 12)]
        model, text, blank = bench.mamba
        pulse = words.pulse(model, text[::4, :128])
        rest = words.rest(model, text[::16, :96], blank, 16)
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    assert mean["moved on"] > 1.3 * mean["exchanged"]  # relations stay, and more moves
    dependence = {kind: mean[f"replaced, {kind}"] / mean[f"spread, {kind}"] for kind in ("trained", "one position")}
    assert 0.6 < dependence["one position"] / dependence["trained"] < 0.9
    bits = {name: sum(each) / len(each) for name, each in pulse.items()}
    assert bits["own"] + 0.05 < bits["still"] < bits["foreign"] - 0.05
    assert max(rest["blank"]) < 0.01 and min(rest["text"]) > 0.3


def test_the_record_says_of_each_part_what_its_runs_give():
    again = judged(STORED)
    for name, one in STORED["judged"].items():
        assert again[name] == one["parts"] and verdict(again[name]) == one["verdict"]


def test_of_positions_and_of_the_prompt_other_measures_are_told_beside_those_that_decide():
    places = {name: [row[name] for row in STORED["positions"].values()] for name in STORED["positions"]["0"]}
    for kind, mean in (("one position", 0.60), ("dealt out", 0.78)):  # movements that no spread divides
        found, low, _ = ratio(places[f"replaced, {kind}"], places["replaced, trained"])
        assert abs(found - mean) < 0.005 and low > 0.5
    costs = {
        way: torch.tensor(
            [row[f"{way}, shuffled"]["nats"] - row[f"{way}, right"]["nats"] for row in STORED["prompt"].values()]
        )
        for way in ("prompt", "weights")
    }
    low, high = bootstrap(costs["weights"] - costs["prompt"])[1:]
    assert low < 0 < high  # in nats, shuffling costs the two about the same


def test_the_control_of_queries_and_keys_always_turns_the_sign():
    assert all(row["number"] < 0 for row in STORED["powers"].values())
