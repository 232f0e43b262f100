"""Where a token stands: a vector for each position, added to the token's own.

The sinusoidal code of the transformer, and the learned table of BERT, GPT-2 and ViT. Positions that act inside
attention are in `nondual.relative_positions`; their names can be taken from here too.

Source: Vaswani et al. 2017 (1706.03762), section 3.5; Gehring et al. 2017 (1705.03122), section 3.1; Devlin et al. 2018
(1810.04805), section 3. Symbols: N positions, E model width, p a position.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from nondual.mixers import check_reset, sequence_starts
from nondual.ops.checks import check_tensors
from nondual.ops.dtypes import accumulation_dtype
from nondual.relative_positions import ALiBi as ALiBi
from nondual.relative_positions import RelativeBias as RelativeBias
from nondual.relative_positions import RelativePositions as RelativePositions
from nondual.relative_positions import Rotary as Rotary
from nondual.relative_positions import reorder_pairs as reorder_pairs
from nondual.token_ids import has_values


@dataclass(eq=False)
class PositionCache:
    """Where a text stands that is read in parts.

    Attributes:
        length: how many positions were read.
        start: (B,), the position at which each row's present sequence began; None while all began at 0.
    """

    length: int = 0
    start: Integer[Tensor, " b"] | None = None

    def select(self, rows: Integer[Tensor, " r"]) -> "PositionCache":
        """A cache of its own for these rows of the batch, in this order; a row may be taken more than once."""
        return PositionCache(self.length, None if self.start is None else self.start[rows])


class AddedPositions(nn.Module):
    """A vector for each position, added to the token's own. A subclass has `at` and sets d_model.

    Attributes:
        d_model: width E.
    """

    d_model: int

    @property
    def longest(self) -> int | None:
        """How many positions there are; None where there is no end, unless a subclass says otherwise."""
        return None

    def at(self, index: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape e"]:
        """The vectors of positions that are known to be there."""
        raise NotImplementedError(f"{type(self).__name__} must have a method at(index)")

    def forward(self, n: int, *, start: int = 0) -> Float[Tensor, "n e"]:
        """The vectors of positions start to start + n - 1, shape (N, E).

        Args:
            n: how many positions, N.
            start: the first of them.

        Raises:
            ValueError: a negative position, or one past the last.
        """
        self._check(n, start)
        device = next((x.device for x in [*self.parameters(), *self.buffers()]), None)
        return self.at(torch.arange(start, start + n, device=device))

    def of_sequences(
        self,
        ids: Integer[Tensor, "b n"],
        *,
        cache: PositionCache | None = None,
        reset: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "n e"] | Float[Tensor, "b n e"]:
        """The vector of each token's position in its own sequence, to be added to the tokens' embeddings.

        Args:
            ids: (B, N), of which the shape counts and the device.
            cache: what was read before ids; it is brought up to date.
            reset: True where a packed sequence begins: its positions count from 0.

        Returns:
            (N, E) where all rows stand alike, else (B, N, E).

        Raises:
            TypeError: cache is not a PositionCache, or reset not a Tensor.
            ValueError: a reset that does not fit, a cache that marks sequences of another batch, or a position past
                the last.
        """
        if cache is not None and not isinstance(cache, PositionCache):
            raise TypeError(f"cache must begin with a PositionCache, from new_cache, got {type(cache).__name__}")
        if reset is not None:
            check_reset(reset, ids)
        batch, n = ids.shape
        length, start = (0, None) if cache is None else (cache.length, cache.start)
        if start is not None and len(start) != batch:
            raise ValueError(f"cache must be of ids' batch {batch}, got one of {len(start)}")
        starts = sequence_starts(reset, n, length=length, start=start)
        if starts is None:
            vectors = self(n, start=length)
        else:
            index = torch.arange(length, length + n, device=starts.device) - starts
            if self.longest is not None and has_values(index) and index.numel() and int(index.max()) >= self.longest:
                raise ValueError(
                    f"positions must lie in 0 to {self.longest - 1}, got {int(index.max())}: "
                    "shorten the input or make the table longer"
                )
            vectors = self.at(index)
        if cache is not None:
            cache.length, cache.start = length + n, cache.start if starts is None or not n else starts[:, -1]
        return vectors

    def new_cache(self) -> PositionCache:
        """Of a text of which nothing was read."""
        return PositionCache()

    def _check(self, n: int, start: int) -> None:
        if self.longest is None:
            if start < 0 or n < 0:
                raise ValueError(f"positions must be 0 or more, got {n} from {start}")
        elif start < 0 or n < 0 or start + n > self.longest:
            raise ValueError(
                f"positions must lie in 0 to {self.longest - 1}, "
                f"got {n} from {start}: shorten the input or make the table longer"
            )

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, n: int, *, start: int = 0) -> Tensor: ...


class LearnedPositions(AddedPositions):
    """One learned vector for each of `max_len` positions.

    Args:
        max_len: how many positions there are.
        d_model: width E.
    """

    max_len: int
    d_model: int
    table: nn.Embedding

    def __init__(self, max_len: int, d_model: int):
        super().__init__()
        self.table = nn.Embedding(max_len, d_model)
        self.max_len, self.d_model = max_len, d_model

    @property
    def longest(self) -> int:
        """How many positions there are."""
        return self.max_len

    def at(self, index: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape e"]:
        """The rows of the table at these positions."""
        return self.table(index)


class Sinusoidal(AddedPositions):
    """The code of Vaswani et al. 2017: sines and cosines of E/2 wavelengths, at any position, with nothing to learn.

        PE(p, 2i) = sin(p / base^(2i/E))      PE(p, 2i + 1) = cos(p / base^(2i/E))      i = 0 to E/2 - 1

    The code k steps on is the code turned by a rotation that depends on k alone. Every vector has the length √(E/2).
    The paper multiplies the tokens' embeddings by √E before it adds the code, so that both are of a size. `CausalLM`
    does not, and starts with embeddings of standard deviation 0.02: scale=0.02 · √2 there gives the code their size.

    Angles are in float64 where the device has it. The code is in float32, or in float64 once the module is.

    Args:
        d_model: width E, even.
        base: the wavelengths go from 2π to 2π · base^((E - 2)/E).
        scale: what the code is multiplied by.

    Raises:
        ValueError: an E that is odd or below 2, or a base not above 1.
    """

    d_model: int
    base: float
    scale: float
    like: Tensor

    def __init__(self, d_model: int, *, base: float = 10000.0, scale: float = 1.0):
        super().__init__()
        if d_model < 2 or d_model % 2:
            raise ValueError(f"d_model must be even and 2 or more, a sine and a cosine each, got {d_model}")
        if not base > 1:
            raise ValueError(f"base must be above 1, got {base}")
        self.d_model, self.base, self.scale = d_model, base, scale
        self.register_buffer("like", torch.empty(0), persistent=False)  # it says the dtype and the device

    @property
    def wavelengths(self) -> Float[Tensor, " pairs"]:
        """After how many positions each sine and cosine comes again, (E/2,) in float64, from the shortest."""
        return 2 * math.pi * self.base ** (torch.arange(0, self.d_model, 2, dtype=torch.float64) / self.d_model)

    def at(self, index: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape e"]:
        """The code of each position, of any shape; it may be negative, or no whole number.

        Raises:
            TypeError: index is not a Tensor.
        """
        check_tensors({"index": index})
        wide = torch.float32 if index.device.type == "mps" else torch.float64
        # --8<-- [start:sinusoidal]
        e = self.d_model
        i2 = torch.arange(0, e, 2, dtype=wide, device=index.device)  # 2i, (E/2,)
        angles = index.to(wide)[..., None] / self.base ** (i2 / e)  # (..., E/2)
        code = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)  # (..., E)
        # --8<-- [end:sinusoidal]
        return (self.scale * code).to(accumulation_dtype(self.like.dtype))

    def extra_repr(self) -> str:
        """How it was made."""
        return f"{self.d_model}, base={self.base}, scale={self.scale}"
