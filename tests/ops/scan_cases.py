"""Arguments for the selective scan, drawn once, and an engine's results beside the reference's.

What test_selective_scan.py, test_selective_scan_cpu.py and test_selective_scan_triton.py share; pyproject.toml's
`pythonpath` lets them import it. The error budget is harness.py's.
"""

import harness
import torch

from nondual.ops.selective_scan import selective_scan

WAYS = ("c", "torch")  # of impl="cpu": the compiled loop, and plain torch
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "state")
PARAMETERS = ("A", "D", "delta_bias", "state")  # what may have a dtype of its own
OUTPUTS = {"y", "last"}  # names in `results`; the others are gradients


def made(
    b=2, length=17, d=5, n=3, *, g_b=1, g_c=1, dtype=torch.float32, parameters=None, device="cpu", without=(),
    reset=None, seed=0, scale=1.0,
):  # fmt: skip
    """Every argument, drawn once for all dtypes and devices; a group count of 0 asks for (D, N).

    Args:
        parameters: the dtype of A, D, delta_bias and the state; `dtype` where left out.
        without: the names to leave out.
        reset: "first", "middle" or "everywhere".
        scale: multiplies A.
    """
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
    dtypes = {name: parameters or dtype if name in PARAMETERS else dtype for name in given}
    given = {k: x.to(dtypes[k]).to(device).requires_grad_() for k, x in given.items() if k not in without}
    resets = {
        "first": torch.arange(length).eq(0).expand(b, -1),
        "middle": torch.rand(b, length, generator=draw) < 0.2,
        "everywhere": torch.ones(b, length, dtype=torch.bool),
    }
    given |= {"delta_softplus": "delta_softplus" not in without}
    return given | ({"reset": resets[reset].to(device)} if reset else {})


def leaves(given):
    return {k: x for k, x in given.items() if torch.is_tensor(x) and x.requires_grad}


def as_double(given):
    return {k: x.detach().double().requires_grad_() if k in leaves(given) else x for k, x in given.items()}


def results(given, impl, dy=None, dlast=None, only=None):
    """y, the last state, and the gradient of every input, by name; zeros where there is none.

    Args:
        dy: the gradient of y that comes in; drawn where left out.
        dlast: that of the last state.
        only: the output whose gradient comes in, "y" or "last"; both where left out.
    """
    y, last = selective_scan(**given, impl=impl)
    outputs = {"y": y, "last": last}
    incoming = {
        "y": harness.incoming(y) if dy is None else dy,
        "last": harness.incoming(last, 2) if dlast is None else dlast,
    }
    chosen = [name for name in outputs if only in (None, name)]
    inputs = leaves(given)
    grads = torch.autograd.grad(
        [outputs[name] for name in chosen],
        list(inputs.values()),
        [incoming[name].to(outputs[name].dtype) for name in chosen],
        allow_unused=True,
    )
    grads = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs.values(), grads)]
    return {k: x.detach() for k, x in outputs.items()} | {f"d{k}": g for k, g in zip(inputs, grads)}


def two_places(exact, dtype):
    """The floor of impl="cpu": a unit in the last place of the largest number in the dtype that it is given in, and
    eight of float32's, or of float64's where the dtype is wider, for the sums behind it, whose terms may cancel."""
    top, wide = exact.abs().max(), torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return top * (torch.finfo(dtype).eps + 8 * wide) + 8 * wide


def errors(given, impl="cpu", *, draws=1, floor=two_places, **how):
    """The errors of each output and gradient, ours and plain PyTorch's, as `harness.errors` has them.

    Args:
        draws: of signs, over which plain PyTorch's error is judged.
        how: `dy`, `dlast` and `only` of `results`.
    """
    ours, plain = results(given, impl, **how), results(given, "reference", **how)
    exact = results(as_double(given), "reference", **how)
    for name, x in ours.items():
        assert x.dtype == plain[name].dtype, name
        assert torch.equal(x.isfinite(), exact[name].to(x.dtype).isfinite()), f"{name} is not finite"

    def more():
        for seed in range(1, draws):
            again = given | {"u": harness.with_signs(given["u"], seed)}
            signs = how | {"dy": harness.with_signs(how["dy"], -seed)}
            yield results(again, "reference", **signs), results(as_double(again), "reference", **signs)

    return harness.errors(ours, plain, exact, draws=more(), floor=floor)


def check(given, impl="cpu", **how):
    """At most twice the error of plain PyTorch, three times for gradients."""
    harness.check(errors(given, impl, **how), OUTPUTS)
