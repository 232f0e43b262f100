"""Attention as a network of pipes: how much can flow from each output to each input through the weights of all layers.

A layer's weights, with the residual path, are capacities: the edge from position i of one layer to position j of the
layer below lets pass at most (1 - r) a_ij + r [i = j]. The maximum flow from an output to an input is the most that
all edges together let pass. The rollout of the same weights is one such flow, of a unit that divides at every position
by the weights; so no entry of it is above the maximum. Like the rollout, the flow leaves out what values, output
projections and feed-forward networks do to the vectors.

Source: Abnar and Zuidema 2020 (2005.00928), section 3, attention flow, with r = 1/2. Symbols: L layers, B sequences,
H heads, N positions.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nondual.analysis.rollout import mixed_layers

Network = list[dict[int, float]]
"""For each node what still passes along the edge to each of its neighbours."""
TINY = 1e-15
"""What is left of a capacity through rounding and does not count."""


def attention_flow(weights: Float[Tensor, "layers b h n n"], *, residual: float = 0.5) -> Float[Tensor, "b n n"]:
    """The maximum flow from each output position to each input position, (B, N, N).

    Every entry is a problem of its own, as if the whole network served that pair alone: rows need not sum to 1, and no
    entry is above 1. Written in plain Python: about a second for 16 positions and 6 layers, and sixteen times as long
    for twice as many positions.

    Args:
        weights: (L, B, H, N, N), each layer's attention, as `return_weights=True` and `weights_of` give them.
        residual: r, the share of the residual path in each layer, 0 to 1.

    Returns:
        (B, N, N) in float64 on the CPU; row i is output i, column j input j. It has no gradient.

    Raises:
        TypeError: weights are not a tensor.
        ValueError: not floating point (L, B, H, N, N), no layer or head, a weight that is negative or not finite, or a
            share that is not in 0 to 1.
    """
    mixed = mixed_layers(weights, residual).detach().double().cpu()  # (L, B, N, N)
    if not (mixed.isfinite().all() and (mixed >= 0).all()):
        raise ValueError("weights must be finite and not negative: give them after their softmax")
    n_layers, batch, n, _ = mixed.shape
    found = torch.zeros(batch, n, n, dtype=torch.float64)
    for b in range(batch):
        network = _network(mixed[:, b])
        for i in range(n):
            for j in range(n):
                found[b, i, j] = _maximum_flow(network, n_layers * n + i, j)
    return found


def _network(mixed: Tensor) -> Network:
    """Position i after layer l is node l N + i; the inputs are nodes 0 to N - 1. mixed (L, N, N)."""
    n_layers, n, _ = mixed.shape
    network: Network = [{} for _ in range((n_layers + 1) * n)]
    for layer, rows in enumerate(mixed.tolist(), 1):
        for i, row in enumerate(rows):
            for j, capacity in enumerate(row):
                if capacity > TINY:
                    above, below = layer * n + i, (layer - 1) * n + j
                    network[above][below] = capacity
                    network[below].setdefault(above, 0.0)  # what has passed can be taken back
    return network


def _maximum_flow(network: Network, source: int, sink: int) -> float:
    """Dinic 1970: again and again, fill the shortest ways that still let something pass, until there is none."""
    left = [dict(edges) for edges in network]
    total = 0.0
    while True:
        steps = _steps(left, source)
        if sink not in steps:
            return total
        ways = {node: [to for to in left[node] if steps.get(to) == steps[node] + 1] for node in steps}
        while passed := _push(left, ways, source, sink, float("inf")):
            total += passed


def _push(left: Network, ways: dict[int, list[int]], node: int, sink: int, most: float) -> float:
    """Let up to this much pass from the node to the sink on one way, and say how much. A full way is dropped."""
    if node == sink:
        return most
    while ways[node]:
        to = ways[node][-1]
        capacity = left[node][to]
        passed = _push(left, ways, to, sink, min(most, capacity)) if capacity > TINY else 0.0
        if passed:
            left[node][to] -= passed
            left[to][node] += passed
            return passed
        ways[node].pop()
    return 0.0


def _steps(left: Network, source: int) -> dict[int, int]:
    """How many edges away from the source each node is that it can reach."""
    steps, front = {source: 0}, [source]
    while front:
        reached = []
        for node in front:
            for to, capacity in left[node].items():
                if capacity > TINY and to not in steps:
                    steps[to] = steps[node] + 1
                    reached.append(to)
        front = reached
    return steps
