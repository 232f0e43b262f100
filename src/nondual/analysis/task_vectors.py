"""Task vectors: take the vector that examples leave at one layer, and put it into a prompt without examples.

    vectors = states_at(model, ids, at)              # (layers, B, E): what each layer reads at one position
    scores_with(model, bare, end, 12, vectors[12])   # (B, V): the scores of a bare question, layer 12 reading that

The first prompt is some examples and a question; `at` is its last separator. The second prompt is another question
alone. If the answer to that is now of the examples' task, then the vector carries the task: everything else of the
examples is gone.

Source: Hendel et al. 2023 (2310.15916), section 3, where the question behind the examples is another than the one
asked, so that its answer cannot be carried over. Symbols: B rows, N tokens, E model width, V vocabulary.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nondual.language_models.causal import CausalLM


@torch.no_grad()
def states_at(model: CausalLM, ids: Int[Tensor, "b n"], at: Int[Tensor, " b"]) -> Float[Tensor, "layers b e"]:
    """The vector that each layer is about to read at one position of each row.

    Args:
        model: reads every row from its first token; padding belongs at the end.
        ids: (B, N).
        at: (B,), a position in each row.

    Returns:
        (layers, B, E): entry i is what layer i reads, the sum of the embedding and of what the layers before i added.

    Raises:
        TypeError: ids or at that are not Tensors.
        ValueError: a position that a row does not have.
    """
    rows = _rows(ids, at)
    found: list[Tensor] = []

    def keep(layer: int, x: Tensor) -> Tensor:
        found.append(x[rows, at])
        return x

    model.hidden(model.embeddings(ids), before=keep)
    return torch.stack(found)


@torch.no_grad()
def scores_with(
    model: CausalLM, ids: Int[Tensor, "b n"], at: Int[Tensor, " b"], layer: int, vectors: Float[Tensor, "#b e"]
) -> Float[Tensor, "b v"]:
    """The scores at one position of each row, where one layer reads other vectors there.

    Args:
        model: as in `states_at`.
        ids: (B, N).
        at: (B,), a position in each row: where the vectors are put, and where the scores are taken.
        layer: the layer that reads them; 0 is the first.
        vectors: (B, E) or (1, E), in place of what the layer would have read.

    Raises:
        TypeError: ids or at that are not Tensors.
        ValueError: a position or a layer that there is not; vectors of another shape.
    """
    rows = _rows(ids, at)
    if not 0 <= layer < len(model.layers):
        raise ValueError(f"layer must be 0 to {len(model.layers) - 1}, got {layer}")
    x = model.embeddings(ids)
    if vectors.ndim != 2 or vectors.shape[0] not in (1, len(ids)) or vectors.shape[1] != x.shape[-1]:
        raise ValueError(f"vectors must be (B, E) = {(len(ids), x.shape[-1])} or (1, E), got {tuple(vectors.shape)}")

    # --8<-- [start:put]
    def put(number: int, x: Tensor) -> Tensor:
        if number != layer:
            return x
        x = x.clone()
        x[rows, at] = vectors.to(x).expand(len(ids), -1)
        return x

    # --8<-- [end:put]
    return model.scores(model.hidden(x, before=put)[rows, at])


def _rows(ids: Tensor, at: Tensor) -> Tensor:
    """The numbers of the rows, once it is sure that each has its position."""
    for name, given in (("ids", ids), ("at", at)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(given).__name__}")
    if ids.ndim != 2 or at.shape != ids.shape[:1]:
        raise ValueError(f"ids must be (B, N) and at (B,), got {tuple(ids.shape)} and {tuple(at.shape)}")
    if len(at) and not (at.min() >= 0 and at.max() < ids.shape[1]):
        raise ValueError(f"at must lie in 0 to {ids.shape[1] - 1}, got {int(at.min())} to {int(at.max())}")
    return torch.arange(len(ids), device=ids.device)
