"""Essay E, 04: Attention Mechanism: likeness and relevance, order, softmax, what one look computes, and its bias."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from benchmarks import retrieval
from benchmarks.recall_run import size
from benchmarks.retrieval_run import (
    CUPS,
    KINDS,
    MAPS,
    MIXERS,
    PAIRS_OF_CUPS,
    RULE,
    Run,
    largest,
    model_of,
    relevance,
    sequences,
    shells,
    steps,
    trained,
)
from benchmarks.retrieval_run import count as counting
from nondual.data import BANK
from nondual.ops.attention import attention
from nondual.pretrained import minilm
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import FeedForward, TransformerLayer

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found():
    return json.loads((ROOT / "docs/measured/retrieval.json").read_text(encoding="utf-8"))["figures"]


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- E2: is what is alike what is relevant? --------------------------------------------------------------------------


@pytest.mark.claim("E2", "holds if")
@pytest.mark.parametrize("which", ["opposite", "next"])
def test_on_every_cycle_of_the_map_a_symmetric_score_ranks_one_own_key_as_high_as_the_asked_one(which):
    """Of scores x_q · x_k + b_k the asked keys of a cycle have no larger sum than the own ones."""
    asked = torch.tensor(MAPS[which])
    for seed in range(200):
        x, b = draw(KINDS, 7, seed=seed) * draw(KINDS, 1, seed=seed + 1000).exp(), draw(KINDS, seed=seed + 2000)
        scores = x @ x.T + b
        less = scores.diagonal() - scores[torch.arange(KINDS), asked]
        assert less.sum() > -1e-12 and less.max() > 0
        if which == "opposite":  # six cycles of two
            assert (less.view(-1, 2).max(1).values > 0).all()


def test_of_a_ring_all_but_one_can_be_ranked_first():
    """The bound is sharp: vectors that grow along the ring rank the next one above their own, except at its end."""
    angle, length = torch.arange(KINDS) * 0.3, 1.1 ** torch.arange(KINDS)
    x = torch.stack([angle.cos(), angle.sin()], 1) * length[:, None]
    more = (x @ x.T)[torch.arange(KINDS), torch.tensor(MAPS["next"])] - x.square().sum(1)
    assert (more > 0).sum() == KINDS - 1


def test_without_its_own_key_opposites_can_be_ranked_first_and_a_ring_cannot():
    pairs = draw(6, 7).repeat_interleave(2, 0)
    pairs = pairs / pairs.norm(dim=1, keepdim=True) + 1e-3 * draw(KINDS, 7, seed=2)
    scores = (pairs @ pairs.T).fill_diagonal_(-math.inf)
    assert scores.argmax(1).equal(torch.tensor(MAPS["opposite"]))
    after, before = torch.tensor(MAPS["next"]), torch.tensor(MAPS["next"]).argsort()
    for seed in range(200):
        x = draw(KINDS, 7, seed=seed)
        scores, own = x @ x.T, torch.arange(KINDS)
        assert (scores[own, after] - scores[own, before]).sum().abs() < 1e-12


@pytest.mark.claim("E2", "holds if")
def test_with_two_projections_two_numbers_are_enough_for_any_map():
    """W_Q turns a key's vector to the place on a circle where the asked key stands."""
    for seed in range(20):
        asked = torch.randperm(KINDS, generator=torch.Generator().manual_seed(seed))
        angle = torch.arange(KINDS).double() * (2 * math.pi / KINDS)
        circle = torch.stack([angle.cos(), angle.sin()], 1)
        x = torch.eye(KINDS, dtype=torch.float64)
        w_q, w_k = circle[asked], circle
        assert ((x @ w_q) @ (x @ w_k).T).argmax(1).equal(asked)


