"""Any Hugging Face model on our flash attention: one call registers it, and a model is told its name.

    register_with_transformers()
    model.set_attn_implementation("nondual")

transformers (5 or later) asks a registered implementation for two functions. One makes the mask, once for a forward
pass; the other is called by every layer with its queries, keys and values, and that mask. What we do with a mask:

- causal, or causal within a window, and the last query is on the last key: flash attention by that rule, which never
  forms the mask. So prompts, chunks of prompts and decoding are all served.
- no mask, in a layer that is not causal: flash attention over all the keys.
- anything else (padding, packed sequences, chunks, prefixes, a bias on positions): `nondual.ops.attention.attention`
  with the mask, a boolean for each query and key. The same result, slower. So too for a static cache, whose last query
  is not on the last key, and for a window under torch.compile.
- any of these in training with attention dropout above 0: `nondual.ops.attention.attention` with dropout, since flash
  attention has none. A window is then formed as a mask.

What would change the result and is not computed here (a soft cap on scores, sinks, a choice of keys, packed lengths
without a mask) raises ValueError. Models whose attention does not go through transformers' AttentionInterface (Falcon,
Bloom, GPT-J among them) keep their own attention; transformers logs that.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nondual.ops import masks
from nondual.ops.attention import attention
from nondual.ops.flash_attention import flash_attention

TAKEN = ("flash", "sdpa", "flex_attention", "eager", "|", "/", ":")  # what transformers itself reads in a name
UNSUPPORTED = {
    "softcap": "a soft cap on the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "a choice of keys for each query",
    "block_indices": "a choice of keys for each query",
    "cache": "a paged cache",
    "cu_seq_lens_q": "sequences packed without a mask",
    "output_attentions": "returning the weights, which flash attention never forms,",
}


def register_with_transformers(name: str = "nondual") -> str:
    """Make flash attention known to transformers: `model.set_attn_implementation(name)`, or `attn_implementation=name`.

    Calling it again does no harm.

    Args:
        name: what models call it. Without "flash" in it: transformers would look for the flash-attn package behind
            such a name, and hand over packed sequences as that package wants them.

    Returns:
        The name.

    Raises:
        ImportError: transformers 5 or later is not installed.
        ValueError: the name means something else to transformers.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError:
        raise ImportError("transformers 5 or later is needed: pip install 'nondual[transformers]'") from None
    if not name or any(word in name for word in TAKEN):
        raise ValueError(
            f"name must have none of {', '.join(TAKEN)} in it, which transformers reads its own way, got {name!r}"
        )
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, make_mask)
    return name


# --- the mask, once for a forward pass -----------------------------------------------------------------------------


class CausalRule(torch.Tensor):
    """The mask (B, 1, N, M) of causal attention, aligned at the end, within a window or not, that is not written out.

    To a layer that passes it on it is a tensor with a shape. Whatever operation looks into it gets the mask in full: a
    model that slices, joins or adds masks stays right, and only loses what the rule would have saved.
    """

    window: int | None

    @staticmethod
    def __new__(cls, shape: tuple[int, int, int, int], window: int | None, device: torch.device | str) -> "CausalRule":
        rule = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=torch.device(device))
        rule.window = window
        return rule

    def full(self) -> Tensor:
        """The mask, written out: bool (B, 1, N, M), True where attending is allowed."""
        n, m = self.shape[-2:]
        if self.window is None:
            return masks.causal(n, m, device=self.device).expand(self.shape)
        return masks.sliding_window(n, m, window=self.window, device=self.device).expand(self.shape)

    __torch_function__: Any = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType] as torch says

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, given = tree_map_only(cls, cls.full, (args, kwargs or {}))
        return func(*args, **dict(given))


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What transformers asks before the first layer: a rule where one suffices, else the whole mask, else None.

    The arguments are those of `transformers.masking_utils.sdpa_mask`, which writes out what is no rule. Those that
    decide: `mask_function`, the pattern, as a function of positions; `local_size`, the window of a sliding pattern (or
    the chunk of a chunked one); `allow_is_causal_skip`, whether the pattern is causal with nothing added to it;
    `attention_mask` (B, M), False on padding.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    window = local_size if local_size is not None and local_size < kv_length else None
    chunked = getattr(config, "attention_chunk_size", None) is not None
    is_rule = (
        allow_is_causal_skip
        and (mask_function is causal_mask_function if local_size is None else config is not None and not chunked)
        and not isinstance(q_offset, Tensor)  # a static cache: reading this number would wait for the device
        and q_offset + q_length == kv_offset + kv_length
        and (attention_mask is None or not torch.compiler.is_compiling())  # its values are not there to be looked at
        and _nothing_padded(attention_mask, kv_length, kv_offset)
    )
    if is_rule and not torch.compiler.is_compiling():
        return CausalRule((batch_size, 1, q_length, kv_length), window, device)
    if is_rule and window is None and q_length == kv_length:
        return None  # compiled, a mask is None or an ordinary tensor: the layer's own `is_causal` gives the same
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # pyright: ignore[reportArgumentType] a tensor with a static cache
        kv_offset=kv_offset,
        mask_function=mask_function or causal_mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        device=device,
        **kwargs,
    )


