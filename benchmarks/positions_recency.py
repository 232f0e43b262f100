"""Where SmolLM2's attention goes as its context grows, and how much early and late words matter to what it predicts."""

import itertools
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import mean
from typing import Any, cast

import torch
from torch import Tensor, nn

from nondual.data import shakespeare
from nondual.pretrained import smollm2

PLAYS = ("macbeth", "the-tempest", "hamlet", "twelfth-night")
LENGTHS = (64, 128, 256, 512, 1024, 2048)
PAIR = (("cat", "mat"), ("mat", "cat"))
LAST, NEAR, BLOCK = 32, 16, 8
"""The queries are the last 32 tokens; near are the 16 keys that end with the query's own; a block of 8 is replaced."""


class Measured:
    """SmolLM2, the same last tokens of each text, and ever more of the text before them."""

    def __init__(self) -> None:
        self.model, self.tokenizer = smollm2()
        plays = shakespeare()
        ids = [self.tokenizer(plays[play][20_000:32_000])["input_ids"] for play in PLAYS]
        self.texts = [torch.tensor([text[: LENGTHS[-1]]]) for text in ids]
        self.others = [torch.tensor([text[LENGTHS[-1] :]]) for text in ids[1:] + ids[:1]]
        """For each text some words of another, to be put in its place."""

    @torch.inference_mode()
    def read(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The predictions at the last tokens (LAST, V), and each layer's weights there (H, LAST, N)."""
        self.model.set_attn_implementation("sdpa")
        before = self.model.model(ids[:, :-LAST], use_cache=True).past_key_values
        self.model.set_attn_implementation("eager")
        out = self.model(ids[:, -LAST:], past_key_values=before, output_attentions=True)
        return out.logits[0].log_softmax(-1), [weights[0] for weights in out.attentions]

    @contextmanager
    def without_rotation(self):
        """Queries and keys are not turned: every position is as position 0."""
        rotary = self.model.model.rotary_emb
        self.model.model.rotary_emb = cast(Any, Unturned())
        try:
            yield
        finally:
            self.model.model.rotary_emb = rotary

    @contextmanager
    def untrained(self):
        """Every weight is as a Llama's is before training."""
        trained = self.model
        torch.manual_seed(0)
        self.model = type(trained)(trained.config).eval()
        try:
            yield
        finally:
            self.model = trained

    @torch.inference_mode()
    def two_orders(self) -> dict[str, dict[str, float]]:
        """How far apart the two sentences of the essay are, in the mean of their tokens' last vectors."""
        cat, mat = (self.tokenizer(f" the {a} sat on the {b}", return_tensors="pt")["input_ids"] for a, b in PAIR)
        assert sorted(cat[0].tolist()) == sorted(mat[0].tolist())
        free = torch.zeros(1, 1, cat.shape[1], cat.shape[1])  # added to the scores, in place of the causal mask

        def apart(mask: Tensor | None) -> dict[str, float]:
            self.model.set_attn_implementation("eager")
            a, b = (self.model.model(ids, attention_mask=mask).last_hidden_state[0].mean(0) for ids in (cat, mat))
            return {
                "cosine": round(torch.cosine_similarity(a, b, dim=0).item(), 6),
                "relative distance": round(((a - b).norm() / a.norm()).item(), 6),
            }

        found = {"as trained": apart(None)}
        with self.without_rotation():
            found |= {"not turned": apart(None), "not turned, mask lifted": apart(free)}
        return found

    @torch.inference_mode()
    def persistence(self) -> dict[str, Any]:
        """How much of a token's vector is there after a layer, by `kept_share`; first tokens left out."""
        self.model.set_attn_implementation("sdpa")
        texts = [self.model.model(x[:, :128], output_hidden_states=True).hidden_states for x in self.texts]
        return kept_share([[layer[0, 1:] for layer in layers] for layers in texts])

    def measure(self, which: int, n: int, arm: str) -> dict[str, Any]:
        """One text, one length of context: the shares of attention, and what replacing a block changes."""
        ids = self.texts[which][:, -n:].clone()
        other = self.others[which]
        if arm == "first token replaced":
            ids[0, 0] = other[0, 0]
        if arm == "first token a marker":
            ids[0, 0] = cast(int, self.tokenizer.bos_token_id)
        changes: dict[str, Callable[[], AbstractContextManager]] = {
            "not turned": self.without_rotation,
            "untrained": self.untrained,
        }
        with changes.get(arm, nullcontext)():
            predicted, weights = self.read(ids)
            found = shares(weights)
            if arm in ("as trained", "not turned") and n <= 1024:
                early, late = slice(1, 1 + BLOCK), slice(n - LAST - BLOCK, n - LAST)
                for name, block in {"early": early, "late": late}.items():
                    changed = ids.clone()
                    changed[0, block] = other[0, :BLOCK]
                    theirs, _ = self.read(changed)
                    moved = (predicted.exp() * (predicted - theirs)).sum(-1).mean().item()
                    found[f"moved by {name} block"] = round(moved, 5)
        return found


class Unturned(nn.Module):
    """In the place of the rotary embedding: cosines of 1 and sines of 0."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Both (B, N, D), in the dtype of x."""
        ones = torch.ones(*position_ids.shape, 64, dtype=x.dtype, device=x.device)
        return ones, torch.zeros_like(ones)


def shares(weights: list[Tensor]) -> dict[str, Any]:
    """Of the weights of the last queries, over heads and queries: their means over all layers, and some by layer.

    first: on the first token. near: on the last NEAR keys, the query's own included. early: on tokens 1 to NEAR, a
    share of NEAR/n where it is even. effective: exp of the entropy, how many keys share the weight. largest: the
    largest weight of a key other than the first.
    """
    rows: dict[str, list[float]] = {}
    for w in weights:
        w = w.double()
        n = w.shape[-1]
        age = torch.arange(n - LAST, n)[:, None] - torch.arange(n)  # of each key, seen from each query
        near = (w * ((age >= 0) & (age < NEAR))).sum(-1)
        layer = {
            "first": w[..., 0],
            "near": near,
            "early": w[..., 1 : 1 + NEAR].sum(-1),
            "effective": torch.special.entr(w).sum(-1).exp(),
            "largest": w[..., 1:].amax(-1),
        }
        for name, value in layer.items():
            rows.setdefault(name, []).append(value.mean().item())
    found: dict[str, Any] = {name: round(mean(values), 5) for name, values in rows.items()}
    found["first_by_layer"] = [round(value, 4) for value in rows["first"]]
    found["near_by_layer"] = [round(value, 4) for value in rows["near"]]
    return found


def kept_share(texts: list[list[Tensor]]) -> dict[str, Any]:
    """Of the vectors (N, E) of each text after each layer, less their mean: are they still those of the layer below?

    cosine: with the same token's vector a layer below, by layer. nearest: how often that is the nearest of all of the
    text's vectors there. through: the same two from the first to the last layer.
    """
    rows = []
    for layers in texts:
        unit = [torch.nn.functional.normalize(x - x.mean(0), dim=-1) for x in layers]
        pairs = [*itertools.pairwise(unit), (unit[0], unit[-1])]
        tables = [above @ below.T for below, above in pairs]
        cosine = [table.diagonal().mean().item() for table in tables]
        nearest = [(table.argmax(1) == torch.arange(len(table))).double().mean().item() for table in tables]
        rows.append((cosine, nearest))
    cosine, nearest = ([round(mean(values), 4) for values in zip(*(row[i] for row in rows))] for i in (0, 1))
    return {"cosine": cosine[:-1], "nearest": nearest[:-1], "through": {"cosine": cosine[-1], "nearest": nearest[-1]}}


def plan() -> list[tuple[int, int, str]]:
    """What is measured: text, length, arm."""
    arms = ("first token replaced", "first token a marker", "not turned", "untrained")
    whole = [(which, n, "as trained") for n in LENGTHS for which in range(len(PLAYS))]
    return whole + [(which, n, arm) for arm in arms for n in (64, 512) for which in range(len(PLAYS))]


def measure(folder: Path) -> dict[str, Any]:
    """By arm and length, a list with one entry for each text. What is in the folder is not measured again."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    more: dict[str, Any] = {}
    model: Measured | None = None
    for which, n, arm in plan():
        file = folder / f"recency_{arm.replace(' ', '-')}_{n}_{which}.json"
        if not file.exists():
            model = model or Measured()
            file.write_text(json.dumps(model.measure(which, n, arm)))
            print(file.name, flush=True)
        found.setdefault(arm, {}).setdefault(str(n), []).append(json.loads(file.read_text()))
    for name in ("two_orders", "persistence"):
        file = folder / f"{name}.json"
        if not file.exists():
            model = model or Measured()
            file.write_text(json.dumps(getattr(model, name)()))
        more[name] = json.loads(file.read_text())
    return {"plays": PLAYS, "queries": LAST, "near": NEAR, "block": BLOCK, "arms": found, **more}
