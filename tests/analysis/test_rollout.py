"""The rollout by hand, its laws, and what it misses."""

import pytest
import torch

from nondual.analysis import attention_rollout
from nondual.vision_transformers import VisionTransformer

L, B, H, N = 3, 2, 4, 5


def drawn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, N, N, generator=torch.Generator().manual_seed(seed), dtype=dtype).softmax(-1)


def test_by_hand():
    """Two positions, two layers: first both read position 0, then both read position 1."""
    first, second = torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[0.0, 1], [0, 1]])
    found = attention_rollout(torch.stack([first, second])[:, None, None])[0]
    # layer 1: [[1, 0], [.5, .5]]; layer 2: [[.5, .5], [0, 1]]
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    alone = attention_rollout(torch.stack([first, second])[:, None, None], residual=0.0)[0]
    torch.testing.assert_close(alone, torch.tensor([[1.0, 0], [1, 0]]))


def test_it_is_the_product_of_the_layers_with_the_last_on_the_left():
    weights = drawn(L, B, H)
    expected = torch.eye(N, dtype=torch.float64).expand(B, N, N)
    for layer in weights:
        expected = (layer.mean(1) / 2 + torch.eye(N, dtype=torch.float64) / 2) @ expected
    torch.testing.assert_close(attention_rollout(weights), expected)


def test_rows_sum_to_one_and_a_causal_stack_stays_causal():
    weights = drawn(L, B, H)
    for residual in (0.0, 0.3, 1.0):
        rolled = attention_rollout(weights, residual=residual)
        torch.testing.assert_close(rolled.sum(-1), torch.ones(B, N, dtype=torch.float64))
        assert (rolled >= 0).all()
    assert torch.equal(attention_rollout(weights, residual=1.0)[0], torch.eye(N, dtype=torch.float64))
    causal = weights.tril() / weights.tril().sum(-1, keepdim=True)
    assert not attention_rollout(causal).triu(1).any()


def test_for_a_linear_stack_with_equal_values_it_is_the_jacobian():
    """Where a layer is just (1 - r) A x + r x, the rollout is the derivative of the output by the input."""
    weights = drawn(L, 1, 1)

    def run(x):
        for layer in weights:
            x = layer[0, 0] @ x / 2 + x / 2
        return x

    slope = torch.autograd.functional.jacobian(run, torch.randn(N, dtype=torch.float64))
    torch.testing.assert_close(attention_rollout(weights)[0], slope)


@torch.no_grad()
def test_of_a_vision_transformer():
    torch.manual_seed(0)
    model = VisionTransformer(12, 4, 5, d_model=16, n_heads=4, d_ff=24, n_layers=2, n_registers=2).eval()
    _, weights = model(torch.randn(3, 3, 12, 12), return_weights=True)
    rolled = attention_rollout(weights)
    assert rolled.shape == (3, 12, 12) and model.n_special == 3
    torch.testing.assert_close(rolled.sum(-1), torch.ones(3, 12))


def test_half_precision_is_multiplied_in_float32():
    weights = drawn(12, 1, H, dtype=torch.float32)
    found = attention_rollout(weights.half())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, attention_rollout(weights), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "weights, options, says",
    [
        ([[1.0]], {}, "weights must be a Tensor"),
        (torch.ones(2, 3, 3), {}, r"floating point \(layers, B, H, N, N\), got torch.float32 \(2, 3, 3\)"),
        (torch.ones(1, 1, 1, 2, 3), {}, r"\(layers, B, H, N, N\), got torch.float32 \(1, 1, 1, 2, 3\)"),
        (torch.ones(1, 1, 1, 2, 2, dtype=torch.long), {}, "must be floating point .*, got torch.int64"),
        (torch.ones(0, 1, 1, 2, 2), {}, "of 1 layer and 1 head or more"),
        (torch.ones(1, 1, 0, 2, 2), {}, "of 1 layer and 1 head or more"),
        (torch.ones(1, 1, 1, 2, 2), {"residual": 1.5}, "residual must lie in 0 to 1, got 1.5"),
    ],
)
def test_what_is_refused(weights, options, says):
    with pytest.raises((TypeError, ValueError), match=says):
        attention_rollout(weights, **options)
