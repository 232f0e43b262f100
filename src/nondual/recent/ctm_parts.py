"""The parts of a Continuous Thought Machine: synapses, neuron-level models, pairs of neurons and their synchronisation.

Source: Darlow et al. 2025 (2505.05522), equations 1 to 10; appendix C.1 (synapses), C.2 (pairs) and H (the sum over the
history as a recurrence). Symbols: B batch, D neurons, M pre-activations in a neuron's history, H the hidden width of
its model, P pairs of neurons (the paper's D_out and D_action).
"""

import math
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nondual.ops.checks import check_tensors
from nondual.ops.dtypes import at_least_float32


def check_counts(**counts: object) -> None:
    """Refuse what is not a whole number of 1 or more.

    Args:
        counts: values by name.

    Raises:
        ValueError: the first that is not.
    """
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number of 1 or more, got {count!r}")


# --- synapses: what mixes the neurons ------------------------------------------------------------------------------


class Synapses(nn.Module):
    """One layer from all neurons, and what was attended to, to each neuron's next pre-activation: linear, GLU, norm.

    Args:
        d_in: width of the input, d_input + D.
        d_model: D.
        dropout: of the input, while training.

    Raises:
        ValueError: sizes below 1, or a dropout outside of [0, 1).
    """

    dropout: nn.Dropout
    linear: nn.Linear
    norm: nn.LayerNorm

    def __init__(self, d_in: int, d_model: int, *, dropout: float = 0.0):
        super().__init__()
        check_counts(d_in=d_in, d_model=d_model)
        _check_dropout(dropout)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(d_in, 2 * d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Float[Tensor, "b i"]) -> Float[Tensor, "b d"]:
        """x (B, d_in) -> pre-activations (B, D)."""
        return self.norm(F.glu(self.linear(self.dropout(x)), -1))


