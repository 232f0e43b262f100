"""Each attention against its formula written out, one pair at a time; what all of them have in common."""

import math

import pytest
import torch

from nondual.attention_mechanism import (
    AdditiveAttention,
    Attention,
    ConcatAttention,
    CoverageAttention,
    DotAttention,
    GeneralAttention,
    LastState,
    LocalAttention,
    LocationAttention,
    UniformAttention,
    smooth,
)

B, N, M, S, H, A, K = 3, 2, 7, 5, 6, 11, 4


def make(name):
    torch.manual_seed(0)
    made = {
        "additive": lambda: AdditiveAttention(S, H, A),
        "concat": lambda: ConcatAttention(S, H, A),
        "dot": lambda: DotAttention(H, H),
        "general": lambda: GeneralAttention(S, H),
        "local": lambda: LocalAttention(S, H, 2),
        "location": lambda: LocationAttention(S, H, A, K, 3),
        "coverage": lambda: CoverageAttention(S, H, A),
        "uniform": lambda: UniformAttention(S, H),
        "last state": lambda: LastState(S, H),
    }[name]().double()
    if name == "coverage":
        torch.nn.init.normal_(made.w_c)
    return made


NAMES = ("additive", "concat", "dot", "general", "local", "location", "coverage", "uniform", "last state")


def given(attention, seed=1):
    draw = torch.Generator().manual_seed(seed)
    s = torch.randn(B, N, attention.d_state, generator=draw, dtype=torch.float64)
    h = torch.randn(B, M, H, generator=draw, dtype=torch.float64)
    past = torch.randn(B, M, generator=draw, dtype=torch.float64).softmax(-1)
    return s, h, past


def literal(name, a, s, h, past, j):
    """The score of one state s with position j of h (M, H), by the paper's formula."""
    if name == "additive":
        return a.v @ torch.tanh(a.w_s.weight @ s + a.w_h.weight @ h[j])
    if name == "concat":
        return a.v @ torch.tanh(a.w.weight @ torch.cat([s, h[j]]))
    if name == "dot":
        return sum(x * y for x, y in zip(s, h[j]))
    if name in ("general", "local"):
        return s @ a.w.weight @ h[j]
    if name == "coverage":
        return a.v @ torch.tanh(a.w_s.weight @ s + a.w_s.bias + a.w_h.weight @ h[j] + a.w_c * past[j])
    if name == "location":
        f = []
        for k in range(K):
            inside = [(j + r - 1, r) for r in range(3) if 0 <= j + r - 1 < M]
            f.append(sum(a.filters.weight[k, 0, r] * past[at] for at, r in inside))
        w_f = a.w_f.weight @ torch.stack(f)
        return a.v @ torch.tanh(a.w_s.weight @ s + a.w_s.bias + a.w_h.weight @ h[j] + w_f)
    return torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "last state"])
def test_scores_equal_their_formula_one_pair_at_a_time(name):
    attention = make(name)
    s, h, past = given(attention)
    scores = attention.scores(s, h, past=past)
    for b in range(B):
        for i in range(N):
            for j in range(M):
                torch.testing.assert_close(scores[b, i, j], literal(name, attention, s[b, i], h[b], past[b], j))
    if name not in ("local",):
        context, weights = attention(s, h, past=past)
        torch.testing.assert_close(weights, scores.softmax(-1))
        torch.testing.assert_close(context, weights @ h)


def test_local_weights_equal_their_formula():
    attention = make("local")
    s, h, _ = given(attention)
    lengths, d = (7, 4, 1), attention.width
    mask = torch.arange(M) < torch.tensor(lengths)[:, None]
    context, weights = attention(s, h, mask[:, None])
    for b in range(B):
        for i in range(N):
            p = (lengths[b] - 1) * torch.sigmoid(attention.v_p.weight[0] @ torch.tanh(attention.w_p.weight @ s[b, i]))
            near = [j for j in range(lengths[b]) if abs(j - p) <= d]
            e = torch.stack([s[b, i] @ attention.w.weight @ h[b, j] for j in near]).softmax(-1)
            expected = torch.zeros(M, dtype=torch.float64)
            for j, share in zip(near, e):
                expected[j] = share * torch.exp(-((j - p) ** 2) / (2 * (d / 2) ** 2))
            torch.testing.assert_close(weights[b, i], expected)
    torch.testing.assert_close(context, weights @ h)
    assert (weights.sum(-1) <= 1).all()


