"""Arguments for flash attention, drawn once, and its errors beside those of plain PyTorch.

What the tests of its engines share; pyproject.toml's `pythonpath` lets them import it.
"""

import math

import torch
from harness import Error, errors, incoming
from harness import check as check_errors

from nondual.ops import masks
from nondual.ops.attention import masked_softmax
from nondual.ops.flash_attention import flash_attention

MASKS = {"full": {}, "causal": {"causal": True}, "window 1": {"window": 1}, "window 23": {"window": 23}}


def made(n, m, d, dv=None, *, b=1, h=2, g=2, dtype=torch.float32, device="cpu", seed=0):
    """q (B, H, N, D), k (B, G, M, D) and v (B, G, M, Dv): the same numbers on every device and in every dtype."""
    draw = torch.Generator().manual_seed(seed)
    shapes = (b, h, n, d), (b, g, m, d), (b, g, m, dv or d)
    return [torch.randn(s, generator=draw).to(dtype).to(device).requires_grad_() for s in shapes]


def allowed(n, m, device, causal=False, window=None, **_):
    """The mask (N, M) that these options mean, True where attending is allowed."""
    if window:
        return masks.sliding_window(n, m, window=window, device=device)
    return masks.causal(n, m, device=device) if causal else torch.ones(n, m, dtype=torch.bool, device=device)


def textbook(q, k, v, mask, scale=None):
    """Plain PyTorch in whatever dtype it is given."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return masked_softmax(scores, mask) @ v


def compared(inputs, options, impl="triton", d_out=None, **more) -> dict[str, Error]:
    """The errors of the output and of each gradient, by name, for plain PyTorch with the mask and in float64.

    Args:
        inputs: q, k and v.
        options: causal and window.
        impl: the engine that is judged.
        d_out: the incoming gradient; drawn where left out.
        more: what flash attention and the textbook both take: scale.
    """
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask = allowed(inputs[0].shape[2], inputs[1].shape[2], inputs[0].device, **options)
    ours = flash_attention(*inputs, **options, **more, impl=impl)
    assert ours.dtype == inputs[0].dtype
    d_out = incoming(ours) if d_out is None else d_out

    def results(out, of):
        grads = torch.autograd.grad(out, of, d_out.to(out.dtype))
        return {"out": out, **dict(zip(("dq", "dk", "dv"), grads))}

    return errors(
        results(ours, inputs),
        results(textbook(*inputs, mask, **more), inputs),
        results(textbook(*exact, mask, **more), exact),
    )


def check(inputs, options, **more):
    """Assert that the output is off by at most twice plain PyTorch's error, and each gradient by three times."""
    check_errors(compared(inputs, options, **more), outputs={"out"})
