"""Hyper-connections: n residual streams side by side, and learned maps by which a branch reads and writes them.

Sources: Zhu et al. 2024 (2409.19606), section 2 and algorithms 1 and 2: static and dynamic maps. Xie et al. 2025, mHC
(2512.24880), section 4, equations 7 to 9: maps whose mixing matrix is doubly stochastic. Symbols: H (B, N, n, E), the
streams; T a branch, attention or a feed-forward network with its norm. Of each branch: read (n,), A_m in the paper;
mix (n, n), A_r; write (n,), B. All streams start as the embeddings:

    h = sum of read_i H_i over i                        what the branch reads, (B, N, E)
    H_j = sum of mix_ij H_i over i, + write_j T(h)      the streams after it

and the model goes on from their mean. (The papers take their sum, which the last norm makes the same.)

Static maps are the same for every token. Dynamic ones have a part that is computed from the streams at each position.
Branch k starts by reading stream k mod n, mixing nothing and writing to all, so that all streams are the plain one.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nondual.connections import LayerCall, branches_of, check_width
from nondual.ops.autocast import autocast_off
from nondual.ops.checks import check_sizes
from nondual.ops.dtypes import at_least_float32
from nondual.weights import only_a_weight


class Maps(NamedTuple):
    """How one branch reads and writes n streams: read (..., n), mix (..., n, n), write (..., n).

    Of static maps they have no further axes, of dynamic ones those of the positions, (B, N).
    """

    read: Tensor
    mix: Tensor
    write: Tensor


class StaticMaps(nn.Module):
    """Maps that do not depend on the token: n (n + 2) numbers for each branch.

    Args:
        d_model: width E, which these maps do not need.
        n: how many streams.
        k: which branch it is, from 0.
    """

    no_weight_decay: ClassVar[tuple[str, ...]] = ("mix",)  # it starts at the identity, not at 0

    read: nn.Parameter
    mix: nn.Parameter
    write: nn.Parameter

    def __init__(self, d_model: int, n: int, k: int):
        super().__init__()
        self.read = nn.Parameter(F.one_hot(torch.tensor(k % n), n).float())
        self.mix, self.write = nn.Parameter(torch.eye(n)), nn.Parameter(torch.ones(n))

    def forward(self, streams: Float[Tensor, "b n_positions n e"]) -> Maps:
        """The maps; the streams (B, N, n, E) only tell the dtype."""
        return Maps(*(x.to(streams.dtype) for x in (self.read, self.mix, self.write)))


class DynamicMaps(StaticMaps):
    """Static maps, and added to them numbers between -s and s that are computed from the streams at each position.

    s is learned, one for reading and mixing and one for writing, and starts at 0.01; what it multiplies is
    tanh(LayerNorm(H) W), and W starts at 0.

    Args:
        d_model: width E.
        n: how many streams.
        k: which branch it is, from 0.
    """

    norm: nn.LayerNorm
    project: nn.Linear
    scale: nn.Parameter

    def __init__(self, d_model: int, n: int, k: int):
        super().__init__(d_model, n, k)
        self.norm = nn.LayerNorm(d_model)
        self.project = nn.Linear(d_model, n + 2, bias=False)  # of each stream: read, write, and a row of mix
        nn.init.zeros_(self.project.weight)
        self.scale = nn.Parameter(torch.full((2,), 0.01))

    def forward(self, streams: Float[Tensor, "b n_positions n e"]) -> Maps:
        """The streams (B, N, n, E) -> the maps of each position."""
        static = super().forward(streams)
        moved = self.project(self.norm(streams.to(self.norm.weight.dtype))).tanh().to(streams.dtype)  # (B, N, n, n + 2)
        first, second = self.scale.to(streams.dtype).unbind()
        return Maps(
            static.read + first * moved[..., 0],
            static.mix + first * moved[..., 2:],
            static.write + second * moved[..., 1],
        )


class DoublyStochasticMaps(nn.Module):
    """The maps of mHC: reading and writing never negative, and a mixing matrix whose rows and columns sum to 1.

    Such a matrix makes no vector of streams longer, and a product of them is such a matrix again, however deep the
    model is. All three maps are computed from all streams of a position together.

    The paper leaves open where the static parts start. Here reading and writing start as sigmoid(1) of stream k mod n
    and sigmoid(-1) of the others, and 1; the mixing matrix near the identity. As all streams are equal then, the model
    starts as the plain stream, up to a factor of what each branch reads, which its norm removes.

    The maps are computed in float32 or better, whatever the weights are in. Where project has hooks, or something else
    stands in its place, such as an adapter, it is called in the dtype of the weights.

    Args:
        d_model: width E.
        n: how many streams.
        k: which branch it is, from 0.
        iterations: of `sinkhorn`.

    Raises:
        ValueError: d_model, n or iterations below 1.
    """

    n: int
    iterations: int
    project: nn.Linear
    static: nn.Parameter
    scale: nn.Parameter

    def __init__(self, d_model: int, n: int, k: int, *, iterations: int = 20):
        super().__init__()
        check_sizes(d_model=d_model, n=n, iterations=iterations)
        self.n, self.iterations = n, iterations
        self.project = nn.Linear(n * d_model, n * (n + 2), bias=False)
        nn.init.zeros_(self.project.weight)
        read = 2 * F.one_hot(torch.tensor(k % n), n).float() - 1
        self.static = nn.Parameter(torch.cat([read, torch.zeros(n), (8 * torch.eye(n) - 8).flatten()]))
        self.scale = nn.Parameter(torch.full((3,), 0.01))

    def forward(self, streams: Float[Tensor, "b n_positions n e"]) -> Maps:
        """The streams (B, N, n, E) -> the maps of each position."""
        n = self.n
        with autocast_off(streams.device.type):
            flat = at_least_float32(streams.flatten(-2))
            static, scale = (x.to(flat.dtype) for x in (self.static, self.scale))
            sizes = [n, n, n * n]
            scale = torch.repeat_interleave(scale, torch.tensor(sizes, device=scale.device), output_size=sum(sizes))
            logits = scale * self._projected(F.rms_norm(flat, flat.shape[-1:], eps=1e-6)) + static
            read, write, mix = logits.split(sizes, -1)
            mix = sinkhorn(mix.unflatten(-1, (n, n)), self.iterations)
            return Maps(*(x.to(streams.dtype) for x in (read.sigmoid(), mix, 2 * write.sigmoid())))

    def _projected(self, flat: Tensor) -> Tensor:
        """project(flat), in the dtype of flat, which may be wider than that of the weights."""
        if only_a_weight(self.project, nn.Linear):
            return F.linear(flat, self.project.weight.to(flat.dtype))
        return self.project(flat.to(self.static.dtype)).to(flat.dtype)


# --8<-- [start:sinkhorn]
def sinkhorn(logits: Float[Tensor, "*b n n"], iterations: int = 20) -> Float[Tensor, "*b n n"]:
    """exp(logits), its columns and rows divided by their sums in turn: after enough turns all sums are 1.

    Args:
        logits: (..., n, n).
        iterations: how many turns, 1 or more. The rows of the result sum to 1, the columns nearly.

    Raises:
        ValueError: logits that are not square matrices, iterations below 1.

    Source: Sinkhorn and Knopp 1967; 2512.24880, equation 9. By logarithms, which do not overflow.
    """
    check_sizes(iterations=iterations)
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits must be square matrices (..., n, n), got {tuple(logits.shape)}")
    for _ in range(iterations):
        logits = logits - logits.logsumexp(-2, keepdim=True)
        logits = logits - logits.logsumexp(-1, keepdim=True)
    return logits.exp()
    # --8<-- [end:sinkhorn]


class HyperConnections(nn.Module):
    """n streams, as a connection: CausalLM(..., connection=HyperConnections(d_model, n_branches, 2)).

        HyperConnections(64, 16, 2)                                # dynamic maps
        HyperConnections(64, 16, 2, maps=StaticMaps)               # static ones
        HyperConnections(64, 16, 4, maps=DoublyStochasticMaps)     # those of mHC

    The layers must be pre-norm.

    Args:
        d_model: width E.
        n_branches: of all layers together: two for each `TransformerLayer`, one for each `MixerBlock`.
        n: how many streams.
        maps: makes the maps of branch k, given d_model, n and k.

    Raises:
        ValueError: d_model, n_branches or n below 1.
    """

    d_model: int
    n: int
    maps: nn.ModuleList

    def __init__(
        self, d_model: int, n_branches: int, n: int = 2, *, maps: Callable[[int, int, int], nn.Module] = DynamicMaps
    ):
        super().__init__()
        check_sizes(d_model=d_model, n_branches=n_branches, n=n)
        self.d_model, self.n = d_model, n
        self.maps = nn.ModuleList(maps(d_model, n, k) for k in range(n_branches))

    def forward(self, x: Float[Tensor, "b n e"], layers: Sequence[LayerCall]) -> Float[Tensor, "b n e"]:
        """The embeddings (B, N, E) through the branches of the layers on n streams, and the mean of these.

        Args:
            x: (B, N, E).
            layers: of one forward pass, in order.

        Raises:
            ValueError: another width, another number of branches, or layers that cannot be taken apart.
        """
        check_width(x, self.d_model)
        # --8<-- [start:streams]
        streams = x[..., None, :].expand(*x.shape[:-1], self.n, -1)  # (B, N, n, E)
        for maps_of, branch in zip(self.maps, branches_of(layers, len(self.maps))):
            read, mix, write = maps_of(streams)
            added = branch((read[..., None] * streams).sum(-2))  # (B, N, E)
            streams = _mixed(mix, streams) + write[..., None] * added[..., None, :].to(x.dtype)
        return streams.mean(-2)
        # --8<-- [end:streams]

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor, layers: Sequence[LayerCall], /) -> Tensor: ...


def _mixed(mix: Tensor, streams: Tensor) -> Tensor:
    """The sum of mix_ij H_i over i, for each j: (..., n, n) and (..., n, E) to (..., n, E), also under autocast."""
    with autocast_off(streams.device.type):
        return mix.mT @ streams
