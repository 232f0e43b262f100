"""Flamingo: a frozen language model with gated layers between its own, which attend to images.

    images -> vision -> PerceiverResampler -> R tokens an image ─┐ keys and values
    text   -> embeddings -> [gated cross-attention -> frozen layer] -> … -> scores

A text token attends to the last image before it alone. Every gate starts at 0, where the whole is the language model
that it was made of, to the bit.

    model = Flamingo(vision, our_smollm2()[0], PerceiverResampler(64, 4), mark=7, d_vision=64, every=3)
    adam = optimiser(model, 1e-3)              # of the resampler and the gated layers: the rest is frozen
    model.loss(ids, images, labels).backward()

Source: Alayrac et al. 2022 (2204.14198), sections 2.1 to 2.3, figures 3, 4 and 7. Symbols: ids (B, N), x (B, N, E), I
images in all, at most J in a row, R tokens each of width D.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nondual.kv_cache import ProjectedMemory
from nondual.language_models.causal import CausalLM
from nondual.multimodal.image_marks import image_vectors
from nondual.multimodal.image_text import ImageTextModel
from nondual.multimodal.perceiver import PerceiverResampler as PerceiverResampler
from nondual.multimodal.perceiver import UnbiasedFeedForward
from nondual.self_attention import MultiHeadAttention
from nondual.token_ids import has_values
from nondual.transformer_layer import normed


class GatedCrossAttention(nn.Module):
    """Text attends to images, and a feed-forward network follows, each times the tanh of a learned gate.

        x = x + tanh(a) attention(norm(x), media)
        x = x + tanh(b) feed_forward(norm(x))

    Nothing in it has a bias but the norms: a token that may attend to nothing gets exactly 0 from the attention. (The
    feed-forward network acts on it all the same.)

    Args:
        d_model: width E of the text.
        d_media: width D of the images' tokens.
        n_heads: heads; 8 in flamingo-pytorch.
        d_head: width of each; 64 there, whatever E is.
        d_ff: width of the feed-forward network; 4 E where left out.
        gated: whether there are gates. Without them both terms count in full from the start: the paper's ablation.
        eps: added to the variance in the norms.

    Source: 2204.14198, section 2.2 and figure 4.
    """

    norm: nn.LayerNorm
    mixer: MultiHeadAttention
    feed_forward: UnbiasedFeedForward
    attention_gate: nn.Parameter | None
    feed_forward_gate: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        d_media: int,
        *,
        n_heads: int = 8,
        d_head: int = 64,
        d_ff: int | None = None,
        gated: bool = True,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(d_model, eps=eps)
        self.mixer = MultiHeadAttention(d_model, n_heads, d_head=d_head, d_memory=d_media, bias=False)
        self.feed_forward = UnbiasedFeedForward(d_model, 4 * d_model if d_ff is None else d_ff, eps=eps)
        self.attention_gate = nn.Parameter(torch.zeros(())) if gated else None
        self.feed_forward_gate = nn.Parameter(torch.zeros(())) if gated else None

    def forward(
        self,
        x: Float[Tensor, "b n e"],
        media: Float[Tensor, "b m d"] | ProjectedMemory | None,
        *,
        mask: Bool[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "b n e"]:
        """x (B, N, E) -> (B, N, E).

        Args:
            x: the text; it may be in a wider dtype than the weights.
            media: the images' tokens (B, M, D), or what `mixer.project` made of them; None where there are none.
            mask: (B, 1, N, M), True where a token may attend.

        Raises:
            TypeError, ValueError: as `MultiHeadAttention.forward`.
        """
        # --8<-- [start:gated_cross_attention]
        if media is not None:
            seen = self.mixer(normed(self.norm, x), media, mask=mask)
            x = x + _through(self.attention_gate, seen)
        return x + _through(self.feed_forward_gate, self.feed_forward(x))
        # --8<-- [end:gated_cross_attention]

    def openness(self) -> Float[Tensor, " 2"]:
        """tanh of the two gates, that of the attention first: 0 for shut, 1 for open, in float32. Without gates, 1."""
        gates = (self.attention_gate, self.feed_forward_gate)
        return torch.stack([torch.ones(()) if gate is None else gate.detach().float().tanh().cpu() for gate in gates])

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(
            self, x: Tensor, media: Tensor | ProjectedMemory | None, *, mask: Tensor | None = None
        ) -> Tensor: ...


def _through(gate: Tensor | None, x: Tensor) -> Tensor:
    return x if gate is None else gate.tanh() * x


# --- which image a token sees ----------------------------------------------------------------------------------------


# --8<-- [start:last_image]
def last_image(
    marked: Bool[Tensor, "b n"],
    reset: Bool[Tensor, "b n"] | None = None,
) -> Int[Tensor, "b n"]:
    """For each position the number of the last image up to it, from 1 in its row.

    0 where its sequence has had none.

        ids         the   *   is   a  cat   *  and   a  dog
        last_image    0   1    1   1    1   2    2   2    2

    Args:
        marked: True where an image stands.
        reset: True where a packed sequence begins: no image before it is seen.
    """
    count = marked.cumsum(1)
    if reset is None:
        return count
    # images of earlier sequences
    before = torch.where(reset, count - marked.long(), 0).cummax(1).values
    return torch.where(count > before, count, 0)


# --8<-- [end:last_image]


class MediaCache:
    """The last image of each row, as keys and values for every gated layer: all that later tokens can attend to.

    Args:
        batch: B.

    Attributes:
        batch: B.
        memories: for each gated layer keys and values (B, H, R, d_head); None while no row has met an image.
        held: (B,), whether the row's present sequence has had an image.
    """

    batch: int
    memories: list[ProjectedMemory] | None
    held: Bool[Tensor, " b"] | None

    def __init__(self, batch: int):
        self.batch, self.memories, self.held = batch, None, None

    def select(self, rows: Int[Tensor, " r"]) -> "MediaCache":
        """These rows of the batch, in this order; a row may be taken more than once.

        Args:
            rows: (R,) int64.
        """
        chosen = MediaCache(len(rows))
        chosen.memories = None if self.memories is None else [memory.select(rows) for memory in self.memories]
        chosen.held = None if self.held is None else self.held[rows]
        return chosen


class Flamingo(ImageTextModel):
    """A vision tower and a language model, both frozen, joined by gated cross-attention between the latter's layers.

    The language model is used as it is, and its parameters stop requiring gradients. With every gate at 0 the scores
    are its own to the bit, whatever the images.

    Args:
        vision: images (I, …) -> vectors (I, S, d_vision). nn.Identity for vectors that were computed before.
        language_model: any `CausalLM`.
        resampler: (I, S, d_vision) -> (I, R, d_vision), such as a `PerceiverResampler`; nn.Identity for the vectors as
            they are. If it was made for several frames, images are videos (I, T, …).
        mark: the id that stands for an image, one that the language model knows.
        d_vision: width D of what vision gives.
        every: how often a gated layer stands before a layer of the language model: before the first, and before each
            every-th after it. In the paper 1 for the smallest model, and 4 or 7.
        before: in place of every, the numbers of those layers, from 0. The later the first is, the less a training
            step costs: no gradient goes further down.
        n_heads: of the gated layers, as in `GatedCrossAttention`.
        d_head: of the gated layers, as in `GatedCrossAttention`.
        d_ff: of the gated layers, as in `GatedCrossAttention`.
        gated: of the gated layers, as in `GatedCrossAttention`.

    Raises:
        TypeError: a language_model that is not a CausalLM.
        ValueError: a mark that the language model does not know, an every below 1, or layers that it does not have.
    """

    resampler: nn.Module
    gated_layers: nn.ModuleList
    before: tuple[int, ...]

    def __init__(
        self,
        vision: nn.Module,
        language_model: CausalLM,
        resampler: nn.Module,
        *,
        mark: int,
        d_vision: int,
        every: int = 1,
        before: Sequence[int] | None = None,
        n_heads: int = 8,
        d_head: int = 64,
        d_ff: int | None = None,
        gated: bool = True,
    ):
        super().__init__(vision, language_model, mark, d_vision)
        n_layers = len(language_model.layers)
        if every < 1:
            raise ValueError(f"every must be 1 or more, got {every}")
        self.before = tuple(range(0, n_layers, every) if before is None else before)
        if not self.before or not all(0 <= i < n_layers for i in self.before) or len({*self.before}) < len(self.before):
            raise ValueError(f"before must name layers of 0 to {n_layers - 1}, each once, got {list(self.before)}")
        self.resampler = resampler
        self.gated_layers = nn.ModuleList(
            GatedCrossAttention(
                language_model.d_model, d_vision, n_heads=n_heads, d_head=d_head, d_ff=d_ff, gated=gated
            )
            for _ in self.before
        )
        self.freeze("vision", "language_model")

    def tokens(self, images: Float[Tensor, "i ..."]) -> Float[Tensor, "i r d"]:
        """Images (I, …), or videos (I, T, …) -> the R tokens of each that the text attends to, (I, R, D).

        Raises:
            TypeError, ValueError: what vision or the resampler refuse or give.
        """
        n_frames = getattr(self.resampler, "n_frames", 1)
        if n_frames > 1:
            if images.ndim < 3:
                raise ValueError(f"images must be videos (I, T, …), up to {n_frames} frames, got {tuple(images.shape)}")
            frames = image_vectors(self.vision, images.flatten(0, 1), self.d_vision)
            media = self.resampler(frames.unflatten(0, images.shape[:2]))
        else:
            media = self.resampler(image_vectors(self.vision, images, self.d_vision))
        if media.ndim != 3 or (media.shape[0], media.shape[2]) != (images.shape[0], self.d_vision):
            raise ValueError(
                f"resampler must give (I, R, d_vision) = ({images.shape[0]}, R, {self.d_vision}), "
                f"got {tuple(media.shape)}"
            )
        return media

    def _hidden(
        self, ids: Tensor, marked: Tensor, images: Tensor | None, cache: list[Any] | None, reset: Tensor | None
    ) -> Tensor:
        own: MediaCache | None = None if cache is None else cache[-1]
        if own is not None and own.batch != len(ids):
            raise ValueError(f"cache must be of ids' batch {len(ids)}, got one of {own.batch}")
        media = None if images is None or not len(images) else _in_rows(self.tokens(images), marked)
        last = last_image(marked, reset)  # (B, N)
        memories = [self._memory(i, media, own) for i in range(len(self.gated_layers))]
        mask = self._mask(last, media, own, reset)
        at = {layer: i for i, layer in enumerate(self.before)}

        def look(layer: int, x: Tensor) -> Tensor:
            return x if layer not in at else self.gated_layers[at[layer]](x, memories[at[layer]], mask=mask)

        given = None if cache is None else list(cache[:-1])
        hidden = self.language_model.hidden(self.language_model.embeddings(ids), cache=given, reset=reset, before=look)
        if own is not None:
            _remember(own, memories, last, media, marked, reset)
        return hidden

    def _memory(self, i: int, media: Tensor | None, own: MediaCache | None) -> ProjectedMemory | None:
        """Keys and values of gated layer i: of the last image of earlier calls, if any, and of those of this call."""
        held = None if own is None or own.memories is None else own.memories[i]
        if media is None:
            return held
        mixer: Any = self.gated_layers[i].mixer
        new = mixer.project(media.flatten(1, 2))
        if held is None:
            return new
        return ProjectedMemory(*(torch.cat(pair, 2) for pair in zip(held, new)))

    def _mask(self, last: Tensor, media: Tensor | None, own: MediaCache | None, reset: Tensor | None) -> Tensor | None:
        """(B, 1, N, M): each token may attend to the tokens of its last image."""
        parts = []
        if own is not None and own.memories is not None and own.held is not None:
            earlier = (last == 0) & own.held[:, None]  # none in this call so far, but one before it
            if reset is not None:
                earlier &= ~reset.cummax(1).values
            parts.append(earlier[..., None].expand(-1, -1, own.memories[0].keys.shape[2]))
        if media is not None:
            number = torch.arange(1, media.shape[1] + 1, device=last.device).repeat_interleave(media.shape[2])
            parts.append(last[..., None] == number)
        return torch.cat(parts, -1)[:, None] if parts else None

    def _own_cache(self, batch: int) -> MediaCache:
        return MediaCache(batch)

    def extra_repr(self) -> str:
        """The mark and where the gated layers stand."""
        return f"mark={self.mark}, before={list(self.before)}"


def _in_rows(media: Tensor, marked: Tensor) -> Tensor:
    """(I, R, D) -> (B, J, R, D): each row's images, and any image in places that its row has no mark for."""
    count = marked.sum(1)
    most = int(count.max()) if has_values(marked) else media.shape[0] // marked.shape[0]
    first = count.cumsum(0) - count
    index = first[:, None] + torch.arange(most, device=marked.device)
    return media[index.clamp(max=media.shape[0] - 1)]


def _remember(
    own: MediaCache,
    memories: list[ProjectedMemory | None],
    last: Tensor,
    media: Tensor | None,
    marked: Tensor,
    reset: Tensor | None,
) -> None:
    """Keep each row's last image, and whether its present sequence has one."""
    held = last[:, -1] > 0
    if own.held is not None:
        stays = own.held & ~marked.any(1)
        held = held | (stays if reset is None else stays & ~reset.any(1))
    if media is not None:
        n_slots, n_tokens = media.shape[1] + (own.memories is not None), media.shape[2]
        slot = (marked.sum(1) + (n_slots - media.shape[1]) - 1).clamp(min=0)  # the earlier image is slot 0
        rows = torch.arange(len(slot), device=slot.device)
        kept = [
            ProjectedMemory(*(x.unflatten(2, (n_slots, n_tokens))[rows, :, slot] for x in memory))
            for memory in memories
            if memory is not None
        ]
        own.memories = kept
    own.held = held
