"""Hugging Face models on our attention against themselves in eager mode: outputs, gradients, caches, masks."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")  # a bare GPU machine may have torch alone
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from nondual.data import ALICE
from nondual.efficient_attention import transformers_interface
from nondual.efficient_attention.transformers_interface import CausalRule, make_mask, register_with_transformers
from nondual.ops import masks

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 61,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 5}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def mistral():
    return MistralForCausalLM(MistralConfig(**SMALL, **WINDOW))


def gemma():
    """Layers with a window and layers without, by turns."""
    layers = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **WINDOW, head_dim=8, layer_types=layers))


def qwen():
    """Its layers do not tell the attention function of their window: only the mask does."""
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    experts["shared_expert_intermediate_size"] = 16
    layers = {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, **WINDOW, **experts, **layers))


def gpt2():
    no_dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=3, **no_dropout, **ids))


def bert():
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return BertModel(BertConfig(**{key: SMALL[key] for key in keys}, **no_dropout))


CAUSAL = [llama, mistral, gemma, qwen, gpt2]


@pytest.fixture(autouse=True)
def registered():
    torch.manual_seed(0)
    register_with_transformers()


@pytest.fixture
def calls(monkeypatch):
    """Which of the two functions were called, and how."""
    seen = []
    for name in ("flash_attention", "attention"):
        spy_on(transformers_interface, name, seen, monkeypatch.setattr)
    return seen


def spy_on(module, name: str, seen: list, replace) -> None:
    """Have a function of a module append its name, `causal` and `window` to `seen` when it is called."""
    own = getattr(module, name)

    def spy(*args, **kwargs):
        seen.append((name, kwargs.get("causal"), kwargs.get("window")))
        return own(*args, **kwargs)

    replace(module, name, spy)


def ids(n: int = 37, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 97, (batch, n))


def padded(n: int = 37) -> torch.Tensor:
    """Two rows: one padded on the left, one on the right."""
    real = torch.ones(2, n, dtype=torch.long)
    real[0, :9] = real[1, -7:] = 0
    return real


def both(model, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The first output, in eager mode and with ours."""
    outputs = []
    for name in ("eager", "nondual"):
        model.set_attn_implementation(name)
        outputs.append(model(**inputs)[0])
    return tuple(outputs)


def close(pair, real=None, tolerance: float = 3e-6):
    theirs, ours = (x if real is None else x[real.bool()] for x in pair)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=1e-5)


# --- the table of architectures ------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs/reference/efficient_attention/transformers_interface.md"
HEADER = ["architecture", "class", "computed by", "forward", "gradient", "padded", "with a cache"]
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "pad_token_id")
ENCODER = {key: SMALL[key] for key in SIZES}
VISION = {**{key: SMALL[key] for key in SIZES[1:5]}, "image_size": 30, "patch_size": 6}
BOTH_SIDES = {"vocab_size": 97, "d_model": 48, "pad_token_id": 0, "max_position_embeddings": 64}
for side in ("encoder", "decoder"):
    BOTH_SIDES |= {f"{side}_layers": 2, f"{side}_attention_heads": 6, f"{side}_ffn_dim": 61}
LOCAL_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "hidden_size": 64, "intermediate_size": 64}

