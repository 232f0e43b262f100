"""Feature maps of linear attention: φ(q) · φ(k) in the place of exp(q · k), so that the sum over keys can come first.

    softmax    out_t = Σ_s exp(q_t · k_s) v_s / Σ_s exp(q_t · k_s)
    linear     out_t = (Σ_s v_s φ(k_s)ᵀ) φ(q_t) / (Σ_s φ(k_s)) · φ(q_t)

Each map takes x (…, D) to (…, F). `elu_plus_one` and `torch.relu` are positive, and are no more than that;
`PositiveRandomFeatures` and `Taylor` come near the exponential. Linear attention without a feature map has `identity`,
whose weights may be negative, so that their sum is no normaliser.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nondual.ops.autocast import autocast_off
from nondual.ops.dtypes import at_least_float32


# --8<-- [start:elu]
def elu_plus_one(x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """elu(x) + 1: x + 1 above 0, exp(x) below; always positive.

    Taken as exp(min(x, 0)) + max(x, 0), and not as `F.elu(x) + 1`: that is exp(x) - 1 + 1, which in bfloat16 is exactly
    0 below about -6.

    Source: Katharopoulos et al. 2020 (2006.16236), equation 7.
    """
    return x.clamp(max=0).exp() + x.relu()


# --8<-- [end:elu]


def identity(x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """x itself, as retention and the delta rule have it."""
    return x


class PositiveRandomFeatures(nn.Module):
    """Random features whose products are exp(q · k / √D) on average, each of them positive (FAVOR+).

        φ(x)_i = exp(w_i · y - |y|²/2) / √F,   y = x / D^¼,   w_i normal

    The rows w_i are drawn once, and never trained. The relative error of a product falls as 1/√F, and grows with the
    length of q + k, exponentially, so that long queries and keys need many features. Rows that are orthogonal within
    each block of D have a smaller error than independent ones.

    Computed in float32 or better. The exponent is at most |w_i|²/2, about D/2, so that nothing overflows; the released
    code subtracts a running maximum instead, which a state cannot follow.

    Source: Choromanski et al. 2020 (2009.14794), lemma 1 and section 2.4.

    Args:
        d_head: D.
        n_features: F; D where left out.
        orthogonal: whether rows are orthogonal in blocks of D.
        seed: of the rows.

    Raises:
        ValueError: a size below 1.
    """

    rows: Tensor

    def __init__(self, d_head: int, n_features: int | None = None, *, orthogonal: bool = True, seed: int = 0):
        super().__init__()
        n_features = d_head if n_features is None else n_features
        if d_head < 1 or n_features < 1:
            raise ValueError(f"d_head and n_features must be 1 or more, got {d_head} and {n_features}")
        draw = torch.Generator().manual_seed(seed)
        rows = torch.randn(n_features, d_head, generator=draw, dtype=torch.float64)
        if orthogonal:
            blocks = torch.randn(-(-n_features // d_head), d_head, d_head, generator=draw, dtype=torch.float64)
            Q, R = torch.linalg.qr(blocks)
            Q = Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # else some directions would be likelier than others
            directions = Q.flatten(0, 1)[:n_features]
            rows = directions * rows.norm(dim=1, keepdim=True)  # orthogonal, and as long as independent ones
        self.register_buffer("rows", rows.to(torch.get_default_dtype()))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... f"]:
        """x (…, D) -> (…, F), in float32 or better, under autocast too."""
        y = at_least_float32(x) / x.shape[-1] ** 0.25
        with autocast_off(y.device.type):  # it would multiply in half precision
            # --8<-- [start:random]
            exponent = y @ self.rows.to(y.dtype).T - y.square().sum(-1, keepdim=True) / 2
            return exponent.exp() / math.sqrt(len(self.rows))
            # --8<-- [end:random]


class Taylor(nn.Module):
    """The 1 + D + D² features of 1 + s + s²/2 with s = q · k/√D, the exponential's Taylor series to second order.

    The sum is never below 1/2, so that it can be normalised. It is close to the exponential where |s| is below 1.

    Source: Arora et al. 2024 (2402.18668), section 4.1 (Based), which keeps D at 16.
    """

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... f"]:
        """x (…, D) -> (…, 1 + D + D²), in float32 or better."""
        y = at_least_float32(x) / x.shape[-1] ** 0.25
        pairs = (y[..., :, None] * y[..., None, :]).flatten(-2) / math.sqrt(2)
        return torch.cat([torch.ones_like(y[..., :1]), y, pairs], -1)
