"""A prefix language model: the prompt is read both ways, and what follows is written token by token.

    prompt a b, then c d     a b c d      each row is a query: a and b see each other, c and d see what precedes them
                           a 1 1 0 0
                           b 1 1 0 0
                           c 1 1 1 0
                           d 1 1 1 1

It is a decoder in which the prompt has an encoder's mask, with the same weights for both. Sources: Dong et al. 2019
(1905.03197), section 2.3; Raffel et al. 2019 (1910.10683), section 3.2.1. Symbols: ids (B, N), V tokens.
"""

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from nondual.language_models.causal import CausalLM
from nondual.language_models.sampling import check_lengths, check_sampling, extend
from nondual.mixers import check_reset
from nondual.ops import masks
from nondual.token_ids import check_ids, has_values


class PrefixLM(nn.Module):
    """A causal language model whose attention reads a prefix both ways.

        speller = PrefixLM(GPTFamily(GPTSize(99, 64, 48, 4, 4)))
        speller.loss(ids, prefix=7)              # of the tokens after the first 7
        speller.generate(prompt, 20)             # the whole prompt is the prefix

    Args:
        model: a causal language model whose mixers take `mask` and `causal`, as attention does.
    """

    model: CausalLM

    def __init__(self, model: CausalLM):
        super().__init__()
        self.model = model

    def forward(self, ids: Int[Tensor, "b n"], prefix: int | Integer[Tensor, " b"]) -> Float[Tensor, "b n v"]:
        """ids (B, N) -> scores (B, N, V) for the token that follows each. Those within the prefix have seen that token.

        Args:
            ids: (B, N), of any integer dtype.
            prefix: how many tokens of the beginning are read both ways, 1 to N; or (B,), for each row.

        Raises:
            TypeError: ids that are not a Tensor.
            ValueError: ids as in `CausalLM.forward`; a prefix outside 1 to N, or none for each row; mixers that take no
                mask.
        """
        ids = self._checked(ids)
        return self.model.scores(self._read(ids, self._prefix(prefix, ids)))

    def loss(self, ids: Int[Tensor, "b n"], prefix: int | Integer[Tensor, " b"]) -> Float[Tensor, ""]:
        """The mean cross-entropy, in nats, of the tokens after the prefix.

        Args:
            ids: (B, N), of any integer dtype.
            prefix: as in `forward`; where it is N, a row has nothing to predict.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        ids, n = self._checked(ids), ids.shape[1]
        prefix = self._prefix(prefix, ids)
        first = prefix if isinstance(prefix, int) else prefix[:, None]
        known = torch.arange(1, n, device=ids.device) < first
        labels = ids[:, 1:].masked_fill(known, -100)
        return self.model.loss_at(self._read(ids, prefix)[:, :-1], labels)

    @torch.no_grad()
    def generate(
        self,
        ids: Int[Tensor, "b n"],
        n_new: int,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        eos: int | None = None,
        reset: Bool[Tensor, "b n"] | None = None,
        cached: bool = True,
    ) -> Int[Tensor, "b m"]:
        """The prompt, read both ways, and up to n_new tokens after it.

        Args:
            ids: the prompt (B, N), of one token or more, of any integer dtype.
            n_new: how many tokens to add.
            temperature: as in `CausalLM.generate`.
            top_k: as in `CausalLM.generate`.
            top_p: as in `CausalLM.generate`.
            generator: as in `CausalLM.generate`.
            eos: the token after which a row is finished; it then repeats it until all are.
            reset: True at the first real token of each row of a batch padded on the left; cached only.
            cached: as in `CausalLM.generate`. What is remembered of the prompt has seen all of it, and none of what
                follows.

        Returns:
            (B, N + n_new) int64, or shorter where every row met eos before.

        Raises:
            TypeError: ids that are not a Tensor.
            ValueError: as `CausalLM.generate`; a reset with cached=False.
        """
        ids, prompt = self._checked(ids), ids.shape[1]
        check_sampling(temperature, top_k, top_p)
        check_lengths(ids, n_new)
        read = prompt + max(n_new - 1, 0)
        self.model.check_longest(read, "ids and n_new", "shorten the prompt or n_new")
        if reset is not None:
            check_reset(reset, ids)
            if not cached:
                raise ValueError("reset must be left out with cached=False: generate with the cache")
        cache = self.model.new_cache(len(ids), read) if cached else None

        def scores_after(unread: Tensor, n: int) -> Tensor:
            if cache is None:
                return self.model.scores(self._read(unread, prompt)[:, -1])
            # --8<-- [start:cached]
            x = self.model.embeddings(unread)
            if n == 0:  # the prompt: no mask at all
                hidden = self.model.hidden(x, cache=cache, reset=reset, mixing={"causal": False})
            else:  # one token, which sees all that was read
                hidden = self.model.hidden(x, cache=cache)
            return self.model.scores(hidden[:, -1])
            # --8<-- [end:cached]

        return extend(ids, n_new, scores_after, temperature, top_k, top_p, generator=generator, eos=eos, cached=cached)

    def _read(self, ids: Tensor, prefix: int | Tensor) -> Tensor:
        """The vector of each position after the last norm (B, N, E)."""
        # --8<-- [start:prefix]
        mask = masks.prefix(ids.shape[1], prefix, device=ids.device)
        mixing = {"mask": mask, "causal": False}
        return self.model.hidden(self.model.embeddings(ids), mixing=mixing)
        # --8<-- [end:prefix]

    def _checked(self, ids: Tensor) -> Tensor:
        return check_ids("ids", ids, self.model.vocabulary).long()

    def _prefix(self, prefix: int | Tensor, ids: Tensor) -> int | Tensor:
        """The prefix, if it fits ids; lengths of rows on the device of ids."""
        batch, n = ids.shape
        if isinstance(prefix, Tensor):
            masks.check_integers("prefix", prefix)
            if len(prefix) != batch:
                raise ValueError(f"prefix must be a length for each of {batch} rows, got {len(prefix)}")
            prefix = prefix.to(ids.device)
            if not has_values(prefix) or not batch:
                return prefix
            low, high = int(prefix.min()), int(prefix.max())
        else:
            low = high = prefix
        if isinstance(prefix, bool) or not 1 <= low <= high <= n:
            raise ValueError(f"prefix must lie in 1 to {n}, the length of ids, got {low} to {high}")
        return prefix
