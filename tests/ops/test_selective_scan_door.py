"""The selective scan where its arguments come in, and the ways in which torch itself takes it apart: every engine."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

from nondual.ops.selective_scan import selective_scan, selective_scan_matrix, selective_scan_step
from nondual.ops.selective_scan import triton as kernels

ENGINES = ["reference", "cpu", *(["triton"] if kernels.INTERPRETED else [])]
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "state")
TIMED = ("u", "delta", "B", "C", "z")


def made(length=7, d=3, n=2, *, b=2, dtype=torch.float64, seed=0):
    """Every floating argument by name; no two sizes are alike."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "u": (b, length, d), "delta": (b, length, d), "A": (d, n), "B": (b, length, n), "C": (b, length, n),
        "D": (d,), "z": (b, length, d), "delta_bias": (d,), "state": (b, d, n),
    }  # fmt: skip
    given = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    given["A"] = -given["A"].exp()
    return {name: x.to(dtype) for name, x in given.items()}


def marks(length=7, b=2):
    return torch.arange(length).eq(length // 2).expand(b, -1)


def by(impl, reset=None):
    return lambda *values: selective_scan(**dict(zip(NAMES, values)), delta_softplus=True, reset=reset, impl=impl)


# --- memory of its own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 7])
@pytest.mark.parametrize("impl", ["auto", *ENGINES])
def test_the_last_state_shares_memory_with_nothing(impl, length):
    given = made(length, dtype=torch.float32)
    y, last = selective_scan(**given, impl=impl)
    assert last.untyped_storage().nbytes() == last.nbytes
    others = {x.untyped_storage().data_ptr() for x in (y, *given.values()) if x.numel()}
    assert last.untyped_storage().data_ptr() not in others
    before = given["state"].clone()
    last.zero_()
    assert torch.equal(given["state"], before)


@pytest.mark.parametrize("impl", ["auto", *ENGINES])
def test_the_new_state_of_a_step_shares_memory_with_nothing(impl):
    given = made(1, dtype=torch.float32)
    now = {name: x[:, 0] if name in TIMED else x for name, x in given.items()}
    before = given["state"].clone()
    _, state = selective_scan_step(**now, impl=impl)
    assert state.untyped_storage().nbytes() == state.nbytes
    state.zero_()
    assert torch.equal(given["state"], before)


# --- derivatives of every kind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_forward_mode(impl, reset):
    run = by(impl, marks() if reset else None)
    given = tuple(made().values())
    tangents = tuple(made(seed=1).values())
    _, (dy, dlast) = torch.func.jvp(run, given, tangents)
    ways = [(a.double() - b.double()) / 2e-6 for a, b in zip(
        run(*(x + 1e-6 * t for x, t in zip(given, tangents))), run(*(x - 1e-6 * t for x, t in zip(given, tangents))),
    )]  # fmt: skip
    torch.testing.assert_close([dy, dlast], ways, atol=1e-6, rtol=1e-6)
    with forward_ad.dual_level():
        y, last = run(*(forward_ad.make_dual(x, t) for x, t in zip(given, tangents)))
        torch.testing.assert_close([forward_ad.unpack_dual(v).tangent for v in (y, last)], [dy, dlast])


def test_transforms_of_torch_func_through_auto():
    given = made(4, b=2)
    values = tuple(given.values())

    def loss(*values):
        y, last = by("auto")(*values)
        return y.sin().sum() + last.square().sum()

    leaves = [x.clone().requires_grad_() for x in values]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, argnums=tuple(range(9)))(*values), expected)
    outputs = lambda u: by("auto")(u, *values[1:])[0]  # noqa: E731
    torch.testing.assert_close(torch.func.jacfwd(outputs)(values[0]), torch.func.jacrev(outputs)(values[0]))
    axes = tuple(None if name in ("A", "D", "delta_bias") else 0 for name in NAMES)
    one = lambda *values: loss(*(x if axis is None else x[None] for x, axis in zip(values, axes)))  # noqa: E731
    per_sample = torch.func.vmap(torch.func.grad(one, argnums=(2, 5)), axes)(*values)
    for name, x, i in (("A", per_sample[0], 2), ("D", per_sample[1], 5)):
        torch.testing.assert_close(x.sum(0), expected[i], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", [name for name in ENGINES if name != "reference"])
def test_an_engine_that_is_one_operator_says_what_it_cannot_do(impl):
    values = tuple(x.float() for x in made().values())
    run = by(impl)
    says = rf"selective_scan\(impl='{impl}'\) has no forward-mode derivative .*; impl='reference' and impl='auto' can"
    with pytest.raises(RuntimeError, match=says):
        torch.func.jvp(run, values, values)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=says):
        run(*values[:8], forward_ad.make_dual(values[8], values[8]))
    says = rf"selective_scan\(impl='{impl}'\) cannot be transformed by torch.func .*; impl='reference' and"
    with pytest.raises(RuntimeError, match=says):
        torch.func.grad(lambda u: run(u, *values[1:])[0].sum())(values[0])
    with pytest.raises(RuntimeError, match=says):
        torch.func.vmap(lambda A: run(*values[:2], A, *values[3:])[0])(torch.stack([values[2]] * 2))


