"""Do trained heads tell the one who asks from the one asked? The antisymmetric share of every head of four models.

A head's scores are x_i QK x_jᵀ. Of QK's squared norm the antisymmetric part has a share between 0, where two tokens
score each other equally, and 1. The models:

    MiniLM     6 layers of 12 heads, which see both ways
    Whisper    4 layers of 6 in the encoder, which see both ways; 4 of 6 in the decoder, which see what came before
    SmolLM2    30 layers of 9, in groups of 3 with one key each; what came before; rotary positions
    hama       4 layers of 4, which spell a word from its sounds: those both ways, what was written only backwards

Two measures:

    shares     of QK itself, from the weights alone
    as read    of the scores between vectors that the layer reads in a text or a sound, less their mean, all pairs of
               two. This counts a direction by how much tokens differ along it, and the gains of norms are in it. Where
               too few tokens are read (Whisper's decoder) it is left out.

Biases are in neither, and need not be: what one adds to a score depends on the key alone or on the query alone. The
softmax of a row does not see what is added to all of it, so a symmetric score can do the same. For the same reason the
mean vector is taken off in the second measure.

With rotary positions the circuit of a query and a key r places apart is QK_r = W_Q R_r W_Kᵀ, and the other way round
QK_-r. Two tokens at two places score each other equally where QK_r is the transpose of QK_-r; the share at a distance
is |QK_r - QK_-rᵀ|² / 2 (|QK_r|² + |QK_-r|²), which is the plain one at r = 0. It is measured at some distances.

Two controls, some draws for each head: W_Q and W_K with random normal entries; and QK with its own singular values
between random orthonormal bases, which keeps how many directions matter and forgets which. Both have (1 - 1/E) / 2 in
the mean. For a single head: whether it lies below or above all draws of the second control. Intervals are 95 %, by
Student's t over layers, since heads of one layer read the same vectors, and those of one group the same keys.

    nox -s bench -- roles
    nox -s bench -- roles --tiny    a small model with random weights, which writes nothing
"""

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor, nn

from benchmarks.record import write
from nondual.analysis import AttentionLayer, attention_layers
from nondual.analysis.attention_layers import weight_of
from nondual.relative_positions import Rotary
from nondual.self_attention import MultiHeadAttention

DRAWS, DISTANCES = 19, (1, 4, 16, 64)


class Model(NamedTuple):
    """Some layers of self-attention, and what has them read something.

    Attributes:
        layers: the layers.
        read: has them read; None where they would read too little.
        moments: only so many of the first vectors count, where silence follows a sound; all where None.
    """

    layers: Sequence[nn.Module]
    read: Callable[[], Any] | None = None
    moments: int | None = None


# --- one head ------------------------------------------------------------------------------------------------------


def share_of(queries: Tensor, keys: Tensor, turn: Tensor | None = None, *, of_two: bool = False) -> float:
    """How much of queries · turn · keysᵀ a pair does not have both ways.

    Args:
        queries: (E, D), W_Q; or (N, D), the queries of N vectors.
        keys: (E, D) or (N, D), likewise.
        turn: (D, D), what rotary positions do at a distance; nothing where left out.
        of_two: whether the pair of a vector with itself is left out.
    """
    turn = torch.eye(keys.shape[1], dtype=keys.dtype) if turn is None else turn
    there, back = queries @ turn, queries @ turn.T
    mutual = float(((keys.T @ back) * (keys.T @ there).T).sum())  # Σ_ij s_ij s'_ji
    size = sum(float(((q.T @ q) * (keys.T @ keys)).sum()) for q in (there, back)) / 2
    if of_two:
        one, other = ((q * keys).sum(1) for q in (there, back))
        mutual -= float((one * other).sum())
        size -= float((one.square() + other.square()).sum()) / 2
    return (1 - mutual / size) / 2


def random_bases(query: Tensor, key: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two (E, D) whose product has the singular values of query keyᵀ, between random orthonormal bases."""
    values = torch.linalg.svdvals(torch.linalg.qr(query)[1] @ torch.linalg.qr(key)[1].T)
    left, right = (torch.randn(query.shape, generator=generator, dtype=query.dtype) for _ in range(2))
    return torch.linalg.qr(left)[0] * values, torch.linalg.qr(right)[0]


def weights_of(layer: AttentionLayer, head: int) -> tuple[Tensor, Tensor]:
    """W_Q and W_K of one head, (E, D) each, in float64; the key is that of its group."""
    group = head * layer.n_kv_heads // layer.n_heads
    query = weight_of(layer.query, "the query projection").unflatten(0, (layer.n_heads, layer.d_head))[head]
    key = weight_of(layer.key, "the key projection").unflatten(0, (layer.n_kv_heads, layer.d_head))[group]
    return query.detach().double().T, key.detach().double().T


def turn_at(layer: AttentionLayer, distance: int) -> Tensor | None:
    """What the layer's rotary positions do to a query that stands so many places after its key, (D, D)."""
    positions = getattr(layer.module, "positions", None)
    if not isinstance(positions, Rotary):
        return None
    one = torch.eye(layer.d_head, dtype=torch.float64)[:, None, None]
    return positions.turn(one, distance)[:, 0, 0]


# --- a model -------------------------------------------------------------------------------------------------------


def vectors(model: Model) -> list[Tensor] | None:
    """What each layer reads, (N, E), less the mean."""
    if model.read is None:
        return None
    seen: list[list[Tensor]] = [[] for _ in model.layers]
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, into=into: into.append(given[0].detach().flatten(0, -2)))
        for layer, into in zip(model.layers, seen)
    ]
    with torch.no_grad():
        model.read()
    for hook in hooks:
        hook.remove()
    read = [torch.cat(each)[: model.moments].double() for each in seen]
    return [x - x.mean(0) for x in read]


