"""What a language model loses when heads are removed, moved to another layer, or swapped with their neighbours.

The model is SmolLM2 (30 layers of 9 query heads on 3 key/value heads). Text is the opening of Alice, 512 tokens in
windows of 128, and for what was chosen on Alice 512 tokens of a play of Shakespeare's. A head is removed by giving out
its mean over the text, what it gave out in another window (resample), or zero. A damage is the rise of the mean loss,
in nats a token; its interval comes from a bootstrap over blocks of 16 tokens.

Layers below the head that is changed are not run again. On one core all takes some ten minutes; each stage is kept in
the cache folder under a hash of this file, so that an interrupted run goes on.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.record import write
from nondual.analysis.attention_layers import attention_layers
from nondual.analysis.heads import head_contributions, profile, weights_of
from nondual.analysis.interventions import mean_values, record_heads, replace_heads, resample_values
from nondual.data import ALICE, shakespeare
from nondual.pretrained import smollm2
from nondual.store import cache_folder

LAYERS, HEADS, WINDOW = 30, 9, 128
LITTLE = 0.01  # nats a token: less than this is called no loss to speak of
Head = tuple[int, int]


class Reader:
    """The model on one batch of ids: losses with and without a change, from the first changed layer on."""

    def __init__(self, model: Any, ids: Tensor):
        self.model, self.ids = model, ids
        self.states: list[Tensor] = []
        handles = [
            layer.register_forward_pre_hook(lambda _, args: self.states.append(args[0])) for layer in model.model.layers
        ]
        with record_heads(model) as record:
            model(ids, use_cache=False, logits_to_keep=1)
        for handle in handles:
            handle.remove()
        self.outputs = record.outputs
        self.turn = model.model.rotary_emb(self.states[0], torch.arange(ids.shape[1])[None])
        self.clean = self.loss(LAYERS - 1)

    def hidden(self, layer: int) -> Tensor:
        """The last hidden states, with layers from `layer` on run again."""
        x = self.states[layer]
        for block in self.model.model.layers[layer:]:
            x = block(x, position_embeddings=self.turn)
        return self.model.model.norm(x)

    def loss(self, layer: int, values: dict | None = None) -> Tensor:
        """The loss of each next token (B, N - 1), with `values` for replace_heads."""
        with replace_heads(self.model, values) if values else nullcontext():
            x = self.hidden(layer)
        rows = zip(x, self.ids)
        return torch.stack([cross_entropy(self.model.lm_head(h[:-1]), i[1:], reduction="none") for h, i in rows])

    def values(self, heads: list[Head], how: str) -> dict:
        """What to put in place of the heads' outputs."""
        if how == "zero":
            return dict.fromkeys(heads, 0.0)
        if how == "mean":
            return mean_values(self.outputs, heads)
        return resample_values(heads, torch.arange(len(self.ids)).roll(1))

    def damage(self, heads: list[Head], how: str = "mean") -> Tensor:
        """The rise of each token's loss (B, N - 1)."""
        return self.loss(min(layer for layer, _ in heads), self.values(heads, how)) - self.clean


def interval(each: Tensor, block: int = 16, draws: int = 1000) -> list[float]:
    """Mean, and the 2.5 and 97.5 percent points of its bootstrap over blocks of neighbouring tokens."""
    whole = [part.mean() for row in each for part in row.split(block)]
    return spread(torch.stack(whole), draws, float(each.mean()))


