"""Three interventions in a language model: queries and keys exchanged, wrong heads, and tables of low rank.

Sections 1, 2 and 4 of docs/measured/six_assignments.md say what is asked and how it is judged. A harm is the rise of
the mean loss in nats a token. Where one layer is changed, the layers below are not run again. Symbols: q, k, v (B, H,
N, D); P (B, H, N, N), the table of weights; E width.
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from nondual.analysis import record_heads, replace_heads
from nondual.language_models.causal import CausalLM
from nondual.ops.attention import attention

RANKS = (4, 8, 16, 32, 64)
ROTATIONS = 2
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (q, k) -> what stands in their place
Table = Callable[[Tensor], Tensor]  # P -> what stands in its place


class Reader:
    """A model on one batch of ids, with the input of every layer kept."""

    def __init__(self, model: CausalLM, ids: Tensor):
        self.model, self.ids, self.states = model, ids, []
        model.hidden(model.embeddings(ids), before=self._keep)
        self.clean = self.losses()

    def _keep(self, _: int, x: Tensor) -> Tensor:
        self.states.append(x)
        return x

    def losses(self, layer: int = 0) -> Tensor:
        """The loss of each next token (B, N - 1), with the layers from `layer` on run again."""
        x = self.states[layer]
        for block in list(self.model.layers)[layer:]:
            x = block(x)
        return next_losses(self.model, x, self.ids)

    def harm(self, layer: int = 0) -> float:
        return float((self.losses(layer) - self.clean).mean())


def next_losses(model: CausalLM, x: Tensor, ids: Tensor) -> Tensor:
    """What the last layer gives (B, N, E) -> the loss of each next token (B, N - 1), a row at a time."""
    rows = [cross_entropy(model.scores(model.norm_f(h[:-1])).float(), i[1:], reduction="none") for h, i in zip(x, ids)]
    return torch.stack(rows)


@contextmanager
def through(mixers: Iterable[Any], op: Callable[..., Any]):
    """A context in which these attention layers join queries, keys and values by `op`."""
    before = [(mixer, mixer.op) for mixer in mixers]
    try:
        for mixer, _ in before:
            mixer.op = op
        yield
    finally:
        for mixer, own in before:
            mixer.op = own


def full(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values repeated for each query head of their group: the same attention."""
    times = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)


# --- 1. queries and keys ---------------------------------------------------------------------------------------------