def test_the_last_state_is_the_end_of_either_direction():
    attention = make("last state")
    s, h, _ = given(attention)
    mask = (torch.arange(M) < torch.tensor([7, 4, 1])[:, None])[:, None]
    context, weights = attention(s, h, mask)
    for b, n in enumerate((7, 4, 1)):
        expected = torch.cat([h[b, n - 1, : H // 2], h[b, 0, H // 2 :]])
        torch.testing.assert_close(context[b], expected.expand(N, H))
    assert weights[1, 0].tolist() == [0.5, 0, 0, 0.5, 0, 0, 0] and weights[2, 0, 0] == 1
    one = LastState(S, H, bidirectional=False).double()
    torch.testing.assert_close(one(s, h, mask)[0][:, 0], torch.stack([h[0, 6], h[1, 3], h[2, 0]]))


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing_and_an_empty_source_gives_zero(name):
    """A row of a padded batch reads as it does alone; padding may hold anything finite."""
    attention = make(name)
    s, h, past = given(attention)
    lengths = (7, 4, 0)
    mask = (torch.arange(M) < torch.tensor(lengths)[:, None])[:, None]
    past = past * mask[:, 0]
    context, weights = attention(s, h + 1e3 * ~mask.mT, mask, past=past)
    for b, n in enumerate(lengths[:2]):
        alone = attention(s[b : b + 1], h[b : b + 1, :n], past=past[b : b + 1, :n])
        torch.testing.assert_close((context[b : b + 1], weights[b : b + 1, :, :n]), alone)
        assert (weights[b, :, n:] == 0).all()
        start = attention.start(h, mask)
        torch.testing.assert_close(start[b : b + 1, :n], attention.start(h[b : b + 1, :n]))
    assert (context[2] == 0).all() and (weights[2] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_no_nan_where_nothing_may_be_read(name):
    attention = make(name)
    s, h, past = (x.requires_grad_() for x in given(attention))
    mask = (torch.arange(M) < torch.tensor([7, 4, 0])[:, None])[:, None]
    assert torch.autograd.gradcheck(lambda s, h, past: attention(s, h, mask, past=past)[0], (s, h, past))
    attention(s, h, mask, past=past)[0].sum().backward()
    for x in (h, *attention.parameters()):
        assert x.grad is None or x.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_projection_and_what_it_remembers_may_be_given(name):
    attention = make(name)
    s, h, _ = given(attention)
    for a, b in zip(attention(s, h), attention(s, h, projected=attention.project(h), past=attention.start(h))):
        assert torch.equal(a, b)
    weights = attention(s, h)[1][:, 0]
    after = attention.carry(attention.start(h), weights)
    assert torch.equal(after, weights)


def test_coverage_remembers_a_sum():
    attention = make("coverage")
    one, two = torch.full((1, M), 0.25), torch.full((1, M), 0.5)
    assert torch.equal(attention.carry(one, two), one + two)


def test_windowing_and_smoothing():
    torch.manual_seed(0)
    attention = LocationAttention(S, H, A, K, 3, window=1, weigh=smooth).double()
    s, h, _ = given(attention)
    past = torch.nn.functional.one_hot(torch.tensor([0, 3, 6]), M).double()
    _, weights = attention(s, h, past=past)
    share = attention.scores(s, h, past=past).sigmoid()
    for b, at in enumerate((0, 3, 6)):
        near = (torch.arange(M) - at).abs() <= 1
        torch.testing.assert_close(weights[b], share[b] * near / (share[b] * near).sum(-1, keepdim=True))


def test_concat_is_additive_with_one_matrix():
    concat, additive = make("concat"), make("additive")
    with torch.no_grad():
        additive.w_s.weight.copy_(concat.w.weight[:, :S])
        additive.w_h.weight.copy_(concat.w.weight[:, S:])
        additive.v.copy_(concat.v)
    s, h, _ = given(concat)
    torch.testing.assert_close(additive(s, h), concat(s, h))


def test_a_scaled_dot():
    s, h, _ = given(make("dot"))
    plain, scaled = DotAttention(H, H), DotAttention(H, H, scale=1 / math.sqrt(H))
    torch.testing.assert_close(scaled.scores(s, h), plain.scores(s, h) / math.sqrt(H))


class Nearest(Attention):
    """A new one in four lines: the negative squared distance as the score."""

    def _scores(self, s, projected, past):
        return -torch.cdist(s, projected).square()


def test_a_new_attention_defines_its_scores_alone():
    attention = Nearest(H, H)
    s, h, _ = given(attention)
    weights = attention(s, h)[1]
    torch.testing.assert_close(weights, (-torch.cdist(s, h).square()).softmax(-1))
    with pytest.raises(NotImplementedError, match="Attention must define _scores"):
        Attention(H, H)(s, h)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: DotAttention(5, 6), "d_state and d_memory must be equal for a dot product, got 5 and 6; use General"),
        (lambda: LocationAttention(S, H, A, K, 4), "kernel must be odd, so that it has a middle, got 4"),
        (lambda: LocalAttention(S, H, 0), "width must be 1 or more, got 0"),
        (lambda: LastState(S, 7), "d_memory must be even for two directions, got 7"),
        (lambda: AdditiveAttention(0, H, A), "d_state must be 1 or more, got 0"),
        (
            lambda: make("location")(*given(make("location"))[:2], past=torch.zeros(B, 2)),
            r"past must be \(B, M\) = \(3, 7\)",
        ),
        (lambda: make("last state")(torch.zeros(B, N, S), torch.zeros(B, M, 5)), r"h must be \(B, length, 6\)"),
        (lambda: make("general").project(torch.zeros(B, M, 5)), r"h must be \(B, length, 6\), got \(3, 7, 5\)"),
        (
            lambda: make("local")(*given(make("local"))[:2], torch.ones(B, N, M, dtype=torch.bool)),
            "mask must be the same for every query here",
        ),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
