"""Feature maps: by hand, their errors against the exponential, and what half precision makes of elu + 1."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from nondual.efficient_attention.feature_maps import PositiveRandomFeatures, Taylor, elu_plus_one, identity
from nondual.ops.attention import attention
from nondual.ops.linear_attention import linear_attention


def test_elu_plus_one_by_hand_and_in_half_precision():
    x = torch.tensor([-30.0, -1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(elu_plus_one(x), torch.tensor([-30.0, -1.0, 0.0, 1.0986122886681098]).double().exp())
    torch.testing.assert_close(elu_plus_one(x), F.elu(x) + 1)
    (gradient,) = torch.autograd.grad(elu_plus_one(x).sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([-30.0, -1.0, 0.0, 0.0]).double().exp())
    low = torch.linspace(-20, -6.5, 50, dtype=torch.bfloat16)
    assert not (F.elu(low) + 1).any(), "1 is added to nearly -1, and nothing is left"
    torch.testing.assert_close(elu_plus_one(low).float(), low.float().exp(), rtol=2**-7, atol=0)
    assert elu_plus_one(torch.tensor([1e4, torch.inf])).tolist() == [10001.0, torch.inf]


def test_the_identity():
    x = torch.randn(3)
    assert identity(x) is x


@pytest.mark.parametrize("orthogonal", [False, True])
def test_random_features_are_positive_and_right_on_average_and_their_error_halves_with_four_times_as_many(orthogonal):
    """The law 1/√F: the root of the mean square of the error of exp(q · k / √D), over 600 draws of the rows.

    q and k are short here. The variance is exp(|q + k|²/√D) - 1 times the square, over F: with long ones a few draws
    decide over all."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64) / 6
    exact, errors = (q @ k / 8**0.5).exp(), []
    for features in (8, 32, 128):
        maps = [PositiveRandomFeatures(8, features, orthogonal=orthogonal, seed=seed).double() for seed in range(600)]
        found = torch.stack([φ(q) @ φ(k) for φ in maps])
        assert all((φ(q) > 0).all() for φ in maps[:9])
        errors.append((found - exact).square().mean().sqrt())
        assert (found.mean() - exact).abs() < 4 * errors[-1] / 600**0.5
    for few, many in pairwise(errors):
        assert 1.6 < few / many < 2.5


def test_orthogonal_rows_are_orthogonal_as_long_as_others_and_err_less():
    torch.manual_seed(0)
    rows = PositiveRandomFeatures(16, 40).double().rows
    for block in (rows[:16], rows[16:32], rows[32:]):
        products = block @ block.T
        torch.testing.assert_close(products, torch.diag(products.diag()), atol=1e-5, rtol=0)
    assert 14 < rows.square().sum(1).mean() < 18  # |w|² is 16 on average
    q, k = 0.5 * torch.randn(2, 200, 16, dtype=torch.float64)
    exact, errors = (q @ k.T / 4).exp(), {}
    for orthogonal in (True, False):
        maps = [PositiveRandomFeatures(16, 16, orthogonal=orthogonal, seed=seed).double() for seed in range(60)]
        errors[orthogonal] = sum((φ(q) @ φ(k).T - exact).square().mean() for φ in maps) / 60
    assert errors[True] < 0.97 * errors[False]


def test_softmax_attention_is_neared_by_more_features():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 50, 16, dtype=torch.float64).unbind(0)
    q, k = q / 4, k / 4
    exact, errors = attention(q, k, v, causal=True), []
    for features in (16, 256, 4096):
        φ = PositiveRandomFeatures(16, features).double()
        out, _ = linear_attention(φ(q), φ(k), v, normalise=True)
        errors.append((out - exact).square().mean().sqrt())
    assert errors[2] < errors[1] / 2 < errors[0] / 4
    out, _ = linear_attention(Taylor()(0.1 * q), Taylor()(k), v, normalise=True)
    torch.testing.assert_close(out, attention(0.1 * q, k, v, causal=True), atol=3e-3, rtol=0)
    far = attention(16 * q, 16 * k, v, causal=True)  # scores of up to 50: each query looks at one key
    φ = PositiveRandomFeatures(16, 256).double()
    out, _ = linear_attention(φ(16 * q), φ(16 * k), v, normalise=True)
    assert (out - far).square().mean().sqrt() > 0.3


def test_taylor_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])  # D = 4, so that the features are of x / √2
    φ = Taylor()(x)
    assert φ.shape == (21,)
    score = float(x @ x) / 2
    torch.testing.assert_close(φ @ φ, torch.tensor(1 + score + score**2 / 2))
    assert Taylor()(x.bfloat16()).dtype == torch.float32


def test_sizes_below_1():
    for sizes in ((0,), (4, 0)):
        with pytest.raises(ValueError, match="d_head and n_features must be 1 or more"):
            PositiveRandomFeatures(*sizes)
