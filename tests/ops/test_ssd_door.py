"""Where calls of state space duality enter: the engine that "auto" takes, dtypes and autocast, what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import everywhere
from ssd_cases import HERE, NAMES, TIMED, both_ways, by, exactly, made, resets

from nondual.ops import ssd as door
from nondual.ops.ssd import ssd, ssd_step
from nondual.ops.ssd import triton as kernels

SRC = Path(__file__).parents[2] / "src"

pytestmark = pytest.mark.usefixtures("poisoned")


# --- engines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "reference", "chunked", "triton"])
@pytest.mark.parametrize("b, length, h", [(2, 0, 3), (0, 5, 3), (2, 5, 0)])
def test_nothing_to_do(impl, b, length, h):
    inputs = made(length, b=b, h=h)
    y, state = ssd(**inputs, reset=torch.ones(b, length, dtype=torch.bool), impl=impl)
    assert y.shape == (b, length, h, 8) and state.shape == (b, h, 8, 8)
    if not length:
        assert torch.equal(state, inputs["state"])
    (y.sum() + state.sum()).backward()


def test_auto_on_a_cpu_is_chunked():
    inputs = made(70)
    auto, named = (ssd(**inputs, impl=impl) for impl in ("auto", "chunked"))
    assert torch.equal(auto[0], named[0]) and torch.equal(auto[1], named[1])


@pytest.mark.gpu
def test_auto_on_a_gpu_is_triton_where_it_can():
    inputs = made(70, device="cuda")
    auto, named = (ssd(**inputs, impl=impl) for impl in ("auto", "triton"))
    assert torch.equal(auto[0], named[0]) and torch.equal(auto[1], named[1])
    for other in (exactly(inputs), made(70, p=257, n=1, device="cuda"), made(70, n=257, device="cuda")):
        auto, named = (ssd(**other, impl=impl) for impl in ("auto", "chunked"))
        assert torch.equal(auto[0], named[0])


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_meta_tensors(impl):
    inputs = {name: v.detach().to("meta") for name, v in made(9, b=2, h=4, g=2, p=3, n=5).items()}
    y, state = by(impl, reset=torch.zeros(2, 9, dtype=torch.bool, device="meta"))(inputs)
    assert y.shape == (2, 9, 4, 3) and state.shape == (2, 4, 3, 5)


# --- dtypes ----------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_autocast(device, impl):
    inputs = made(9, h=1, device=device)
    with torch.autocast(device, torch.float16):
        y, state = by(impl)(inputs | {"B": inputs["B"].half()})  # the dtypes meet
        (y.sum() + state.sum()).backward()
    assert y.dtype == torch.float16 and state.dtype == torch.float32
    assert all(v.grad.dtype == torch.float32 for v in inputs.values())
    half = {name: v.detach().half() if name in TIMED else v.detach() for name, v in inputs.items()}
    torch.testing.assert_close(y, by(impl)(half)[0])
    with torch.autocast(device, torch.float16):
        assert ssd(**exactly(inputs), impl="reference")[0].dtype == torch.float64


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("wide", TIMED)
def test_autocast_takes_mixed_dtypes(impl, wide):
    """One argument is still in float32, as a layer outside of autocast would give it; the others are in half."""
    given = {name: v.detach() for name, v in made(9, h=1).items()}
    half = {name: v.half() if name in TIMED else v for name, v in given.items()}
    with torch.autocast("cpu", torch.float16):
        y, last = by(impl)(half | {wide: given[wide]})
    assert y.dtype == torch.float16 and last.dtype == torch.float32
    torch.testing.assert_close((y, last), by(impl)(half))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("name", ["A", "D", "delta_bias", "state"])
def test_a_parameter_in_half_precision_is_its_own_number(impl, name, dtype):
    """Rounded once, then used in float32, as if the rounded numbers had come so. Its gradient is of its dtype."""
    given = {k: v.detach() for k, v in made(9, h=1).items()}
    rounded = given[name].to(dtype)
    found = []
    for v in (rounded, rounded.float()):
        leaves = {k: w.clone().requires_grad_() for k, w in (given | {name: v}).items()}
        result = both_ways(by(impl), leaves)
        assert all(result[f"d{k}"].dtype == w.dtype for k, w in leaves.items())
        found.append(result | {f"d{name}": result[f"d{name}"].to(dtype)})
    torch.testing.assert_close(*found)


# --- refused ---------------------------------------------------------------------------------------------------------


def zeros(dtype=torch.float32, **other):
    shapes = {"x": (2, 5, 4, 3), "delta": (2, 5, 4), "A": (4,), "B": (2, 5, 2, 6), "C": (2, 5, 2, 6)} | other
    return {
        name: torch.zeros(shape, dtype=dtype) if isinstance(shape, tuple) else shape for name, shape in shapes.items()
    }


@pytest.mark.parametrize("inputs, says", [
    (zeros(x=(2, 5, 4)), r"x must be 4-dimensional \(B, L, H, P\), got \(2, 5, 4\)"),
    (zeros(delta=(2, 5, 3)), r"delta must be \(B, L, H\) = \(2, 5, 4\), got \(2, 5, 3\)"),
    (zeros(A=(4, 6)), r"A must be \(H,\) = \(4,\), got \(4, 6\)"),
    (zeros(B=(2, 4, 2, 6)), r"B must be \(B, L, N\) or \(B, L, G, N\) with \(B, L\) = \(2, 5\).*got \(2, 4, 2, 6\)"),
    (zeros(C=(5, 6)), r"C must be \(B, L, N\) or .* got \(5, 6\)"),
    (zeros(B=(2, 5, 0), C=(2, 5, 0)), r"N of 1 or more, got \(2, 5, 0\)"),
    (zeros(C=(2, 5, 2, 7)), r"C must have the shape of B, \(2, 5, 2, 6\), got \(2, 5, 2, 7\)"),
    (zeros(B=(2, 5, 3, 6), C=(2, 5, 3, 6)), "the G of B and C must divide H = 4, got 3"),
    (zeros(D=(3,)), r"D must be \(H,\) = \(4,\) or \(H, P\) = \(4, 3\), got \(3,\)"),
    (zeros(z=(2, 5, 4, 1)), r"z must be \(B, L, H, P\) = \(2, 5, 4, 3\), got \(2, 5, 4, 1\)"),
    (zeros(delta_bias=(3,)), r"delta_bias must be \(H,\) = \(4,\), got \(3,\)"),
    (zeros(state=(2, 4, 6, 3)), r"state must be \(B, H, P, N\) = \(2, 4, 3, 6\), got \(2, 4, 6, 3\)"),
    (zeros(reset=(2, 4)), r"reset must be \(B, L\) = \(2, 5\), got \(2, 4\)"),
    (zeros(reset=(2, 5)), "reset must be boolean, True where a sequence begins, got torch.float32"),
    (zeros(torch.int64), "x must be floating point, got torch.int64"),
    (zeros(A=torch.zeros(4, dtype=torch.complex64)), "A must be real, floating point, got torch.complex64"),
    (zeros(delta=torch.zeros(2, 5, 4).half()), "delta must have the dtype of x, torch.float32, got torch.float16"),
    (zeros(A=torch.zeros(4, device="meta")), "A must be on the device of x, cpu, got meta"),
    (zeros(chunk=0), "chunk must be an integer of 1 or more, or None for the engine's own, got 0"),
    (zeros(chunk=True), "chunk must be an integer of 1 or more"),
    (zeros(chunk=16.0), "chunk must be an integer of 1 or more"),
    (zeros(chunk=48, impl="triton"), r"chunk must be one of \[16, 32, 64, 128, 256\] for impl='triton', got 48"),
    (zeros(impl="cuda"), "impl must be one of .*'chunked'.* got 'cuda'"),
    (zeros(torch.float64, impl="triton"), "x must be float16, bfloat16 or float32 for impl='triton'"),
    (zeros(x=(2, 5, 4, 257), impl="triton"), "P must be at most 256 and N at most 256 .*, got 257 and 6"),
    (zeros(B=(2, 5, 257), C=(2, 5, 257), impl="triton"), "N at most 256 for impl='triton', got 3 and 257"),
])  # fmt: skip
def test_bad_input_is_named(inputs, says):
    with pytest.raises(ValueError, match=says):
        ssd(**inputs)


@pytest.mark.parametrize("name", [*NAMES, "reset"])
def test_what_is_not_a_tensor_is_named(name):
    given = {k: v.detach() for k, v in made(5).items()} | {"reset": resets(5)}
    with pytest.raises(TypeError, match=f"^{name} must be a Tensor, got ndarray; use torch.from_numpy"):
        ssd(**given | {name: given[name].numpy()})
    with pytest.raises(TypeError, match=f"^{name} must be a Tensor, got list"):
        ssd(**given | {name: given[name].tolist()})
    if name in ("x", "delta", "A", "B", "C", "z"):
        now = {k: v[:, 0] if k in TIMED else v for k, v in given.items() if k != "reset"}
        with pytest.raises(TypeError, match=f"^{name} must be a Tensor, got ndarray"):
            ssd_step(**now | {name: now[name].numpy()})


def test_a_step_of_a_sequence_is_refused():
    with pytest.raises(ValueError, match=r"x must be \(B, H, P\).* for one step.*ssd takes whole sequences"):
        ssd_step(**zeros())


def test_bfloat16_is_refused_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    with pytest.raises(ValueError, match="float16 or float32 in Triton's interpreter"):
        ssd(**zeros(torch.bfloat16), impl="triton")


def test_without_the_interpreter_a_cpu_is_refused_and_auto_works():
    code = """
import torch
from nondual.ops.ssd import ssd
x, delta, B = torch.randn(1, 3, 2, 4), torch.rand(1, 3, 2), torch.randn(1, 3, 5)
arguments = x, delta, -torch.ones(2), B, B
assert torch.equal(ssd(*arguments)[0], ssd(*arguments, impl="chunked")[0])
try:
    ssd(*arguments, impl="triton")
except ValueError as error:
    print(error)
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(SRC)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=100)
    said = ran.stdout
    assert "x must be on a CUDA device for impl='triton', got cpu" in said and "TRITON_INTERPRET=1" in said


def test_without_triton_its_engine_is_refused(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("nondual.ops.ssd.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(door, "triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="needs triton"):
        ssd(**zeros(), impl="triton")
    assert ssd(**zeros())[0].shape == (2, 5, 4, 3)
