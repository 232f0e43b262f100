"""benchmarks/routing.py: that it runs, that its tasks are what they say, and what its measures measure."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import routing, routing_run
from benchmarks.heads_trained_run import Lookup, Relations, lookup_loss
from benchmarks.routing_read import agreement, chosen_layer, moved, ranks, right
from benchmarks.routing_run import (
    CONDITIONS,
    ITEMS,
    SAID,
    VALUES,
    Reader,
    Run,
    carry_out,
    corpus,
    examples,
    looks,
    pull,
)
from benchmarks.routing_statements import capitals, pairs

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_runs_and_writes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(routing, "write", None)  # to call it would raise
    monkeypatch.setattr(routing.routing_read, "read", lambda folder, tiny: {})
    routing.main(["--tiny"])
    said = capsys.readouterr().out
    assert all(f"{task} {arm} " in said for task, arms in routing.ARMS.items() for arm in arms)


def test_a_run_is_kept_and_not_made_again(tmp_path, monkeypatch):
    run = Run("facts", "corpus", 1e-2, 3, 2, tmp_path)
    first = carry_out(run)
    monkeypatch.setitem(routing_run.TASKS, "facts", None)
    assert run.file.exists() and carry_out(run) == first
    assert all(routing.SWEEP_SEED not in seeds for seeds in routing.SEEDS.values())


def test_the_mark_stands_where_the_share_says_and_the_answer_is_the_partners_value():
    partner = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.5, 1.0):
        drawn = examples(partner, share, torch.Generator().manual_seed(1), 512)
        keys, values, marks = drawn.shown
        row = torch.arange(512)
        assert torch.equal(partner[keys[:, -1]], keys[row, drawn.right])
        assert torch.equal(values[row, drawn.right], drawn.answers) and (values[:, -1] == VALUES).all()
        assert torch.equal(marks.argmax(1), drawn.marked) and (marks.sum(1) == 1).all()
        assert abs((drawn.marked == drawn.right).float().mean() - share) < 0.07
        assert all(len(set(keys_of[:ITEMS].tolist())) == ITEMS for keys_of in keys)


def test_twenty_things_are_said_of_each_person_and_so_many_are_true():
    facts = corpus(5)
    assert facts.persons.shape == (126, 3) and facts.said.shape == (126, SAID)
    assert len({tuple(person) for person in facts.persons.tolist()}) == 126
    for k, (falsely, truly) in enumerate(CONDITIONS):
        rows = facts.kind == k
        true = facts.said[rows] == facts.true[rows, None]
        assert rows.sum() == 18 and (true.sum(1) == truly).all()
        for row, is_true in zip(facts.said[rows], true):
            kinds = len(set(row[~is_true].tolist()))
            assert kinds == (min(SAID - truly, 15) if falsely == "differ" else min(SAID - truly, 1))
    torch.testing.assert_close(facts.shares().sum(1), torch.ones(126))


def test_a_pull_is_the_slope_of_the_loss_and_a_head_taken_out_has_none():
    asked = Relations.drawn(2, 0)
    torch.manual_seed(0)
    model = Lookup(2, 2)
    test = asked.draw(torch.Generator().manual_seed(1), 16)
    pulls, usual = pull(model, test), model.mixer.op
    assert model.mixer.op is usual and pulls.shape == (2, 2)
    bonus = torch.zeros(2, 2)
    losses = []
    for step in (0.05, -0.05):
        bonus[1, 0] = step
        model.mixer.op = routing_run.with_bonus(bonus, test[3], None)
        losses.append(lookup_loss(model, test).item())
    model.mixer.op = usual
    assert pulls[1, 0].item() == pytest.approx((losses[1] - losses[0]) / 0.1, rel=0.05)
    without = pull(model, test, 0)
    assert not without[0].any() and without[1].any()
    assert (looks(model, test) - 1 / 32).abs().max() < 0.02


def test_a_reader_shows_where_its_last_place_looks():
    torch.manual_seed(0)
    model = Reader((5, 3), 7)
    ids = torch.randint(5, (2, 4)), torch.randint(3, (2, 4))
    assert model(*ids).shape == (2, 7)
    torch.testing.assert_close(model.weights(*ids).sum(1), torch.ones(2))


def test_agreement_is_the_rank_correlation_of_the_others():
    influence = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    every = torch.ones(5, dtype=torch.bool)
    assert agreement(influence.exp(), influence, every) == pytest.approx(1)
    assert agreement(-influence, influence, every) == pytest.approx(-1)
    own = influence + 100 * torch.eye(5)  # a token's influence on itself is left out
    assert agreement(own, influence, every) == pytest.approx(1)
    assert ranks(torch.tensor([[0.3, 0.1, 0.2]])).tolist() == [[2, 0, 1]]


def test_what_moves_is_known_for_a_mean_of_inputs():
    """A layer that reads half of the input of position 0: it moves by half of what was put in its place there."""
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    found = moved(lambda given: given[:, :1].expand_as(given) / 2, x)
    expected = torch.zeros(3, 3)
    expected[:, 0] = (x[0] - x.mean(0)).norm() / 2
    torch.testing.assert_close(found, expected)


def test_the_layer_is_chosen_by_topics_that_were_left_out():
    generator = torch.Generator().manual_seed(0)
    topics = torch.arange(30) % 3
    one_for_all = torch.randn(30, 8, generator=generator) + 2 * F.one_hot(torch.tensor(0), 8)
    one_each = torch.randn(30, 8, generator=generator) / 9 + 5 * F.one_hot(topics, 8)  # says nothing of other topics
    assert chosen_layer(torch.stack([one_each, one_for_all]), topics) == 1
    assert right(torch.tensor([1.0, 0]), torch.tensor([[2.0, 9], [-1, 9]])).tolist() == [1, 0]


def test_each_word_stands_as_often_in_true_statements_as_in_false_ones():
    asked = pairs()
    for topic in {pair.topic for pair in asked}:
        for denied in (False, True):
            mine = [pair for pair in asked if pair.topic == topic and pair.denied is denied]
            assert len(mine) >= 22 and all(pair.true != pair.false for pair in mine)
            counts = [
                sorted(word for pair in mine for word in getattr(pair, which).split()) for which in ("true", "false")
            ]
            assert counts[0] == counts[1]
    assert all(("not" in pair.true) is pair.denied for pair in asked)
    assert len(capitals()) == 20 and not any("_" in text for pair in capitals() for text in pair[2:])
    assert capitals()[2].false == "The capital of Brazil is Rio de Janeiro."
    assert capitals()[8].false == "The capital of Vietnam is Ho Chi Minh City."
