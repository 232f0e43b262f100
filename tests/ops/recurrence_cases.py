"""Arguments for the linear recurrence, drawn once; pyproject.toml's `pythonpath` lets its tests import them."""

import torch

ENGINES = ["sequential", "parallel"]
LENGTHS = [0, 1, 2, 3, 7, 8, 63, 111]
KINDS = [torch.float64, torch.complex128]


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def arguments(length, dtype=torch.float64, *, width=(3, 5), batch=2):
    """a of size about 0.9, b, and a state."""
    a = draw(batch, length, *width, dtype=dtype)
    a = 0.9 * a / a.abs().clamp(min=1e-3) * draw(*a.shape, seed=1).sigmoid()
    return a, draw(batch, length, *width, dtype=dtype, seed=2), draw(batch, *width, dtype=dtype, seed=3)


def by_matrix(a, b, state):
    """The recurrence written as one lower triangular matrix of products, and nothing carried."""
    length = b.shape[1]
    h = torch.zeros_like(b)
    for t in range(length):
        h[:, t] = a[:, : t + 1].prod(1) * state
        for s in range(t + 1):
            h[:, t] += a[:, s + 1 : t + 1].prod(1) * b[:, s]
    return h
