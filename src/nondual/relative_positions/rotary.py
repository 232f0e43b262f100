"""Rotary positions: each pair of a head's numbers is turned by an angle that grows with the place.

A query at place p and a key at place s then have the score that they would have p - s steps apart, wherever they stand.
Source: Su et al. 2021 (2104.09864), section 3.2.2 and equation 34; position interpolation: Chen et al. 2023
(2306.15595), section 3; NTK-aware scaling and YaRN: Peng et al. 2023 (2309.00071), sections 3.1, 3.2 and 3.4.
Symbols: B batch, H heads, N places, D head width, R the numbers of a head that are turned, in R/2 pairs.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nondual.ops.checks import check_tensors
from nondual.ops.dtypes import accumulation_dtype
from nondual.relative_positions.protocol import RelativePositions, check_start
from nondual.token_ids import has_values

Order = Literal["half", "interleaved"]
Scaling = Literal["linear", "ntk", "yarn"]


@dataclass(frozen=True)
class Rotary(RelativePositions):
    """Turn pair i at place p by the angle p · base^(-2 i / R); it has no parameters.

        MultiHeadAttention(64, 4, positions=Rotary(16))                       # as in Llama
        MultiHeadAttention(64, 4, positions=Rotary(16, order="interleaved"))  # as in the paper, GPT-J and llama.cpp
        MultiHeadAttention(64, 4, positions=Rotary(16, n_turned=4))           # a part of each head, as in GPT-NeoX

    Angles are in float32 or better, whatever the dtype of x. At place p they are off by up to p · 6e-8 in float32.

    Scaling serves texts of `factor` times the length that a model was trained at. "linear" divides all places by the
    factor. "ntk" raises the base, so that the slowest pair is slowed by the factor and the fastest is not. "yarn"
    divides the places for the pairs that turn less than once in trained_length, keeps them for those that turn 32 times
    or more, and mixes the two between; it also multiplies what is turned by 0.1 ln(factor) + 1, so that weights keep
    their sharpness.

    Attributes:
        d_head: D.
        base: of the angles; the larger, the slower the pairs turn.
        order: which numbers are a pair: "half", i and i + R/2; "interleaved", 2 i and 2 i + 1.
        n_turned: R, how many numbers of each head are turned, from the first on; D where None.
        scaling: None, "linear", "ntk" or "yarn".
        factor: how many times longer the texts are than those of training; for scaling.
        trained_length: how long those of training were; for "yarn".

    Raises:
        ValueError: an R that is odd or not in 2 to D, a base not above 1, an unknown order or scaling, a factor not
            above 0, a factor without scaling, or a trained_length that is missing or has no use.
    """

    d_head: int
    base: float = 10000.0
    order: Order = "half"
    n_turned: int | None = None
    scaling: Scaling | None = None
    factor: float = 1.0
    trained_length: int | None = None

    def __post_init__(self) -> None:
        turned = self.turned
        if turned % 2 or not 2 <= turned <= self.d_head:
            name = "d_head" if self.n_turned is None else "n_turned"
            raise ValueError(
                f"{name} must be even, for pairs, and lie in 2 to d_head={self.d_head}, got {turned}"
                + ("; or give n_turned" if self.n_turned is None else "")
            )
        if not self.base > 1:
            raise ValueError(f"base must be above 1, got {self.base}")
        _check_order(self.order)
        if self.scaling not in (None, "linear", "ntk", "yarn"):
            raise ValueError(f"scaling must be None, 'linear', 'ntk' or 'yarn', got {self.scaling!r}")
        if not 0 < self.factor < math.inf:
            raise ValueError(f"factor must be above 0 and finite, got {self.factor}")
        if self.scaling is None and self.factor != 1:
            raise ValueError(f"factor must go with scaling='linear', 'ntk' or 'yarn', got {self.factor} alone")
        if (self.scaling == "yarn") != (self.trained_length is not None):
            raise ValueError(f"trained_length must go with scaling='yarn', got {self.trained_length}, {self.scaling!r}")
        if self.trained_length is not None and self.trained_length < 1:
            raise ValueError(f"trained_length must be 1 or more, got {self.trained_length}")
        if self.scaling == "ntk" and turned < 4:
            raise ValueError(f"scaling='ntk' needs 2 pairs or more, the fastest and the slowest, got {turned} numbers")

    @property
    def turned(self) -> int:
        """R, how many numbers of each head are turned."""
        return self.d_head if self.n_turned is None else self.n_turned

    @property
    def temperature(self) -> float:
        """What turned numbers are multiplied by: 1, or YaRN's 0.1 ln(factor) + 1, of both q and k."""
        return 0.1 * math.log(self.factor) + 1 if self.scaling == "yarn" and self.factor > 1 else 1.0

    def frequencies(
        self, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Float[Tensor, " pairs"]:
        """The angle by which each pair turns from one place to the next, (R/2,), from the fastest to the slowest.

        Args:
            dtype: of the result.
            device: where it is made.
        """
        r, base = self.turned, self.base
        pair = torch.arange(r // 2, dtype=dtype, device=device)  # i = 0 to R/2 - 1
        # --8<-- [start:scaling]
        if self.scaling == "ntk":
            base = base * self.factor ** (r / (r - 2))
        steps = 1 / base ** (2 * pair / r)  # (R/2,)
        if self.scaling == "linear":
            return steps / self.factor
        if self.scaling == "yarn":
            first, last = self._mixed_pairs()
            slowed = ((pair - first) / (last - first)).clamp(0, 1)
            return steps * (1 - slowed) + steps / self.factor * slowed
        # --8<-- [end:scaling]
        return steps

    def _mixed_pairs(self) -> tuple[float, float]:
        """The pairs between which YaRN goes from turning as before to turning slower by the factor."""
        assert self.trained_length is not None
        trained = self.trained_length

        def pair_that_turns(times: float) -> float:
            longest = trained / (times * 2 * math.pi)  # so many places for one turn
            return self.turned * math.log(longest) / (2 * math.log(self.base))

        first, last = max(math.floor(pair_that_turns(32.0)), 0), min(math.ceil(pair_that_turns(1.0)), self.turned - 1)
        return float(first), float(last) if last != first else last + 0.001

    def turn(self, x: Float[Tensor, "b h n d"], start: int = 0) -> Float[Tensor, "b h n d"]:
        """x (B, H, N, D) at the places start to start + N - 1, turned, in x's dtype.

        Args:
            x: queries or keys, of any number of heads.
            start: the place of the first of them.

        Raises:
            TypeError: x is not a Tensor.
            ValueError: x of another rank or width, or a negative start.
        """
        check_tensors({"x": x})
        if x.ndim != 4 or x.shape[-1] != self.d_head:
            raise ValueError(f"x must be (B, H, N, {self.d_head}), got {tuple(x.shape)}")
        check_start(start)
        wide, n, r = accumulation_dtype(x.dtype), x.shape[2], self.turned
        if x.device.type == "cpu" and has_values(x):
            cos, sin = _kept_tables(self, start, n, wide, torch.is_inference_mode_enabled())
        else:
            cos, sin = _tables(self, start, n, wide, x.device)
        # --8<-- [start:turn]
        given = x.to(wide)
        if r == self.d_head:
            partners = _exchanged(given, self.order)
        else:
            partners = F.pad(_exchanged(given[..., :r], self.order), (0, self.d_head - r))
        # Of each pair (a, b): a cos - b sin, b cos + a sin. The minus is in the table of sines.
        turned = torch.addcmul(given * cos, partners, sin)
        # --8<-- [end:turn]
        return turned.to(x.dtype)  # with the strides of x, as a program for ONNX needs

    def refuses(self, n_heads: int, d_head: int) -> str | None:
        """Another head width."""
        return None if d_head == self.d_head else f"positions must be Rotary({d_head}), of the head width, got {self}"


def _tables(
    rotary: Rotary, start: int, n: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """What numbers and their partners are multiplied by at each of n places, (N, D) both, times the temperature."""
    # --8<-- [start:angles]
    places = torch.arange(start, start + n, dtype=dtype, device=device)
    angles = places[:, None] * rotary.frequencies(dtype=dtype, device=device)  # (N, R/2)
    cos, sin = rotary.temperature * angles.cos(), rotary.temperature * angles.sin()
    cos, sin = _joined(cos, cos, rotary.order), _joined(-sin, sin, rotary.order)  # (N, R)
    rest = (0, rotary.d_head - rotary.turned)  # numbers that are not turned: cos 1, sin 0
    return F.pad(cos, rest, value=1.0), F.pad(sin, rest)
    # --8<-- [end:angles]


@lru_cache(maxsize=2)
def _kept_tables(rotary: Rotary, start: int, n: int, dtype: torch.dtype, inference_mode: bool) -> tuple[Tensor, Tensor]:
    """The tables on the CPU, made once for all layers, which turn queries and keys at the same places.

    Those made in inference mode cannot be saved for backward, and so are kept apart.
    """
    return _tables(rotary, start, n, dtype, "cpu")


def reorder_pairs(
    rows: Float[Tensor, "rows *rest"], n_heads: int, order: Order, *, n_turned: int | None = None
) -> Float[Tensor, "rows *rest"]:
    """Rows of a projection of queries or keys, made for the other order of pairs, in this one: the scores stay.

    Args:
        rows: a weight (heads · D, E) or a bias (heads · D,).
        n_heads: how many heads it has.
        order: "half" or "interleaved": the order that the rows are brought into.
        n_turned: R, how many numbers of each head are turned; D where left out.

    Returns:
        Of rows' shape and dtype.

    Raises:
        TypeError: rows is not a Tensor.
        ValueError: an unknown order, rows that are not n_heads times D, or an R that is odd or not in 0 to D.
    """
    check_tensors({"rows": rows})
    _check_order(order)
    if rows.ndim < 1 or n_heads < 1 or rows.shape[0] % n_heads:
        raise ValueError(f"rows must be (n_heads · D, ...), got {tuple(rows.shape)} and n_heads={n_heads}")
    d_head = rows.shape[0] // n_heads
    turned = d_head if n_turned is None else n_turned
    if turned % 2 or not 0 <= turned <= d_head:
        raise ValueError(f"n_turned must be even, for pairs, and lie in 0 to {d_head}, got {turned}")
    heads = rows.unflatten(0, (n_heads, d_head)).movedim(1, -1)  # (heads, ..., D)
    other: Order = "interleaved" if order == "half" else "half"
    joined = _joined(*_pairs(heads[..., :turned], other), order)
    return torch.cat([joined, heads[..., turned:]], -1).movedim(-1, 1).flatten(0, 1)


def _pairs(x: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """The first and the second numbers of all pairs (..., R/2) each, of (..., R)."""
    if order == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _exchanged(x: Tensor, order: Order) -> Tensor:
    """The two numbers of each pair in each other's place, (..., R)."""
    if order == "interleaved":
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x.roll(x.shape[-1] // 2, -1)


def _joined(a: Tensor, b: Tensor, order: Order) -> Tensor:
    """What `_pairs` took apart, together again (..., R)."""
    return torch.stack([a, b], -1).flatten(-2) if order == "interleaved" else torch.cat([a, b], -1)


def _check_order(order: str) -> None:
    if order not in ("half", "interleaved"):
        raise ValueError(f"order must be 'half' or 'interleaved', got {order!r}")
