"""Settings of GPT-2 and GPT-1: defaults, and one error for each that is odd."""

import pytest
import torch
from transformers import GPT2Config, OpenAIGPTConfig

from nondual.language_models.gpt_family import SIZES, gelu_new
from nondual.pretrained.gpt2_config import read_settings


def test_what_is_left_out_is_what_transformers_takes():
    for kind, theirs in (("gpt2", GPT2Config()), ("openai-gpt", OpenAIGPTConfig())):
        found = read_settings({"model_type": kind}, "config.json")
        for name, value in found.items():
            if name not in ("model_type", "activation", "n_inner"):
                assert getattr(theirs, name) == value, name
        assert found["n_inner"] == 3072 and (kind == "gpt2" or found["activation"] is gelu_new)
        size = SIZES[kind]
        assert (size.vocabulary, size.max_len) == (found["vocab_size"], found["n_positions"])
    x = torch.randn(5)
    two = read_settings({"model_type": "gpt2"}, "config.json")["activation"]
    torch.testing.assert_close(two(x), gelu_new(x))
    exact = read_settings({"model_type": "gpt2", "activation_function": "gelu"}, "config.json")["activation"]
    assert not torch.equal(exact(x), gelu_new(x))


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"model_type": "bert"}, "model_type must be one of 'gpt2', 'openai-gpt' in config.json, got 'bert'"),
        ({"model_type": ["gpt2"]}, "model_type must be one of"),
        ({"n_embd": 0}, "n_embd must be an integer from 1 to 16777215 in config.json, got 0"),
        ({"n_embd": "768"}, "n_embd must be an integer .* got '768'"),
        ({"n_layer": True}, "n_layer must be an integer .* got True"),
        ({"n_inner": -1}, "n_inner must be an integer .* got -1"),
        ({"n_head": 7}, "n_embd must be a multiple of n_head in config.json, got 768 and 7"),
        ({"activation_function": "mish"}, "activation_function must be one of .* in config.json, got 'mish'"),
        ({"activation_function": None}, "activation_function must be one of .* got None"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon must be a number, 0 or more, .* got nan"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false in config.json, got 1"),
        ({"scale_attn_weights": False}, "scale_attn_weights must be true in config.json, got False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be false .* got True"),
        ({"add_cross_attention": True}, "add_cross_attention must be false in config.json, got True"),
        ({"model_type": "openai-gpt", "afn": "tanh"}, "afn must be one of gelu, relu, silu, swish .* got 'tanh'"),
    ],
)
def test_settings_that_are_odd(changed, says):
    with pytest.raises(ValueError, match=says):
        read_settings({"model_type": "gpt2"} | changed, "config.json")
