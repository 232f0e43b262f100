"""Arguments for the selective scan, drawn once, and its results beside the reference's.

What test_selective_scan.py and test_selective_scan_cpu.py share; pyproject.toml's `pythonpath` lets both import it.
"""

import torch

from nondual.ops.selective_scan import selective_scan

WAYS = ("c", "torch")  # of impl="cpu": the compiled loop, and plain torch
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "state")


def made(b=2, length=17, d=5, n=3, *, g_b=1, g_c=1, dtype=torch.float32, without=(), reset=None, seed=0, scale=1.0):
    """Every argument, drawn once for all dtypes; a group count of 0 asks for (D, N)."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=draw)

    given = {
        "u": randn(b, length, d),
        "delta": randn(b, length, d) - 1,
        "A": -randn(d, n).exp() * scale,
        "B": randn(b, length, g_b, n) if g_b else randn(d, n),
        "C": randn(b, length, g_c, n) if g_c else randn(d, n),
        "D": randn(d),
        "z": randn(b, length, d),
        "delta_bias": randn(d) / 4,
        "state": randn(b, d, n),
    }
    given = {k: x.to(dtype).requires_grad_() for k, x in given.items() if k not in without}
    resets = {
        "first": torch.arange(length).eq(0).expand(b, -1),
        "middle": torch.rand(b, length, generator=draw) < 0.2,
        "everywhere": torch.ones(b, length, dtype=torch.bool),
    }
    return given | {"delta_softplus": True} | ({"reset": resets[reset]} if reset else {})


def leaves(given):
    return {k: x for k, x in given.items() if torch.is_tensor(x) and x.requires_grad}


def as_double(given):
    return {k: x.detach().double().requires_grad_() if k in leaves(given) else x for k, x in given.items()}


def results(given, impl, dy=None, dlast=None):
    """y, the last state, and the gradient of every input, by name."""
    y, state = selective_scan(**given, impl=impl)
    draw = torch.Generator().manual_seed(7)
    drawn = [torch.randn(x.shape, generator=draw).to(x.dtype) for x in (y, state)]
    grads = torch.autograd.grad((y, state), list(leaves(given).values()), (
        drawn[0] if dy is None else dy.to(y.dtype), drawn[1] if dlast is None else dlast.to(state.dtype),
    ), allow_unused=True)  # fmt: skip
    return {"y": y.detach(), "last": state.detach()} | {f"d{k}": g for k, g in zip(leaves(given), grads)}


def errors(given, **more):
    """For each output and gradient: our greatest error, that of the reference in the same dtype, and what no result can
    promise to be below: an ulp of the greatest number in the dtype that it is given in, and eight of float32's for the
    sums behind it, whose terms may cancel."""
    truth, plain = results(as_double(given), "reference", **more), results(given, "reference", **more)
    ours, found = results(given, "cpu", **more), {}
    for name, t in truth.items():
        if t is None:
            continue
        assert ours[name].dtype == plain[name].dtype and ours[name].shape == t.shape, name
        assert torch.equal(ours[name].isfinite(), t.to(ours[name].dtype).isfinite()), f"{name} is not finite"
        if t.numel():
            top = t.abs().max()
            wide = torch.finfo(torch.promote_types(ours[name].dtype, torch.float32)).eps
            floor = top * (torch.finfo(ours[name].dtype).eps + 8 * wide) + 8 * wide
            found[name] = tuple(float(x) for x in ((ours[name] - t).abs().max(), (plain[name] - t).abs().max(), floor))
    return found


def check(given, **more):
    """At most twice the error of plain PyTorch, three times for gradients."""
    for name, (ours, plain, floor) in errors(given, **more).items():
        bound = (2 if name in ("y", "last") else 3) * plain + floor
        assert ours <= bound, f"{name}: {ours:.1e}, plain PyTorch {plain:.1e}, floor {floor:.1e}"
