"""Connections over depth: the plain stream to the bit, and the laws that all others keep, in models that hold them."""

import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.export import Dim

from nondual.connections import LayerCall, branches_of, check_count, check_width, stream
from nondual.feed_forward import FeedForward
from nondual.language_models.causal import CausalLM
from nondual.language_models.gpt import GPT
from nondual.recent.attention_residuals import AttentionResiduals
from nondual.recent.denseformer import DenseFormer
from nondual.recent.hyper_connections import DoublyStochasticMaps, HyperConnections, StaticMaps
from nondual.recent.value_residual import ValueResidual
from nondual.relative_positions import Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.transformer_layer import MixerBlock, TransformerLayer

B, N, V, E, L, LONGEST = 2, 11, 13, 12, 3, 24
MADE = {
    "denseformer": lambda layers=L: DenseFormer(layers),
    "denseformer, dilated": lambda layers=L: DenseFormer(layers, dilation=2, period=2),
    "attention residuals": lambda layers=L: AttentionResiduals(E, 2 * layers),
    "attention residuals, blocks": lambda layers=L: AttentionResiduals(E, 2 * layers, block=4),
    "value residual": lambda layers=L: ValueResidual(layers),
    "hyper-connections": lambda layers=L: HyperConnections(E, 2 * layers, 3),
    "hyper-connections, static": lambda layers=L: HyperConnections(E, 2 * layers, 2, maps=StaticMaps),
    "hyper-connections, doubly stochastic": lambda layers=L: HyperConnections(
        E, 2 * layers, 3, maps=DoublyStochasticMaps
    ),
}


