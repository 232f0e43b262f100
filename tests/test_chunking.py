"""nondual.chunking: the parts by hand, the laws of cutting, and the published formulas written down anew."""

import math

import pytest
import torch
from torch import nn

from nondual.chunking import (
    ChunkingLayer,
    Cuts,
    DynamicChunking,
    Router,
    cut_probabilities,
    downsample,
    ratio_loss,
    smooth,
    upsample,
)
from nondual.efficient_attention.native_sparse_attention import NativeSparseAttention
from nondual.language_models.bytes import Layers, rotary_layer
from nondual.transformer_layer import MixerBlock

E, MAIN = 12, 20


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Given(nn.Module):
    """A router that cuts where it is told to, with the probabilities that it is given."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x, before=None):
        return Cuts(self.p, self.p >= 0.5)


def layer(main=None, router=None, d_main=None):
    chunking = DynamicChunking(nn.Identity() if main is None else main, E, d_main=d_main, router=router)
    nn.init.normal_(chunking.residual.weight)
    return chunking


def real(d_main=MAIN):
    """With a main network of attention, a residual path, and a router that is not at its start."""
    chunking = layer(Layers([rotary_layer(d_main, 2), rotary_layer(d_main, 2)], d_main), d_main=d_main)
    for parameter in chunking.router.parameters():
        nn.init.normal_(parameter)
    if chunking.wider is not None:
        nn.init.normal_(chunking.wider)
    return chunking.double()


def test_probabilities_by_hand():
    q, k = torch.tensor([[[1.0, 0], [0, 3], [-2, 0], [1, 1], [0, 0]]]), torch.tensor([[[2.0, 0]] * 5])
    expected = [0, 0.5, 1, (1 - math.sqrt(0.5)) / 2, 0.5]
    assert torch.allclose(cut_probabilities(q, k), torch.tensor([expected]))


def test_a_router_begins_with_the_likeness_of_its_input():
    x = torch.randn(3, 7, E)
    p, cut = Router(E)(x)
    assert (p[:, 0] == 1).all() and cut[:, 0].all()
    for t in range(1, 7):
        cosine = (x[:, t] * x[:, t - 1]).sum(-1) / (x[:, t].norm(dim=-1) * x[:, t - 1].norm(dim=-1))
        assert torch.allclose(p[:, t], (1 - cosine) / 2, atol=1e-6)
    assert torch.equal(cut, p >= 0.5)
    assert not Router(E)(torch.ones(1, 5, E)).cut[:, 1:].any()  # what stays the same is not cut


def test_pieces_by_hand():
    x = torch.arange(10.0).view(2, 5, 1)
    cut = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 0, 1, 0]]).bool()
    pieces = downsample(x, cut)
    assert pieces[0, :2, 0].tolist() == [0, 3] and pieces[1, :, 0].tolist() == [5, 6, 8]
    back = upsample(pieces, cut, torch.zeros(2, 1))
    assert back[..., 0].tolist() == [[0, 0, 0, 3, 3], [5, 6, 6, 8, 8]]
    goes_on = upsample(pieces[:, 1:], cut & (torch.arange(5) > 0), torch.full((2, 1), 7.0))
    assert goes_on[0, :, 0].tolist() == [7, 7, 7, 3, 3]


def test_smoothing_is_an_average_that_goes_on():
    z, p = torch.randn(2, 7, 5, dtype=torch.float64), torch.rand(2, 7, dtype=torch.float64)
    state = torch.randn(2, 5, dtype=torch.float64)
    whole, last = smooth(z, p, state)
    h = state
    for j in range(7):
        h = p[:, j, None] * z[:, j] + (1 - p[:, j, None]) * h
        assert torch.allclose(whole[:, j], h)
    assert torch.allclose(last, h)
    first, between = smooth(z[:, :3], p[:, :3], state)
    second, _ = smooth(z[:, 3:], p[:, 3:], between)
    assert torch.allclose(torch.cat([first, second], 1), whole)
    assert torch.equal(smooth(z, torch.ones_like(p))[0], z)
    given = [x[:, :4, :2] if x.ndim == 3 else x[:, :4] for x in (z, p)] + [state[:, :2]]
    assert torch.autograd.gradcheck(lambda *each: smooth(*each)[0], [x.clone().requires_grad_() for x in given])


def test_the_ratio_loss_by_hand_and_where_it_leads():
    p = torch.tensor([[1.0, 0.2, 0.6, 0.2]])
    cuts, n = Cuts(p, p >= 0.5), 3.0
    assert ratio_loss(cuts, n).item() == pytest.approx(3 / 2 * (2 * 0.5 * 0.5 + 0.5 * 0.5))
    fewer = Cuts(torch.tensor([[0.25] * 4], requires_grad=True), torch.tensor([[True, False, False, False]]))
    assert ratio_loss(fewer, 4.0).item() == pytest.approx(1.0)
    for share, sign in ((3, 1), (1, -1)):  # too many cuts of 4 at one in 2, too few
        given = torch.full((1, 4), 0.5, requires_grad=True)
        ratio_loss(Cuts(given, torch.arange(4)[None] < share), 2.0).backward()
        assert (given.grad * sign > 0).all()
    padded = Cuts(torch.cat([p, torch.rand(1, 3)], 1), torch.tensor([[1, 0, 1, 0, 1, 1, 1]]).bool())
    assert ratio_loss(padded, n, torch.arange(7)[None] < 4).item() == pytest.approx(ratio_loss(cuts, n).item())


def test_where_everything_is_cut_it_is_the_main_network():
    chunking = layer(nn.Linear(E, E), Given(torch.ones(3, 7)))
    x = torch.randn(3, 7, E)
    inside = chunking.norm(x)
    assert torch.allclose(chunking(x), chunking.residual(inside) + chunking.main(inside), atol=1e-6)


def test_it_is_the_published_formulas():
    """Equations 4 to 9, position by position and one sequence at a time."""
    chunking, x = real(), torch.randn(3, 17, E, dtype=torch.float64)
    out = chunking(x)
    router, inside = chunking.router, chunking.norm(x)
    for row, given in zip(out, inside):
        q, k = given @ router.q_proj.weight.T, given @ router.k_proj.weight.T
        p = [1.0] + [0.5 * (1 - (q[t] @ k[t - 1] / (q[t].norm() * k[t - 1].norm())).item()) for t in range(1, 17)]
        kept = [t for t in range(17) if p[t] >= 0.5]
        assert 1 < len(kept) < 17
        pieces = torch.stack([torch.cat([given[t], chunking.wider]) for t in kept])
        thought, smoothed = chunking.main(pieces[None])[0, :, :E], []
        for z, t in zip(thought, kept):
            smoothed.append(z if not smoothed else p[t] * z + (1 - p[t]) * smoothed[-1])
        for t in range(17):
            mine = smoothed[sum(at <= t for at in kept) - 1]
            assert torch.allclose(row[t], chunking.residual.weight @ given[t] + mine)


def test_the_gradient_of_how_sure_a_choice_was():
    """Straight through: in the forward pass 1, in the backward pass max(p, 1 - p)."""
    p = torch.tensor([[1.0, 0.3, 0.8, 0.4]], requires_grad=True)
    chunking, x = layer(router=Given(p)), torch.randn(1, 4, E)
    inside = chunking.norm(x).detach()
    chunking(x).sum().backward()
    pieces = inside[0, [0, 2]].sum(-1)  # what each piece adds up to; the second is smoothed with the first
    second = 0.8 * pieces[1] + 0.2 * pieces[0]
    by_hand = torch.stack([pieces[0], -pieces[0], second + 2 * (pieces[1] - pieces[0]), -second])
    assert torch.allclose(p.grad[0, 1:], by_hand[1:], atol=1e-5)


def test_no_output_depends_on_a_later_input():
    chunking, x = real(), torch.randn(1, 19, E, dtype=torch.float64, requires_grad=True)
    for t in (0, 8, 17):
        (gradient,) = torch.autograd.grad(chunking(x)[:, t].sum(), x)
        assert (gradient[:, t + 1 :] == 0).all() and (gradient[:, t] != 0).any()
    changed = torch.cat([x[:, :9], torch.randn_like(x[:, 9:])], 1)
    assert torch.allclose(chunking(x)[:, :9], chunking(changed)[:, :9])


def test_rows_do_not_touch_one_another():
    chunking, x = real(), torch.randn(3, 13, E, dtype=torch.float64)
    assert torch.allclose(chunking(x), torch.cat([chunking(row[None]) for row in x]))


@pytest.mark.parametrize("parts", [[1] * 11, [4, 7], [10, 1], [0, 11]])
@torch.no_grad()
def test_step_by_step_is_the_whole(parts):
    chunking, x = real(), torch.randn(1, 11, E, dtype=torch.float64)
    cache = chunking.new_cache(1, 11)
    out = torch.cat([chunking(part, cache=cache) for part in x.split(parts, 1)], 1)
    assert torch.allclose(out, chunking(x))


@torch.no_grad()
def test_an_error_leaves_the_cache_as_it_was():
    chunking, x = real(), torch.randn(1, 5, E, dtype=torch.float64)
    cache = chunking.new_cache(1, 11)
    chunking(x, cache=cache)
    before, expected = cache.before, chunking(torch.cat([x, x], 1))[:, 5:]
    hook = chunking.residual.register_forward_hook(lambda *_: 1 / 0)  # after the main network has read on
    with pytest.raises(ZeroDivisionError):
        chunking(x, cache=cache)
    hook.remove()
    assert cache.before is before
    assert torch.allclose(chunking(x, cache=cache), expected)


@torch.no_grad()
def test_an_error_leaves_caches_in_the_networks_cache_as_they_were(held_by):
    sparse = NativeSparseAttention(E, 1, block=2, selected=3, window=3)
    chunking, x = DynamicChunking(Layers([MixerBlock(sparse, E)], E), E), torch.randn(1, 5, E)
    cache = chunking.new_cache(1, 11)
    chunking(x, cache=cache)
    before = held_by(cache)
    chunking.residual.register_forward_hook(lambda *_: 1 / 0)  # after the main network has read on
    with pytest.raises(ZeroDivisionError):
        chunking(x, cache=cache)
    assert held_by(cache) == before


def test_every_parameter_gets_its_gradient():
    chunking = real()
    chunking(torch.randn(2, 17, E, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any() for p in chunking.parameters())


def test_gradients_are_those_of_finite_differences_where_cuts_stay():
    chunking, x = real(E), torch.randn(1, 5, E, dtype=torch.float64, requires_grad=True)
    cuts = chunking.router(chunking.norm(x))
    assert 1 < cuts.cut.sum() < 5
    chunking.router = Given(cuts.p.detach())  # ste makes the gradient of p another than the slope
    assert torch.autograd.gradcheck(chunking, (x,), fast_mode=True)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_short_sequences(n):
    chunking, x = real(), torch.randn(2, n, E, dtype=torch.float64)
    assert chunking(x).shape == (2, n, E)
    assert downsample(x, torch.ones(2, n).bool()).shape == (2, n, E)


def test_half_precision_and_layouts():
    chunking = real().float()
    x = torch.randn(2, E, 13).mT
    assert torch.allclose(chunking(x), chunking(x.contiguous()))
    half = chunking.bfloat16()
    out = half(x.bfloat16())
    assert out.dtype == torch.bfloat16 and half.router(x.bfloat16()).p.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert real().float()(x).isfinite().all()


def test_compiled_and_exported_it_serves_every_length():
    """There no piece is left out, since shapes cannot depend on values: the pieces beyond the last cut are read by
    no position."""
    chunking = layer(nn.Linear(E, E))
    compiled = torch.compile(chunking, fullgraph=True, dynamic=True, backend="eager")
    program = torch.export.export(
        chunking, (torch.randn(2, 9, E),), dynamic_shapes={"x": {0: 2, 1: torch.export.Dim("n", min=3)}}
    ).module()
    for n in (9, 14):
        x = torch.randn(2, n, E)
        assert torch.allclose(compiled(x), chunking(x), atol=1e-5)
        assert torch.allclose(program(x), chunking(x), atol=1e-5)


def test_what_is_not_finite_stays_behind_the_place_where_it_is():
    chunking, x = real(), torch.randn(1, 9, E, dtype=torch.float64)
    broken = x.clone()
    broken[:, 5] = math.nan
    assert torch.allclose(chunking(broken)[:, :5], chunking(x)[:, :5])


@torch.no_grad()
def test_a_layer_hands_on_what_it_is_given():
    chunking, x = real(), torch.randn(1, 5, E, dtype=torch.float64)
    wrapped = ChunkingLayer(chunking)
    assert torch.equal(wrapped(x, cache=chunking.new_cache(1, 5)), wrapped(x))


def test_bad_input_is_refused():
    chunking = real()
    with pytest.raises(ValueError, match="d_main must be d_model"):
        DynamicChunking(nn.Identity(), 8, d_main=7)
    for make in (lambda: Router(0), lambda: DynamicChunking(nn.Identity(), 0)):
        with pytest.raises(ValueError, match="d_model must be 1 or more"):
            make()
    with pytest.raises(TypeError, match="x must be a Tensor"):
        chunking([[1.0]])
    for wrong in (torch.randn(2, E), torch.randn(2, 3, E + 1), torch.ones(2, 3, E).long()):
        with pytest.raises(ValueError, match="x must be floating point"):
            chunking(wrong)
    x = torch.randn(2, 3, E, dtype=torch.float64)
    with pytest.raises(ValueError, match="batch must be 1 with a cache"):
        chunking.new_cache(2)
    with pytest.raises(ValueError, match="one sequence"):
        chunking(x, cache=chunking.new_cache(1, 3))
    with pytest.raises(TypeError, match="ChunkingCache"):
        chunking(x, cache={})
    with pytest.raises(ValueError, match="has no new_cache"):
        layer().new_cache(1)
    with pytest.raises(ValueError, match="pieces_of must be above 1"):
        ratio_loss(Cuts(torch.ones(1, 1), torch.ones(1, 1).bool()), 1.0)