def _nothing_padded(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> bool:
    """Whether every key from `kv_offset` on is a real one."""
    if attention_mask is None:
        return True
    keys = attention_mask[:, kv_offset : kv_offset + kv_length]
    return keys.shape[1] == kv_length and bool(keys.all())


# --- attention, in every layer -------------------------------------------------------------------------------------


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer.

    Args:
        module: the layer; where neither a mask nor `is_causal` says it, its own `is_causal` does.
        query: (B, H, N, D).
        key: (B, G, M, D), H a multiple of G.
        value: (B, G, M, Dv).
        attention_mask: a rule, None, or broadcastable to (B, H, N, M): boolean, True where attending is allowed, or
            floating and added to the scores. It decides alone; `is_causal` and `sliding_window` speak where it is None.
        dropout: probability of dropping a weight, in [0, 1). transformers passes the model's own in training, and 0
            in evaluation. Above 0 the weights are formed, in memory that grows with N · M.
        scaling: factor on the scores; 1/√D where left out.
        is_causal: as in `attention`, aligned at the end.
        sliding_window: the keys that a causal query sees, its own included.
        position_bias: added to the scores, broadcastable to (B, H, N, M).

    Returns:
        The outputs (B, N, H, Dv), and None for the weights.

    Raises:
        ValueError: what would change the result and is not computed here.
    """
    _refuse(kwargs)
    n, m = query.shape[2], key.shape[2]
    mask, causal, window = attention_mask, False, None
    if isinstance(mask, CausalRule) and mask.shape[-2:] == (n, m):
        mask, causal, window = None, True, mask.window
    elif mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        window = sliding_window if sliding_window is not None and sliding_window < m else None
        if window is not None and not causal:
            raise ValueError(
                f"sliding_window={window} over {m} keys in a layer that is not causal needs its mask, got None"
            )
    if mask is None and position_bias is None and not dropout:
        out = flash_attention(query, key, value, causal=causal, window=window, scale=scaling)
    else:
        if window is not None:
            mask, causal = masks.sliding_window(n, m, window=window, device=query.device), False
        mask = _biased(mask, position_bias, query.dtype)
        out = attention(query, key, value, mask=mask, causal=causal, scale=scaling, dropout=dropout)
    return out.transpose(1, 2).contiguous(), None


def _refuse(kwargs: dict[str, Any]) -> None:
    """Stop where the result would be another than the model means."""
    for name, meaning in UNSUPPORTED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{meaning} ({name}) is not supported: use model.set_attn_implementation('eager')")


def _biased(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Mask and bias in one: boolean where there is no bias, else of the queries' dtype, to be added to the scores."""
    if isinstance(mask, CausalRule):
        mask = mask.full()
    if mask is None:
        return None if bias is None else bias.to(dtype)
    if bias is None:
        return mask if mask.dtype == torch.bool else mask.to(dtype)
    return torch.where(mask, bias.to(dtype), -torch.inf) if mask.dtype == torch.bool else (bias + mask).to(dtype)
