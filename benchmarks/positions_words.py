"""What a word's vector comes from in MiniLM: the word itself, its company, its place; with and without positions."""

import random
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.positions_recency import kept_share
from nondual.data import BANK, SENSES
from nondual.pretrained import minilm
from nondual.pretrained.encoder import SentenceEncoder

WORDS = {"bank": {sense: sentences[:12] for sense, sentences in BANK.items()}, **SENSES}
SENTENCES = [(word, text) for word, senses in WORDS.items() for texts in senses.values() for text in texts]
FORMS = 8  # in how many arrangements, and at how many offsets, each sentence is read
DRAWS = 2000


def measure() -> dict[str, Any]:
    """The shares of variance, layer by layer, and the sense accuracies."""
    encoder = minilm()
    with torch.inference_mode():
        kept = persistence(encoder)
        whole = [[(ids_of(encoder, text), word_at(encoder, word, text), 0)] for word, text in SENTENCES]
        moved = [[(ids, at, 2 * k) for k in range(FORMS)] for ((ids, at, _),) in whole]
        mixed = [
            [(*arranged(ids, at, 1000 * i + k), 0) for k in range(FORMS)] for i, ((ids, at, _),) in enumerate(whole)
        ]
        found = {
            "arranged": components(states(encoder, mixed)),
            "shifted": components(states(encoder, moved)),
        }
        senses = {
            "with positions": states(encoder, whole)[:, :, 0],
            "without positions": states(encoder, whole, positions=False)[:, :, 0],
            "without company": states(encoder, whole, company=False)[:, :, 0],
            "without both": states(encoder, whole, positions=False, company=False)[:, :, 0],
            "words in random order": states(encoder, mixed)[:, :, 0],
        }
    return {
        "words": len(WORDS),
        "sentences": len(SENTENCES),
        "forms": FORMS,
        "components": found,
        "senses": sense_accuracy(senses),
        "essay": essay_pair(encoder),
        "persistence": kept,
    }


def ids_of(encoder: SentenceEncoder, text: str) -> list[int]:
    return encoder.tokenizer.encode(text).ids


def word_at(encoder: SentenceEncoder, word: str, text: str) -> int:
    return encoder.tokens(text).index(word)


def arranged(ids: list[int], at: int, seed: int) -> tuple[list[int], int]:
    """The sentence's tokens in a random order, between its markers, and where the word then stands."""
    order = list(range(1, len(ids) - 1))
    random.Random(seed).shuffle(order)
    return [ids[0], *(ids[i] for i in order), ids[-1]], 1 + order.index(at)


def states(
    encoder: SentenceEncoder,
    read: list[list[tuple[list[int], int, int]]],
    *,
    positions: bool = True,
    company: bool = True,
) -> Tensor:
    """The word's vector before the first layer and after each (layers + 1, sentences, forms, E).

    Args:
        encoder: MiniLM.
        read: for each sentence its forms: its tokens, the word's index, and the position of the first token.
        positions: False to give every token the mean of the table's first 64 rows for a position.
        company: False to let every token attend to itself alone.
    """
    model = encoder.model
    table = model.position.table.weight
    each = []
    for ids, at, start in (form for forms in read for form in forms):
        tokens = torch.tensor([ids])
        where = table[start : start + len(ids)] if positions else table[:64].mean(0)
        x = model.norm(model.token(tokens) + where + model.segment(torch.zeros_like(tokens)))
        mask = None if company else torch.eye(len(ids), dtype=torch.bool)
        seen = [x[0, at]]
        for layer in model.encoder.layers:
            x = layer(x, mask=mask)
            seen.append(x[0, at])
        each.append(torch.stack(seen))
    return torch.stack(each, 1).unflatten(1, (len(read), -1))


def components(x: Tensor) -> list[dict[str, float]]:
    """For each layer the shares of the variance, by the nested analysis of variance for random effects.

    Word, sense within word, sentence within sense, form within sentence: the mean squares less what the levels below
    add to them, so that a level of few members is not credited with the noise of the level below it.
    """
    layers, _, forms, _ = x.shape
    words, senses = len(WORDS), 2
    x = x.double().view(layers, words, senses, -1, forms, x.shape[-1])
    texts = x.shape[3]
    sentence = x.mean(4)
    sense = sentence.mean(3)
    word = sense.mean(2)

    def square(part: Tensor) -> Tensor:
        return part.square().flatten(1).sum(1)

    ms_form = square(x - sentence[:, :, :, :, None]) / (words * senses * texts * (forms - 1))
    ms_text = forms * square(sentence - sense[:, :, :, None]) / (words * senses * (texts - 1))
    ms_sense = forms * texts * square(sense - word[:, :, None]) / (words * (senses - 1))
    ms_word = forms * texts * senses * square(word - word.mean(1, keepdim=True)) / (words - 1)
    parts = {
        "word": (ms_word - ms_sense) / (forms * texts * senses),
        "sense": (ms_sense - ms_text) / (forms * texts),
        "other company": (ms_text - ms_form) / forms,
        "form": ms_form,
    }
    parts = {name: part.clamp(min=0) for name, part in parts.items()}
    total = cast(Tensor, sum(parts.values()))
    return [{name: round((part / total)[i].item(), 4) for name, part in parts.items()} for i in range(layers)]


