"""benchmarks/recognition_aim*.py: its arms, prompts and outcomes, what can be computed, and the whole, small."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import recognition_aim, recognition_aim_run
from benchmarks.recognition_aim import ARMS, MIDDLE, OUTCOMES, compared, exact, judged, linear_layer, points, predictors
from benchmarks.recognition_aim_run import Arm, D, M, Run, asked, carry_out, corners, inputs_name, outcomes, table
from nondual.extensions import zipf
from nondual.language_models.in_context_learning import errors, optimal_matrix


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One thread, and fewer prompts to be judged on."""
    monkeypatch.setattr(recognition_aim_run, "TESTED", 16)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made_up(stored, new, index, name="next"):
    """A run with these outcomes."""
    return {
        "arm": name, "stored": stored, "new": new, "stored, by Zipf": stored, "of each task": [stored] * M,
        "index on new": index, "index on stored": 0.0, "named": [0.0, 0.5], "readable": 0.5,
    }  # fmt: skip


def test_the_arms_are_two_by_two_with_two_placebos_and_further_weights():
    names = [str(arm) for arm in ARMS]
    assert len(set(names)) == len(names) == 10
    for end in ("", ", Zipf"):
        assert f"next{end}" in names and {f"{who} {MIDDLE:g}{end}" for who in ("task", "inputs", "random")} < set(names)
    assert torch.equal(Arm("next", law=True).shares, zipf(M)) and Arm("next").shares.unique().numel() == 1


def test_a_run_is_kept_and_the_arms_of_a_seed_meet_the_same_inputs(tmp_path, monkeypatch):
    met = {}
    for arm in (Arm("next"), Arm("task", 0.3), Arm("random", 0.3), Arm("inputs", 0.3)):
        drawn = []
        monkeypatch.setattr(
            recognition_aim_run.Recogniser,
            "loss",
            lambda self, x, y, which, *, reward, drawn=drawn: (
                drawn.append((x, y, which)) or self(x, y).answers.square().mean()
            ),
        )
        run = Run(arm, 0.003, 1, 2, tmp_path)
        found = carry_out(run)
        assert found == carry_out(run) and found["failed"] is None and len(found["of each task"]) == M
        met[str(arm)] = drawn
    for first, other in zip(met["next"], met["random 0.3"], strict=True):
        assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])
        assert not torch.equal(first[2], other[2])
    assert all(torch.equal(a[2], b[2]) for a, b in zip(met["next"], met["task 0.3"]))
    assert torch.equal(met["inputs 0.3"][0][2], inputs_name(met["next"][0][0]))


def test_a_run_that_fails_counts_as_answering_nothing(tmp_path):
    found = carry_out(Run(Arm("next"), 1e30, 1, 3, tmp_path))
    size = asked(table(1))["new"].target[:, 1:].square().mean().item()
    assert found["failed"] and found["new"] == pytest.approx(size, abs=1e-4)


def test_outcomes_of_right_answers_are_0_and_the_predictors_are_what_they_should_be():
    given = asked(table(1))
    assert (given["stored"].which.bincount() == len(given["stored"].which) // M).all()
    right = outcomes({kind: each.target for kind, each in given.items()}, given)
    assert right["stored"] == right["new"] == right["stored, by Zipf"] == max(right["of each task"]) == 0
    both = corners(1)
    assert both["stored tasks"]["stored"] < both["ridge"]["stored"]
    assert both["ridge"]["new"] < both["stored tasks"]["new"] and both["stored tasks"]["named"][-1] > 0.9
    assert set(predictors((1,))["ridge"]) < set(OUTCOMES)


def test_the_name_of_the_inputs_says_nothing_of_the_task():
    given = asked(table(1))["stored"]
    names = inputs_name(given.x)
    together = torch.zeros(M, M).index_put_((given.which, names), torch.ones(len(names)), accumulate=True)
    expected = together.sum(1, keepdim=True) * together.sum(0) / together.sum()
    kept = expected.sum(0) > 0
    chi = ((together - expected).square() / expected.clamp(min=1e-9))[:, kept].sum()
    freedom = (M - 1) * (int(kept.sum()) - 1)
    assert chi < freedom + 5 * (2 * freedom) ** 0.5 and (names.bincount(minlength=M) > 0).sum() > M / 2


def test_the_linear_layer_counts_tasks_by_their_shares():
    tasks = torch.randn(3, D, generator=torch.Generator().manual_seed(0)) / D**0.5
    often = torch.cat([tasks[:1], tasks[:1], tasks])  # the first three times, the others once
    ours = linear_layer(tasks, torch.tensor([0.6, 0.2, 0.2]))
    rows = [
        errors(optimal_matrix(often, n, recognition_aim_run.NOISE), often, n, recognition_aim_run.NOISE)
        for n in range(1, recognition_aim_run.LENGTH)
    ]
    assert ours["stored, by Zipf"] == pytest.approx(sum(row.stored for row in rows) / len(rows), abs=1e-4)
    assert ours["new"] == pytest.approx(sum(row.new for row in rows) / len(rows), abs=1e-4)
    found = exact((1, 2), (1, 8), 2)
    assert found["by tasks"]["1"]["new"] > found["by tasks"]["8"]["new"] and found["next"] != found["next, Zipf"]


def test_the_judgement_turns_errors_round_and_names_who_is_beaten():
    noise = (0.0, 0.001, -0.001, 0.002)
    arms = {
        "next": {"runs": [made_up(0.30 + e, 0.50, 0.0) for e in noise]},
        f"task {MIDDLE:g}": {"runs": [made_up(0.20 + e, 0.60 + e, 0.5) for e in noise]},
        f"random {MIDDLE:g}": {"runs": [made_up(0.31 + e, 0.51, 0.0) for e in noise]},
    }
    found = judged(arms)[f"task {MIDDLE:g} less next"]
    assert found["stored"]["is"] == "better as named" and found["stored"]["mean"] == pytest.approx(0.1)
    assert found["new"]["is"] == "worse as named" and found["index on new"]["is"] == "better as named"
    assert found["stored"]["remains with Holm"] and found["readable"]["is"] == "equivalent"
    said = points(arms)
    assert said["next"]["beaten by"] == said[f"task {MIDDLE:g}"]["beaten by"] == []
    assert said[f"random {MIDDLE:g}"]["beaten by"] == ["next"]
    assert compared([1.0, 1.0], [1.0, 1.0], 0.02)["is"] == "equivalent"


def test_it_runs_tiny_writes_nothing_and_stops_in_time(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(recognition_aim, "write", None)  # would fail
    recognition_aim.main(["--tiny"])
    assert "task 0.3 less next" in capsys.readouterr().out
    monkeypatch.setattr(recognition_aim, "cache_folder", lambda: tmp_path)
    recognition_aim.main(["--minutes=-1", "--only=random"])
    assert "0 of 2 arms done" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no arm has nothing"):
        recognition_aim.main(["--only=nothing"])
