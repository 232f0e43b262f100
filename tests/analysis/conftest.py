"""Models whose heads are looked into."""

import pytest
import torch
from analysis_cases import V
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from nondual.pretrained import minilm


@pytest.fixture(scope="module")
def encoder():
    return minilm()


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=29,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=29,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        max_position_embeddings=11,
    )
    model = BertModel(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.3)
    return model
