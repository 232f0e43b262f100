"""Attention layers are found in our models and in transformers', with their parts and in the order of their use."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from nondual import GPT, CausalLM, Encoder, HybridLM, MambaLM, MixerBlock, MultiHeadAttention, TextEncoder
from nondual.analysis import all_heads, attention_layer, attention_layers
from nondual.analysis.attention_layers import check_heads, weight_of

SIZES = {
    "vocab_size": 23,
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
}


def albert(groups: int) -> AlbertModel:
    return AlbertModel(AlbertConfig(**SIZES, embedding_size=7, num_hidden_groups=groups)).eval()


MODELS = {
    "encoder": lambda: Encoder(24, 6, 29, 5),
    "text encoder": lambda: TextEncoder(23, 11, 24, 6, 29, 5),
    "gpt": lambda: GPT(23, 24, 5, 6, max_len=11, n_kv_heads=2),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "albert, all layers one": lambda: albert(1),
    "albert, two groups": lambda: albert(2),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_found_with_its_heads(name):
    model = MODELS[name]()
    layers = attention_layers(model)
    assert [(layer.n_heads, layer.d_head) for layer in layers] == [(6, 4)] * 5
    assert {layer.n_kv_heads for layer in layers} == {2 if name in ("gpt", "llama") else 6}
    assert all_heads(model) == [(layer, head) for layer in range(5) for head in range(6)]
    for layer in layers:
        assert weight_of(layer.query, "query").shape == (24, 24)
        assert weight_of(layer.key, "key").shape == weight_of(layer.value, "value").shape == (layer.n_kv_heads * 4, 24)
        assert weight_of(layer.output, "output").shape == (24, 24)
        assert attention_layer(layer.module).output is layer.output and attention_layer(layer) is layer


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_in_the_order_of_their_use(name):
    model, used = MODELS[name](), []
    layers = attention_layers(model)
    for module in {layer.module for layer in layers}:
        module.register_forward_pre_hook(lambda module, _: used.append(module))
    model(torch.randn(2, 3, 24) if name == "encoder" else torch.zeros(2, 3, dtype=torch.long))
    assert used == [layer.module for layer in layers]


def test_albert_lists_a_shared_layer_once_for_every_use():
    assert len({layer.module for layer in attention_layers(albert(1))}) == 1
    first, second, third, fourth, fifth = (layer.module for layer in attention_layers(albert(2)))
    assert first is second is third and fourth is fifth and third is not fourth


def test_a_layer_of_ours_that_is_used_three_times_is_listed_three_times():
    shared = MixerBlock(MultiHeadAttention(24, 6, causal=True), 24)
    assert len(attention_layers(CausalLM(23, 24, 3, layer=lambda _: shared))) == 3


def test_a_module_that_two_names_lead_to_is_listed_once():
    model = nn.Module()
    model.inner = Encoder(24, 6, 29, 5)
    model.again = model.inner
    model.layers = model.inner.layers
    assert len(attention_layers(model)) == 5


def test_in_a_hybrid_the_layers_with_heads_are_counted():
    assert len(attention_layers(HybridLM(23, 24, 6, 6, every=3))) == 2


def test_what_has_no_heads_is_refused_at_the_door():
    with pytest.raises(ValueError, match="model must have attention heads, got MambaLM with none of a known kind"):
        attention_layers(MambaLM(23, 24, 2))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        attention_layers([Encoder(24, 6, 29, 5)])
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got SimpleNamespace; give its \.model"):
        attention_layers(SimpleNamespace(model=Encoder(24, 6, 29, 5)))
    with pytest.raises(TypeError, match=r"attention must be a MultiHeadAttention or .*, got Linear"):
        attention_layer(nn.Linear(2, 2))


def test_a_head_that_there_is_not_is_refused():
    model = Encoder(24, 6, 29, 5)
    assert len(check_heads(model, [(4, 5)])) == 5
    for pair, error, words in (
        ((5, 0), ValueError, r"layer must be 0 to 4, got 5 in \(5, 0\)"),
        ((-1, 0), ValueError, r"layer must be 0 to 4, got -1"),
        ((4, 6), ValueError, "head of layer 4 must be 0 to 5, got 6"),
        (3, TypeError, r"a head must be a pair of ints, \(layer, head\), got 3"),
        ((1, 2.0), TypeError, "a head must be a pair of ints"),
        ((True, 1), TypeError, "a head must be a pair of ints"),
    ):
        with pytest.raises(error, match=words):
            check_heads(model, [pair])
    with pytest.raises(TypeError, match="head must be an int, got bool"):
        attention_layers(model)[0].check_head(True)


def test_a_projection_without_a_plain_weight_is_refused():
    class LoRA(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, self.weight = base_layer, base_layer.weight

    for projection in (nn.Identity(), LoRA(nn.Linear(2, 2)), nn.LayerNorm(2)):
        with pytest.raises(
            TypeError, match=r"the query projection must be a plain linear layer, got .*: merge adapters"
        ):
            weight_of(projection, "the query projection")
