"""What the tests of heads and of circuits share: sizes, inputs, a layer, and a way to watch modules."""

import contextlib

import torch
from torch import nn

from nondual import MultiHeadAttention

B, N, E, H, D, V = 2, 5, 12, 4, 3, 23
SENTENCE = "The eyes see, the ears hear, and the mind knows both."


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(n_heads=H, **options) -> MultiHeadAttention:
    """A layer with weights of the size of 1/2, so that no map is nearly even."""
    torch.manual_seed(0)
    module = MultiHeadAttention(E, n_heads, **options).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


@contextlib.contextmanager
def watched(modules):
    """What the modules are given and give out, in the order of their calls: a list of (input, output)."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(module, args, out):
        seen.append((args[0], out))

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


IDS = torch.tensor([[3, 7, 11, 7, 2], [5, 5, 9, 1, 5]])
