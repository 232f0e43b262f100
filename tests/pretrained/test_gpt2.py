"""GPT-2 and GPT-1 in our own class against transformers' own: scores, loss, every gradient, generation, files."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from nondual.language_models.gpt_family import GPTFamily
from nondual.pretrained import from_gpt2, load_gpt2
from nondual.pretrained.gpt2 import from_hugging_face

B, N, V = 2, 11, 53
SIZES = {"vocab_size": V, "n_positions": 23, "n_embd": 20, "n_layer": 3, "n_head": 5}
VARIANTS = {
    "GPT-2": ("GPT2", {}),
    "GPT-2, other settings": (
        "GPT2",
        {"n_inner": 29, "activation_function": "relu", "layer_norm_epsilon": 0.1, "tie_word_embeddings": False},
    ),
    "GPT-1": ("OpenAIGPT", {}),
    "GPT-1, other settings": ("OpenAIGPT", {"afn": "silu", "layer_norm_epsilon": 0.1}),
}


@pytest.fixture(scope="session")
def judge():
    """A function: transformers' model of one of the variants, with random weights, each at a value of its own."""
    import transformers

    def make(variant):
        torch.manual_seed(0)
        kind, settings = VARIANTS[variant]
        signs = {} if kind == "OpenAIGPT" else {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
        config = getattr(transformers, f"{kind}Config")(**(SIZES | signs | settings))
        made = getattr(transformers, f"{kind}LMHeadModel")(config)
        with torch.no_grad():
            for name, p in made.named_parameters():
                p.uniform_(0.5, 1.5) if "ln_" in name and name.endswith("weight") else p.normal_(std=0.3)
        return made.eval()

    return make


def tokens(length=N):
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(1))


# --- scores, loss, gradients, generation ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"])
def test_scores_loss_and_every_gradient_are_transformers_own(variant, dtype, close, judge):
    theirs = judge(variant).to(dtype)
    ours, ids = from_gpt2(theirs), tokens()
    assert type(ours) is GPTFamily and not ours.training
    right = theirs(ids, labels=ids)
    judged = F.cross_entropy(right.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())  # right.loss is in float32
    torch.testing.assert_close(right.loss, judged.float())
    assert right.logits.std() > 0.5 and (right.logits[0] - right.logits[1]).abs().max() > 0.5
    torch.testing.assert_close(ours(ids), right.logits, atol=close, rtol=close)
    loss = ours.loss(ids)
    torch.testing.assert_close(loss, judged, atol=close, rtol=close)
    loss.backward(), judged.backward()
    named = dict(theirs.named_parameters())  # tied: the scores' matrix and the embeddings are one
    expected = from_hugging_face({name: p.grad for name, p in named.items()})
    found = {name: p.grad for name, p in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, atol=10 * close, rtol=10 * close, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_it_writes_is_what_transformers_writes_with_a_cache_and_without(variant, judge):
    theirs = judge(variant).double()
    ours, prompt = from_gpt2(theirs), tokens(4)
    right = prompt  # GPT-1 of transformers has no cache; so theirs reads the whole text each time
    for _ in range(13):
        right = torch.cat([right, theirs(right).logits[:, -1:].argmax(-1)], 1)
    assert len(set(right[0, 4:].tolist())) > 1
    for cached in (True, False):
        assert torch.equal(ours.generate(prompt, 13, cached=cached), right)
    if "GPT-2" in variant:
        made = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=13, do_sample=False)
        assert torch.equal(made, right)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["GPT-2", "GPT-1"])
def test_token_by_token_the_scores_are_those_of_the_whole(variant, judge):
    ours, ids = from_gpt2(judge(variant).double()), tokens()
    cache = ours.new_cache(B, N)
    parts = torch.cat([ours(part, cache=cache) for part in ids.split([3, 2, *[1] * 6], 1)], 1)
    torch.testing.assert_close(parts, ours(ids), atol=1e-12, rtol=1e-12)


def test_the_copy_has_weights_and_a_dtype_of_its_own(judge):
    theirs = judge("GPT-2").bfloat16()
    ours = from_gpt2(theirs)
    before = ours(tokens())
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        for p in theirs.parameters():
            p.zero_()
    assert torch.equal(ours(tokens()), before)


# --- files ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("names", ["as saved", "bare", "shards", "old masks"])
def test_a_folder_in_every_layout(variant, names, judge, tmp_path):
    theirs = judge(variant)
    theirs.save_pretrained(tmp_path, max_shard_size="8KB" if names == "shards" else "1GB")
    file = tmp_path / "model.safetensors"
    if names == "shards":
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    else:
        state = load_file(file)
        if names != "as saved":
            state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        if names == "old masks":
            state["h.0.attn.bias"] = torch.ones(1, 1, 23, 23).tril().bool()
            state["h.1.attn.masked_bias"] = torch.tensor(-1e4)
            state["position_ids"] = torch.arange(23)
            if theirs.config.tie_word_embeddings:
                table = "wte" if "wte.weight" in state else "tokens_embed"
                state["lm_head.weight"] = state[f"{table}.weight"].clone()
        save_file(state, file)
    ours = load_gpt2(tmp_path)
    assert not ours.training
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)
    assert load_gpt2(str(tmp_path), dtype=torch.bfloat16).embeddings.weight.dtype == torch.bfloat16


@pytest.fixture
def folder(judge, tmp_path):
    judge("GPT-2").save_pretrained(tmp_path)
    return tmp_path


def change_tensors(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda s: s.pop("transformer.wpe.weight"), r"missing: positions\.table\.weight"),
        (lambda s: s.update(extra=torch.ones(2)), "unexpected: extra"),
        (lambda s: s.update({"wte.weight": torch.ones(2)}), "two tensors for embeddings.weight: one of them is named"),
        (lambda s: s.update({"lm_head.weight": torch.ones(V, 20)}), "lm_head.weight must be the embeddings where .*"),
        (
            lambda s: s.update({"transformer.h.1.attn.c_attn.weight": torch.ones(20, 59)}),
            r"of another shape: layers\.1\.mixer\.q_proj\.weight \(59, 20\), not \(20, 20\)",
        ),
        (
            lambda s: s.update({"transformer.h.0.mlp.c_fc.bias": torch.ones(80, dtype=torch.int64)}),
            r"of another dtype .*: layers\.0\.feed_forward\.linear1\.bias torch\.int64",
        ),
    ],
)
def test_tensors_that_are_not_the_models(folder, change, says):
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=says):
        load_gpt2(folder)


def test_folders_that_hold_no_model(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"hf download openai-community/gpt2 .* load_gpt2\('gpt2'\)"):
        load_gpt2("openai-community/gpt2")
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, got str"):
        load_gpt2(folder, dtype="float16")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 10**6}))
    with pytest.raises(ValueError, match=r"n_layer is 1000000 in .*config\.json, and .* holds 52 tensors in all"):
        load_gpt2(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"model_type must be one of 'gpt2', 'openai-gpt' in .*config\.json, got 'll"):
        load_gpt2(folder)


def test_models_of_other_kinds():
    from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": V, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bare = GPT2Model(GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=2))
    for other in (bare, LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=8)), torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"model must be a GPT2LMHeadModel .*, got " + type(other).__name__):
            from_gpt2(other)
