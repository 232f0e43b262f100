"""What the heads of trained models look at: grammar, meaning, nearness; how many patterns; how that changes by layer.

The models are MiniLM (6 layers of 12 heads, reads both ways) and SmolLM2 (30 layers of 9, reads from left to right),
and RXNMapper (12 layers of 8) for reactions. What a head is asked is a pair of words: does its greatest weight go from
one word of the pair to the other? Pieces of words are merged (weights summed over the key's pieces, averaged over the
query's); markers, punctuation and the asking word itself are left out.

The best head is chosen on one half of the sentences and counted on the other, and the other way round. Chosen in the
same way are the best of 20 fixed distances, and the best head of the same model with fresh random matrices in place of
all learned ones (embeddings and norms kept). Intervals are bootstraps over sentences.
"""

import copy
import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import write
from nondual.analysis.heads import weights_of
from nondual.data import ALICE, REACTIONS, RELATIONS
from nondual.data.relations import ALIKE, NAMES
from nondual.pretrained import minilm, rxnmapper, smollm2

OFFSETS = [*range(-10, 0), *range(1, 11)]
Maps = list[Tensor]  # for each sentence (layers, H, words, words)


# --- the models ------------------------------------------------------------------------------------------------------


class Model:
    """A model that gives the weights of all heads, and the places of a text's tokens."""

    causal: bool

    def tokens(self, text: str) -> tuple[Tensor, list[tuple[int, int]]]:
        """The ids (1, N), and for each token its place in the text; a marker's is empty."""
        raise NotImplementedError

    def weights(self, ids: Tensor) -> Tensor:
        """(layers, B, H, N, N)."""
        raise NotImplementedError

    def maps(self, texts: Iterable[tuple[str, tuple[str, ...]]]) -> Maps:
        """The weights between the words of each text, merged over their pieces: (layers, H, words, words)."""
        found = []
        for text, words in texts:
            ids, places = self.tokens(text)
            spans, at = [], 0
            for word in words:
                at = text.index(word, at)
                spans.append((at, at + len(word)))
                at += len(word)
            member = [[float(a < end <= b and start < end) for start, end in places] for a, b in spans]
            pieces = torch.tensor(member)  # (words, tokens)
            assert pieces.sum(1).min() > 0, text
            each = pieces / pieces.sum(1, keepdim=True)
            merged = torch.einsum("wn,lhnm,vm->lhwv", each, self.weights(ids)[:, 0], pieces)
            found.append(merged)
        return found

    def untrained(self, seed: int) -> "Model":
        """The same with fresh random matrices; embeddings and norms are kept."""
        raise NotImplementedError


class MiniLM(Model):
    causal = False

    def __init__(self):
        self.encoder = minilm()
        self.module: nn.Module = self.encoder.model

    def tokens(self, text):
        encoded = self.encoder.tokenizer.encode(text)
        return torch.tensor([encoded.ids]), encoded.offsets

    def weights(self, ids):
        return weights_of(self.module, ids)

    def untrained(self, seed):
        return fresh(self, seed)


class SmolLM2(Model):
    causal = True

    def __init__(self):
        model, self.tokenizer = smollm2()
        self.module = model.model

    def tokens(self, text):
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        return torch.tensor([[self.tokenizer.bos_token_id, *encoded.input_ids]]), [(0, 0), *encoded.offset_mapping]

    def weights(self, ids):
        return weights_of(self.module, ids, use_cache=False)

    def untrained(self, seed):
        return fresh(self, seed)


def fresh(model: Any, seed: int) -> Any:
    """A copy whose linear layers have random weights of the size of an initialisation."""
    twin = copy.copy(model)
    twin.module = copy.deepcopy(model.module)
    torch.manual_seed(seed)
    for module in twin.module.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return twin


def shuffled(model: Any, seed: int) -> Any:
    """A copy in which the rows of each head's key projection are permuted: the same numbers, wrongly matched."""
    twin = copy.copy(model)
    twin.module = copy.deepcopy(model.module)
    draw = torch.Generator().manual_seed(seed)
    for module in twin.module.modules():
        if hasattr(module, "k_proj") and hasattr(module, "q_proj"):
            width = module.d_head if hasattr(module, "d_head") else module.head_dim
            rows = module.k_proj.weight.shape[0]
            order = torch.cat([torch.randperm(width, generator=draw) + start for start in range(0, rows, width)])
            module.k_proj.weight.copy_(module.k_proj.weight[order])
            if module.k_proj.bias is not None:
                module.k_proj.bias.copy_(module.k_proj.bias[order])
    return twin


# --- relations -------------------------------------------------------------------------------------------------------

Asked = list[dict[int, set[int]]]  # for each sentence: the word that asks, and the words that are right


