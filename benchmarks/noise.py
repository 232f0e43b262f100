"""Does softmax attention choose, and does noise accumulate? The rows of weights of trained heads as their texts grow.

A law first. One key is relevant, and its score lies m above that of the N - 1 others, which are equal. The others then
have 1 / (1 + e^m / (N - 1)) of the weight: it grows with N, and to hold it the margin must grow as ln N. If the others'
values are independent, of mean 0 and of the length of the relevant one's, what they add has the length of their weight
over the root of N - 1.

Then two trained models on Shakespeare: SmolLM2's last 32 queries over 64 to 2,048 tokens, MiniLM's last 32 (all, where
there are fewer) in texts of 16 to 256 tokens. Of every row of weights, over all layers, heads and queries:

    largest        the largest weight
    outside        the weight outside of the 8 largest
    added          the length of what the values outside of the 8 largest add, over that of the head's output
    law            the `outside` that the shortest text's would become if its margin stayed as it is

Each is taken of the whole row, and again without the keys on which heads rest (SmolLM2's first token, MiniLM's two
markers), the others' weights rescaled to a sum of 1.

    nox -s bench -- noise
"""

import math
from statistics import mean
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import write
from benchmarks.sparse_patterns import attending, smollm2
from nondual.data import shakespeare
from nondual.language_models.causal import CausalLM
from nondual.pretrained import minilm

PLAYS = ("macbeth", "the-tempest", "hamlet", "twelfth-night")
LENGTHS = {"SmolLM2": (64, 256, 1024, 2048), "MiniLM": (16, 64, 256)}
QUERIES, TOP, NEARLY_ALL = 32, 8, 0.9


class Watched:
    """What `MultiHeadAttention(op=...)` calls: attention as ever, and the figures of its last queries' weights."""

    def __init__(self, resting: list[int]):
        self.resting, self.rows = resting, []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, **_: Any):
        share = q.shape[1] // k.shape[1]
        last = q[:, :, -QUERIES:]
        scores = last @ k.repeat_interleave(share, 1).mT / math.sqrt(q.shape[3])
        if causal:
            n, m = scores.shape[-2:]
            scores = scores.masked_fill(torch.ones(n, m, dtype=torch.bool).triu(m - n + 1), -math.inf)
        rested = torch.zeros(scores.shape[-1], dtype=torch.bool)
        rested[self.resting] = True
        both = {"whole": scores, "rest": scores.masked_fill(rested, -math.inf)}
        values = v.repeat_interleave(share, 1)
        self.rows.append({name: of_rows(s.softmax(-1), values) for name, s in both.items()})
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)


def of_rows(weights: Tensor, values: Tensor) -> dict[str, Tensor]:
    """largest, outside and added of each row, (B, H, queries)."""
    top = weights.topk(TOP, -1)
    outside = weights.scatter(-1, top.indices, 0.0)
    added = (outside @ values).norm(dim=-1) / (weights @ values).norm(dim=-1)
    return {"largest": top.values[..., 0], "outside": outside.sum(-1), "added": added}


def summed_up(watched: Watched) -> dict[str, Any]:
    """Over layers, heads and queries: means, and how many rows have nearly all their weight on one key."""
    found = {}
    for name in ("whole", "rest"):
        each = {figure: torch.stack([row[name][figure] for row in watched.rows]) for figure in watched.rows[0][name]}
        found[name] = {figure: round(x.mean().item(), 5) for figure, x in each.items()}
        found[name]["nearly all on one key"] = round((each["largest"] > NEARLY_ALL).double().mean().item(), 5)
        found[name]["heads mostly so"] = round(
            ((each["largest"] > NEARLY_ALL).double().mean((1, 3)) > 0.5).double().mean().item(), 5
        )
    return found


@torch.no_grad()
def of_smollm2(play: str, n: int) -> dict[str, Any]:
    model, tokenizer = smollm2()
    ids = torch.tensor([tokenizer(shakespeare()[play][20_000:32_000])["input_ids"][: LENGTHS["SmolLM2"][-1]]])
    watched = Watched([0])
    with attending(model, watched):
        model(ids[:, -n:])
    return summed_up(watched)


@torch.no_grad()
def of_minilm(play: str, n: int) -> dict[str, Any]:
    encoder = minilm()
    ids = encoder.tokenizer.encode(shakespeare()[play][20_000:24_000]).ids
    ids = torch.tensor([[ids[0], *ids[1 : n - 1], ids[-1]]])
    watched = Watched([0, n - 1])
    with attending(cast(CausalLM, encoder.model.encoder), watched):
        encoder.model(ids)
    return summed_up(watched)


def law(shortest: float, n: int, m: int) -> float:
    """The weight outside of the TOP largest of m keys, if over n keys it is `shortest` and no score moves."""
    return 1 / (1 + (1 - shortest) / shortest * (n - TOP) / (m - TOP))


def main(options: list[str]) -> None:
    torch.set_num_threads(1)
    measures = {"SmolLM2": of_smollm2, "MiniLM": of_minilm}
    figures: dict[str, Any] = {}
    for name, lengths in LENGTHS.items():
        for part in ("whole", "rest"):
            figures.setdefault(name, {})[part] = []
        rows = {n: [measures[name](play, n) for play in PLAYS] for n in lengths}
        for part in ("whole", "rest"):
            for n in lengths:
                each = [row[part] for row in rows[n]]
                row: dict[str, Any] = {"n": n, "each": each}
                row |= {figure: round(mean(x[figure] for x in each), 5) for figure in each[0]}
                shortest = figures[name][part][0]["outside"] if figures[name][part] else row["outside"]
                row["law"] = round(law(shortest, lengths[0], n), 5)
                figures[name][part].append(row)
                print(name, part, {key: value for key, value in row.items() if key != "each"}, flush=True)
    if "--tiny" in options:
        return
    write("noise", "nox -s bench -- noise", figures, threads=1, plays=list(PLAYS), queries=QUERIES, top=TOP)
