"""The benchmark of the essay's proposals: its tasks, arms, judgement and plan, at a small size."""

import csv
import io
import json
import math
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import proposals, proposals_run
from benchmarks.proposals import (
    WRITTEN,
    Job,
    as_csv,
    carry_out_job,
    compared,
    done,
    holm,
    jobs,
    judged,
    said,
    whole_tasks,
)
from benchmarks.proposals_run import (
    ARMS,
    CONTEXT,
    MADE_UP,
    TASKS,
    Arm,
    Reader,
    Run,
    carry_out,
    control_of,
    model_of,
    size,
    spikes,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", TASKS)
def test_a_task_draws_what_its_model_reads(name):
    task = TASKS[name]()
    given, answers = task.draw(5, torch.Generator().manual_seed(0))
    assert len(given) == len(task.inputs) and all(row.shape == given[0].shape for row in given)
    assert all(int(row.max()) < kinds for row, kinds in zip(given, task.inputs)) and int(answers.max()) < task.scores
    assert given[0].shape[1] <= CONTEXT and answers.shape[1] <= given[0].shape[1]
    again, _ = task.draw(5, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(given, again))
    parts = [(given[0].shape, answers.shape) for given, answers in task.fresh()]
    assert sum(shape[0] for shape, _ in parts) == (64 if task.text else 1024 if name == "direction" else 256)
    assert task.text == (name not in MADE_UP) and (task.chance > 3) == task.text


def test_held_out_text_is_not_trained_on():
    for name in ("Shakespeare", "Gita"):
        task = TASKS[name]()
        held_out = torch.cat([answers for _, answers in task.fresh()])
        generator = torch.Generator().manual_seed(0)
        starts = {tuple(row[:100].tolist()) for row in held_out}
        trained = torch.cat([task.draw(256, generator)[1] for _ in range(4)])
        windows = {tuple(each) for each in trained.unfold(1, 100, 1).flatten(0, 1).tolist()}
        assert not starts & windows


def test_arms_begin_alike_and_are_of_one_size():
    task = TASKS["recall"]()
    for name in ARMS:
        model, control = model_of(task, name, 3), model_of(task, control_of(name), 3)
        start = dict(control.named_parameters())
        for key, ours in model.named_parameters():
            theirs = start.get(key)
            assert theirs is None or ours.shape != theirs.shape or torch.equal(ours, theirs), (name, key)
        assert abs(size(model) / size(control) - 1) < 0.015, name
    assert size(model_of(task, "fusion", 3)) == size(model_of(task, "fusion, placebo", 3))
    assert not torch.equal(model_of(task, "base", 3).head.weight, model_of(task, "base", 4).head.weight)


@pytest.mark.parametrize("name", [name for name in ARMS if name not in proposals_run.BOTH_WAYS])
def test_a_causal_arm_sees_nothing_later_and_the_others_do(name):
    task = TASKS["induction"]()
    given, _ = task.draw(2, torch.Generator().manual_seed(0))
    changed = given[0].clone()
    changed[:, -1] = (changed[:, -1] + 1) % 32
    model = model_of(task, name, 1)
    torch.testing.assert_close(model((changed,))[:, :-1], model(given)[:, :-1])
    if f"{name}, both ways" in ARMS:
        model = model_of(task, f"{name}, both ways", 1)
        assert not torch.allclose(model(given)[:, :-1], model((changed,))[:, :-1], atol=1e-5)


def test_one_projection_is_one():
    model = Reader(TASKS["copy"](), Arm(tied=True))
    assert model.layers[0].mixer.q_proj is model.layers[0].mixer.k_proj


def test_a_run_is_kept_and_read_again(tmp_path):
    run = Run("copy", "base", 0.003, 1, 4, tmp_path)
    first = carry_out(run)
    assert run.file.name == "copy_base_0.003_1_4.json" and json.loads(run.file.read_text()) == first
    assert 0 <= first["outcome"] < 0.5 and first["failed"] is None and first["parameters"] > 100_000
    run.file.write_text(json.dumps({**first, "outcome": 0.75}))
    assert carry_out(run)["outcome"] == 0.75


def test_a_training_learns(tmp_path):
    """Some of the tokens are copied after 80 steps; guessing gives an eighth."""
    found = carry_out(Run("copy", "base", 0.01, 1, 80, tmp_path))
    assert found["curve"][-1] > 0.14 and found["loss"][-1] < found["loss"][0]
    assert len(found["curve"]) == 5 and found["outcome"] == pytest.approx(sum(found["curve"]) / 5, abs=1e-4)


def test_the_outcome_of_text_is_the_last_one(tmp_path):
    found = carry_out(Run("Gita", "base", 0.003, 1, 4, tmp_path))
    assert found["outcome"] == found["curve"][-1] > 3 and len(found["curve"]) == 5


def test_what_diverges_counts_as_chance_and_says_why(tmp_path):
    for arm, rate in (("base", 1e30), ("fusion, fixed point", 1e6)):
        found = carry_out(Run("recall", arm, rate, 1, 6, tmp_path))
        assert found["failed"] and len(found["curve"]) == 5 and found["curve"][-1] == 1 / 8


def test_how_far_heads_meet_is_kept_and_the_model_left_as_it_is():
    task = TASKS["recall"]()
    model = model_of(task, "fusion", 1)
    assert proposals_run.meetings(model_of(task, "base", 1), task) is None
    with torch.no_grad():
        model.layers[1].mixer.op.gate.fill_(0.5)
    found = proposals_run.meetings(model, task)
    assert found["gates"] == [0.0, 0.4621] and found["mixings"] == [] and 0 <= found["apart"] <= 1
    assert model.layers[1].mixer.op.gate == 0.5
    talking = model_of(task, "talking heads", 1)
    with torch.no_grad():
        talking.layers[0].mixer.op.before[0, 1] = 2.0
    assert proposals_run.meetings(talking, task)["mixings"] == [round(0.5**0.5, 4), 0.0, 0.0, 0.0]


def test_every_run_is_a_row_of_the_table():
    run = {"rate": 0.01, "seed": 3, "outcome": 0.5, "curve": [0.1, 0.3, 0.5, 0.7, 0.9], "spikes": 2, "parameters": 7}
    jobs = [
        {
            "task": "copy",
            "arm": "fusion, placebo",
            "runs": [{**run, "failed": None}, {**run, "seed": 4, "failed": "a, b"}],
        },
        {"task": "Gita", "arm": "decay", "runs": [{**run, "failed": None}]},
    ]
    rows = csv.DictReader(io.StringIO(as_csv({"head_fusion": jobs[:1], "self_liberating": jobs[1:]})))
    assert rows.fieldnames[:8] == ["section", "task", "arm", "compared with", "unit", "rate", "seed", "outcome"]
    first, second, third = rows
    assert [row["section"] for row in (first, second, third)] == ["head_fusion", "head_fusion", "self_liberating"]
    assert first["arm"] == "fusion, placebo" and first["compared with"] == "base" and first["at the end"] == "0.9"
    assert second["failed"] == "a, b" and second["seed"] == "4" and first["failed"] == ""
    assert third["unit"] == "bits a character" and third["compared with"] == "normalised"


def test_spikes():
    assert spikes([1.0] * 30) == 0
    assert spikes([1.0] * 25 + [1.6] + [1.0] * 5 + [1.4, 2.0]) == 2


# --- the judgement ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "interval, word",
    [
        ((0.001, 0.05, 0.004, 0.04), "better"),
        ((0.021, 0.05, 0.024, 0.04), "better as named"),
        ((-0.05, -0.021, -0.04, -0.024), "worse as named"),
        ((-0.05, -0.001, -0.04, -0.004), "worse"),
        ((-0.015, 0.021, -0.012, 0.019), "equivalent"),
        ((-0.015, 0.03, -0.012, 0.025), "not decided"),
    ],
)
def test_what_an_interval_is_called(interval, word):
    assert said(*interval, 0.02) == word