@pytest.mark.claim("E2", "holds if")
def test_two_projections_learn_what_none_and_one_cannot(found):
    for which in MAPS:
        of = found[f"relevance {which}"]
        assert min(of["2"]["right"]) > 0.99
        if which == "same":
            assert min(of["0"]["right"]) > 0.99 and min(of["1"]["right"]) > 0.99
        else:
            assert max(of["0"]["right"]) < 0.7 and max(of["1"]["right"]) < 11 / 12 + 1 / 12 / 8
    of = found["relevance opposite"]
    assert max(of["1"]["right"]) < 0.7 and of["two less one"]["interval"][0] > 0.3
    network = [share for which in ("opposite", "next") for share in found[f"relevance {which}"]["0, network"]["right"]]
    assert len(network) == 6 and sum(share > 0.99 for share in network) == 3


@pytest.mark.claim("E2", "holds if")
def test_minilms_scores_rank_otherwise_than_the_vectors_they_compare():
    encoder = minilm()
    own = {"dot": 0, "head": 0.0}
    correlations, rows = torch.zeros(6, 12), 0
    for sentence in BANK["river"][:12]:
        states, weights = encoder.layers([sentence])[0][:, 0, 1:-1], encoder.attention(sentence)[1][..., 1:-1, 1:-1]
        m = weights.shape[-1]
        others = ~torch.eye(m, dtype=torch.bool)
        for layer in range(6):
            like, scores = states[layer] @ states[layer].T, weights[layer].log()
            own["dot"] += (like.argmax(-1) == torch.arange(m)).sum().item() / 6
            own["head"] += (scores.argmax(-1) == torch.arange(m)).double().mean(0).sum().item() / 6
            a, b = (
                x.argsort(-1).argsort(-1).double()
                for x in (like[others].view(m, -1), scores[:, others].view(12, m, -1))
            )
            a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
            correlations[layer] += ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).sum(-1)
        rows += m
    assert own["dot"] / rows > 0.95 and own["head"] / rows < 0.3
    assert (correlations / rows).mean().abs() < 0.2 and (correlations / rows).abs().max() < 0.6


# --- E6: order -------------------------------------------------------------------------------------------------------


def layer(causal=False):
    torch.manual_seed(0)
    mixer = MultiHeadAttention(12, 3, causal=causal, op=attention)
    return TransformerLayer(mixer, FeedForward(12, 29), 12).double()


@pytest.mark.claim("E6", "does not hold")
def test_attention_is_equivariant_and_its_mean_is_invariant():
    """The printed equation is false of the outputs, and true of their mean or largest, and of one token's own."""
    model, x = layer(), draw(2, 7, 12)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    out, moved = model(x), model(x[:, order])
    torch.testing.assert_close(moved, out[:, order], atol=1e-13, rtol=1e-13)
    assert (moved - out).abs().max() > 0.1  # the printed formula
    for pooled in (lambda y: y.mean(1), lambda y: y.amax(1)):
        torch.testing.assert_close(pooled(moved), pooled(out), atol=1e-13, rtol=1e-13)
    kept = torch.cat([torch.tensor([0]), 1 + torch.randperm(6, generator=torch.Generator().manual_seed(4))])
    torch.testing.assert_close(model(x[:, kept])[:, 0], out[:, 0], atol=1e-13, rtol=1e-13)


@pytest.mark.claim("E6", "does not hold")
def test_a_causal_mask_tells_the_order_without_positions():
    model, x = layer(causal=True), draw(2, 7, 12)
    order = torch.arange(7).flip(0)
    assert (model(x[:, order]) - model(x)[:, order]).abs().max() > 0.1
    assert (model(x[:, order]).mean(1) - model(x).mean(1)).abs().max() > 0.01


