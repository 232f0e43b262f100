"""Two models that others trained, for `routing`: what moves a vector in MiniLM, and what is true in SmolLM2.

Influence. In each layer of MiniLM the input vector of token j is replaced by the mean of the sentence's input vectors,
and we measure how far the attention's output at each other token i moves. Beside it stand the weight a_ij, the mean
over the heads; the norm of what the heads bring from j to i, |Σ_h a_ij^h W_O^h W_V^h x_j| (Kobayashi et al. 2020,
2004.10102, section 3); and the weight the other way round, a_ji. And in the whole model: the input vector is replaced
before the first layer, and the last layer's vector at i moves. Beside it the rollout and the flow of the weights. Each
is compared with the influence by the rank correlation over the tokens j other than i, and averaged over i; the interval
is over sentences.

Truth. The last vector of a statement, true or false, in each layer of SmolLM2. A direction is fitted to five topics
(the mean of true less false, as in Marks and Tegmark 2023, 2310.06824) and asked, of each pair of the sixth topic,
which is true. The layer is the one that does best when each of the five is left out in turn. Beside it: a direction
fitted to labels drawn by chance, and the log-probability that the model gives to the statement.

Copying. SmolLM2 reads tokens drawn by chance, the last of which has come before: what followed it then says nothing of
what comes now. Beside it, the same tokens with a new one at the end. The head that looks most at what followed is
found on half of the rows, and reported on the other half.
"""

from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.intervals import bootstrap
from benchmarks.record import kept
from benchmarks.routing_statements import Pair, capitals, pairs
from nondual.analysis import attention_flow, attention_rollout, weights_of
from nondual.data import RELATIONS

BATCH = 16
DRAWS = 20
"""How many times the control's labels are drawn."""
LENGTH = 48
"""Of the rows of tokens drawn by chance."""


def interval(each: Tensor) -> list[float]:
    """The mean, and its 95 % interval by drawing the rows anew."""
    return [round(x, 4) for x in bootstrap(each)]


# --- influence -----------------------------------------------------------------------------------------------------


def ranks(x: Tensor) -> Tensor:
    """The rank of each value in its row."""
    return x.argsort(-1).argsort(-1).double()


def agreement(measure: Tensor, influence: Tensor, columns: Tensor) -> float:
    """The rank correlation over the columns j other than i that count, averaged over all rows i; both (N, N)."""
    found = []
    for i in range(len(measure)):
        use = columns.clone()
        use[i] = False
        pair = torch.stack([ranks(measure[i][use]), ranks(influence[i][use])])
        found.append(torch.corrcoef(pair)[0, 1].item())
    return mean(found)


def moved(layer: Any, x: Tensor) -> Tensor:
    """How far a layer's output at i moves when input j is replaced by the mean of all inputs; x (N, E) to (N, N)."""
    n = len(x)
    replaced = x.expand(n, n, -1).clone()
    replaced[torch.arange(n), torch.arange(n)] = x.mean(0)
    return (layer(replaced) - layer(x[None])).norm(dim=-1).T


@torch.no_grad()
def of_sentence(encoder: Any, sentence: str) -> dict[str, Any]:
    """How far each measure agrees with the influence, by layer and in the whole model: over all tokens, over words."""
    model = encoder.model
    ids = torch.tensor([encoder.tokenizer.encode(sentence).ids])
    states, _ = encoder.layers([sentence])
    _, weights = model(ids, return_weights=True)  # (layers, 1, H, N, N)
    n = ids.shape[1]
    every, words = torch.ones(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool)
    words[0] = words[-1] = False
    found: dict[str, Any] = {"all": {}, "words": {}}
    for number, block in enumerate(model.encoder.layers):
        x, mixer = states[number, 0], block.mixer
        influence, a = moved(mixer, x), weights[number, 0]
        values = mixer.v_proj(x).unflatten(-1, (mixer.n_heads, -1))  # (N, H, D)
        brought = torch.einsum("hij,jhd->ijhd", a, values)
        norm = (brought.flatten(2) @ mixer.out_proj.weight.T).norm(dim=-1)
        measures = {"weight": a.mean(0), "weight times value": norm, "weight the other way round": a.mean(0).T}
        for name, columns in (("all", every), ("words", words)):
            for measure, of in measures.items():
                found[name].setdefault(measure, []).append(agreement(of, influence, columns))

    def whole(x: Tensor) -> Tensor:
        for block in model.encoder.layers:
            x = block(x)
        return x

    influence = moved(whole, states[0, 0])
    place = torch.arange(n)
    measures = {
        "rollout": attention_rollout(weights)[0],
        "rollout, residual 0.9": attention_rollout(weights, residual=0.9)[0],
        "flow": attention_flow(weights)[0],
        "mean weight": weights.mean((0, 1, 2)),
        "nearness": -(place[:, None] - place).abs().double() - 1e-6 * place,
    }
    for name, columns in (("all", every), ("words", words)):
        found[name] |= {measure: agreement(of, influence, columns) for measure, of in measures.items()}
    return found