def test_transforms_of_the_matrix():
    given = made(4)
    values = tuple(given[name] for name in ("delta", "A", "B", "C", "D", "delta_bias"))
    run = lambda *values: selective_scan_matrix(*values, True, reset=marks(4))  # noqa: E731
    leaves = [x.clone().requires_grad_() for x in values]
    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True)
    torch.testing.assert_close(torch.func.jacfwd(run, argnums=1)(*values), torch.func.jacrev(run, argnums=1)(*values))
    looped = torch.stack([run(values[0], A, *values[2:]) for A in (values[1], 2 * values[1])])
    torch.testing.assert_close(
        torch.func.vmap(run, (None, 0, None, None, None, None))(
            values[0], torch.stack([values[1], 2 * values[1]]), *values[2:]
        ),
        looped,
    )


# --- compiled and exported -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", *(["triton"] if kernels.INTERPRETED else [])])
def test_compiled_once_for_every_length(impl):
    torch._dynamo.reset()
    counter = CompileCounter()
    run = lambda given: selective_scan(**given, delta_softplus=True, impl=impl)  # noqa: E731
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=False)
    for length in (5, 8, 17, *(() if impl == "triton" else (64, 111))):
        given = {name: x.requires_grad_() for name, x in made(length, dtype=torch.float32).items()}
        for name in TIMED:
            torch._dynamo.mark_dynamic(given[name], 1)
        found = []
        for f in (compiled, run):
            y, last = f(given)
            found.append([y, last, *torch.autograd.grad(y.sin().sum() + last.sum(), list(given.values()))])
        torch.testing.assert_close(*found)
    assert counter.frame_count == 1


class Layer(torch.nn.Module):
    def forward(self, given):
        return selective_scan(**given, delta_softplus=True)


def test_exported_for_every_length():
    length = torch.export.Dim("length", min=2, max=2**16)
    shapes = {name: {1: length} if name in TIMED else None for name in NAMES}
    exported = torch.export.export(Layer(), (made(),), dynamic_shapes=(shapes,)).module()
    for steps in (2, 5, 63):
        torch.testing.assert_close(exported(made(steps)), Layer()(made(steps)))


@pytest.mark.parametrize("impl", ["auto", *ENGINES])
def test_meta_tensors(impl):
    given = {name: x.to("meta") for name, x in made(dtype=torch.float32).items()}
    y, last = selective_scan(**given, impl=impl)
    assert y.shape == (2, 7, 3) and last.shape == (2, 3, 2) and y.device.type == last.device.type == "meta"


# --- what comes in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "reset"])
def test_what_is_not_a_tensor_is_named(name):
    given = made() | {"reset": marks()}
    with pytest.raises(TypeError, match=f"^{name} must be a Tensor, got ndarray; use torch.from_numpy"):
        selective_scan(**given | {name: given[name].numpy()})
    with pytest.raises(TypeError, match=f"^{name} must be a Tensor, got list"):
        selective_scan(**given | {name: given[name].tolist()})


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "z"])
def test_what_is_not_a_tensor_is_named_for_one_step_too(name):
    now = {k: x[:, 0] if k in TIMED else x for k, x in made().items()}
    with pytest.raises(TypeError, match=f"^{name} must be a Tensor, got ndarray"):
        selective_scan_step(**now | {name: now[name].numpy()})


