"""benchmarks/spelling.py: fair arms, words kept apart, and what the measured file shows of A0.2."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.spelling import (
    COSTS,
    SEEDS,
    SWEEP_SEED,
    Arm,
    accuracy,
    best_rate,
    chain,
    compared,
    interval,
    main,
    word_of,
)
from benchmarks.spelling_run import (
    ARMS,
    END,
    LAYERS,
    START,
    TASKS,
    Batch,
    Pair,
    Run,
    Speller,
    Task,
    batches,
    carry_out,
    last_states,
    loss_of,
    model_of,
    multiply_adds,
    numbered,
    right,
    split_by,
    stem,
)
from nondual.training import optimiser

ROOT = Path(__file__).parent.parent
WORDS = ("ab", "bba", "cabca", "a")
TOY = Task("toy", tuple("abc"), tuple("xyz"), (), (), (), 2)
EVERY_ARM = pytest.mark.parametrize("arm", ARMS)


def toy_batch(words=WORDS):
    to = dict(zip("abc", "xyz"))
    return numbered(TOY, [Pair(tuple(word), tuple(to[sign] for sign in word[::-1])) for word in words])


# --- the words -----------------------------------------------------------------------------------------------------


def test_stems_by_hand():
    assert {stem(word) for word in ("walk", "walks", "walked", "walking", "walkers")} == {"walk"}
    assert stem("running") == stem("runs") == "run" and stem("stopped") == stem("stop")
    assert stem("is") == "is"


def test_no_stem_stands_in_two_parts():
    task = TASKS["spelling"]()
    parts = [{stem("".join(pair.source)) for pair in pairs} for pairs in (task.train, task.tune, task.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert [len(x) for x in (task.train, task.tune, task.test)] == [40_000, 2000, 4000]


def test_parts_keep_groups_together():
    parts = split_by(lambda word: word[0], ["aa", "ab", "ba", "bb", "ca", "cb", "da", "db"], (3, 2, 9), seed=1)
    assert [len(part) for part in parts] == [3, 2, 2]  # a part that is full leaves the rest of its last group out
    assert not {w[0] for w in parts[0]} & {w[0] for w in parts[1]}


def test_no_word_of_the_gita_stands_in_two_parts():
    task = TASKS["gita"]()
    assert len({pair.source for part in task[3:6] for pair in part}) == sum(map(len, task[3:6]))


def test_all_arms_are_given_the_same_batches():
    first, second = (batches(TASKS["gita"]()) for _ in range(2))
    a, b = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for _ in range(3):
        one, two = first(a), second(b)
        assert all(torch.equal(x, y) for x, y in zip(one, two))
        assert (one.target[:, 0] == START).all() and ((one.target == END).sum(1) == 1).all()


def test_reversal_is_reversed():
    batch = batches(TASKS["reversal"]())(torch.Generator().manual_seed(0))
    assert torch.equal(batch.source.flip(1), batch.target[:, 1:-1])


# --- the arms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_arms_have_equally_many_parameters(task):
    made = {arm: sum(x.numel() for x in model_of(arm, TASKS[task]()).parameters()) for arm in ARMS}
    assert all(abs(size / made["additive"] - 1) < 0.02 for size in made.values()), made


def test_recurrent_arms_differ_in_the_context_alone():
    batch, arms = toy_batch(), {}
    for arm in ARMS[:3]:
        model = model_of(arm, TOY)
        assert isinstance(model, Speller)
        h, s, mask = model.encode(batch.source, batch.lengths)
        projected = model.decoder.attention.project(h)
        context, weights = model.decoder.attention(s[:, None], h, mask, projected=projected)
        arms[arm] = (h, mask, context[:, 0], weights[:, 0], {name for name, _ in model.named_parameters()})
    h, mask, context, _, names = arms["fixed"]
    torch.testing.assert_close(context, last_states(h, mask))
    h, mask, context, weights, _ = arms["uniform"]
    torch.testing.assert_close(weights, mask[:, 0] / batch.lengths[:, None])
    torch.testing.assert_close(context, torch.stack([row[:n].mean(0) for row, n in zip(h, batch.lengths)]))
    assert names == arms["uniform"][4]
    assert {x.removeprefix("decoder.attention.") for x in arms["additive"][4] - names} == {
        "w_s.weight",
        "w_h.weight",
        "v",
    }


@EVERY_ARM
def test_padding_changes_nothing(arm):
    torch.manual_seed(0)
    model, batch = model_of(arm, TOY).eval(), toy_batch()
    together = model(batch.source, batch.lengths, batch.target[:, :-1])
    for i, word in enumerate(WORDS):
        alone = toy_batch((word,))
        scores = model(alone.source, alone.lengths, alone.target[:, :-1])
        torch.testing.assert_close(together[i, : scores.shape[1]], scores[0], atol=1e-5, rtol=1e-4)


@EVERY_ARM
def test_writing_agrees_with_reading_all_at_once(arm):
    torch.manual_seed(1)
    model, batch = model_of(arm, TOY).eval(), toy_batch()
    written = model.spell(batch.source, batch.lengths, 5, end=None)
    given = torch.cat([torch.full((len(written), 1), START), written[:, :-1]], 1)
    torch.testing.assert_close(model(batch.source, batch.lengths, given).argmax(-1), written)


@EVERY_ARM
def test_every_arm_learns(arm):
    torch.manual_seed(0)
    model, batch = model_of(arm, TOY), toy_batch(("ab", "bca", "c"))
    adam = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(40):
        adam.zero_grad()
        loss_of(model, batch).backward()
        adam.step()
    assert loss_of(model, batch).item() < 0.3
    to = dict(zip("abc", "xyz"))
    pairs = tuple(Pair(tuple(word), tuple(to[x] for x in word[::-1])) for word in ("ab", "bca", "c"))
    assert right(model, TOY, pairs) == [True] * 3


@EVERY_ARM
def test_multiply_adds_are_those_of_the_products(arm):
    task = TASKS["spelling"]()
    model, one, m, n = model_of(arm, task), word_of(8), 8, 8
    with FlopCounterMode(display=False) as counter:
        model.spell(*one[:2], n, end=None)
    said = multiply_adds(arm, m, n, len(task.targets) + 3)
    # What torch's counter takes in but a word does not need, and what it leaves out: a product with one vector v, and
    # the two products of attention within MultiHeadAttention.
    beside = {"fixed": 2 * 64 * m * n, "uniform": 2 * 64 * m * n, "additive": -48 * m * n}
    beside |= {"transformer": -2 * 64 * LAYERS * (m * m + n * (n + 1) // 2 + m * n)}
    if arm in beside:
        assert counter.get_total_flops() / 2 == said + beside[arm]
    else:
        assert abs(counter.get_total_flops() / 2 / said - 1) < 0.02


def test_what_waits_for_what():
    chains = {arm: [chain(model_of(arm, TASKS["spelling"]()), word_of(n)) for n in COSTS] for arm in ARMS}
    steps = {arm: [b - a for a, b in pairwise(found)] for arm, found in chains.items()}
    assert steps["transformer"] == steps["one stream"] == [0, 0]  # as deep for 16 letters as for 4
    assert steps["fixed"] == steps["uniform"] == [8, 16]  # a product more for each letter read, and each sound written
    assert steps["additive"] == [20, 40]


# --- the runs ------------------------------------------------------------------------------------------------------


def test_a_run_is_kept_and_made_once(tmp_path):
    run = Run("gita", "additive", 4e-3, 1, 2, tmp_path)
    assert run.result() is None
    carry_out(run)
    found = run.result()
    assert found is not None and found["arm"] == "additive" and len(found["curve"]["step"]) == 1
    before = run.file.stat().st_mtime_ns
    carry_out(run)
    assert run.file.stat().st_mtime_ns == before


def test_a_sweep_goes_on_where_the_best_is_at_its_edge(monkeypatch, tmp_path):
    best = 2.1e-2

    def kept(run):
        run.file.write_text(json.dumps({"tune_loss": abs(run.rate - best), "rate": run.rate, "seed": run.seed}))

    monkeypatch.setattr("benchmarks.spelling.carry_out", kept)
    arm = Arm("gita", "fixed", 2, SEEDS, tmp_path, (2e-3, 4e-3, 8e-3))
    assert [run.rate for run in arm.sweep()] == [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
    assert best_rate(arm.sweep()) == 1.6e-2
    assert {(run.rate, run.seed) for run in arm.runs()} == {(1.6e-2, seed) for seed in SEEDS}
    assert SWEEP_SEED not in SEEDS


def test_intervals_by_hand():
    found = interval([1.0, 2.0, 3.0, 6.0])  # standard deviation 2.1602; t for 4 seeds 3.182
    assert found["mean"] == 3 and found["interval"] == [-0.437, 6.437]
    assert accuracy({"by_length": {"3": [1, 2], "4": [3, 4], "9": [0, 4]}}) == 0.4
    assert accuracy({"by_length": {"3": [1, 2], "4": [3, 4], "9": [0, 4]}}, 3, 4) == pytest.approx(2 / 3)


def test_the_benchmark_runs_from_end_to_end(monkeypatch, capsys):
    found = {}
    monkeypatch.setattr("benchmarks.spelling.record", lambda figures: pytest.fail("a tiny run writes no file"))
    monkeypatch.setattr("benchmarks.spelling.compared", lambda task, arms: found.setdefault(task, compared(task, arms)))
    main(["--tiny"])
    assert found["gita"]["additive less fixed"]["all"]["each"] == [0, 0]  # two updates teach nothing
    assert len(capsys.readouterr().out.splitlines()) == 6  # a sweep of one rate and two seeds, for two models


# --- what was found ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    return json.loads((ROOT / "docs/measured/spelling.json").read_text(encoding="utf-8"))["figures"]


def small_losses(*arms):
    """The loss of each arm after a hundred updates on strings of seven letters, to be written backwards."""
    task, losses = TASKS["reversal"](), {}
    for arm in arms:
        torch.manual_seed(0)
        model, drawn = model_of(arm, task), torch.Generator().manual_seed(0)
        adam = optimiser(model, 8e-3)
        for _ in range(100):
            source = torch.randint(3, 11, (32, 7), generator=drawn)
            edge = torch.ones(32, 1, dtype=torch.long)
            batch = Batch(source, torch.full((32,), 7), torch.cat([START * edge, source.flip(1), END * edge], 1))
            adam.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            losses[arm] = loss.item()
    return losses


@pytest.mark.claim("A0.2", "holds if")
def test_weighing_cures_forgetting_and_self_attention_cures_waiting(measured):
    for task in TASKS:
        less = {pair: groups["all"]["interval"] for pair, groups in measured[task]["differences"].items()}
        # One fixed vector fails, and the twin with equal weights fails with it; an observer apart does not.
        assert less["additive less fixed"][0] > 0 and less["additive less uniform"][0] > 0
        # At as many parameters and updates self-attention makes more mistakes, not fewer.
        assert less["transformer less additive"][1] < 0
    assert measured["spelling"]["differences"]["one stream less additive"]["all"]["interval"][1] < 0
    # What it resolves is waiting: as many products in a row for 16 letters as for 4, where a recurrence has more.
    chains = measured["cost"]["chain"]
    assert chains["4"]["transformer"] == chains["16"]["transformer"] < chains["8"]["additive"]
    assert chains["16"]["additive"] - chains["8"]["additive"] == 2 * (chains["8"]["additive"] - chains["4"]["additive"])
    # Both again, at a small size.
    losses = small_losses("additive", "uniform")
    assert losses["additive"] < 0.6 * losses["uniform"]
    for length in COSTS:
        for arm in ("additive", "transformer"):
            assert chain(model_of(arm, TASKS["spelling"]()), word_of(length)) == chains[str(length)][arm]


def test_the_lead_grows_with_the_word(measured):
    lead = measured["spelling"]["differences"]["additive less fixed"]
    assert lead["9-10"]["interval"][0] > lead["3-4"]["interval"][1] > 0
    assert abs(measured["spelling"]["differences"]["uniform less fixed"]["all"]["mean"]) < 0.03


def test_longer_training_narrows_what_self_attention_lacks(measured):
    reversal = measured["reversal"]
    before = {arm: reversal["arms"][arm]["accuracy"]["9-12"]["mean"] for arm in reversal["longer"]}
    after = {arm: found["9-12"] for arm, found in reversal["longer"].items()}
    assert before["transformer"] < 0.6 and after["transformer"] > 0.97 and after["fixed"] < 0.6
    spelled = {arm: found["all"] for arm, found in measured["spelling"]["longer"].items()}
    assert spelled["additive"] > spelled["transformer"] > spelled["fixed"]


def test_every_rate_was_chosen_within_what_was_tried(measured):
    for task in TASKS:
        for arm, found in measured[task]["arms"].items():
            tried = [float(rate) for rate in found["sweep"]]
            assert min(tried) < found["rate"] < max(tried), (task, arm)
