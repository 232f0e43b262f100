"""A Llama in our own classes against transformers' own class: random ones of several settings, and SmolLM2."""

import pytest
import torch
from torch import nn

from nondual.analysis import attention_layers, record_heads, weights_of
from nondual.data import ALICE
from nondual.language_models.causal import CausalLM
from nondual.pretrained import from_llama, our_smollm2

SETTINGS = {
    "grouped heads, tied": dict(tie_word_embeddings=True),
    "scores of their own": dict(tie_word_embeddings=False),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "one key/value head": dict(num_key_value_heads=1),
    "heads of another width": dict(head_dim=14),
    "another base": dict(rope_parameters={"rope_type": "default", "rope_theta": 777.0}),
    "divided places": dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "gelu, another eps": dict(hidden_act="gelu", rms_norm_eps=1e-2),
}


def llama(seed=0, **more):
    """transformers' Llama with random weights, each at a value of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = dict(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=29,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(LlamaConfig(**(settings | more))).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(std=0.3)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def ours():
    return our_smollm2()


@torch.no_grad()
@pytest.mark.parametrize("more", SETTINGS.values(), ids=SETTINGS)
def test_scores_and_generation_equal_those_of_transformers(more):
    theirs = llama(**more)
    ours, ids = from_llama(theirs), torch.randint(53, (2, 17))
    assert isinstance(ours, CausalLM) and not ours.training
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    made = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    assert torch.equal(ours.generate(ids, 9), made)
    assert torch.equal(ours.generate(ids, 9, cached=False), made)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@torch.no_grad()
def test_the_copy_has_the_dtype_of_the_model_and_weights_of_its_own():
    theirs = llama().double()
    ours, ids = from_llama(theirs), torch.randint(53, (2, 17))
    before = ours(ids)
    torch.testing.assert_close(before, theirs(ids).logits, atol=1e-5, rtol=1e-5)  # they turn in float32
    assert before.dtype == torch.float64
    theirs.model.norm.weight += 1
    assert torch.equal(ours(ids), before)


@torch.no_grad()
def test_left_padding_is_a_reset_here_and_a_mask_there():
    theirs = llama()
    ours, ids = from_llama(theirs), torch.randint(53, (2, 17))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    reset = torch.zeros(2, 17, dtype=torch.bool)
    reset[0, 0] = reset[1, 5] = True
    made = theirs.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    assert torch.equal(ours.generate(ids, 9, reset=reset), made)


@torch.no_grad()
def test_smollm2s_scores_equal_those_of_transformers_on_real_text(smol, ours):
    ids = smol[1](ALICE, return_tensors="pt").input_ids[:, :160]
    torch.testing.assert_close(ours[0](ids), smol[0](ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_smollm2_goes_on_from_real_text_as_in_transformers_with_a_cache_and_without(smol, ours):
    tokens = smol[1](ALICE[:200], return_tensors="pt")
    made = smol[0].generate(**tokens, max_new_tokens=24, do_sample=False)
    assert torch.equal(ours[0].generate(tokens.input_ids, 24), made)
    cache, steps, whole = ours[0].new_cache(1, made.shape[1]), [], ours[0](made)
    for part in made.split([11, 17, *[1] * (made.shape[1] - 28)], dim=1):
        steps.append(ours[0](part, cache=cache))
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 2.0, "top_p": 0.5},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
    ],
)
def test_smollm2_writes_with_every_option_of_sampling(ours, options):
    model, tokenizer = ours
    ids = tokenizer("Once upon a time there was", return_tensors="pt").input_ids
    prompt = ids.shape[1]
    cached, whole = (
        model.generate(ids, 7, generator=torch.Generator().manual_seed(2), cached=cached, **options)
        for cached in (True, False)
    )
    assert torch.equal(cached, whole) and not torch.equal(cached, model.generate(ids, 7))  # not the likeliest each time
    scores = model(cached)[0, prompt - 1 : -1] / options["temperature"]
    before = scores > scores.gather(1, cached[0, prompt:, None])
    assert before.sum(1).max() < options.get("top_k", 10**6)
    assert (scores.softmax(-1) * before).sum(1).max() < options.get("top_p", 1.0)
    assert tokenizer.decode(cached[0]).startswith("Once upon a time there was")


def test_its_heads_are_open_to_analysis_as_those_of_transformers_are(smol, ours):
    model, tokenizer = ours
    ids = tokenizer(ALICE, return_tensors="pt").input_ids[:, :31]
    weights = weights_of(model, ids)
    assert weights.shape == (30, 1, 9, 31, 31) and len(attention_layers(model)) == 30
    torch.testing.assert_close(weights, weights_of(smol[0], ids), atol=1e-4, rtol=1e-3)
    with torch.no_grad(), record_heads(model) as record:
        model(ids)
    with torch.no_grad(), record_heads(smol[0]) as judge:
        smol[0](ids)
    assert record.outputs[0].shape == (1, 31, 9, 64)
    for mine, theirs in zip(record.outputs, judge.outputs, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


def test_what_is_no_llama_or_another_rotation_is_refused():
    with pytest.raises(TypeError, match="model must be a LlamaForCausalLM of transformers, got Linear"):
        from_llama(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be a LlamaForCausalLM of transformers, got LlamaModel"):
        from_llama(llama().model)
    theirs = llama()
    theirs.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match=r"rope_type must be 'default' or 'linear', over whole heads, got \{"):
        from_llama(theirs)
    theirs = llama()
    theirs.config.hidden_act = "relu6"
    with pytest.raises(ValueError, match="hidden_act must be one of silu, gelu, relu, got 'relu6'"):
        from_llama(theirs)
