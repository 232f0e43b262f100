"""Exercises of the chapter on continuous self-attention. Write what each function asks for, then: nox -s exercises"""

from torch import Tensor


def antisymmetric_share(w_q: Tensor, w_k: Tensor) -> float:
    """How much of a head's circuit M = W_Q W_Kᵀ is antisymmetric: |A|² / |M|², by Frobenius norms.

    Args:
        w_q: (E, D).
        w_k: (E, D).

    Returns:
        Between 0 and 1.
    """
    raise NotImplementedError("M = S + A, where S is its own transpose and A is minus its own transpose")


def step(g: Tensor, w_q: Tensor, w_k: Tensor, size: float) -> Tensor:
    """One step of a flow without a norm: g less size times the gradient of the energy of one head.

    The energy is -1/β Σ_i log Σ_j exp(β q_i · k_j), with q = g W_Q, k = g W_K and β = 1/√D.

    Args:
        g: (N, E).
        w_q: (E, D).
        w_k: (E, D).
        size: of the step.

    Returns:
        (N, E).
    """
    raise NotImplementedError("each token is moved twice: because it asks, and because it is asked")
