"""Scores without fixed roles, and a flow down one energy: the laws of `nondual.extensions.continuous`."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from nondual.extensions import EnergyFlow, Roles, euler
from nondual.language_models.gpt import GPT
from nondual.ops.attention import attention
from nondual.ops.flash_attention import flash_attention
from nondual.relative_positions import Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.tasks import successors
from nondual.transformer import FeedForward, TransformerLayer

B, H, N, D = 2, 3, 7, 5


def drawn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def of_heads(seed):
    return drawn(B, H, N, D, seed=seed)


MEASURED = Path(__file__).parents[2] / "docs/measured/proposals_continuous.json"


# ---- roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_a_share_of_one_is_ordinary_attention_and_zero_has_symmetric_scores(causal):
    q, k, v = (of_heads(seed) for seed in range(3))
    out, weights = Roles(H)(q, k, v, causal=causal, return_weights=True)
    wanted, ordinary = attention(q, k, v, causal=causal, return_weights=True)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(weights, ordinary)

    _, weights = Roles(H, 0.0)(q, k, v, return_weights=True)
    scores = weights.log()
    scores = scores - scores.diagonal(dim1=-2, dim2=-1)[..., None]  # a softmax tells scores up to one number a row
    s = (q @ k.mT + k @ q.mT) / (2 * math.sqrt(D))
    torch.testing.assert_close(scores, s - s.diagonal(dim1=-2, dim2=-1)[..., None])


def test_the_scores_are_those_of_the_symmetric_part_and_a_share_of_the_antisymmetric_one():
    """By the matrices themselves: M = S + A, and x M xᵀ with S + λ A, another λ for each head."""
    mixer = MultiHeadAttention(H * D, H, bias=False, op=Roles(H, learned=True)).double()
    share = torch.tensor([0.3, -0.7, 1.9], dtype=torch.float64)
    assert isinstance(mixer.op, Roles)
    mixer.op.share.data.copy_(share)
    x = drawn(B, N, H * D)
    _, weights = mixer(x, return_weights=True)
    for head in range(H):
        rows = slice(head * D, (head + 1) * D)
        m = mixer.q_proj.weight[rows].mT @ mixer.k_proj.weight[rows]
        s, a = (m + m.mT) / 2, (m - m.mT) / 2
        torch.testing.assert_close(weights[:, head], (x @ (s + share[head] * a) @ x.mT / D**0.5).softmax(-1))


def test_with_rotary_positions_direction_comes_from_place_alone():
    """At λ = 0 two tokens score alike whichever of them asks; the turn between their places does not."""
    mixer = MultiHeadAttention(H * 4, H, bias=False, op=Roles(H, 0.0), positions=Rotary(4)).double()
    x, turn = drawn(B, N, H * 4), Rotary(4).turn
    _, weights = mixer(x, return_weights=True)
    q, k = (turn(p(x).unflatten(-1, (H, 4)).transpose(1, 2), 0) for p in (mixer.q_proj, mixer.k_proj))
    torch.testing.assert_close(weights, ((q @ k.mT + k @ q.mT) / (2 * 4**0.5)).softmax(-1))


def test_any_operation_can_form_the_scores_and_masks_reach_it():
    q, k, v = (of_heads(seed).float() for seed in range(3))
    mask = torch.rand(N, N, generator=torch.Generator().manual_seed(3)) < 0.6
    mask.fill_diagonal_(True)
    roles = Roles(H, 0.4)
    torch.testing.assert_close(Roles(H, 0.4, op=flash_attention)(q, k, v, causal=True), roles(q, k, v, causal=True))
    _, weights = roles(q, k, v, mask=mask, return_weights=True)
    assert (weights[..., ~mask] == 0).all()


def test_the_share_learns_and_its_gradient_is_right():
    roles = Roles(2, 0.5, learned=True).double()
    q, k, v = (drawn(1, 2, 4, 3, seed=seed).requires_grad_() for seed in range(3))
    assert torch.autograd.gradcheck(
        lambda share, q, k, v: functional_call(roles, {"share": share}, (q, k, v), {"causal": True}),
        (roles.share.detach().clone().requires_grad_(), q, k, v),
    )
    assert [name for name, _ in roles.named_parameters()] == ["share"]
    assert not list(Roles(2, 0.5).parameters()) and "share" in Roles(2, 0.5).state_dict()


def test_a_gpt_takes_it():
    torch.manual_seed(0)
    model = GPT(11, 12, 2, 3, max_len=N, op=Roles(3, 0.0))
    ids = torch.randint(11, (B, N))
    model.loss(ids).backward()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 11
    torch.testing.assert_close(model(ids)[:, :-1], model(changed)[:, :-1])
    out = model.generate(ids[:, :3], 2, cached=False)
    assert out.shape[0] == B


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_what_it_is(dtype):
    q, k, v = (of_heads(seed).to(dtype) for seed in range(3))
    out = Roles(H, 0.3)(q, k, v)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), Roles(H, 0.3)(q.double(), k.double(), v.double()), atol=0.03, rtol=0.03)


def test_what_roles_refuses():
    with pytest.raises(ValueError, match="n_heads must be 1 or more, got 0"):
        Roles(0)
    with pytest.raises(ValueError, match="share must be finite, got nan"):
        Roles(2, math.nan)
    q = of_heads(0)
    with pytest.raises(ValueError, match=r"q and k must be \(B, 2, N, D\).*leave out cache, memory and grouped heads"):
        Roles(2)(q, q, q)
    with pytest.raises(ValueError, match="of the same positions"):
        Roles(H)(q[:, :, -1:], q, q)
    with pytest.raises(TypeError, match="k must be a Tensor"):
        Roles(H)(q, [q], q)
    mixer = MultiHeadAttention(12, 2, causal=True, op=Roles(2))
    cache = mixer.new_cache(1, 9)
    with torch.no_grad():
        mixer(torch.randn(1, 4, 12), cache=cache)
        with pytest.raises(ValueError, match="leave out cache"):
            mixer(torch.randn(1, 1, 12), cache=cache)
    assert cache.length == 4


# ---- direction -------------------------------------------------------------------------------------------------------


def test_with_positions_mutual_scores_tell_direction():
    """Two layers by hand: the two of a pair look at each other; then a question looks for its character's partner."""
    kinds, ring = 7, 5
    ids, answers = successors(64, ring, characters=kinds, questions=3, generator=torch.Generator().manual_seed(0))
    place, end = torch.arange(ids.shape[1]), 2 * ring
    pair = F.one_hot(torch.where(place < end, place // 2, ring)).float()
    second, asks = ((place < end) & (place % 2 == 1)).float()[:, None], (place >= end).float()[:, None]
    shown, asked = F.one_hot(ids, 2 * kinds).float().split(kinds, -1)
    parts = {"pair": pair, "second": second, "asks": asks}
    given = [each.expand(len(ids), *each.shape) for each in parts.values()]

    def look(x, matrix, causal):
        """One head of attention with this matrix, its share 0, whose values are the characters that are shown."""
        roles = Roles(1, 0.0)
        out = roles((x @ matrix)[:, None], x[:, None], shown[:, None], causal=causal, scale=1.0)
        return out[:, 0]

    sizes = [kinds, kinds, ring + 1, 1, 1, kinds]
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    at = dict(zip(("shown", "asked", "pair", "second", "asks", "partner"), map(slice, starts, starts[1:])))
    for causal in (False, True):
        first, then = torch.zeros(2, starts[-1], starts[-1])
        first[at["pair"], at["pair"]] = 30 * torch.eye(ring + 1)
        then[at["asked"], at["partner"]] = 30 * torch.eye(kinds)
        then[at["asks"], at["second"]] = 30
        x = torch.cat([shown, asked, *given, torch.zeros_like(shown)], -1)
        both = look(x, first, causal)
        x = torch.cat([shown, asked, *given, 2 * both - shown], -1)
        assert torch.equal(look(x, then + then.mT, causal)[:, end:].argmax(-1), answers)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_without_positions_and_with_all_visible_no_score_tells_direction(share):
    """Pairs the other way round are the same tokens, and the ring runs the other way: the answers stay as they were."""
    torch.manual_seed(0)
    ids, answers = successors(9, 5, characters=7, questions=3)
    turned = ids.clone()
    turned[:, 0:10:2], turned[:, 1:10:2] = ids[:, 1:10:2], ids[:, 0:10:2]
    read = nn.Embedding(14, 12)
    layers = nn.Sequential(
        *(TransformerLayer(MultiHeadAttention(12, 3, op=Roles(3, share)), FeedForward(12, 29), 12) for _ in range(2))
    )
    torch.testing.assert_close(layers(read(ids))[:, 10:], layers(read(turned))[:, 10:], atol=1e-5, rtol=1e-5)
    preceding = (turned[:, None, 0:10:2] == (ids[:, 10:] - 7)[..., None]).long().argmax(-1)
    assert (turned[:, 1:10:2].gather(1, preceding) != answers).all()


# ---- the flow --------------------------------------------------------------------------------------------------------


def made(**options):
    torch.manual_seed(0)
    flow = EnergyFlow(H * D, H, **options).double()
    with torch.no_grad():
        flow.gain.fill_(1.3)
        flow.shift.normal_()
        for proj in (flow.q_proj, flow.k_proj):
            proj.weight.mul_(2)
    return flow


def allowed():
    mask = torch.rand(N, N, generator=torch.Generator().manual_seed(5)) < 0.6
    mask[2] = False  # a query that may see nothing
    return mask


@pytest.mark.parametrize("mask", [None, allowed()])
def test_the_velocity_is_minus_the_gradient_of_the_energy_by_what_the_norm_gives(mask):
    flow, x = made(), drawn(B, N, H * D)
    g = (flow.gain * F.layer_norm(x, x.shape[-1:], eps=flow.eps) + flow.shift).detach().requires_grad_()
    q, k = (proj(g).unflatten(-1, (H, D)).transpose(1, 2) for proj in (flow.q_proj, flow.k_proj))
    scores = q @ k.mT / D**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)[..., mask.any(-1), :]
    energy = -(D**0.5) * scores.logsumexp(-1).sum((1, 2))
    torch.testing.assert_close(flow.energy(x, mask=mask), energy)
    (gradient,) = torch.autograd.grad(energy.sum(), g)
    torch.testing.assert_close(flow.velocity(x, mask=mask), -gradient)


def test_the_energy_of_one_position_by_hand():
    """One position asks itself alone: E = -q · k."""
    flow, x = made(), drawn(1, 1, H * D)
    q, k = (proj(flow.gain * F.layer_norm(x, x.shape[-1:]) + flow.shift) for proj in (flow.q_proj, flow.k_proj))
    torch.testing.assert_close(flow.energy(x), -(q * k).sum((1, 2)))


def test_two_tokens_at_right_angles_by_hand():
    """Each scores 1 with itself and 0 with the other, and moves by as much because it asks as because it is asked."""
    flow = EnergyFlow(4, 1, eps=0.0).double()
    with torch.no_grad():
        for proj in (flow.q_proj, flow.k_proj):
            proj.weight.copy_(torch.eye(4) / math.sqrt(2))
    x = torch.tensor([[[1.0, 1, -1, -1], [1, -1, 1, -1]]], dtype=torch.float64)
    torch.testing.assert_close(flow.energy(x).item(), -4 * math.log(1 + math.e))
    own = math.e / (1 + math.e)
    torch.testing.assert_close(flow.velocity(x), own * x + (1 - own) * x.flip(1))


def test_the_energy_never_rises_in_small_steps():
    flow, x = made(), drawn(B, N, H * D)
    energies = [flow.energy(x)]
    for _ in range(300):
        x = x + 0.01 * flow.velocity(x)
        energies.append(flow.energy(x))
    falls = torch.stack(energies).diff(dim=0)
    assert (falls <= 1e-12).all()
    assert (energies[-1] < energies[0] - 1).all()


def test_eulers_error_falls_as_the_step():
    flow, x = made(), drawn(B, N, H * D)
    with torch.no_grad():
        exact = euler(4096)(flow.velocity, x, 0.5)
        errors = [(euler(steps)(flow.velocity, x, 0.5) - exact).norm() for steps in (32, 64, 128)]
    ratios = [a / b for a, b in pairwise(errors)]
    assert all(1.85 < ratio < 2.15 for ratio in ratios), ratios


def test_another_solver_goes_the_same_way():
    """SciPy's adaptive Runge-Kutta, as an independent judge."""
    integrate = pytest.importorskip("scipy.integrate", reason="SciPy is one of the tests' own requirements")

    def adaptive(velocity, x, time):
        def f(_, flat):
            return velocity(torch.from_numpy(flat).view_as(x)).flatten().numpy()

        found = integrate.solve_ivp(f, (0, time), x.flatten().numpy(), rtol=1e-9, atol=1e-9)
        return torch.from_numpy(found.y[:, -1]).view_as(x)

    flow, x = made(time=0.1, solver=adaptive), drawn(B, N, H * D)
    with torch.no_grad():
        exact = flow(x)
        flow.solver = euler(1000)
        torch.testing.assert_close(flow(x), exact, atol=1e-3, rtol=1e-3)


def test_the_forward_is_the_way_gone():
    flow, x = made(time=0.7, solver=euler(3)), drawn(B, N, H * D)
    at = x
    for _ in range(3):
        at = at + 0.7 / 3 * flow.velocity(at)
    torch.testing.assert_close(flow(x), at - x)


def test_each_position_is_query_and_key_at_once_so_that_a_later_one_moves_an_earlier_one():
    flow, x = made(), drawn(1, N, H * D)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x)[0], x)[:, :, 0]
    size = jacobian.abs().amax((1, 3))
    assert (size > 0).all()
    only = torch.zeros(N, N, dtype=torch.bool)
    only[4] = True  # position 4 alone asks: the others move only as its keys
    moved = flow(x, mask=only)
    assert (moved.abs().amax(-1) > 0).all()