def test_differences_are_paired_and_turned_so_that_above_0_is_better():
    ours, others = [0.5, 0.6, 0.7, 0.8], [0.45, 0.56, 0.64, 0.75]
    found = compared(ours, others, text=False)
    assert found["mean"] == pytest.approx(0.05) and found["is"] == "better as named"
    judge = torch.tensor(ours, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64)
    half = 3.182446 * judge.std().item() / 2
    assert found["interval"] == [round(0.05 - half, 5), round(0.05 + half, 5)]
    assert compared(ours, others, text=True)["mean"] == pytest.approx(-0.05)
    assert compared([0.5] * 3, [0.5] * 3, text=False) == {
        "mean": 0, "interval": [0, 0], "p": 1.0, "is": "equivalent", "equivalent": True,
    }  # fmt: skip


def test_a_small_and_sure_difference_is_worse_and_equivalent_at_once():
    found = compared([0.499, 0.4991, 0.4989], [0.5] * 3, text=False)
    assert found["is"] == "worse" and found["equivalent"]
    assert not compared([0.4, 0.401, 0.399], [0.5] * 3, text=False)["equivalent"]


def test_holm():
    assert holm([0.04, 0.001, 0.02, 0.5]) == [False, True, False, False]
    assert holm([0.01, 0.011, 0.012]) == [True, True, True]
    assert holm([]) == []


