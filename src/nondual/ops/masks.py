"""Which query may attend to which key.

A mask is boolean and True where attending is allowed, as in torch's scaled_dot_product_attention and opposite to
nn.MultiheadAttention, whose boolean masks are True where attending is forbidden. Masks combine with `&`.

Symbols: N queries, M keys. Where N != M the queries are the last N of the M positions, as in decoding with a cache:
the last query sees every key. (torch's `is_causal` aligns the first query with the first key instead.)
"""

import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from nondual.ops.checks import check_tensors


def _positions(n: int, m: int | None, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """The position of each query (N, 1) and of each key (M,), counted from the first key."""
    m = n if m is None else m
    if n < 0 or m < 0:
        raise ValueError(f"n and m must be 0 or more, got n={n}, m={m}")
    return torch.arange(m - n, m, device=device)[:, None], torch.arange(m, device=device)


def causal(n: int, m: int | None = None, *, device: torch.device | str | None = None) -> Bool[Tensor, "n m"]:
    """Each query sees its own position and those before it.

        causal(3)     causal(2, 4)
        1 0 0         1 1 1 0
        1 1 0         1 1 1 1
        1 1 1

    Args:
        n: number of queries.
        m: number of keys; `n` where left out.
        device: where the mask is made.

    Returns:
        Bool (N, M), True where attending is allowed. With N > M the first N - M rows are all False.

    Raises:
        ValueError: a negative length.
    """
    query, key = _positions(n, m, device)
    return key <= query


def sliding_window(
    n: int, m: int | None = None, *, window: int, device: torch.device | str | None = None
) -> Bool[Tensor, "n m"]:
    """Each query sees the last `window` keys, its own included (fewer at the start, where there are no more).

        sliding_window(4, window=2)
        1 0 0 0
        1 1 0 0
        0 1 1 0
        0 0 1 1

    Args:
        n: number of queries.
        m: number of keys; `n` where left out.
        window: how many keys a query sees, 1 or more.
        device: where the mask is made.

    Returns:
        Bool (N, M), True where attending is allowed.

    Raises:
        ValueError: a window below 1, or a negative length.

    Source: Beltagy, Peters and Cohan 2020 (2004.05150), section 3.1, its causal half.
    """
    if window < 1:
        raise ValueError(f"window must be 1 or more (the query's own key counts), got {window}")
    query, key = _positions(n, m, device)
    return (key <= query) & (key > query - window)


def prefix(
    n: int, length: int | Integer[Tensor, " b"], *, device: torch.device | str | None = None
) -> Bool[Tensor, "n n"] | Bool[Tensor, "b 1 n n"]:
    """Each query sees the prefix whole, and after it what stands before the query: a causal mask with a square of ones.

        prefix(4, 2)
        1 1 0 0
        1 1 0 0
        1 1 1 0
        1 1 1 1

    Args:
        n: number of queries and of keys.
        length: how many positions the prefix has; or integers (B,), for each row of a batch.
        device: where the mask is made; where `length` is if that is a tensor.

    Returns:
        Bool (N, N), or (B, 1, N, N) for a length of each row, True where attending is allowed.

    Raises:
        ValueError: a negative length, or one that is not an integer or integers (B,).

    Source: Raffel et al. 2019 (1910.10683), section 3.2.1, "causal with prefix".
    """
    if isinstance(length, Tensor):
        check_integers("length", length)
        query, key = _positions(n, None, length.device)
        return (key <= query) | (key < length.long()[:, None, None, None])
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise ValueError(f"length must be an integer, 0 or more, or integers (B,), got {length!r}")
    query, key = _positions(n, None, device)
    return (key <= query) | (key < length)


def padding(lengths: Integer[Tensor, " b"], m: int) -> Bool[Tensor, "b 1 1 m"]:
    """Sequence b of a batch has `lengths[b]` real keys; what follows them is padding.

        padding(torch.tensor([2, 3]), 3)[:, 0, 0]
        1 1 0
        1 1 1

    Args:
        lengths: integers (B,) of any integer dtype, each from 0 to M.
        m: number of keys, the padded length.

    Returns:
        Bool (B, 1, 1, M), True on real keys; broadcasts over heads and queries.

    Raises:
        TypeError: `lengths` is not a tensor.
        ValueError: `lengths` is not a vector of integers.
    """
    check_integers("lengths", lengths)
    return (torch.arange(m, device=lengths.device) < lengths.long()[:, None])[:, None, None]


def check_integers(name: str, x: Tensor) -> None:
    """Refuse what is not a vector of integers, one for each row of a batch.

    Raises:
        TypeError: not a tensor.
        ValueError: another shape or dtype.
    """
    check_tensors({name: x})
    if x.is_complex() or x.ndim != 1 or x.is_floating_point() or x.dtype == torch.bool:
        raise ValueError(f"{name} must be integers (B,), got {x.dtype} {tuple(x.shape)}")