def test_causal_no_position_is_moved_by_a_later_one_and_the_first_follows_its_own_energy():
    flow, x = made(causal=True), drawn(1, N, H * D)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x)[0], x)[:, :, 0]
    size = jacobian.abs().amax((1, 3))
    assert (size.triu(1) == 0).all() and (size.tril() > 0)[torch.ones(N, N).tril() > 0].all()
    torch.testing.assert_close(flow(x)[:, :1], flow(x[:, :1], causal=False))

    g = (flow.gain * F.layer_norm(x, x.shape[-1:]) + flow.shift).detach()
    last = g[:, -1:].clone().requires_grad_()
    q, k = (proj(torch.cat([g[:, :-1], last], 1)) for proj in (flow.q_proj, flow.k_proj))
    q, k = (each.unflatten(-1, (H, D)).transpose(1, 2) for each in (q, k))
    own = -(D**0.5) * (q[:, :, -1:] @ k.mT / D**0.5).logsumexp(-1).sum()
    (gradient,) = torch.autograd.grad(own, last)
    torch.testing.assert_close(flow.velocity(x, causal=True)[:, -1:], -gradient)


def test_the_flow_knows_no_order():
    flow, x = made(), drawn(B, N, H * D)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(flow(x)[:, order], flow(x[:, order]))


