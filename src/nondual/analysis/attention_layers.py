"""Where a model's attention layers are, and which of their parts are queries, keys, values and output.

Recording, replacing and measuring heads need the same five things of an attention layer, whoever wrote it: how many
heads, how wide, and the four projections. Known are `nondual.self_attention.MultiHeadAttention`, and of transformers
the attentions of Llama and its many relatives (q_proj, k_proj, v_proj, o_proj), of BERT and of ALBERT.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from nondual.self_attention import MultiHeadAttention


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One attention layer of a model.

    Attributes:
        module: the layer itself.
        n_heads: H, the query heads.
        n_kv_heads: G, the key/value heads; query head h uses key/value head h // (H / G).
        d_head: D.
        query: E -> H D.
        key: E -> G D.
        value: E -> G D.
        output: W_O, H D -> E. What goes into it is the heads' outputs side by side.
    """

    module: nn.Module
    n_heads: int
    n_kv_heads: int
    d_head: int
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module

    def check_head(self, head: int, name: str = "head") -> None:
        """Refuse what is not the number of one of the H heads.

        Raises:
            TypeError: not an int.
            ValueError: below 0, or H and more.
        """
        if isinstance(head, bool) or not isinstance(head, int):
            raise TypeError(f"{name} must be an int, got {type(head).__name__}")
        if not 0 <= head < self.n_heads:
            raise ValueError(f"{name} must be 0 to {self.n_heads - 1}, got {head}")


def attention_layer(attention: "nn.Module | AttentionLayer") -> AttentionLayer:
    """The parts of one attention layer.

    Args:
        attention: a MultiHeadAttention, or the attention of a transformers model: `layer.self_attn` of a Llama,
            `layer.attention` of BERT and ALBERT. What is already an AttentionLayer is returned as it is.

    Raises:
        TypeError: anything else.
    """
    found = attention if isinstance(attention, AttentionLayer) else _parts(attention)
    if found is None:
        raise TypeError(
            "attention must be a MultiHeadAttention or the attention layer of a Llama, BERT or ALBERT, "
            f"got {type(attention).__name__}"
        )
    return found


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """Every attention layer of a model, in the order in which a forward pass comes to them.

    Only attention counts: in a hybrid of Mamba and attention, layer 0 is the first that has heads. A layer that the
    model uses several times, as ALBERT does, is listed once for every use.

    Args:
        model: an Encoder, TextEncoder, CausalLM, GPT, or any module that holds known attention layers in the order of
            their use; or a Llama, BERT or ALBERT of transformers.

    Raises:
        TypeError: not an nn.Module.
        ValueError: it has no attention layer of a known kind.
    """
    if not isinstance(model, nn.Module):
        inner = isinstance(getattr(model, "model", None), nn.Module)
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}{'; give its .model' if inner else ''}")
    found = list(_walk(model, set()))
    if not found:
        raise ValueError(
            f"model must have attention heads, got {type(model).__name__} with none of a known kind: "
            "MultiHeadAttention, or the attention of transformers' Llama, BERT or ALBERT"
        )
    return found


def all_heads(model: nn.Module) -> list[tuple[int, int]]:
    """The pairs (layer, head) of a model, layer by layer.

    Raises:
        TypeError, ValueError: as in `attention_layers`.
    """
    return [(i, head) for i, layer in enumerate(attention_layers(model)) for head in range(layer.n_heads)]


def check_heads(model: nn.Module, heads: Any) -> list[AttentionLayer]:
    """The model's attention layers, once each of `heads` is known to be one of its heads.

    Args:
        model: as in `attention_layers`.
        heads: pairs (layer, head).

    Raises:
        TypeError: what is not a pair of ints.
        ValueError: a layer or a head that the model does not have.
    """
    layers = attention_layers(model)
    for pair in heads:
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(type(number) is int for number in pair):
            raise TypeError(f"a head must be a pair of ints, (layer, head), got {pair!r}")
        layer, head = pair
        if not 0 <= layer < len(layers):
            raise ValueError(f"layer must be 0 to {len(layers) - 1}, got {layer} in {pair}")
        layers[layer].check_head(head, f"head of layer {layer}")
    return layers


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """A context in which a model that torch.compile was given runs as it is written, so that hooks are called.

    Compiled code does not call hooks that were added after it was compiled, and does not say so.
    """
    compiled = any(
        isinstance(getattr(module, "_orig_mod", None), nn.Module) or module._compiled_call_impl is not None
        for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def weight_of(projection: nn.Module, name: str) -> Tensor:
    """The weight (out, in) of a linear projection.

    Args:
        projection: an nn.Linear, or what has a two-dimensional floating-point `weight` as that has.
        name: what it is, for the error.

    Raises:
        TypeError: it has none, as a quantised layer; or adapters on top, as LoRA.
    """
    weight = getattr(projection, "weight", None)
    plain = isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()
    if not plain or hasattr(projection, "base_layer"):
        raise TypeError(
            f"{name} must be a plain linear layer, got {type(projection).__name__}: merge adapters, or load the model "
            "without quantisation"
        )
    return cast(Tensor, weight)


def _has(module: object, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _parts(module: Any) -> AttentionLayer | None:
    """The parts of an attention layer of a known kind; None where it is another module."""
    if isinstance(module, MultiHeadAttention):
        kind = (module.n_heads, module.n_kv_heads, module.d_head)
        return AttentionLayer(module, *kind, module.q_proj, module.k_proj, module.v_proj, module.out_proj)
    if _has(module, "q_proj", "k_proj", "v_proj", "o_proj") and hasattr(module, "num_key_value_groups"):  # Llama
        n_heads = module.config.num_attention_heads
        kind = (n_heads, n_heads // module.num_key_value_groups, module.head_dim)
        return AttentionLayer(module, *kind, module.q_proj, module.k_proj, module.v_proj, module.o_proj)
    inner, out = module, module
    if _has(module, "self", "output"):  # BERT: the projections are one level down
        inner, out = module.self, module.output
    if _has(inner, "query", "key", "value") and _has(out, "dense") and hasattr(inner, "num_attention_heads"):
        kind = (inner.num_attention_heads, inner.num_attention_heads, inner.attention_head_size)
        return AttentionLayer(module, *kind, inner.query, inner.key, inner.value, out.dense)
    return None


def _walk(module: nn.Module, seen: set[nn.Module]) -> Iterator[AttentionLayer]:
    """The attention layers in a module; those of a list of layers again for every place in the list."""
    if module in seen:
        return
    seen.add(module)
    layer = _parts(module)
    if layer is not None:
        yield layer
    elif isinstance(module, nn.ModuleList) or _has(module, "albert_layer_groups"):
        before = set(seen)
        for child in module if isinstance(module, nn.ModuleList) else _albert_groups(module):
            own = set(before)
            yield from _walk(child, own)
            seen |= own
    else:
        for child in module.children():
            yield from _walk(child, seen)


def _albert_groups(transformer: Any) -> list[nn.Module]:
    """The group of layers that ALBERT runs at each depth: there are a few groups, and a group serves several depths."""
    n_layers, n_groups = transformer.config.num_hidden_layers, transformer.config.num_hidden_groups
    return [transformer.albert_layer_groups[int(i / (n_layers / n_groups))] for i in range(n_layers)]
