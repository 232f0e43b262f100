"""LLaVA: the vectors of an image take the place of tokens in a language model's input, through a small projector.

    images -> vision -> projector -> S vectors of width E ┐
    text   -> embeddings ────────────────────────────────┴─ the  ▒ ▒ ▒ ▒  is  a  cat  -> language model -> scores

Each image stands in the text as one mark; the model reads S vectors there, and gives one row of scores for it, that
after the last of them. So ids, labels and scores have the same places.

    model = Llava(PatchFeatures(load_clip(folder).image_tower), language_model, Projector(1024, 4096), mark=-200,
                  d_vision=1024)
    model.loss(ids, images, labels).backward()         # of the projector alone: stage 1
    model.freeze("vision")                             # the language model is trained too: stage 2

Sources: Liu et al. 2023 (2304.08485), section 4; the projector of two layers, Liu et al. 2023b (2310.03744), section 3.
Symbols: ids (B, N), I images in all, S vectors each of width D, E width of the language model, M positions that it
reads.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nondual.language_models.causal import CausalLM
from nondual.multimodal.image_marks import image_vectors
from nondual.multimodal.image_text import ImageTextModel
from nondual.multimodal.towers import VisionTower
from nondual.token_ids import has_values


class Projector(nn.Module):
    """From the width of the images to that of the text: one linear layer (LLaVA), or two with GELU between (1.5).

    Args:
        d_vision: width D.
        d_model: width E.
        layers: 1 or 2.
        bias: whether they have one.
        activation: what stands between two.

    Raises:
        ValueError: another number of layers.
    """

    linear1: nn.Linear
    linear2: nn.Linear | None
    activation: Callable[[Tensor], Tensor]

    def __init__(
        self,
        d_vision: int,
        d_model: int,
        *,
        layers: int = 2,
        bias: bool = True,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ):
        super().__init__()
        if layers not in (1, 2):
            raise ValueError(f"layers must be 1 or 2, got {layers}")
        self.linear1 = nn.Linear(d_vision, d_model, bias=bias)
        self.linear2 = nn.Linear(d_model, d_model, bias=bias) if layers == 2 else None
        self.activation = activation

    def forward(self, x: Float[Tensor, "i s d"]) -> Float[Tensor, "i s e"]:
        """(I, S, D) -> (I, S, E)."""
        # --8<-- [start:projector]
        x = self.linear1(x)
        return x if self.linear2 is None else self.linear2(self.activation(x))
        # --8<-- [end:projector]

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor) -> Tensor: ...


class PatchFeatures(nn.Module):
    """What a layer of a CLIP tower gives for each patch: images (I, C, H, W) -> (I, S, D).

    The layers after it are not run, nor the last norm.

    Args:
        tower: the image tower of a `CLIP`.
        layer: how many of its layers are run, from the end where negative: -1 for all of them, -2 for all but one, as
            in LLaVA. Several: their vectors side by side, D times as many numbers.
        select: "default" leaves the class token out, "full" keeps it.

    Raises:
        ValueError: a layer that the tower does not have, another select, or "default" for a tower without class token.
    """

    tower: VisionTower
    layers: tuple[int, ...]
    select: str

    def __init__(
        self,
        tower: VisionTower,
        layer: int | Sequence[int] = -2,
        *,
        select: Literal["default", "full"] = "default",
    ):
        super().__init__()
        count = len(tower.encoder.layers)
        given = (layer,) if isinstance(layer, int) else tuple(layer)
        if not given or not all(-count - 1 <= one <= count for one in given):
            raise ValueError(f"layer must be {-count - 1} to {count}, for a tower of {count} layers, got {layer}")
        if select not in ("default", "full"):
            raise ValueError(f"select must be 'default' or 'full', got {select!r:.100}")
        if select == "default" and tower.class_token is None:
            raise ValueError("select must be 'full' for a tower without a class token, got 'default'")
        self.tower, self.select = tower, select
        self.layers = tuple(one if one >= 0 else count + 1 + one for one in given)

    def forward(self, images: Float[Tensor, "i c h w"]) -> Float[Tensor, "i s d"]:
        """images (I, C, H, W) -> (I, S, D).

        Raises:
            TypeError, ValueError: as `VisionTower.features`.
        """
        states = [self.tower.embed(images)]
        for layer in list(self.tower.encoder.layers)[: max(self.layers)]:
            states.append(layer(states[-1]))
        first = 1 if self.select == "default" else 0
        return torch.cat([states[i][:, first:] for i in self.layers], -1)

    def extra_repr(self) -> str:
        """Which layers, and whether the class token is kept."""
        return f"layers={list(self.layers)}, select={self.select!r}"

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, images: Tensor) -> Tensor: ...


# --8<-- [start:places]
def places(
    marked: Bool[Tensor, "b n"], n_vectors: int, length: int
) -> tuple[Int[Tensor, "b m"], Int[Tensor, "b n"], Int[Tensor, " b"]]:
    """Where everything goes when each mark becomes S vectors.

    Rows have M positions; shorter ones are filled on the left.

        ids       the  *  is          S = 3
                  how  is  it
        positions  the ▒ ▒ ▒ is       M = 5
                   ·  ·  how is it

    Args:
        marked: (B, N), True where an image stands.
        n_vectors: S.
        length: M, that of the longest row.

    Returns:
        source (B, M): which of the B N embeddings, followed by the I S vectors of the
        images, each position is; end (B, N): the position of each id, of a mark that of
        its last vector; and how many positions each row is filled with (B,).
    """
    (batch, n), device = marked.shape, marked.device
    width = torch.where(marked, n_vectors, 1)
    end = width.cumsum(1)  # of each id, if its row were not filled
    fill = length - end[:, -1]
    # (B, M), below 0 where filled
    at = torch.arange(length, device=device) - fill[:, None]
    which = torch.searchsorted(end, at, right=True)  # the id of each position
    step = at - (end - width).gather(1, which)  # how far into it
    # the number of the image, if it is one
    image = (marked.flatten().cumsum(0) - 1).view(batch, n).gather(1, which)
    row = torch.arange(batch, device=device)[:, None] * n
    of_image = batch * n + image * n_vectors + step
    source = torch.where(marked.gather(1, which), of_image, row + which)
    return torch.where(at < 0, row, source), end + fill[:, None] - 1, fill


# --8<-- [end:places]


class PositionsRead:
    """How many positions the language model has read, images expanded.

    Attributes:
        length: the number.
    """

    length: int

    def __init__(self, length: int = 0):
        self.length = length

    def select(self, rows: Int[Tensor, " r"]) -> "PositionsRead":
        """The same for any rows of the batch: all have read as many."""
        return PositionsRead(self.length)


class Llava(ImageTextModel):
    """A vision tower and a language model, frozen at first, joined by a projector.

    Rows with different numbers of images are filled on the left inside, and a reset tells the language model so: its
    layers must take one. A later call with the same cache needs as many images in each row.

    Args:
        vision: images (I, …) -> vectors (I, S, d_vision), such as `PatchFeatures`; nn.Identity for vectors that were
            computed before.
        language_model: any `CausalLM`.
        projector: (I, S, d_vision) -> (I, S, E), such as a `Projector`.
        mark: what stands for an image among the ids: any number, since no token is read there. Its embedding is not.
        d_vision: width D of what vision gives.

    Raises:
        TypeError: a language_model that is not a CausalLM.
        ValueError: a d_vision below 1.
    """

    projector: nn.Module

    _mark_is_a_token = False

    def __init__(self, vision: nn.Module, language_model: CausalLM, projector: nn.Module, *, mark: int, d_vision: int):
        super().__init__(vision, language_model, mark, d_vision)
        self.projector = projector
        self.freeze("vision", "language_model")

    def tokens(self, images: Float[Tensor, "i ..."]) -> Float[Tensor, "i s e"]:
        """Images (I, …) -> what the language model reads in place of each mark, (I, S, E).

        Raises:
            TypeError, ValueError: what vision refuses or gives; a projector that gives another shape.
        """
        x = image_vectors(self.vision, images, self.d_vision)
        projected = self.projector(x)
        expected = (*x.shape[:2], self.language_model.d_model)
        if tuple(projected.shape) != expected:
            raise ValueError(f"projector must give (I, S, E) = {expected}, got {tuple(projected.shape)}")
        return projected

    def _hidden(
        self, ids: Tensor, marked: Tensor, images: Tensor | None, cache: list[Any] | None, reset: Tensor | None
    ) -> Tensor:
        model = self.language_model
        read = PositionsRead() if cache is None else cache[-1]
        given = None if cache is None else list(cache[:-1])
        x = model.embeddings(ids)
        end: Tensor | None = None
        if images is not None and len(images):
            vectors = self.tokens(images).to(x.dtype)  # (I, S, E)
            # --8<-- [start:splice]
            length = _longest(marked, vectors.shape[0], vectors.shape[1])
            remedy = "shorten the text, or use fewer images"
            model.check_longest(read.length + length, "ids with their images", remedy)
            source, end, fill = places(marked, vectors.shape[1], length)
            x = torch.cat([x.flatten(0, 1), vectors.flatten(0, 1)])[source]  # (B, M, E)
            # --8<-- [end:splice]
            reset = _moved(reset, end, marked, vectors.shape[1], fill, length, read.length)
        hidden = model.hidden(x, cache=given, reset=reset)
        read.length += x.shape[1]
        return hidden if end is None else hidden.gather(1, end[..., None].expand(-1, -1, hidden.shape[-1]))

    def _longest(self, marked: Tensor, images: Tensor | None) -> int:
        if images is None or not len(images):
            return marked.shape[1]
        return _longest(marked, len(images), self.tokens(images[:1]).shape[1])

    def _own_cache(self, batch: int) -> PositionsRead:
        return PositionsRead()


def _longest(marked: Tensor, n_images: int, n_vectors: int) -> int:
    """M: how many positions the row with most images has; where values cannot be looked at, all have as many."""
    batch, n = marked.shape
    most = int(marked.sum(1).max()) if has_values(marked) else n_images // batch
    return n + most * (n_vectors - 1)


def _moved(
    reset: Tensor | None, end: Tensor, marked: Tensor, n_vectors: int, fill: Tensor, length: int, read: int
) -> Tensor | None:
    """The reset of the positions, True also where a row that was filled on the left begins."""
    filled = has_values(fill) and bool(fill.any())
    if filled and read:
        raise ValueError(
            "images must be as many in each row when a cache has been read before: "
            "the rows would no longer end at the same position"
        )
    if reset is None and not filled:
        return None
    moved = torch.zeros(len(end), length, dtype=torch.bool, device=end.device)
    if reset is not None:
        begin = end - torch.where(marked, n_vectors - 1, 0)
        moved = moved.scatter(1, begin, reset)
    if filled:
        moved |= (torch.arange(length, device=end.device) == fill[:, None]) & (fill[:, None] > 0)
    return moved