ARCHITECTURES = {
    "arcee": SMALL,
    "bart": BOTH_SIDES,
    "bert": ENCODER,
    "bloom": {"vocab_size": 97, "hidden_size": 48, "n_layer": 1, "n_head": 6},
    "clip_vision_model": VISION,
    "cohere2": {**SMALL, **WINDOW},
    "deit": VISION,
    "dinov2": VISION,
    "distilbert": {"vocab_size": 97, "dim": 48, "hidden_dim": 61, "n_layers": 2, "n_heads": 6},
    "electra": {**ENCODER, "embedding_size": 48},
    "ernie4_5": {**SMALL, **HEADS},
    "gemma": {**SMALL, **HEADS},
    "gemma2": {**SMALL, **HEADS},
    "gemma3_text": {**SMALL, **HEADS, **WINDOW},
    "glm": {**SMALL, **HEADS},
    "gpt2": {"vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 3, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": SMALL,
    "gpt_oss": {**SMALL, **HEADS, **LOCAL_EXPERTS},
    "granite": SMALL,
    "llama": SMALL,
    "marian": BOTH_SIDES,
    "mistral": {**SMALL, **WINDOW},
    "mixtral": {**SMALL, **LOCAL_EXPERTS, "num_attention_heads": 8},
    "modernbert": {**ENCODER, "local_attention": 8},
    "olmo2": SMALL,
    "opt": {**SMALL, "ffn_dim": 61, "word_embed_proj_dim": 48},
    "phi3": SMALL,
    "qwen2": SMALL,
    "qwen3": {**SMALL, **HEADS},
    "qwen3_moe": {**SMALL, **HEADS, **EXPERTS},
    "roberta": ENCODER,
    "siglip_vision_model": VISION,
    "smollm3": SMALL,
    "starcoder2": {**SMALL, **WINDOW},
    "t5": {"vocab_size": 97, "num_layers": 2, "num_heads": 3, "d_model": 48, "d_kv": 16, "d_ff": 61},
    "vit": VISION,
}
TWO_SIDED = ("bart", "marian", "t5")  # an encoder, and a decoder that attends to it
DECODERS = [name for name, given in ARCHITECTURES.items()
            if given is SMALL or set(SMALL) <= set(given)] + ["bloom", "gpt2"]  # fmt: skip


def of(name: str) -> torch.nn.Module:
    """A small model of an architecture, of random weights and without dropout."""
    config = AutoConfig.for_model(name, **ARCHITECTURES[name])
    for key, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, 0.0)
    kind = AutoModelForCausalLM if name in DECODERS else AutoModelForSeq2SeqLM if name in TWO_SIDED else AutoModel
    return kind.from_config(config)


