"""From a model that scores the next token to whole sequences: greedy search, sampling and beam search.

All three drive one function, so that a recurrent decoder, a transformer and anything else are searched alike:

    step(tokens, state) -> (log_probs, state)      tokens (R,) the last token of each row, log_probs (R, V)

A state is what the model remembers of the tokens before: a Tensor whose first axis is the rows, a tuple, list or dict
of such, an object with `select(rows)` that gives the state of those rows, a number, a string or None. A state of
torch's nn.GRU, (layers, R, H), has the rows second: transpose it.

    def step(tokens, state):                                    # a GRU cell as a language model
        state = cell(embedding(tokens), state)                  # (R, H)
        return scores(state).log_softmax(-1), state

    found = beam_search(step, start, state, max_len=20, beams=4, eos=2)
    found.tokens[:, 0]                                          # the best sequence of each row of start

Sources: beam search, Sutskever, Vinyals and Le 2014 (1409.3215), section 3.2, where a finished sequence leaves the beam
(here its place goes to no other); the length penalty, Wu et al. 2016 (1609.08144), equation 14. Symbols: B sequences to
find, K beams, R = B K rows, V tokens in the vocabulary, N tokens found, n the length of a sequence.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nondual.language_models.sampling import check_sampling, choose
from nondual.ops.checks import check_sizes, check_tensors
from nondual.ops.dtypes import at_least_float32

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""The last token of each row (R,) and the state -> log-probabilities of the next one (R, V), and the new state."""


class Found(NamedTuple):
    """What a search gives: K sequences for each row that it began with, the best first.

    Attributes:
        tokens: (B, K, N) int64, without the tokens that the search began with. What follows the eos of a sequence is
            eos again.
        scores: (B, K), the log-probability of each sequence, divided by `length_penalty` in a beam search.
        lengths: (B, K) int64, how many tokens each sequence has, eos included.
    """

    tokens: Int[Tensor, "b k n"]
    scores: Float[Tensor, "b k"]
    lengths: Int[Tensor, "b k"]


def length_penalty(lengths: Int[Tensor, "*shape"], strength: float) -> Float[Tensor, "*shape"]:
    """What the log-probability of a sequence of n tokens is divided by: ((5 + n) / 6)^strength.

    A sum of log-probabilities falls with every token, which favours short sequences; dividing by a number that grows
    with n makes up for it.

    Args:
        lengths: n, of any shape and integer dtype.
        strength: 0 for no penalty; Wu et al. call it α. The transformer's paper takes 0.6, with 4 beams (section 6.1).

    Returns:
        Of the shape of lengths, in float64 (in float32 on mps).

    Source: 1609.08144, equation 14, its first line.
    """
    wide = torch.float32 if lengths.device.type == "mps" else torch.float64
    return ((5 + lengths.to(wide)) / 6) ** strength


def greedy(step: Step, start: Int[Tensor, " b"], state: Any, *, max_len: int, eos: int | None = None) -> Found:
    """The likeliest token after each, until eos or max_len.

    Args:
        step: as above.
        start: the token that each row begins with, (B,); its scores are asked first.
        state: what `step` is first given, of B rows.
        max_len: how many tokens a row has at most.
        eos: the token that ends a sequence; every sequence has max_len tokens where left out.

    Returns:
        One sequence a row, K = 1. Of equally likely tokens the one of the lowest index is taken.

    Raises:
        TypeError: start, the state or what `step` returns is of a kind that cannot be searched.
        ValueError: a max_len below 1; an eos out of range; a state of another number of rows than start; scores of the
            wrong shape, NaN or above 0, or a row in which no token is possible.
    """
    return _one_sequence(step, start, state, max_len, eos, lambda log_probs: choose(log_probs, None, None))


