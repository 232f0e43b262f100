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


def layer(bias=True):
    torch.manual_seed(0)
    return MultiHeadAttention(15, 3, bias=bias).double()


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


def test_a_table_of_scores_has_rank_d():
    x, w_q, w_k = draw(23, 12), draw(12, 5, seed=2), draw(12, 5, seed=3)
    scores = (x @ w_q) @ (x @ w_k).T
    assert torch.linalg.matrix_rank(scores) == 5
    same(scores, x @ (w_q @ w_k.T) @ x.T)


def test_the_root_of_d_makes_the_variance_one():
    for d in (7, 113):
        q, k = draw(2, 40_000, d)
        assert (q * k).sum(-1).var().item() / d == pytest.approx(1, abs=0.05)


def test_how_an_update_follows_values_and_scores():
    s, v = draw(7), draw(7, 3, seed=2)
    a = s.softmax(0)
    same(jacobian(lambda s: s.softmax(0) @ v, s), (a[:, None] * (v - a @ v)).T)
    same(jacobian(lambda v: a @ v, v), torch.einsum("j,ef->ejf", a, torch.eye(3, dtype=torch.float64)))


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
    one, x, b = layer(), draw(2, 7, 15), draw(15, seed=2)
    before = one(x)
    one.v_proj.bias.data += b
    same(one(x) - before, (one.out_proj.weight @ b).expand(2, 7, 15))


def test_a_step_turns_the_code_and_its_dot_product_tells_the_distance():
    c = Sinusoidal(16).double()(50)
    rates = 10000 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    for r in (1, 7, 31):
        same((c[r:] * c[:-r]).sum(-1), (rates * r).cos().sum().expand(50 - r), 1e-4)
        sin, cos = c[:-r, 0::2], c[:-r, 1::2]
        same(c[r:, 0::2], (rates * r).cos() * sin + (rates * r).sin() * cos, 1e-4)
        same(c[r:, 1::2], -(rates * r).sin() * sin + (rates * r).cos() * cos, 1e-4)


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


def test_a_layer_adds_its_branches_and_has_twelve_squares_of_weights():
    e = 24
    torch.manual_seed(0)
    one = TransformerLayer(MultiHeadAttention(e, 3), FeedForward(e, 4 * e), e, norm_first=True).double()
    x = draw(2, 7, e)
    mix, think = one.branches()
    y = x + mix(x)
    same(one(x), y + think(y))
    assert sum(p.numel() for p in one.parameters() if p.ndim == 2) == 12 * e * e
