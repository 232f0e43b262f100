"""The benchmark of query, key and value and of the norms: its arms and its plan, at a small size."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.proposals_run import TASKS, Arm, Reader
from benchmarks.recall_run import size
from benchmarks.tantra import Plan, carry_out_all
from benchmarks.tantra_models import Counting, cosines, main, of_mean_length
from benchmarks.tantra_run import DEEP, NORMS, ROLES, SMALL, Synthesizer, length_of, with_norms, with_roles
from nondual.ops.attention import attention

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("task", ["reverse", "recall", "conjunction"])
def test_arms_of_the_roles_begin_alike_and_are_of_one_size(task):
    control = with_roles(task, "query, key, value", 3)
    for name in ROLES:
        model = with_roles(task, name, 3)
        assert abs(size(model) / size(control) - 1) < 0.01, name
        assert torch.equal(model.head.weight, control.head.weight), name


@pytest.mark.parametrize("name", ROLES)
def test_no_arm_sees_what_comes_later(name):
    given, _ = TASKS["reverse"]().draw(2, torch.Generator().manual_seed(0))
    model, changed = with_roles("reverse", name, 1), given[0].clone()
    changed[:, 20:] = 0
    torch.testing.assert_close(model((changed,))[:, :20], model(given)[:, :20])
    assert not torch.allclose(model((changed,))[:, 20:], model(given)[:, 20:])


def test_a_key_has_no_part_in_a_synthesizer_s_scores():
    """The output is linear in the values: with the token that asks held fast, it moves as the others do."""
    torch.manual_seed(0)
    for dense in (True, False):
        mixer = Synthesizer(11, dense)
        one, other = torch.randn(2, 1, 7, 64)
        other[:, -1] = one[:, -1]
        middle = (one + other) / 2
        wanted = (mixer(one)[:, -1] + mixer(other)[:, -1]) / 2
        torch.testing.assert_close(mixer(middle)[:, -1], wanted)
        first = mixer(one[:, :1])  # a single position has only itself to read
        torch.testing.assert_close(first, mixer.out_proj(mixer.v_proj(one[:, :1])))
    x, more = torch.randn(1, 7, 64), torch.randn(1, 1, 64)
    random = Synthesizer(11, False)
    torch.testing.assert_close(random(2 * x), 2 * random(x))  # of the table, the token that asks has no part either
    assert not torch.allclose(random(torch.cat([x, more], 1))[:, -1], random(x)[:, -1])


def test_blocks_differ_in_their_norms_alone():
    for layers, arms in DEEP.items():
        models = {arm: with_norms("recall", arm, layers, 5) for arm in arms}
        assert len({model.head.weight.sum().item() for model in models.values()}) == 1
        assert len({model.layers[-1].feed_forward.linear2.weight.sum().item() for model in models.values()}) == 1
        for arm, model in models.items():
            norms = [one for layer in model.layers for one in layer.modules() if isinstance(one, nn.LayerNorm)]
            assert len(norms) == (0 if arm.startswith("as printed") else 2 * layers) and len(model.layers) == layers
    given, _ = TASKS["recall"]().draw(64, torch.Generator().manual_seed(0))
    for arm in NORMS:  # an input of variance 1
        model = with_norms("recall", arm, 2, 5)
        x = sum(one(row) for one, row in zip(model.inputs, given)) + model.places.weight[: length_of("recall")]
        assert 0.8 < x.var() < 1.2
    small = with_norms("recall", f"as printed{SMALL}", 2, 5)
    assert torch.equal(small.places.weight * (64 / 3) ** 0.5, model.places.weight)
    torch.manual_seed(5)
    assert torch.equal(small.places.weight, Reader(TASKS["recall"](), Arm()).places.weight)


def test_the_plan_is_carried_out_and_goes_on_from_what_is_kept(tmp_path):
    plan = Plan(tmp_path, 2, (0.003,), (101,), (1, 2))
    found = carry_out_all(plan, ("recall",), (2,))
    assert set(found["roles"]["recall"]) == set(ROLES) and set(found["norms"]["2 layers"]) == set(DEEP[2])
    assert "interval" in found["roles"]["recall"]["no key, dense"]["less_control"]
    assert "less_control" not in found["norms"]["2 layers"]["norm before"]
    times = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert carry_out_all(plan, ("recall",), (2,)) == found
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == times


def test_trained_models_are_measured():
    for length_too in (False, True):  # scores made cosines differ from the lengths evened out by one factor a head
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 2, 3, 7, 5)
        if length_too:
            q, k = (F.normalize(x, dim=-1) * 2 for x in (q, k))
        one, other = cosines(4 / 5**0.5)(q, k, v, causal=True), of_mean_length(True, True)(q, k, v, causal=True)
        assert torch.allclose(one, other, atol=1e-6) == length_too
        assert torch.allclose(other, attention(q, k, v, causal=True), atol=1e-6) == length_too
    counting = Counting()
    q, k = torch.tensor([[[[0.0, 0.0], [1.0, 1.0]]]]), torch.tensor([[[[1.0, 0.0], [2.0, -1.0]]]])
    counting(q, k, k, causal=True)  # dot products 1 and 1: the first; cosines 0.71 and 0.32
    assert counting.shares[0].tolist() == [0.0]
    counting(q, k * torch.tensor([1.0, 2.0])[:, None], k, causal=True)  # dot products 1 and 2
    assert counting.shares[1].tolist() == [1.0]
    main(["--tiny"])