def away_from_the_start(module, seed=5):
    """Every parameter moved, so that no law holds only where a connection is still the plain stream."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in module.parameters():
            x += 0.3 * torch.randn(x.shape, generator=draw).to(x)
    return module


def make(kind, layers=L, **options):
    torch.manual_seed(0)
    connection = away_from_the_start(MADE[kind](layers))
    model = GPT(V, E, layers, 4, max_len=LONGEST, connection=connection, **options).double()
    with torch.no_grad():
        for table in (model.embeddings, model.positions.table):
            table.weight *= 40
    return model


def tokens(length=N, seed=1):
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(seed))


def calls(layers, **options):
    return [LayerCall(layer, options) for layer in layers]


# --- the plain stream, and the parts of a layer --------------------------------------------------------------------


def test_left_out_the_layers_are_called_one_after_another_to_the_bit():
    torch.manual_seed(0)
    model = GPT(V, E, L, 4, max_len=LONGEST)
    x = model.embeddings(tokens()) + model.positions(N)
    for layer in model.layers:
        x = layer(x)
    assert torch.equal(model(tokens()), model.scores(model.norm_f(x)))
    assert model.connection is stream and not any("connection" in name for name in model.state_dict())


@pytest.mark.parametrize("layer_scale, drop_path", [(None, 0.0), (0.3, 0.5)])
def test_the_branches_of_a_layer_add_up_to_it_to_the_bit(layer_scale, drop_path):
    torch.manual_seed(0)
    options = dict(norm_first=True, layer_scale=layer_scale, drop_path=drop_path, dropout=0.2)
    layer = TransformerLayer(MultiHeadAttention(E, 4), FeedForward(E, 29), E, **options)
    block, x = MixerBlock(MultiHeadAttention(E, 4), E), torch.randn(B, N, E)
    mask = torch.rand(N, N) < 0.5
    for module in (layer, block):
        torch.manual_seed(1)
        whole = module(x, mask=mask)
        torch.manual_seed(1)
        parts = x
        for branch in branches_of(calls([module], mask=mask), 2 if module is layer else 1):
            parts = parts + branch(parts)
        assert torch.equal(parts, whole)


def test_what_cannot_be_taken_apart_or_is_of_another_depth_is_named():
    after = TransformerLayer(MultiHeadAttention(E, 4), FeedForward(E, 29), E)
    with pytest.raises(ValueError, match="norm_first must be True for a layer to be taken apart into branches"):
        branches_of(calls([after]), 2)
    with pytest.raises(ValueError, match=r"layers must have branches for this connection, .*, got Linear"):
        branches_of(calls([nn.Linear(E, E)]), 1)
    with pytest.raises(ValueError, match="connection must be made for the model's 3 layers, got one for 5"):
        check_count("layers", 3, 5)
    for kind, depth in (("denseformer", "2 layers, got one for 3"), ("value residual", "2 layers, got one for 3"),
                        ("attention residuals", "4 branches, got one for 6"),
                        ("hyper-connections", "4 branches, got one for 6")):  # fmt: skip
        model = GPT(V, E, 2, 4, max_len=LONGEST, connection=MADE[kind]())
        with pytest.raises(ValueError, match=f"connection must be made for the model's {depth}"):
            model(tokens())


@pytest.mark.parametrize("kind", [kind for kind in MADE if "attention" in kind or "hyper" in kind])
def test_a_connection_of_another_width_is_refused_before_any_layer_has_run(kind):
    with pytest.raises(ValueError, match="connection must be made for the model's width of 7, got one for 5"):
        check_width(torch.zeros(2, 3, 7), 5)
    torch.manual_seed(0)
    model, ran = GPT(V, 16, L, 4, max_len=LONGEST, connection=MADE[kind]()), []
    model.layers[0].mixer.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=f"connection must be made for the model's width of 16, got one for {E}"):
        model(tokens())
    assert not ran
    for made in (partial(AttentionResiduals, 0, 1), partial(HyperConnections, 0, 1)):
        with pytest.raises(ValueError, match="d_model must be 1 or more, got 0"):
            made()


@pytest.mark.parametrize("given, told", [(None, "NoneType"), ("stream", "str"), (DenseFormer, "the class DenseFormer")])
def test_what_is_no_connection_is_refused_when_the_model_is_made(given, told):
    with pytest.raises(TypeError, match=f"connection must be a function or a module, such as .*, got {told}"):
        GPT(V, E, L, 4, max_len=LONGEST, connection=given)


def test_a_function_of_ones_own_is_a_connection_and_what_comes_before_a_layer_is_read_by_it():
    def reminded(x, layers):
        start = x
        for layer in layers:
            x = layer(x + start)
        return x

    torch.manual_seed(0)
    model = GPT(V, E, L, 3, positions=Rotary(4), connection=reminded).double()
    ids = tokens()
    x = start = model.embeddings(ids)
    for layer in model.layers:
        x = layer(x + start)
    torch.testing.assert_close(model(ids), model.scores(model.norm_f(x)))
    assert torch.equal(model.generate(ids, 5), model.generate(ids, 5, cached=False))


def test_what_comes_before_a_layer_is_done_to_what_its_first_branch_reads():
    model, more = make("attention residuals"), torch.randn(L, E, dtype=torch.float64)
    x = model.embeddings(tokens())
    found = model.hidden(x, before=lambda i, x: x + more[i])
    assert not torch.allclose(found, model.hidden(x))
    for i, layer in enumerate(model.layers):
        layer.norm1.register_forward_pre_hook(lambda _, args, i=i: (args[0] + more[i],))
    torch.testing.assert_close(found, model.hidden(x))


# --- laws of every connection --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MADE)
def test_a_later_token_changes_nothing_before_it_and_reading_in_parts_is_reading_the_whole(kind):
    model, ids = make(kind), tokens()
    other = torch.cat([ids[:, :7], (ids[:, 7:] + 1) % V], 1)
    with torch.no_grad():
        whole = model(ids)
        torch.testing.assert_close(model(other)[:, :7], whole[:, :7], atol=1e-12, rtol=1e-12)
        cache = model.new_cache(B, N)
        parts = torch.cat([model(part, cache=cache) for part in ids.split([4, *[1] * (N - 4)], 1)], 1)
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=1e-12)
    assert len(model.generate(ids[:, :3], 8).unique()) > 2
    assert torch.equal(model.generate(ids[:, :3], 8), model.generate(ids[:, :3], 8, cached=False))


@pytest.mark.parametrize("kind", MADE)
def test_packed_each_is_as_if_alone(kind):
    model, ids = make(kind), tokens()
    reset = torch.zeros(B, N, dtype=torch.bool)
    reset[:, [0, 4]] = True
    alone = torch.cat([model(ids[:, :4]), model(ids[:, 4:])], 1)
    torch.testing.assert_close(model(ids, reset=reset), alone, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kind", MADE)
def test_each_parameter_of_it_matters_and_it_is_saved_with_the_model(kind):
    model, ids = make(kind), tokens()
    model.loss(ids).backward()
    for name, x in model.connection.named_parameters():
        assert x.grad is not None and x.grad.abs().sum() > 0, name
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.manual_seed(9)
    other = GPT(V, E, L, 4, max_len=LONGEST, connection=MADE[kind]()).double()
    assert not torch.allclose(other(ids), model(ids))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(ids), model(ids))


# The compiler traces every layer anew. Where a third is connected as the second is, two are traced.
TRACED = {kind: L if kind.endswith(("dilated", "blocks")) else 2 for kind in MADE}


@pytest.mark.parametrize("kind", MADE)
def test_one_compiled_program_serves_every_length(kind):
    torch._dynamo.reset()
    model, programs = make(kind, TRACED[kind]), []

    def backend(graph, inputs):
        programs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length in (5, 9, 23):
        torch.testing.assert_close(compiled(tokens(length)), model(tokens(length)))
    assert len(programs) == 1


@pytest.mark.parametrize("kind", MADE)
@torch.no_grad()
def test_one_exported_program_serves_every_length(kind):
    model = make(kind, TRACED[kind]).eval()
    program = torch.export.export(model, (tokens(7),), dynamic_shapes={"ids": {1: Dim("n", min=2, max=LONGEST)}})
    for length in (2, 7, 23):
        torch.testing.assert_close(program.module()(tokens(length)), model(tokens(length)))


@pytest.mark.parametrize("kind", MADE)
def test_narrow_models_shapes_alone_and_autocast(kind):
    model, ids = make(kind), tokens()
    exact = model(ids)
    for dtype in (torch.bfloat16, torch.float16):
        found = make(kind).to(dtype)(ids)
        assert found.dtype == dtype and (found - exact).abs().max() / exact.abs().max() < 24 * torch.finfo(dtype).eps
    widths = []
    single = make(kind).float()
    single.norm_f.register_forward_pre_hook(lambda _, args: widths.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = single(ids)
    assert widths == [torch.float32]  # the stream is kept wide, as without the connection
    assert (found - exact).abs().max() / exact.abs().max() < 24 * torch.finfo(torch.bfloat16).eps
    with torch.device("meta"):
        scores = GPT(V, E, L, 4, max_len=LONGEST, connection=MADE[kind]())(torch.empty(B, N, dtype=torch.long))
    assert scores.is_meta and scores.shape == (B, N, V)
    assert model(ids[:0]).shape == (0, N, V) and model(ids[:, :0]).shape == (B, 0, V)


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind != "value residual"])
def test_blocks_of_a_mixer_alone_whose_residual_path_is_wider(kind):
    depth = 2 * L if "attention" in kind or "hyper" in kind else L
    torch.manual_seed(0)
    connection = away_from_the_start(MADE[kind]())
    model = CausalLM(
        V, E, depth, layer=lambda _: MixerBlock(MultiHeadAttention(E, 4, causal=True), E),
        residual_in_fp32=True, connection=connection,
    ).bfloat16()  # fmt: skip
    widths = []
    model.norm_f.register_forward_pre_hook(lambda _, args: widths.append(args[0].dtype))
    read = []
    model.layers[-1].norm.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    assert model(tokens()).isfinite().all() and read[0].isfinite().all()
    assert model.connection is connection


def test_a_cache_is_as_it_was_where_a_call_raises():
    model = make("attention residuals").float()
    cache = model.new_cache(B, 4)
    with torch.no_grad():
        model(tokens(3), cache=cache)
        with pytest.raises(ValueError, match="cache holds 4 positions, and 6 were asked of it"):
            model(tokens(3), cache=cache)
    assert [part.length for part in cache[1:]] == [3] * L
