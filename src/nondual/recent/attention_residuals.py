"""Attention residuals: each branch reads a softmax average over depth, weighted anew at every position.

Source: Kimi Team 2026, "Attention Residuals" (2603.15031): the full form, and the form by blocks. Symbols: f_i what
branch i adds (B, N, E), attention and feed-forward networks counted alike; v_0 the embeddings; w_i a learned vector
(E,), the pseudo-query of branch i, the same for every token:

    v_i = f_i(h_i)                                          i = 1 ... M
    h_i = sum of a[i, j] v_j over j < i,                    a[i, j] = softmax over j of w_i · RMSNorm(v_j)

The average of all after the last branch, h_(M + 1), has a query of its own. By blocks of S branches, what the branches
of one block give is added up, and attention is over these sums: after the last whole block, the sum so far. S = 1 is
the full form.

The keys depend on the token, so the weights do, unlike DenseFormer's. All queries start at 0, so that each average is
the plain mean. Of a mean the norm in each branch makes the same as of a sum, so the model starts as the plain stream.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nondual.connections import LayerCall, branches_of, check_width
from nondual.ops.autocast import autocast_off
from nondual.ops.checks import check_sizes
from nondual.ops.dtypes import at_least_float32


class DepthAttention(nn.Module):
    """One learned query over what was given at several depths, whose keys are the same vectors, normed by `keys_of`.

    Args:
        d_model: width E.
    """

    query: nn.Parameter
    key_scale: nn.Parameter

    def __init__(self, d_model: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(d_model))
        self.key_scale = nn.Parameter(torch.ones(d_model))  # of the norm, for all keys that this query meets

    # --8<-- [start:average]
    def forward(self, vectors: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
        """The average of the vectors by `weights`.

        Args:
            vectors: one or more (B, N, E).
            keys: of each, (B, N, E).

        Raises:
            ValueError: no vectors, or another number of keys.
        """
        if not vectors or len(vectors) != len(keys):
            got = f"got {len(vectors)} and {len(keys)}"
            raise ValueError(f"vectors must be one or more with a key for each, {got}")
        weights = self.weights(keys)[..., None]  # (L, B, N, 1)
        mean = weights[0] * vectors[0]
        for weight, vector in zip(weights[1:], vectors[1:]):
            mean = torch.addcmul(mean, weight, vector)
        return mean

    def weights(self, keys: Sequence[Tensor]) -> Float[Tensor, "l *shape"]:
        """How much each of L vectors counts at each position: (L, B, N), sums of 1 over L.

        Args:
            keys: L of (B, N, E).
        """
        query = (self.query * self.key_scale).to(keys[0].dtype)
        with autocast_off(query.device.type):
            return torch.stack([key @ query for key in keys]).softmax(0)

    # --8<-- [end:average]

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, vectors: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor: ...


def keys_of(vectors: Float[Tensor, "*b e"], eps: float = 1e-6) -> Float[Tensor, "*b e"]:
    """Vectors divided by the root of their mean square, (..., E).

    Args:
        vectors: (..., E).
        eps: added to the mean square.
    """
    return F.rms_norm(vectors, vectors.shape[-1:], eps=eps)


class AttentionResiduals(nn.Module):
    """Attention over depth, as a connection: CausalLM(..., connection=AttentionResiduals(d_model, n_branches)).

    The layers must be pre-norm.

    Args:
        d_model: width E.
        n_branches: M, of all layers together: two for each `TransformerLayer`, one for each `MixerBlock`.
        block: S, how many branches are added up before attention is over their sum; 1 for the full form.
        eps: added to the mean square in the norm of the keys.

    Raises:
        ValueError: d_model, n_branches or block below 1.
    """

    d_model: int
    n_branches: int
    block: int
    eps: float
    averages: nn.ModuleList

    def __init__(self, d_model: int, n_branches: int, *, block: int = 1, eps: float = 1e-6):
        super().__init__()
        check_sizes(d_model=d_model, n_branches=n_branches, block=block)
        self.d_model = d_model
        self.n_branches, self.block, self.eps = n_branches, block, eps
        # One after each branch. The first branch has the embeddings alone to read; the last average is of all.
        self.averages = nn.ModuleList(DepthAttention(d_model) for _ in range(n_branches))

    def forward(self, x: Float[Tensor, "b n e"], layers: Sequence[LayerCall]) -> Float[Tensor, "b n e"]:
        """The embeddings (B, N, E) through the branches of the layers, and the average of all at the end.

        Args:
            x: (B, N, E).
            layers: of one forward pass, in order.

        Raises:
            ValueError: another width, another number of branches, or layers that cannot be taken apart.
        """
        check_width(x, self.d_model)
        # --8<-- [start:branches]
        reads = x
        vectors, keys = [at_least_float32(x)], [keys_of(at_least_float32(x), self.eps)]
        branches = branches_of(layers, self.n_branches)
        for i, (branch, average) in enumerate(zip(branches, self.averages)):
            added = at_least_float32(branch(reads))
            if i % self.block:  # within a block: one sum
                added = vectors.pop() + added
                keys.pop()
            vectors.append(added)
            keys.append(keys_of(added, self.eps))
            reads = average(vectors, keys).to(x.dtype)
        return reads
        # --8<-- [end:branches]

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor, layers: Sequence[LayerCall], /) -> Tensor: ...
