"""The ten derivations of docs/companions/derivations.md: each at sizes of its own, against the library or torch."""

import pytest
import torch
import torch.nn.functional as F

from nondual.positional_encoding import Sinusoidal
from nondual.self_attention import MultiHeadAttention, SelfAttention
from nondual.transformer import FeedForward, TransformerLayer

pytestmark = pytest.mark.usefixtures("one_thread")
jacobian = torch.autograd.functional.jacobian


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def layer(bias=True, e=15, h=3):
    torch.manual_seed(0)
    return MultiHeadAttention(e, h, bias=bias).double()


def test_softmax_is_the_most_undecided_answer_to_its_scores():
    def value(a, s):
        return a @ s + torch.special.entr(a).sum()

    for seed in range(5):
        s = 3 * draw(11, seed=seed)
        a = s.softmax(0)
        same(value(a, s), s.logsumexp(0))
        for other in range(20):
            assert value(draw(11, seed=100 + other).softmax(0), s) < value(a, s)
        t = 0.3  # the exercise: with the entropy weighed by a temperature
        b = (s / t).softmax(0)
        same(b @ s + t * torch.special.entr(b).sum(), t * (s / t).logsumexp(0))


def test_one_head_is_the_formula():
    torch.manual_seed(0)
    head, x = SelfAttention(13, 5).double(), draw(2, 7, 13)
    q, k, v = (x @ p.weight.T for p in (head.q_proj, head.k_proj, head.v_proj))
    same(head(x), (q @ k.mT / 5**0.5).softmax(-1) @ v)


@pytest.mark.parametrize("d", [5, 7])
def test_queries_and_keys_matter_through_a_product_of_rank_d(d):
    x, w_q, w_k = draw(23, 13), draw(13, d, seed=2), draw(13, d, seed=3)
    product, scores = w_q @ w_k.T, (x @ w_q) @ (x @ w_k).T
    assert torch.linalg.matrix_rank(product) == torch.linalg.matrix_rank(scores) == d
    same(scores, x @ product @ x.T, 1e-11)


def test_the_root_of_d_makes_the_variance_one():
    for d in (7, 113):
        q, k = draw(2, 40_000, d)
        assert (q * k).sum(-1).var().item() / d == pytest.approx(1, abs=0.05)


def test_without_the_root_the_slopes_of_softmax_vanish_as_d_grows():
    s = draw(11)
    a = s.softmax(0)
    same(jacobian(lambda s: s.softmax(0), s), a.diag() - torch.outer(a, a))
    means = {}
    for d in (17, 257):
        scores = torch.einsum("nd,jnd->nj", draw(2_000, d), draw(7, 2_000, d, seed=2))
        means[d] = [(a * (1 - a)).mean().item() for a in (scores.softmax(-1), (scores / d**0.5).softmax(-1))]
    assert means[257][0] < means[17][0] / 3
    assert means[257][1] == pytest.approx(means[17][1], rel=0.05)


def test_how_an_update_follows_values_and_scores():
    s, v = draw(7), draw(7, 3, seed=2)
    a = s.softmax(0)
    same(jacobian(lambda s: s.softmax(0) @ v, s), (a[:, None] * (v - a @ v)).T)
    same(jacobian(lambda v: a @ v, v), torch.einsum("j,ef->ejf", a, torch.eye(3, dtype=torch.float64)))


@pytest.mark.parametrize(("e", "h"), [(15, 3), (13, 1), (22, 11)])
def test_each_head_is_the_formula_with_matrices_of_its_own(e, h):
    one, x = layer(bias=False, e=e, h=h), draw(7, e)
    blocks = zip(*(f.weight.T.chunk(h, -1) for f in (one.q_proj, one.k_proj, one.v_proj)), strict=True)
    heads = [((x @ q) @ (x @ k).T / (e / h) ** 0.5).softmax(-1) @ (x @ v) for q, k, v in blocks]
    same(sum(o @ w for o, w in zip(heads, one.out_proj.weight.T.chunk(h), strict=True)), one(x[None])[0])
    one.out_proj.weight.data = torch.eye(e, dtype=torch.float64)  # now the layer returns its heads side by side
    same(torch.cat(heads, -1), one(x[None])[0])