def spread(parts: Tensor, draws: int = 1000, mean: float | None = None) -> list[float]:
    """The mean of parts, with the interval of its bootstrap."""
    drawn = parts[torch.randint(len(parts), (draws, len(parts)), generator=torch.Generator().manual_seed(0))].mean(1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
    return [round(float(parts.mean()) if mean is None else mean, 4), round(low, 4), round(high, 4)]


def every_head(alice: Reader, play: Reader, model: Any, tokenizer: Any) -> dict:
    """Each of the 270 heads removed alone, by its mean."""
    rows = [
        {"head": [layer, head], "damage": interval(alice.damage([(layer, head)]))}
        for layer in range(LAYERS)
        for head in range(HEADS)
    ]
    return {"loss": round(float(alice.clean.mean()), 4), "rows": rows}


def three_ways(alice: Reader, play: Reader, model: Any, tokenizer: Any) -> list[dict]:
    """Two heads of each layer, drawn by chance, removed in each of three ways."""
    draw, rows = torch.Generator().manual_seed(0), []
    for layer in range(LAYERS):
        for head in torch.randperm(HEADS, generator=draw)[:2].tolist():
            ways = {how: interval(alice.damage([(layer, head)], how)) for how in ("mean", "resample", "zero")}
            rows.append({"head": [layer, head], **ways})
    return rows


def many(alice: Reader, play: Reader, model: Any, tokenizer: Any) -> dict:
    """Removed together: the heads whose single damage on Alice was least, or heads by chance; the loss on the play."""
    single = kept("every_head", every_head, alice, play, model, tokenizer)["rows"]
    order = [tuple(row["head"]) for row in sorted(single, key=lambda row: row["damage"][0])]
    orders = {"least damage first": order}
    for seed in range(3):
        turn = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed)).tolist()
        orders[f"by chance {seed}"] = [order[i] for i in turn]
    means = mean_values(alice.outputs, order)
    rows = []
    for count in (14, 27, 54, 81, 108, 135):
        row: dict[str, Any] = {"removed": count}
        for name, heads in orders.items():
            each = play.loss(min(heads[:count])[0], {head: means[head] for head in heads[:count]}) - play.clean
            row[name] = interval(each)
        rows.append(row)
    return {"loss": round(float(play.clean.mean()), 4), "rows": rows}


def pairs(alice: Reader, play: Reader, model: Any, tokenizer: Any) -> list[dict]:
    """Two heads of a layer removed together, beside the sum of their single damages: five pairs in ten layers."""
    draw, rows = torch.Generator().manual_seed(1), []
    for layer in range(1, LAYERS, 3):
        alone: dict[int, Tensor] = {}
        for pair in torch.combinations(torch.arange(HEADS))[torch.randperm(36, generator=draw)[:5]].tolist():
            for head in pair:
                if head not in alone:
                    alone[head] = alice.damage([(layer, head)])
            both = alice.damage([(layer, head) for head in pair])
            parts = alone[pair[0]] + alone[pair[1]]
            more = interval(both - parts)
            rows.append({"layer": layer, "pair": pair, "sum": interval(parts), "both": interval(both), "more": more})
    return rows


def together(alice: Reader, play: Reader, model: Any, tokenizer: Any) -> list[dict]:
    """Do a layer's heads cancel? The length of the sum of what they add, over the sum of the lengths, by layer.

    1 where all heads add the same direction, 1/3 where nine of equal length are at right angles, less where they
    cancel; `even` is what heads of these lengths would have at right angles. `against`: the share of contributions
    that point away from the sum of the other eight. `varying` is the same with each head's mean over the text taken
    off: what a head adds to every token alike carries no news of the text.
    """
    rows = []
    for number, layer in enumerate(attention_layers(model)):
        added = head_contributions(layer, alice.outputs[number])  # (B, N, H, E)
        rows.append({"layer": number, **angles(added), "varying": angles(added - added.mean((0, 1)))})
    return rows


def angles(added: Tensor) -> dict[str, float]:
    """How the contributions (B, N, H, E) of a layer's heads lie to one another."""
    whole, lengths = added.sum(2), added.norm(dim=-1).sum(2)
    others = whole[:, :, None] - added
    unit = torch.nn.functional.normalize(added, dim=-1)
    cosines = torch.einsum("bnhe,bnge->bnhg", unit, unit)[..., ~torch.eye(HEADS, dtype=torch.bool)]
    measures = {
        "ratio": whole.norm(dim=-1) / lengths,
        "even": added.square().sum((2, 3)).sqrt() / lengths,
        "against": ((added * others).sum(-1) < 0).float(),
        "cosine": cosines,
    }
    return {name: round(float(measure.mean()), 3) for name, measure in measures.items()}


