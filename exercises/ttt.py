"""Exercises of the chapter on test-time training. Write what each function asks for, then: nox -s exercises"""

from torch import Tensor


def dual(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, w: Tensor) -> Tensor:
    """What one mini-batch of test-time training reads, by a few matrix products and without a loop.

    The inner model is one matrix, f(x) = x W, without bias, norm or residual path. Token s has the gradient
    k_sᵀ (k_s W - v_s), a (D, D) matrix, of the loss ½|k_s W - v_s|², at the weights W = w that the mini-batch begins
    with. Token t is read after its own step:

        W_t = w - Σ_{s ≤ t} rate_s k_sᵀ (k_s w - v_s)        out_t = q_t W_t

    Args:
        q: (N, D), the tokens of the mini-batch as rows.
        k: (N, D).
        v: (N, D).
        rate: (N,), one for each token.
        w: (D, D).

    Returns:
        (N, D), row t being out_t. No W_t is needed for it.
    """
    raise NotImplementedError("put W_t into q_t W_t, and sort: a product with w, and weights (N, N) on the errors")
