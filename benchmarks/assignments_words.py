"""Two interventions: places and company of words in a sentence encoder, and the steps of a Mamba of characters.

Sections 3 and 5 of docs/measured/six_assignments.md say what is asked and how it is judged.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import cross_entropy

from nondual.language_models.mamba import MambaLM
from nondual.transformer import TextEncoder

DRAWS = 4  # of each sentence
STEPS, LAST = 256, 32  # of input after the text, and those over which a state's change is averaged

# --- 3. positions ----------------------------------------------------------------------------------------------------


def vectors(model: TextEncoder, ids: Tensor, places: Tensor) -> Tensor:
    """Tokens (B, N), and the position vector of each (B or 1, N, E) -> the last layer's vectors (B, N, E)."""
    x = model.norm(model.token(ids) + places + model.segment(torch.zeros_like(ids)))
    return model.encoder(x)


def spread(x: Tensor) -> float:
    """The mean distance between two tokens' vectors of a sentence (N, E)."""
    return float(torch.pdist(x).mean())


def movement(before: Tensor, after: Tensor, others: list[int]) -> float:
    """How far the vectors of some tokens moved, on average."""
    return float((after[others] - before[others]).norm(dim=-1).mean())


def sentence(model: TextEncoder, ids: list[int], words: list[int], spare: list[int], seed: int) -> dict[str, float]:
    """One sentence: how far other words move when two exchange places, all move on, or one is replaced.

    Args:
        model: the encoder.
        ids: the sentence's tokens with its markers.
        words: where its whole words stand, three or more.
        spare: tokens of words of other sentences.
        seed: of the draws.

    Returns:
        The mean movement by intervention, and the spread of the unchanged vectors by kind of positions.
    """
    draw = torch.Generator().manual_seed(seed)
    table = model.position.table.weight.detach()
    n = len(ids)
    trained, one = table[:n], table[:64].mean(0).expand(n, -1)
    dealt = trained[torch.randperm(n, generator=draw)]
    kinds = {"trained": trained, "one position": one, "dealt out": dealt}
    tokens = torch.tensor([ids])
    before = {name: vectors(model, tokens, places[None])[0] for name, places in kinds.items()}
    found = {f"spread, {name}": spread(x[words]) for name, x in before.items()}
    sums: dict[str, list[float]] = {}
    for _ in range(DRAWS):
        first, second = (words[i] for i in torch.randperm(len(words), generator=draw)[:2].tolist())
        others = [place for place in words if place not in (first, second)]
        # --8<-- [start:places]
        order = torch.arange(n)
        order[first], order[second] = second, first
        after = {
            "exchanged": vectors(model, tokens, trained[order][None])[0],
            "moved on": vectors(model, tokens, table[1 : n + 1][None])[0],
        }
        # --8<-- [end:places]
        for name, x in after.items():
            sums.setdefault(name, []).append(movement(before["trained"], x, others))
        other = tokens.clone()
        different = [token for token in spare if token != ids[first]]
        other[0, first] = different[int(torch.randint(len(different), (), generator=draw))]
        for name, places in kinds.items():
            x = vectors(model, other, places[None])[0]
            sums.setdefault(f"replaced, {name}", []).append(movement(before[name], x, others))
    return found | {name: sum(each) / len(each) for name, each in sums.items()}


# --- 5. the state ----------------------------------------------------------------------------------------------------


def bits(model: MambaLM, ids: Tensor) -> Tensor:
    """The loss of each window (B,), in bits a character."""
    scores = model(ids)[:, :-1]
    return cross_entropy(scores.mT, ids[:, 1:], reduction="none").mean(1) / math.log(2)


def selections(model: MambaLM, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What each layer's content decides on this text: Δ before bias and softplus, B and C."""
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    with selecting(model, lambda _, own: kept.append(own) or own):
        model(ids)
    return kept


class selecting:
    """A context in which each layer's selection is what `change` makes of its number and its own selection."""

    def __init__(self, model: MambaLM, change: Any):
        self.mixers: list[Any] = [layer.mixer for layer in model.layers]
        self.change = change

    def __enter__(self) -> None:
        for number, mixer in enumerate(self.mixers):
            own = mixer.select
            mixer.select = lambda u, number=number, own=own: self.change(number, own(u))

    def __exit__(self, *_: object) -> None:
        for mixer in self.mixers:
            del mixer.select


Selection = tuple[Tensor, Tensor, Tensor]
"""Δ before bias and softplus, B and C."""


# --8<-- [start:still]
def still(selection: Selection, bias: Tensor) -> Selection:
    """A selection that no longer follows the content: its means over the text.

    Of the step, the mean length.
    """
    delta, *BC = selection
    length = F.softplus(delta + bias).mean((0, 1))
    undone = length + torch.log(-torch.expm1(-length)) - bias  # softplus and bias
    means = [undone]
    means += [each.mean((0, 1)) for each in BC]
    delta, B, C = (m.expand_as(x).contiguous() for m, x in zip(means, selection))
    return delta, B, C


# --8<-- [end:still]


def pulse(model: MambaLM, ids: Tensor) -> dict[str, list[float]]:
    """Bits a character of each window (B,): as it is, with the selection held still, with that of the next window."""
    own = selections(model, ids)
    mixers: list[Any] = [layer.mixer for layer in model.layers]
    held = [still(each, mixer.dt_proj.bias) for each, mixer in zip(own, mixers)]
    other = [tuple(part.roll(1, 0) for part in each) for each in own]
    found = {"own": bits(model, ids)}
    for name, given in (("still", held), ("foreign", other)):
        with selecting(model, lambda number, _, given=given: given[number]):
            found[name] = bits(model, ids)
    return {name: [round(x, 4) for x in each.tolist()] for name, each in found.items()}


def rest(model: MambaLM, text: Tensor, blank: int, start: int) -> dict[str, Any]:
    """How much the state changes at each step, relative to its length, while the text goes on and while it does not.

    Args:
        model: the Mamba.
        text: (B, N) of characters.
        blank: the character that is read again and again in place of the text.
        start: where the text stops.

    Returns:
        By name, the change in each window over the last steps (B,), and its mean curve from `start` on.
    """
    silent = text.clone()
    silent[:, start:] = blank
    found: dict[str, Any] = {}
    for name, ids in (("text", text), ("blank", silent)):
        cache = model.new_cache(len(ids))
        before: list[Tensor] = []
        steps = []
        for at in range(ids.shape[1]):
            model(ids[:, at : at + 1], cache=cache)
            after = [one.state.flatten(1).clone() for one in cache]
            if at >= start:
                changes = [(b - a).norm(dim=1) / b.norm(dim=1).clamp(min=1e-30) for a, b in zip(before, after)]
                steps.append(torch.stack(changes).mean(0))
            before = after
        each = torch.stack(steps)  # (steps, B)
        found[name] = [float(f"{x:.4g}") for x in each[-LAST:].mean(0).tolist()]
        found[f"{name}, by step"] = [float(f"{x:.4g}") for x in each.mean(1).tolist()]
    return found
