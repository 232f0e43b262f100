"""Arguments for linear attention, drawn once: what the tests of its engines in plain torch share."""

import contextlib

import torch
import torch.nn.functional as F
from harness import incoming

from nondual.ops.linear_attention import linear_attention

# what the family's members are called, and what each of them is given
FORMS = {
    "sum": {},
    "normalised": {"normalise": True},
    "retention": {"gate": "head"},
    "gated": {"gate": "step"},
    "gated, normalised": {"gate": "step", "normalise": True},
    "each channel": {"gate": "channel"},
    "delta": {"delta": True},
    "gated delta": {"delta": True, "gate": "step"},
    "retained delta": {"delta": True, "gate": "head"},
}
PLAIN = ["reference", "parallel", "chunked"]


def made(
    form, length, *, b=2, h=4, g=2, d=3, dv=5, dtype=torch.float64, seed=0, state=True, strength=1.0, requires_grad=True
):
    """Every tensor by name, and `normalise`; `strength` is how fast the state decays, from 0 (not at all) on."""
    draw = torch.Generator().manual_seed(seed)
    options = FORMS[form]
    normalise, delta = options.get("normalise", False), options.get("delta", False)
    q, k = (torch.randn(b, heads, length, d, generator=draw, dtype=torch.float64) for heads in (h, g))
    if normalise:
        q, k = q.exp(), k.exp()
    given = {"q": q, "k": F.normalize(k, dim=-1) if delta else k}
    given["v"] = torch.randn(b, g, length, dv, generator=draw, dtype=torch.float64)
    shapes = {"head": (h,), "step": (b, h, length), "channel": (b, h, length, d)}
    if "gate" in options:
        given["log_decay"] = -strength * torch.rand(shapes[options["gate"]], generator=draw, dtype=torch.float64)
    if delta:
        given["beta"] = 2 * torch.rand(b, h, length, generator=draw, dtype=torch.float64)
    if state:
        given["state"] = torch.rand(b, h, d, dv + normalise, generator=draw, dtype=torch.float64)
    given = {name: x.to(dtype).requires_grad_(requires_grad) for name, x in given.items()}
    return given, {"normalise": normalise}


def resets(length, b=2, seed=2):
    """A few beginnings, neighbours and the last step among them, other ones in each row of the batch."""
    marks = torch.rand(b, length, generator=torch.Generator().manual_seed(seed)) < 4 / max(length, 1)
    marks[0, length // 3 : length // 3 + 2] = True
    marks[-1, -1:] = True
    return marks


def exactly(given):
    """The same in float64."""
    return {name: x.detach().double().requires_grad_() for name, x in given.items()}


def both_ways(impl, given, options, around=None):
    """The output, the last state and every gradient, by name; `around` is the forward pass's context."""
    with around or contextlib.nullcontext():
        out, state = linear_attention(**given, **options, impl=impl)
    received = incoming(out), incoming(state, 3)
    found = {"out": out.detach(), "last state": state.detach()}
    if out.requires_grad:
        gradients = torch.autograd.grad((out, state), list(given.values()), received, allow_unused=True)
        found |= {f"d{name}": x for name, x in zip(given, gradients) if x is not None}
    return found