@pytest.mark.claim("E6", "does not hold")
@torch.no_grad()
def test_minilm_without_positions_carries_an_order_through():
    model = minilm().model.double()
    model.position.table.weight.zero_()
    ids = torch.randint(1000, 2000, (1, 11), generator=torch.Generator().manual_seed(0))
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    out, moved = model(ids), model(ids[:, order])
    torch.testing.assert_close(moved, out[:, order], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(moved.mean(1), out.mean(1), atol=1e-10, rtol=1e-10)
    assert (moved - out).abs().max() > 0.1


# --- E8: what softmax enforces ---------------------------------------------------------------------------------------


@pytest.mark.claim("E8", "holds if")
def test_a_weight_falls_where_another_score_rises():
    for scores in (torch.zeros(7, dtype=torch.float64), 3 * draw(7)):
        a = scores.softmax(0)
        slopes = torch.autograd.functional.jacobian(lambda s: s.softmax(0), scores)
        torch.testing.assert_close(slopes, a.diag() - a[:, None] * a, atol=1e-14, rtol=1e-12)
        assert (slopes[~torch.eye(7, dtype=torch.bool)] < 0).all() and (slopes.diagonal() > 0).all()


@pytest.mark.claim("E8", "holds if")
def test_no_weight_is_zero_and_the_largest_has_a_bound_by_the_spread_of_the_scores():
    for n, spread in ((2, 0.0), (7, 1.0), (113, 4.0), (113, 30.0)):
        most = 1 / (1 + (n - 1) * math.exp(-spread))
        for seed in range(50):
            scores = spread * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            a = scores.softmax(0)
            assert a.min() > 0 and a.max() <= most + 1e-12
        best = torch.zeros(n, dtype=torch.float64)
        best[0] = spread
        assert best.softmax(0)[0] == pytest.approx(most)
    ties = torch.zeros(1, 1, 1, 5)
    _, weights = attention(ties, torch.zeros(1, 1, 11, 5), torch.zeros(1, 1, 11, 5), return_weights=True)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 11))  # nothing forces a focus


@pytest.mark.claim("E8", "holds if")
def test_an_output_lies_among_the_values():
    q, k, v = (draw(1, 2, n, 5, seed=n) for n in (7, 11, 13))
    k, v = k, draw(1, 2, 11, 3, seed=5)
    out = attention(9 * q, k, v)
    assert out.norm(dim=-1).max() <= v.norm(dim=-1).max()
    direction = draw(3, 17)  # inside the convex hull: in no direction beyond the farthest value
    assert ((out @ direction).amax(2) <= (v @ direction).amax(2) + 1e-12).all()


def test_sparsemax_does_give_zeros():
    """The nearest point of the simplex (Martins and Astudillo 2016), in contrast."""
    scores = torch.tensor([2.0, 1.5, 0.2, -1.0], dtype=torch.float64)
    taken = scores.sort(descending=True).values
    sums = taken.cumsum(0) - 1
    k = (taken * torch.arange(1, 5) > sums).sum()
    weights = (scores - sums[k - 1] / k).clamp(min=0)
    assert weights.tolist() == [0.75, 0.25, 0, 0] and scores.softmax(0).min() > 0.02


# --- E9: counting, comparing, steps ----------------------------------------------------------------------------------


@pytest.mark.claim("E9", "holds if")
def test_one_token_and_two_of_it_are_the_same_to_attention_at_any_depth():
    torch.manual_seed(0)
    layers = [layer(causal) for causal in (False, True, False)]
    one, two = draw(1, 1, 12), draw(1, 1, 12).expand(1, 2, 12)
    for each in layers:
        one, two = each(one), each(two)
    torch.testing.assert_close(two, one.expand(1, 2, 12), atol=1e-14, rtol=1e-14)
    single = MultiHeadAttention(12, 3, op=attention).double()
    x = draw(1, 1, 12)
    assert single(x.expand(1, 2, 12))[0, 1].equal(single(x.expand(1, 2, 12))[0, 0])


@pytest.mark.claim("E9", "holds if")
@pytest.mark.parametrize("count", [0, 1, 2, 17, 1000])
def test_with_a_start_token_a_head_counts(count):
    """Scores: 0 for the start token and for an a, -40 for a b. The weight of the start token is 1 / (1 + count)."""
    n = 1500
    scores = torch.full((n,), -40.0, dtype=torch.float64)
    scores[:count] = 0
    k = torch.cat([torch.zeros(1, dtype=torch.float64), scores])[None, None, :, None]
    v = torch.zeros_like(k)
    v[..., 0, 0] = 1  # the start token's value is 1, all others' 0
    weight = attention(torch.ones(1, 1, 1, 1, dtype=torch.float64), k, v, scale=1.0).item()
    assert round(1 / weight - 1) == count


