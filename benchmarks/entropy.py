"""Does dense attention spread evenly? The entropy of every trained head, against that of an even spread.

A row of weights a over n keys has the entropy H = -sum a ln a: ln n where the weight is even, 0 where one key has all.
exp(H) is the number of keys that an even spread of the same entropy would have. Two models read Shakespeare:

    SmolLM2   30 layers of 9 heads, causal: the last 32 tokens of each text, read as the end of 64 to 2,048 tokens
    MiniLM    6 layers of 12 heads, not causal: every token of texts of 16, 64 and 256 tokens, and of 72 sentences

Many heads rest on the first token, or in MiniLM on one of the two markers, where they have nothing to look for. So
each figure is taken twice: of the whole row, and of the rest of it, without these tokens and rescaled to sum to 1. The
control is an untrained twin: for SmolLM2 a Llama of the same shape with fresh weights, for MiniLM its own embeddings
and norms with fresh matrices. And the same SmolLM2, at 2,048 tokens and not trained again, under a sparse mask: the
last 128 positions, and every 128th.

    nox -s bench -- entropy

What is measured of one text is kept in `runs/entropy` of the cache folder or in --runs=FOLDER.
"""

import copy
import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor, nn

from benchmarks.record import keep, write
from nondual.analysis import weights_of
from nondual.data import RELATIONS, shakespeare
from nondual.pretrained import minilm, smollm2
from nondual.store import cache_folder

PLAYS = ("macbeth", "the-tempest", "hamlet", "twelfth-night", "othello", "julius-caesar", "henry-v", "cymbeline")
LENGTHS = {"SmolLM2": (64, 256, 1024, 2048), "MiniLM": (16, 64, 256)}
QUERIES, NEAR, FIRST, PERIOD = 32, 128, 4, 128
"""Of SmolLM2 the last 32 queries are measured; near are the last 128 keys; pattern is near and the first 4."""
BINS = 20
HALF, EVEN = 0.5, 0.95  # of ln n: below the one a head is called narrow, above the other nearly even
ARMS = ("trained", "untrained")


def main(options: list[str]) -> None:
    folder = next((Path(o.removeprefix("--runs=")) for o in options if o.startswith("--runs=")), None)
    folder = folder or cache_folder() / "runs" / "entropy"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    models: dict[str, Any] = {"SmolLM2": SmolLM2, "MiniLM": MiniLM}
    figures: dict[str, Any] = {}
    for name, model in models.items():
        found: dict[str, Any] = {}
        ready = None
        for arm in (*ARMS, *(["sparse"] if name == "SmolLM2" else [])):
            for which in range(len(PLAYS)):
                file = folder / f"{name}_{arm}_{which}.json"
                if not file.exists():
                    ready = ready or model()
                    keep(file, ready.sparse(which) if arm == "sparse" else ready.measure(arm, which))
                    print(file.name, flush=True)
                found.setdefault(arm, []).append(json.loads(file.read_text()))
        masked = found.pop("sparse", [])
        figures[name] = summary(found, name)
        if masked:
            figures[name]["sparse"] = side_by_side(masked)
    file = folder / "MiniLM_sentences.json"
    if not file.exists():
        ready = MiniLM()
        keep(file, {arm: ready.sentences(arm) for arm in ARMS})
    figures["MiniLM"]["sentences"] = json.loads(file.read_text())
    setup = {"plays": PLAYS, "queries": QUERIES, "near": NEAR, "first": FIRST, "half": HALF, "even": EVEN}
    write("entropy", "nox -s bench -- entropy", figures, **setup, threads=1)


# --- one row of weights --------------------------------------------------------------------------------------------


def spread(weights: Tensor, seen: Tensor, rest: Tensor) -> dict[str, list[list[float]]]:
    """Of weights (layers, H, Q, N), means over the queries, for each layer and head.

    Args:
        weights: rows that sum to 1.
        seen: (Q, N), True at the keys that a query may read.
        rest: (N,), False at the tokens on which a head rests.
    """
    n, m = seen.sum(-1).double(), (seen & rest).sum(-1).double()
    weights = weights.double()
    without = weights * rest
    found = {
        "of_even": torch.special.entr(weights).sum(-1) / n.log(),
        "entropy": torch.special.entr(weights).sum(-1),
        "rest_of_even": renormalised(without) / m.log(),
        "rest_entropy": renormalised(without),
        "rested": 1 - without.sum(-1),
        "largest": weights.amax(-1),
    }
    return {name: [[round(x, 5) for x in layer] for layer in value.mean(-1).tolist()] for name, value in found.items()}


