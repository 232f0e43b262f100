"""What a head reads and writes, from its parameters alone.

A head reads by one matrix and writes by another. With rows x_i of the layer's input,

    score_ij = x_i QK x_jᵀ / √D     QK = W_Q W_Kᵀ     (E, E), of rank D or less
    out_i    = Σ_j a_ij x_j OV      OV = W_V W_O      (E, E), of rank D or less

Biases are left out, and so is what a positional encoding does to queries and keys: with rotary positions QK is the
circuit for two tokens at the same place.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". Symbols: H heads, D head width, E model
width.
"""

from jaxtyping import Float
from torch import Tensor, nn

from nondual.analysis.attention_layers import AttentionLayer, attention_layer, weight_of
from nondual.ops.autocast import autocast_off


def qk_circuit(attention: nn.Module | AttentionLayer, head: int) -> Float[Tensor, "e e"]:
    """W_Q W_Kᵀ of one head: without biases and positions, the score of token i for token j is x_i QK x_jᵀ / √D.

    Args:
        attention: the layer, as in `nondual.analysis.attention_layers.attention_layer`.
        head: a query head; where heads share keys, the key is that of its group.

    Returns:
        (E, E), rows for the query's token; (E, E of the memory) in cross-attention. In the dtype of the weights, under
        autocast too.

    Raises:
        TypeError: a layer of another kind, or projections that are not plain linear layers.
        ValueError: a head that there is not.
    """
    # --8<-- [start:qk_circuit]
    query, key = _reads(attention, head)  # W_Q and W_K of this head, (E, D) each
    with autocast_off(query.device.type):
        return query @ key.T
    # --8<-- [end:qk_circuit]


def ov_circuit(attention: nn.Module | AttentionLayer, head: int) -> Float[Tensor, "e e"]:
    """W_V W_O of one head: what a token x_j that is looked at fully adds to the output, x_j OV.

    Args:
        attention: as in `qk_circuit`.
        head: a query head; where heads share values, the value is that of its group.

    Returns:
        (E, E), rows for the token that is looked at; in the dtype of the weights, under autocast too.

    Raises:
        TypeError, ValueError: as in `qk_circuit`.
    """
    # --8<-- [start:ov_circuit]
    value, output = _writes(attention, head)  # W_V (E, D) and W_O (D, E) of this head
    with autocast_off(value.device.type):
        return value @ output
    # --8<-- [end:ov_circuit]


def composition_score(
    earlier: tuple[nn.Module | AttentionLayer, int], later: tuple[nn.Module | AttentionLayer, int]
) -> dict[str, float]:
    """How strongly a later head reads what an earlier one writes, from their parameters alone.

    Each score is the norm of a product of circuits over the product of their norms (Frobenius), between 0 and 1:

        q    |OV₁ QK₂|  / |OV₁| |QK₂|       the later head's queries read it
        k    |QK₂ OV₁ᵀ| / |QK₂| |OV₁|       its keys do
        v    |OV₁ OV₂|  / |OV₁| |OV₂|       its values do

    "random" is what two unrelated heads would have: 1/√E, the root mean square of each score over random rotations
    between the two. The paper ("Three Kinds of Composition") compares with random matrices, which score about as much.
    Layer norms between the heads are left out, as are biases and positions.

    Args:
        earlier: (attention, head), of an earlier layer.
        later: (attention, head), of a later layer of the same width.

    Returns:
        The scores "q", "k" and "v", and "random".

    Raises:
        TypeError, ValueError: as in `qk_circuit`; layers of different widths; a head of zeros.
    """
    read = (*_reads(*later), *_writes(*later), *_writes(*earlier))
    query, key, value_b, output_b, value_a, output_a = (x.detach().double() for x in read)
    if not output_a.shape[1] == len(query) == len(key) == len(value_b):
        raise ValueError(
            f"both layers must have one width E, got {output_a.shape[1]} written and {len(query)}, {len(key)}, "
            f"{len(value_b)} read"
        )
    ov, qk, ov_b = _norm(value_a, output_a), _norm(query, key.T), _norm(value_b, output_b)
    if not ov * qk * ov_b > 0:
        raise ValueError("composition needs circuits that are not zero, got a norm of 0")
    return {
        "q": float(_norm(value_a, (output_a @ query) @ key.T) / (ov * qk)),
        "k": float(_norm(query, (key.T @ output_a.T) @ value_a.T) / (qk * ov)),
        "v": float(_norm(value_a, (output_a @ value_b) @ output_b) / (ov * ov_b)),
        "random": len(query) ** -0.5,
    }


def antisymmetric_share(attention: nn.Module | AttentionLayer, head: int) -> float:
    """|A|² / |QK|², where A = (QK - QKᵀ) / 2: how much of a head's reading tells the one who asks from the one asked.

    0 is a symmetric circuit, under which two tokens score each other equally; 1 an antisymmetric one, under which each
    scores the other as much above 0 as it is scored below. Two unrelated matrices W_Q and W_K give ½ on average.
    Norms are Frobenius norms; biases and positions are left out, as in `qk_circuit`.

    Args:
        attention: as in `qk_circuit`, of self-attention.
        head: a query head; where heads share keys, the key is that of its group.

    Raises:
        TypeError, ValueError: as in `qk_circuit`; cross-attention from another width; a head of zeros.

    Source: Saponati et al. 2025 (2502.10927), section 3, whose symmetry score is 1 - 2 · this.
    """
    query, key = _reads(attention, head)
    if len(query) != len(key):
        raise ValueError(f"queries and keys must be of one width, got {len(query)} and {len(key)}: cross-attention")
    size = float(_norm(query, key.T)) ** 2
    if not size > 0:
        raise ValueError("head must have a circuit that is not zero, got a norm of 0")
    # --8<-- [start:antisymmetric_share]
    inner = key.detach().double().T @ query.detach().double()  # (D, D); tr(QK QK) = tr(inner inner)
    share = (1 - float((inner * inner.T).sum()) / size) / 2  # |A|² = (|QK|² - tr(QK QK)) / 2
    # --8<-- [end:antisymmetric_share]
    return min(max(share, 0.0), 1.0)


def _reads(attention: nn.Module | AttentionLayer, head: int) -> tuple[Tensor, Tensor]:
    """W_Q and W_K of one head, (E, D) each."""
    layer = attention_layer(attention)
    layer.check_head(head)
    query = weight_of(layer.query, "the query projection")  # (H D, E), as nn.Linear has it
    key = weight_of(layer.key, "the key projection")  # (G D, E)
    group = head * layer.n_kv_heads // layer.n_heads
    query = query.unflatten(0, (layer.n_heads, layer.d_head))[head]
    return query.T, key.unflatten(0, (layer.n_kv_heads, layer.d_head))[group].T


def _writes(attention: nn.Module | AttentionLayer, head: int) -> tuple[Tensor, Tensor]:
    """W_V (E, D) and W_O (D, E) of one head."""
    layer = attention_layer(attention)
    layer.check_head(head)
    value = weight_of(layer.value, "the value projection")  # (G D, E)
    output = weight_of(layer.output, "the output projection")  # (E, H D)
    group = head * layer.n_kv_heads // layer.n_heads
    value = value.unflatten(0, (layer.n_kv_heads, layer.d_head))[group]
    return value.T, output.unflatten(1, (layer.n_heads, layer.d_head))[:, head].T


def _norm(left: Tensor, right: Tensor) -> Tensor:
    """The Frobenius norm of left (E, D) @ right (D, E), which is never formed: |L R|² = tr(LᵀL R Rᵀ)."""
    left, right = left.detach().double(), right.detach().double()
    return ((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt()
