"""What the tests of positions inside attention share: attention of ours with the weights of transformers'."""

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nondual.self_attention import MultiHeadAttention


class InFloat64(TorchFunctionMode):
    """Within it a judge that asks for float32, as for its softmax, gets float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            return args[0].double()
        args = [torch.float64 if x is torch.float32 else x for x in args]
        return function(*args, **{k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()})


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fill(module: nn.Module, std: float = 0.5) -> nn.Module:
    """The module in float64 with random parameters."""
    torch.manual_seed(0)
    for p in module.double().eval().parameters():
        nn.init.normal_(p, std=std)
    return module


def load(ours: MultiHeadAttention, weights: dict[str, Tensor], biases: dict[str, Tensor] | None = None) -> None:
    """Copy weights, and biases, by the names q, k, v and out; without a bias ours is 0."""
    with torch.no_grad():
        for name in ("q", "k", "v", "out"):
            layer = getattr(ours.double(), f"{name}_proj")
            layer.weight.copy_(weights[name])
            if layer.bias is not None:
                layer.bias.copy_(biases[name] if biases else torch.zeros_like(layer.bias))
