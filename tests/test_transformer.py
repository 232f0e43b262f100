"""The stack of layers and the text encoder: weights, padding, caches, token ids, compilation, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.efficient_attention.mamba import Mamba
from nondual.feed_forward import GatedFeedForward
from nondual.ops import masks
from nondual.ops.attention import attention
from nondual.relative_positions import ALiBi, RelativeBias, Rotary
from nondual.transformer import Encoder, TextEncoder

B, N, E, HEADS, FF = 2, 7, 12, 3, 29


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_stack_returns_every_layers_weights(norm_first):
    encoder = Encoder(E, HEADS, FF, n_layers=3, norm_first=norm_first)
    x = torch.randn(B, N, E)
    mask = masks.padding(torch.tensor([N, 4]), N)
    out, weights = encoder(x, mask=mask, return_weights=True)
    assert weights.shape == (3, B, HEADS, N, N)
    assert (weights[:, 1, :, :, 4:] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, B, HEADS, N))
    torch.testing.assert_close(encoder(x, mask=mask), out)


def test_padding_does_not_change_a_sentence():
    torch.manual_seed(0)
    encoder = TextEncoder(31, 16, E, HEADS, FF, n_layers=2).eval()
    ids = torch.randint(31, (1, 5))
    padded = F.pad(ids, (0, 4), value=3)
    out = encoder(padded, mask=masks.padding(torch.tensor([5]), 9))
    torch.testing.assert_close(out[:, :5], encoder(ids), atol=1e-6, rtol=1e-5)


def test_dropout_is_for_training_only():
    encoder = Encoder(E, HEADS, FF, n_layers=1, dropout=0.5)
    x = torch.randn(B, N, E)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))


@pytest.mark.parametrize(
    "ids, says",
    [
        (torch.tensor([[3, 31]]), "ids must lie in 0 to 30, got 3 to 31"),
        (torch.tensor([[-1, 2]]), "ids must lie in 0 to 30, got -1 to 2"),
        (torch.zeros(1, 17, dtype=torch.long), "positions must lie in 0 to 15, got 17"),
        (torch.zeros(1, 3), r"ids must be integers \(B, N\)"),
        (torch.zeros(3, dtype=torch.long), r"ids must be integers \(B, N\)"),
    ],
)
def test_bad_ids_are_named(ids, says):
    with pytest.raises(ValueError, match=says):
        TextEncoder(31, 16, E, HEADS, FF, n_layers=1)(ids)


def test_zero_length_and_empty_batch():
    encoder = TextEncoder(31, 16, E, HEADS, FF, n_layers=1)
    assert encoder(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, E)
    assert encoder(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, E)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_ids_of_any_integer_dtype(dtype):
    encoder = TextEncoder(31, 16, E, HEADS, FF, n_layers=1).eval()
    ids = torch.randint(31, (2, 5), generator=torch.Generator().manual_seed(0))
    segments = torch.randint(2, (2, 5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(encoder(ids.to(dtype)), encoder(ids))
    assert torch.equal(encoder.embed(ids.to(dtype), segments.to(dtype)), encoder.embed(ids, segments))


def test_what_is_no_tensor_and_segments_that_do_not_fit_are_named():
    encoder = TextEncoder(31, 16, E, HEADS, FF, n_layers=1)
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(TypeError, match=r"ids must be a Tensor, got list; use torch.tensor\(ids\)"):
        encoder([[1, 2]])
    with pytest.raises(TypeError, match=r"ids must be a Tensor, got ndarray; use torch.from_numpy\(ids\)"):
        encoder(ids.numpy())
    with pytest.raises(ValueError, match="segments must lie in 0 to 1, got 2 to 2"):
        encoder.embed(ids, ids + 2)
    with pytest.raises(ValueError, match=r"segments must be of ids' shape \(2, 5\), got \(2, 4\)"):
        encoder.embed(ids, ids[:, :4])
    with pytest.raises(ValueError, match=r"segments must be integers \(B, N\)"):
        encoder.embed(ids, ids.float())


# --- where values cannot be looked at ----------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic, n_layers", [(None, 2), (True, 1)])
def test_a_text_encoder_compiles_whole_for_many_lengths(dynamic, n_layers):
    torch._dynamo.reset()
    encoder, programs = TextEncoder(31, 300, E, HEADS, FF, n_layers=n_layers).eval(), []

    def backend(graph, inputs):
        programs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(encoder, fullgraph=True, dynamic=dynamic, backend=backend)
    for n in (5, 9, 2, 150):
        ids = torch.randint(31, (2, n))
        mask = masks.padding(torch.tensor([n, n - 1]), n)
        torch.testing.assert_close(compiled(ids, mask=mask), encoder(ids, mask=mask))
    assert len(programs) <= 2


def test_a_text_encoder_on_meta_and_with_fake_tensors():
    encoder = TextEncoder(31, 16, E, HEADS, FF, n_layers=1)
    assert encoder.to("meta")(torch.zeros(2, 5, dtype=torch.int32, device="meta")).shape == (2, 5, E)
    with FakeTensorMode():
        fake = TextEncoder(31, 16, E, HEADS, FF, n_layers=1)
        assert fake(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, E)


@pytest.mark.parametrize("op", [attention, FlashAttention(), FlashAttention(window=3)])
@pytest.mark.parametrize("norm_first", [False, True])
def test_gradients_for_each_sample_through_a_stack(op, norm_first):
    encoder = Encoder(E, HEADS, FF, n_layers=2, norm_first=norm_first).double()
    for layer in encoder.layers:
        layer.mixer.op = op
    x = torch.randn(3, N, E, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in encoder.named_parameters()}

    def loss(parameters, one):
        return torch.func.functional_call(encoder, parameters, (one[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        encoder.zero_grad()
        encoder(x[i : i + 1]).square().sum().backward()
        for name, p in encoder.named_parameters():
            torch.testing.assert_close(each[name][i], p.grad)


def test_gradients_for_each_sentence_of_a_text_encoder():
    encoder = TextEncoder(31, 16, E, HEADS, FF, n_layers=1).double()
    ids = torch.randint(31, (3, 5))
    parameters = {name: p.detach() for name, p in encoder.named_parameters()}

    def loss(parameters, one):
        return torch.func.functional_call(encoder, parameters, (one[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    encoder(ids).square().sum().backward()
    for name, p in encoder.named_parameters():
        torch.testing.assert_close(each[name].sum(0), p.grad)


# --- autocast ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["none", "padding", "float32 bias"])
def test_a_stack_under_autocast_takes_what_torchs_takes(norm_first, kind):
    torch.manual_seed(0)
    encoder = Encoder(E, HEADS, FF, n_layers=2, norm_first=norm_first)
    x = torch.randn(B, N, E)
    mask = {"none": None, "padding": masks.padding(torch.tensor([N, 4]), N), "float32 bias": torch.randn(N, N)}[kind]
    expected, rows = encoder(x, mask=mask, return_weights=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = encoder(x, mask=mask, return_weights=True)
        fused = encoder(x, mask=mask)
    for a, b in ((out, expected), (fused, expected), (weights, rows)):
        torch.testing.assert_close(a.float(), b, atol=6e-2, rtol=6e-2)
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


# --- other norms, networks and mixers ----------------------------------------------------------------------------

STACKS = {
    "causal": dict(causal=True),
    "as in Llama": dict(
        causal=True,
        norm_first=True,
        norm=nn.RMSNorm,
        feed_forward=GatedFeedForward,
        activation=F.silu,
        n_kv_heads=1,
        positions=Rotary(4),
    ),
    "a bias for each layer": dict(causal=True, positions=lambda i: ALiBi(3) if i else RelativeBias(3, causal=True)),
    "flash": dict(causal=True, op=FlashAttention(otherwise=attention)),
    "mamba": dict(mixer=Mamba, norm_first=True),
}


@pytest.mark.parametrize("kind", STACKS)
@torch.no_grad()
def test_a_causal_stack_in_parts_and_packed(kind):
    torch.manual_seed(0)
    encoder, x = Encoder(E, HEADS, FF, n_layers=2, **STACKS[kind]).double(), torch.randn(B, N, E, dtype=torch.float64)
    whole, cache = encoder(x), encoder.new_cache(B, N)
    parts = torch.cat([encoder(part, cache=cache) for part in x.split([3, 1, 3], 1)], 1)
    torch.testing.assert_close(parts, whole, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(encoder(x[:, :4]), whole[:, :4], atol=1e-11, rtol=1e-11)
    reset = torch.zeros(B, N, dtype=torch.bool)
    reset[:, 4] = True
    torch.testing.assert_close(encoder(x, reset=reset)[:, 4:], encoder(x[:, 4:]), atol=1e-11, rtol=1e-11)
    with pytest.raises(ValueError, match="cache must have one for each of 2 layers, got 1"):
        encoder(x, cache=cache[:1])


def test_positions_go_into_attention_and_not_into_another_mixer():
    shared = RelativeBias(HEADS)
    encoder = Encoder(E, HEADS, FF, n_layers=3, positions=shared)
    assert all(layer.mixer.positions is shared for layer in encoder.layers)
    with pytest.raises(ValueError, match="positions must be left out with a mixer: give them to the mixer itself"):
        Encoder(E, HEADS, FF, n_layers=1, mixer=Mamba, positions=Rotary(4))
    with pytest.raises(ValueError, match=r"positions must be Rotary\(4\), of the head width, got Rotary\(d_head=6"):
        Encoder(E, HEADS, FF, n_layers=1, positions=Rotary(6))


def test_without_positions_a_stack_treats_its_input_as_a_set_and_with_them_it_does_not():
    torch.manual_seed(0)
    x, order = torch.randn(B, N, E), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    for positions, is_a_set in ((None, True), (Rotary(4), False), (ALiBi(HEADS), False)):
        encoder = Encoder(E, HEADS, FF, n_layers=2, positions=positions)
        assert torch.allclose(encoder(x[:, order]), encoder(x)[:, order], atol=1e-5) == is_a_set
