"""The claim A4.9: linear attention is φ(Q) (φ(K)ᵀ V), by the associativity of matrix products."""

import pytest
import torch

from nondual.efficient_attention.feature_maps import elu_plus_one
from nondual.ops import masks
from nondual.ops.attention import attention
from nondual.ops.linear_attention import linear_attention


def drawn(n=12, d=4):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, n, d, dtype=torch.float64).unbind(0)
    return elu_plus_one(q), elu_plus_one(k), v


@pytest.mark.claim("A4.9", "holds if")
def test_the_order_of_the_products_does_not_matter_while_no_mask_stands_between_them():
    """Without order in time: N x N first, or D x D first, the same. With a causal mask φ(K)ᵀ V shows each position the
    later ones; a running sum, chunks or steps give what the masked matrix gives."""
    q, k, v = drawn()
    torch.testing.assert_close((q @ k.mT) @ v, q @ (k.mT @ v))
    torch.testing.assert_close(linear_attention(q, k, v, causal=False)[0], q @ (k.mT @ v))
    masked = (q @ k.mT * masks.causal(12)) @ v
    assert not torch.isclose(q @ (k.mT @ v), masked)[..., :-1, :].any()
    torch.testing.assert_close((q @ (k.mT @ v))[..., -1, :], masked[..., -1, :])  # the last position sees all
    for impl in ("reference", "parallel", "chunked"):
        torch.testing.assert_close(linear_attention(q, k, v, chunk=5, impl=impl)[0], masked)


@pytest.mark.claim("A4.9", "holds if")
def test_as_printed_it_has_no_normaliser_and_grows_with_the_number_of_keys():
    """Every key given twice doubles the printed output. Softmax and the published linear attention stay as they
    are, and read a constant value as this constant."""
    q, k, v = drawn()
    twice = [x.repeat(1, 1, 2, 1) for x in (k, v)]
    plain = lambda k, v, **more: linear_attention(q, k, v, causal=False, **more)[0]  # noqa: E731
    torch.testing.assert_close(plain(*twice), 2 * plain(k, v))
    torch.testing.assert_close(attention(q, *twice), attention(q, k, v))
    torch.testing.assert_close(plain(*twice, normalise=True), plain(k, v, normalise=True))
    torch.testing.assert_close(plain(k, v, normalise=True), q @ (k.mT @ v) / (q @ k.mT.sum(-1, keepdim=True)))
    one = torch.ones_like(v)
    torch.testing.assert_close(plain(k, one, normalise=True), one)
    assert (plain(k, one) > 2).all()


@pytest.mark.claim("A4.9", "holds if")
def test_what_is_computed_first_is_d_by_d_whatever_the_length():
    for n in (3, 300):
        _, state = linear_attention(*drawn(n), causal=False)
        assert state.shape == (1, 1, 4, 4)
