"""Arguments for state space duality, drawn once, and its errors beside those of plain PyTorch.

What the tests of its engines share; pyproject.toml's `pythonpath` lets them import it.
"""

import harness
import pytest
import torch
from harness import DRAWS, INTERPRETED, Error, incoming, with_signs

from nondual.ops.discretize import step_length
from nondual.ops.ssd import ssd

NAMES = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "state")
TIMED = ("x", "delta", "B", "C", "z")  # those that have a number for each step
HERE = ["reference", "chunked", *(["triton"] if INTERPRETED else [])]  # the engines that run on a CPU
PLACED = [*((impl, "cpu") for impl in HERE), pytest.param("triton", "cuda", marks=pytest.mark.gpu)]
DECAYS = [(1e4, 3.0), (1.0, -12.0), (1e-6, 0.0), (30.0, 0.0)]  # `rate` and `lag` of `made`, from strong to weak


def made(length, *, b=1, h=2, p=8, g=1, n=8, dtype=torch.float32, device="cpu", seed=0, skip="h", rate=1.0, lag=0.0):
    """Every argument by name, drawn once for all devices and dtypes; `rate` is the size of A, `lag` delta's mean."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (b, length, h, p), "delta": (b, length, h), "A": (h,), "B": (b, length, g, n), "C": (b, length, g, n),
        "D": (h,) if skip == "h" else (h, p), "z": (b, length, h, p), "delta_bias": (h,), "state": (b, h, p, n),
    }  # fmt: skip
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {}
    for name, shape in shapes.items():
        v = torch.randn(shape, generator=draw)
        v = -rate * (0.2 + v.abs()) if name == "A" else v + lag if name == "delta" else v
        inputs[name] = v.to(dtype if name in TIMED else wide).to(device).requires_grad_()
    return inputs


def strong_and_weak(length, **more):
    """Steps that forget everything beside steps that forget nothing, in every chunk: in the sum of their logs the small
    ones could be lost to rounding."""
    inputs = made(length, **more)
    with torch.no_grad():
        inputs["delta"][:, ::7] += 300
        inputs["delta"][:, 1::7] -= 9
    return inputs


def resets(length, b=1, device="cpu", seed=2):
    """A few beginnings, neighbours and the last step among them, other ones in each row of the batch."""
    draw = torch.Generator().manual_seed(seed)
    marks = torch.rand(b, length, generator=draw) < 4 / max(length, 1)
    marks[0, length // 3 : length // 3 + 2] = True
    marks[-1, -1:] = True
    return marks.to(device)


def exactly(inputs):
    """The inputs in float64."""
    return {name: v.detach().double().requires_grad_() for name, v in inputs.items()}


def laid(x, layout):
    """x in another layout, as `harness.laid` has them; "transposed" swaps the steps with the last axis."""
    if layout == "transposed":
        return x.transpose(1, -1).contiguous().transpose(1, -1) if x.ndim > 1 else x
    return harness.laid(x, layout)


# --- runs ------------------------------------------------------------------------------------------------------------


def by(impl, softplus=True, reset=None, chunk=None):
    """A function from the inputs to (y, last state), by this engine."""

    def run(inputs):
        return ssd(**inputs, delta_softplus=softplus, reset=reset, chunk=chunk, impl=impl)

    return run


def plainly(softplus=True, reset=None):
    """As `by`, in plain PyTorch."""
    return lambda inputs: textbook(**inputs, softplus=softplus, reset=reset)


def textbook(x, delta, A, B, C, D=None, z=None, delta_bias=None, state=None, *, softplus=True, reset=None):
    """Plain PyTorch: the matrix of `ssd_matrix` times x, with the matrices in whatever dtype x has."""
    dtype, length, share = x.dtype, x.shape[1], x.shape[2] // B.shape[2]
    steps = step_length(delta.to(A.dtype), delta_bias, softplus)
    B, C = (v.repeat_interleave(share, 2).transpose(1, 2) for v in (B, C))  # (B, H, L, N)
    step, v = steps.mT, x.transpose(1, 2)  # (B, H, L) and (B, H, L, P)
    rates = step * A[:, None]
    lower = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    between = rates[..., None].expand(*rates.shape, length).masked_fill(~lower.tril(-1), 0).cumsum(-2)
    sequence = (torch.zeros_like(delta[..., 0]) if reset is None else reset).cumsum(1)
    visible = (lower & (sequence[:, :, None] == sequence[:, None]))[:, None]
    decay = between.masked_fill(~visible, -torch.inf).exp() * step[:, :, None]
    y = (C @ B.mT * decay.to(dtype)) @ v
    last = (decay[:, :, -1, :, None].to(dtype) * v).mT @ B
    if state is not None:
        passed = rates.cumsum(-1).masked_fill((sequence > 0)[:, None], -torch.inf).exp()[..., None]
        y = y + passed.to(dtype) * (C @ state.to(dtype).mT)
        last = last + passed[:, :, -1:] * state
    y = y.transpose(1, 2)
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]).to(dtype) * x
    return y if z is None else y * torch.nn.functional.silu(z), last.to(A.dtype)


def both_ways(run, inputs, d_y=None, d_state=None):
    """y, the last state and every gradient of a run, by name."""
    y, state = run(inputs)
    d_y = incoming(y) if d_y is None else d_y.to(y.dtype)
    d_state = incoming(state, 3) if d_state is None else d_state
    grads = torch.autograd.grad((y, state), tuple(inputs.values()), (d_y, d_state.to(state.dtype)))
    found = {"y": y, "last state": state} | {f"d{name}": grad for name, grad in zip(inputs, grads)}
    return {name: v.detach() for name, v in found.items()}


# --- errors ----------------------------------------------------------------------------------------------------------


def errors(inputs, impl="triton", softplus=True, reset=None, chunk=None, plain=None, **gradients) -> dict[str, Error]:
    """The errors of each output and gradient by name, beside plain PyTorch's over five draws of signs.

    Args:
        inputs: from `made`.
        impl: the engine that is judged.
        softplus: whether delta is taken through it.
        reset: where sequences begin.
        chunk: steps of a chunk.
        plain: plain PyTorch's run; `textbook` where left out.
        gradients: d_y and d_state, the incoming gradients; drawn where left out.
    """
    gradients = {"d_y": incoming(inputs["x"])} | gradients  # one for all three, in x's dtype
    plain, exact = plain or plainly(softplus, reset), by("chunked", softplus, reset, 16)
    ours = both_ways(by(impl, softplus, reset, chunk), inputs, **gradients)
    assert ours["y"].dtype == inputs["x"].dtype and ours["last state"].dtype == torch.float32

    def again():
        for seed in range(1, DRAWS if inputs["x"].numel() < 2**16 else 1):  # a large draw is many small ones
            drawn = inputs | {"x": with_signs(inputs["x"], seed)}
            more = gradients | {"d_y": with_signs(gradients["d_y"], -seed)}
            yield both_ways(plain, drawn, **more), both_ways(exact, exactly(drawn), **more)

    found = harness.errors(
        ours, both_ways(plain, inputs, **gradients), both_ways(exact, exactly(inputs), **gradients), draws=again()
    )
    few = [name for name in ("dA", "ddelta_bias", "dD") if name in found]
    for name, usual in usual_of_eight(few, inputs, plain, softplus=softplus, reset=reset).items():
        found[name] = found[name]._replace(plain=max(usual, found[name].plain))
    # One draw of ours may be far off by chance too: where it is, our usual error is judged.
    if unlucky := [name for name in few if found[name].ours > 3 * found[name].plain + found[name].floor]:
        own = usual_of_eight(unlucky, inputs, by(impl, softplus, reset, chunk), softplus=softplus, reset=reset)
        found |= {name: found[name]._replace(ours=usual) for name, usual in own.items()}
    return found


def usual_of_eight(names, inputs, run, **exact):
    """The usual error of `run` (the root of its mean square) in gradients that are one number for each head, over eight
    incoming gradients: one alone is now and then nearly right by chance, and now and then far off."""
    (y, state), (true_y, true_state) = run(inputs), by("chunked", **exact)(true := exactly(inputs))
    squares = dict.fromkeys(names, 0.0)
    for seed in range(10, 18):
        d_y, d_state = incoming(inputs["x"], seed), incoming(state, seed + 8)
        found = (
            torch.autograd.grad(out, [of[name[1:]] for name in names], (d_y.to(out[0].dtype), d_state.to(out[1].dtype)),
                                retain_graph=True)
            for out, of in (((y, state), inputs), ((true_y, true_state), true))
        )  # fmt: skip
        for name, a, t in zip(names, *found):
            squares[name] += float((a - t).abs().max()) ** 2 / 8
    return {name: square**0.5 for name, square in squares.items()}


def check(inputs, **options):
    """Assert that an output is off by at most twice plain PyTorch's error, and a gradient by three times."""
    harness.check(errors(inputs, **options), outputs={"y", "last state"})
