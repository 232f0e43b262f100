"""Every operation, by every engine, with one tensor at a time laid out in another way: the same result, both passes.

Tests that lay all their tensors alike let a stride taken from the wrong tensor pass. Here each tensor in turn, each
gradient that comes back among them, is transposed, cut out of a larger tensor, every second element of one, or expanded
by a stride of 0, while the others stay contiguous. What lies between the elements is NaN, so that a read beside them
shows.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from nondual.attention_mechanism import additive_scores, attend
from nondual.ops import masks
from nondual.ops.attention import attention
from nondual.ops.causal_conv1d import causal_conv1d
from nondual.ops.flash_attention import flash_attention
from nondual.ops.linear_attention import linear_attention, linear_attention_step
from nondual.ops.linear_recurrence import linear_recurrence
from nondual.ops.selective_scan import selective_scan, selective_scan_step
from nondual.ops.sparse_attention import BlockMask, sparse_attention
from nondual.ops.ssd import ssd, ssd_step

pytestmark = pytest.mark.timeout(600)  # a minute of one core, on a busy machine

# --- layouts -------------------------------------------------------------------------------------------------------


def in_a_larger(x: Tensor, step: int) -> Tensor:
    """x as part of a larger tensor: from 1 on in every dimension, every `step`-th element."""
    filler = torch.nan if x.is_floating_point() else True
    large = torch.full([size * step + 2 for size in x.shape], filler, dtype=x.dtype)
    inside = large[tuple(slice(1, 1 + size * step, step) for size in x.shape)]
    inside.copy_(x)
    return inside


def turned(x: Tensor) -> Tensor:
    """The storage in the reverse order of dimensions."""
    order = list(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def swapped(x: Tensor) -> Tensor:
    """The last two dimensions swapped in storage; for one dimension alone, every third element."""
    return x.mT.contiguous().mT if x.ndim > 1 else in_a_larger(x, 3)


def middle(x: Tensor) -> Tensor:
    """The two dimensions before the last swapped in storage, as a module's projections lay heads and time."""
    return x.transpose(-2, -3).contiguous().transpose(-2, -3) if x.ndim > 2 else in_a_larger(x, 2)


def rows_apart(x: Tensor) -> Tensor:
    """The elements of a row side by side, as the kernels read them, and every other stride another."""
    if x.ndim < 2:
        return in_a_larger(x, 2)
    order = [*reversed(range(x.ndim - 1)), x.ndim - 1]
    large = x.new_full([x.shape[axis] + 1 for axis in order], torch.nan if x.is_floating_point() else True)
    inside = large[tuple(slice(x.shape[axis]) for axis in order)]
    inside.copy_(x.permute(order))
    return inside.permute([*reversed(range(x.ndim - 1)), x.ndim - 1])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reversed": turned,
    "last two swapped": swapped,
    "heads and time swapped": middle,
    "rows apart": rows_apart,
    "cut out": partial(in_a_larger, step=1),
    "every second": partial(in_a_larger, step=2),
}


def expanded(axis: int) -> Callable[[Tensor], Tensor]:
    """One slice of x, repeated along an axis by a stride of 0. Its values are others than those of x."""
    return lambda x: x.narrow(axis, 0, 1).expand_as(x)


EXPANDED = {"expanded along the first": expanded(0), "expanded along the last": expanded(-1)}

# --- operations ----------------------------------------------------------------------------------------------------

B, H, G, N, M, D, DV = 2, 6, 3, 5, 7, 11, 3
L, CHANNELS, STATES = 7, 6, 3
P = 5


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def lengths(*shape: int) -> Tensor:
    """Step lengths from .1 to 1."""
    return torch.rand(*shape) * 0.9 + 0.1


def rates(*shape: int) -> Tensor:
    return -torch.rand(*shape) - 0.2


def resets() -> Tensor:
    reset = torch.zeros(B, L, dtype=torch.bool)
    reset[0, 3] = reset[1, 5] = True
    return reset


def qkv(heads: int = H, groups: int = G, n: int = N, m: int = M) -> dict[str, Tensor]:
    return {"q": normal(B, heads, n, D), "k": normal(B, groups, m, D), "v": normal(B, groups, m, DV)}


def scanned(groups: int | None) -> dict[str, Tensor]:
    """The arguments of the selective scan, B and C of so many groups, or the same at every step."""
    shape = (CHANNELS, STATES) if groups is None else (B, L, groups, STATES)
    return {
        "u": normal(B, L, CHANNELS), "delta": normal(B, L, CHANNELS), "A": rates(CHANNELS, STATES),
        "B": normal(*shape), "C": normal(*shape), "D": normal(CHANNELS), "z": normal(B, L, CHANNELS),
        "delta_bias": normal(CHANNELS), "state": normal(B, CHANNELS, STATES), "reset": resets(),
    }  # fmt: skip


