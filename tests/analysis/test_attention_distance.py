"""How far heads look: by hand, by a loop over all pairs, and on heads whose answer is known."""

import math

import pytest
import torch

from nondual.analysis import attention_distance, patch_distances


def test_by_hand():
    """Three patches in a row, 4 pixels wide. Each looks at the first one: 0, 4 and 8 pixels away."""
    weights = torch.zeros(3, 3)
    weights[:, 0] = 1
    assert attention_distance(weights, (1, 3), 4, n_special=0) == 4.0
    assert attention_distance(torch.eye(3), (1, 3), 4, n_special=0) == 0.0
    slant = 2**0.5
    square = torch.tensor([[0, 1, 1, slant], [1, 0, slant, 1], [1, slant, 0, 1], [slant, 1, 1, 0]])
    torch.testing.assert_close(patch_distances((2, 2), 5), 5 * square)


def test_patches_that_are_not_square():
    far = patch_distances((2, 3), (2, 7))
    assert far.shape == (6, 6) and far[0, 3] == 2 and far[0, 1] == 7
    torch.testing.assert_close(far[0, 5], torch.tensor(math.hypot(2, 14)))


def test_it_is_the_loop_over_all_pairs_and_other_tokens_have_no_place():
    rows, columns, special = 2, 3, 2
    n = rows * columns
    weights = torch.randn(4, 2, n + special, n + special, generator=torch.Generator().manual_seed(0)).softmax(-1)
    found = attention_distance(weights, (rows, columns), (3, 5), n_special=special)
    assert found.shape == (4, 2)
    for at in ((0, 0), (3, 1)):
        total = 0.0
        for query in range(n):
            row = weights[at][special + query, special:]
            for key in range(n):
                down, across = query // columns - key // columns, query % columns - key % columns
                total += float(row[key] / row.sum()) * math.hypot(3 * down, 5 * across) / n
        assert float(found[at]) == pytest.approx(total, rel=1e-5)


def test_even_attention_looks_as_far_as_the_mean_of_all_distances():
    even = torch.full((1, 1, 1, 17, 17), 1 / 17)
    torch.testing.assert_close(attention_distance(even, 4, 8)[0, 0, 0], patch_distances(4, 8).mean())


def test_weight_on_the_class_token_does_not_count_as_near():
    look = torch.full((17, 17), 0.01)
    look[:, 0] = 0.84
    torch.testing.assert_close(attention_distance(look, 4), patch_distances(4).mean())
    look[5] = 0
    look[5, 0] = 1.0
    assert attention_distance(look, 4).isnan()


@pytest.mark.parametrize(
    "weights, options, says",
    [
        (None, {}, "weights must be a Tensor"),
        (torch.ones(4, 4), {}, r"\(\.\.\., 5, 5\) for a grid of 2 x 2 patches after 1 other tokens, got .*\(4, 4\)"),
        (torch.ones(5, 5, dtype=torch.long), {}, "weights must be floating point"),
        (torch.ones(5, 5), {"n_special": -1}, "weights must be"),
        (torch.ones(5, 5), {"patch_size": 0}, "patch_size must be a positive integer"),
    ],
)
def test_what_is_refused(weights, options, says):
    with pytest.raises((TypeError, ValueError), match=says):
        attention_distance(weights, 2, **options)