def test_controls_differ_in_the_mechanism_alone():
    assert control_of("symmetric") == "base" == control_of("fusion")
    assert control_of("flow, both ways") == "base, both ways" and control_of("symmetric, rotary") == "base, rotary"
    runs = {
        (task, arm): {"runs": [{"outcome": 0.1 * i + (arm == "fusion")} for i in range(3)]}
        for task in ("copy", "Gita")
        for arm in ("base", "fusion", "fusion, placebo")
    }
    found = judged(runs)
    assert set(found) == {"fusion less base", "fusion, placebo less base", "fusion less fusion, placebo"}
    assert found["fusion less base"]["copy"]["mean"] == 1 == -found["fusion less base"]["Gita"]["mean"]
    steps = judged({("copy", arm): runs["copy", "base"] for arm in ("base", "additive", "Mamba")})
    assert set(steps) == {"additive less base", "Mamba less base", "base less additive"}  # each pair once
    assert (
        found["fusion less base"]["copy"]["remains with Holm"]
        and not found["fusion, placebo less base"]["copy"]["remains with Holm"]
    )


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_plan(tmp_path):
    whole = jobs([], tmp_path)
    assert (
        len(whole)
        == len(set(whole))
        == 10 * len(ARMS) - 7 * len(proposals_run.BOTH_WAYS) - 8 * len(proposals_run.FUSION_OPEN)
    )
    assert {job.task for job in whole if job.arm in proposals_run.BOTH_WAYS} == set(proposals_run.SEEN_BOTH_WAYS)
    some = jobs(["--only=fusion", "--tasks=copy,Gita"], tmp_path)
    assert {job.arm for job in some} == {"base", "fusion", "fusion, fixed point", "fusion, placebo"}
    assert {job.task for job in some} == {"copy", "Gita"}
    fading = jobs(["--section=self_liberating"], tmp_path)
    assert {job.arm for job in fading} == set(proposals_run.LIBERATING) and len(fading) == 50
    assert {job.arm for job in jobs(["--section=arc"], tmp_path)} == {"base", *proposals_run.ARC}
    with pytest.raises(SystemExit, match="there is no section rest; there are: continuous, self_liberating"):
        jobs(["--section=rest"], tmp_path)
    with pytest.raises(SystemExit, match="there is no task Hamlet"):
        jobs(["--tasks=Hamlet"], tmp_path)
    with pytest.raises(SystemExit, match="no arm has nothing in its name"):
        jobs(["--only=nothing"], tmp_path)


def test_a_task_is_written_when_it_is_whole():
    of_fusion = [(task, arm) for task in TASKS for arm in ("base", *proposals_run.FUSION)]
    found = {pair: pair[0] for pair in reversed(of_fusion)} | {("copy", "LSTM"): "copy"}
    part, left = whole_tasks(found, proposals_run.FUSION)
    assert set(part) == set(of_fusion) and not left and set(WRITTEN) == set(proposals_run.SECTIONS)
    del found["Gita", "base"]
    part, left = whole_tasks(found, proposals_run.FUSION)
    assert set(part) == {pair for pair in of_fusion if pair[0] != "Gita"} and left == ["Gita"]
    assert whole_tasks({}, proposals_run.FUSION) == ({}, list(TASKS))


