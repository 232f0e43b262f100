"""What heads look at in a run, and what each adds to the layer's output.

`weights_of` gives every head's map, `profile` says how far a map is that of a previous-token head, an induction head
and so on, `overlap` how much two heads' maps have in common, `head_contributions` what each head adds to the output.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; induction heads: Olsson et al. 2022
(2209.11895). Symbols: B batch, N positions, H heads, D head width, E model width.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from nondual.analysis.attention_layers import (
    AttentionLayer,
    attention_layer,
    attention_layers,
    uncompiled,
    weight_of,
)
from nondual.ops.autocast import autocast_off
from nondual.ops.checks import check_tensors
from nondual.ops.dtypes import at_least_float32
from nondual.self_attention import MultiHeadAttention


@torch.no_grad()
def weights_of(model: nn.Module, ids: Tensor, **inputs: Any) -> Float[Tensor, "layers b h n n"]:
    """Every head's attention weights in one forward pass, in evaluation mode and without gradients.

    A transformers model computes them by its eager attention for this call; afterwards it has its own again.

    Args:
        model: as in `nondual.analysis.attention_layers.attention_layers`.
        ids: what the model is called with: token ids (B, N), or vectors (B, N, E) for an Encoder.
        inputs: given to the model as they are: mask, reset, attention_mask.

    Returns:
        (layers, B, H, N, N), queries as rows, keys as columns.

    Raises:
        TypeError, ValueError: a model without heads of a known kind; an op that never forms the weights, such as flash
            attention without `otherwise`; layers whose weights differ in shape.
    """
    layers = attention_layers(model)
    check_tensors({"ids": ids})
    ours = all(isinstance(layer.module, MultiHeadAttention) for layer in layers)
    with _evaluating(model), uncompiled(model):
        weights = _ours(model, layers, ids, inputs) if ours else _theirs(model, ids, inputs)
    shapes = {tuple(rows.shape) for rows in weights}
    if len(shapes) > 1:
        raise ValueError(f"the layers' weights must be of one shape (B, H, N, N), got {sorted(shapes)}")
    return torch.stack(weights)


def profile(
    weights: Float[Tensor, "layers b h n n"],
    ids: Integer[Tensor, "b n"] | None = None,
    *,
    real: Bool[Tensor, "b n"] | None = None,
) -> dict[str, Float[Tensor, "layers h"]]:
    """How each head spreads its weight, as a mean over the queries of the batch.

        previous    weight on the position before the query
        next        weight on the position after it; 0 in a causal model
        same        weight on the query's own position
        first       weight on the first position
        distance    Σ_j a_ij |i - j|, in positions
        entropy     -Σ_j a_ij ln a_ij, in nats; ln n where the weight is even over n keys
        induction   weight on the positions that follow an earlier occurrence of the query's token; with `ids` alone

    A query counts where there is such a position. One that can reach a single key, as the first of a causal model, has
    no choice and counts nowhere.

    Args:
        weights: (layers, B, H, N, N), from `weights_of`.
        ids: (B, N), the tokens.
        real: True at the positions that are not padding.

    Returns:
        A Tensor (layers, H) for each name. NaN where no query counts.

    Raises:
        TypeError: an argument that is not a Tensor.
        ValueError: shapes that do not fit; ids in which no token comes twice.
    """
    _check_weights(weights)
    check_tensors({}, {"ids": ids, "real": real})
    _, batch, _, n, _ = weights.shape
    for name, given in (("ids", ids), ("real", real)):
        if given is not None and given.shape != (batch, n):
            raise ValueError(f"{name} must be (B, N) = {(batch, n)}, got {tuple(given.shape)}")
    device = weights.device
    real = torch.ones(batch, n, dtype=torch.bool, device=device) if real is None else real.to(device)
    counts = real & _has_choice(weights, real)  # (B, N), the queries that count
    at = torch.arange(n, device=device)
    gap = at[:, None] - at[None, :]  # query minus key
    keys = real[:, None, :]
    first = at == real.int().argmax(-1, keepdim=True)  # (B, N), the first real position
    # --8<-- [start:profile]
    # for each query the keys that are meant: (N, N) or (B, N, N)
    targets = {
        "previous": keys & (gap == 1),
        "next": keys & (gap == -1),
        "same": keys & (gap == 0),
        "first": first[:, None, :] & ~first[:, :, None],
    }
    # --8<-- [end:profile]
    if ids is not None:
        ids = ids.to(device)
        before = torch.nn.functional.pad(ids, (1, 0))[:, :n]  # the token before each key
        follows = (ids[:, :, None] == before[:, None, :]) & (gap >= 0)
        follows = follows & keys & torch.nn.functional.pad(real, (1, 0))[:, None, :n]
        if not (follows.any(-1) & counts).any():
            raise ValueError("ids must hold a token twice or more for the induction score, got none that does")
        targets["induction"] = follows
    found = {}
    for name, target in targets.items():
        on_target = (weights * target[None, :, None].to(weights)).sum(-1)
        found[name] = _mean(on_target, counts & target.any(-1))
    found["distance"] = _mean((weights * gap.abs()).sum(-1), counts)
    found["entropy"] = _mean(torch.special.entr(weights).sum(-1), counts)
    return found


def overlap(
    weights: Float[Tensor, "layers b h n n"], *, real: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, "layers h h"]:
    """How much of their weight two heads of a layer put on the same keys: Σ_j min(a_ij, b_ij), a mean over queries.

    It is 1 for equal maps and 0 for maps that share no key; 1 minus it is the total variation distance of the rows.
    Queries count as in `profile`.

    Args:
        weights: (layers, B, H, N, N), from `weights_of`.
        real: (B, N), True at the positions that are not padding.

    Returns:
        (layers, H, H), symmetric, with 1 on the diagonal. NaN where no query counts.

    Raises:
        TypeError, ValueError: an argument that is not a Tensor, or of a shape that does not fit.
    """
    _check_weights(weights)
    check_tensors({}, {"real": real})
    _, batch, n_heads, n, _ = weights.shape
    if real is not None and real.shape != (batch, n):
        raise ValueError(f"real must be (B, N) = {(batch, n)}, got {tuple(real.shape)}")
    real = torch.ones(batch, n, dtype=torch.bool, device=weights.device) if real is None else real.to(weights.device)
    counts = real & _has_choice(weights, real)
    # --8<-- [start:overlap]
    rows = []
    for head in range(n_heads):  # all pairs at once would need H times the memory
        # (layers, B, H, N): what each query gives to the same keys in both heads
        shared = torch.minimum(weights[:, :, head, None], weights).sum(-1)
        rows.append(_mean(shared, counts))
    return torch.stack(rows, 1)
    # --8<-- [end:overlap]


def head_contributions(
    attention: nn.Module | AttentionLayer, outputs: Float[Tensor, "b n h d"]
) -> Float[Tensor, "b n h e"]:
    """What each head adds to the layer's output: its own output times its rows of W_O.

    Their sum over the heads, plus the bias of W_O where it has one, is the output of the layer.

    Args:
        attention: the layer, as in `nondual.analysis.attention_layers.attention_layer`.
        outputs: (B, N, H, D), as `record_heads` gives them.

    Returns:
        (B, N, H, E), in the dtype of `outputs`, under autocast too.

    Raises:
        TypeError, ValueError: a layer of another kind, outputs of another shape.
    """
    layer = attention_layer(attention)
    check_tensors({"outputs": outputs})
    heads = (layer.n_heads, layer.d_head)
    if outputs.ndim != 4 or tuple(outputs.shape[2:]) != heads:
        raise ValueError(f"outputs must be (B, N, {heads[0]}, {heads[1]}), got {tuple(outputs.shape)}")
    with autocast_off(outputs.device.type):
        # --8<-- [start:head_contributions]
        w_o = weight_of(layer.output, "the output projection").unflatten(1, heads)  # (E, H, D)
        return torch.einsum("bnhd,ehd->bnhe", outputs, w_o.to(outputs.dtype))
        # --8<-- [end:head_contributions]


# --- how -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then for every module the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _ours(model: nn.Module, layers: list[AttentionLayer], ids: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
    """Each layer is asked for its weights, which are taken out of what it returns."""
    asked: dict[nn.Module, bool] = {}  # whether the caller has asked a layer for its weights too
    weights: list[Tensor] = []

    def ask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        asked[module] = bool(kwargs.get("return_weights"))
        return args, kwargs | {"return_weights": True}

    def take(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        weights.append(out[1])
        return out if asked[module] else out[0]

    handles = []
    try:
        for module in {layer.module for layer in layers}:
            handles.append(module.register_forward_pre_hook(ask, with_kwargs=True))
            handles.append(module.register_forward_hook(take, with_kwargs=True))
        model(ids, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return weights


def _theirs(model: Any, ids: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
    """A transformers model returns its weights itself, by its eager attention."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        weights = model(ids, output_attentions=True, **inputs).attentions
    finally:
        model.set_attn_implementation(before)
    if not weights or any(rows is None for rows in weights):
        raise ValueError(f"model must return its attention weights, got none from {type(model).__name__}")
    return list(weights)


def _check_weights(weights: Tensor) -> None:
    check_tensors({"weights": weights})
    if weights.ndim != 5 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"weights must be (layers, B, H, N, N), got {tuple(weights.shape)}")


def _has_choice(weights: Tensor, real: Tensor) -> Tensor:
    """The queries (B, N) that can reach more than one key: in a causal model, all but each row's first real one.

    Causal is what no head of any layer does otherwise: no weight at all on a later position.
    """
    reach = real.sum(-1, keepdim=True).expand_as(real)
    if not weights.triu(1).any():
        reach = real.cumsum(-1)
    return reach > 1


def _mean(each: Tensor, counts: Tensor) -> Tensor:
    """The mean (layers, H) of (layers, B, H, N) over the queries that count, (B, N)."""
    kept = torch.where(counts[None, :, None], at_least_float32(each), 0)
    return kept.sum((1, 3)) / counts.sum()