def renormalised(weights: Tensor) -> Tensor:
    """The entropy of rows rescaled to sum to 1."""
    total = weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.special.entr(weights / total).sum(-1)


# --- the models ----------------------------------------------------------------------------------------------------


class SmolLM2:
    """The last tokens of each text, and ever more of the text before them."""

    def __init__(self) -> None:
        model, self.tokenizer = smollm2()
        torch.manual_seed(0)
        self.models = {"trained": model, "untrained": type(model)(model.config).eval()}
        plays = shakespeare()
        texts = [self.tokenizer(plays[play][20_000:32_000])["input_ids"] for play in PLAYS]
        self.texts = [torch.tensor([ids[: LENGTHS["SmolLM2"][-1]]]) for ids in texts]

    @torch.inference_mode()
    def measure(self, arm: str, which: int) -> dict[str, Any]:
        """By length."""
        found = {}
        for n in LENGTHS["SmolLM2"]:
            ids = self.texts[which][:, -n:]
            assert ids.shape[1] == n
            model = self.models[arm]
            model.set_attn_implementation("sdpa")
            before = model.model(ids[:, :-QUERIES], use_cache=True).past_key_values
            model.set_attn_implementation("eager")
            out = model.model(ids[:, -QUERIES:], past_key_values=before, output_attentions=True)
            weights = torch.stack([layer[0] for layer in out.attentions])  # (layers, H, QUERIES, N)
            at = torch.arange(n)
            age = torch.arange(n - QUERIES, n)[:, None] - at
            one = spread(weights, age >= 0, at > 0)
            near, kept = ((age < NEAR) & (age >= 0)), ((age < NEAR) & (age >= 0)) | ((at < FIRST) & (age >= 0))
            one["near"], one["pattern"] = (
                [[round(x, 5) for x in layer] for layer in (weights * keys).sum(-1).mean(-1).tolist()]
                for keys in (near, kept)
            )
            found[str(n)] = one
        return found

    @torch.inference_mode()
    def sparse(self, which: int) -> dict[str, Any]:
        """The trained model at the longest length, dense and under the mask; on_kept: the weight on what it keeps."""
        n = LENGTHS["SmolLM2"][-1]
        ids, at = self.texts[which], torch.arange(n)
        age = at[:, None] - at
        kept = (age >= 0) & ((age < NEAR) | (at % PERIOD == 0))
        model = self.models["trained"]
        found: dict[str, Any] = {"kept": int(kept[-1].sum())}
        for name, mask in {"dense": age >= 0, "sparse": kept}.items():
            bias = torch.zeros(n, n).masked_fill_(~mask, torch.finfo(torch.float32).min)[None, None]
            model.set_attn_implementation("sdpa")
            early, late = bias[..., :-QUERIES, :-QUERIES], bias[..., -QUERIES:, :]
            before = model.model(ids[:, :-QUERIES], attention_mask=early, use_cache=True).past_key_values
            model.set_attn_implementation("eager")
            out = model.model(ids[:, -QUERIES:], attention_mask=late, past_key_values=before, output_attentions=True)
            weights = torch.stack([layer[0] for layer in out.attentions])
            assert name == "dense" or float((weights * ~kept[-QUERIES:]).sum()) == 0
            found[name] = spread(weights, mask[-QUERIES:], at > 0)
            on_kept = (weights * kept[-QUERIES:]).sum(-1).mean(-1)
            found[name]["on_kept"] = [[round(x, 5) for x in layer] for layer in on_kept.tolist()]
        return found


class MiniLM:
    """Every token of a text."""

    def __init__(self) -> None:
        self.encoder = minilm()
        twin = copy.deepcopy(self.encoder.model)
        torch.manual_seed(0)
        for module in twin.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.models = {"trained": self.encoder.model, "untrained": twin.eval()}

    def read(self, arm: str, ids: list[int]) -> dict[str, Any]:
        """One text with its two markers."""
        weights = weights_of(self.models[arm], torch.tensor([ids]))[:, 0]
        n = len(ids)
        rest = torch.ones(n, dtype=torch.bool)
        rest[0] = rest[-1] = False
        return spread(weights, torch.ones(n, n, dtype=torch.bool), rest)

    def measure(self, arm: str, which: int) -> dict[str, Any]:
        """By length."""
        ids = self.encoder.tokenizer.encode(shakespeare()[PLAYS[which]][20_000:24_000]).ids
        return {str(n): self.read(arm, [*ids[: n - 1], ids[-1]]) for n in LENGTHS["MiniLM"]}

    def sentences(self, arm: str) -> dict[str, Any]:
        """The 72 sentences: the mean share of an even spread's entropy, and how many heads are narrow."""
        found = [self.read(arm, self.encoder.tokenizer.encode(relation.text).ids) for relation in RELATIONS]
        heads = {name: torch.tensor([one[name] for one in found]).mean(0) for name in ("of_even", "rest_of_even")}
        lengths = [len(self.encoder.tokenizer.encode(relation.text).ids) for relation in RELATIONS]
        return {
            "tokens": [min(lengths), max(lengths)],
            **{name: round(value.mean().item(), 4) for name, value in heads.items()},
            **{f"{name}_narrow": round((value < HALF).double().mean().item(), 4) for name, value in heads.items()},
        }