def test_a_layer_is_the_sum_over_its_heads():
    one, x = layer(bias=False), draw(2, 7, 15)
    y, a = one(x, return_weights=True)
    q, k = (f(x).unflatten(-1, (3, 5)).transpose(1, 2) for f in (one.q_proj, one.k_proj))
    same((q @ k.mT / 5**0.5).softmax(-1), a)
    w_v, w_o = one.v_proj.weight.T.unflatten(1, (3, 5)), one.out_proj.weight.T.unflatten(0, (3, 5))
    same(torch.einsum("bhij,bje,ehd,hdf->bif", a, x, w_v, w_o), y)
    assert all(torch.linalg.matrix_rank(w_v[:, h] @ w_o[h]) == 5 for h in range(3))


def test_heads_with_equal_queries_and_keys_act_as_one():
    one, x = layer(bias=False), draw(1, 7, 15)
    with torch.no_grad():
        for projection in (one.q_proj, one.k_proj):
            projection.weight[5:10] = projection.weight[:5]
    _, a = one(x, return_weights=True)
    same(a[:, 0], a[:, 1])
    w_v, w_o = one.v_proj.weight.T.unflatten(1, (3, 5)), one.out_proj.weight.T.unflatten(0, (3, 5))
    assert torch.linalg.matrix_rank(w_v[:, 0] @ w_o[0] + w_v[:, 1] @ w_o[1]) == 10


def test_a_bias_of_the_values_is_one_of_the_output():
    one, x, b = layer(), draw(2, 7, 15), draw(3, 5, seed=2)
    w_o, start = one.out_proj.weight.T.unflatten(0, (3, 5)), one(x)
    for h in range(3):  # each head's part by itself
        before = one(x)
        one.v_proj.bias.data[5 * h : 5 * h + 5] += b[h]
        same(one(x) - before, (b[h] @ w_o[h]).expand(2, 7, 15))
    same(one(x) - start, (b.flatten() @ one.out_proj.weight.T).expand(2, 7, 15))


@pytest.mark.parametrize("e", [22, 16])
def test_a_step_turns_the_code_and_its_dot_product_tells_the_distance(e):
    c = Sinusoidal(e).double()(50)
    rates = 10000 ** (-2 * torch.arange(e // 2, dtype=torch.float64) / e)
    assert rates[0] == 1
    for r in (1, 7, 31):
        same((c[r:] * c[:-r]).sum(-1), (rates * r).cos().sum().expand(50 - r))
        sin, cos = c[:-r, 0::2], c[:-r, 1::2]
        same(c[r:, 0::2], (rates * r).cos() * sin + (rates * r).sin() * cos)
        same(c[r:, 1::2], -(rates * r).sin() * sin + (rates * r).cos() * cos)
    from_one = 10000 ** (-2 * torch.arange(1, e // 2 + 1, dtype=torch.float64) / e)
    assert (from_one.cos().sum() - (c[1] * c[0]).sum()).abs() > 0.1  # with the index from 1 it is another code


def test_added_codes_do_not_make_the_score_depend_on_the_distance_alone():
    c, w_q, w_k = Sinusoidal(22).double()(50), draw(22, 5), draw(22, 5, seed=2)
    assert ((c[7:] @ w_q) * (c[:-7] @ w_k)).sum(-1).std() > 1


def test_the_slopes_of_the_norms():
    e = 11
    x = draw(e)

    def norm(x):
        return F.layer_norm(x, (e,), eps=0.0)

    slopes, y = jacobian(norm, x), norm(x)
    same(slopes, (torch.eye(e, dtype=torch.float64) - 1 / e - torch.outer(y, y) / e) / x.std(correction=0))
    same(slopes @ torch.ones(e, dtype=torch.float64), torch.zeros(e, dtype=torch.float64))
    same(slopes @ y, torch.zeros(e, dtype=torch.float64))
    same(norm(3 * x + 5), y)
    r = x.square().mean().sqrt()
    z = x / r
    rms = jacobian(lambda x: F.rms_norm(x, (e,), eps=0.0), x)
    same(rms, (torch.eye(e, dtype=torch.float64) - torch.outer(z, z) / e) / r)


@pytest.mark.parametrize("e", [33, 21])
def test_a_layer_adds_its_branches_and_has_twelve_squares_of_weights(e):
    torch.manual_seed(0)
    mha, ffn = MultiHeadAttention(e, 3), FeedForward(e, 4 * e)
    one, x = TransformerLayer(mha, ffn, e, norm_first=True).double(), draw(2, 7, e)
    y = x + mha(F.layer_norm(x, (e,)))
    same(one(x), y + ffn.linear2(F.gelu(ffn.linear1(F.layer_norm(y, (e,))))))
    assert sum(p.numel() for p in one.parameters() if p.ndim == 2) == 12 * e * e
