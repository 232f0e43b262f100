"""Mamba and Mamba-2 checkpoints: transformers' models, randomly initialised and saved, against ours, read back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nondual.pretrained import load_mamba, load_mamba2
from nondual.pretrained.mamba import from_mamba

B, N, V, E = 2, 11, 53, 12
VARIANTS = {
    "mamba": dict(),
    "mamba, its own widths": dict(expand=3, state_size=3, conv_kernel=2, time_step_rank=5, layer_norm_epsilon=0.1),
    "mamba, other biases": dict(use_bias=True, use_conv_bias=False, tie_word_embeddings=False),
    "mamba2": dict(),
    "mamba2, one group": dict(n_groups=1, chunk_size=4, use_bias=True, tie_word_embeddings=True),
    "mamba2, limited steps": dict(time_step_limit=(0.004, 0.03), chunk_size=3, layer_norm_epsilon=0.1),
    "mamba2, its own widths": dict(expand=3, num_heads=4, head_dim=9, n_groups=4, conv_kernel=2, use_conv_bias=False),
}


@pytest.fixture(scope="session")
def theirs(theirs):
    """A function: transformers' model of one of the variants."""

    def make(variant="mamba", **more):
        return theirs(variant.split(",")[0], **(VARIANTS[variant] | more))

    return make


def load(folder, **more):
    kind = json.loads((folder / "config.json").read_text())
    mamba2 = kind.get("model_type") == "mamba2" or (kind.get("ssm_cfg") or {}).get("layer") == "Mamba2"
    return (load_mamba2 if mamba2 else load_mamba)(folder, **more)


def tokens(length=N, batch=B):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["float32", "float64"]
)
def test_scores_and_every_gradient_are_transformers_own(variant, dtype, tolerance, tmp_path, in_float64, theirs):
    judge = theirs(variant)
    judge.save_pretrained(tmp_path)
    ours = load(tmp_path, dtype=dtype)
    if dtype == torch.float64:
        with in_float64:
            judged = judge.double()(tokens(), labels=tokens())
    else:
        judged = judge(tokens(), labels=tokens())
    scores, loss = ours(tokens()), ours.loss(tokens())
    assert scores.dtype == dtype and not ours.training
    torch.testing.assert_close(scores, judged.logits, atol=tolerance, rtol=0)
    torch.testing.assert_close(loss, judged.loss, atol=tolerance, rtol=0)
    judged.loss.backward(), loss.backward()
    expected = from_mamba({name: p.grad for name, p in judge.named_parameters()})
    found = {name: p.grad for name, p in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=tolerance, rtol=0, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_greedy_generation_is_transformers_own_token_by_token(variant, tmp_path, theirs):
    judge = theirs(variant)
    judge.save_pretrained(tmp_path)
    prompts = tokens(5, batch=16)
    # transformers limits the steps of Mamba-2 where it reads a prompt, but not where it decodes from its cache: that
    # variant's judge reads the whole text again for every token
    cached = "time_step_limit" not in VARIANTS[variant]
    judged = judge.generate(  # a mask, or it would take each 0 or 1 of the prompts for padding
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=24, do_sample=False, use_cache=cached
    )
    assert judged.shape == (16, 29) and len(judged[:, 5:].unique()) > 4  # so that there is something to get wrong
    assert torch.equal(load(tmp_path).generate(prompts, 24), judged)


@pytest.mark.parametrize("variant", ["mamba", "mamba2"])
@torch.no_grad()
def test_padded_on_the_left_it_is_transformers_with_a_mask(variant, tmp_path, theirs):
    judge = theirs(variant)
    judge.save_pretrained(tmp_path)
    mask, reset = torch.ones(B, N, dtype=torch.long), torch.zeros(B, N, dtype=torch.bool)
    mask[1, :4], reset[1, 4] = 0, True
    judged, scores = judge(tokens(), attention_mask=mask).logits, load(tmp_path)(tokens(), reset=reset)
    torch.testing.assert_close(scores[mask.bool()], judged[mask.bool()], atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["mamba", "mamba2"])
def test_a_model_in_several_files(variant, tmp_path, theirs):
    judge = theirs(variant)
    judge.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()
    torch.testing.assert_close(load(tmp_path)(tokens()), judge(tokens()).logits, atol=1e-5, rtol=0)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*model-00002"):
        load(tmp_path)


@pytest.mark.parametrize("variant", ["mamba", "mamba2, one group"])
def test_the_released_codes_layout(variant, tmp_path, theirs):
    """Its names, its config.json, its vocabulary rounded up, and the tied scores stored twice."""
    judge = theirs(variant, vocab_size=56, **({"chunk_size": 256, "use_bias": False} if "2" in variant else {}))
    judge.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["backbone.embedding.weight"] = state.pop("backbone.embeddings.weight")
    state["lm_head.weight"] = state["backbone.embedding.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    mixer = {"d_state": 5, "d_conv": 4, "expand": 2}
    if "2" in variant:
        mixer |= {"layer": "Mamba2", "headdim": 4, "dt_limit": [0.0, float("inf")]}
    config = {"d_model": E, "n_layer": 2, "vocab_size": V, "ssm_cfg": mixer, "rms_norm": True, "attn_layer_idx": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(load(tmp_path)(tokens()), judge(tokens()).logits, atol=1e-5, rtol=0)
    config["attn_layer_idx"] = [1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"without attention .*attn_layer_idx \[1\]"):
        load(tmp_path)
    config = config | {"attn_layer_idx": [], "ssm_cfg": mixer | {"rmsnorm": False}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"ssm_cfg in .*config.json must hold .*, got rmsnorm too"):
        load(tmp_path)


def test_weights_keep_the_dtype_of_the_file_unless_told(tmp_path, theirs):
    theirs().bfloat16().save_pretrained(tmp_path)
    kept, widened = load(tmp_path), load(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in widened.parameters()} == {torch.float32}
    assert all(p.requires_grad and not p.is_meta for p in kept.parameters())
    assert kept(tokens()).dtype == torch.bfloat16
    assert torch.equal(kept.embeddings.weight.float(), widened.embeddings.weight)


def test_the_engine_can_be_named(tmp_path, theirs):
    for variant, engine in (("mamba", "reference"), ("mamba2", "chunked")):
        theirs(variant).save_pretrained(tmp_path)
        assert all(layer.mixer.impl == engine for layer in load(tmp_path, impl=engine).layers)


def test_tied_scores_that_are_not(folder):
    state = load_file(folder / "model.safetensors")
    save_file(state | {"lm_head.weight": torch.zeros(V, E)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight must be embeddings.weight .* tie_word_embeddings"):
        load_mamba(folder)


def test_a_dtype_that_no_weights_have(folder):
    for dtype in (torch.int8, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"dtype must be one of torch.float16, .*, got {dtype}"):
            load_mamba(folder, dtype=dtype)
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, got str"):
        load_mamba(folder, dtype="float32")


def test_tied_scores_of_another_dtype(folder):
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["backbone.embeddings.weight"].half()
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight must be embeddings.weight where .*config.json says"):
        load_mamba(folder)


def test_two_tensors_of_one_meaning(folder):
    state = load_file(folder / "model.safetensors")
    save_file(state | {"norm_f.weight": torch.ones(E)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"two tensors for norm_f\.weight") as error:
        load_mamba(folder)
    assert str(error.value).startswith(f"{folder}: ")