# --- what is reported ----------------------------------------------------------------------------------------------


def summary(found: dict[str, list[dict[str, Any]]], model: str) -> dict[str, Any]:
    """By arm and length means over heads with intervals over texts, and a histogram of the heads' means."""
    lengths = LENGTHS[model]
    arms: dict[str, Any] = {}
    for arm, texts in found.items():
        arms[arm] = {}
        for n in map(str, lengths):
            of = {name: torch.tensor([text[n][name] for text in texts]).flatten(1) for name in texts[0][n]}
            row: dict[str, Any] = {name: interval(value.mean(1)) for name, value in of.items()}
            for name in ("of_even", "rest_of_even"):
                row[f"{name}_narrow"] = interval((of[name] < HALF).double().mean(1))
                row[f"{name}_nearly_even"] = interval((of[name] > EVEN).double().mean(1))
                row[f"{name}_heads"] = torch.histc(of[name].mean(0).clamp(0, 1), BINS, 0, 1).int().tolist()
            for name in ("entropy", "rest_entropy"):
                row[f"{name}_keys"] = interval(of[name].mean(1).exp())
                row[f"{name}_even_keys"] = round(math.exp(choice(model, int(n), name.startswith("rest"))), 1)
            arms[arm][n] = row
        for name in ("entropy", "rest_entropy"):
            keys = [choice(model, n, name.startswith("rest")) for n in lengths]
            powers = [power(keys, [mean(flat(text[str(n)][name])) for n in lengths]) for text in texts]
            arms[arm][f"{name}_power"] = interval(torch.tensor(powers))
    less: dict[str, Any] = {}
    for n in map(str, lengths):
        for name in ("of_even", "rest_of_even"):
            pairs = zip(found["trained"], found["untrained"])
            gaps = [mean(flat(b[n][name])) - mean(flat(a[n][name])) for a, b in pairs]
            less.setdefault(n, {})[name] = interval(torch.tensor(gaps))
    return {"lengths": lengths, "arms": arms, "trained_less_than_untrained_by": less}


def side_by_side(texts: list[dict[str, Any]]) -> dict[str, Any]:
    """Dense and under the mask: means over heads with intervals over texts, and the difference, paired by text."""
    found: dict[str, Any] = {"kept": texts[0]["kept"], "period": PERIOD}
    for name in texts[0]["dense"]:
        dense, sparse = (torch.tensor([mean(flat(text[arm][name])) for text in texts]) for arm in ("dense", "sparse"))
        found[name] = {"dense": interval(dense), "sparse": interval(sparse), "difference": interval(sparse - dense)}
    for name in ("entropy", "rest_entropy"):
        pairs = {
            arm: torch.tensor([mean(flat(text[arm][name])) for text in texts]).exp() for arm in ("dense", "sparse")
        }
        found[f"{name}_keys"] = {arm: interval(value) for arm, value in pairs.items()}
    return found


def flat(table: list[list[float]]) -> list[float]:
    """All heads in a row."""
    return [x for row in table for x in row]


def choice(model: str, n: int, rest: bool) -> float:
    """The mean over the queries of ln of how many keys one may read, with or without those on which heads rest."""
    if model == "SmolLM2":
        return mean(math.log(m - rest) for m in range(n - QUERIES + 1, n + 1))
    return math.log(n - 2 * rest)


def power(keys: list[float], entropies: list[float]) -> float:
    """The power of the number of keys (given as ln) with which exp(H) grows, by least squares: 1 for an even spread."""
    x, y = mean(keys), mean(entropies)
    return sum((a - x) * (b - y) for a, b in zip(keys, entropies)) / sum((a - x) ** 2 for a in keys)


def interval(values: Tensor, sure: float = 0.95) -> dict[str, float]:
    """The mean over the texts and its interval by Student's t."""
    each = [float(value) for value in values]
    half = float(student.ppf((1 + sure) / 2, len(each) - 1)) * stdev(each) / math.sqrt(len(each))
    return {"mean": round(mean(each), 4), "low": round(mean(each) - half, 4), "high": round(mean(each) + half, 4)}