def influence(sentences: int) -> dict[str, Any]:
    """Over the sentences of RELATIONS, the first so many."""
    from nondual.pretrained import minilm

    encoder = minilm()
    each = [of_sentence(encoder, sentence.text) for sentence in RELATIONS[:sentences]]
    result: dict[str, Any] = {"sentences": len(each)}
    for name in ("all", "words"):
        result[name] = {}
        for measure in each[0][name]:
            values = torch.tensor([one[name][measure] for one in each])  # (S,) or (S, layers)
            if values.ndim == 2:
                result[name][f"{measure}, by layer"] = [interval(column) for column in values.T]
                values = values.mean(1)
            result[name][measure] = interval(values)
        gain = [mean(a - b for a, b in zip(one[name]["weight times value"], one[name]["weight"])) for one in each]
        result[name]["value's gain"] = interval(torch.tensor(gain))
        turned = [
            mean(a - b for a, b in zip(one[name]["weight"], one[name]["weight the other way round"])) for one in each
        ]
        result[name]["direction's gain"] = interval(torch.tensor(turned))
    return result


# --- truth ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def states(model: Any, tokenizer: Any, statements: list[str]) -> tuple[Tensor, Tensor]:
    """The last token's vector after each layer (layers, S, E), and each statement's log-probability (S,)."""
    vectors, log_probs = [], []
    for start in range(0, len(statements), BATCH):
        given = tokenizer(statements[start : start + BATCH], return_tensors="pt", padding=True)  # on the left
        out = model(**given, output_hidden_states=True)
        vectors.append(torch.stack([layer[:, -1] for layer in out.hidden_states[1:]]))
        told = out.logits[:, :-1].log_softmax(-1).gather(2, given["input_ids"][:, 1:, None])[..., 0]
        real = given["attention_mask"][:, 1:] * given["attention_mask"][:, :-1]
        log_probs.append((told * real).sum(1))
    return torch.cat(vectors, 1), torch.cat(log_probs)


def right(direction: Tensor, gaps: Tensor) -> Tensor:
    """Of each pair whether the true statement lies further along; direction (E,), gaps (P, E), true less false."""
    return (gaps @ direction > 0).double()


def chosen_layer(gaps: Tensor, topics: Tensor) -> int:
    """The layer that does best when each topic is left out in turn; gaps (layers, P, E), topics (P,)."""
    scores = []
    for layer in gaps:
        found = [right(layer[topics != t].mean(0), layer[topics == t]).mean() for t in topics.unique()]
        scores.append(torch.stack(found).mean())
    return int(torch.stack(scores).argmax())