def apart(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """The largest difference, as a part of the largest number of `theirs`."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def measured(name: str, calls: list) -> list[str | float | None]:
    """A row of the table: how an architecture is computed, and how far it is from eager, forward and backward."""
    torch.manual_seed(0)
    model, images = of(name).train(), "image_size" in ARCHITECTURES[name]
    row = [name.removesuffix("_model"), f"`{type(model).__name__}`"]
    inputs = {"pixel_values": torch.randn(2, 3, 30, 30)} if images else {"input_ids": ids()}
    if name in TWO_SIDED:
        inputs["decoder_input_ids"] = ids(11)
    outputs, grads = {}, {}
    for way in ("eager", "nondual"):
        model.set_attn_implementation(way)
        model.zero_grad()
        calls.clear()
        try:
            out = model(**inputs)[0]
        except ValueError as refusal:
            return [*row, f"refused: {str(refusal).partition(' is not supported')[0]}", None, None, None, None]
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).mean().backward()
        outputs[way] = out.detach()
        grads[way] = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    if not calls:
        return [*row, "its own attention: it does not use AttentionInterface", None, None, None, None]
    words = {"flash_attention": "flash attention", "attention": "attention with a mask"}
    row.append(" and ".join(words[each] for each in words if each in {call for call, _, _ in calls}))
    assert grads["eager"].keys() == grads["nondual"].keys()
    largest = max(g.abs().max().item() for g in grads["eager"].values())
    off = max((grads["nondual"][key] - g).abs().max().item() for key, g in grads["eager"].items())
    row += [apart(outputs["eager"], outputs["nondual"]), off / largest]
    if images:
        return [*row, None, None]
    with torch.no_grad():
        pair = both(model.eval(), **inputs, attention_mask=padded())
        row.append(apart(*(x if name in TWO_SIDED else x[padded().bool()] for x in pair)))
        if name not in DECODERS:
            return [*row, None]
        cache, parts = None, []
        for part in inputs["input_ids"].split([25, 11, 1], dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache, parts = out.past_key_values, [*parts, out.logits]
        model.set_attn_implementation("eager")
        row.append(apart(model(inputs["input_ids"], use_cache=False).logits, torch.cat(parts, 1)))
    return row


def written(row: list[str | float | None]) -> str:
    cells = ["–" if cell is None else f"{cell:.0e}" if isinstance(cell, float) else cell for cell in row]
    return f"| {' | '.join(cells)} |"


def shown() -> dict[str, list[str]]:
    """The rows of the table on the page, by the architecture."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    header, _, *rows = [line.strip("| ").split(" | ") for line in lines]
    assert header == HEADER
    return {row[0]: row for row in rows}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_table_on_the_page_says_what_is_found(name, calls):
    found, page = measured(name, calls), shown()[name.removesuffix("_model")]
    for column, ours, theirs in zip(HEADER, found, page, strict=True):
        if not isinstance(ours, float):
            assert theirs == (ours or "–"), (
                f"{column}: {theirs} on the page; to write the table anew: python {__file__}"
            )
        else:
            assert ours < 3e-6, f"{column}: differs by {ours} from eager"
            assert ours <= 5 * float(theirs), (
                f"{column}: {ours} here, {theirs} on the page"
            )  # rounding varies by machine


def test_the_table_on_the_page_has_every_architecture_that_is_tested():
    assert list(shown()) == [name.removesuffix("_model") for name in ARCHITECTURES]


# --- models of random weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*CAUSAL, bert])
def test_outputs_equal_eager_on_flash_attention_alone(make, calls):
    close(both(make().eval(), input_ids=ids()))
    assert {name for name, _, _ in calls} == {"flash_attention"}
    assert {causal for _, causal, _ in calls} == {make is not bert}
    assert {window for _, _, window in calls} == {
        "mistral": {5}, "qwen": {5}, "gemma": {5, None}
    }.get(make.__name__, {None})  # fmt: skip


def test_vit_equals_eager(calls):
    model = ViTModel(ViTConfig(**{k: SMALL[k] for k in ("hidden_size", "num_attention_heads")}, num_hidden_layers=2,
                               intermediate_size=61, image_size=30, patch_size=6)).eval()  # fmt: skip
    close(both(model, pixel_values=torch.randn(2, 3, 30, 30)))
    assert set(calls) == {("flash_attention", False, None)}


def test_t5_with_its_bias_on_positions_and_cross_attention_equals_eager():
    config = T5Config(vocab_size=97, d_model=48, d_kv=16, d_ff=61, num_layers=2, num_heads=3, dropout_rate=0.0)
    model = T5ForConditionalGeneration(config).eval()
    close(both(model, input_ids=ids(), decoder_input_ids=ids(11)))
    close(both(model, input_ids=ids(), attention_mask=padded(), decoder_input_ids=ids(11)))


@pytest.mark.parametrize("make", [*CAUSAL, bert])
def test_a_padded_batch_equals_eager_where_it_is_not_padding(make, calls):
    close(both(make().eval(), input_ids=ids(), attention_mask=padded()), real=padded())
    assert {name for name, _, _ in calls} == {"attention"}
    model, whole = make().eval(), torch.ones(2, 37, dtype=torch.long)
    calls.clear()
    close(both(model, input_ids=ids(), attention_mask=whole))  # a mask without padding costs nothing
    assert {name for name, _, _ in calls} == {"flash_attention"}


@pytest.mark.parametrize("make", CAUSAL)
def test_packed_sequences_equal_eager(make):
    positions = torch.cat([torch.arange(20), torch.arange(17)])[None].expand(2, -1)
    pair = both(make().eval(), input_ids=ids(), position_ids=positions, use_cache=False)
    close(pair)


@pytest.mark.parametrize("make", [*CAUSAL, bert])
def test_gradients_equal_eager(make):
    model, inputs, grads = make().train(), ids(), {}
    for name in ("eager", "nondual"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(inputs)[0].square().mean().backward()
        grads[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert grads["eager"].keys() == grads["nondual"].keys()
    for name, grad in grads["eager"].items():
        torch.testing.assert_close(grads["nondual"][name], grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: n + m)


@torch.no_grad()
@pytest.mark.parametrize("make", CAUSAL)
def test_chunks_and_single_tokens_with_a_cache_equal_eager_on_the_whole(make, calls):
    model, inputs = make().eval(), ids(29)
    model.set_attn_implementation("eager")
    whole = model(inputs, use_cache=False).logits
    model.set_attn_implementation("nondual")
    cache, steps = None, []
    for part in inputs.split([11, 7, *[1] * 11], dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache, steps = out.past_key_values, [*steps, out.logits]
    close((whole, torch.cat(steps, 1)))
    assert {name for name, _, _ in calls} == {"flash_attention"}  # more keys than queries, aligned at the end


@pytest.mark.parametrize("make", CAUSAL)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pad", [False, True])
def test_generation_gives_the_same_tokens_as_eager(make, cache, pad):
    model, inputs, tokens = make().eval(), ids(13), {}
    real = torch.ones_like(inputs)
    if pad:
        real[0, :4] = 0
    for name in ("eager", "nondual"):
        model.set_attn_implementation(name)
        tokens[name] = model.generate(
            inputs, attention_mask=real, max_new_tokens=17, min_new_tokens=17, do_sample=False, disable_compile=True,
            cache_implementation=cache,
        )  # fmt: skip
    assert torch.equal(tokens["eager"], tokens["nondual"])


@torch.no_grad()
def test_a_static_cache_that_is_not_full_is_masked(calls):
    """Its prompt stands at the start of the keys, not at their end."""
    model, inputs = llama().eval(), ids(11)
    for name in ("eager", "nondual"):
        model.set_attn_implementation(name)
        out = model(inputs, past_key_values=StaticCache(model.config, max_cache_len=23)).logits
        first = out if name == "eager" else first
    close((first, out))
    assert {name for name, _, _ in calls} == {"attention"}


@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_mask_of_the_user_s_own_equals_eager(kind):
    allowed = torch.rand(2, 1, 37, 37) < 0.5
    allowed |= torch.eye(37, dtype=torch.bool)
    added = torch.zeros(2, 1, 37, 37).masked_fill(~allowed, torch.finfo(torch.float32).min)
    model, inputs = llama().eval(), ids()
    model.set_attn_implementation("eager")
    theirs = model(inputs, attention_mask=added).logits
    model.set_attn_implementation("nondual")
    close((theirs, model(inputs, attention_mask=allowed if kind == torch.bool else added).logits))


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, mistral, bert])
def test_compiled_whole_it_equals_eager(make):
    model, inputs = make().eval(), ids()
    model.set_attn_implementation("eager")
    theirs = model(inputs)[0]
    model.set_attn_implementation("nondual")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close((theirs, compiled(inputs)[0]))


def test_half_precision_and_checkpointing_of_gradients_run():
    model = llama().to(torch.bfloat16).train()
    model.set_attn_implementation("nondual")
    model.gradient_checkpointing_enable()
    loss = model(ids(), labels=ids(), use_cache=False).loss
    loss.backward()
    assert loss.dtype.is_floating_point and all(p.grad.isfinite().all() for p in model.parameters())


# --- dropout of attention weights ----------------------------------------------------------------------------------


def patterns() -> dict[str, tuple[dict, torch.Tensor]]:
    """Ways in which a layer may be asked for a pattern, each with the mask (N, M) that it means."""
    n, m = 7, 11
    torch.manual_seed(3)
    own = torch.rand(n, m) < 0.6
    own[:, 0] = True
    bias = torch.randn(1, 6, n, m)
    none = torch.zeros(n, m)
    return {
        "all": ({"is_causal": False}, none),
        "causal": ({"attention_mask": CausalRule((2, 1, n, m), None, "cpu")}, masks.causal(n, m)),
        "window": ({"attention_mask": CausalRule((2, 1, n, m), 3, "cpu")}, masks.sliding_window(n, m, window=3)),
        "window without a mask": ({"is_causal": True, "sliding_window": 3}, masks.sliding_window(n, m, window=3)),
        "boolean": ({"attention_mask": own[None, None]}, own),
        "added": ({"attention_mask": bias}, bias),
        "bias": ({"position_bias": bias, "is_causal": False}, bias),
    }


@pytest.mark.parametrize("pattern", patterns())
def test_dropout_drops_single_weights_at_its_rate_and_scales_the_rest(pattern):
    """With the identity as values the output is the weights: each must be 0, or its own value over 1 - p."""
    given, mask = patterns()[pattern]
    given = {"attention_mask": None, **given}
    q, k, p = torch.randn(2, 6, 7, 8), torch.randn(2, 2, 11, 8), 0.3
    values = torch.eye(11).expand(2, 2, 11, 11)
    layer, dropped, total = torch.nn.Identity(), 0, 0
    whole, _ = transformers_interface.attention_forward(layer, q, k, values, **given)
    allowed = (mask if mask.dtype == torch.bool else torch.ones_like(mask, dtype=torch.bool)).expand(2, 6, 7, 11)
    allowed = allowed.transpose(1, 2)
    assert (whole[~allowed] == 0).all()
    for _ in range(8):
        out, _ = transformers_interface.attention_forward(layer, q, k, values, dropout=p, **given)
        kept = out != 0
        assert (out[~allowed] == 0).all()
        torch.testing.assert_close(out[kept], whole[kept] / (1 - p), atol=1e-6, rtol=1e-5)
        dropped, total = dropped + (~kept & allowed).sum().item(), total + allowed.sum().item()
    assert abs(dropped - p * total) < 4 * (total * p * (1 - p)) ** 0.5  # four standard deviations


def test_a_model_trains_with_dropout_of_weights_and_is_exact_in_evaluation(calls):
    config = GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=3, attn_pdrop=0.4, resid_pdrop=0.0, embd_pdrop=0.0,
                        bos_token_id=1, eos_token_id=2)  # fmt: skip
    model, tokens = GPT2LMHeadModel(config), ids()
    with torch.no_grad():
        close(both(model.eval(), input_ids=tokens))
    assert {name for name, _, _ in calls} == {"flash_attention"}
    calls.clear()
    first, second = (model.train()(tokens, labels=tokens) for _ in range(2))
    assert {name for name, _, _ in calls} == {"attention"}
    assert not torch.equal(first.logits, second.logits)
    first.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for name, p in model.named_parameters() if "attn" in name)