@pytest.mark.claim("E9", "holds if")
def test_a_head_names_the_largest_number_as_its_scores_sharpen():
    x = torch.randperm(64, generator=torch.Generator().manual_seed(0)).double()[:23]
    top, second = x.sort(descending=True).values[:2]
    for sharpness in (1.0, 4.0, 16.0):
        q, k = torch.full((1, 1, 1, 1), sharpness, dtype=torch.float64), x.view(1, 1, -1, 1)
        missed = top - attention(q, k, k, scale=1.0).item()
        assert 0 <= missed <= 22 * math.exp(-sharpness * (top - second)) * 63 + 1e-12
    ones = torch.ones(1, 1, 1, 1, dtype=torch.float64)  # and more a's than b's: the sign of a mean
    for row in ([1, 1, -1], [1, -1, -1, -1, 1], [1] * 500 + [-1] * 501):
        v = torch.tensor(row, dtype=torch.float64).view(1, 1, -1, 1)
        assert attention(ones, 0 * v, v).sign().item() == (1 if sum(row) > 0 else -1)


@pytest.mark.claim("E9", "holds if")
def test_steps_that_are_written_down_are_carried_out(found):
    of = found["steps"]
    assert all(min(seed) > 0.98 for seed in of["written"]["by_step"])
    for arm in ("each", "end", "each deep"):
        assert max(of[arm]["right"]) < 0.4
    assert of["written less each"]["interval"][0] > 0.5
    for arm in ("each", "each deep"):  # six layers follow no further than two
        assert all(seed[1] > 0.95 > 0.7 > seed[4] for seed in of[arm]["by_step"])


@pytest.mark.claim("E9", "holds if")
def test_what_was_learned_of_counting_and_comparing(found):
    numbers = found["largest"]["attention"]["by_length"]
    assert all(seed["8"] > 0.98 and seed["64"] > 0.9 for seed in numbers)
    start, none = (found["count"][arm]["by_length"] for arm in ("start", "no start"))
    assert min(seed["16"] for seed in start) > 0.1 + max(seed["16"] for seed in none)
    assert all(seed["16"] < 0.7 for seed in start)  # though the training that chose the rate was right in all
    assert found["count"]["start"]["sweep"][str(found["count"]["start"]["rate"])] > 0.99
    assert all(seed["64"] < 0.5 for seed in start)  # a count that was learned does not reach far; the one by hand does


# --- E11: one index twice --------------------------------------------------------------------------------------------


@pytest.mark.claim("E11", "slip")
def test_the_printed_softmax_is_right_if_its_sum_has_an_index_of_its_own():
    scores = draw(7, 11)
    e, m = scores.exp(), range(11)
    ours = [[e[i, j] / sum(e[i, l] for l in m) for j in m] for i in range(7)]
    printed = [[e[i, j] / sum(e[i, j] for j in m) for j in m] for i in range(7)]  # the sum's j hides the other
    literal = [[e[i, j] / sum(e[i, j] for _ in m) for j in m] for i in range(7)]  # one and the same j
    for reading, expected in (
        (ours, scores.softmax(1)),
        (printed, scores.softmax(1)),
        (literal, torch.full((7, 11), 1 / 11)),
    ):
        torch.testing.assert_close(torch.tensor(reading).double(), expected.double(), atol=1e-6, rtol=1e-6)
    last = torch.zeros(11, dtype=torch.float64)
    for j in m:
        total = 0.0
        for j in m:
            total += e[0, j]
        last[j] = e[0, j] / total
    assert last[:-1].abs().max() == 0 and last[-1] == pytest.approx(scores[0].softmax(0)[-1].item())


