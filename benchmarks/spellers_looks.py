"""What hama's weights are made of: its spelling with parts of the scores left out or exchanged.

The words of one batch have one length, so that nothing is padding. Each change is made twice:

    free      the network writes what it then writes, and reads that as its own past
    forced    it is given, step by step, the phonemes that it writes unchanged, so that the change shows in the weights
              alone

A part is left out (0 in its place), put at its mean over all words (so that the tanh is fed numbers of the usual size),
or, for the letters, taken from another word of the same length (so that keys tell of places, not of these letters).
The letters' states that are summed into the context stay the word's own throughout.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.spellers_words import Sounds, arpabet, is_right, matched, spread
from nondual.attention_mechanism import LocationAttention, compare
from nondual.pretrained.hama_network import EOS, SOS, AttentiveSpeller, Memory, Pull, fixed_pull

Parts = dict[str, Tensor]  # "state" W_s s (B, 1, A), "letters" W_h h (B, M, A), "place" W_f f (B, M, A)
Change = Callable[[Parts], Parts]


def with_change(change: Change) -> Callable[[LocationAttention, Tensor, Memory, Tensor], Tensor]:
    """The learned scores, with a change to the parts that are summed inside the tanh."""

    def scores(attention: LocationAttention, s: Tensor, memory: Memory, past: Tensor) -> Tensor:
        parts = {"state": attention.w_s(s), "letters": memory.projected}
        parts = change(parts | {"place": attention.w_f(attention.features(past))})
        return compare(parts["state"], parts["letters"] + parts["place"], attention.v)

    return scores


def without(*names: str) -> Change:
    return lambda parts: parts | {name: torch.zeros_like(parts[name]) for name in names}


def at_mean(means: Parts, *names: str) -> Change:
    return lambda parts: parts | {name: means[name].expand_as(parts[name]) for name in names}


def of_another_word(parts: Parts) -> Parts:
    return parts | {"letters": parts["letters"].roll(1, 0)}


def zero(attention: LocationAttention, s: Tensor, memory: Memory, past: Tensor) -> Tensor:
    return past.new_zeros(len(past), 1, past.shape[1])


def mean_parts(speller: AttentiveSpeller, batches: list[list[str]]) -> Parts:
    """The mean of each part over all words, steps and letters, unchanged."""
    sums, counts = {}, {}

    def watch(parts: Parts) -> Parts:
        for name, part in parts.items():
            flat = part.flatten(0, -2)
            sums[name] = sums.get(name, 0) + flat.sum(0)
            counts[name] = counts.get(name, 0) + len(flat)
        return parts

    for words in batches:
        speller.spell_all(words, scores=with_change(watch))
    return {name: sums[name] / counts[name] for name in sums}


def variants(means: Parts) -> dict[str, tuple[Callable, Pull]]:
    """The scores and the pull of each variant, by its name in the measured file."""
    none = torch.zeros_like
    return {
        "as trained": (with_change(without()), fixed_pull),
        "without the location term": (with_change(without("place")), fixed_pull),
        "without the pull": (with_change(without()), none),
        "without both": (with_change(without("place")), none),
        "without the asking state": (with_change(without("state")), fixed_pull),
        "without the letters": (with_change(without("letters")), fixed_pull),
        "without state and letters": (with_change(without("state", "letters")), fixed_pull),
        "location term at its mean": (with_change(at_mean(means, "place")), fixed_pull),
        "asking state at its mean": (with_change(at_mean(means, "state")), fixed_pull),
        "letters at their mean": (with_change(at_mean(means, "letters")), fixed_pull),
        "letters of another word": (with_change(of_another_word), fixed_pull),
        "location term alone, the others at their mean": (with_change(at_mean(means, "state", "letters")), none),
        "pull alone": (zero, fixed_pull),
        "uniform weights": (zero, none),
    }


def looks(weights: Tensor) -> dict[str, float]:
    """What one word's weights (N, M) are like.

    off_line: the mean distance, in letters, of the average place looked at from the straight line through the word.
    onward: the share of steps that look, on average, no nearer to the beginning than the step before.
    entropy: of a step's weights, in nats.
    """
    n, m = weights.shape
    if not n:
        return {"off_line": float("nan"), "onward": float("nan"), "entropy": float("nan")}
    place = weights @ torch.arange(m, dtype=weights.dtype)
    line = (torch.arange(n) + 0.5) * m / n - 0.5
    onward = (place.diff() >= 0).float().mean() if n > 1 else torch.tensor(1.0)
    entropy = -torch.special.xlogy(weights, weights).sum(-1).mean()
    return {"off_line": float((place - line).abs().mean()), "onward": float(onward), "entropy": float(entropy)}


@torch.no_grad()
def forced(speller: AttentiveSpeller, words: list[str], phonemes: list[list[str]], scores: Callable, pull: Pull):
    """The weights (N, M) of each word while it is given these phonemes; all words have one length."""
    number = {phoneme: i for i, phoneme in enumerate(speller.phonemes)}
    ids = torch.tensor([speller.numbers(word) for word in words])
    memory = speller.model.read(ids, torch.full((len(words),), ids.shape[1]))
    steps = max(len(one) for one in phonemes)
    given = torch.full((len(words), steps + 1), EOS)
    given[:, 0] = SOS
    for row, one in enumerate(phonemes):
        given[row, 1 : len(one) + 1] = torch.tensor([number[phoneme] for phoneme in one])
    state, past, kept = memory.state, torch.full(ids.shape, 1 / ids.shape[1]), []
    for n in range(steps):
        _, state, past = speller.model.step(given[:, n], memory, state, past, scores=scores, pull=pull)
        kept.append(past)
    every = torch.stack(kept, 1)
    return [every[row, : len(one)] for row, one in enumerate(phonemes)]


def left_out(speller: AttentiveSpeller, batches: list[list[str]], listed: dict[str, list[Sounds]]) -> dict:
    """Each variant: how well it spells, and where it looks; means over words with bootstrap intervals."""
    plain = {word: got for words in batches for word, got in zip(words, speller.spell_all(words))}
    results, kept = {}, torch.zeros(0)
    for name, (scores, pull) in variants(mean_parts(speller, batches)).items():
        each: dict[str, list[float]] = {}
        for words in batches:
            free = speller.spell_all(words, scores=scores, pull=pull)
            given = forced(speller, words, [plain[word][0] for word in words], scores, pull)
            for word, (phonemes, weights), shown in zip(words, free, given):
                true = [arpabet(sounds) for sounds in listed[word]]
                changes, length = min((matched(arpabet(phonemes), sounds)[0], len(sounds)) for sounds in true)
                one = {"right": float(is_right(phonemes, listed[word])), "phoneme_errors": changes / length}
                one |= {"written": float(len(phonemes))}
                one |= {f"free_{what}": x for what, x in looks(weights).items()}
                one |= {f"forced_{what}": x for what, x in looks(shown).items()}
                one["forced_same_letter"] = float((shown.argmax(-1) == plain[word][1].argmax(-1)).float().mean())
                for what, x in one.items():
                    each.setdefault(what, []).append(x)
        columns = {what: torch.tensor(xs) for what, xs in each.items()}
        kept = kept if len(kept) else columns["right"]  # of the first variant, which is unchanged
        columns["right_less_trained"] = columns["right"] - kept
        results[name] = {what: spread(xs[~xs.isnan()]) for what, xs in columns.items()}
        print(name, {what: x[0] for what, x in results[name].items()}, flush=True)
    return results


def when_wrong(speller: AttentiveSpeller, batches: list[list[str]], listed: dict[str, list[Sounds]]) -> dict:
    """How the weights of right and wrong phonemes differ, within the words that have both."""
    apart: dict[str, list[float]] = {"entropy": [], "largest": []}
    means: dict[str, list[float]] = {"right": [], "wrong": []}
    for words in batches:
        for word, (phonemes, weights) in zip(words, speller.spell_all(words)):
            kept = [i for i, phoneme in enumerate(phonemes) if phoneme != " "]
            tokens = [arpabet([phonemes[i]]) for i in kept]
            written = tuple(sound for token in tokens for sound in token)
            owner = [i for i, token in zip(kept, tokens) for _ in token]
            _, stays = min((matched(written, arpabet(sounds)) for sounds in listed[word]), key=lambda found: found[0])
            wrong = sorted({i for i, right in zip(owner, stays) if not right})
            right = sorted(set(owner) - set(wrong))
            if wrong and right:
                entropy, largest = -torch.special.xlogy(weights, weights).sum(-1), weights.amax(-1)
                means["right"].append(float(entropy[right].mean()))
                means["wrong"].append(float(entropy[wrong].mean()))
                apart["entropy"].append(float(entropy[wrong].mean() - entropy[right].mean()))
                apart["largest"].append(float(largest[wrong].mean() - largest[right].mean()))
    return {
        "words": len(apart["entropy"]),
        "entropy_at_right": spread(torch.tensor(means["right"])),
        "entropy_at_wrong": spread(torch.tensor(means["wrong"])),
        "entropy_wrong_less_right": spread(torch.tensor(apart["entropy"])),
        "largest_weight_wrong_less_right": spread(torch.tensor(apart["largest"])),
    }