def told(x: Tensor, sense: Tensor) -> Tensor:
    """Whether the nearest of the two senses' mean vectors is the right one; the sentence itself is left out (B,).

    x (B, E), sense (B,) of 0 and 1. A half where both are as near, up to rounding.
    """
    distances = []
    for label in (0, 1):
        member = (sense == label).to(x.dtype)
        sums, count = member @ x, member.sum()
        centre = (sums - member[:, None] * x) / (count - member)[:, None]
        distances.append((x - centre).norm(dim=-1))
    difference = distances[1] - distances[0]
    difference = torch.where(difference.abs() < 1e-4 * x.norm(dim=-1), 0.0, difference)
    return ((difference * (1 - 2 * sense)).sign() + 1) / 2


def sense_accuracy(senses: dict[str, Tensor]) -> dict[str, Any]:
    """By layer, over all sentences; with intervals, and the same with the senses shuffled, for the last layer."""
    label = torch.arange(24) // 12
    generator = torch.Generator().manual_seed(0)
    shuffles = [[label[torch.randperm(24, generator=generator)] for _ in WORDS] for _ in range(100)]
    picks = torch.randint(len(SENTENCES), (DRAWS, len(SENTENCES)), generator=generator)
    found, last = {}, {}
    for name, x in senses.items():
        right = torch.stack([torch.cat([told(w, label) for w in layer.view(-1, 24, layer.shape[-1])]) for layer in x])
        of_words = x[-1].view(-1, 24, x.shape[-1])
        chance = [[told(w, s).mean().item() for w, s in zip(of_words, each)] for each in shuffles]
        chance = torch.tensor(chance).mean(1)  # over the words
        last[name] = right[-1].double()
        found[name] = {
            "by layer": [round(value, 4) for value in right.mean(1).tolist()],
            "of each word": dict(zip(WORDS, [round(v, 3) for v in right[-1].view(-1, 24).mean(1).tolist()])),
            "interval": interval(last[name][picks].mean(1)),
            "shuffled": {"mean": round(chance.mean().item(), 4), "largest of 100": round(chance.max().item(), 4)},
        }
    for name in list(last)[1:]:
        difference = last[name] - last["with positions"]
        found[name]["less with positions"] = {
            "mean": round(difference.mean().item(), 4),
            "interval": interval(difference[picks].mean(1)),
        }
    return found


def interval(draws: Tensor) -> list[float]:
    """The middle 95 % of the draws of a bootstrap over sentences."""
    return [round(value, 4) for value in draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()]


def essay_pair(encoder: SentenceEncoder) -> dict[str, Any]:
    """The essay's example: "bank" at one index behind "river" and behind "savings", by cosine and layer."""
    pair = [("bank", f"The {of} bank was closed.") for of in ("river", "savings")]
    read = [[(ids_of(encoder, text), word_at(encoder, word, text), 0)] for word, text in pair]
    with torch.inference_mode():
        seen = {p: states(encoder, read, positions=p)[:, :, 0] for p in (True, False)}
    cosines = {p: torch.cosine_similarity(x[:, 0], x[:, 1], dim=-1).tolist() for p, x in seen.items()}
    return {
        "sentences": [text for _, text in pair],
        "index": [at for ((_, at, _),) in read],
        "cosine with positions": [round(value, 4) for value in cosines[True]],
        "cosine without positions": [round(value, 4) for value in cosines[False]],
    }


def persistence(encoder: SentenceEncoder) -> dict[str, Any]:
    """As in `kept_share`, over the sentences; and what attention alone would leave, without what is added to it.

    attention: the cosine of what the first layer's attention gives with what went in, each less its sentence's mean.
    """
    layers, real = encoder.layers([text for _, text in SENTENCES])
    texts = [[x[real[i]] for x in layers[:, i]] for i in range(len(SENTENCES))]
    alone = []
    for first in (text[0] for text in texts):
        out = cast(nn.Module, encoder.model.encoder.layers[0].mixer)(first[None])[0]
        pair = (x - x.mean(0) for x in (out, first))
        alone.append(torch.cosine_similarity(*pair, dim=-1).mean())
    return kept_share(texts) | {"attention": round(torch.stack(alone).mean().item(), 4)}
