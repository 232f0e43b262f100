"""ALiBi against transformers' Bloom, and what it says by itself."""

import pytest
import torch
from position_cases import InFloat64, draw, fill, load
from transformers import BloomConfig
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

from nondual.relative_positions import ALiBi
from nondual.self_attention import MultiHeadAttention

B, N, D = 2, 11, 6


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 31])
def test_the_slopes_are_those_of_bloom(heads):
    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float64)[:, 0, 1]  # at place 1
    torch.testing.assert_close(torch.tensor(ALiBi(heads).slopes, dtype=torch.float64), theirs, rtol=1e-6, atol=0)


def test_eight_heads_have_the_slopes_of_the_paper():
    assert ALiBi(8).slopes == tuple(2.0**-h for h in range(1, 9))


def test_by_hand():
    expected = [[[0, -1, -2], [-1, 0, -1], [-2, -1, 0]]]
    assert ALiBi(1).slopes == (2**-8,)
    assert (ALiBi(1).bias(3, 3) * 2**8).tolist() == expected
    assert (ALiBi(1).bias(1, 3) * 2**8).tolist() == [expected[0][2:]]


@pytest.mark.parametrize("heads", [4, 3])
def test_it_is_blooms_attention_forward_and_backward(heads):
    """Bloom adds slope · place of the key: within a row that differs from ours by a constant, which softmax ignores."""
    e = heads * D
    theirs = fill(BloomAttention(BloomConfig(hidden_size=e, n_head=heads, hidden_dropout=0.0), layer_idx=0))
    ours = MultiHeadAttention(e, heads, causal=True, positions=ALiBi(heads))
    rows = {kind: getattr(theirs.query_key_value, kind).detach() for kind in ("weight", "bias")}
    parts = {kind: r.unflatten(0, (heads, 3, D)).movedim(1, 0).flatten(1, 2) for kind, r in rows.items()}
    named = [dict(zip("qkv", parts[kind])) | {"out": getattr(theirs.dense, kind)} for kind in ("weight", "bias")]
    load(ours, *named)
    x, y = draw(B, N, e).requires_grad_(), draw(B, N, e).requires_grad_()
    slopes = torch.tensor(ALiBi(heads).slopes, dtype=torch.float64)  # theirs, tested above, are in float32
    alibi = (slopes[:, None, None] * torch.arange(N)).repeat(B, 1, 1)
    torch.testing.assert_close(
        build_alibi_tensor(torch.ones(B, N).long(), heads, torch.float64), alibi, rtol=1e-6, atol=0
    )
    later = torch.full((N, N), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    with InFloat64():
        judged = theirs(x, torch.zeros_like(x), alibi, later)[0]
    out = ours(y)
    torch.testing.assert_close(out, judged)
    judged.square().sum().backward()
    out.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="n_heads must be 1 or more, got 0"):
        ALiBi(0)
    with pytest.raises(ValueError, match="n must lie in 0 to m=2"):
        ALiBi(2).bias(3, 2)