def asked(pairs: Iterable[Iterable[tuple[int, int]]], way: str) -> Asked:
    """Who asks for whom: "there" from the first word of a pair to the second, "back", or "later" to earlier."""
    found: Asked = []
    for sentence in pairs:
        each: dict[int, set[int]] = {}
        for i, j in sentence:
            query, key = {"there": (i, j), "back": (j, i), "later": (max(i, j), min(i, j))}[way]
            each.setdefault(query, set()).add(key)
        found.append(each)
    return found


def by_head(maps: Maps, questions: Asked) -> Tensor:
    """Whether each head's greatest weight is right: (questions, layers * H). The asking word itself is left out."""
    rows = []
    for weights, each in zip(maps, questions):
        for query, keys in each.items():
            row = weights[:, :, query].flatten(0, 1).clone()
            row[:, query] = -1
            rows.append(torch.isin(row.argmax(-1), torch.tensor(sorted(keys))))
    return torch.stack(rows).float()


def by_distance(questions: Asked) -> Tensor:
    """Whether the word at each fixed distance is right: (questions, 20)."""
    return torch.stack(
        [torch.tensor([float(q + o in keys) for o in OFFSETS]) for each in questions for q, keys in each.items()]
    )


def held_out(right: Tensor, sentence: Tensor) -> tuple[Tensor, list[int]]:
    """Choose the best column on one half of the sentences, count it on the other: (questions,), and both choices."""
    counted, chosen = torch.zeros(len(right)), []
    for half in (0, 1):
        learn, test = sentence % 2 == half, sentence % 2 != half
        chosen.append(int(right[learn].mean(0).argmax()))
        counted[test] = right[test, chosen[-1]]
    return counted, chosen


def interval(values: Tensor, sentence: Tensor, draws: int = 2000) -> list[float]:
    """The mean of values with a bootstrap over sentences."""
    names, place = sentence.unique(return_inverse=True)
    sums = torch.zeros(len(names)).index_add(0, place, values)
    counts = torch.zeros(len(names)).index_add(0, place, torch.ones_like(values))
    drawn = torch.randint(len(names), (draws, len(names)), generator=torch.Generator().manual_seed(0))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return [round(float(values.mean()), 3), round(low, 3), round(high, 3)]


def compare(maps: Maps, random_maps: list[Maps], questions: Asked) -> dict[str, Any]:
    """One relation asked in one way: the best head beside the best distance and the best random heads."""
    sentence = torch.tensor([s for s, each in enumerate(questions) for _ in each])
    right = by_head(maps, questions)
    head, chosen = held_out(right, sentence)
    distance, offsets = held_out(by_distance(questions), sentence)
    drawn = torch.stack([held_out(by_head(m, questions), sentence)[0] for m in random_maps])
    n_layers, n_heads = maps[0].shape[:2]
    by_layer = right.view(-1, n_layers, n_heads)
    best = [list(divmod(c, n_heads)) for c in chosen]
    whole = int(right.mean(0).argmax())
    return {
        "questions": len(sentence),
        "head": interval(head, sentence),
        "chosen": best,
        "best on all": [*divmod(whole, n_heads), round(float(right.mean(0).max()), 3)],
        "distance": interval(distance, sentence),
        "offsets": [OFFSETS[o] for o in offsets],
        "random": interval(drawn.mean(0), sentence),
        "random draws": [round(float(d.mean()), 3) for d in drawn],
        "head - distance": interval(head - distance, sentence),
        "head - random": interval(head - drawn.mean(0), sentence),
        "by layer": [round(float(held_out(by_layer[:, i], sentence)[0].mean()), 3) for i in range(n_layers)],
    }


def lists(seed: int = 0) -> list[tuple[str, tuple[str, ...], tuple[int, int]]]:
    """48 lists of eight words, among which two are alike in meaning: the text, its words, the places of the two."""
    draw, made = random.Random(seed), []
    for number, pair in enumerate(ALIKE):
        others = draw.sample([p for i, p in enumerate(ALIKE) if i != number], 6)
        words = [*pair, *(draw.choice(p) for p in others)]
        draw.shuffle(words)
        places = (words.index(pair[0]), words.index(pair[1]))
        made.append((", ".join(words) + ".", tuple(words), places))
    return made


