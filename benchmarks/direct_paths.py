"""What a layer of a trained model reads straight from each layer before it: SmolLM2 on prose, direct paths cut.

SmolLM2-135M has 30 layers. Its texts are passages from the opening of "Alice in Wonderland", 33 tokens each. The first
token of each is left as it is, since this model writes vectors into it that are longer than all others by far; effects
are measured from the second token on.

    output    for all 465 pairs j < k: how far the output of layer k moves when c_j is taken out of what it alone reads,
              j = 0 being the embeddings; and beside it, random directions of the same lengths
    loss      what the loss rises by, for k = 20 and all j, and random directions
    all       for k = 10, 20, 30, output and loss: all that does not come from layer k - 1 is taken out at once; and
              beside it, layer k - 1 alone, the embeddings alone, and random directions as long as what is taken out

Intervals are 95 %, by Student's t over the texts.

    nox -s bench -- direct_paths           one minute of one idle core
    nox -s bench -- direct_paths --tiny    a small model with random weights, which writes nothing
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.intervals import by_seeds
from benchmarks.record import write
from nondual.analysis.direct_paths import cut_paths, direct_paths, random_direction, stream_parts
from nondual.data.alice import ALICE
from nondual.language_models.causal import CausalLM
from nondual.language_models.gpt import GPT

TEXTS, LENGTH, FIRST = 8, 33, 1
FOR_LOSS, FOR_GROUPS = (20,), (10, 20, 30)


def passages(tokenizer: Any) -> Tensor:
    """(TEXTS, LENGTH), passages of the book that do not overlap."""
    ids = torch.tensor(tokenizer(ALICE)["input_ids"])
    step = len(ids) // TEXTS
    assert step >= LENGTH
    return torch.stack([ids[i * step :][:LENGTH] for i in range(TEXTS)])


def spread(effects: Tensor) -> dict[str, Any]:
    """The mean over texts (B,) and its 95 % interval."""
    found = by_seeds(effects.tolist())
    return {
        "mean": round(float(effects.mean()), 4),
        "interval": None if found is None else [round(x, 4) for x in found[1:]],
    }


def rows(effects: Tensor) -> list[list[float | None]]:
    """Means over texts of (sources, layers, B), None where there is no path."""
    return [[None if math.isnan(x) else round(x, 4) for x in row] for row in effects.mean(-1).tolist()]


def measure(model: CausalLM, ids: Tensor, layers: tuple[int, ...], grouped: tuple[int, ...]) -> dict[str, Any]:
    """All figures of one model."""
    draw: Callable[[Tensor], Tensor] = random_direction(torch.Generator().manual_seed(0))
    parts = stream_parts(model, ids)
    whole, control = (direct_paths(model, ids, first=FIRST, **how) for how in ({}, {"removed": draw}))
    print("outputs are measured", flush=True)
    some, some_control = (
        direct_paths(model, ids, layers=layers, first=FIRST, loss=True, **how) for how in ({}, {"removed": draw})
    )
    assert some.loss is not None and some_control.loss is not None
    print("losses are measured", flush=True)
    groups = {}
    for k in grouped:
        earlier = torch.stack(parts[: k - 1]).sum(0)
        taken = {
            "all but the one before": earlier,
            "as long, at random": draw(earlier),
            "the one before": parts[k - 1],
            "the embeddings": parts[0],
        }
        effects = cut_paths(model, ids, parts, k, taken.values(), first=FIRST)
        groups[k] = {
            name: {"output": spread(effect.output), "loss": spread(effect.loss)}
            for name, effect in zip(taken, effects)
            if effect.loss is not None
        }
    n = len(parts)
    near = torch.tensor([[k - 1 - j for k in range(1, n + 1)] for j in range(n)])  # 0: the layer before
    distances = {
        name: [spread(effects.output[near == d].mean(0)) for d in range(n)]
        for name, effects in (("cut", whole), ("random", control))
    }
    return {
        "output": rows(whole.output),
        "output_random": rows(control.output),
        "output_by_distance": distances,
        "earlier_than_the_one_before": {
            name: spread(effects.output[near > 0].mean(0)) for name, effects in (("cut", whole), ("random", control))
        },
        "paths_above_random": sum(
            float(a) > float(b)
            for a, b in zip(whole.output.nanmean(-1).flatten(), control.output.nanmean(-1).flatten())
        ),
        "loss": rows(some.loss),
        "loss_random": rows(some_control.loss),
        "loss_intervals": {
            name: {k: [spread(effects[j, k - 1]) for j in range(k)] for k in layers}
            for name, effects in (("cut", some.loss), ("random", some_control.loss))
        },
        "groups": groups,
        "lengths": [round(float(part[:, FIRST:].norm(dim=-1).mean()), 2) for part in parts],
        "loss_of_the_model": round(model.loss(ids).item(), 4),
    }


def main(options: list[str]) -> None:
    torch.set_num_threads(1)
    if "--tiny" in options:
        torch.manual_seed(0)
        measure(GPT(50, 12, 4, 3, max_len=9), torch.randint(50, (3, 9)), (4,), (2, 4))
        return
    from nondual.pretrained.smollm2 import our_smollm2

    model, tokenizer = our_smollm2()
    ids = passages(tokenizer)
    with torch.no_grad():
        figures = measure(model, ids, FOR_LOSS, FOR_GROUPS)
    setup = {"model": "SmolLM2-135M-Instruct", "text": "Alice in Wonderland", "texts": TEXTS, "tokens": LENGTH,
             "first": FIRST, "layers_for_loss": FOR_LOSS, "layers_for_groups": FOR_GROUPS}  # fmt: skip
    write("direct_paths", "nox -s bench -- direct_paths", figures, setup=setup)
