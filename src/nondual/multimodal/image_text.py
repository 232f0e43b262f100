"""What models of images and text share: scores, loss and generation over token ids with marks where images stand.

    class Mine(ImageTextModel):                     # `flamingo` and `llava` are two
        def _hidden(self, ids, marked, images, cache, reset): ...

Symbols: ids (B, N), I images in all, E width of the language model, V tokens in its vocabulary.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nondual.language_models.causal import CausalLM
from nondual.language_models.sampling import check_lengths, check_sampling, extend
from nondual.mixers import as_before_if_raised, check_reset
from nondual.multimodal.frozen import FrozenParts
from nondual.multimodal.image_marks import checked_marks, next_labels


class ImageTextModel(FrozenParts):
    """A language model that reads images where a mark stands among its tokens.

    Attributes:
        vision: images (I, …) -> vectors (I, S, d_vision).
        language_model: a `CausalLM`.
        mark: the id that stands for an image.
        d_vision: width of what vision gives.
    """

    vision: nn.Module
    language_model: CausalLM
    mark: int
    d_vision: int

    _mark_is_a_token = True  # whether the language model reads the mark itself

    def __init__(self, vision: nn.Module, language_model: CausalLM, mark: int, d_vision: int):
        super().__init__()
        if not isinstance(language_model, CausalLM):
            raise TypeError(f"language_model must be a CausalLM, got {type(language_model).__name__}")
        if self._mark_is_a_token and not 0 <= mark < language_model.vocabulary:
            raise ValueError(
                f"mark must be an id of the language model, 0 to {language_model.vocabulary - 1}, got {mark}"
            )
        if d_vision < 1:
            raise ValueError(f"d_vision must be 1 or more, got {d_vision}")
        self.vision, self.language_model, self.mark, self.d_vision = vision, language_model, mark, d_vision

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        images: Float[Tensor, "i ..."] | None = None,
        *,
        cache: list[Any] | None = None,
        reset: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n v"]:
        """ids (B, N) and the images of their marks -> scores (B, N, V) for the token that follows each.

        Args:
            ids: of any integer dtype, with `mark` where an image stands. Rows may have different numbers of images.
            images: (I, …), as vision takes them: one for each mark, row after row; left out where there are none.
            cache: what came before, from `new_cache`; all of it is brought up to date, or none where this call raises.
            reset: True where a packed sequence begins, or at the first real token of a row padded on the left. What
                stands before it, images too, does not reach what follows.

        Raises:
            TypeError: ids or images that are not tensors, a cache that is not from `new_cache`.
            ValueError: no rows or no tokens, ids as in `CausalLM.forward`, not as many images as marks, images that
                vision refuses, a cache of another batch, more positions than the language model reads.
            RuntimeError: a cache while gradients are recorded.
        """
        ids, marked = self._checked(ids, images, reset)
        with as_before_if_raised(*self._caches(cache)):
            return self.language_model.scores(self._hidden(ids, marked, images, cache, reset))

    def loss(
        self,
        ids: Int[Tensor, "b n"],
        images: Float[Tensor, "i ..."] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        *,
        reset: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, ""]:
        """The mean cross-entropy, in nats, of the labelled tokens, each given what stands before it.

        Scores are computed at the positions before labelled tokens alone.

        Args:
            ids: as in `forward`; N of 2 or more.
            images: as in `forward`.
            reset: as in `forward`.
            labels: (B, N) int64: the token itself where it is to be predicted (in the answer), else -100 (in the
                question, at padding, at images). All tokens but the marks where left out. The first of a row or a
                packed sequence is never predicted.

        Returns:
            A number, in float32 or better; 0 where nothing is labelled.

        Raises:
            TypeError, ValueError: as `forward`; labels of another shape or dtype, or not -100 where an image stands.
        """
        ids, marked = self._checked(ids, images, reset)
        following = next_labels(ids, marked, labels, reset)
        return self.language_model.loss_at(self._hidden(ids, marked, images, None, reset), following)

    @torch.no_grad()
    def generate(
        self,
        ids: Int[Tensor, "b n"],
        n_new: int,
        images: Float[Tensor, "i ..."] | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        eos: int | None = None,
        reset: Bool[Tensor, "b n"] | None = None,
        cached: bool = True,
    ) -> Int[Tensor, "b m"]:
        """The prompt and up to n_new tokens after it. A mark is never among the new ones: no image would stand there.

        Args:
            ids: as in `forward`; prompts of different lengths are padded on the left.
            n_new: as in `CausalLM.generate`.
            images: as in `forward`.
            temperature: as in `CausalLM.generate`.
            top_k: as in `CausalLM.generate`.
            top_p: as in `CausalLM.generate`.
            generator: as in `CausalLM.generate`.
            eos: as in `CausalLM.generate`.
            reset: as in `forward`.
            cached: as in `CausalLM.generate`.

        Returns:
            (B, N + n_new), or shorter where every row met eos before; in the dtype of ids, or in int64 where that of
            ids does not hold every token of the vocabulary.

        Raises:
            TypeError, ValueError: as `forward` and `CausalLM.generate`.
        """
        _, marked = self._checked(ids, images, reset)
        check_sampling(temperature, top_k, top_p)
        check_lengths(ids, n_new)
        read = self._longest(marked, images) + max(n_new - 1, 0)  # the last token is chosen and never read
        self.language_model.check_longest(read, "ids, with their images, and n_new", "shorten the prompt or n_new")
        cache = self.new_cache(len(ids), read) if cached else None
        padding = ids.shape[1]

        def scores_after(unread: Tensor, n: int) -> Tensor:
            again = n == 0 or not cached  # the prompt is among what is read
            given = None if reset is None or not again else _padded(reset, unread.shape[1] - padding)
            seen = images if again else None
            hidden = self._hidden(*self._checked(unread, seen, given), seen, cache, given)
            scores = self.language_model.scores(hidden[:, -1])
            if 0 <= self.mark < scores.shape[-1]:
                scores[:, self.mark] = -torch.inf
            return scores

        tokens = extend(
            ids.long(), n_new, scores_after, temperature, top_k, top_p, generator=generator, eos=eos, cached=cached
        )
        fits = torch.iinfo(ids.dtype).max >= self.language_model.vocabulary - 1
        return tokens.to(ids.dtype if fits else torch.long)

    def new_cache(self, batch: int, max_len: int | None = None) -> list[Any]:
        """An empty cache for a batch of B sequences: that of the language model, and what this model adds to it.

        Args:
            batch: B.
            max_len: how many positions the language model will read at most, as in `CausalLM.new_cache`.

        Raises:
            ValueError: as `CausalLM.new_cache`.
        """
        return [*self.language_model.new_cache(batch, max_len), self._own_cache(batch)]

    # --- what a model of this kind says of itself --------------------------------------------------------------------

    def _hidden(
        self, ids: Tensor, marked: Tensor, images: Tensor | None, cache: list[Any] | None, reset: Tensor | None
    ) -> Tensor:
        """The vector of each of the ids after the language model's last norm, (B, N, E)."""
        raise NotImplementedError

    def _own_cache(self, batch: int) -> Any:
        """What this model remembers of the images and positions before, beside the language model's caches."""
        raise NotImplementedError

    def _longest(self, marked: Tensor, images: Tensor | None) -> int:
        """How many positions the language model reads for these rows."""
        return marked.shape[1]

    # --- what is the same for all ------------------------------------------------------------------------------------

    def _checked(self, ids: Tensor, images: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        own = self._mark_is_a_token
        ids, marked = checked_marks(ids, images, self.mark, self.language_model.vocabulary, own_id=own)
        if reset is not None:
            check_reset(reset, ids)
        return ids, marked

    def _caches(self, cache: list[Any] | None) -> list[Any]:
        """The caches in a list, which must be one that `new_cache` makes."""
        if cache is None:
            return []
        own = type(self._own_cache(1))
        if not isinstance(cache, (list, tuple)) or not cache or not isinstance(cache[-1], own):
            raise TypeError(f"cache must be from new_cache of this {type(self).__name__}, got {type(cache).__name__}")
        return list(cache)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(
            self,
            ids: Tensor,
            images: Tensor | None = None,
            *,
            cache: list[Any] | None = None,
            reset: Tensor | None = None,
        ) -> Tensor: ...


def _padded(reset: Tensor, more: int) -> Tensor:
    """A prompt's reset, with False for the tokens after it."""
    return nn.functional.pad(reset, (0, more))
