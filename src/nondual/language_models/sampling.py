"""From scores to the next token, and on: the likeliest, or one drawn at a temperature among the likely enough.

Sources: top-k, Fan et al. 2018 (1805.04833), section 5.1; top-p, Holtzman et al. 2020 (1904.09751), section 3.1.
Symbols: B rows, V tokens in the vocabulary.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor


def check_sampling(temperature: float | None, top_k: int | None, top_p: float | None) -> None:
    """Refuse settings that `choose` cannot follow.

    Raises:
        ValueError: a temperature not above 0, a top_k below 1, a top_p outside (0, 1], or one of these two without a
            temperature.
    """
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; leave it out to take the likeliest")
    if top_k is not None and (top_k < 1 or temperature is None):
        raise ValueError(f"top_k must be 1 or more and go with a temperature, got {top_k} and {temperature}")
    if top_p is not None and (not 0 < top_p <= 1 or temperature is None):
        raise ValueError(f"top_p must be in (0, 1] and go with a temperature, got {top_p} and {temperature}")


def check_lengths(ids: Int[Tensor, "b n"], n_new: int) -> None:
    """Refuse an empty prompt and a negative number of new tokens.

    Raises:
        ValueError: ids (B, 0), or an n_new below 0.
    """
    if ids.shape[1] < 1:
        raise ValueError(f"ids must hold a token or more to go on from, got {tuple(ids.shape)}")
    if n_new < 0:
        raise ValueError(f"n_new must be 0 or more, got {n_new}")


def choose(
    scores: Float[Tensor, "b v"],
    temperature: float | None,
    top_k: int | None,
    generator: torch.Generator | None = None,
    *,
    top_p: float | None = None,
) -> Int[Tensor, " b"]:
    """One token of each row.

    Args:
        scores: (B, V), of any floating dtype; draws are computed in float32.
        temperature: what scores are divided by before a token is drawn; the likeliest is taken where None.
        top_k: draw among the k likeliest only.
        generator: where the randomness comes from.
        top_p: of the tokens that top_k leaves, draw among the fewest whose probabilities sum to top_p or more.

    Returns:
        (B,), int64.
    """
    if temperature is None:
        return scores.argmax(-1)
    if top_k is None and top_p is None:
        return torch.multinomial((scores.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]
    k = scores.shape[-1] if top_k is None else min(top_k, scores.shape[-1])
    kept = scores.topk(k, -1)  # the likeliest first
    probabilities = (kept.values.float() / temperature).softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities  # what the likelier ones sum to: 0 for the first
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return kept.indices.gather(-1, drawn)[:, 0]


def extend(
    ids: Int[Tensor, "b n"],
    n_new: int,
    scores_after: Callable[[Tensor, int], Tensor],
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    *,
    generator: torch.Generator | None = None,
    eos: int | None = None,
    cached: bool = True,
) -> Int[Tensor, "b m"]:
    """A prompt and up to n_new tokens after it, each chosen by the scores after all those before.

    Args:
        ids: the prompt (B, N) int64.
        n_new: how many tokens to add.
        scores_after: called with what it has not read yet, (B, M), and with how many tokens were added so far; it gives
            the scores (B, V) of the next one. It is given the prompt first, and then each token by itself (B, 1) if
            cached, else all from the beginning.
        temperature: as in `choose`.
        top_k: as in `choose`.
        top_p: as in `choose`.
        generator: as in `choose`.
        eos: the token after which a row is finished; it then repeats it until all are.
        cached: whether scores_after remembers what it has read.

    Returns:
        (B, N + n_new) int64, or shorter where every row met eos before.
    """
    tokens, finished = [ids], torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for n in range(n_new):
        # --8<-- [start:extend]
        unread = tokens[-1] if cached else torch.cat(tokens, 1)
        token = choose(scores_after(unread, n), temperature, top_k, generator, top_p=top_p)
        if eos is not None:
            token = token.masked_fill(finished, eos)
            finished |= token == eos
        tokens.append(token[:, None])
        # --8<-- [end:extend]
        if eos is not None and finished.all():
            break
    return torch.cat(tokens, 1)
