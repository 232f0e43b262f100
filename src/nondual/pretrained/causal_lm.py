"""A Llama in our own classes: its settings as arguments of `CausalLM`, and the names of its tensors there.

Source: Touvron et al. 2023 (2302.13971), section 2.2: pre-norm by RMSNorm, rotary positions, a gated feed-forward
network; key/value heads shared by several query heads: Touvron et al. 2023b (2307.09288), section 2.2.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from nondual.feed_forward import GatedFeedForward
from nondual.language_models.causal import CausalLM
from nondual.language_models.gpt import FLASH
from nondual.relative_positions import Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.transformer_layer import TransformerLayer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def from_llama(model: "LlamaForCausalLM") -> CausalLM:
    """A copy of a Llama of transformers as a `CausalLM`: the same scores, cached generation, heads open to analysis.

    Its weights are copied, in their dtype and on their device; it is in evaluation mode. What `generate` may read has
    no end of its own: positions past the model's `max_position_embeddings` are turned on as they come.

        ours = from_llama(theirs)
        ours(ids)                                # theirs(ids).logits
        ours.generate(ids, 20)                   # theirs.generate(ids, max_new_tokens=20, do_sample=False)

    Args:
        model: a LlamaForCausalLM, with rotary positions as they are or divided ("linear" scaling).

    Raises:
        TypeError: another model.
        ValueError: rotary positions scaled in another way, or an activation that is not silu, gelu or relu.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "llama" or not hasattr(model, "lm_head"):
        raise TypeError(f"model must be a LlamaForCausalLM of transformers, got {type(model).__name__}")
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {config.hidden_act!r}")
    rotary = _rotary(config)

    def layer(_: int) -> TransformerLayer:
        return TransformerLayer(
            MultiHeadAttention(
                config.hidden_size,
                config.num_attention_heads,
                n_kv_heads=config.num_key_value_heads,
                d_head=config.head_dim,
                bias=config.attention_bias,
                causal=True,
                op=FLASH,
                positions=rotary,
            ),
            GatedFeedForward(
                config.hidden_size,
                config.intermediate_size,
                activation=ACTIVATIONS[config.hidden_act],
                bias=config.mlp_bias,
            ),
            config.hidden_size,
            norm_first=True,
            norm=nn.RMSNorm,
            eps=config.rms_norm_eps,
        )

    like = model.model.embed_tokens.weight
    tied = bool(config.tie_word_embeddings)
    make = partial(CausalLM, config.vocab_size, config.hidden_size, config.num_hidden_layers)
    ours = make(layer=layer, tied=tied, eps=config.rms_norm_eps).to(like.device, like.dtype)
    ours.load_state_dict(_renamed(model.state_dict(), tied))
    return ours.eval()


def _rotary(config: Any) -> Rotary:
    """The rotary positions of a Llama's configuration."""
    given = config.rope_parameters
    kind = given.get("rope_type", "default")
    if kind not in ("default", "linear") or given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"rope_type must be 'default' or 'linear', over whole heads, got {dict(given)}")
    if kind == "linear":
        return Rotary(config.head_dim, base=given["rope_theta"], scaling="linear", factor=given["factor"])
    return Rotary(config.head_dim, base=given["rope_theta"])


def _renamed(state: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """A Llama's tensors by the names that they have in `CausalLM`; tied scores have no matrix of their own."""
    ours = {
        "model.embed_tokens.": "embeddings.",
        "model.norm.": "norm_f.",
        "model.layers.": "layers.",
        ".self_attn.o_proj.": ".mixer.out_proj.",
        ".self_attn.": ".mixer.",
        ".mlp.gate_proj.": ".feed_forward.gate.",
        ".mlp.up_proj.": ".feed_forward.linear1.",
        ".mlp.down_proj.": ".feed_forward.linear2.",
        ".input_layernorm.": ".norm1.",
        ".post_attention_layernorm.": ".norm2.",
    }
    renamed = {}
    for name, tensor in state.items():
        for theirs, our in ours.items():
            name = name.replace(theirs, our)
        if not (tied and name == "lm_head.weight"):
            renamed[name] = tensor
    return renamed