class UNetSynapses(nn.Module):
    """Layers that narrow step by step to a bottleneck and widen again, each wide one joined to the narrow one's twin.

        widths, D = 64 and 3 levels:   64 -> 48 -> 32 -> 16 -> 32 -> 48 -> 64

    On the way up, what the way down had at the same width is added, and the sum is normalised. The paper's depth k
    counts the layers of both ways: k = 2 · levels.

    Args:
        d_in: width of the input, d_input + D.
        d_model: D, not below `narrowest`.
        levels: how many layers narrow, and how many widen.
        narrowest: width of the bottleneck; widths between lie on a line.
        dropout: of the input of every layer but the first, while training.

    Raises:
        ValueError: sizes below 1, a bottleneck wider than d_model, or a dropout outside of [0, 1).
    """

    first: nn.Module
    down: nn.ModuleList
    up: nn.ModuleList
    norms: nn.ModuleList

    def __init__(self, d_in: int, d_model: int, *, levels: int = 3, narrowest: int = 16, dropout: float = 0.0):
        super().__init__()
        check_counts(d_in=d_in, d_model=d_model, levels=levels, narrowest=narrowest)
        _check_dropout(dropout)
        if narrowest > d_model:
            raise ValueError(f"narrowest must not be above d_model, got {narrowest} and {d_model}")
        widths = [d_model - (d_model - narrowest) * i // levels for i in range(levels + 1)]

        def layer(wide_in: int, wide_out: int, dropped: float) -> nn.Sequential:
            return nn.Sequential(nn.Dropout(dropped), nn.Linear(wide_in, wide_out), nn.LayerNorm(wide_out), nn.SiLU())

        self.first = layer(d_in, d_model, 0.0)
        self.down = nn.ModuleList(layer(a, b, dropout) for a, b in pairwise(widths))
        self.up = nn.ModuleList(layer(b, a, dropout) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[:-1])

    def forward(self, x: Float[Tensor, "b i"]) -> Float[Tensor, "b d"]:
        """x (B, d_in) -> pre-activations (B, D)."""
        passed = [self.first(x)]
        for layer in self.down:
            passed.append(layer(passed[-1]))
        out = passed.pop()
        for layer, norm in zip(reversed(self.up), reversed(self.norms)):
            out = norm(layer(out) + passed.pop())
        return out


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


# --- neuron-level models: what each neuron makes of its own history ------------------------------------------------


class NeuronModels(nn.Module):
    """D small networks, one a neuron, each with weights of its own: from M pre-activations to one post-activation.

    Each is a linear layer to 2 H, a GLU, a linear layer to 2, and a GLU.

    Args:
        d_model: D.
        memory: M.
        d_hidden: H.

    Raises:
        ValueError: sizes below 1.
    """

    no_weight_decay: ClassVar[tuple[str, ...]] = ("bias1", "bias2")  # a row for each neuron, so matrices by their shape

    weight1: nn.Parameter
    bias1: nn.Parameter
    weight2: nn.Parameter
    bias2: nn.Parameter

    def __init__(self, d_model: int, memory: int, *, d_hidden: int = 8):
        super().__init__()
        check_counts(d_model=d_model, memory=memory, d_hidden=d_hidden)
        self.weight1, self.bias1 = _private(d_model, memory, 2 * d_hidden)
        self.weight2, self.bias2 = _private(d_model, d_hidden, 2)

    def forward(self, history: Float[Tensor, "b d m"]) -> Float[Tensor, "b d"]:
        """history (B, D, M), the newest last -> post-activations (B, D)."""
        # --8<-- [start:neurons]
        # (B, D, M) times (D, M, 2 H): every neuron d meets its own matrix
        hidden = torch.einsum("bdm,dmh->bdh", history, self.weight1) + self.bias1
        hidden = F.glu(hidden, -1)  # (B, D, H)
        out = torch.einsum("bdh,dho->bdo", hidden, self.weight2) + self.bias2
        return F.glu(out, -1)[..., 0]  # (B, D)
        # --8<-- [end:neurons]


def _private(d_model: int, wide_in: int, wide_out: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A weight (D, in, out), drawn evenly within 1 / √(in + out), and a bias (D, out) of zeros."""
    edge = 1 / math.sqrt(wide_in + wide_out)
    weight = nn.Parameter(torch.empty(d_model, wide_in, wide_out).uniform_(-edge, edge))
    return weight, nn.Parameter(torch.zeros(d_model, wide_out))


# --- pairs of neurons ----------------------------------------------------------------------------------------------


def random_pairs(
    d_model: int, n_pairs: int, *, n_self: int = 0, generator: torch.Generator | None = None
) -> Int[Tensor, "2 p"]:
    """Pairs drawn at random, none twice: the first n_self of a neuron with itself, the rest of two different ones.

    The paper draws with replacement, so that a pair can come twice; this leaves no number of the read-out wasted.

    Args:
        d_model: D.
        n_pairs: P.
        n_self: how many neurons are paired with themselves, so that a state of one tick can be read (appendix C.2).
        generator: where the randomness comes from; torch's own where left out.

    Returns:
        (2, P) int64 on the CPU: the first neuron of each pair, and the second.

    Raises:
        ValueError: counts out of range, or more pairs than there are: D with itself, D (D - 1) / 2 of two.
    """
    check_counts(d_model=d_model, n_pairs=n_pairs)
    two = d_model * (d_model - 1) // 2
    if isinstance(n_self, bool) or not isinstance(n_self, int) or not 0 <= n_self <= min(d_model, n_pairs):
        raise ValueError(
            f"n_self must be a whole number from 0 to {min(d_model, n_pairs)}, the smaller of d_model and n_pairs, "
            f"got {n_self!r}"
        )
    if n_pairs - n_self > two:
        raise ValueError(
            f"n_pairs must be n_self + {two} at the most, as many as {d_model} neurons have, got {n_pairs} with "
            f"n_self={n_self}: take fewer pairs or more neurons"
        )
    alone = torch.randperm(d_model, generator=generator)[:n_self].expand(2, -1)
    every = torch.triu_indices(d_model, d_model, 1)
    return torch.cat([alone, every[:, torch.randperm(two, generator=generator)[: n_pairs - n_self]]], 1)


def dense_pairs(left: Int[Tensor, " j"], right: Int[Tensor, " j"] | None = None) -> Int[Tensor, "2 p"]:
    """Every pair among the chosen neurons, each once: P = J (J + 1) / 2.

    With `right`, a second choice of J neurons, the pairs are semi-dense: neuron i of the first with neuron j of the
    second, for i <= j, as the released code has it.

    Args:
        left: (J,) int64, the chosen neurons.
        right: (J,) int64, the second choice; `left` itself where left out.

    Returns:
        (2, P) int64.

    Raises:
        TypeError: left or right is not a tensor.
        ValueError: not one axis of whole numbers, none chosen, or choices of two lengths.
    """
    check_tensors({"left": left}, {"right": right})
    right = left if right is None else right
    for name, x in (("left", left), ("right", right)):
        if x.ndim != 1 or x.dtype != torch.int64 or not len(x):
            raise ValueError(f"{name} must be (J,) int64 with J of 1 or more, got {tuple(x.shape)} {x.dtype}")
    if len(left) != len(right):
        raise ValueError(f"right must have as many neurons as left, {len(left)}, got {len(right)}")
    i, j = torch.triu_indices(len(left), len(left), device=left.device)
    return torch.stack([left[i], right[j]])


# --- synchronisation -----------------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """What a synchronisation keeps of all ticks so far.

    Attributes:
        products: (B, P), the decayed sum of the pairs' products; the paper's alpha.
        weights: (P,), the sum of the decayed weights; the paper's beta.
    """

    products: Float[Tensor, "b p"]
    weights: Float[Tensor, " p"]


class Synchronisation(nn.Module):
    """How alike two neurons have moved so far: the decayed dot product of their histories, for P pairs (i, j).

        S_ij = Σ_τ e^(-r_ij (t - τ)) z_i^τ z_j^τ / √(Σ_τ e^(-r_ij (t - τ))),   τ = 1 … t

    r, one number a pair, is learned; it starts at 0, where nothing decays, and acts as if held within 0 and 15. (The
    gradient passes as if it were not, so that an r that was pushed below 0 can come back; the released code moves r
    itself to the edge.) Sums are kept in float32 or better.

    Args:
        pairs: (2, P) int64, from `random_pairs` or `dense_pairs`.
        d_model: D, which every index is below.

    Attributes:
        size: P.

    Raises:
        TypeError: pairs is not a tensor.
        ValueError: pairs of another shape or dtype, or an index outside of 0 … D - 1.
    """

    MOST = 15.0
    size: int
    pairs: Tensor
    decay: nn.Parameter

    def __init__(self, pairs: Int[Tensor, "2 p"], d_model: int):
        super().__init__()
        check_counts(d_model=d_model)
        check_tensors({"pairs": pairs})
        if pairs.ndim != 2 or len(pairs) != 2 or not pairs.shape[1] or pairs.dtype != torch.int64:
            raise ValueError(f"pairs must be (2, P) int64 with P of 1 or more, got {tuple(pairs.shape)} {pairs.dtype}")
        if pairs.min() < 0 or pairs.max() >= d_model:
            low, high = pairs.min().item(), pairs.max().item()
            raise ValueError(f"pairs must be indices of neurons, 0 to {d_model - 1}, got {low} to {high}")
        self.size = pairs.shape[1]
        self.register_buffer("pairs", pairs.clone())
        self.decay = nn.Parameter(torch.zeros(self.size))

    def new_state(self, batch: int) -> Sums:
        """Sums over no ticks.

        Args:
            batch: B.
        """
        like = at_least_float32(self.decay)
        return Sums(like.new_zeros(batch, self.size), like.new_zeros(self.size))

    def forward(self, z: Float[Tensor, "b d"], state: Sums) -> tuple[Float[Tensor, "b p"], Sums]:
        """One tick more.

        Args:
            z: (B, D), the neurons at this tick.
            state: the sums over the ticks before.

        Returns:
            (the synchronisation (B, P) in z's dtype, the sums over all ticks).
        """
        # --8<-- [start:synchronise]
        left, right = at_least_float32(z)[:, self.pairs].unbind(1)  # (B, P) each
        kept = self.kept()  # (P,), e^-r
        products = state.products * kept + left * right
        weights = state.weights * kept + 1
        found = products / weights.sqrt()
        # --8<-- [end:synchronise]
        return found.to(z.dtype), Sums(products, weights)

    def kept(self) -> Float[Tensor, " p"]:
        """(P,), e^-r: the share of a sum that is left one tick later."""
        r = at_least_float32(self.decay)
        return torch.exp(-(r + (r.clamp(0, self.MOST) - r).detach()))
