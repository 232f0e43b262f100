"""impl="cpu" where it can go wrong unseen: numbers that are not finite, extreme values, resets at a chunk's ends, mixed
dtypes, one odd layout at a time, strides, dynamic lengths, torch's transforms, page faults.

"c" and "torch" are its two ways, the compiled loop and plain torch. What it computes otherwise is tested in
test_selective_scan.py.
"""

import itertools
import math
import sys

import pytest
import torch
from functorch.compile import make_boxed_func
from harness import laid
from scan_cases import NAMES, WAYS, as_double, check, leaves, made, results
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad

from nondual.ops.selective_scan import cpu, selective_scan
from nondual.ops.selective_scan.cpu import memory

INF, NAN = math.inf, math.nan
both = pytest.mark.parametrize("name", WAYS)


# --- numbers that are not finite -------------------------------------------------------------------------------------


def kinds(x):
    """0 for a finite number, 1 and 2 for the infinities, 3 for NaN."""
    return (x == INF) * 1 + (x == -INF) * 2 + x.isnan() * 3


def agree(ours, truth, case):
    """Finite where the reference is, and equal to it; outputs and states are of the same kind everywhere.

    A gradient that the reference has as NaN may be infinite here, or finite where a reset stands between: sums are
    taken in another order, and inf - inf is NaN in one of them alone.
    """
    for name, t in truth.items():
        x, finite = ours[name], t.isfinite()
        assert x[finite].isfinite().all(), f"{case}: {name} is not finite where the reference is"
        if finite.any():
            top = t[finite].abs().max()
            assert (x[finite] - t[finite]).abs().max() <= 1e-5 * (1 + top), f"{case}: {name}"
        if name in ("y", "last"):
            assert torch.equal(kinds(x), kinds(t)), f"{case}: {name} is of another kind"


SCENES = {  # groups of B, groups of C (0: constant), softplus, resets
    "shared B and C": (1, 1, True, None),
    "no softplus, resets": (1, 1, False, "middle"),
    "constant B": (0, 1, True, None),
    "constant C": (1, 0, True, "middle"),
    "B for each channel": (19, 1, True, None),
}


STEPS = (0, cpu.CHUNK - 1, cpu.CHUNK + 2)


def spots(x, timed):
    """Places in a tensor: three steps of two chunks, the first channel, one within a vector, one in the last vector."""
    if x.ndim == 1:
        return [(0,), (16,)]
    if x.ndim == 4:
        return [(0, t, g, n) for t in STEPS for g in {0, x.shape[2] - 1} for n in (1, 4)]
    if timed:
        return [(0, t, d) for t in STEPS for d in (0, 14, 17)]
    return [(*[0] * (x.ndim - 2), d, n) for d in (0, 17) for n in (1, 4)]


CASES = [
    (scene, argument)
    for scene in SCENES
    for argument in (*NAMES, "dy", "dlast")
    if scene in list(SCENES)[:2] or argument in ("delta", "A", "B", "C", "state")
]


@pytest.mark.parametrize("scene, argument", CASES)
def test_a_number_that_is_not_finite_goes_where_it_goes_in_the_reference(way, scene, argument):
    """NaN and both infinities, in every argument and gradient, at every kind of place, by both ways. Some channels have
    a step of 90, and those after them in a vector none: what is greatest must not be lost at a NaN."""
    g_b, g_c, softplus, reset = SCENES[scene]
    given = made(2, 67, 19, 5, g_b=g_b, g_c=g_c, reset=reset) | {"delta_softplus": softplus}
    delta, A = given["delta"].detach().clone(), given["A"].detach().clone()
    delta = delta if softplus else delta.abs()
    delta[:, 20, 3], delta[:, 40, 18], delta[1, 60, 9] = 90, 90, 90
    A[[3, 9, 18]] = -1
    A[15] = -0.1
    given |= {"delta": delta.requires_grad_(), "A": A.requires_grad_()}
    draw = torch.Generator().manual_seed(1)
    given |= {"dy": torch.randn(2, 67, 19, generator=draw), "dlast": torch.randn(2, 19, 5, generator=draw)}
    x = given[argument].detach()
    for spot, value in itertools.product(spots(x, argument in ("u", "delta", "z", "dy")), (NAN, INF, -INF)):
        odd = x.clone()
        odd[spot] = value
        now = given | {argument: odd.requires_grad_(given[argument].requires_grad)}
        dy, dlast = now.pop("dy"), now.pop("dlast")
        truth = results(now, "reference", dy, dlast)
        for name in WAYS:
            way(name)
            agree(results(now, "cpu", dy, dlast), truth, f"{argument}{list(spot)} = {value}, {name}")


