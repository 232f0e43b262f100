"""Which engine "auto" takes on a GPU that is not there, and what an engine asked for by name says where it cannot run.

The tensors lie on torch's "meta" device, which has shapes and dtypes and no values, and say that they are on "cuda".
Which engine ran is told by the operators that torch was asked for, so that no test here depends on how a door decides.
"""

import importlib
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nondual.ops.attention import attention
from nondual.ops.causal_conv1d import causal_conv1d
from nondual.ops.flash_attention import flash_attention
from nondual.ops.linear_attention import linear_attention
from nondual.ops.linear_recurrence import linear_recurrence
from nondual.ops.selective_scan import selective_scan, selective_scan_step
from nondual.ops.sparse_attention import BlockMask, sparse_attention
from nondual.ops.ssd import ssd

KERNELS = {
    "nondual::flash_attention",
    "nondual::selective_scan",
    "nondual::sparse_attention",
    "nondual::ssd",
    "nondual::linear_attention",
    "nondual::delta_rule",
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF_AND_SINGLE = DTYPES[:3]


class Asked(TorchDispatchMode):
    """The operators that torch was asked for, with the arguments of each."""

    def __init__(self):
        super().__init__()
        self.operators: dict[str, tuple] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators[function.name().split(".")[0]] = args
        return function(*args, **(kwargs or {}))


class Fused(TorchFunctionMode):
    """Whether torch's own attention was called."""

    called = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.called |= function is torch.nn.functional.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


class OnAGpu(TorchFunctionMode):
    """Tensors on "meta" say that they are on "cuda", and what is to be made on "cuda" is made on "meta"."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == torch.Tensor.device.__get__:
            device = function(*args)
            return torch.device("cuda", 0) if device.type == "meta" else device
        if function == torch.Tensor.is_cuda.__get__:
            return args[0].device.type == "cuda"
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def engine(operation, *args, **options) -> str:
    """The engine that ran: "triton" or "cpu" where one of these was asked for, "sdpa" where torch's attention was, and
    "torch" for what is written out in torch."""
    with Asked() as asked, Fused() as fused:
        operation(*args, **options)
    if KERNELS & asked.operators.keys():
        return "triton"
    if any(name.startswith("nondual::selective_scan_cpu") for name in asked.operators):
        return "cpu"
    return "sdpa" if fused.called else "torch"


def numbers(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """On a CPU real ones, elsewhere none."""
    return torch.full(shape, 0.1, dtype=dtype, device="cpu" if device == "cpu" else "meta")


def heads(d: int = 8, dv: int = 8, n: int = 5, m: int = 5, dtype=torch.float32, device="cuda"):
    return [numbers(2, 4, *shape, dtype=dtype, device=device) for shape in ((n, d), (m, d), (m, dv))]


def scanned(states: int = 4, length: int = 5, dtype=torch.float32, device="cuda"):
    u, B = (numbers(2, length, width, dtype=dtype, device=device) for width in (6, states))
    return u, u, numbers(6, states, dtype=torch.float32, device=device), B, B


def dual(p: int = 8, n: int = 8, length: int = 5, dtype=torch.float32, device="cuda"):
    x, B = (numbers(2, length, *shape, dtype=dtype, device=device) for shape in ((4, p), (1, n)))
    return x, x[..., 0], numbers(4, dtype=torch.float32, device=device), B, B


def listed(d: int = 8, dv: int = 8, tile: int = 16, dtype=torch.float32, device="cuda"):
    """Queries, keys, values, and a mask with one tile."""
    mask = BlockMask.from_mask(torch.ones(5, 5, dtype=torch.bool), tile)
    return *heads(d, dv, dtype=dtype, device=device), mask.to("cpu" if device == "cpu" else "meta")


def summed(d: int = 8, dv: int = 8, length: int = 5, dtype=torch.float32, device="cuda"):
    return heads(d, dv, length, length, dtype=dtype, device=device)


@pytest.fixture
def compiled(monkeypatch):
    """The kernels are not interpreted, as on a machine with a GPU."""
    for operation, _ in OPERATIONS.values():
        monkeypatch.setattr(importlib.import_module(f"{operation.__module__}.triton"), "INTERPRETED", False)


OPERATIONS = {
    "flash_attention": (flash_attention, heads),
    "linear_attention": (linear_attention, summed),
    "selective_scan": (selective_scan, scanned),
    "sparse_attention": (sparse_attention, listed),
    "ssd": (ssd, dual),
}

# --- "auto" --------------------------------------------------------------------------------------------------------


def test_flash_attention_on_a_gpu(compiled):
    """The kernels for half and single precision with heads of up to 256, of the values too; else torch's attention."""
    with OnAGpu():
        for dtype, d, dv in product(DTYPES, (1, 8, 256, 257), (1, 8, 256, 257)):
            holds = dtype in HALF_AND_SINGLE and max(d, dv) <= 256
            assert engine(flash_attention, *heads(d, dv, dtype=dtype)) == ("triton" if holds else "sdpa"), (
                dtype,
                d,
                dv,
            )
            with_lse = engine(flash_attention, *heads(d, dv, dtype=dtype), return_lse=True)
            assert (with_lse == "triton") == holds and with_lse != "sdpa", (dtype, d, dv)
        for options in ({"causal": True}, {"window": 2}, {"scale": -1.0}, {"scale": 0.0}):
            assert engine(flash_attention, *heads(), **options) == "triton", options
            assert engine(flash_attention, *heads(n=1, m=600), **options) == "triton", options


def test_flash_attention_elsewhere():
    for dtype, device in product(DTYPES, ("cpu", "meta")):
        assert engine(flash_attention, *heads(dtype=dtype, device=device)) == "sdpa"
        assert engine(flash_attention, *heads(dtype=dtype, device=device), return_lse=True) not in (
            "sdpa",
            "triton",
        )


def test_selective_scan_on_a_gpu(compiled):
    """The kernels for half and single precision, for up to 256 states and zoh-euler; else the steps in torch."""
    with OnAGpu():
        for dtype, states in product(DTYPES, (1, 16, 256, 257)):
            expected = "triton" if dtype in HALF_AND_SINGLE and states <= 256 else "torch"
            assert engine(selective_scan, *scanned(states, dtype=dtype)) == expected, (dtype, states)
        assert engine(selective_scan, *scanned(), discretization="zoh") == "torch"
        assert engine(selective_scan, *scanned(length=0)) == "torch"
        assert engine(selective_scan_step, *(x[:, 0] if x.ndim == 3 else x for x in scanned())) == "triton"


def test_selective_scan_elsewhere():
    for dtype in DTYPES:
        assert engine(selective_scan, *scanned(dtype=dtype, device="cpu")) == "cpu"
        assert engine(selective_scan, *scanned(dtype=dtype, device="meta")) == "torch"
    assert engine(selective_scan, *scanned(device="cpu"), discretization="zoh") == "torch"
    assert engine(selective_scan, *scanned(length=0, device="cpu")) == "torch"


def test_sparse_attention_on_a_gpu(compiled):
    """The kernels for half and single precision, heads of up to 256, tiles of multiples of 16; else rows of tiles."""
    with OnAGpu():
        for dtype, d, dv in product(DTYPES, (8, 256, 257), (8, 257)):
            expected = "triton" if dtype in HALF_AND_SINGLE and max(d, dv) <= 256 else "torch"
            assert engine(sparse_attention, *listed(d, dv, dtype=dtype)) == expected, (dtype, d, dv)
        assert engine(sparse_attention, *listed(tile=32), return_lse=True) == "triton"
        assert engine(sparse_attention, *listed(tile=24)) == "torch"


def test_sparse_attention_elsewhere():
    for dtype, device in product(DTYPES, ("cpu", "meta")):
        assert engine(sparse_attention, *listed(dtype=dtype, device=device)) == "torch"


def test_ssd_on_a_gpu(compiled):
    """The kernels for half and single precision, P and N of up to 256 and their own chunks; else torch."""
    with OnAGpu():
        for dtype, p, n in product(DTYPES, (1, 64, 256, 257), (1, 128, 256, 257)):
            expected = "triton" if dtype in HALF_AND_SINGLE and max(p, n) <= 256 else "torch"
            assert engine(ssd, *dual(p, n, dtype=dtype)) == expected, (dtype, p, n)
        for chunk in (16, 32, 64, 128, 256):
            assert engine(ssd, *dual(), chunk=chunk) == "triton"
        for chunk in (1, 8, 48, 512):
            assert engine(ssd, *dual(), chunk=chunk) == "torch"
        assert engine(ssd, *dual(length=0)) == "torch"


def test_linear_attention_on_a_gpu(compiled):
    """The kernels for half and single precision, D and Dv of up to 256 and their own chunks, the delta rule too; by
    chunks in torch where each channel decays by itself, and for what has no order."""
    with OnAGpu():
        each = numbers(2, 4, 5, dtype=torch.float32, device="cuda")
        for dtype, d, dv in product(DTYPES, (1, 64, 256, 257), (1, 128, 256, 257)):
            expected = "triton" if dtype in HALF_AND_SINGLE and max(d, dv) <= 256 else "torch"
            for options in ({}, {"log_decay": each}, {"beta": each}, {"log_decay": each, "beta": each}):
                assert engine(linear_attention, *summed(d, dv, dtype=dtype), **options) == expected, (dtype, d, dv)
        for options in ({"normalise": True}, {"log_decay": each[0, :, 0]}):
            assert engine(linear_attention, *summed(), **options) == "triton"
        for chunk in (16, 32, 64, 128, 256):
            assert engine(linear_attention, *summed(), chunk=chunk) == "triton"
        for chunk in (1, 8, 48, 512):
            assert engine(linear_attention, *summed(), chunk=chunk) == "torch"
        channels = numbers(2, 4, 5, 8, dtype=torch.float32, device="cuda")
        for options in ({"log_decay": channels}, {"causal": False}):
            assert engine(linear_attention, *summed(), **options) == "torch"
        assert engine(linear_attention, *summed(length=0)) == "torch"


def test_linear_attention_in_plain_torch():
    """By chunks wherever the kernels are not, and there is no matrix that "auto" would form."""
    for dtype in DTYPES:
        q, k, v = (numbers(2, 4, 5, 8, dtype=dtype, device="cpu") for _ in range(3))
        assert engine(linear_attention, q, k, v) == "torch"
        assert engine(linear_attention, q, k, v, causal=False) == "torch"
    with OnAGpu():
        q, k, v = (numbers(2, 4, 5, 8, dtype=torch.float64, device="cuda") for _ in range(3))
        assert engine(linear_attention, q, k, v) == "torch"
        q, k, v = (numbers(2, 4, 5, 8, dtype=torch.float32, device="cuda") for _ in range(3))
        assert engine(linear_attention, q, k, v, log_decay=q) == "torch"


def test_ssd_elsewhere():
    for dtype, device in product(DTYPES, ("cpu", "meta")):
        assert engine(ssd, *dual(dtype=dtype, device=device)) == "torch"


@pytest.mark.parametrize("name", OPERATIONS)
def test_half_precision_that_the_interpreter_gets_wrong_is_not_auto(name, monkeypatch):
    """bfloat16 on a GPU, with TRITON_INTERPRET=1: "auto" takes plain torch."""
    operation, make = OPERATIONS[name]
    monkeypatch.setattr(importlib.import_module(f"{operation.__module__}.triton"), "INTERPRETED", True)
    with OnAGpu():
        assert engine(operation, *make(dtype=torch.bfloat16)) != "triton"
        assert engine(operation, *make(dtype=torch.float16)) == "triton"


def test_linear_recurrence_takes_few_rounds_on_a_gpu():
    """On a GPU the scan in 2 log₂ L rounds whatever a step's size is, on a CPU while a step has 1,024 numbers at most:
    told by what torch is asked for, and how often."""
    for device, size, few in (("cuda", 2**14, True), ("cpu", 2**10, True), ("cpu", 2**10 + 1, False)):
        a, asked = numbers(1, 64, size, dtype=torch.float32, device=device), {}
        for impl in ("auto", "sequential", "parallel"):
            with OnAGpu() if device == "cuda" else Fused(), Asked() as asked[impl]:
                linear_recurrence(a, a, impl=impl)
        said = {
            impl: [(name, [y for y in args if isinstance(y, bool)]) for name, args in x.operators.items()]
            for impl, x in asked.items()
        }
        assert said["sequential"] != said["parallel"]
        assert said["auto"] == said["parallel" if few else "sequential"], (device, size)


def test_attention_takes_the_fused_kernel_unless_the_weights_are_asked_for():
    with OnAGpu():
        for dtype, device in product(DTYPES, ("cuda", "cpu")):
            q, k, v = heads(dtype=dtype, device=device)
            assert engine(attention, q, k, v, causal=True) == "sdpa"
            assert engine(attention, q, k, v, return_weights=True) == "torch"


def test_the_convolution_runs_on_a_fake_gpu():
    with OnAGpu():
        x = numbers(2, 5, 6, dtype=torch.float32, device="cuda")
        y, history = causal_conv1d(x, x.new_empty(6, 4), reset=torch.empty(2, 5, dtype=torch.bool, device="cuda"))
        assert y.shape == x.shape and history.shape == (2, 3, 6)


def under_a_gradient(operation, first, *rest, **options):
    def total(x):
        y = operation(x, *rest, **options)
        return (y[0] if isinstance(y, tuple) else y).sum()

    return torch.func.grad(total)(first)


def under_a_batch(operation, first, *rest, **options):
    return torch.func.vmap(lambda x: operation(x, *rest, **options))(torch.stack([first, first]))


def under_a_tangent(operation, first, *rest, **options):
    with forward_ad.dual_level():
        return operation(forward_ad.make_dual(first, torch.empty_like(first)), *rest, **options)


@pytest.mark.parametrize("transform", [under_a_gradient, under_a_batch, under_a_tangent])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_under_torchs_transforms_auto_takes_plain_torch(name, transform, device):
    """On a GPU too, where "auto" is the kernels otherwise; an engine asked for by name says that it cannot."""
    operation, make = OPERATIONS[name]
    with OnAGpu() if device == "cuda" else Fused():
        assert engine(transform, operation, *make(device=device)) in ("torch", "sdpa")
        with pytest.raises(RuntimeError, match=r"triton.*(forward-mode derivative|cannot be transformed)"):
            transform(operation, *make(device=device), impl="triton")


# --- by name -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation, arguments, options, says", [
    (flash_attention, lambda: heads(dtype=torch.float64), {}, "float16, bfloat16 or float32 .*got torch.float64"),
    (flash_attention, lambda: heads(d=257), {}, "q must be at most 256 wide .*got 257"),
    (flash_attention, lambda: heads(dv=257), {}, "v must be at most 256 wide .*got 257"),
    (flash_attention, lambda: heads(device="cpu", dtype=torch.bfloat16), {}, "interpreter"),
    (selective_scan, lambda: scanned(dtype=torch.float64), {}, "float16, bfloat16 or float32 .*got torch.float64"),
    (selective_scan, lambda: scanned(257), {}, "256.* states .*got N = 257|N.*256.*got 257"),
    (selective_scan, scanned, {"discretization": "zoh"}, "zoh"),
    (selective_scan, lambda: scanned(device="cpu", dtype=torch.bfloat16), {}, "interpreter"),
    (ssd, lambda: dual(dtype=torch.float64), {}, "float16, bfloat16 or float32 .*got torch.float64"),
    (ssd, lambda: dual(p=257), {}, "256.*got 257"),
    (ssd, lambda: dual(n=257), {}, "256.*got .*257"),
    (ssd, dual, {"chunk": 48}, "chunk must be one of .*got 48"),
    (ssd, lambda: dual(device="cpu", dtype=torch.bfloat16), {}, "interpreter"),
    (sparse_attention, lambda: listed(dtype=torch.float64), {}, "float16, bfloat16 or float32 .*got torch.float64"),
    (sparse_attention, lambda: listed(dv=257), {}, "v must be at most 256 wide .*got 257"),
    (sparse_attention, lambda: listed(tile=24), {}, "tiles of multiples of 16 .*got 24 x 24"),
    (sparse_attention, lambda: listed(device="cpu", dtype=torch.bfloat16), {}, "interpreter"),
])  # fmt: skip
def test_the_kernels_asked_for_by_name_say_what_they_do_not_hold(operation, arguments, options, says, monkeypatch):
    """What "auto" passes over without a word, and another engine takes, is one sentence here."""
    module = importlib.import_module(f"{operation.__module__}.triton")
    monkeypatch.setattr(module, "INTERPRETED", True)
    with OnAGpu():
        given = arguments()
        assert engine(operation, *given, **options) != "triton"
        with pytest.raises(ValueError, match=says) as refused:
            operation(*given, impl="triton", **options)
    assert "impl='" in str(refused.value) or "interpreter" in str(refused.value), "no remedy is named"