def known_heads(alice: Reader, play: Reader, model: Any, tokenizer: Any) -> dict:
    """The induction and previous-token heads, found by their profile, and what removing them does.

    On random tokens that come twice (eight rows of 40), loss is that of the second time; on plain text, of all. Beside
    each set stand as many other heads of the same layers, drawn five times.
    """
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(200, 48000, (8, 40), generator=draw)
    twice = Reader(model, torch.cat([tokens, tokens], 1))
    found = profile(weights_of(model, twice.ids), twice.ids)
    plain = profile(weights_of(model, alice.ids))
    model.set_attn_implementation("sdpa")
    sets = {
        "induction": found["induction"].flatten().topk(5).indices.tolist(),
        "previous": plain["previous"].flatten().topk(3).indices.tolist(),
    }
    result: dict[str, Any] = {
        "loss": {
            "repeated": round(float(twice.clean[:, 40:].mean()), 3),
            "first time": round(float(twice.clean[:, :39].mean()), 3),
            "plain": round(float(alice.clean.mean()), 3),
        }
    }
    for name, places in sets.items():
        heads = [divmod(place, HEADS) for place in places]
        scores = (found if name == "induction" else plain)[name]
        others = [beside(heads, draw) for _ in range(5)]
        row: dict[str, Any] = {"heads": [[*head, round(float(scores[head]), 3)] for head in heads]}
        row["next best"] = round(float(scores.flatten().sort(descending=True).values[len(heads)]), 3)
        for how in ("mean", "resample", "zero"):
            row[f"repeated {how}"] = spread(twice.damage(heads, how)[:, 40:].mean(1))
            row[f"repeated {how}, others"] = [
                round(float(twice.damage(other, how)[:, 40:].mean()), 3) for other in others
            ]
        row["plain mean"] = interval(alice.damage(heads))
        row["plain mean, others"] = [round(float(alice.damage(other).mean()), 4) for other in others]
        result[name] = row
    return result


def beside(heads: list[Head], draw: torch.Generator) -> list[Head]:
    """As many other heads of the same layers, none of them twice."""
    found: list[Head] = []
    for layer in sorted({layer for layer, _ in heads}):
        free = [(layer, head) for head in range(HEADS) if (layer, head) not in heads]
        count = sum(at == layer for at, _ in heads)
        found += [free[i] for i in torch.randperm(len(free), generator=draw)[:count].tolist()]
    return found


def moved(alice: Reader, play: Reader, model: Any, tokenizer: Any) -> list[dict]:
    """Between neighbouring layers: one group of heads changed places, or the whole layers did.

    A group is a key/value head with its three query heads: what a head reads and writes with, all four slices. Beside
    it, the same two groups removed by their means. Groups that change places within one layer change nothing.
    """
    draw, rows = torch.Generator().manual_seed(4), []
    layers = model.model.layers

    def slices(layer: int, group: int) -> list[Tensor]:
        part = layers[layer].self_attn
        q, k = slice(group * 192, group * 192 + 192), slice(group * 64, group * 64 + 64)
        return [part.q_proj.weight[q], part.k_proj.weight[k], part.v_proj.weight[k], part.o_proj.weight[:, q]]

    def exchange(a: tuple[int, int], b: tuple[int, int]) -> None:
        for one, other in zip(slices(*a), slices(*b)):
            before = one.clone()
            one.copy_(other)
            other.copy_(before)

    exchange((5, 0), (5, 1))
    within = float((alice.loss(5) - alice.clean).abs().max())
    exchange((5, 0), (5, 1))
    for layer in range(LAYERS - 1):
        group = int(torch.randint(3, (), generator=draw))
        exchange((layer, group), (layer + 1, group))
        of_group = alice.loss(layer) - alice.clean
        exchange((layer, group), (layer + 1, group))
        heads = [(at, head) for at in (layer, layer + 1) for head in range(group * 3, group * 3 + 3)]
        a, b = layers[layer], layers[layer + 1]
        layers[layer], layers[layer + 1] = b, a
        of_layers = alice.loss(layer) - alice.clean
        layers[layer], layers[layer + 1] = a, b
        removed = alice.damage(heads)
        rows.append(
            {
                "layer": layer,
                "group": group,
                "exchanged": interval(of_group),
                "removed": interval(removed),
                "less when removed": interval(of_group - removed),
                "layers exchanged": interval(of_layers),
            }
        )
    return [{"within a layer": within}, *rows]


STAGES = (together, known_heads, every_head, many, pairs, moved, three_ways)


def kept(name: str, stage: Callable, *given: Any) -> Any:
    """A stage's result, computed once for each version of this file."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    place = cache_folder() / "runs" / f"heads_removed-{version}" / f"{name}.json"
    if not place.exists():
        result = stage(*given)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(result))
        print(name, flush=True)
    return json.loads(place.read_text())


@torch.inference_mode()
def main(options: list[str]) -> None:
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    play = next(iter(shakespeare().values()))
    texts = [tokenizer(text, return_tensors="pt").input_ids[:, :512].view(-1, WINDOW) for text in (ALICE, play[:4000])]
    alice, other = Reader(model, texts[0]), Reader(model, texts[1])
    figures = {stage.__name__: kept(stage.__name__, stage, alice, other, model, tokenizer) for stage in STAGES}
    write("heads_removed", "nox -s bench -- heads_removed", figures, threads=1, little=LITTLE)