@both
@pytest.mark.parametrize("case", ["beside long steps", "a dead sensor"])
def test_a_nan_step_spoils_no_other_channel(way, name, case):
    """Channels of one vector, A = -1, state 1: some have a step of 90, one has NaN, always or from step 50."""
    way(name)
    delta = torch.full((1, 64, 16), 0.01)
    if case == "beside long steps":
        delta[0, 10, :5] = 90
        delta[0, :, 7] = NAN
    else:
        delta[0, 20, 3] = 90
        delta[0, 50:, 7] = NAN
    given = dict(u=torch.full_like(delta, 10), A=-torch.ones(16, 4), B=torch.ones(1, 64, 4), C=torch.ones(1, 64, 4))
    given |= {"delta": delta, "state": torch.ones(1, 16, 4)}
    y, last = selective_scan(**given, impl="cpu")
    truth, state = selective_scan(**given, impl="reference")
    torch.testing.assert_close(y, truth, equal_nan=True, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, state, equal_nan=True, rtol=1e-5, atol=1e-5)
    others = [channel for channel in range(16) if channel != 7]
    assert y[..., others].isfinite().all() and y[0, 50:, 7].isnan().all()
    assert case == "beside long steps" or y[0, :50, 7].isfinite().all()


# --- extreme values --------------------------------------------------------------------------------------------------


