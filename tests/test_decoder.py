"""The decoder against torch's own with copied weights, forward and backward, in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nondual.decoder import Decoder, DecoderLayer
from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.efficient_attention.mamba import Mamba
from nondual.feed_forward import FeedForward, GatedFeedForward
from nondual.ops import masks
from nondual.self_attention import MultiHeadAttention

B, N, M, E, HEADS, FF, LAYERS = 2, 7, 5, 12, 3, 29, 2
NAMES = {
    "self_attn": "mixer",
    "multihead_attn": "cross",
    "linear1": "feed_forward.linear1",
    "linear2": "feed_forward.linear2",
}


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(norm_first, activation):
    """nn.TransformerDecoder and ours, with its weights."""
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(
        E, HEADS, FF, dropout=0.0, activation=activation, norm_first=norm_first, batch_first=True, dtype=torch.float64
    )
    norm = nn.LayerNorm(E, dtype=torch.float64) if norm_first else None
    theirs = nn.TransformerDecoder(layer, LAYERS, norm=norm)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    ours = Decoder(E, HEADS, FF, LAYERS, norm_first=norm_first, activation=activation).double()
    state = {}
    for name, tensor in theirs.state_dict().items():
        for their, our in NAMES.items():
            name = name.replace(their, our)
        state[name] = tensor
    ours.load_state_dict(state)
    return ours, theirs


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", [F.gelu, F.relu])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_torchs_decoder_forward_and_backward(norm_first, activation, padded):
    ours, theirs = pair(norm_first, activation)
    real = masks.padding(torch.tensor([M, 3]), M) if padded else None
    results = []
    for model, masked in (
        (ours, dict(memory_mask=real)),
        (theirs, dict(tgt_mask=~masks.causal(N), memory_key_padding_mask=None if real is None else ~real[:, 0, 0])),
    ):
        x, memory = draw(B, N, E).requires_grad_(), draw(B, M, E, seed=2).requires_grad_()
        y = model(x, memory, **masked)
        y.square().sum().backward()
        results.append((y, x.grad, memory.grad))
    for name, a, b in zip(("y", "x", "memory"), *results):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")
    for i in range(LAYERS):
        mine, yours = ours.layers[i], theirs.layers[i]
        for a, b in ((mine.mixer, yours.self_attn), (mine.cross, yours.multihead_attn)):
            stacked = torch.cat([a.q_proj.weight.grad, a.k_proj.weight.grad, a.v_proj.weight.grad])
            torch.testing.assert_close(stacked, b.in_proj_weight.grad)
        torch.testing.assert_close(mine.feed_forward.linear1.weight.grad, yours.linear1.weight.grad)
        torch.testing.assert_close(mine.norm3.weight.grad, yours.norm3.weight.grad)


KINDS = {
    "plain": partial(Decoder, E, HEADS, FF, n_layers=LAYERS),
    "as in Llama": partial(
        Decoder,
        E,
        HEADS,
        FF,
        n_layers=LAYERS,
        norm_first=True,
        norm=nn.RMSNorm,
        n_kv_heads=1,
        feed_forward=GatedFeedForward,
    ),
    "mamba": partial(Decoder, E, HEADS, FF, n_layers=LAYERS, mixer=partial(Mamba, d_state=5), norm_first=True),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_in_parts_it_is_the_whole_and_nothing_comes_from_the_future(kind):
    model, x, memory = KINDS[kind]().double(), draw(B, N, E), draw(B, M, E, seed=2)
    cache, whole = model.new_cache(B, N), model(x, memory)
    parts = torch.cat([model(part, memory, cache=cache) for part in x.split([3, 1, 1, 2], 1)], 1)
    torch.testing.assert_close(parts, whole, atol=1e-11, rtol=1e-11)
    other = torch.cat([x[:, :4], draw(B, N - 4, E, seed=3)], 1)
    torch.testing.assert_close(model(other, memory)[:, :4], whole[:, :4], atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_each_is_as_if_alone_and_a_mask_hides_the_memory(kind):
    model, x, memory = KINDS[kind]().double(), draw(B, N, E), draw(B, M, E, seed=2)
    reset = torch.zeros(B, N, dtype=torch.bool)
    reset[:, 4] = True
    alone = torch.cat([model(x[:, :4], memory), model(x[:, 4:], memory)], 1)
    torch.testing.assert_close(model(x, memory, reset=reset), alone, atol=1e-11, rtol=1e-11)
    shorter = model(x, memory, memory_mask=masks.padding(torch.tensor([3, 3]), M))
    torch.testing.assert_close(shorter, model(x, memory[:, :3]), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_for_many_lengths_and_on_meta(kind):
    """The compiler traces a second layer as it did the first: one kind has two."""
    torch._dynamo.reset()
    model = KINDS[kind](n_layers=LAYERS if kind == "plain" else 1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in (5, 9, 2):
        x, memory = draw(B, n, E).float(), draw(B, n + 3, E).float()
        torch.testing.assert_close(compiled(x, memory), model(x, memory), atol=1e-5, rtol=1e-4)
    with torch.device("meta"):
        assert KINDS[kind]()(torch.zeros(B, N, E), torch.zeros(B, M, E)).shape == (B, N, E)


@torch.no_grad()
def test_a_layer_that_raises_has_changed_no_cache():
    model, x, memory = KINDS["plain"]().double(), draw(B, N, E), draw(B, M, E, seed=2)
    cache = model.new_cache(B, N)
    with pytest.raises(ValueError, match="memory must be"):
        model(x, memory[..., :5], cache=cache)
    assert [one.length for one in cache] == [0, 0]
    with pytest.raises(ValueError, match="cache must have one for each of 2 layers, got 1"):
        model(x, memory, cache=cache[:1])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_part_of_a_layer_that_raises_has_changed_no_cache(kind, held_by):
    model, x, memory = KINDS[kind]().double(), draw(B, N, E), draw(B, M, E, seed=2)
    cache = model.new_cache(B, N)
    model(x[:, :3], memory, cache=cache)
    before = held_by(cache)
    for part in (part for layer in model.layers for part in (layer.mixer.out_proj, layer.cross, layer.feed_forward)):
        handle = part.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x[:, 3:], memory, cache=cache)
        assert held_by(cache) == before
        handle.remove()
    torch.testing.assert_close(model(x[:, 3:], memory, cache=cache), model(x, memory)[:, 3:])


def test_dropout_is_for_training_only():
    layer = DecoderLayer(MultiHeadAttention(E, 3), MultiHeadAttention(E, 3), FeedForward(E, FF), E, dropout=0.5)
    x = torch.randn(B, N, E)
    assert not torch.equal(layer(x, x), layer(x, x))
    assert torch.equal(layer.eval()(x, x), layer(x, x))


# --- a memory that is projected once -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_projected_memory_gives_what_the_memory_gives_gradients_too(kind):
    model, real = KINDS[kind]().double(), masks.padding(torch.tensor([M, 3]), M)
    results = []
    for project in (lambda memory: memory, model.project):
        x, memory = draw(B, N, E).requires_grad_(), draw(B, M, E, seed=2).requires_grad_()
        y, weights = model(x, project(memory), memory_mask=real, return_weights=True)
        torch.testing.assert_close(y, model(x, memory, memory_mask=real), atol=1e-11, rtol=1e-11)
        y.square().sum().backward()
        results.append((y, weights, x.grad, memory.grad))
    for name, a, b in zip(("y", "weights", "x", "memory"), *results):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    assert results[0][1].shape == (LAYERS, B, HEADS, N, M)


@torch.no_grad()
def test_a_projected_memory_is_read_step_by_step_and_projected_once():
    model, x, memory = KINDS["plain"]().double(), draw(B, N, E), draw(B, M, E, seed=2)
    calls = []
    for layer in model.layers:
        layer.cross.k_proj.register_forward_hook(lambda *_: calls.append(1))
    projected, cache = model.project(memory), model.new_cache(B, N)
    parts = torch.cat([model(part, projected, cache=cache) for part in x.split(1, 1)], 1)
    assert len(calls) == LAYERS
    torch.testing.assert_close(parts, model(x, memory), atol=1e-11, rtol=1e-11)
    rows = torch.tensor([1, 0, 1])
    chosen = model(x[rows], [one.select(rows) for one in projected])
    torch.testing.assert_close(chosen, model(x[rows], memory[rows]), atol=1e-11, rtol=1e-11)


@torch.no_grad()
def test_a_projected_memory_that_does_not_fit_is_refused_and_changes_no_cache():
    model, x, memory = KINDS["plain"]().double(), draw(B, N, E), draw(B, M, E, seed=2)
    cache, projected = model.new_cache(B, N), model.project(memory)
    with pytest.raises(ValueError, match="memory must be projected for each of 2 layers, got 1"):
        model(x, projected[:1], cache=cache)
    other = Decoder(E, 2, FF, LAYERS).double().project(memory)
    with pytest.raises(ValueError, match=r"memory must be this module's own project\(memory\), keys \(2, 3, M, 4\)"):
        model(x, [projected[0], other[1]], cache=cache)
    with pytest.raises(ValueError, match=r"keys \(1, 3, M, 4\), got \(2, 3, 5, 4\)"):
        model(x[:1], projected)
    assert [one.length for one in cache] == [0, 0]
    model.layers[1].cross = nn.Linear(E, E)
    with pytest.raises(ValueError, match="the cross of layer 1, Linear, has no project: give the memory itself"):
        model.project(memory)


@torch.no_grad()
def test_a_projected_memory_under_another_op_and_compiled():
    torch._dynamo.reset()
    model = Decoder(E, HEADS, FF, LAYERS, op=FlashAttention(impl="reference")).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in (5, 9):
        x, memory = draw(B, n, E).float(), draw(B, n + 3, E).float()
        torch.testing.assert_close(compiled(x, model.project(memory)), model(x, memory), atol=1e-5, rtol=1e-4)
