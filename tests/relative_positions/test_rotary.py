"""Rotary positions against complex numbers, transformers' Llama, GPT-NeoX and GPT-J, and its functions of scaling."""

import math
from itertools import pairwise

import pytest
import torch
from position_cases import InFloat64, draw, fill, load
from transformers import GPTJConfig, GPTNeoXConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXRotaryEmbedding
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from nondual.relative_positions import Rotary, reorder_pairs
from nondual.self_attention import MultiHeadAttention

B, N, H, D, E = 2, 13, 4, 8, 20

KINDS = {
    "half": Rotary(D),
    "interleaved": Rotary(D, order="interleaved"),
    "partial": Rotary(D, n_turned=6),
    "partial, interleaved": Rotary(D, order="interleaved", n_turned=4),
    "linear": Rotary(D, scaling="linear", factor=4.0),
    "ntk": Rotary(D, scaling="ntk", factor=4.0),
    "yarn": Rotary(D, scaling="yarn", factor=4.0, trained_length=64),
}


# --- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_angles_that_are_kept_are_those_of_the_call_and_no_other(kind):
    """Tables are kept from call to call: other places, lengths, dtypes, devices and inference mode have their own."""
    rotary, x = KINDS[kind], draw(B, H, N, D)
    with torch.inference_mode():
        first = rotary.turn(x, 3)
    again = rotary.turn(x.requires_grad_(), 3)  # a table of inference mode could not be saved for backward
    again.sum().backward()
    assert torch.equal(again, first) and x.grad.isfinite().all()
    assert not torch.equal(rotary.turn(x, 4), again)
    torch.testing.assert_close(rotary.turn(x[:, :, :5], 3), again[:, :, :5])
    assert rotary.turn(x.to("meta"), 3).is_meta and torch.equal(rotary.turn(x, 3), again)
    torch.testing.assert_close(rotary.turn(x.float(), 3), again.float())
    other = Rotary(rotary.d_head, base=77.0, order=rotary.order, n_turned=rotary.n_turned)
    assert not torch.equal(other.turn(x, 3), again)
    torch.testing.assert_close(torch.func.vmap(lambda x: rotary.turn(x, 3))(x[None])[0], again)


@pytest.mark.parametrize("order", ["half", "interleaved"])
def test_turning_a_pair_is_multiplying_a_complex_number(order):
    rotary, x = Rotary(D, order=order), draw(B, H, N, D)
    halves = x.unflatten(-1, (2, D // 2)).mT if order == "half" else x.unflatten(-1, (D // 2, 2))
    numbers = torch.view_as_complex(halves.contiguous())
    angles = torch.arange(5, 5 + N)[:, None] * 10000 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    turned = torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles))
    expected = (turned.mT if order == "half" else turned).flatten(-2)
    torch.testing.assert_close(rotary.turn(x, 5), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_depend_on_the_difference_of_places_alone(kind):
    rotary, (q, k) = KINDS[kind], draw(2, B, H, N, D)
    scores = rotary.turn(q) @ rotary.turn(k).mT
    for start in (1, 100, 4096):
        torch.testing.assert_close(rotary.turn(q, start) @ rotary.turn(k, start).mT, scores)
    same_q, same_k = q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k)
    scores = rotary.turn(same_q) @ rotary.turn(same_k).mT
    torch.testing.assert_close(scores[..., 1:, 1:], scores[..., :-1, :-1])
    assert (scores[..., 0, 1:] - scores[..., 0, :1]).abs().min() > 1e-6  # and do depend on it


@pytest.mark.parametrize("kind", KINDS)
def test_the_length_stays_or_grows_by_the_temperature(kind):
    rotary, x = KINDS[kind], draw(B, H, N, D)
    turned, r = rotary.turn(x, 3), rotary.turned
    torch.testing.assert_close(turned[..., :r].norm(dim=-1), rotary.temperature * x[..., :r].norm(dim=-1))
    assert torch.equal(turned[..., r:], x[..., r:])
    assert rotary.temperature == (1 + 0.1 * math.log(4) if kind == "yarn" else 1)


def test_scaling_slows_all_pairs_or_the_slow_ones():
    plain = Rotary(64).frequencies()
    share = {
        s: Rotary(64, scaling=s, factor=4.0, trained_length=2048 if s == "yarn" else None).frequencies() / plain
        for s in ("linear", "ntk", "yarn")
    }
    assert (share["linear"] == 0.25).all()
    for s in ("ntk", "yarn"):
        assert share[s][0] == 1 and all(a >= b for a, b in pairwise(share[s].tolist()))
        torch.testing.assert_close(share[s][-1], torch.tensor(0.25))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_of_narrow_numbers_are_not_narrow(dtype):
    """Bfloat16 has no 257, so places in it would be wrong. Turned in float32 and rounded once, x is near the truth."""
    rotary, x = Rotary(D), draw(1, 1, 64, D)
    near = x.to(dtype)
    wide = rotary.turn(near.double(), 5000)
    out = rotary.turn(near, 5000)
    assert out.dtype == dtype
    assert (out - wide).abs().max() <= (2 * torch.finfo(dtype).eps) * wide.abs().max()
    angles = torch.arange(5000, 5064).to(dtype)[:, None] * rotary.frequencies(dtype=dtype)  # what it must not do
    a, b = near[..., : D // 2], near[..., D // 2 :]
    narrow = torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)
    assert (narrow - wide).abs().max() > 0.5