@both
def test_a_gate_far_out(way, name):
    """silu and its slope at ±200 and beyond the range of exp: 0 or z itself, never NaN."""
    way(name)
    z = torch.tensor([-1e30, -1000.0, -200.0, -104.0, -88.8, -80.0, -1.0, 0.0, 1.0, 80.0, 88.8, 200.0, 1000.0, 1e30])
    given = made(1, len(z), 3, 2)
    given["z"] = z[None, :, None].repeat(1, 1, 3).requires_grad_()
    ours, truth = results(given, "cpu"), results(given, "reference")
    for key, t in truth.items():
        assert torch.equal(kinds(ours[key]), kinds(t)), key
        torch.testing.assert_close(ours[key], t, rtol=2e-5, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert ours["y"].isfinite().all() and ours["dz"].isfinite().all()
    assert (ours["dz"][:, :3] == 0).all() and (ours["y"][:, :3] == 0).all()


@both
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("a", [-1e6, -1e-6, 0.0, 1e-3, 50.0])
def test_steps_and_decays_far_out(way, name, a, softplus):
    """Steps of ±10,000, with and without softplus, times decays from 10⁻⁶ to 10⁶, and growth that overflows."""
    way(name)
    given = made(1, 70, 17, 5, without=("z", "delta_bias")) | {"delta_softplus": softplus}
    delta, A = given["delta"].detach().clone(), given["A"].detach().clone()
    delta[:, 3, 0], delta[:, 30, 5], delta[:, 66, 16], delta[:, 67, 16] = 1e4, -1e4, 1e4, -1e4
    A[::2] = a
    given |= {"delta": delta.requires_grad_(), "A": A.requires_grad_()}
    draw = torch.Generator().manual_seed(2)
    dy, dlast = torch.randn(1, 70, 17, generator=draw), torch.randn(1, 17, 5, generator=draw)
    ours, truth = results(given, "cpu", dy, dlast), results(given, "reference", dy, dlast)
    exact = results(as_double(given), "reference", dy, dlast)
    for key, t in truth.items():
        size = exact[key].abs()
        clear = ~((size > 1e30) & (size < 1e45))  # near overflow the order of a sum decides
        x, t = ours[key][clear], t[clear]
        finite = t.isfinite()
        assert x[finite].isfinite().all(), key
        if key in ("y", "last"):
            assert torch.equal(kinds(x), kinds(t)), key
        if finite.any():
            close = 1e-4 * t[finite].abs() + 1e-5 * t[finite].abs().max() + 1e-5
            assert ((x[finite] - t[finite]).abs() <= close).all(), key


# --- resets ----------------------------------------------------------------------------------------------------------


EDGES = [0, 1, cpu.CHUNK - 1, cpu.CHUNK, 2 * cpu.CHUNK - 1, 2 * cpu.CHUNK, 2 * cpu.CHUNK + 4]


@both
@pytest.mark.parametrize("at", EDGES)
@pytest.mark.parametrize("poison", [None, NAN, INF])
def test_a_reset_at_the_end_of_a_chunk_parts_two_sequences(way, name, at, poison):
    """With decays so weak that the state would outlast the chunk: what comes before and after are as if alone, through
    the gradients too, even where all before or all after the reset is NaN or infinite."""
    way(name)
    length = 2 * cpu.CHUNK + 5
    given = made(1, length, 5, 6, scale=1e-4, dtype=torch.float64)
    reset = torch.zeros(1, length, dtype=torch.bool)
    reset[:, at] = True
    timed = ("u", "delta", "B", "C", "z")
    draw = torch.Generator().manual_seed(4)
    dy, dlast = (torch.randn(shape, generator=draw).double() for shape in ((1, length, 5), (1, 5, 6)))

    def part(which, **state):
        cut = {k: given[k].detach()[:, which].requires_grad_() for k in timed}
        cut = {k: x for k, x in given.items() if k not in (*timed, "state")} | cut | state
        return results(cut, "cpu", dy[:, which], dlast if which.stop is None else torch.zeros_like(dlast))

    after = part(slice(at, None))
    before = part(slice(0, at), state=given["state"]) if at else None
    if poison is None:
        whole = results(given | {"reset": reset}, "cpu", dy, dlast)
        torch.testing.assert_close(whole["y"], torch.cat([x["y"] for x in (before, after) if x], 1))
        torch.testing.assert_close(whole["last"], after["last"])
        for key in ("du", "ddelta", "dB", "dC", "dz"):
            torch.testing.assert_close(whole[key], torch.cat([x[key] for x in (before, after) if x], 1))
        for key in ("dA", "dD", "ddelta_bias"):
            torch.testing.assert_close(whole[key], sum(x[key] for x in (before, after) if x))
        dstate = before["dstate"] if before else torch.zeros_like(whole["dstate"])
        torch.testing.assert_close(whole["dstate"], dstate)
        return
    bad = {k: given[k].detach().clone() for k in ("u", "B", "C")}
    for x in bad.values():
        x[:, :at] = poison  # everything before the reset
    bad |= {"state": torch.full_like(given["state"], poison)}
    whole = results(given | {k: x.requires_grad_() for k, x in bad.items()} | {"reset": reset}, "cpu", dy, dlast)
    for key in ("y", "du", "ddelta", "dB", "dC", "dz"):
        torch.testing.assert_close(whole[key][:, at:], after[key], msg=lambda m, key=key: f"{key}: {m}")
    torch.testing.assert_close(whole["last"], after["last"])
    if before is None:
        assert (whole["dstate"] == 0).all()
        return
    bad = {k: given[k].detach().clone() for k in ("u", "B", "C")}
    for x in bad.values():
        x[:, at:] = poison  # everything from the reset on, and the last state's gradient
    odd, odd_last = dy.clone(), torch.full_like(dlast, poison)
    odd[:, at:] = poison
    whole = results(given | {k: x.requires_grad_() for k, x in bad.items()} | {"reset": reset}, "cpu", odd, odd_last)
    for key in ("y", "du", "ddelta", "dB", "dC", "dz"):
        torch.testing.assert_close(whole[key][:, :at], before[key], msg=lambda m, key=key: f"{key}: {m}")
    torch.testing.assert_close(whole["dstate"], before["dstate"])


# --- dtypes ----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow", ["u", "A", "D", "delta_bias", "state", "A D delta_bias state", "B", "C"])
def test_one_argument_in_half_precision_and_the_rest_in_float32(way, name, half, narrow):
    """u, delta and z go together. Each gradient has its argument's dtype, and the state that of the sums."""
    way(name)
    given = made(2, 70, 17, 5, g_b=0, g_c=0)
    names = ("u", "delta", "z") if narrow == "u" else narrow.split()
    given |= {k: given[k].detach().to(half).requires_grad_() for k in names}
    check(given)
    ours = results(given, "cpu")
    assert all(ours[f"d{k}"].dtype == given[k].dtype for k in leaves(given))
    assert ours["y"].dtype == given["u"].dtype and ours["last"].dtype == torch.float32


# --- layouts ---------------------------------------------------------------------------------------------------------


LAYOUTS = ["transposed", "sliced", "strided", "offset rows", "batch inside", "one row", "one number"]


@both
@pytest.mark.parametrize("argument", [*NAMES, "reset", "dy", "dlast", "constant B", "constant C"])
def test_one_odd_layout_at_a_time(way, name, argument):
    """A stride taken from another tensor cannot pass: all others are dense."""
    way(name)
    constant = argument.startswith("constant")
    given = made(2, 67, 34, 3, g_b=0 if constant else 2, g_c=0 if constant else 2, reset="middle")
    argument = argument.removeprefix("constant ")
    draw = torch.Generator().manual_seed(3)
    given |= {"dy": torch.randn(2, 67, 34, generator=draw), "dlast": torch.randn(2, 34, 3, generator=draw)}
    for layout in LAYOUTS:
        x = given[argument].detach()
        if x.ndim == 1:
            odd = laid(x[None], layout)[0] if layout in ("strided", "sliced", "one number") else None
        elif x.dtype == torch.bool:
            odd = laid(x.float(), layout).nan_to_num().bool() if layout == "one row" else x.mT.contiguous().mT
        else:
            odd = laid(x, layout)
        if odd is None:
            continue
        now = given | {argument: odd.requires_grad_(given[argument].requires_grad)}
        dense = given | {argument: odd.detach().clone(memory_format=torch.contiguous_format)}
        dense[argument].requires_grad_(given[argument].requires_grad)
        ours, same = (results(g, "cpu", g.pop("dy"), g.pop("dlast")) for g in (now, dense))
        for key, x in same.items():
            assert torch.allclose(ours[key], x, rtol=1e-6, atol=1e-6), f"{layout}: {key}"
    truth = {k: v for k, v in given.items() if k not in ("dy", "dlast")}
    check(truth, dy=given["dy"], dlast=given["dlast"])


@both
def test_a_gate_that_is_a_slice_of_a_projection(way, name):
    """As in a Mamba block: u and z are the halves of one tensor, delta, B and C slices of another."""
    way(name)
    given = made(2, 67, 34, 3)
    both_halves = torch.cat([given["u"], given["z"]], -1).detach().requires_grad_()
    rest = torch.cat([given["delta"], given["B"].squeeze(2), given["C"].squeeze(2)], -1).detach().requires_grad_()
    u, z = both_halves.chunk(2, -1)
    delta, B, C = rest.split([34, 3, 3], -1)
    fixed = {k: given[k].detach() for k in ("A", "D", "delta_bias", "state")}
    grads = []
    for impl in ("cpu", "reference"):
        y, last = selective_scan(u, delta, B=B, C=C, z=z, **fixed, delta_softplus=True, impl=impl)
        grads.append((y, last, *torch.autograd.grad(y.square().sum() + last.sum(), (both_halves, rest))))
    for ours, truth in zip(*grads):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


def test_a_negated_view_is_read_as_what_it_stands_for():
    """The imaginary part of a conjugate is a view that negates nothing in memory."""
    u = torch.complex(torch.randn(1, 9, 3), torch.randn(1, 9, 3)).conj().imag
    assert u.is_neg()
    given = made(1, 9, 3, 2, without=("u",)) | {"u": u}
    torch.testing.assert_close(selective_scan(**given, impl="cpu")[0], selective_scan(**given, impl="reference")[0])


# --- as an operator of torch -----------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("layout", ["transposed", "strided", "batch inside", "one row"])
@pytest.mark.parametrize("g, half", [(2, False), (0, False), (2, True)])
def test_results_have_the_strides_that_the_compiler_is_told(way, name, layout, g, half):
    """The fake implementation says dense; so they are, by both ways, whatever the inputs are."""
    way(name)
    given = made(2, 67, 6, 3, g_b=g, g_c=g, reset="middle", dtype=torch.bfloat16 if half else torch.float32)
    given |= {k: laid(x.detach(), layout).requires_grad_() for k, x in leaves(given).items() if x.ndim > 1}
    if not half and layout != "one row":  # a written-to copy of an expanded tensor is not what opcheck can compare
        inputs = [given.get(k) for k in (*NAMES, "reset")]
        torch.library.opcheck(torch.ops.nondual.selective_scan_cpu.default, (*inputs, True))
    inputs = [None if given.get(k) is None else given[k].detach() for k in (*NAMES, "reset")]
    y, last, kept = torch.ops.nondual.selective_scan_cpu(*inputs, True)
    dy, dlast = laid(torch.randn(2, 67, 6).to(y.dtype), layout), laid(torch.randn(2, 6, 3), layout)
    grads = torch.ops.nondual.selective_scan_cpu_backward(dy, dlast, kept, *inputs, True)
    assert all(x.is_contiguous() for x in (y, last, kept, *grads))
    assert [x.shape for x in grads] == [x.shape for x in inputs[:-1]]
    backward = (dy, dlast, kept, *inputs, True)
    torch.library.opcheck(torch.ops.nondual.selective_scan_cpu_backward.default, backward)


LENGTHS = (9, 2, 3, 63, 64, 65, 130, 200)


def layer(u, delta, B, C, z):
    A, D = -torch.ones(5, 3), torch.ones(5)
    y, last = selective_scan(u, delta, A, B, C, D, z, delta_softplus=True, impl="cpu")
    return y * 2, last


def drawn(length):
    draw = torch.Generator().manual_seed(length)
    return tuple(torch.randn(2, length, n, generator=draw) for n in (5, 5, 3, 3, 5))


@both
def test_export_with_a_dynamic_length(way, name):
    """From 2 steps on: no guard holds it to one chunk."""
    way(name)

    class Layer(torch.nn.Module):
        def forward(self, *given):
            return layer(*given)

    dynamic = ({1: torch.export.Dim("length", min=2)},) * 5
    for traced in (70, 9):
        exported = torch.export.export(Layer(), drawn(traced), dynamic_shapes=(dynamic,)).module()
        for length in LENGTHS:
            for ours, plain in zip(exported(*drawn(length)), layer(*drawn(length))):
                torch.testing.assert_close(ours, plain)


def test_one_compilation_serves_every_length():
    """Forward and backward, from fewer steps than a chunk has to several chunks."""
    torch._dynamo.reset()
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=counting))
    for length in LENGTHS:
        given = [x.requires_grad_() for x in drawn(length)]
        ours, plain = compiled(*given), layer(*given)
        torch.testing.assert_close(ours, plain)
        grads = (torch.autograd.grad(sum(x.square().sum() for x in out), given) for out in (ours, plain))
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b)
    assert len(compilations) == 2  # one forward, one backward
    torch._dynamo.reset()


