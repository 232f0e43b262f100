"""An exercise of the chapter on additive attention. Write what the function asks for, then: nox -s exercises"""

from torch import Tensor


def read(s: Tensor, h: Tensor, real: Tensor, w_s: Tensor, w_h: Tensor, v: Tensor) -> Tensor:
    """What a decoder reads from an encoder's states, by additive attention.

    The score of question i for state j is v · tanh(w_s @ s[i] + w_h @ h[j]).

    Args:
        s: the decoder's states, which ask, (N, S).
        h: the encoder's states, (M, H); the last ones may be padding.
        real: bool (M,), False where a state of h is padding, which no question may read. At least one is True.
        w_s: (A, S).
        w_h: (A, H).
        v: (A,).

    Returns:
        The contexts, (N, H): for each question the mean of h, weighted by the softmax of its scores.
    """
    raise NotImplementedError("score every pair, set the scores of padding to -inf, and weigh the states")