def test_what_is_left_is_added_to_what_was_measured(tmp_path, monkeypatch):
    """Of a section with a file, only tasks that it has no runs of are trained; the others stay as they were."""

    def job(task, arm, outcome):
        run = {"seed": 1, "rate": 0.01, "outcome": outcome, "curve": [outcome] * 5, "spikes": 0, "failed": None}
        return {
            "task": task,
            "arm": arm,
            "rates": {},
            "rate": 0.01,
            "runs": [{**run, "seed": s, "parameters": 7} for s in (1, 2)],
        }

    def trained(plan, _):
        asked.append({each.task for each in plan})
        return [job(each.task, each.arm, 0.5) for each in plan if each.task != unfinished]

    monkeypatch.setattr(proposals, "MEASURED", tmp_path)
    monkeypatch.setattr(proposals, "done", trained)
    monkeypatch.setattr(
        proposals,
        "write",
        lambda name, _, figures: (tmp_path / f"{name}.json").write_text(json.dumps({"figures": figures})),
    )
    asked, unfinished = [], "Gita"
    proposals.main(["--section=arc", "--tasks=copy,Gita"])
    assert not list(tmp_path.iterdir())  # a part of the section
    proposals.main(["--section=arc", "--tasks=copy,Gita", "--left"])
    first = json.loads((tmp_path / "proposals_arc.json").read_text())["figures"]
    assert (
        {each["task"] for each in first["jobs"]} == {"copy"} and "Gita" in first["left"] and "copy" not in first["left"]
    )
    assert {each["device"] for each in first["jobs"]} == {proposals.processor()}
    monkeypatch.setattr(proposals, "processor", lambda: "another")
    unfinished = "nothing"
    proposals.main(["--section=arc", "--left"])
    then = json.loads((tmp_path / "proposals_arc.json").read_text())["figures"]
    assert asked == [{"copy", "Gita"}, {"copy", "Gita"}, set(TASKS) - {"copy"}] and then["left"] == []
    assert {each["task"]: each["device"] for each in then["jobs"]} == dict.fromkeys(TASKS, "another") | {
        "copy": first["jobs"][0]["device"]
    }
    assert len(then["jobs"]) == len(TASKS) * 10 and list(then["compared"]["LSTM less base"]) == list(TASKS)


def test_longer_trainings_take_the_rates_that_were_chosen(tmp_path, monkeypatch):
    arc = [
        {"task": t, "arm": a, "rate": 0.01 * i} for i, (t, a) in enumerate(product(TASKS, ("base", *proposals_run.ARC)))
    ]
    asked = []
    monkeypatch.setattr(proposals, "measured", lambda: {"arc": arc})
    monkeypatch.setattr(proposals, "done", lambda plan, _: asked.extend(plan) or [])
    assert proposals.longer(tmp_path, []) == {"steps": 3000, "jobs": []}
    chosen = {(job["task"], job["arm"]): job["rate"] for job in arc}
    assert len(asked) == 10 and all(job.rates == (chosen[job[:2]],) and job.steps == 3000 for job in asked)
    assert {(job.choosing, job.seeds) for job in asked} == {((1,), (1, 2))}  # nothing is chosen anew


def test_a_job_chooses_its_rate_and_runs_its_seeds(tmp_path):
    job = Job("copy", "base", tmp_path, steps=2, rates=(0.001, 0.003), choosing=(101,), seeds=(1, 2))
    found = carry_out_job(job)
    assert len(found["rates"]) >= 2 and [run["seed"] for run in found["runs"]] == [1, 2]
    assert all(run["rate"] == found["rate"] for run in found["runs"])
    assert math.isfinite(found["rate"])


@pytest.mark.timeout(400)
def test_the_plan_is_carried_out_by_several_processes(tmp_path):
    """Each of them a process of its own; a second time everything is read."""
    plan = [job._replace(folder=tmp_path) for job in jobs(["--tiny"], tmp_path)]
    assert len(plan) == 4
    assert len(done(plan[:2], ["--jobs=1", "--minutes=0"])) == 1  # one begins at once, and no other
    found = done(plan[:3], ["--jobs=2"])
    assert {(each["task"], each["arm"]) for each in found} == {(job.task, job.arm) for job in plan[:3]}
    assert len(list(tmp_path.iterdir())) == 9