FIXED = [x.detach() if torch.is_tensor(x) else x for x in made(1, 5, 2, 3).values()]


def forward(u):
    return torch.ops.nondual.selective_scan_cpu(u, *FIXED[1:9], None, True)[0]


def engine(u):
    return cpu.selective_scan(u, *FIXED[1:8], True, FIXED[8])[0]


def tangent(f, u):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(u, torch.ones_like(u)))).tangent


TRANSFORMS = {
    "forward_ad": tangent,
    "jvp": lambda f, u: torch.func.jvp(f, (u,), (torch.ones_like(u),))[1],
    "jacfwd": lambda f, u: torch.func.jacfwd(f)(u),
    "grad": lambda f, u: torch.func.grad(lambda u: f(u).sum())(u),
    "jacrev": lambda f, u: torch.func.jacrev(f)(u),
    "vjp": lambda f, u: torch.func.vjp(f, u)[1](torch.ones_like(u)),
    "hessian": lambda f, u: torch.func.hessian(lambda u: f(u).sum())(u),
    "vmap of grad": lambda f, u: torch.func.vmap(torch.func.grad(lambda u: f(u).sum()))(u[None]),
}


@both
@pytest.mark.parametrize("f", [forward, engine], ids=["the operator by its own name", "the engine"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("grad", [False, True])
def test_a_transform_that_it_has_not_is_refused_in_one_sentence(way, name, f, transform, grad):
    """Never zeros in silence, and never a sentence about autograd.Function, also where the door is passed by."""
    way(name)
    u = torch.randn(1, 5, 2, requires_grad=grad)
    with pytest.raises(RuntimeError, match=r"selective_scan\(impl='cpu'\) (has no forward-mode|cannot be transformed)"):
        TRANSFORMS[transform](f, u)


@both
def test_the_backward_operator_refuses_a_tangent_too(way, name):
    way(name)
    u = torch.randn(1, 5, 2, requires_grad=True)
    y = forward(u)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.autograd.grad(y, u, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


@both
def test_a_batch_of_incoming_gradients(way, name):
    """torch.autograd.functional.jacobian(vectorize=True): all rows in one backward pass."""
    way(name)
    u = torch.randn(1, 5, 2)
    rows = torch.autograd.functional.jacobian(engine, u)
    torch.testing.assert_close(torch.autograd.functional.jacobian(engine, u, vectorize=True), rows)
    assert rows.abs().sum() > 0


@both
def test_nothing_is_refused_where_no_tangent_is_given(way, name):
    """Within forward mode, for tensors that take no part in it."""
    way(name)
    with forward_ad.dual_level():
        assert torch.equal(engine(torch.ones(1, 5, 2)), engine(torch.ones(1, 5, 2)))


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are Linux's")
@both
def test_large_results_are_asked_for_in_whole_huge_pages(way, name, monkeypatch):
    way(name)
    asked = []
    monkeypatch.setattr(memory, "madvise", lambda: lambda *given: asked.append(given))
    u = torch.empty(1)
    small, large = memory.empty(u, 1000), memory.empty(u, memory.LARGE // 4 + 1000)
    ((start, size, _),) = asked
    assert start % memory.HUGE_PAGE == size % memory.HUGE_PAGE == 0
    assert large.data_ptr() <= start and start + size <= large.data_ptr() + large.numel() * 4
    assert size >= memory.LARGE - 2 * memory.HUGE_PAGE and small.numel() == 1000
    asked.clear()
    monkeypatch.setattr(memory, "LARGE", 1)
    results(made(1, 70, 5, 3), "cpu")
    assert len(asked) > 5  # the results of both passes go through it


def test_a_system_without_huge_pages_is_no_fault(monkeypatch):
    memory.madvise.cache_clear()
    monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE", raising=False)
    try:
        assert memory.madvise() is None
        assert memory.empty(torch.empty(1), memory.LARGE).numel() == memory.LARGE
    finally:
        memory.madvise.cache_clear()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("length", [0, 1, 70])
def test_the_last_state_has_memory_of_its_own(impl, length):
    """It is no view of anything larger, and writing to it changes neither the first state nor the outputs."""
    given = {k: x.detach() if torch.is_tensor(x) else x for k, x in made(2, length, 5, 3).items()}
    first = given["state"].clone()
    y, last = selective_scan(**given, impl=impl)
    before = y.clone()
    assert last.untyped_storage().nbytes() == last.numel() * last.element_size()
    last.fill_(7)
    assert torch.equal(given["state"], first) and torch.equal(y, before)