def relations(model: Model, draws: int) -> dict[str, Any]:
    """All relations, in both ways where the model reads both ways."""
    ways = ["later"] if model.causal else ["there", "back"]
    texts = [(s.text, s.words) for s in RELATIONS]
    made = lists()
    in_lists = [(text, words) for text, words, _ in made]
    maps, alike, random_maps, random_alike = model.maps(texts), model.maps(in_lists), [], []
    for seed in range(draws):
        twin = model.untrained(seed)
        random_maps.append(twin.maps(texts))
        random_alike.append(twin.maps(in_lists))
    found: dict[str, Any] = {}
    for name in NAMES.values():
        pairs = [[(i, j) for relation, i, j in s.pairs if relation == name] for s in RELATIONS]
        found[name] = {way: compare(maps, random_maps, asked(pairs, way)) for way in ways}
    neighbours = [[(i, i - 1) for i in range(1, len(s.words))] for s in RELATIONS]
    for name, way in (("word before", "there"), ("word after", "back")):
        if way == "there" or not model.causal:
            found[name] = {way: compare(maps, random_maps, asked(neighbours, way))}
    pairs = [[places] if model.causal else [places, places[::-1]] for _, _, places in made]
    way = "later" if model.causal else "there"
    found["alike in meaning"] = {way: compare(alike, random_alike, asked(pairs, way))}
    return found


# --- patterns --------------------------------------------------------------------------------------------------------


def patterns(model: Model, kinds: dict[str, Model]) -> dict[str, Any]:
    """How much the maps of a layer's heads overlap, among words, and how many groups they form.

    Two heads belong to one group where their overlap, or a chain of overlaps, is above the threshold. `unrelated` is
    the overlap with each row's keys permuted: maps as sharp, without a common pattern.
    """
    texts = [(s.text, s.words) for s in RELATIONS[:36]]
    found = {}
    for kind, one in kinds.items():
        maps = one.maps(texts)
        n_layers, n_heads = maps[0].shape[:2]
        shared, chance, count = torch.zeros(n_layers, n_heads, n_heads), torch.zeros(n_layers, n_heads, n_heads), 0
        draw = torch.Generator().manual_seed(0)
        for weights in maps:
            for query in range(1, weights.shape[2]):
                rows = weights[:, :, query, : query + 1] if model.causal else weights[:, :, query]
                rows = rows / rows.sum(-1, keepdim=True)
                order = torch.rand(n_layers, n_heads, rows.shape[-1], generator=draw).argsort(-1)
                mixed = rows.gather(-1, order)
                shared += torch.minimum(rows[:, :, None], rows[:, None]).sum(-1)
                chance += torch.minimum(mixed[:, :, None], rows[:, None]).sum(-1)
                count += 1
        shared, chance = shared / count, chance / count
        off = ~torch.eye(n_heads, dtype=torch.bool)
        found[kind] = {
            "overlap": [round(float(x), 3) for x in shared[:, off].mean(1)],
            "unrelated": [round(float(x), 3) for x in chance[:, off].mean(1)],
            "closest": [round(float(x), 3) for x in (shared * off).amax((1, 2))],
            "groups": {str(limit): [groups(layer > limit) for layer in shared] for limit in (0.6, 0.7, 0.8)},
        }
    return found


def groups(linked: Tensor) -> int:
    """The number of connected groups of a symmetric boolean matrix."""
    reach = linked | torch.eye(len(linked), dtype=torch.bool)
    for _ in range(len(linked)):
        reach = (reach.float() @ reach.float()) > 0
    return len(reach.unique(dim=0))


# --- layers ----------------------------------------------------------------------------------------------------------


def depth(model: Model, twin: Model) -> dict[str, Any]:
    """Distance, entropy, and the share of markers (the first token where there is none), by layer, on Alice.

    `distance` and `entropy` are of the weights between the other tokens, rescaled to sum to 1, as shares of what even
    weights have. `marked` is the share that the markers get.
    """
    ids, _ = model.tokens(ALICE)
    if model.causal:
        rows = ids[0, 1:513].view(4, 128)
        kept = slice(1, None)
    else:
        rows = ids[0, 1:-1][:504].view(4, 126)
        ends = ids[:, [0, -1]].expand(4, 2)
        rows = torch.cat([ends[:, :1], rows, ends[:, 1:]], 1)
        kept = slice(1, -1)
    found = {}
    for kind, one in (("trained", model), ("random", twin)):
        weights = one.weights(rows)  # (layers, B, H, N, N)
        between = weights[..., kept, kept]
        inside = between.sum(-1)
        n = between.shape[-1]
        at = torch.arange(n)
        gap = (at[:, None] - at).abs().float()
        even = torch.ones(n, n).tril() if model.causal else torch.ones(n, n)
        even = even / even.sum(-1, keepdim=True)
        between = between / inside.clamp(min=1e-12)[..., None]
        queries = slice(1, None)  # the first has a single key where the model reads from left to right
        distance = (between * gap).sum(-1)[..., queries].mean((1, 3)) / (even * gap).sum(-1)[queries].mean()
        entropy = torch.special.entr(between).sum(-1)[..., queries].mean((1, 3))
        entropy = entropy / torch.special.entr(even).sum(-1)[queries].mean()
        near = (between * (gap <= 1)).sum(-1)[..., queries].mean((1, 3))
        marked = 1 - inside[..., queries].mean((1, 3))
        table = {"distance": distance, "entropy": entropy, "near": near, "marked": marked}
        found[kind] = {name: [round(float(x), 3) for x in value.mean(1)] for name, value in table.items()}
        found[kind]["distance spread"] = [[round(float(x), 3) for x in row.sort().values] for row in distance]
    return found


