"""SmolLM2 on one thread of a CPU: our class beside transformers' own, with the same weights, a token at a time.

Both go on from the same words with their own caches, by their own `generate`: once with the likeliest token each time,
where both must write the same, and once with every option of sampling. What is timed is prompt and new tokens together,
so the prompt is short. For where the time goes: a few steps of each without `generate`, and the work that neither can
leave out, the products of one vector with all the weights. Seconds are the processor's.

    nox -s bench -- decode_smollm2           some two minutes of one core
    nox -s bench -- decode_smollm2 --tiny    a few tokens, which writes nothing to docs/measured
"""

import importlib.metadata
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import alternate, ratio, write
from nondual.data import ALICE
from nondual.language_models.causal import CausalLM
from nondual.pretrained import from_llama, smollm2

PROMPT, NEW, ROUNDS, SAMPLED, STEPS = 16, 24, 7, 64, 8
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
OPENING = "The old teacher put down her cup and said that attention"


def ways(theirs: Any, ours: CausalLM, ids: Tensor, new: int) -> dict[str, Callable[[], Tensor]]:
    """By name, what goes on from a prompt (1, N): likeliest tokens, and drawn ones."""
    mask = torch.ones_like(ids)
    given = {"attention_mask": mask, "max_new_tokens": new, "min_new_tokens": new, "use_cache": True}
    return {
        "ours": lambda: ours.generate(ids, new),
        "transformers": lambda: theirs.generate(ids, do_sample=False, **given),
        "ours, sampling": lambda: ours.generate(ids, new, **SAMPLING),
        "transformers, sampling": lambda: theirs.generate(ids, do_sample=True, **SAMPLING, **given),
    }


@torch.no_grad()
def steps(theirs: Any, ours: CausalLM, ids: Tensor) -> dict[str, Callable[[], object]]:
    """STEPS further tokens one by one after a prompt, without generate; and the products with all weights alone."""
    token = ids[:, -1:]

    def by_ours() -> None:
        cache = ours.new_cache(1, ids.shape[1] + STEPS)
        ours(ids, cache=cache)
        for _ in range(STEPS):
            ours(token, cache=cache)

    def by_transformers() -> None:
        cache = theirs(ids, use_cache=True).past_key_values
        for _ in range(STEPS):
            theirs(token, past_key_values=cache, use_cache=True)

    matrices = [m.weight for m in ours.modules() if isinstance(m, nn.Linear)] + [ours.embeddings.weight]
    vectors = {width: torch.randn(1, width) for width in {m.shape[1] for m in matrices}}
    prompts = {width: torch.randn(ids.shape[1], width) for width in vectors}

    def products() -> None:
        for rows in (prompts, *[vectors] * STEPS):
            for m in matrices:
                nn.functional.linear(rows[m.shape[1]], m)

    def quiet(run: Callable[[], None]) -> Callable[[], None]:
        return torch.no_grad()(run)

    return {"ours": quiet(by_ours), "transformers": quiet(by_transformers), "products alone": quiet(products)}


def samples(ours: CausalLM, tokenizer: Any, count: int) -> dict[str, str]:
    """What it writes after the opening: the likeliest tokens, and drawn ones at several settings, all of one seed."""
    ids, end = tokenizer(OPENING, return_tensors="pt").input_ids, tokenizer.eos_token_id
    settings: dict[str, dict[str, Any]] = {
        "likeliest": {},
        "temperature 0.8, top_k 40, top_p 0.95": SAMPLING,
        "temperature 1.5": {"temperature": 1.5},
    }
    found = {}
    for name, setting in settings.items():
        drawn = {"generator": torch.Generator().manual_seed(1)} if setting else {}
        found[name] = tokenizer.decode(ours.generate(ids, count, eos=end, **setting, **drawn)[0, ids.shape[1] :])
    return found


def main(options: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    tiny = "--tiny" in options
    new, rounds, sampled = (3, 1, 3) if tiny else (NEW, ROUNDS, SAMPLED)
    theirs, tokenizer = smollm2()
    theirs.generation_config.eos_token_id = None  # both write all that is asked for
    ours = from_llama(theirs)
    ids = tokenizer(ALICE, return_tensors="pt").input_ids[:, :PROMPT]
    runs = ways(theirs, ours, ids, new)
    said = {name: runs[name]() for name in ("ours", "transformers")}
    if not torch.equal(*said.values()):
        raise AssertionError(
            f"both must write the same, got {[tokens[0, PROMPT:].tolist() for tokens in said.values()]}"
        )
    times = alternate(runs, rounds, time.process_time)
    by_step = alternate(steps(theirs, ours, ids), rounds, time.process_time)
    figures = {
        "tokens_per_processor_second": {name: round(new / median(seconds), 2) for name, seconds in times.items()},
        "ours_over_transformers": {
            "likeliest": ratio(times["transformers"], times["ours"]),
            "sampling": ratio(times["transformers, sampling"], times["ours, sampling"]),
            "steps": ratio(by_step["transformers"], by_step["ours"]),
        },
        "products_over_ours": ratio(by_step["products alone"], by_step["ours"]),
        "opening": OPENING,
        "samples": samples(ours, tokenizer, sampled),
    }
    print(figures)
    if tiny:
        return
    write(
        "decode_smollm2",
        "nox -s bench -- decode_smollm2",
        figures,
        threads=1,
        prompt=PROMPT,
        new_tokens=NEW,
        sampling=SAMPLING,
        dtype="float32",
        parameters=sum(p.numel() for p in ours.parameters()),
        peers={"transformers": importlib.metadata.version("transformers")},
    )