def test_gradients_reach_every_parameter_and_are_right():
    torch.manual_seed(0)
    flow = EnergyFlow(4, 2, solver=euler(2)).double()
    x = drawn(1, 3, 4).requires_grad_()
    names = [name for name, _ in flow.named_parameters()]
    assert set(names) == {"q_proj.weight", "k_proj.weight", "gain", "shift"}
    assert torch.autograd.gradcheck(
        lambda x, *parameters: functional_call(flow, dict(zip(names, parameters)), (x,)),
        (x, *(p.detach().clone().requires_grad_() for p in flow.parameters())),
    )


def test_a_layer_takes_it_and_it_compiles_for_any_length():
    torch.manual_seed(0)
    layer = TransformerLayer(EnergyFlow(12, 3, solver=euler(2), causal=True), FeedForward(12, 29), 12, norm_first=True)
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend="aot_eager")
    for n in (5, 9, 17):
        x = torch.randn(2, n, 12)
        torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n", [0, 1])
def test_short_sequences(n):
    assert made()(drawn(B, n, H * D)).shape == (B, n, H * D)
    assert made().energy(drawn(B, n, H * D)).shape == (B,)


def test_half_precision_flows_alike():
    flow, x = made(), drawn(B, N, H * D)
    wanted = flow(x)
    half = EnergyFlow(H * D, H).to(torch.bfloat16)
    half.load_state_dict(flow.state_dict())
    found = half(x.bfloat16())
    assert found.dtype == torch.bfloat16 and half.energy(x.bfloat16()).dtype == torch.float32
    assert (found.double() - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_no_energy(dtype):
    """In float32 to the bit, of x in half precision too; and of a narrow module, its own."""
    flow, narrow, x = made().float(), made().to(dtype), drawn(B, N, H * D, dtype=torch.float32)
    right = flow.energy(x), flow.energy(x.to(dtype)), narrow.energy(x.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        found = flow.energy(x), flow.energy(x.to(dtype)), narrow.energy(x)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(found, right))


def test_what_the_flow_refuses():
    for bad, match in [
        ({"d_model": 0}, "d_model must be 1 or more, got 0"),
        ({"n_heads": 5}, "d_model must be a multiple of n_heads, got 12 and 5; or give d_head"),
        ({"d_head": 0}, "d_head must be 1 or more, got 0"),
        ({"time": 0.0}, "time must be above 0 and finite, got 0.0"),
        ({"time": math.inf}, "time must be above 0 and finite, got inf"),
    ]:
        with pytest.raises(ValueError, match=match):
            EnergyFlow(**{"d_model": 12, "n_heads": 3} | bad)
    with pytest.raises(ValueError, match="steps must be 1 or more, got 0"):
        euler(0)
    flow = EnergyFlow(12, 3)
    with pytest.raises(TypeError, match="x must be a Tensor"):
        flow([[1.0]])
    with pytest.raises(ValueError, match=r"x must be \(B, N, 12\), got \(2, 12\)"):
        flow(torch.zeros(2, 12))
    for mask in (torch.zeros(3, 3), torch.ones(3, 4, dtype=torch.bool), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask must be boolean"):
            flow(torch.zeros(2, 3, 12), mask=mask)
    assert isinstance(flow, nn.Module)


# ---- ten tasks -------------------------------------------------------------------------------------------------------


@pytest.mark.claim("A8.5", "holds if")
def test_what_ten_tasks_say_of_attention_without_fixed_roles():
    """By the protocol's own words; and the library's form of it: mutual scores, and a flow down one energy."""
    run = json.loads(MEASURED.read_text())["figures"]["compared"]
    arms = ["symmetric less base", "one projection less base", "symmetric, rotary less base, rotary"]
    rows = [run[arm] for arm in (*arms, "learned share less base", "flow less base")]
    good = [sum(row["is"] in ("equivalent", "better", "better as named") for row in each.values()) for each in rows]
    bad = [sum(row["is"] == "worse as named" for task, row in each.items() if task != "direction") for each in rows]
    assert max(good) < 8 and min(bad) <= 2, "neither as hoped nor refuted"
    assert all(row[task]["is"].startswith("better") for row in rows[:-1] for task in ("recall", "conjunction"))
    assert all(row["is"] == "worse as named" for row in rows[-1].values()), "the flow"
    symmetric = {task: row["mean"] for task, row in rows[0].items()}
    assert [round(100 * symmetric[task]) for task in ("recall", "conjunction", "reverse", "long range")] == [
        8,
        6,
        -4,
        -11,
    ]
    assert round(symmetric["Shakespeare"], 2) == -0.03

    q, k, v = (of_heads(seed) for seed in range(3))
    scores = Roles(H, 0.0)(q, k, v, return_weights=True)[1].log()
    around = sum(scores[..., i, (i + 1) % 3] - scores[..., (i + 1) % 3, i] for i in range(3))
    torch.testing.assert_close(around, torch.zeros_like(around))  # a ring of three, both ways: mutual
    flow, x = made(), drawn(B, N, H * D)
    assert (flow.energy(x + 0.01 * flow.velocity(x)) < flow.energy(x)).all()