TASKS = {
    "translate": ("Translate this into French: ", "Put this sentence into French: "),
    "count": ("How many words are in this: ", "Count the words of this: "),
    "feeling": ("Is this happy or sad: ", "Which feeling is in this: "),
    "who": ("Who is this sentence about: ", "Name the main person in this: "),
}


def routes(model: Model) -> dict[str, Any]:
    """Does the task before a sentence change where the sentence's tokens, and the token that answers, look in it?

    The distance between two maps is half the sum of their differences (0 to 1), among the sentence's tokens, rescaled.
    Two tasks are compared, and beside them two wordings of one task, for 12 sentences.
    """
    texts = [s.text for s in RELATIONS[:12]]
    inside, last = [], []
    for text in texts:
        each_inside, each_last = [], []
        for wordings in TASKS.values():
            for wording in wordings:
                whole = f"{wording}{text}\nAnswer:"
                ids, places = model.tokens(whole)
                start, end = len(wording), len(wording) + len(text)
                of_text = [i for i, (a, b) in enumerate(places) if start <= b - 1 < end and b > a]
                weights = model.weights(ids)[:, 0]
                square = weights[:, :, of_text][..., of_text]
                each_inside.append(square / square.sum(-1, keepdim=True).clamp(min=1e-12))
                row = weights[:, :, -1, of_text]
                each_last.append(row / row.sum(-1, keepdim=True).clamp(min=1e-12))
        inside.append(torch.stack(each_inside))
        last.append(torch.stack(each_last))
    task = torch.arange(8) // 2
    same = (task[:, None] == task) & ~torch.eye(8, dtype=torch.bool)
    other = task[:, None] != task
    found: dict[str, Any] = {}
    for name, maps in (("words", inside), ("answer", last)):
        apart = []
        for m in maps:  # (8, layers, H, ..., keys)
            difference = (m[:, None] - m[None]).abs().sum(-1) / 2
            apart.append(difference.flatten(4).mean(-1).mean(-1) if difference.ndim > 4 else difference.mean(-1))
        distance = torch.stack(apart)  # (sentences, 8, 8, layers)
        found[name] = {
            "other task": [round(float(x), 4) for x in distance[:, other].mean((0, 1))],
            "same task": [round(float(x), 4) for x in distance[:, same].mean((0, 1))],
        }
    return found


# --- reactions -------------------------------------------------------------------------------------------------------


def reactions() -> dict[str, Any]:
    """How often each head of RXNMapper goes from an atom of the product to the one it came from; and untrained."""

    def shares(chemist: Any) -> Tensor:
        right = []
        for reaction, origins in REACTIONS.values():
            tokens, weights = chemist.attention(reaction)
            reactants, products = chemist.atoms(tokens)
            found = weights[:, :, products][..., reactants].argmax(-1)
            for atom, origin in enumerate(origins):
                alike = torch.tensor(origin if isinstance(origin, tuple) else (origin,))
                right.append(torch.isin(found[:, :, atom], alike).float())
        return torch.stack(right)

    chemist = rxnmapper()
    trained = shares(chemist).mean(0)
    random_best = []
    for seed in range(3):
        torch.manual_seed(seed)
        for module in chemist.model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        random_best.append(round(float(shares(chemist).mean(0).max()), 3))
    return {
        "reactions": len(REACTIONS),
        "atoms": sum(len(origins) for _, origins in REACTIONS.values()),
        "by head": [[round(float(x), 3) for x in row] for row in trained],
        "best of random": random_best,
    }


@torch.no_grad()
def main(options: list[str]) -> None:
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"reactions": reactions()}
    print("reactions", flush=True)
    for name, make, draws in (("minilm", MiniLM, 5), ("smollm2", SmolLM2, 3)):
        model = make()
        figures[name] = {"relations": relations(model, draws)}
        print(name, "relations", flush=True)
        twin = model.untrained(0)
        figures[name]["depth"] = depth(model, twin)
        kinds = {"trained": model, "shuffled": shuffled(model, 0), "random": twin}
        figures[name]["patterns"] = patterns(model, kinds)
        print(name, "patterns", flush=True)
        if model.causal:
            figures[name]["routes"] = routes(model)
    sentences, pairs = len(RELATIONS), sum(len(s.pairs) for s in RELATIONS)
    write("heads", "nox -s bench -- heads", figures, threads=1, sentences=sentences, pairs=pairs)