def truth(few: bool) -> dict[str, Any]:
    """The direction of each five topics on the pairs of the sixth, affirmed and denied, and on the capitals."""
    from nondual.pretrained import smollm2

    model, tokenizer = smollm2()
    asked: list[Pair] = (pairs()[::7] if few else pairs()) + capitals()
    vectors, log_probs = states(model, tokenizer, [text for pair in asked for text in (pair.true, pair.false)])
    gaps = vectors[:, ::2] - vectors[:, 1::2]  # (layers, P, E)
    likelier = (log_probs[::2] > log_probs[1::2]).double()
    names = sorted({pair.topic for pair in asked} - {"capitals"})
    topic = torch.tensor([names.index(pair.topic) if pair.topic in names else -1 for pair in asked])
    denied = torch.tensor([pair.denied for pair in asked])
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for fitted_to, fit in (("affirmed", ~denied & (topic >= 0)), ("both", topic >= 0)):
        scores, chance, layers = torch.zeros(len(asked)).double(), torch.zeros(len(asked)).double(), []
        for t in range(-1, len(names)):
            use, test = fit & (topic != t), topic == t
            layers.append(chosen_layer(gaps[:, use], topic[use]))
            at = gaps[layers[-1]]
            scores[test] = right(at[use].mean(0), at[test])
            for _ in range(DRAWS):
                signs = torch.randint(2, (int(use.sum()), 1), generator=generator) * 2 - 1
                chance[test] += right((at[use] * signs).mean(0), at[test]) / DRAWS
        found[fitted_to], found[f"{fitted_to}, chance"], found[f"{fitted_to}, layers"] = (
            scores,
            chance,
            torch.tensor(layers),
        )
    sets = {"affirmed": ~denied & (topic >= 0), "denied": denied, "capitals": topic == -1}
    sets |= {name: ~denied & (topic == t) for t, name in enumerate(names)}
    unlikely = likelier == 0
    result: dict[str, Any] = {"layers": {name: found[f"{name}, layers"].tolist() for name in ("affirmed", "both")}}
    for name, rows in sets.items():
        result[name] = {"pairs": int(rows.sum()), "the likelier is true": interval(likelier[rows])}
        for fitted_to in ("affirmed", "both"):
            result[name][f"fitted to {fitted_to}"] = interval(found[fitted_to][rows])
            result[name][f"fitted to {fitted_to}, labels by chance"] = interval(found[f"{fitted_to}, chance"][rows])
            for word, part in (("likelier", rows & ~unlikely), ("less likely", rows & unlikely)):
                if part.sum() >= 8:
                    result[name][f"fitted to {fitted_to}, where the true one is {word}"] = [
                        int(part.sum()),
                        *interval(found[fitted_to][part]),
                    ]
    return result


# --- copying -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def copying(rows: int) -> dict[str, Any]:
    """The weight on what followed the last token when it came before, and the probability that it comes again."""
    from nondual.pretrained import smollm2

    model, _ = smollm2()
    generator = torch.Generator().manual_seed(0)
    new = torch.stack([torch.randperm(40_000, generator=generator)[:LENGTH] + 1_000 for _ in range(rows)])
    place = torch.randint(LENGTH // 4, LENGTH // 2, (rows,), generator=generator)
    again, row = new.clone(), torch.arange(rows)
    again[:, -1] = new[row, place]
    followed = new[row, place + 1]
    weight, probability = {}, {}
    for name, ids in (("again", again), ("new", new)):
        weight[name] = torch.cat(
            [
                weights_of(model, part)[:, torch.arange(len(part)), :, -1, at + 1]
                for part, at in zip(ids.split(8), place.split(8))
            ],
            1,
        )  # (layers, rows, H)
        told = torch.cat([model(part).logits[:, -1].softmax(-1) for part in ids.split(8)])
        probability[name] = told[row, followed]
    half = rows // 2
    gain = (weight["again"] - weight["new"])[:, :half].mean(1)
    layer, head = divmod(int(gain.argmax()), gain.shape[1])
    found: dict[str, Any] = {"rows": rows - half, "head": [layer, head]}
    for name in ("again", "new"):
        found[name] = {
            "weight": interval(weight[name][layer, half:, head]),
            "probability": interval(probability[name][half:]),
        }
    return found


def read(folder: Path, tiny: bool) -> dict[str, Any]:
    """All three, kept as they end."""
    torch.set_num_threads(1)
    return {
        "influence": kept(folder / "influence.json", influence, 3 if tiny else 48),
        "truth": kept(folder / "truth.json", truth, tiny),
        "copying": kept(folder / "copying.json", copying, 4 if tiny else 32),
    }
