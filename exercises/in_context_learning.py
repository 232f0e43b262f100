"""An exercise of the chapter on learning in context. Write what the function asks for, then: nox -s exercises"""

from torch import Tensor


def matrices(w0: Tensor, rate: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four matrices of a layer of linear attention that is one step of gradient descent from the weights w0.

    An example i is the token t_i = (x_i, y_i), a question is (x, 0). With q = W_q t, k = W_k t and v = W_v t the layer
    adds W_o Σ_i v_i (k_i · q) to each token, the sum going over the examples. Let Δw be one step of this size on half
    the sum of squares, 1/2 Σ_i (w · x_i - y_i)², from w0. Then the last number of each token should change by -Δw · x,
    where x are its first D numbers; and these should stay as they are. The chapter's layer does this for w0 = 0.

    Args:
        w0: (D,).
        rate: η, the size of the step.

    Returns:
        W_q, W_k, W_v and W_o, each (D + 1, D + 1).
    """
    raise NotImplementedError("let each value be what w0 still misses at its example, and each score be x_i · x")
