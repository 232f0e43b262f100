"""Small untrained models in place of those that benchmarks/assignments.py reads: all its code runs in seconds."""

from typing import Any

import torch

from benchmarks.assignments import TEXTS, Bench
from benchmarks.assignments_smollm2 import Reader
from nondual.feed_forward import GatedFeedForward
from nondual.language_models.causal import CausalLM
from nondual.language_models.mamba import MambaLM
from nondual.relative_positions import Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import TextEncoder
from nondual.transformer_layer import TransformerLayer

VOCABULARY, HEADS, GROUPS, WIDTH, LAYERS = 256, 6, 3, 4, 3


class Bytes:
    """A tokenizer with a token for each byte."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def language_model() -> CausalLM:
    """A Llama in the small: rotary positions, grouped keys and values, gated feed-forward networks."""
    d_model = HEADS * WIDTH

    def layer(_: int) -> TransformerLayer:
        mixer = MultiHeadAttention(d_model, HEADS, n_kv_heads=GROUPS, bias=False, causal=True, positions=Rotary(WIDTH))
        return TransformerLayer(mixer, GatedFeedForward(d_model, 10), d_model, norm_first=True, norm=torch.nn.RMSNorm)

    return CausalLM(VOCABULARY, d_model, LAYERS, layer=layer).eval()


def tiny_bench() -> tuple[Bench, dict[str, Any], tuple[str, ...], tuple[int, ...]]:
    """A bench of such models, its parts, one task and two draws."""
    torch.manual_seed(0)
    model = language_model()
    ids = torch.randint(VOCABULARY, (2, 11))
    rows = {name: (Reader(model, torch.randint(VOCABULARY, (3, 10))), 5) for name in TEXTS}
    sentences = [(torch.randint(50, (7,)).tolist(), [1, 2, 4, 5]) for _ in range(3)]
    made = {
        "smollm2": (model, Bytes()),
        "text": Reader(model, ids),
        "rows": rows,
        "sentences": (TextEncoder(50, 70, 12, 3, 10, 2).eval(), sentences),
        "mamba": (MambaLM(17, 6, 2).eval(), torch.randint(17, (3, 20)), 0),
        "sizes": {"upper": 2, "steps": 2},
    }
    parts = {
        "powers": range(LAYERS),
        "doors": range(LAYERS),
        "positions": range(len(sentences)),
        "tables": TEXTS,
        "state": ("pulse", "rest"),
    }
    return Bench(made), parts, ("capital",), (1, 2)
