"""A Llama and its tokenizer from a GGUF file, as llama.cpp writes them, in the classes of transformers."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nondual.pretrained.gguf import read_gguf
from nondual.relative_positions import reorder_pairs
from nondual.store import Package, read

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def llama(
    package: Package, file: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerFast]":
    """The model in a GGUF file of a package, in evaluation mode, and its tokenizer.

    Args:
        package: what was fetched.
        file: its GGUF file, by the name that the package has it under.
        device: where the model runs; the CPU where left out.
        dtype: of its weights; float32 where left out.

    Raises:
        WeightsMissing: the package was not fetched yet; the message says how.
        RuntimeError: the file is not the one that was pinned.
        ImportError: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise ImportError("transformers 5 or later is needed: pip install 'nondual[transformers]'") from None
    values, tensors = read_gguf(read(package, file), name=file)
    heads, kv_heads = values["llama.attention.head_count"], values["llama.attention.head_count_kv"]
    config = LlamaConfig(
        vocab_size=values["llama.vocab_size"],
        hidden_size=values["llama.embedding_length"],
        intermediate_size=values["llama.feed_forward_length"],
        num_hidden_layers=values["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=values["llama.context_length"],
        rms_norm_eps=values["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": values["llama.rope.freq_base"]},
        bos_token_id=values["tokenizer.ggml.bos_token_id"],
        eos_token_id=values["tokenizer.ggml.eos_token_id"],
        pad_token_id=values["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
    )
    state = from_gguf(tensors, heads, kv_heads)
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype or torch.float32)
    model.eval().to(device)  # pyright: ignore[reportArgumentType] transformers' decorator hides the signature
    return model, _tokenizer(values)


def from_gguf(tensors: dict[str, Tensor], heads: int, kv_heads: int) -> dict[str, Tensor]:
    """A Llama's tensors with llama.cpp's names and order of rows, in Hugging Face's names and order.

    The rotary embedding turns pairs of a head's rows: in llama.cpp neighbours (0 and 1, 2 and 3), in Hugging Face a row
    and the one half a head further on. So the rows of queries and keys are put into the latter order.

    Args:
        tensors: by name; those of queries and keys are (heads * width, E).
        heads: query heads.
        kv_heads: key and value heads.
    """
    theirs = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.": "model.layers.",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    renamed = {}
    for name, tensor in tensors.items():
        for part, count in ((".attn_q.", heads), (".attn_k.", kv_heads)):
            if part in name:
                tensor = reorder_pairs(tensor, count, "half")
        for our, their in theirs.items():
            name = name.replace(our, their)
        renamed[name] = tensor
    return renamed


def _tokenizer(values: dict[str, Any]) -> "PreTrainedTokenizerFast":
    """Byte-level BPE out of the file's vocabulary and merges; every digit is a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # of the kinds of token in GGUF: these steer the model and are no text
    kinds = values["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, kind in zip(tokens, kinds) if kind == control])
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {role: tokens[values[f"tokenizer.ggml.{name}_token_id"]] for role, name in roles.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=values["llama.context_length"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=values["tokenizer.chat_template"],
        **special,
    )