def test_dropout_moves_the_training_loss_as_eager_s_does():
    """The mean loss over many draws, which differs from the loss without dropout, is that of eager."""
    config = GPT2Config(vocab_size=97, n_embd=48, n_layer=1, n_head=3, attn_pdrop=0.6, resid_pdrop=0.0, embd_pdrop=0.0,
                        initializer_range=0.5, bos_token_id=1, eos_token_id=2)  # fmt: skip
    model, tokens, seen = GPT2LMHeadModel(config).train(), ids(5, 800), {}
    tokens[:] = tokens[0]
    for name in ("eager", "nondual"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits = model(tokens).logits[:, -1].log_softmax(-1)
        seen[name] = logits[:, 5]
    spread = (seen["eager"].var() / 800 + seen["nondual"].var() / 800).sqrt()
    assert abs(seen["eager"].mean() - seen["nondual"].mean()) < 4 * spread
    assert 0.8 < seen["eager"].std() / seen["nondual"].std() < 1.25 and seen["eager"].std() > 0.1


# --- a real model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smol():
    from nondual.pretrained import smollm2

    return smollm2()


@torch.no_grad()
def test_smollm2_on_a_long_text_equals_eager(smol):
    model, tokenizer = smol
    tokens = tokenizer(ALICE, return_tensors="pt")
    assert tokens.input_ids.shape[1] > 500
    theirs, ours = both(model, **tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@torch.no_grad()
def test_smollm2_on_a_batch_padded_on_the_left_equals_eager(smol):
    model, tokenizer = smol
    tokens = tokenizer([ALICE[:300], "The capital of France is"], return_tensors="pt", padding=True)
    assert tokens.attention_mask[1, 0] == 0
    close(both(model, **tokens), real=tokens.attention_mask, tolerance=1e-4)


@pytest.mark.timeout(400)  # 14 s alone on two cores; a busy machine takes ten times that
def test_smollm2_generates_the_same_words_as_eager(smol):
    model, tokenizer = smol
    for texts in ([ALICE[:300]], [ALICE[:300], "The capital of France is"]):
        tokens, said = tokenizer(texts, return_tensors="pt", padding=True), {}
        for name in ("eager", "nondual"):
            model.set_attn_implementation(name)
            said[name] = tokenizer.batch_decode(model.generate(**tokens, max_new_tokens=24, do_sample=False))
        assert said["nondual"] == said["eager"]
    assert "Paris" in said["nondual"][1]


# --- the mask ------------------------------------------------------------------------------------------------------


def rule(window=None, **changes) -> torch.Tensor:
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    function = sliding_window_causal_mask_function(window) if window else causal_mask_function
    config = LlamaConfig(**SMALL)
    asked = {"batch_size": 2, "q_length": 5, "kv_length": 11, "q_offset": 6, "kv_offset": 0, "config": config}
    return make_mask(**{**asked, "mask_function": function, "local_size": window, **changes})


def test_a_rule_written_out_is_the_mask():
    plain, near = rule(), rule(window=3)
    assert isinstance(plain, CausalRule) and plain.window is None and plain.shape == (2, 1, 5, 11)
    assert torch.equal(plain.full(), masks.causal(5, 11).expand(2, 1, 5, 11))
    assert torch.equal(near.full(), masks.sliding_window(5, 11, window=3).expand(2, 1, 5, 11))
    for window, mask in ((None, plain), (3, near)):  # and it is what transformers writes out
        assert torch.equal(rule(window=window, allow_is_causal_skip=False), mask.full())


def test_whatever_looks_into_a_rule_gets_the_mask():
    mask = rule(window=3)
    full = mask.full()
    seen = {
        "slice": (mask[:, :, :, :7], full[:, :, :, :7]),
        "and": (mask & True, full),
        "not": (~mask, ~full),
        "cast": (mask.to(torch.float64), full.double()),
        "join": (torch.cat([mask, full], -1), torch.cat([full, full], -1)),
        "where": (torch.where(mask, 0.0, -1.0), torch.where(full, 0.0, -1.0)),
        "copy": (mask.clone(), full),
        "sum": (mask.sum(), full.sum()),
    }
    for name, (ours, expected) in seen.items():
        assert type(ours) is torch.Tensor and torch.equal(ours, expected), name


@pytest.mark.parametrize(
    "changes",
    [
        {"q_offset": 5},  # the last query is not on the last key
        {"q_offset": torch.tensor(6)},  # a static cache
        {"allow_is_causal_skip": False},  # something was added to the pattern
        {"attention_mask": torch.tensor([[True] * 11, [False] + [True] * 10])},
        {"attention_mask": torch.ones(2, 9, dtype=torch.bool)},  # shorter than the keys: the rest is not there yet
        {"mask_function": lambda b, h, q, k: (k <= q) & (k != 3)},
    ],
)
def test_what_is_no_rule_is_written_out(changes):
    assert type(rule(**changes)) is torch.Tensor


def test_a_chunked_pattern_is_no_window():
    from transformers.masking_utils import chunked_causal_mask_function

    config = LlamaConfig(**SMALL, attention_chunk_size=4)
    chunks = chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long))
    mask = rule(mask_function=chunks, local_size=4, config=config)
    assert type(mask) is torch.Tensor and mask[0, 0, -1].tolist() == [False] * 8 + [True] * 3


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nondual_flash", "my_sdpa", "eager", "org/kernel", ""])
def test_a_name_that_transformers_reads_its_own_way_is_refused(name):
    with pytest.raises(ValueError, match="name must have none of flash, sdpa"):
        register_with_transformers(name)


