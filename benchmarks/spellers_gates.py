"""How much the gates of trained GRUs vary with what is read.

Of a gate's variance over units, words and letters, one part lies between the units: each has its own mean, whatever is
read. The rest is within the units. Of that rest, a part goes with the place in the word, a part with the letter at that
place, and what is left with the letters around it, through the state.

The trace that a letter leaves in the state is multiplied, at each letter after it, by z, the share of the state that is
kept. `gain` is about the product of z over all letters but the first. Of each unit, words are put in the order of that
product; the factor is that between the word nine tenths up and the word one tenth up. If the paths were fixed, it would
be 1. All words have one length.
"""

import torch
from torch import Tensor

from nondual.recurrent import GRU


@torch.no_grad()
def gates(network: GRU, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gates r and z of the first layer, read forward: (B, N, H) each, for x (B, N, I)."""
    states = first_layer(network, x)
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)
    w = network.state_dict()
    given = x @ w["weight_ih_l0"].T + w["bias_ih_l0"] + before @ w["weight_hh_l0"].T + w["bias_hh_l0"]
    r, z, _ = given.chunk(3, dim=-1)  # right for r and z; n needs r inside
    return r.sigmoid(), z.sigmoid()


def first_layer(network: GRU, x: Tensor) -> Tensor:
    """The states of the first layer, read forward (B, N, H)."""
    one = GRU(network.d_input, network.d_hidden)
    names = one.state_dict()
    one.load_state_dict({name: tensor for name, tensor in network.state_dict().items() if name in names})
    return one(x)[0]


def shares(gate: Tensor, letters: Tensor) -> dict[str, float]:
    """How a gate's variance divides, for a gate (B, N, H) and the letters' numbers (B, N)."""
    unit = gate.mean((0, 1), keepdim=True)
    rest = gate - unit
    place = rest.mean(0, keepdim=True).expand_as(rest)
    flat, numbers = (rest - place).flatten(0, 1), letters.flatten()
    by_letter = torch.zeros_like(flat)
    for letter in numbers.unique():
        by_letter[numbers == letter] = flat[numbers == letter].mean(0)
    whole, inside = float((gate - gate.mean()).square().mean()), float(rest.square().mean())
    left = flat - by_letter
    parts = {"place": place.square().mean(), "letter": by_letter.square().mean(), "context": left.square().mean()}
    return {
        "mean": round(float(gate.mean()), 3),
        "within_units_of_all": round(inside / whole, 3),
        **{f"{name}_of_within": round(float(part) / inside, 3) for name, part in parts.items()},
        "standard_deviation_of_a_unit": round(float(rest.square().mean((0, 1)).sqrt().median()), 3),
    }


def gain(z: Tensor) -> dict[str, float]:
    """How the product of z after the first letter differs between words (B, N, H): the median over units."""
    logarithm = z[:, 1:].clamp(min=1e-30).log().sum(1)  # (B, H)
    low, high = logarithm.quantile(torch.tensor([0.1, 0.9]), dim=0)
    return {
        "median_share_kept": float(f"{logarithm.median(0).values.median().exp():.3g}"),
        "factor_between_words": round(float((high - low).median().exp()), 1),
    }


def vary(network: GRU, x: Tensor, letters: Tensor) -> dict:
    """The figures of one network; `new` is one of the same size that was not trained, on the same inputs."""
    torch.manual_seed(0)
    new, found = GRU(network.d_input, network.d_hidden), {}
    for name, one in (("trained", network), ("new", new)):
        r, z = gates(one, x)
        found[name] = {"z": shares(z, letters), "r": shares(r, letters), "gain": gain(z)}
    return found
