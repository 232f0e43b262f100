"""Bahdanau attention against a literal double loop, and what depends on what."""

import math

import pytest
import torch
from torch import nn

from nondual.attention_mechanism import (
    AdditiveAttention,
    AttentionDecoder,
    additive_scores,
    attend,
    dot_scores,
    scaled_dot_scores,
)

B, N, M, S, H, A, Y = 2, 3, 5, 7, 11, 13, 17


def states(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=draw, dtype=torch.float64) for size in ((B, N, S), (B, M, H)))


def test_additive_scores_equal_a_literal_double_loop():
    s, h = states()
    draw = torch.Generator().manual_seed(1)
    w_s, w_h, v = (torch.randn(size, generator=draw, dtype=torch.float64) for size in ((A, S), (A, H), (A,)))
    scores = additive_scores(s, h, w_s, w_h, v)
    for b in range(B):
        for i in range(N):
            for j in range(M):
                hidden = [
                    math.tanh(sum(float(w_s[a, x] * s[b, i, x]) for x in range(S)) + float(w_h[a] @ h[b, j]))
                    for a in range(A)
                ]
                expected = sum(float(v[a]) * hidden[a] for a in range(A))
                assert scores[b, i, j].item() == pytest.approx(expected, rel=1e-12)


def test_additive_score_by_hand():
    one = torch.ones(1, 1)
    score = additive_scores(torch.tensor([[[0.25]]]), torch.tensor([[[0.5]]]), 2 * one, one, torch.tensor([3.0]))
    assert score.item() == pytest.approx(3 * math.tanh(1.0))


def test_dot_scores_and_their_scale():
    s, h = (x[..., :S] for x in states())
    torch.testing.assert_close(dot_scores(s, h), torch.einsum("bnd,bmd->bnm", s, h))
    torch.testing.assert_close(scaled_dot_scores(s, h), dot_scores(s, h) / math.sqrt(S))
    with pytest.raises(ValueError, match="one width for a dot product, got 7 and 11"):
        dot_scores(*states())


def test_context_is_the_weighted_mean_of_the_encoder_states():
    _, h = states()
    scores = torch.randn(B, N, M, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    context, weights = attend(scores, h)
    torch.testing.assert_close(weights, scores.softmax(-1))
    torch.testing.assert_close(context, torch.einsum("bnm,bmh->bnh", weights, h))


def test_padding_is_not_read_and_an_empty_source_gives_zero():
    _, h = states()
    mask = torch.ones(B, 1, M, dtype=torch.bool)
    mask[0, :, 3:] = False
    mask[1] = False
    scores = torch.zeros(B, N, M, dtype=torch.float64)
    context, weights = attend(scores, h, mask)
    assert (weights[0, :, 3:] == 0).all()
    torch.testing.assert_close(context[0], h[0, :3].mean(0).expand(N, H))
    assert (context[1] == 0).all()
    assert attend(scores[..., :0], h[:, :0])[0].shape == (B, N, H)


def test_module_equals_the_functions():
    s, h = states()
    module = AdditiveAttention(S, H, A).double()
    context, weights = module(s, h)
    expected, rows = attend(additive_scores(s, h, module.w_s.weight, module.w_h.weight, module.v), h)
    torch.testing.assert_close((context, weights), (expected, rows))
    assert torch.autograd.gradcheck(lambda s, h: module(s, h)[0], [x.requires_grad_() for x in states()])


def test_the_decoder_asks_with_its_previous_state():
    """The weights of step i are those of the state before it: they do not know y_i, and the next ones do."""
    decoder = AttentionDecoder(Y, S, H, A).double()
    _, h = states()
    y, s0 = torch.randn(B, N, Y, dtype=torch.float64), torch.randn(B, S, dtype=torch.float64)
    out, weights = decoder(y, s0, h)
    assert out.shape == (B, N, S) and weights.shape == (B, N, M)
    first = decoder.attention(s0[:, None], h)[1][:, 0]
    torch.testing.assert_close(weights[:, 0], first)
    second = decoder.attention(out[:, :1], h)[1][:, 0]
    torch.testing.assert_close(weights[:, 1], second)


@pytest.mark.claim("A1.1", "holds")
def test_questioner_and_answerer_are_separate_networks_trained_together():
    """∂h/∂s = 0, ∂s/∂h ≠ 0; the two share no parameter, and one loss moves both."""
    torch.manual_seed(0)
    encoder = nn.GRU(4, 3, bidirectional=True, batch_first=True).double()
    decoder = AttentionDecoder(Y, S, 6, A).double()
    x, y = torch.randn(1, M, 4, dtype=torch.float64), torch.randn(1, N, Y, dtype=torch.float64)
    s0 = torch.randn(1, S, dtype=torch.float64, requires_grad=True)

    h = encoder(x)[0]
    states, _ = decoder(y, s0, h)
    assert torch.autograd.grad(h.sum(), s0, allow_unused=True)[0] is None  # the answerers never hear the question
    by_memory = torch.autograd.functional.jacobian(lambda h: decoder(y, s0, h)[0], h)
    assert (by_memory.abs().amax((0, 2, 3, 5)) > 0).all()  # every decoder state hears every encoder state

    theirs, ours = ({id(p) for p in m.parameters()} for m in (encoder, decoder))
    assert not theirs & ours
    states.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in [*encoder.parameters(), *decoder.parameters()])


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: AdditiveAttention(S, H, A)(torch.zeros(B, S), torch.zeros(B, M, H)), r"s must be \(B, length, 7\)"),
        (
            lambda: AdditiveAttention(S, H, A)(torch.zeros(B, N, S), torch.zeros(B, M, S)),
            r"h must be \(B, length, 11\)",
        ),
        (lambda: AdditiveAttention(S, H, A)(torch.zeros(1, N, S), torch.zeros(B, M, H)), "one batch, got 1 and 2"),
        (lambda: attend(torch.zeros(B, N, M), torch.zeros(B, M, H), torch.ones(B, M)), "mask must be torch.bool"),
        (
            lambda: attend(torch.zeros(B, N, M), torch.zeros(B, M, H), torch.ones(7, M, dtype=bool)),
            "mask must be torch.bool",
        ),
        (
            lambda: AttentionDecoder(Y, S, H, A)(torch.zeros(B, 0, Y), torch.zeros(B, S), torch.zeros(B, M, H)),
            "length 0",
        ),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