def test_another_name_may_be_chosen():
    assert register_with_transformers("tiles") == "tiles"
    model = LlamaForCausalLM._from_config(LlamaConfig(**SMALL), attn_implementation="tiles").eval()
    close((both(model, input_ids=(x := ids()))[0], model(x)[0]))


def test_without_transformers_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers 5 or later is needed: pip install 'nondual\[transformers\]'"):
        register_with_transformers()


@pytest.mark.parametrize(
    "argument, says",
    [
        ({"softcap": 50.0}, "a soft cap on the scores"),
        ({"s_aux": torch.zeros(6)}, "attention sinks"),
        ({"output_attentions": True}, "returning the weights"),
        ({"cu_seq_lens_q": torch.tensor([0, 37])}, "sequences packed without a mask"),
    ],
)
def test_what_is_not_computed_here_is_refused(argument, says):
    layer, q = llama().model.layers[0].self_attn, torch.randn(1, 6, 5, 8)
    with pytest.raises(ValueError, match=f"{says}.* is not supported"):
        transformers_interface.attention_forward(layer, q, q, q, None, **argument)
    quiet = {name: None for name in argument}
    transformers_interface.attention_forward(layer, q, q, q, None, **quiet)


def test_a_window_that_looks_both_ways_wants_its_mask():
    q = torch.randn(1, 6, 9, 8)
    with pytest.raises(ValueError, match="sliding_window=5 over 9 keys in a layer that is not causal needs its mask"):
        transformers_interface.attention_forward(torch.nn.Identity(), q, q, q, None, is_causal=False, sliding_window=5)


