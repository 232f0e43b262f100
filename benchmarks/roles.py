"""Do trained heads tell the one who asks from the one asked? The antisymmetric share of every head of four models.

A head's scores are x_i QK x_jᵀ. Of QK's squared norm the antisymmetric part has a share between 0, where two tokens
score each other equally, and 1. Nothing is trained and no text is read. The models:

    MiniLM     6 layers of 12 heads, which see both ways
    Whisper    4 layers of 6 in the encoder, which see both ways; 4 of 6 in the decoder, which see what came before
    SmolLM2    30 layers of 9, what came before; rotary positions, so that this is QK for two tokens at one place
    hama       4 layers of 4, which spell a word from its sounds: those both ways, what was written only backwards

Two controls for each head, each the mean of some draws: W_Q and W_K with random normal entries; and QK with its own
singular values between random orthonormal bases, which keeps how many directions matter and forgets which.

    nox -s bench -- roles
    nox -s bench -- roles --tiny    a small model with random weights, which writes nothing
"""

from collections.abc import Iterable
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.intervals import bootstrap
from benchmarks.record import write
from nondual.analysis import AttentionLayer, antisymmetric_share, attention_layers, qk_circuit
from nondual.self_attention import MultiHeadAttention

DRAWS = 8


def share_of(left: Tensor, right: Tensor) -> float:
    """The antisymmetric share of left (E, D) @ right (D, E)."""
    inner = right @ left
    size = ((left.T @ left) * (right @ right.T)).sum()
    return float((1 - (inner * inner.T).sum() / size) / 2)


def controls(layer: AttentionLayer, head: int, generator: torch.Generator) -> dict[str, float]:
    """What this head would have by chance, in two ways."""
    d = layer.d_head
    qk = qk_circuit(layer, head).detach().double()
    e, values = len(qk), torch.linalg.svdvals(qk)[:d]
    entries, bases = [], []
    for _ in range(DRAWS):
        left, right = (torch.randn(e, d, generator=generator, dtype=torch.float64) for _ in range(2))
        entries.append(share_of(left, right.T))
        bases.append(share_of(torch.linalg.qr(left)[0] * values, torch.linalg.qr(right)[0].T))
    return {"random entries": mean(entries), "random bases": mean(bases)}


def measure(layers: Iterable[AttentionLayer | nn.Module], seed: int = 0) -> dict[str, Any]:
    """The shares of all heads of some layers, (layers, H), with the controls and the interval of the mean."""
    generator = torch.Generator().manual_seed(seed)
    found = [attention_layers(each)[0] if isinstance(each, nn.Module) else each for each in layers]
    shares = [[antisymmetric_share(layer, head) for head in range(layer.n_heads)] for layer in found]
    chance = [[controls(layer, head, generator) for head in range(layer.n_heads)] for layer in found]
    flat = [each for row in shares for each in row]
    less = [share - each["random bases"] for row, others in zip(shares, chance) for share, each in zip(row, others)]
    middle, low, high = bootstrap(torch.tensor(less))
    return {
        "heads": len(flat),
        "shares": [[round(each, 4) for each in row] for row in shares],
        "mean": round(mean(flat), 4),
        "least": round(min(flat), 4),
        "greatest": round(max(flat), 4),
        "below a quarter": sum(each < 0.25 for each in flat),
        "random entries": round(mean(each["random entries"] for row in chance for each in row), 4),
        "random bases": round(mean(each["random bases"] for row in chance for each in row), 4),
        "less than random bases": {"mean": round(middle, 4), "interval": [round(low, 4), round(high, 4)]},
    }


def models() -> dict[str, list[AttentionLayer | nn.Module]]:
    """The self-attention layers by name, as they see: both ways, or what came before."""
    from nondual.pretrained import minilm, our_smollm2, whisper
    from nondual.pretrained.hama_p2g import hama_p2g

    def own(model: nn.Module) -> list[AttentionLayer | nn.Module]:
        """Without the layers that read another sequence."""
        named = [(name, each) for name, each in model.named_modules() if isinstance(each, MultiHeadAttention)]
        return [each for name, each in named if not name.endswith("cross")]

    spoken = whisper().model
    return {
        "MiniLM": own(minilm().model),
        "Whisper, encoder": own(spoken.encoder),
        "Whisper, decoder": own(spoken.decoder),
        "SmolLM2": own(our_smollm2()[0]),
        "hama": own(hama_p2g().model),
    }


def main(options: list[str]) -> None:
    torch.set_num_threads(1)
    if "--tiny" in options:
        torch.manual_seed(0)
        print(measure([MultiHeadAttention(24, 3) for _ in range(2)]))
        return
    figures = {name: measure(layers) for name, layers in models().items()}
    for name, each in figures.items():
        print(name, each["heads"], each["mean"], each["less than random bases"])
    write("roles", "nox -s bench -- roles", figures)