def test_the_loop_on_a_cpu_asked_for_by_name_on_a_gpu():
    with OnAGpu():
        with pytest.raises(ValueError, match="on the CPU for impl='cpu', got cuda"):
            selective_scan(*scanned(), impl="cpu")
        with pytest.raises(ValueError, match="zoh"):
            selective_scan(*scanned(device="cpu"), impl="cpu", discretization="zoh")


def test_the_kernels_are_refused_on_a_cpu_outside_of_the_interpreter(monkeypatch):
    for operation, make in OPERATIONS.values():
        module = importlib.import_module(f"{operation.__module__}.triton")
        monkeypatch.setattr(module, "INTERPRETED", False)
        with pytest.raises(ValueError, match="must be on a CUDA device for impl='triton', got cpu"):
            operation(*make(device="cpu"), impl="triton")


WITHOUT = """
import sys
sys.modules["triton"] = None  # an import of triton fails, as where it is not installed

sys.path.insert(0, "tests/ops")
from test_engines import OPERATIONS, OnAGpu, engine, flash_attention, heads

with OnAGpu():
    for name, (operation, make) in OPERATIONS.items():
        print(name, engine(operation, *make()))
        try:
            operation(*make(), impl="triton")
        except RuntimeError as error:
            print(name, "needs triton" in str(error))
    print(engine(flash_attention, *heads(), return_lse=True) not in ("sdpa", "triton"))
"""


def test_without_triton_auto_takes_what_is_there(pytestconfig):
    """And the kernels asked for by name say what they need."""
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.splitlines() == [
        "flash_attention sdpa", "flash_attention True", "linear_attention torch", "linear_attention True",
        "selective_scan torch", "selective_scan True",
        "sparse_attention torch", "sparse_attention True", "ssd torch", "ssd True", "True",
    ]  # fmt: skip
