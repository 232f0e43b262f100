"""The benchmark of the heads' roles, on small layers."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.roles import DRAWS, Model, main, measure, random_bases, share_of, turn_at, vectors, weights_of
from nondual.analysis import antisymmetric_share, attention_layers
from nondual.relative_positions import Rotary
from nondual.self_attention import MultiHeadAttention


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers(**options):
    torch.manual_seed(0)
    made = [MultiHeadAttention(40, 5, **options) for _ in range(2)]
    with torch.no_grad():
        made[1].k_proj.weight.copy_(made[1].q_proj.weight)
    return made


def test_shares_are_the_librarys_own_and_chance_is_a_half():
    plain, symmetric = layers()
    found = measure(Model([plain, symmetric]))
    assert found["heads"] == 10 and "at distances" not in found and "as read" not in found
    assert found["shares"][0] == [round(antisymmetric_share(plain, head), 4) for head in range(5)]
    assert found["shares"][1] == [0.0] * 5
    chance = (1 - 1 / 40) / 2
    assert found["random entries"] == pytest.approx(chance, abs=0.03)
    assert found["random bases"] == pytest.approx(chance, abs=0.01)
    assert 5 <= found["below all draws"] <= 7 and found["above all draws"] <= 2
    low, high = found["less than random bases"]["interval"]
    assert low < found["less than random bases"]["mean"] < high


def test_the_share_of_a_product_is_that_of_the_matrix():
    left, right = drawn(2, 7, 3)
    product = left @ right.T
    part = (product - product.T) / 2
    assert share_of(left, right) == pytest.approx(float(part.norm() ** 2 / product.norm() ** 2))


def test_the_share_at_a_distance_is_what_a_pair_does_not_have_both_ways():
    """Scores of vectors at two places, as Rotary turns their queries and keys: by hand, pair by pair."""
    left, right = drawn(2, 6, 4)
    positions = Rotary(4)
    layer = attention_layers(MultiHeadAttention(8, 2, positions=positions))[0]
    one, other = 0.0, 0.0
    for i in range(6):
        for j in range(6):
            at = [
                positions.turn(each[None, None, None], place)[0, 0, 0] for each, place in ((left[i], 9), (right[j], 4))
            ]
            back = [
                positions.turn(each[None, None, None], place)[0, 0, 0] for each, place in ((left[j], 4), (right[i], 9))
            ]
            there, again = at[0] @ at[1], back[0] @ back[1]
            one += float((there - again) ** 2)
            other += 2 * float(there**2 + again**2)
    assert share_of(left, right, turn_at(layer, 5)) == pytest.approx(one / other)
    assert share_of(left, left, turn_at(layer, 5)) == pytest.approx(0, abs=1e-12)
    assert share_of(left, right, turn_at(layer, 0)) == pytest.approx(share_of(left, right))
    assert turn_at(attention_layers(MultiHeadAttention(8, 2))[0], 3) is None


def test_pairs_of_one_can_be_left_out():
    left, right = drawn(2, 7, 3)
    product = (left @ right.T).fill_diagonal_(0)
    part = (product - product.T) / 2
    assert share_of(left, right, of_two=True) == pytest.approx(float(part.norm() ** 2 / product.norm() ** 2))


def test_random_bases_have_the_same_singular_values():
    left, right = drawn(2, 11, 3)
    new = random_bases(left, right, torch.Generator().manual_seed(0))
    values = (torch.linalg.svdvals(a @ b.T)[:3] for a, b in ((left, right), new))
    torch.testing.assert_close(*values)
    assert not torch.allclose(left @ right.T, new[0] @ new[1].T)


def test_heads_of_a_group_have_one_key():
    layer = attention_layers(MultiHeadAttention(24, 6, n_kv_heads=2))[0]
    (q, k), (other, same), (_, another) = (weights_of(layer, head) for head in (0, 2, 3))
    assert torch.equal(k, same) and not torch.equal(k, another) and not torch.equal(q, other)
    assert share_of(q, k) == pytest.approx(antisymmetric_share(layer, 0))


def test_what_a_layer_reads_has_no_mean_and_only_the_first_moments_count():
    made = layers(positions=Rotary(8))
    x = drawn(2, 9, 40).float()
    model = Model(made, lambda: [layer(x) for layer in made])
    first, _ = vectors(model)
    torch.testing.assert_close(first, (x - x.mean((0, 1))).flatten(0, 1).double(), atol=1e-6, rtol=1e-5)
    assert len(vectors(model._replace(moments=5))[0]) == 5
    found = measure(model)
    assert found["as read"]["tokens"] == 18 and found["as read"]["shares"][1] == [0.0] * 5
    assert found["at distances"]["1"] > 0.1
    q, k = weights_of(attention_layers(made[0])[0], 2)
    assert found["as read"]["shares"][0][2] == round(share_of(first @ q, first @ k, of_two=True), 4)
    assert DRAWS >= 19  # below all of them: 1 in 20 by chance


def test_a_symmetric_score_can_do_what_biases_do():
    """x M yᵀ and a bias of the queries: the same weights as a symmetric score with the bias's part on both sides."""
    x, m, bias = drawn(6, 4), drawn(4, 4, seed=1), drawn(4, seed=2)
    m = m + m.T
    of_key = x @ bias
    torch.testing.assert_close((x @ m @ x.T + of_key).softmax(-1), (x @ m @ x.T + of_key + of_key[:, None]).softmax(-1))


def test_tiny(capsys):
    main(["--tiny"])
    assert "'heads': 6" in capsys.readouterr().out
