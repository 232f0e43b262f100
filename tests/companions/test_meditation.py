"""The claims on weightings and spotlights: zeros, hard choices, queries, broken weights, and cells that share a sum."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from benchmarks.entropy import PLAYS
from benchmarks.intervals import by_seeds
from benchmarks.meditation import KEPT, Bench, disturbance, largest, moved
from benchmarks.meditation_trained import Run, hard, trained
from nondual.analysis import weights_of
from nondual.data import shakespeare
from nondual.efficient_attention.sparse_attention import SparseAttention, local
from nondual.ops.attention import attention
from nondual.pretrained import minilm, our_smollm2

ROOT = Path(__file__).parent.parent.parent


def measured(name):
    return json.loads((ROOT / f"docs/measured/{name}.json").read_text())["figures"]


@pytest.fixture(scope="module")
def smollm2():
    return Bench(*our_smollm2(), {})


@pytest.mark.claim("C1", "holds if")
def test_every_key_that_is_seen_has_a_weight_until_it_is_rounded_and_what_a_mask_hides_has_none():
    for dtype, c in ((torch.float32, 150), (torch.bfloat16, 134), (torch.float16, 25)):
        limit = c * math.log(2)
        near, far = (torch.tensor([0.0, -gap]).softmax(0).to(dtype)[1] for gap in (limit - 0.01, limit + 0.01))
        assert near > 0 and far == 0
        assert torch.tensor([0.0, -limit - 0.01], dtype=torch.float64).softmax(0)[1] > 0
    even = torch.full((2**6,), 2.0**-25)
    assert (even.half() == 0).all() and (even.bfloat16() > 0).all()  # one of 2^25 keys that all weigh the same

    encoder = minilm()
    ids = encoder.tokenizer.encode(shakespeare()[PLAYS[0]][20_000:24_000]).ids[:256]
    weights = weights_of(encoder.model, torch.tensor([ids]))
    zero = {dtype: int((weights.to(dtype) == 0).sum()) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    assert 0 < zero[torch.float16] < weights.numel() / 10
    assert zero[torch.float32] <= zero[torch.bfloat16] < zero[torch.float16] / 10

    x = torch.randn(1, 1, 11, 16, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[:, :, 0] += 1e6
    window = SparseAttention(local(3), block=1)
    assert torch.equal(window(x, x, x)[:, :, 3:], window(other, other, other)[:, :, 3:])
    assert attention(x, x, x, causal=True, return_weights=True)[1].triu(1).eq(0).all()

    found = measured("meditation")["zeros"]
    for row in (row for name, row in found["SmolLM2"].items() if " to " in name):
        assert row["zero in float32"] == row["zero in bfloat16"] == 0 < row["zero in float16"] < row["weights"] / 10


@pytest.mark.claim("C2", "holds if")
def test_a_hard_choice_gives_scores_no_gradient_and_one_key_is_too_few(smollm2, one_thread):
    scores = torch.randn(3, 5, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert not hard(scores.softmax(-1))[0].requires_grad
    (gradient,) = torch.autograd.grad((scores.softmax(-1) @ torch.arange(5.0)).sum(), scores)
    assert (gradient != 0).all()

    folder = Path("unused")  # `trained` keeps nothing
    soft, choice = (trained(Run("recall", arm, 0.01, 7, 150, folder))["right"] for arm in ("soft", "hard"))
    assert soft > choice + 0.3

    of = measured("meditation_trained")["recall"]
    assert of["soft"]["right"]["low"] > 0.95 and of["hard"]["less soft"]["high"] < -0.5
    assert of["straight-through"]["right"]["low"] > 0.95  # one key answers as well, where it learned by a soft gradient
    with torch.inference_mode():
        ids = smollm2.text(0, 128)
        intact = smollm2.losses(ids)[0].mean()
        rise = {}
        for k in (1, 8, 64):
            with smollm2.changed(largest(k)):
                rise[k] = float(smollm2.losses(ids)[0].mean() - intact)
    assert rise[1] > 2 and rise[1] > rise[8] > rise[64] and rise[64] < 0.3
    fewer = measured("meditation")["fewer"]["largest"]
    means = [fewer[str(k)]["mean"] for k in KEPT]
    assert fewer["1"]["low"] > 2 and means == sorted(means, reverse=True) and fewer["32"]["high"] < 0.15


@pytest.mark.claim("C3", "holds")
def test_the_same_keys_weigh_differently_for_another_query_and_fixed_weights_cannot_recall(one_thread):
    keys, queries = torch.tensor([[2.0, 0], [0, 2], [1, 1]]), torch.eye(2)
    _, weights = attention(queries[None, None], keys[None, None], keys[None, None], scale=1.0, return_weights=True)
    expected = torch.tensor([math.e**2, 1, math.e]) / (math.e**2 + 1 + math.e)
    torch.testing.assert_close(weights[0, 0], torch.stack([expected, expected[[1, 0, 2]]]))

    _, weights = minilm().attention("Outside a bell softly rang while inside a dog suddenly barked.")
    rows = weights[:, :, 1:-1]
    apart = (rows[:, :, :, None] - rows[:, :, None]).abs().sum(-1) / 2
    n = rows.shape[2]
    assert (apart.sum((2, 3)) / (n * (n - 1))).min() > 0.05

    fixed = trained(Run("recall", "fixed", 0.01, 7, 150, Path("unused")))["right"]
    assert fixed < 0.5
    of = measured("meditation_trained")
    assert of["recall"]["fixed"]["less soft"]["high"] < -0.4
    of = measured("meditation")["fixed"]["all"]
    first, *others = of["every fourth layer alone"]
    assert of["mean table"]["low"] > 1 and first["low"] > 0.5 and max(one["mean"] for one in others) < 0.15


@pytest.mark.claim("C10", "contested")
def test_cells_that_divide_by_a_common_sum_are_a_softmax_with_a_silent_key():
    c, n, gain = torch.tensor([0.1, 0.3, 0.9]), 2.0, torch.tensor([4.0, 1.0, 1.0])

    def cells(sigma, gain=1.0):
        return gain * c**n / (sigma**n + (gain * c**n).sum())

    def head(scores, values):
        return attention(torch.ones(1, 1, 1, 1), scores.view(1, 1, -1, 1), values[None, None], scale=1.0).flatten()

    scores = n * c.log()
    torch.testing.assert_close(cells(0.0), head(scores, torch.eye(3)))
    silent = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    for sigma in (0.05, 0.4, 3.0):
        extra = torch.tensor([n * math.log(sigma)])
        torch.testing.assert_close(cells(sigma), head(torch.cat([scores, extra]), silent))
        torch.testing.assert_close(cells(sigma, gain), head(torch.cat([scores + gain.log(), extra]), silent))
        assert (cells(sigma, gain) > cells(sigma)).tolist() == [True, False, False]
    # where they part: a cell has its own share, a head the mean of its values, which a gain on all keys leaves as it is
    values = torch.tensor([[2.0], [-1.0], [5.0]])
    torch.testing.assert_close(head(scores + math.log(7), values), head(scores, values))
    assert not torch.allclose(cells(0.4, torch.full((3,), 7.0)), cells(0.4))


@pytest.mark.claim("C4", "holds if")
def test_weights_on_the_wrong_keys_harm_more_than_weights_that_are_too_flat_or_too_sharp(smollm2, one_thread):
    """Of a computation alone. Equal change: a fifth of the weight, half the sum of a row's absolute changes."""
    with torch.inference_mode():
        ids, rise, share = smollm2.text(1, 96), {}, {}
        intact = smollm2.losses(ids)[0].mean()
        for kind, strength in (("flatter", 0.67), ("noise", 0.79), ("mixed with another order", 0.237)):
            change, moves = disturbance(kind, strength, torch.Generator().manual_seed(0)), []

            def watched(scores, weights, seen, change=change, moves=moves):
                after = change(scores, weights, seen)
                moves.append(moved(weights, after))
                return after

            with smollm2.changed(watched):
                rise[kind] = float(smollm2.losses(ids)[0].mean() - intact)
            share[kind] = sum(moves) / len(moves)
    assert all(0.17 < moves < 0.23 for moves in share.values())
    assert rise["flatter"] < rise["noise"] + 0.1 and rise["mixed with another order"] > rise["flatter"] + 0.1

    found = measured("meditation")
    each = {kind: of["each at equal change"]["0.2"] for kind, of in found["disturbed"].items()}
    tenth = {kind: of["each at equal change"]["0.1"] for kind, of in found["disturbed"].items()}

    def apart(of, more, less):  # the interval of the difference, paired by text
        return by_seeds([a - b for a, b in zip(of[more], of[less], strict=True)])[1:]

    wrong, even = "mixed with another order", "mixed with an even spread"
    for focus in ("flatter", "sharper", even):  # a fifth: what keeps the order of the keys harms less, on every text
        assert apart(each, wrong, focus)[0] > 0 and all(a > b for a, b in zip(each[wrong], each[focus], strict=True))
    assert apart(tenth, wrong, "flatter")[0] > 0
    low, high = apart(tenth, wrong, "sharper")
    assert low < 0 < high  # a tenth: undecided
    for other in ("noise", even):  # these harm more than flattening; next to sharpening it is undecided
        low, high = apart(each, other, "sharper")
        assert apart(each, other, "flatter")[0] > 0 and low < 0 < high
    assert found["at equal change"]["0.2"]["noise, one for all heads"]["less noise"]["high"] < 0