# --8<-- [start:exchange]
def exchanged(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Keys ask and queries answer: the table of scores is transposed."""
    return k, q


# --8<-- [end:exchange]


def scaled(number: float, planes: Tensor) -> Change:
    """The share of some rotary planes in the scores multiplied by a number: planes is bool (H, D / 2)."""
    factor = torch.where(torch.cat([planes, planes], -1), number, 1.0)[:, None]  # (H, 1, D): plane i is i and i + D / 2
    return lambda q, k: (q * factor, k)


def changed(change: Change) -> Callable[..., Any]:
    """Attention whose turned queries and keys are changed first."""

    def op(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        q, k, v = full(q, k, v)
        return attention(*change(q, k), v, **more)

    return op


def table(mixer: Any, x: Tensor, change: Change) -> Tensor:
    """The layer's weights over x (B, H, N, N), its queries and keys changed."""
    with through([mixer], changed(change)):
        return mixer(x, return_weights=True)[1]


def moved(before: Tensor, after: Tensor) -> float:
    """How much attention is elsewhere: half the sum of the absolute changes, mean over rows and heads; 0 to 1."""
    return float((after - before).abs().sum(-1).mean() / 2)


def as_much(mixer: Any, x: Tensor, planes: Tensor, wanted: float) -> float:
    """The number, below 1, by which the planes' share must be multiplied for as much attention to move."""
    before = table(mixer, x, lambda q, k: (q, k))

    def moves(less: float) -> float:
        return moved(before, table(mixer, x, scaled(1 - less, planes)))

    low, high = 0.0, 1.0
    while moves(high) < wanted and high < 1000:
        low, high = high, 2 * high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if moves(middle) < wanted else (low, middle)
    return 1 - (low + high) / 2


def powers(reader: Reader, layer: int, seed: int = 0) -> dict[str, float]:
    """One layer: harm by the exchange of queries and keys, and by as large a change without it."""
    block: Any = reader.model.layers[layer]
    mixer, x = block.mixer, block.norm1(reader.states[layer])
    before = table(mixer, x, lambda q, k: (q, k))
    wanted = moved(before, table(mixer, x, exchanged))
    draw = torch.Generator().manual_seed(1000 * seed + layer)
    planes = torch.rand(mixer.n_heads, mixer.d_head // 2, generator=draw).argsort(-1) < mixer.d_head // 4
    number = as_much(mixer, x, planes, wanted)
    found = {"moved": wanted, "moved by the control": moved(before, table(mixer, x, scaled(number, planes)))}
    for name, change in (("exchanged", exchanged), ("control", scaled(number, planes))):
        with through([mixer], changed(change)):
            found[name] = reader.harm(layer)
    return {**found, "number": number}


# --- 2. heads --------------------------------------------------------------------------------------------------------


def reports(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's head outputs (B, N, H, D) as their mean over the text (H, D) and the rest; the first token left out."""
    mean = outputs[:, 1:].mean((0, 1))
    return mean, outputs - mean


def lengths(report: Tensor) -> Tensor:
    """The root mean square length of each head's reports (H, 1)."""
    return report[:, 1:].square().sum(-1).mean((0, 1)).sqrt()[:, None]


def doors(reader: Reader, outputs: Tensor, layer: int, seed: int = 0) -> dict[str, float]:
    """One layer: harm by reports through another head's part of W_O, by closed heads, by scrambled reports.

    Args:
        reader: of the text.
        outputs: what the layer's heads give out there (B, N, H, D).
        layer: its number.
        seed: of the rotations.
    """
    mean, report = reports(outputs)
    heads, width = outputs.shape[2:]
    group = heads // reader.model.layers[layer].mixer.n_kv_heads

    # --8<-- [start:doors]
    def harm(given: Tensor) -> float:
        """The heads give out their means and `given` (B, N, H, D), but for the first token."""
        whole = torch.cat([outputs[:, :1], (mean + given)[:, 1:]], 1)
        with replace_heads(reader.model, {(layer, head): whole[:, :, head] for head in range(heads)}):
            return reader.harm(layer)

    def from_head(step: int) -> Tensor:
        """Each head's report from the head `step` further, as long as its own."""
        return (report / lengths(report)).roll(step, dims=2) * lengths(report)

    # --8<-- [end:doors]

    draw = torch.Generator().manual_seed(1000 * seed + layer)
    turns = [torch.linalg.qr(torch.randn(heads, width, width, generator=draw)).Q for _ in range(ROTATIONS)]
    wrong = [harm(from_head(step)) for step in range(group, heads, group)]
    scrambled = [harm(torch.einsum("bnhd,hde->bnhe", report, turn)) for turn in turns]
    return {
        "closed": harm(torch.zeros_like(report)),
        "wrong door": sum(wrong) / len(wrong),
        "scrambled": sum(scrambled) / len(scrambled),
    }


def all_outputs(model: CausalLM, ids: Tensor) -> list[Tensor]:
    """What every layer's heads give out (B, N, H, D)."""
    with record_heads(model) as record:
        model.hidden(model.embeddings(ids))
    return record.outputs


# --- 4. the table ----------------------------------------------------------------------------------------------------


def by_table(change: Table) -> Callable[..., Any]:
    """Attention whose table of weights is changed before it weighs the values."""

    def op(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        q, k, v = full(q, k, v)
        _, weights = attention(q, k, v, **{**more, "return_weights": True})
        return change(weights) @ v

    return op


def shares(table: Tensor) -> Tensor:
    """Each row divided by its sum."""
    return table / table.sum(-1, keepdim=True).clamp(min=1e-12)


# --8<-- [start:tables]
def low_rank(rank: int) -> Table:
    """The best approximation of that rank; nothing above the diagonal, or below 0."""

    def change(P: Tensor) -> Tensor:
        U, S, V = torch.linalg.svd(P)
        near = (U[..., :rank] * S[..., None, :rank]) @ V[..., :rank, :]
        return shares(near.tril().clamp(min=0))

    return change


def largest(count: int) -> Table:
    """In each row the `count` largest weights, and no others."""

    def change(P: Tensor) -> Tensor:
        top = P.topk(min(count, P.shape[-1]), -1)
        return shares(torch.zeros_like(P).scatter(-1, top.indices, top.values))

    return change


# --8<-- [end:tables]


def alone(P: Tensor) -> Tensor:
    """Each token sees itself and the first, in the proportion in which it did."""
    n = P.shape[-1]
    seen = torch.eye(n, dtype=torch.bool)
    seen[:, 0] = True
    return shares(P * seen)


def tables(reader: Reader, first: int) -> dict[str, Any]:
    """All layers at once: the harm to each row (B,) from position `first` on, by kind and rank, and of being alone."""
    mixers = [block.mixer for block in reader.model.layers]

    def harms(change: Table) -> list[float]:
        with through(mixers, by_table(change)):
            return [round(x, 4) for x in (reader.losses() - reader.clean)[:, first:].mean(1).tolist()]

    ranks = [rank for rank in RANKS if rank <= reader.ids.shape[1]]
    return {
        "loss": [round(x, 4) for x in reader.clean[:, first:].mean(1).tolist()],
        "alone": harms(alone),
        "low rank": {str(rank): harms(low_rank(rank)) for rank in ranks},
        "largest": {str(rank): harms(largest(rank)) for rank in ranks},
    }