@pytest.mark.parametrize("impl", ["auto", *ENGINES])
@pytest.mark.parametrize("wide", TIMED)
def test_autocast_takes_mixed_dtypes_and_keeps_the_state_in_float32(impl, wide):
    """One argument is still in float32, as a layer outside of autocast would give it; the others are in half."""
    dtype = torch.float16
    given = made(dtype=torch.float32)
    half = {name: x.to(dtype) if name in TIMED else x for name, x in given.items()}
    with torch.autocast("cpu", dtype):
        y, last = selective_scan(**half | {wide: given[wide]}, impl=impl)
    assert y.dtype == dtype and last.dtype == torch.float32
    torch.testing.assert_close((y, last), selective_scan(**half, impl=impl))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("name", ["A", "D", "delta_bias", "state"])
def test_a_parameter_in_half_precision_is_its_own_number(impl, name, dtype):
    """Rounded once, then used in float32, as if the rounded numbers had come so. Its gradient is of its dtype."""
    given = made(dtype=torch.float32)
    rounded = given[name].to(dtype)
    found = []
    for x in (rounded, rounded.float()):
        leaves = {k: v.clone().requires_grad_() for k, v in (given | {name: x}).items()}
        y, last = selective_scan(**leaves, delta_softplus=True, impl=impl)
        assert last.dtype == torch.float32
        grads = torch.autograd.grad(y.sin().sum() + last.sum(), list(leaves.values()))
        assert [g.dtype for g in grads] == [v.dtype for v in leaves.values()]
        found.append([y, last, *(g.to(dtype) if k == name else g for k, g in zip(leaves, grads))])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("impl", ENGINES)
def test_a_gate_of_200_and_its_gradient(impl, dtype):
    """silu(-200) is 0 and silu(200) is 200; their slopes 0 and 1; nothing overflows on the way."""
    given = made(dtype=torch.float32)
    given["z"] = torch.where(given["z"] > 0, 200.0, -200.0)
    given = {k: (x.to(dtype) if k in TIMED else x).requires_grad_() for k, x in given.items()}
    exact = {k: x.detach().double().requires_grad_() for k, x in given.items()}
    found = []
    for leaves, engine in ((given, impl), (exact, "reference")):
        y, last = selective_scan(**leaves, delta_softplus=True, impl=engine)
        found.append([y, last, *torch.autograd.grad(y.sum() + last.sum(), list(leaves.values()))])
    eps = torch.finfo(dtype).eps
    for name, ours, truth in zip(("y", "last", *NAMES), *found):
        assert ours.isfinite().all(), name
        assert (ours - truth).abs().max() <= 8 * eps * truth.abs().max(), name


@pytest.mark.parametrize("impl", ENGINES)
def test_extreme_steps(impl):
    """delta of 1e4 forgets everything and -1e4 nothing, after the softplus; no NaN in either pass."""
    for extreme in (1e4, -1e4):
        given = made(dtype=torch.float32)
        given["delta"][:, 3] = extreme
        leaves = {k: x.requires_grad_() for k, x in given.items()}
        exact = {k: x.detach().double().requires_grad_() for k, x in given.items()}
        found = []
        for values, engine in ((leaves, impl), (exact, "reference")):
            y, last = selective_scan(**values, delta_softplus=True, impl=engine)
            found.append([y, last, *torch.autograd.grad(y.sum() + last.sum(), list(values.values()))])
        for name, ours, truth in zip(("y", "last", *NAMES), *found):
            assert ours.isfinite().all(), name
            assert (ours - truth).abs().max() <= 1e-5 * (1 + truth.abs().max()), (name, extreme)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("name", TIMED)
@pytest.mark.parametrize("at", [7, 8, 11])
def test_gradients_before_a_reset_do_not_see_a_nan_after_it(impl, name, at):
    """The kernels' chunks have 8 steps: the reset is on a last step, on a first, and within one; the NaN follows it."""
    reset = torch.arange(17).eq(at).expand(2, -1)
    found = []
    for spoilt in (False, True):
        given = made(17, dtype=torch.float32)
        if spoilt:
            given[name][:, at + 2] = torch.nan
        leaves = {k: x.requires_grad_() for k, x in given.items()}
        y, _ = selective_scan(**leaves, delta_softplus=True, reset=reset, impl=impl)
        grads = torch.autograd.grad(y[:, :at].sin().sum(), [leaves[k] for k in (*TIMED, "state")])
        found.append([g if k == "state" else g[:, :at] for k, g in zip((*TIMED, "state"), grads)])
    for k, clean, other in zip((*TIMED, "state"), *found):
        assert torch.equal(clean, other), k
