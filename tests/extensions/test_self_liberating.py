"""Attention that fades over time and persists over depth: the laws of `nondual.extensions.self_liberating`."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from nondual.connections import stream
from nondual.extensions import CertifiedStream, DecayingAttention, PersistentScores, decay_between
from nondual.language_models.causal import CausalLM
from nondual.ops import masks
from nondual.ops.attention import attention
from nondual.ops.flash_attention import flash_attention
from nondual.relative_positions import ALiBi, Rotary
from nondual.transformer import FeedForward, TransformerLayer

B, H, N, D = 2, 3, 7, 4
E = H * D


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def made(half_life=3.0, **options):
    torch.manual_seed(0)
    mixer = DecayingAttention(E, H, half_life=half_life, **options).double()
    with torch.no_grad():
        mixer.log_gain.normal_(std=0.2)
        if mixer.forget is not None:
            mixer.forget.weight.normal_(std=0.5)
    return mixer


# --- the decay -------------------------------------------------------------------------------------------------------


def test_the_decay_between_by_hand():
    found = decay_between(torch.tensor([-1.0, -2.0, -4.0]))
    inf = math.inf
    assert found.tolist() == [[0, -inf, -inf], [-2, 0, -inf], [-6, -4, 0]]


def test_a_gate_of_0_forgets_all_before_it_and_gives_no_nan():
    log_forget = torch.tensor([-0.5, -math.inf, -0.25, -math.inf])
    found = decay_between(log_forget)
    assert not found.isnan().any()
    assert found[3].tolist() == [-math.inf] * 3 + [0] and found[2].tolist() == [-math.inf, -0.25, 0, -math.inf]


def test_short_stretches_stay_exact_after_long_ones():
    log_forget = torch.full((4000,), -50.0)
    log_forget[-1] = -1e-3
    assert decay_between(log_forget)[-1, -2].item() == pytest.approx(-1e-3, rel=1e-6)


@pytest.mark.parametrize("positions", [None, Rotary(D)])
def test_it_is_forgetting_attention(positions):
    """fla-core's naive function, given the layer's own queries, keys, values and gates."""
    naive = pytest.importorskip(
        "fla.ops.forgetting_attn.naive", reason="fla-core is one of the tests' own requirements"
    )
    mixer, x = made(positions=positions), drawn(B, N, E)
    q, k, v, log_forget = (part.transpose(1, 2).float() for part in mixer.parts(x))
    wanted = naive.naive_forgetting_attn(q, k, v, log_forget)
    found = mixer(x)
    torch.testing.assert_close(found.float(), mixer.float().out_proj(wanted.flatten(2)), atol=1e-5, rtol=1e-4)


def test_gates_of_1_leave_ordinary_attention_and_none_do_so_to_the_bit():
    mixer, plain, x = made(), made(forgets=False), drawn(B, N, E)
    with torch.no_grad():
        mixer.forget.weight.zero_()
        mixer.forget.bias.fill_(100.0)
    plain.load_state_dict({name: value for name, value in mixer.state_dict().items() if "forget" not in name})
    q, k, v, _ = plain.parts(x)
    wanted = plain.out_proj(attention(q, k, v, causal=True).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x), wanted)
    torch.testing.assert_close(plain(x), wanted)


@pytest.mark.parametrize("options", [{}, {"positions": Rotary(D)}, {"forgets": False}])
def test_the_flash_path_gives_the_same_and_the_same_gradients(options):
    formed, x = made(**options), drawn(B, N, E)
    flash = made(**options, op=flash_attention)
    flash.load_state_dict(formed.state_dict())
    for a, b in zip(formed.parts(x), flash.parts(x)):
        assert torch.equal(a, b)
    torch.testing.assert_close(flash(x), formed(x))
    d_out = drawn(B, N, E, seed=1)
    grads = ([*torch.autograd.grad(mixer(x), mixer.parameters(), d_out)] for mixer in (formed, flash))
    for (name, _), a, b in zip(formed.named_parameters(), *grads):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_the_flash_path_in_half_precision_and_with_gates_of_0():
    mixer, x = made(op=partial(flash_attention, impl="reference")), drawn(B, N, E)
    half = DecayingAttention(E, H, op=flash_attention).bfloat16()
    half.load_state_dict(mixer.state_dict())
    found = half(x.bfloat16())
    assert found.dtype == torch.bfloat16 and (found.double() - mixer(x)).norm() < 0.03 * mixer(x).norm()
    with torch.no_grad():
        mixer.forget.weight.zero_()
        mixer.forget.bias.fill_(-2e6)  # log f is below what counts as a gate of 0
        v = mixer.parts(x).v.transpose(1, 2).flatten(2)
        torch.testing.assert_close(mixer(x), mixer.out_proj(v))  # each position sees itself alone


def test_one_program_for_any_length_by_the_flash_path():
    torch.manual_seed(0)
    mixer = DecayingAttention(E, H, op=flash_attention)
    compiled = torch.compile(mixer, dynamic=True, fullgraph=True, backend="aot_eager")
    for n in (5, 9):
        x = torch.randn(2, n, E)
        torch.testing.assert_close(compiled(x), mixer(x))


def test_the_flash_path_refuses_what_needs_the_scores():
    mixer, x = made(op=flash_attention), drawn(B, N, E)
    with pytest.raises(ValueError, match="return_weights must be False with an op"):
        mixer(x, return_weights=True)
    with pytest.raises(ValueError, match="scores must be None with an op, which forms no scores"):
        mixer(x, scores=lambda s: s)
    with pytest.raises(TypeError, match="op must be a function such as flash_attention, or None, got str"):
        made(op="flash")


def test_rows_sum_to_one_and_a_gate_lowers_all_earlier_weights_alike():
    mixer, x = made(), drawn(B, N, E)
    _, weights = mixer(x, return_weights=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, N, dtype=torch.float64))
    assert (weights[..., ~masks.causal(N)] == 0).all()
    _, _, _, log_forget = mixer.parts(x)
    plain = made(forgets=False)
    plain.load_state_dict({name: value for name, value in mixer.state_dict().items() if "forget" not in name})
    _, undecayed = plain(x, return_weights=True)
    odds = (weights / undecayed)[..., -1, :]
    odds = (odds / odds[..., -1:]).log()  # of the last query, against its own key
    torch.testing.assert_close(odds, decay_between(log_forget)[..., -1, :])


@pytest.mark.parametrize("half_life", [1.0, 5.0, 300.0])
def test_the_gates_begin_with_the_half_life_that_was_asked_for(half_life):
    mixer = DecayingAttention(E, H, half_life=half_life)
    _, _, _, log_forget = mixer.parts(torch.zeros(1, 1, E))
    torch.testing.assert_close(math.log(2) / -log_forget, torch.full((1, H, 1), half_life), rtol=1e-3, atol=0)


def test_no_score_exceeds_the_bound():
    mixer = made()
    with torch.no_grad():
        mixer.q_proj.weight.copy_(mixer.k_proj.weight)  # a query and its own key are one: the bound is met
    x = 1e3 * drawn(B, N, E)
    q, k, _, _ = mixer.parts(x)
    scores = q @ k.mT / D**0.5
    bound = mixer.bound()[:, None, None]
    assert (scores.abs() <= bound * (1 + 1e-9)).all()
    torch.testing.assert_close(scores.diagonal(dim1=-2, dim2=-1), bound[..., 0].expand(B, H, N), rtol=1e-6, atol=0)


def test_gradients_are_right_and_reach_every_parameter():
    mixer = made()
    x = drawn(1, 4, E).requires_grad_()
    names = [name for name, _ in mixer.named_parameters()]
    assert len(names) == 7
    assert torch.autograd.gradcheck(
        lambda x, *p: torch.func.functional_call(mixer, dict(zip(names, p)), (x,)),
        (x, *(p.detach().clone().requires_grad_() for p in mixer.parameters())),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_its_gates_in_float32(dtype):
    mixer, x = made(), drawn(B, N, E)
    wanted = mixer(x)
    half = DecayingAttention(E, H).to(dtype)
    half.load_state_dict(mixer.state_dict())
    found = half(x.to(dtype))
    assert found.dtype == dtype and half.parts(x.to(dtype)).log_forget.dtype == torch.float32
    assert (found.double() - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("n", [0, 1])
def test_short_sequences(n):
    assert made()(drawn(B, n, E)).shape == (B, n, E)


def test_one_program_for_any_length():
    torch.manual_seed(0)
    mixer = DecayingAttention(E, H, positions=Rotary(D))
    compiled = torch.compile(mixer, dynamic=True, fullgraph=True, backend="aot_eager")
    for n in (5, 9, 17):
        x = torch.randn(2, n, E)
        torch.testing.assert_close(compiled(x), mixer(x))


def test_what_it_refuses():
    for bad, match in [
        ({"n_heads": 5}, "d_model must be a multiple of n_heads, got 12 and 5"),
        ({"d_model": 0}, "d_model must be 1 or more, got 0"),
        ({"half_life": 0.0}, "half_life must be above 0 and finite, got 0.0"),
        ({"positions": ALiBi(3)}, "positions must turn and add no bias, as Rotary does, got ALiBi"),
        ({"positions": Rotary(6)}, "6"),
    ]:
        with pytest.raises(ValueError, match=match):
            DecayingAttention(**{"d_model": E, "n_heads": H} | bad)
    with pytest.raises(TypeError, match="positions must be Rotary, got int"):
        DecayingAttention(E, H, positions=3)
    with pytest.raises(ValueError, match=r"x must be \(B, N, 12\), got \(2, 3, 5\)"):
        made()(drawn(2, 3, 5))
    with pytest.raises(TypeError, match="x must be a Tensor"):
        made()([1.0])


# --- over depth ------------------------------------------------------------------------------------------------------


def model(connection=stream):
    torch.manual_seed(0)
    made = CausalLM(
        11,
        E,
        3,
        layer=lambda i: TransformerLayer(DecayingAttention(E, H), FeedForward(E, 17), E, norm_first=True),
        connection=connection,
    )
    return made.double()


def test_nothing_carried_is_the_plain_stream_and_all_carried_is_realformer():
    ids = torch.randint(11, (B, N), generator=torch.Generator().manual_seed(1))
    plain = model()(ids)
    torch.testing.assert_close(model(PersistentScores(3, carried=0.0))(ids), plain)
    found = model(PersistentScores(3))
    assert not torch.allclose(found(ids), plain)

    x, above = found.embeddings(ids), None  # layer by layer, by the formula
    for layer in found.layers:
        mixer, h = layer.mixer, layer.norm1(x)
        q, k, v, log_forget = mixer.parts(h)
        s = q @ k.mT / D**0.5
        above = s if above is None else s + above
        weights = (above + decay_between(log_forget)).softmax(-1)
        x = x + mixer.out_proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + layer.feed_forward(layer.norm2(x))
    torch.testing.assert_close(found(ids), found.norm_f(x) @ found.embeddings.weight.mT)


def test_what_is_carried_can_be_learned():
    found = model(PersistentScores(3, carried=0.5, learned=True))
    ids = torch.randint(11, (B, N), generator=torch.Generator().manual_seed(1))
    found.loss(ids).backward()
    assert found.connection.carried.grad.abs().min() > 0
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 11
    torch.testing.assert_close(found(ids)[:, :-1], found(changed)[:, :-1])


def test_what_the_connection_refuses():
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="n_layers must be 1 or more"):
        PersistentScores(0)
    with pytest.raises(ValueError, match="layers"):
        model(PersistentScores(2))(ids)
    other = model(PersistentScores(3))
    other.layers[1].mixer = nn.Identity()
    with pytest.raises(ValueError, match=r"scores must be left out: the mixer of layer 1, Identity"):
        other(ids)


# --- the certified stream --------------------------------------------------------------------------------------------


def streamed(mixer, x, epsilon):
    stream, outs, kept, missing = CertifiedStream(mixer, epsilon), [], [], []
    for i in range(x.shape[1]):
        outs.append(stream.step(x[:, i : i + 1]))
        kept.append(stream.kept)
        missing.append(stream.missing)
    return torch.cat(outs, 1), kept, torch.stack(missing, -1)


@pytest.mark.parametrize("positions", [None, Rotary(D)])
@pytest.mark.parametrize("epsilon", [1e-1, 1e-3, 1e-6])
def test_the_error_of_every_output_is_within_what_was_certified(positions, epsilon):
    mixer, x = made(half_life=2.0, positions=positions), drawn(B, 150, E)
    with torch.no_grad():
        mixer.out_proj.weight.copy_(torch.eye(E))  # the outputs of the heads themselves
        found, kept, missing = streamed(mixer, x, epsilon)
        error = (found - mixer(x)).unflatten(-1, (H, D)).norm(dim=-1)
        largest = mixer.parts(x).v.norm(dim=-1).cummax(-1).values.transpose(1, 2)
    assert (missing <= epsilon).all()
    assert (error <= 2 * missing.transpose(1, 2) * largest + 1e-12).all()
    assert missing.max() > epsilon / 10 and kept[-1] < 150, "something was let go"


def test_a_mixer_on_the_flash_path_can_be_streamed():
    mixer, x = made(half_life=2.0, op=flash_attention), drawn(B, 40, E)
    with torch.no_grad():
        found, _, _ = streamed(mixer, x, 1e-9)
        torch.testing.assert_close(found, mixer(x), atol=1e-7, rtol=1e-7)


def test_it_keeps_a_bounded_number_of_keys_and_fewer_with_a_larger_epsilon():
    mixer, x = made(half_life=2.0), drawn(1, 600, E)
    most = {}
    for epsilon in (1e-1, 1e-3, 1e-6):
        _, kept, _ = streamed(mixer, x, epsilon)
        most[epsilon] = max(kept)
        assert max(kept[300:]) <= max(kept[:300]) * 1.5 and kept[-1] < 100
    assert most[1e-1] < most[1e-3] < most[1e-6]


def test_where_nothing_fades_nothing_is_let_go_and_the_stream_is_exact():
    mixer, x = made(), drawn(B, 20, E)
    with torch.no_grad():
        mixer.forget.weight.zero_()
        mixer.forget.bias.fill_(100.0)
        found, kept, missing = streamed(mixer, x, 1e-3)
        torch.testing.assert_close(found, mixer(x))
    assert kept == list(range(1, 21)) and (missing == 0).all()


def test_a_gate_of_0_lets_everything_go_at_once():
    mixer, x = made(), drawn(1, 6, E)
    with torch.no_grad():
        mixer.forget.weight.zero_()
        mixer.forget.bias.fill_(-2000.0)
        found, kept, _ = streamed(mixer, x, 1e-9)
        torch.testing.assert_close(found, mixer(x))
    assert kept == [1] * 6


def test_what_the_stream_refuses_leaves_it_as_it_was():
    with pytest.raises(TypeError, match="mixer must be a DecayingAttention, got Linear"):
        CertifiedStream(nn.Linear(2, 2), 0.1)
    with pytest.raises(ValueError, match="mixer must have forget gates: without them no key fades"):
        CertifiedStream(made(forgets=False), 0.1)
    for epsilon in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="epsilon must lie between 0 and 1"):
            CertifiedStream(made(), epsilon)
    mixer, x = made(), drawn(B, 4, E)
    stream = CertifiedStream(mixer, 1e-3)
    with pytest.raises(ValueError, match=r"x must be \(B, 1, 12\), got \(2, 4, 12\)"):
        stream.step(x)
    outs = [stream.step(x[:, i : i + 1]) for i in range(2)]
    for bad in (x, x[:1, :1], x[:, 0]):
        with pytest.raises(ValueError, match=r"x must be \(2, 1, 12\)"):
            stream.step(bad)
    outs += [stream.step(x[:, i : i + 1]) for i in range(2, 4)]
    again, _, _ = streamed(mixer, x, 1e-3)
    assert torch.equal(torch.cat(outs, 1), again)
