"""What passed the door of state space duality: what its engines take, checked and of one form."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The arguments of `nondual.ops.ssd.ssd`, which fit together; the engines take these."""

    x: Tensor  # (B, L, H, P)
    delta: Tensor  # (B, L, H), before bias and softplus
    A: Tensor  # (H,)
    B: Tensor  # (B, L, G, N)
    C: Tensor  # (B, L, G, N)
    D: Tensor | None  # (H,) or (H, P)
    z: Tensor | None  # (B, L, H, P)
    delta_bias: Tensor | None  # (H,)
    delta_softplus: bool
    state: Tensor | None  # (B, H, P, N)
    reset: Tensor | None  # (B, L), boolean
    chunk: int | None  # steps of a chunk; None for the engine's own

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but the two options."""
        return (*self[:8], self.state, self.reset)
