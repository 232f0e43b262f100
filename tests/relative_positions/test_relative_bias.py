"""T5's relative bias against transformers' T5, and what it says by itself."""

import pytest
import torch
from position_cases import draw, fill, load
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from nondual.relative_positions import RelativeBias
from nondual.self_attention import MultiHeadAttention

B, N, H, D, E = 2, 23, 3, 5, 12


def t5(causal, buckets=8, distance=20):
    config = T5Config(
        d_model=E, d_kv=D, num_heads=H, is_decoder=causal, dropout_rate=0.0,
        relative_attention_num_buckets=buckets, relative_attention_max_distance=distance,
    )  # fmt: skip
    return fill(T5Attention(config, has_relative_attention_bias=True, layer_idx=0))


def bias_of(theirs, causal, buckets=8, distance=20):
    ours = RelativeBias(H, n_buckets=buckets, max_distance=distance, causal=causal).double()
    ours.load_state_dict({"table.weight": theirs.relative_attention_bias.weight})
    return ours


@pytest.mark.parametrize("buckets, distance", [(32, 128), (8, 20), (6, 7), (4, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_the_bias_is_t5s(causal, buckets, distance):
    theirs = t5(causal, buckets, distance)
    ours = bias_of(theirs, causal, buckets, distance)
    for n, m in ((300, 300), (1, 300), (7, 20)):
        judged = theirs.compute_bias(n, m, past_seen_tokens=m - n)[0]
        assert torch.equal(ours.bias(n, m, dtype=torch.float64), judged)


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_t5s_attention_forward_and_backward(causal):
    """T5 does not divide scores by √D: the queries' weights are multiplied by it here."""
    theirs = t5(causal)
    ours = MultiHeadAttention(E, H, d_head=D, causal=causal, bias=False, positions=bias_of(theirs, causal))
    load(ours, {"q": theirs.q.weight * D**0.5, "k": theirs.k.weight, "v": theirs.v.weight, "out": theirs.o.weight})
    x, y = draw(B, N, E).requires_grad_(), draw(B, N, E).requires_grad_()
    later = torch.full((N, N), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    judged, out = theirs(x, mask=later if causal else None)[0], ours(y)
    torch.testing.assert_close(out, judged)
    judged.square().sum().backward()
    out.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(ours.positions.table.weight.grad, theirs.relative_attention_bias.weight.grad)


def test_ranges_by_hand():
    """Causal, 8 ranges: 4 near distances by themselves; 4 more grow by (16/4)^(1/4) each, and the last has no end."""
    ours = RelativeBias(1, n_buckets=8, max_distance=16, causal=True)
    steps = torch.tensor([3, 0, -1, -2, -3, -4, -5, -6, -8, -12, -16, -1000])
    assert ours.buckets(steps).tolist() == [0, 0, 1, 2, 3, 4, 4, 5, 6, 7, 7, 7]
    both = RelativeBias(1, n_buckets=8, max_distance=16)
    assert both.buckets(torch.tensor([-1000, -2, -1, 0, 1, 2, 1000])).tolist() == [3, 2, 1, 0, 5, 6, 7]


def test_it_starts_at_0():
    assert not RelativeBias(3).bias(4, 4).any()


@pytest.mark.parametrize(
    "options, says",
    [
        ({"n_heads": 0}, "n_heads must be 1 or more, got 0"),
        ({"n_heads": 2, "n_buckets": 7}, "n_buckets must be 4 or more and even, got 7"),
        ({"n_heads": 2, "n_buckets": 2}, "n_buckets must be 4 or more and even, got 2"),
        ({"n_heads": 2, "n_buckets": 1, "causal": True}, "n_buckets must be 2 or more, got 1"),
        ({"n_heads": 2, "max_distance": 8}, "max_distance must be above 8, .*, got 8"),
    ],
)
def test_bad_input_is_named(options, says):
    with pytest.raises(ValueError, match=says):
        RelativeBias(**options)
    with pytest.raises(ValueError, match="n must lie in 0 to m=2"):
        RelativeBias(2).bias(3, 2)