def sample(
    step: Step,
    start: Int[Tensor, " b"],
    state: Any,
    *,
    max_len: int,
    eos: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Found:
    """A token drawn after each, until eos or max_len.

    Args:
        step: as above.
        start: the token that each row begins with, (B,).
        state: what `step` is first given, of B rows.
        max_len: how many tokens a row has at most.
        eos: the token that ends a sequence; every sequence has max_len tokens where left out.
        temperature: log-probabilities are divided by it before a token is drawn.
        top_k: draw among the k likeliest only.
        top_p: of those, draw among the fewest whose probabilities sum to top_p or more.
        generator: where the randomness comes from.

    Returns:
        One sequence a row, K = 1. Its score is that of the model itself, whatever the temperature.

    Raises:
        TypeError, ValueError: as `greedy` and `nondual.language_models.sampling.check_sampling` raise them.
    """
    check_sampling(temperature, top_k, top_p)
    return _one_sequence(
        step,
        start,
        state,
        max_len,
        eos,
        lambda log_probs: choose(log_probs, temperature, top_k, generator, top_p=top_p),
    )


@torch.no_grad()
def beam_search(
    step: Step,
    start: Int[Tensor, " b"],
    state: Any,
    *,
    max_len: int,
    beams: int,
    eos: int | None = None,
    length_penalty: float = 0.0,
) -> Found:
    """The best K sequences that a search of K beams meets: with K = 1 greedy search, with K large enough all of them.

    At every step each unfinished sequence is continued by every token, and the likeliest of all these are kept, as many
    as there are beams left. A sequence that ends in eos is finished and keeps its place. The search ends where all are
    finished or have max_len tokens; then they are put in order, by log-probability / length_penalty(n).

    Args:
        step: as above. It is called with B rows first, and with B K from then on, finished sequences among them.
        start: the token that each row begins with, (B,).
        state: what `step` is first given, of B rows.
        max_len: how many tokens a sequence has at most.
        beams: K.
        eos: the token that ends a sequence; every sequence has max_len tokens where left out.
        length_penalty: the strength of the function of that name.

    Returns:
        K sequences a row, the best first. Of equally likely ones the search keeps that of the better parent, then the
        one of the lower token. Where there are fewer than K sequences at all, the last have length 0 and score -inf.

    Raises:
        TypeError, ValueError: as `greedy`; beams below 1, a length_penalty below 0.
    """
    _check_search(start, max_len, eos)
    if beams < 1:
        raise ValueError(f"beams must be 1 or more, got {beams}")
    if not 0 <= length_penalty < math.inf:
        raise ValueError(f"length_penalty must be 0 or more, got {length_penalty}")
    batch, device, fill = len(start), start.device, 0 if eos is None else eos
    _check_rows(state, batch)
    last = start.long()  # (B w,): w is 1 at first, then K
    tokens = torch.empty(batch, 1, 0, dtype=torch.long, device=device)
    lengths = torch.zeros(batch, 1, dtype=torch.long, device=device)
    finished = torch.zeros(batch, 1, dtype=torch.bool, device=device)
    sums: Tensor | None = None  # (B, w) log-probabilities; -inf for a place that no sequence has
    # --8<-- [start:beam]
    for n in range(max_len):
        log_probs, state = step(last, state)
        going_on = ~finished if sums is None else ~finished & (sums > -torch.inf)
        log_probs = _checked(log_probs, len(last), eos, going_on.flatten(), n).unflatten(0, (batch, -1))
        sums = log_probs.new_zeros(batch, 1) if sums is None else sums
        v, (_, width) = log_probs.shape[-1], sums.shape
        # 1. Every continuation of every unfinished sequence; a finished one is its own and comes before all others.
        total = (sums[..., None] + log_probs).masked_fill(~going_on[..., None], -torch.inf)  # (B, w, V)
        first = torch.arange(v, device=device) == 0
        rank = total.masked_fill(finished[..., None] & first, torch.inf)
        # 2. The best K of these: which sequence each goes on from, and by which token.
        best = _highest(rank.flatten(1), min(beams, width * v))  # (B, K)
        parent, token = best // v, best % v
        kept = rank.flatten(1).gather(1, best) == torch.inf
        sums = torch.where(kept, sums.gather(1, parent), total.flatten(1).gather(1, best))
        sums, parent, token, kept = (
            _padded(x, beams, value) for x, value in ((sums, -torch.inf), (parent, 0), (token, 0), (kept, False))
        )
        missing = sums == -torch.inf
        if bool(missing.all(1).any()):
            raise ValueError(f"step must leave a token possible, got only -inf at step {n} for every beam of a row")
        # 3. The sequences and the state follow.
        token = token.masked_fill(kept | missing, fill)
        tokens = torch.cat([tokens.gather(1, parent[..., None].expand(-1, -1, n)), token[..., None]], 2)
        lengths = (lengths.gather(1, parent) + ~kept).masked_fill(missing, 0)
        finished = kept if eos is None else kept | ((token == eos) & ~missing)
        if bool((finished | missing).all()):
            break
        rows = (torch.arange(batch, device=device)[:, None] * width + parent).flatten()
        if n < max_len - 1 and not torch.equal(rows, torch.arange(batch * width, device=device)):
            state = select_rows(state, rows)
        last = token.flatten()
    # --8<-- [end:beam]
    assert sums is not None  # max_len is 1 or more
    scores = sums / _penalty(lengths, length_penalty).to(sums.dtype)
    order = scores.argsort(dim=1, descending=True, stable=True)
    tokens = tokens.gather(1, order[..., None].expand_as(tokens))
    missing = scores.gather(1, order) == -torch.inf
    return Found(tokens.masked_fill(missing[..., None], fill), scores.gather(1, order), lengths.gather(1, order))


def check_request(
    vocabulary: int,
    bos: int,
    eos: int | None,
    *,
    max_len: int,
    beams: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
) -> None:
    """Refuse what `find` cannot do, before anything is computed. Arguments as in `find`; vocabulary is V.

    Raises:
        ValueError: what was expected, what was got, and the remedy.
    """
    for name, token in (("bos", bos), ("eos", eos)):
        if token is not None and not 0 <= token < vocabulary:
            raise ValueError(f"{name} must lie in 0 to {vocabulary - 1}, got {token}")
    check_sizes(max_len=max_len, beams=beams)
    if temperature is None and (top_k is not None or top_p is not None):
        raise ValueError(f"top_k and top_p must go with a temperature, got {top_k} and {top_p} without one")
    if temperature is not None and beams != 1:
        raise ValueError(f"beams must be 1 where tokens are drawn at a temperature, got {beams}")


def find(
    step: Step,
    start: Int[Tensor, " b"],
    state: Any,
    *,
    max_len: int,
    eos: int | None,
    beams: int,
    length_penalty: float,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Found:
    """What a model's `generate` does: `sample` at a temperature, `beam_search` without one. Arguments as theirs.

    Raises:
        TypeError, ValueError: as those raise them. What `check_request` refuses must be refused before.
    """
    if temperature is None:
        return beam_search(step, start, state, max_len=max_len, beams=beams, eos=eos, length_penalty=length_penalty)
    return sample(
        step,
        start,
        state,
        max_len=max_len,
        eos=eos,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
    )


def select_rows(state: Any, rows: Int[Tensor, " r"]) -> Any:
    """The state of these rows, in this order; a row may be taken more than once.

    Args:
        state: a Tensor with the rows first, a tuple, list or dict of states, an object with `select(rows)`, a number, a
            string or None. These last are given back as they are.
        rows: (R,) int64.

    Raises:
        TypeError: a state of another kind.
    """
    if isinstance(state, Tensor):
        return state.index_select(0, rows.to(state.device))
    if hasattr(state, "select"):
        return state.select(rows)
    if isinstance(state, dict):
        return {key: select_rows(value, rows) for key, value in state.items()}
    if isinstance(state, (tuple, list)):
        chosen = [select_rows(value, rows) for value in state]
        if hasattr(state, "_fields"):  # a NamedTuple
            return type(state)(*chosen)
        return tuple(chosen) if isinstance(state, tuple) else chosen
    if state is None or isinstance(state, (int, float, str)):
        return state
    raise TypeError(
        "state must be a Tensor with the rows first, a tuple, list or dict of states, or an object with select(rows), "
        f"got {type(state).__name__}"
    )


_penalty = length_penalty  # `beam_search` has an argument of that name


@torch.no_grad()
def _one_sequence(
    step: Step, start: Tensor, state: Any, max_len: int, eos: int | None, pick: Callable[[Tensor], Tensor]
) -> Found:
    """One sequence a row, each token picked from the log-probabilities after the one before."""
    _check_search(start, max_len, eos)
    _check_rows(state, len(start))
    finished = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    lengths, last, tokens, total = torch.zeros_like(finished, dtype=torch.long), start.long(), [], None
    for n in range(max_len):
        log_probs, state = step(last, state)
        log_probs = _checked(log_probs, len(start), eos, ~finished, n)
        if bool((log_probs[~finished].amax(-1) == -torch.inf).any()):
            raise ValueError(f"step must leave a token possible, got only -inf at step {n} for a row")
        last = pick(log_probs.masked_fill(finished[:, None], 0.0))
        gained = log_probs.gather(1, last[:, None])[:, 0].masked_fill(finished, 0.0)
        total = gained if total is None else total + gained
        lengths = lengths + ~finished
        if eos is not None:
            last = last.masked_fill(finished, eos)
            finished = finished | (last == eos)
        tokens.append(last)
        if bool(finished.all()):
            break
    assert total is not None  # max_len is 1 or more
    return Found(torch.stack(tokens, 1)[:, None], total[:, None], lengths[:, None])


def _highest(x: Tensor, k: int) -> Tensor:
    """The indices (B, k) of the k highest numbers of each row of x (B, C), the highest first; of equal ones the first.

    Which of equal numbers torch.topk gives is left open.
    """
    threshold = x.topk(k).values[:, -1:]
    above, equal = x > threshold, x == threshold
    chosen = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    index = chosen.nonzero()[:, 1].view(len(x), k)
    return index.gather(1, x.gather(1, index).argsort(dim=-1, descending=True, stable=True))


def _padded(x: Tensor, width: int, value: int | float | bool) -> Tensor:
    """x (B, w) with columns of value after it, up to the width."""
    return torch.cat([x, x.new_full((len(x), width - x.shape[1]), value)], 1)


def _check_search(start: object, max_len: int, eos: int | None) -> None:
    check_tensors({"start": start})
    assert isinstance(start, Tensor)
    if (
        start.ndim != 1
        or start.is_floating_point()
        or start.is_complex()
        or start.dtype == torch.bool
        or not len(start)
    ):
        raise ValueError(f"start must be integers (B,), one token a row, got {start.dtype} {tuple(start.shape)}")
    if max_len < 1:
        raise ValueError(f"max_len must be 1 or more, got {max_len}")
    if eos is not None and eos < 0:
        raise ValueError(f"eos must be the index of a token, 0 or more, got {eos}")


def _check_rows(state: Any, rows: int) -> None:
    """Refuse a state that holds a Tensor of another number of rows."""
    if isinstance(state, Tensor):
        if state.ndim == 0 or len(state) != rows:
            raise ValueError(f"state must have its {rows} rows first in every Tensor, got {tuple(state.shape)}")
    elif isinstance(state, dict):
        _check_rows(list(state.values()), rows)
    elif isinstance(state, (tuple, list)) and not hasattr(state, "select"):
        for value in state:
            _check_rows(value, rows)


def _checked(log_probs: object, rows: int, eos: int | None, going_on: Tensor, n: int) -> Tensor:
    """What `step` gave, in float32 or better; refused where it cannot be log-probabilities of a row that goes on."""
    if not isinstance(log_probs, Tensor):
        raise TypeError(f"step must return a Tensor of log-probabilities and a state, got {type(log_probs).__name__}")
    if log_probs.ndim != 2 or len(log_probs) != rows or not log_probs.is_floating_point():
        raise ValueError(
            f"step must return log-probabilities (R, V) for R = {rows} tokens, got {log_probs.dtype} "
            f"{tuple(log_probs.shape)}"
        )
    if eos is not None and eos >= log_probs.shape[-1]:
        raise ValueError(f"eos must lie in 0 to {log_probs.shape[-1] - 1}, got {eos}")
    highest = float(log_probs.amax(-1)[going_on].max())
    if math.isnan(highest):
        raise ValueError(f"step must return log-probabilities, got NaN at step {n}")
    if highest > 1e-2:  # rounding in half precision may give a little more than 0
        raise ValueError(
            f"step must return log-probabilities, none above 0, got {highest:.4g} at step {n}: take .log_softmax(-1)"
        )
    return at_least_float32(log_probs)
