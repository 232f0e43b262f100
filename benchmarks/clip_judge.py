"""What the trained models of `clip` are asked: intervals, names that resemble each other, classes, the modality gap.

Every interval is a bootstrap over concepts: of the M test concepts, M are drawn with replacement, 2,000 times, and the
middle 95 % of the means is given. A concept's value is first averaged over styles and seeds. The pictures and names
among which one is looked for stay the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.clip_data import COMPLETE, HELD_STYLE, Pairs, encoded
from benchmarks.clip_run import model_of
from benchmarks.intervals import bootstrap
from nondual.analysis import close_gap, modality_gap, probe_modality
from nondual.multimodal.clip import CLIP, zero_shot_classifier
from nondual.multimodal.retrieval import recall
from nondual.pretrained import minilm

WAYS = ("picture to name", "name to picture")
CAPTIONS = ("name", "name and tags")
NEAR = 0.8
"""The cosine of two names' vectors from which on they count as near."""


def interval(values: Tensor) -> list[float]:
    """[mean, low, high] over the M concepts of (M,)."""
    return [round(x, 4) for x in bootstrap(values)]


# --- recall --------------------------------------------------------------------------------------------------------


def each(results: Sequence[dict[str, Any]], part: str, caption: str, what: str) -> Tensor:
    """Of every concept of a part, a measure averaged over the part's styles and over runs (M,)."""
    found = [
        torch.tensor(values[what])
        for result in results
        for name, values in result["found"].items()
        if name.startswith(f"{part}, ") and name.endswith(f", {caption}")
    ]
    return torch.stack(found).double().mean(0)


def parts_of(result: dict[str, Any]) -> list[str]:
    """The parts that a result has: seen and unseen concepts and styles."""
    return list(dict.fromkeys(name.rsplit(", ", 2)[0] for name in result["found"]))