def dual(heads: int = H, groups: int = G) -> dict[str, Tensor]:
    """The arguments of state space duality."""
    return {
        "x": normal(B, L, heads, P), "delta": normal(B, L, heads), "A": rates(heads), "B": normal(B, L, groups, STATES),
        "C": normal(B, L, groups, STATES), "D": normal(heads, P), "z": normal(B, L, heads, P),
        "delta_bias": normal(heads), "state": normal(B, heads, P, STATES), "reset": resets(),
    }  # fmt: skip


def summed(log_decay: tuple[int, ...] | None = None, delta: bool = False) -> dict[str, Tensor]:
    """Arguments of linear attention, with a decay of this shape, and with write strengths for the delta rule."""
    given = {"q": normal(B, H, L, D), "k": normal(B, G, L, D), "v": normal(B, G, L, 3), "state": normal(B, H, D, 3)}
    given["reset"] = resets()
    if log_decay is not None:
        given["log_decay"] = rates(*log_decay)
    if delta:
        given |= {"k": torch.nn.functional.normalize(given["k"], dim=-1), "beta": normal(B, H, L).sigmoid()}
    return given


def one_step(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of one step, without its time and without resets."""
    timed = ("u", "x", "delta", "B", "C", "z")
    return {name: x[:, 0].clone() if name in timed else x for name, x in arguments.items() if name != "reset"}


scan = partial(selective_scan, delta_softplus=True)
dual_scan = partial(ssd, delta_softplus=True)
flash = partial(flash_attention, window=4)

CASES: dict[str, tuple[Callable, Callable[[], dict[str, Tensor]]]] = {}
for impl in ("reference", "sdpa"):
    CASES[f"attention, {impl}, boolean mask"] = (
        partial(attention, impl=impl, causal=True),
        lambda: qkv() | {"mask": masks.sliding_window(N, M, window=3).expand(B, H, N, M).clone()},
    )
    CASES[f"attention, {impl}, added mask"] = (
        partial(attention, impl=impl),
        lambda: qkv() | {"mask": normal(B, H, N, M)},
    )
CASES["attention, weights"] = (partial(attention, return_weights=True), qkv)
CASES["flash_attention, sdpa"] = (partial(flash, impl="sdpa"), qkv)
for impl in ("reference", "triton"):
    CASES[f"flash_attention, {impl}"] = (partial(flash, impl=impl, return_lse=True), qkv)
for impl in ("reference", "triton"):
    CASES[f"flash_attention, {impl}, forget gates"] = (
        partial(flash_attention, impl=impl, causal=True, return_lse=True),
        lambda: qkv(n=N, m=N) | {"log_forget": rates(B, H, N)},
    )
CASES["flash_attention, triton, decoding"] = (
    torch.no_grad()(partial(flash_attention, impl="triton", return_lse=True)),  # its backward is that of any other
    lambda: qkv(heads=2, groups=1, n=1, m=521),
)
for impl in ("reference", "tiles", "triton"):
    tile = 16 if impl == "triton" else (2, 3)
    CASES[f"sparse_attention, {impl}"] = (
        partial(
            sparse_attention,
            block_mask=BlockMask.from_mask(
                masks.sliding_window(N, M, window=3) | masks.causal(N, M).tril(-1)[:, :1], tile
            ),
            impl=impl,
            return_lse=True,
        ),
        qkv,
    )
for impl in ("reference", "cpu", "triton"):
    CASES[f"selective_scan, {impl}"] = (partial(scan, impl=impl), partial(scanned, 2))
    CASES[f"selective_scan, {impl}, constant B and C"] = (partial(scan, impl=impl), partial(scanned, None))
    CASES[f"selective_scan_step, {impl}"] = (
        partial(selective_scan_step, delta_softplus=True, impl=impl),
        lambda: one_step(scanned(2)),
    )
for impl in ("reference", "chunked", "triton"):
    chunk = {} if impl == "reference" else {"chunk": 16 if impl == "triton" else 4}
    CASES[f"ssd, {impl}"] = (partial(dual_scan, impl=impl, **chunk), dual)
CASES["ssd, triton, one head"] = (partial(dual_scan, impl="triton"), partial(dual, 1, 1))
CASES["ssd_step"] = (partial(ssd_step, delta_softplus=True), lambda: one_step(dual()))
for impl in ("reference", "parallel", "chunked"):
    chunk = {"chunk": 4} if impl == "chunked" else {}
    for name, make in {
        "gated delta rule": partial(summed, (B, H, L), True),
        "each channel": partial(summed, (B, H, L, D)),
    }.items():
        CASES[f"linear_attention, {impl}, {name}"] = (partial(linear_attention, impl=impl, **chunk), make)
CASES["linear_attention, triton, gated"] = (
    partial(linear_attention, impl="triton", chunk=16),
    partial(summed, (B, H, L)),
)
CASES["linear_attention, triton, gated delta rule"] = (
    partial(linear_attention, impl="triton", chunk=16),
    partial(summed, (B, H, L), True),
)
CASES["linear_attention_step"] = (
    linear_attention_step,
    lambda: {
        name: x[:, :, 0].clone() if name in ("q", "k", "v", "beta") else x
        for name, x in summed((H,), True).items()
        if name != "reset"
    },
)
for impl in ("sequential", "parallel"):
    CASES[f"linear_recurrence, {impl}"] = (
        partial(linear_recurrence, impl=impl),
        lambda: {"a": normal(B, L, 3, 2), "b": normal(B, L, 3, 2), "state": normal(B, 3, 2)},
    )
for name, reset in (("", {}), (", resets", {"reset": None})):
    CASES[f"causal_conv1d{name}"] = (
        causal_conv1d,
        lambda reset=reset: {
            "x": normal(B, L, CHANNELS),
            "weight": normal(CHANNELS, 4),
            "bias": normal(CHANNELS),
            "history": normal(B, 3, CHANNELS),
            **({"reset": resets()} if reset else {}),
        },
    )
CASES["additive_scores"] = (
    additive_scores,
    lambda: {"s": normal(B, N, 5), "h": normal(B, M, 3), "w_s": normal(7, 5), "w_h": normal(7, 3), "v": normal(7)},
)
CASES["attend"] = (
    attend,
    lambda: {"scores": normal(B, N, M), "h": normal(B, M, D), "mask": masks.causal(N, M).expand(B, N, M).clone()},
)

# In Triton's interpreter a run takes a second: two layouts of each tensor, and the gradient received by the first
# output expanded; and of a further case those tensors alone that it treats in another way.
QUICK = ("rows apart", "every second")
VARIED = {
    "flash_attention, triton, decoding": ("q", "k", "v"),
    "flash_attention, triton, forget gates": ("q", "log_forget", "gradient received by output 0"),
    "linear_attention, triton, gated": ("v", "k", "log_decay", "state"),
    "linear_attention, triton, gated delta rule": ("k", "v", "beta"),
    "selective_scan, triton, constant B and C": ("B", "C"),
    "selective_scan_step, triton": ("u", "state"),
    "ssd, triton, one head": ("x", "A", "B", "C"),
}

# --- the test ------------------------------------------------------------------------------------------------------


def run(operation: Callable, arguments: dict[str, Tensor], received: list[Tensor]) -> dict[str, Tensor]:
    """Every output, and every argument's gradient when the outputs receive these."""
    given = {name: x.detach().requires_grad_() if x.is_floating_point() else x for name, x in arguments.items()}
    outputs = operation(**given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if not outputs[0].requires_grad:
        return found
    wanted = {name: x for name, x in given.items() if x.requires_grad}
    gradients = torch.autograd.grad(outputs, list(wanted.values()), received, allow_unused=True)
    return found | {f"gradient of {name}": x for name, x in zip(wanted, gradients) if x is not None}


@pytest.mark.parametrize("case", CASES)
def test_a_layout_of_one_tensor_changes_nothing(case):
    """But for rounding: torch's own products take other paths through other layouts."""
    torch.manual_seed(0)
    operation, make = CASES[case]
    arguments = make()
    outputs = operation(**arguments)
    received = [torch.randn_like(x) for x in (outputs if isinstance(outputs, tuple) else (outputs,))]
    tensors = arguments | {f"gradient received by output {i}": x for i, x in enumerate(received)}

    def with_one(name: str, x: Tensor) -> dict[str, Tensor]:
        changed = tensors | {name: x}
        return run(operation, {k: changed[k] for k in arguments}, [changed[k] for k in changed if k not in arguments])

    plain = with_one(*next(iter(tensors.items())))
    for name, x in tensors.items():
        if name not in VARIED.get(case, tensors):
            continue
        chosen = list(LAYOUTS | EXPANDED)
        if "triton" in case:
            chosen = [*QUICK, *(EXPANDED if name == "gradient received by output 0" else ())]
        seen = {x.stride()}
        for layout in chosen:
            laid = (LAYOUTS | EXPANDED)[layout](x)
            if laid.stride() in seen:
                continue
            seen.add(laid.stride())
            expected = with_one(name, laid.contiguous()) if layout in EXPANDED else plain
            for what, found in with_one(name, laid).items():
                torch.testing.assert_close(
                    found, expected[what], rtol=1e-5, atol=1e-5,
                    msg=lambda said, name=name, layout=layout, what=what: f"{what}, with {name} {layout}: {said}",
                )  # fmt: skip
