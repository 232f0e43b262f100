"""Exercises of the chapter on the GPT family. Write what each function asks for, then: nox -s exercises"""

from torch import Tensor


def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of decoding in one head: a new token attends to what was read before it, and to itself.

    Args:
        q: the new token's query (D,).
        k: its key (D,).
        v: its value (D,).
        keys: those of the n tokens before it, in order (n, D); n may be 0.
        values: likewise (n, D).

    Returns:
        (what the token takes in (D,), the keys for the next step (n + 1, D), the values (n + 1, D)).
    """
    raise NotImplementedError("put the new key and value last; weigh the values by the softmax of scaled scores")


def prefix_mask(n: int, prefix: int) -> Tensor:
    """Who may see whom: tokens of the prefix see all of it; a later one sees itself and what stands before it.

    Args:
        n: how many tokens there are.
        prefix: how many of them, from the beginning, are the prefix; from 0 to n.

    Returns:
        (n, n) of bool, rows are queries; True where attending is allowed.
    """
    raise NotImplementedError("a causal mask, or a key in the prefix")