# --- against transformers --------------------------------------------------------------------------------------------


def agree(ours, theirs, width=E):
    """Output and the gradient of the input."""
    x, y = draw(B, N, width).requires_grad_(), draw(B, N, width).requires_grad_()
    out, judged = ours(y), theirs(x)
    torch.testing.assert_close(out, judged)
    judged.square().sum().backward()
    out.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad)


def widened(theirs, ours):
    """Their frequencies in float64, which they compute in float32: ours, once seen to be the same."""
    exact = ours.frequencies(dtype=torch.float64)
    torch.testing.assert_close(theirs.double(), exact, rtol=1e-6, atol=0)
    return exact


def later():
    return torch.full((N, N), -torch.inf, dtype=torch.float64).triu(1)[None, None]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("parameters", [{"rope_type": "default"}, {"rope_type": "yarn", "factor": 4.0}])
def test_it_is_llamas_attention(groups, parameters):
    more = {} if parameters["rope_type"] == "default" else {"original_max_position_embeddings": 64}
    config = LlamaConfig(
        hidden_size=E, num_attention_heads=H, num_key_value_heads=groups, head_dim=D, num_hidden_layers=1,
        max_position_embeddings=256, rope_parameters={"rope_theta": 500.0, **parameters, **more},
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = fill(LlamaAttention(config, layer_idx=0))
    scaled = {"scaling": "yarn", "factor": 4.0, "trained_length": 64} if more else {}
    rotary, embed = Rotary(D, base=500.0, **scaled), LlamaRotaryEmbedding(config)
    embed.inv_freq = widened(embed.inv_freq, rotary)
    with InFloat64():
        phases = embed(draw(B, N, E), torch.arange(N)[None])
    ours = MultiHeadAttention(E, H, n_kv_heads=groups, d_head=D, bias=False, causal=True, positions=rotary)
    load(ours, {n: getattr(theirs, f"{n[0]}_proj").weight for n in ("q", "k", "v")} | {"out": theirs.o_proj.weight})

    def run(x):
        with InFloat64():
            return theirs(x, position_embeddings=phases, attention_mask=later())[0]

    agree(ours, run)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_it_is_gpt_neox_attention_which_turns_a_part(share):
    config = GPTNeoXConfig(
        hidden_size=H * D, num_attention_heads=H, num_hidden_layers=1, attention_dropout=0.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share},
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = fill(GPTNeoXAttention(config, layer_idx=0))
    rotary, embed = Rotary(D, n_turned=int(D * share)), GPTNeoXRotaryEmbedding(config)
    embed.inv_freq = widened(embed.inv_freq, rotary)
    with InFloat64():
        phases = embed(draw(B, N, H * D), torch.arange(N)[None])
    rows = {kind: getattr(theirs.query_key_value, kind).detach() for kind in ("weight", "bias")}
    parts = {kind: r.unflatten(0, (H, 3, D)).movedim(1, 0).flatten(1, 2) for kind, r in rows.items()}
    ours = MultiHeadAttention(H * D, H, causal=True, positions=rotary)
    load(ours, *[dict(zip("qkv", parts[k])) | {"out": getattr(theirs.dense, k)} for k in ("weight", "bias")])

    def run(x):
        with InFloat64():
            return theirs(x, attention_mask=later(), position_embeddings=phases)[0]

    agree(ours, run, H * D)


@pytest.mark.parametrize("turned", [4, D])
def test_interleaved_it_is_gpt_js_attention(turned):
    config = GPTJConfig(n_embd=H * D, n_head=H, n_layer=1, rotary_dim=turned, n_positions=64, attn_pdrop=0.0)
    rotary, theirs = Rotary(D, order="interleaved", n_turned=turned), fill(GPTJAttention(config, layer_idx=0))
    angles = torch.arange(64)[:, None] * rotary.frequencies(dtype=torch.float64)
    exact = torch.cat([angles.sin(), angles.cos()], 1)  # they compute it in float32
    torch.testing.assert_close(theirs.embed_positions.double(), exact, rtol=0, atol=1e-5)
    theirs.embed_positions = exact
    ours = MultiHeadAttention(H * D, H, bias=False, causal=True, positions=rotary)
    load(ours, {n: getattr(theirs, f"{n}_proj").weight for n in ("q", "k", "v", "out")})

    def run(x):
        with InFloat64():
            return theirs(x, position_ids=torch.arange(N)[None].expand(B, -1), attention_mask=later())[0]

    agree(ours, run, H * D)


@pytest.mark.parametrize("width, turned", [(64, 64), (128, 128), (80, 20)])
@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn"])
def test_scaled_frequencies_are_those_of_transformers(scaling, factor, width, turned):
    """Its 'dynamic' scaling is NTK by how many times a text is longer than the training's; `factor` of ours."""
    theirs = {"rope_type": scaling, "rope_theta": 10000.0, "partial_rotary_factor": turned / width, "factor": factor}
    if scaling == "yarn":
        theirs["original_max_position_embeddings"] = 2048
    if scaling == "dynamic":
        theirs["factor"] = 1.0
    config = LlamaConfig(head_dim=width, max_position_embeddings=2048, rope_parameters=theirs)
    expected, temperature = ROPE_INIT_FUNCTIONS[scaling](config, "cpu", seq_len=int(2048 * factor))
    name, trained = {"dynamic": "ntk"}.get(scaling, scaling), 2048 if scaling == "yarn" else None
    ours = Rotary(width, n_turned=turned, scaling=name, factor=factor, trained_length=trained)
    torch.testing.assert_close(ours.frequencies(), expected, rtol=2e-6, atol=0)
    assert ours.temperature == pytest.approx(temperature)


# --- from one order to the other -------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [None, 4, 0])
def test_reordered_rows_give_the_scores_of_the_other_order(turned):
    w_q, w_k, x = draw(H * D, E), draw(2 * D, E, seed=1), draw(B, N, E)

    def scores(w_q, w_k, order):
        q, k = ((x @ w.T).unflatten(-1, (-1, D)).transpose(1, 2) for w in (w_q, w_k))
        if turned != 0:
            rotary = Rotary(D, order=order, n_turned=turned)
            q, k = rotary.turn(q), rotary.turn(k)
        return q @ k.repeat_interleave(2, 1).mT

    half = [reorder_pairs(w, heads, "half", n_turned=turned) for w, heads in ((w_q, H), (w_k, 2))]
    torch.testing.assert_close(scores(*half, "half"), scores(w_q, w_k, "interleaved"))
    back = reorder_pairs(half[0], H, "interleaved", n_turned=turned)
    assert torch.equal(back, w_q)


def test_reordered_by_hand():
    assert reorder_pairs(torch.arange(12), 2, "half").tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert reorder_pairs(torch.arange(6), 1, "interleaved").tolist() == [0, 3, 1, 4, 2, 5]
    assert reorder_pairs(torch.arange(6), 1, "half", n_turned=4).tolist() == [0, 2, 1, 3, 4, 5]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: Rotary(7), "d_head must be even, for pairs, and lie in 2 to d_head=7, got 7; or give n_turned"),
        (lambda: Rotary(0), "d_head must be even, .*, got 0"),
        (lambda: Rotary(8, n_turned=3), "n_turned must be even, .*, got 3"),
        (lambda: Rotary(8, n_turned=10), "n_turned must be even, for pairs, and lie in 2 to d_head=8, got 10"),
        (lambda: Rotary(8, base=1), "base must be above 1, got 1"),
        (lambda: Rotary(8, base=float("nan")), "base must be above 1, got nan"),
        (lambda: Rotary(8, order="pairs"), "order must be 'half' or 'interleaved', got 'pairs'"),
        (lambda: Rotary(8, scaling="dynamic"), "scaling must be None, 'linear', 'ntk' or 'yarn', got 'dynamic'"),
        (lambda: Rotary(8, scaling="linear", factor=0), "factor must be above 0 and finite, got 0"),
        (lambda: Rotary(8, scaling="ntk", factor=-2.0), "factor must be above 0 and finite, got -2"),
        (lambda: Rotary(8, factor=2.0), "factor must go with scaling=.*, got 2.0 alone"),
        (lambda: Rotary(8, scaling="yarn", factor=2.0), "trained_length must go with scaling='yarn', got None, 'yarn'"),
        (lambda: Rotary(8, trained_length=9), "trained_length must go with scaling='yarn', got 9, None"),
        (lambda: Rotary(8, scaling="yarn", trained_length=0), "trained_length must be 1 or more, got 0"),
        (lambda: Rotary(2, scaling="ntk", factor=2.0), "scaling='ntk' needs 2 pairs or more"),
        (lambda: Rotary(8).turn(draw(2, 3, 4, 6)), r"x must be \(B, H, N, 8\), got \(2, 3, 4, 6\)"),
        (lambda: Rotary(8).turn(draw(3, 4, 8)), r"x must be \(B, H, N, 8\), got \(3, 4, 8\)"),
        (lambda: Rotary(8).turn(draw(2, 3, 4, 8), -1), "start must be 0 or more, got -1"),
        (lambda: reorder_pairs(draw(6, 2), 2, "half"), "n_turned must be even, for pairs, and lie in 0 to 3, got 3"),
        (
            lambda: reorder_pairs(draw(6, 2), 4, "half"),
            r"rows must be \(n_heads · D, ...\), got \(6, 2\) and n_heads=4",
        ),
        (lambda: reorder_pairs(draw(8, 2), 2, "paper"), "order must be 'half' or 'interleaved', got 'paper'"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="x must be a Tensor, got list"):
        Rotary(8).turn([1.0])
    with pytest.raises(TypeError, match="rows must be a Tensor, got ndarray"):
        reorder_pairs(draw(8).numpy(), 2, "half")