# --- E15: how much data each needs -----------------------------------------------------------------------------------


@pytest.mark.claim("E15", "holds")
def test_attention_needs_least_for_look_up_and_not_for_a_local_rule(found):
    recall, rule = found["recall"], found["rule"]
    for of in recall.values():
        assert min(of["attention"]["fresh"]) > 0.95
        for arm in ("convolution of 4", "convolution of 16", "LSTM"):
            assert of[arm]["attention less this"]["interval"][0] > 0.5
    for arm in ("convolution of 4", "convolution of 16", "LSTM"):
        assert rule["32"][arm]["attention less this"]["interval"][1] < 0
    assert min(rule["128"]["convolution of 4"]["fresh"]) > 0.95
    sizes = {of["parameters"] for of in recall["512"].values()}
    assert max(sizes) < 1.02 * min(sizes)


@pytest.mark.claim("E15", "holds")
def test_the_same_at_a_small_size(tmp_path):
    for arm in MIXERS:  # the library's attention is in one arm, and nowhere else
        parts = model_of("data recall 512", arm).modules()
        assert any(isinstance(part, MultiHeadAttention) for part in parts) == (arm == "attention")

    def fresh(task, arm, n, steps):
        return trained(Run(f"data {task} {n}", arm, 1e-2, 1, steps, tmp_path))["fresh"]

    assert fresh("recall", "attention", 512, 150) > 0.2 + fresh("recall", "LSTM", 512, 150)
    assert fresh("rule", "convolution of 4", 32, 60) > 0.1 + fresh("rule", "attention", 32, 60)


# --- the tasks and the benchmark -------------------------------------------------------------------------------------


def test_the_tasks_by_hand():
    draws = torch.Generator().manual_seed(0)
    (keys, values), answers = relevance("next", 5, draws)
    for row in range(5):
        card = dict(zip(keys[row, :KINDS].tolist(), values[row, :KINDS].tolist()))
        assert [card[(q + 1) % KINDS] for q in keys[row, KINDS:].tolist()] == answers[row].tolist()
    (ids,), most = largest(5, draws, n=7)
    assert ids.shape == (5, 8) and ids[:, :7].amax(1).equal(most[:, 0]) and (ids[:, 7] == 32).all()
    (ids,), counts = counting(True, 5, draws, n=13)
    assert ids.shape == (5, 14) and (ids == 0).sum(1).equal(counts[:, 0])
    swaps, seen = shells(5, draws)
    for row in range(5):
        ball = 0
        for swap, cup in zip(swaps[row], seen[row]):
            a, b = PAIRS_OF_CUPS[swap].tolist()
            ball = {a: b, b: a}.get(ball, ball)
            assert ball == cup < CUPS
    for form, length in (("end", 17), ("each", 16), ("written", 32)):
        (ids,), cups = steps(form, 5, draws)
        assert ids.shape == (5, length) and cups.shape == (5, 1 if form == "end" else 16)
    (ids,), answers = sequences("rule", 5, draws)
    assert answers[3, 4] == RULE[ids[3, 4], ids[3, 5], ids[3, 6]] and answers.shape == (5, 14)


def test_the_benchmark_runs():
    retrieval.main(["--tiny"])


def test_the_arms_have_as_many_parameters_as_attention():
    for task in ("recall 8", "rule 8"):
        wanted = size(model_of(f"data {task}", "attention"))
        assert all(abs(size(model_of(f"data {task}", arm)) - wanted) < 0.01 * wanted for arm in MIXERS)


def test_no_arm_sees_a_later_place():
    for arm, make in MIXERS.items():
        torch.manual_seed(0)
        mixer, x = make(), torch.randn(1, 12, 32)
        changed = torch.cat([x[:, :7], torch.randn(1, 5, 32)], 1)
        assert torch.allclose(mixer(x)[:, :7], mixer(changed)[:, :7], atol=1e-6), arm
        assert F.mse_loss(mixer(x)[:, 7:], mixer(changed)[:, 7:]) > 0
