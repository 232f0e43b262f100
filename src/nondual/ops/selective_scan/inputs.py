"""What passed the selective scan's door: what its engines take, checked and of one form."""

from typing import Any, NamedTuple

from torch import Tensor

from nondual.ops.discretize import Discretization


class Inputs(NamedTuple):
    """The arguments of `nondual.ops.selective_scan.selective_scan`, which fit together; the engines take these."""

    u: Tensor  # (B, L, D)
    delta: Tensor  # (B, L, D), before bias and softplus
    A: Tensor  # (D, N)
    B: Tensor  # (B, L, G, N), or (D, N) where it does not depend on time
    C: Tensor  # likewise
    D: Tensor | None  # (D,)
    z: Tensor | None  # (B, L, D)
    delta_bias: Tensor | None  # (D,)
    delta_softplus: bool
    state: Tensor | None  # (B, D, N)
    reset: Tensor | None  # (B, L), boolean
    discretization: Discretization

    def arguments(self) -> dict[str, Any]:
        """By name, what the compiled engines take: all but the discretisation, of which they know one."""
        return {name: value for name, value in zip(self._fields, self) if name != "discretization"}

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but the two options."""
        return (*self[:8], self.state, self.reset)