def recalls(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Recall at 1 and 5, both ways, of each part and for both captions, each [mean, low, high]."""
    return {
        part: {
            caption: {
                f"{way}, {k}": interval(each(results, part, caption, f"{way}, {k}")) for way in WAYS for k in (1, 5)
            }
            for caption in CAPTIONS
        }
        for part in parts_of(results[0])
    }


def differences(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], part: str) -> dict[str, Any]:
    """Recall of a less that of b, paired by concept and seed: [mean, low, high], and the mean of each pair of seeds."""
    return {
        f"{way}, {k}": {
            "interval": interval(each(a, part, "name", f"{way}, {k}") - each(b, part, "name", f"{way}, {k}")),
            "by seed": [
                round(
                    float(
                        each([x], part, "name", f"{way}, {k}").mean() - each([y], part, "name", f"{way}, {k}").mean()
                    ),
                    4,
                )
                for x, y in zip(a, b)
            ],
        }
        for way in WAYS
        for k in (1, 5)
    }


def near_names(result: dict[str, Any], pairs: Pairs) -> dict[str, Any]:
    """How much names that resemble each other make it easier or harder.

    Easier: a name of the training is near. Harder: another name of the test is.
    """
    names = pairs.captions[:, 0]
    to_train = (names[pairs.test] @ names[pairs.train].T).amax(1)
    among = names[pairs.test] @ names[pairs.test].T
    among.fill_diagonal_(-1)
    hits = each([result], "seen style, unseen concept", "name", "picture to name, 1")
    split: dict[str, Any] = {"cosine": NEAR}
    for what, is_near in (("training", to_train >= NEAR), ("test", among.amax(1) >= NEAR)):
        split[f"near a name of the {what}"] = {
            "concepts": int(is_near.sum()),
            "recall at 1": interval(hits[is_near]) if is_near.any() else None,
            "recall at 1 of the others": interval(hits[~is_near]),
        }
    return split


# --- zero-shot classes ---------------------------------------------------------------------------------------------

TEMPLATES = ("{}", "a picture of {}", "an emoji of {}", "a drawing of {}", "a small icon that shows {}")
GROUPS = {
    "smileys-emotion": ("a face with a feeling", "a smiley", "a heart"),
    "people-body": ("a person", "a part of the body", "a gesture of the hand"),
    "animals-nature": ("an animal", "a plant", "a bird"),
    "food-drink": ("food", "a drink", "a fruit"),
    "travel-places": ("a vehicle", "a building", "the weather"),
    "activities": ("a sport", "a game", "a celebration"),
    "objects": ("a tool", "clothing", "a thing of the household"),
    "symbols": ("a symbol", "a sign", "an arrow"),
}
"""The groups of emoji as Unicode has them, and three words for each, chosen before any run."""

PROMPTS = {
    "one word": [[words[0]] for words in GROUPS.values()],
    "one word, templates averaged": [[t.format(words[0]) for t in TEMPLATES] for words in GROUPS.values()],
    "three words averaged": [list(words) for words in GROUPS.values()],
    "three words, templates averaged": [[t.format(w) for w in words for t in TEMPLATES] for words in GROUPS.values()],
}


def zero_shot(model: CLIP, pairs: Pairs) -> dict[str, Any]:
    """The groups of unseen concepts, told by classifiers made of words: [share right, low, high] for each prompt.

    Chance is what always naming the largest group would score, and 1/8 where every group counts alike ("balanced").
    Beside them a read-out that is trained: a linear layer fitted to the training pictures' vectors and groups.
    """
    encoder, order = minilm(), list(GROUPS)
    label = torch.tensor([order.index(pairs.groups[i]) for i in pairs.test.tolist()])
    images = {style: _encode(model, pairs.of(pairs.test, style)) for style in (*COMPLETE, HELD_STYLE)}
    parts = {"seen style": COMPLETE, "unseen style": (HELD_STYLE,)}

    def scored(layer: torch.nn.Linear, styles: tuple[str, ...]) -> dict[str, Any]:
        right = torch.stack([(layer(images[style]).argmax(1) == label).double() for style in styles]).mean(0)
        balanced = torch.stack([right[label == c].mean() for c in range(len(order))]).mean()
        return {"right": interval(right), "balanced": round(float(balanced), 4)}

    layers = {
        name: zero_shot_classifier(model, [encoded(encoder, texts) for texts in prompts])
        for name, prompts in PROMPTS.items()
    }
    single = {
        t: zero_shot_classifier(model, [encoded(encoder, [t.format(words[0])]) for words in GROUPS.values()])
        for t in TEMPLATES
    }
    layers["trained read-out"] = read_out(model, pairs, order)
    return {
        "pictures": len(label),
        "largest group": round(float(label.bincount().max()) / len(label), 4),
        **{
            part: {name: scored(layer, styles) for name, layer in layers.items()}
            | {"one word, each template": {t: scored(layer, styles)["right"][0] for t, layer in single.items()}}
            for part, styles in parts.items()
        },
    }


def read_out(model: CLIP, pairs: Pairs, order: list[str]) -> torch.nn.Linear:
    """A linear layer fitted to the vectors and groups of all training pictures in known styles."""
    rows = torch.isin(pairs.concept, pairs.train) & (pairs.style != pairs.styles.index(HELD_STYLE))
    x = torch.cat([_encode(model, part) for part in pairs.pictures[rows].split(512)])
    y = torch.tensor([order.index(pairs.groups[i]) for i in pairs.concept[rows].tolist()])
    layer = torch.nn.Linear(x.shape[1], len(order))
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    newton = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        newton.zero_grad()
        value = F.cross_entropy(layer(x), y) + 1e-4 * layer.weight.square().sum()
        value.backward()
        return value

    newton.step(loss)  # pyright: ignore[reportArgumentType] a loss may be a tensor
    return layer.requires_grad_(False)


# --- the modality gap ----------------------------------------------------------------------------------------------

SHARES = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def gap(model: CLIP, pairs: Pairs) -> dict[str, Any]:
    """How far apart pictures and names of held-out concepts lie in a known style, and what closing the gap does."""
    concepts = torch.cat([pairs.test, pairs.tune])
    images = _encode(model, pairs.of(concepts, COMPLETE[0]))
    with torch.no_grad():
        texts = model.encode_texts(pairs.captions[concepts, 0])
    found = modality_gap(images, texts)
    half = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    first, second = (images[part] for part in half.tensor_split(2))
    m = len(pairs.test)
    result = {
        "pairs": len(concepts),
        "distance": round(found.distance, 4),
        "images_cosine": round(found.images_cosine, 4),
        "texts_cosine": round(found.texts_cosine, 4),
        "own pair's cosine": round(float((images * texts).sum(1).mean()), 4),
        "probe": round(probe_modality(images, texts), 4),
        "probe, half of the images against the other": round(probe_modality(first, second[: len(first)]), 4),
        "probe, gap closed": round(probe_modality(*close_gap(images, texts)), 4),
        "scale": round(model.scale.item(), 2),
        "moved": {},
    }
    for share in SHARES:
        x, t = close_gap(images, texts, share)
        moved = recall(x[:m] @ t[:m].T, k=(1, 5))
        result["moved"][str(share)] = {
            "distance": round(modality_gap(x, t).distance, 4),
            **{f"picture to name, {k}": round(v, 4) for k, v in moved.image_to_text.items()},
            **{f"name to picture, {k}": round(v, 4) for k, v in moved.text_to_image.items()},
        }
    return result


def gap_untrained(pairs: Pairs, loss: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The same of models that were not trained."""
    rows = []
    for seed in seeds:
        torch.manual_seed(seed)
        found = gap(model_of(loss).eval(), pairs)
        rows.append({name: found[name] for name in ("distance", "images_cosine", "texts_cosine", "probe")})
    return rows


@torch.no_grad()
def _encode(model: CLIP, pictures: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model.encode_images(part) for part in pictures.split(512)])
