"""Bahdanau attention against a literal double loop, and what depends on what."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.mark.claim("A1.1", "holds")
def test_additive_scores_equal_a_literal_double_loop():
    """vᵀ tanh(W_s s_i + W_h h_j), one number at a time."""
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


def products(run):
    """Multiply-adds of the matrix products, as torch counts them."""
    with FlopCounterMode(display=False) as count:
        run()
    return count.get_total_flops() // 2


def test_the_encoders_states_are_projected_once_a_sentence():
    """W_h h costs B · M · A · H multiply-adds: once a sentence, however many steps are taken, and once for each step
    where a caller does not hand it on."""
    decoder = AttentionDecoder(Y, S, H, A).double()
    _, h = states()
    s0, once = torch.zeros(B, S, dtype=torch.float64), B * M * A * H
    y = {n: torch.randn(B, n, Y, dtype=torch.float64) for n in (1, 2, 9)}
    step = products(lambda: decoder.step(y[1][:, 0], s0, h)) - once
    for n in (1, 2, 9):
        assert products(lambda n=n: decoder(y[n], s0, h)) == once + n * step
    projected = decoder.attention.project(h)
    assert products(lambda: decoder.step(y[1][:, 0], s0, h, projected=projected)) == step
    for a, b in zip(decoder.step(y[1][:, 0], s0, h, projected=projected), decoder.step(y[1][:, 0], s0, h)):
        assert torch.equal(a, b)


def test_hooks_and_adapters_on_the_projections_are_heard():
    """They are called as modules: an adapter on W_h or W_s changes the scores, and is trained."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.more = base, nn.Linear(base.in_features, base.out_features, bias=False)
            self.in_features, self.out_features = base.in_features, base.out_features

        def forward(self, x):
            return self.base(x) + self.more(x)

    plain = AdditiveAttention(S, H, A).double()
    s, h = states()
    for name in ("w_s", "w_h"):
        module = copy.deepcopy(plain)
        setattr(module, name, Adapted(getattr(module, name)).double())
        context, weights = module(s, h)
        assert not torch.allclose(weights, plain(s, h)[1])
        context.square().sum().backward()
        assert getattr(module, name).more.weight.grad.abs().sum() > 0
    heard = []
    plain.w_h.register_forward_hook(lambda *_: heard.append(1))
    decoder = AttentionDecoder(Y, S, H, A).double()
    decoder.attention = plain
    decoder(torch.randn(B, 4, Y, dtype=torch.float64), torch.zeros(B, S, dtype=torch.float64), h)
    assert heard == [1]


def test_autocast():
    """The decoder under autocast, with a float32 state: the weights are a softmax taken in float32."""
    decoder = AttentionDecoder(Y, S, H, A)
    s, h = (x.float() for x in states())
    y = torch.randn(B, N, Y)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = decoder(y, s[:, 0], h, torch.ones(B, 1, M, dtype=torch.bool))
    expected, rows = decoder(y, s[:, 0], h)
    torch.testing.assert_close(out.float(), expected, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(weights.float(), rows, atol=3e-2, rtol=3e-2)
    half = torch.full((1, 1, 70_000), 2.0, dtype=torch.float16)
    assert attend(half, torch.ones(1, 70_000, 1, dtype=torch.float16))[1].double().sum() == pytest.approx(1, abs=3e-3)


def test_gradients_for_each_sample_and_forward_mode():
    module, (s, h) = AdditiveAttention(S, H, A).double(), states()
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, s, h):
        return torch.func.functional_call(module, parameters, (s[None], h[None]))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, s, h)
    module(s, h)[0].square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(each[name].sum(0), p.grad)
    _, along = torch.func.jvp(lambda s: module(s, h)[0].sum(), (s,), (s,))
    leaf = s.clone().requires_grad_()
    torch.testing.assert_close(along, (torch.autograd.grad(module(leaf, h)[0].sum(), leaf)[0] * s).sum())


def test_what_is_no_tensor_is_named():
    s, h = states()
    module = AdditiveAttention(S, H, A).double()
    decoder = AttentionDecoder(Y, S, H, A)
    weights = module.w_s.weight.detach(), module.w_h.weight.detach(), module.v.detach()
    for call, name in (
        (lambda: module(s.numpy(), h), "s"),
        (lambda: module(s, h.tolist()), "h"),
        (lambda: module(s, h, projected=h.numpy()), "projected"),
        (lambda: attend(s.numpy(), h), "scores"),
        (lambda: dot_scores(s, s.numpy()), "h"),
        (lambda: additive_scores(s.numpy(), h, *weights), "s"),
        (lambda: additive_scores(s, h.tolist(), *weights), "h"),
        (lambda: additive_scores(s, h, weights[0].numpy(), *weights[1:]), "w_s"),
        (lambda: additive_scores(s, h, weights[0], weights[1].numpy(), weights[2]), "w_h"),
        (lambda: additive_scores(s, h, *weights[:2], weights[2].tolist()), "v"),
        (lambda: decoder(s.numpy(), s, h), "y"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a Tensor, got (ndarray|list); use torch."):
            call()
    with pytest.raises(ValueError, match=r"projected must be project\(h\), \(2, 5, 13\), got \(2, 5, 11\)"):
        module(s, h, projected=h)


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


@pytest.mark.claim("A1.9", "holds if")
def test_before_2017_one_scheme_had_three_scores():
    """Additive, dot and general: three scores of the same two arguments, and one softmax and weighted mean after them.

    Additive is bounded by the sum of |v| and bends; dot and general double with the question. What Luong calls concat
    is the additive one.
    """
    s, h = states()
    draw = torch.Generator().manual_seed(3)
    w_s, w_h, v, w = (torch.randn(size, generator=draw, dtype=torch.float64) for size in ((A, S), (A, H), (A,), (S, H)))
    scores = {
        "additive": lambda s: additive_scores(s, h, w_s, w_h, v),
        "dot": lambda s: dot_scores(s, h[..., :S]),
        "general": lambda s: dot_scores(s @ w, h),
    }
    for name, score in scores.items():
        context, weights = attend(score(s), h)
        torch.testing.assert_close(weights.sum(-1), torch.ones(B, N, dtype=torch.float64))
        torch.testing.assert_close(context, torch.einsum("bnm,bmh->bnh", weights, h))
        doubled = torch.allclose(score(2 * s), 2 * score(s))
        assert doubled == (name != "additive")
    bound = v.abs().sum()
    assert scores["additive"](1e6 * s).abs().max() <= bound < scores["dot"](1e6 * s).abs().max()

    pair = torch.cat([s[:, :, None].expand(B, N, M, S), h[:, None].expand(B, N, M, H)], -1)
    concat = torch.tanh(pair @ torch.cat([w_s, w_h], 1).mT) @ v
    torch.testing.assert_close(concat, scores["additive"](s))


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
