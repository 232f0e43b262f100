"""State space duality as an operator of torch: checked, compiled whole, and compiled and exported for every length."""

import pytest
import torch
from harness import everywhere
from ssd_cases import NAMES, TIMED, both_ways, by, made, resets
from torch._dynamo.testing import CompileCounter

from nondual.ops.ssd import ssd
from nondual.ops.ssd import triton as kernels

pytestmark = pytest.mark.usefixtures("poisoned")


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(device, dtype):
    inputs = made(5, h=1, device=device, skip="hp", dtype=dtype)
    ordered = [inputs[name] for name in NAMES]
    marks = resets(5, device=device)
    torch.library.opcheck(torch.ops.nondual.ssd.default, (*ordered, marks, True, 16))
    torch.library.opcheck(torch.ops.nondual.ssd.default, (*ordered[:5], None, None, None, None, None, False, 16))
    given = [v.detach() for v in ordered]
    d_y, d_last = torch.randn_like(given[0]), torch.randn_like(given[-1])
    torch.library.opcheck(torch.ops.nondual.ssd_backward.default, (d_y, d_last, *given, marks, True, 16))


@everywhere
def test_compiles_whole_forward_and_backward(device):
    def run(inputs):
        y, state = ssd(**inputs | {"x": inputs["x"] * 1.5}, delta_softplus=True, impl="triton")
        return y * 2, state

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager" if device == "cpu" else "inductor")
    for length in (9, 17):
        inputs = made(length, h=1, device=device)
        ours, plain = both_ways(compiled, inputs), both_ways(run, inputs)
        for name in plain:
            torch.testing.assert_close(ours[name], plain[name])


@pytest.mark.parametrize("reset", [False, True])
def test_auto_on_a_cpu_compiles_whole(reset):
    torch._dynamo.reset()
    inputs, marks = made(70), resets(70) if reset else None
    compiled = torch.compile(by("auto", reset=marks), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), by("auto", reset=marks)(inputs))


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("impl", ["auto", *(["triton"] if kernels.INTERPRETED else [])])
def test_compiled_once_for_every_length(impl, reset):
    torch._dynamo.reset()
    counter = CompileCounter()
    run = lambda given, marks: ssd(**given, delta_softplus=True, reset=marks, impl=impl)  # noqa: E731
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=False)
    for length in (7, 17, 40) if impl == "triton" else (7, 64, 65, 128, 300):
        given = made(length, b=2, h=1)
        marks = resets(length, 2) if reset else None
        for v in [given[name] for name in TIMED] + ([marks] if reset else []):
            torch._dynamo.mark_dynamic(v, 1)
        found = []
        for f in (compiled, run):
            y, last = f(given, marks)
            found.append([y, last, *torch.autograd.grad(y.sin().sum() + last.sum(), list(given.values()))])
        torch.testing.assert_close(*found, atol=2e-4, rtol=2e-4)
    assert counter.frame_count == 1


# --- exported for every length ---------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    def forward(self, given, marks=None):
        return ssd(**given, delta_softplus=True, reset=marks)


LENGTH = torch.export.Dim("length", min=2, max=2**16)
SHAPES = {name: {1: LENGTH} if name in TIMED else None for name in NAMES}


def detached(length):
    return {name: v.detach() for name, v in made(length, b=2).items()}


@pytest.mark.parametrize("reset", [False, True])
def test_exported_for_every_length(reset):
    marks = lambda length: (resets(length, 2),) if reset else ()  # noqa: E731
    shapes = (SHAPES, {1: LENGTH}) if reset else (SHAPES,)
    exported = torch.export.export(Layer(), (detached(9), *marks(9)), dynamic_shapes=shapes).module()
    for length in (2, 64, 130):
        given = detached(length), *marks(length)
        torch.testing.assert_close(exported(*given), Layer()(*given), atol=1e-5, rtol=1e-5)


def test_onnx_for_every_length(tmp_path):
    import onnxruntime  # here: a GPU machine that runs the rest of this file does not have it

    program = torch.onnx.export(Layer().eval(), (detached(9), None), dynamo=True, dynamic_shapes=(SHAPES, None))
    program.save(tmp_path / "ssd.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "ssd.onnx")
    names = [v.name for v in session.get_inputs()]
    for length in (2, 77, 200):
        given = detached(length)
        found = session.run(None, {name: v.numpy() for name, v in zip(names, given.values())})
        torch.testing.assert_close([torch.from_numpy(v) for v in found], list(Layer()(given)), atol=1e-4, rtol=1e-4)
