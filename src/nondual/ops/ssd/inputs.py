"""What passed the door of state space duality: what its engines take, checked and of one form."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The arguments of `nondual.ops.ssd.ssd`, which fit together; the engines take these.

    Attributes:
        x: input (B, L, H, P).
        delta: step lengths (B, L, H), before bias and softplus.
        A: (H,).
        B: (B, L, G, N), where the caller's may be (B, L, N).
        C: in the shape of B.
        D: skip (H,) or (H, P).
        z: gate (B, L, H, P), before its SiLU.
        delta_bias: (H,), added to delta.
        delta_softplus: take the softplus of delta then.
        state: the state before the first step (B, H, P, N); None for zero.
        reset: (B, L), True where a sequence begins and all that came before is forgotten.
        chunk: steps of a chunk; None for the engine's own.
    """

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    state: Tensor | None
    reset: Tensor | None
    chunk: int | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but the two options."""
        return (*self[:8], self.state, self.reset)
