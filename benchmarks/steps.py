"""A training as its steps, for experiments that judge a model on the way: the rate's schedule, gradients, a clip."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from nondual.training import optimiser, warmup_cosine


def steps_of_training(
    model: nn.Module, loss_of: Callable[[torch.Generator], Tensor], rate: float, steps: int, seed: int
) -> Iterator[float]:
    """Train; after each step comes its loss. It ends early with a loss that is not finite, which changes nothing.

    Args:
        model: what is trained, by AdamW as `nondual.training.optimiser` makes it, gradients clipped to a norm of 1.
        loss_of: draws a batch with the generator, and gives its loss.
        rate: the highest learning rate; up to it for a tenth of the steps, then down a cosine to a tenth of it.
        steps: how many.
        seed: of the generator.
    """
    adam, generator = optimiser(model, rate), torch.Generator().manual_seed(seed)
    for i in range(steps):
        for group in adam.param_groups:
            group["lr"] = rate * warmup_cosine(i, steps)
        loss = loss_of(generator)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        value = loss.item()
        if math.isfinite(value):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
        yield value
        if not math.isfinite(value):
            return