def summary(shares: list[list[float]], draws: list[list[list[float]]]) -> dict[str, Any]:
    """What is kept of a measure: of every head (layers, H), of its control (layers, H, DRAWS), and of all."""
    flat, chance = [x for row in shares for x in row], [x for row in draws for x in row]
    less = [
        mean(share - mean(each) for share, each in zip(row, others)) for row, others in zip(shares, draws, strict=True)
    ]
    half = float(student.ppf(0.975, len(less) - 1)) * stdev(less) / len(less) ** 0.5
    return {
        "shares": [[round(each, 4) for each in row] for row in shares],
        "mean": round(mean(flat), 4),
        "least": round(min(flat), 4),
        "greatest": round(max(flat), 4),
        "random bases": round(mean(mean(each) for each in chance), 4),
        "below all draws": sum(share < min(each) for share, each in zip(flat, chance)),
        "above all draws": sum(share > max(each) for share, each in zip(flat, chance)),
        "less than random bases": {
            "mean": round(mean(less), 4),
            "interval": [round(mean(less) - half, 4), round(mean(less) + half, 4)],
        },
    }


def measure(model: Model, seed: int = 0) -> dict[str, Any]:
    """Both measures of all heads of some layers, with the controls; the first at distances too, where they count."""
    generator = torch.Generator().manual_seed(seed)
    layers = [attention_layers(each)[0] for each in model.layers]
    read = vectors(model)
    shares, draws, entries, seen, seen_draws = [], [], [], [], []
    far: dict[int, list[float]] = {r: [] for r in DISTANCES} if turn_at(layers[0], 0) is not None else {}
    for i, layer in enumerate(layers):
        rows = [weights_of(layer, head) for head in range(layer.n_heads)]
        bases = [[random_bases(*row, generator) for _ in range(DRAWS)] for row in rows]
        shares.append([share_of(*row) for row in rows])
        draws.append([[share_of(*one) for one in of_head] for of_head in bases])
        entries += [share_of(*torch.randn(2, *q.shape, generator=generator, dtype=q.dtype)) for q, _ in rows]
        for r in far:
            far[r] += [share_of(*row, turn_at(layer, r)) for row in rows]
        if read is not None:
            x = read[i]
            seen.append([share_of(x @ q, x @ k, of_two=True) for q, k in rows])
            seen_draws.append([[share_of(x @ q, x @ k, of_two=True) for q, k in of_head] for of_head in bases])
    found = {"heads": sum(map(len, shares)), "random entries": round(mean(entries), 4), **summary(shares, draws)}
    if far:
        found["at distances"] = {str(r): round(mean(each), 4) for r, each in far.items()}
    if read is not None:
        found["as read"] = {"tokens": len(read[0]), **summary(seen, seen_draws)}
    return found


def models() -> dict[str, Model]:
    """The self-attention layers by name, and what they read."""
    from nondual.data import speech
    from nondual.data.alice import ALICE
    from nondual.pretrained import hama, minilm, our_smollm2, whisper
    from nondual.pretrained.hama_p2g import hama_p2g

    def own(model: nn.Module) -> list[nn.Module]:
        """Without the layers that read another sequence."""
        named = [(name, each) for name, each in model.named_modules() if isinstance(each, MultiHeadAttention)]
        return [each for name, each in named if not name.endswith("cross")]

    paragraphs = ALICE.strip().split("\n\n")
    sounds = {word.strip(".,:;?!()“”’—").lower() for word in ALICE.replace("-", " ").split()}
    encoder, spoken, speller, says = minilm(), whisper(), hama_p2g(), hama()
    language, tokenizer = our_smollm2()
    sound = speech()  # the encoder makes one vector of 320 samples
    return {
        "MiniLM": Model(own(encoder.model), lambda: [encoder.encode([text]) for text in paragraphs]),
        "Whisper, encoder": Model(own(spoken.model.encoder), lambda: spoken.transcribe(sound), len(sound) // 320),
        "Whisper, decoder": Model(own(spoken.model.decoder)),
        "SmolLM2": Model(
            own(language), lambda: [language(torch.tensor([tokenizer(text)["input_ids"]])) for text in paragraphs]
        ),
        "hama": Model(
            own(speller.model),
            lambda: [speller.write(says.spell(word)[0]) for word in sorted(sounds) if word.isalpha()],
        ),
    }


def main(options: list[str]) -> None:
    torch.set_num_threads(1)
    if "--tiny" in options:
        torch.manual_seed(0)
        layers = [MultiHeadAttention(24, 3) for _ in range(2)]
        print(measure(Model(layers, lambda: [layer(torch.randn(2, 9, 24)) for layer in layers])))
        return
    figures = {name: measure(model) for name, model in models().items()}
    for name, each in figures.items():
        for way in (each, each.get("as read", {})):
            print(name, {key: value for key, value in way.items() if key not in ("shares", "as read")})
    write("roles", "nox -s bench -- roles", figures)