# --- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("make", [llama, mistral, gemma, gpt2, bert])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_is_as_near_the_truth_as_eager(make, dtype):
    model, inputs = make().eval().cuda(), ids(301).cuda()
    model.set_attn_implementation("eager")
    truth = model.double()(inputs)[0]
    theirs, ours = both(model.to(dtype), input_ids=inputs)
    error, own = (theirs - truth).abs().max(), (ours - truth).abs().max()
    assert own <= 2 * error + 1e-5, f"{own} against eager's {error}"
    real = torch.ones_like(inputs)
    real[0, :9] = 0
    theirs, ours = (x[real.bool()] for x in both(model, input_ids=inputs, attention_mask=real))
    model.set_attn_implementation("sdpa")  # eager's mask overflows in float64 where a row sees nothing
    truth = model.double()(inputs, attention_mask=real)[0][real.bool()]
    assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("make", [llama, mistral])
def test_on_a_gpu_gradients_and_generation_equal_eager(make):
    model, inputs = make().cuda(), ids(97).cuda()
    grads, tokens = {}, {}
    for name in ("eager", "nondual"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model.train()(inputs)[0].square().mean().backward()
        grads[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        tokens[name] = model.eval().generate(inputs, max_new_tokens=17, min_new_tokens=17, do_sample=False)
    for name, grad in grads["eager"].items():
        torch.testing.assert_close(grads["nondual"][name], grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: n + m)
    assert torch.equal(tokens["eager"], tokens["nondual"])


def write_the_table() -> None:
    """Measure every architecture and write the page's table: run this file with Python."""
    register_with_transformers()
    seen = []
    for name in ("flash_attention", "attention"):
        spy_on(transformers_interface, name, seen, setattr)
    rows = [written(measured(name, seen)) for name in ARCHITECTURES]
    table = "\n".join([written(HEADER), written(["---"] * len(HEADER)), *rows])
    before, _, rest = PAGE.read_text(encoding="utf-8").partition("| architecture |")
    PAGE.write_text(before + table + rest[rest.index("\n\n") :], encoding="utf-8")


if __name__ == "__main__":
    write_the_table()
