"""Flash attention against float64 and at its edges, by every engine, and what the public function refuses.

Where there is no GPU the kernels run in Triton's interpreter, in float32 and float16 and with small tiles. On a GPU the
same tests run compiled, with bfloat16.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flash_cases import MASKS, allowed, check, made, textbook
from harness import DTYPES, everywhere, incoming

from nondual.ops import flash_attention as door
from nondual.ops import masks
from nondual.ops.attention import attention, masked_softmax
from nondual.ops.flash_attention import flash_attention
from nondual.ops.flash_attention import triton as kernels

SRC = Path(__file__).parents[2] / "src"
pytestmark = pytest.mark.usefixtures("poisoned")


def test_the_kernels_can_run_here():
    assert kernels.INTERPRETED or torch.cuda.is_available(), "unset TRITON_INTERPRET=0: there is no GPU to compile for"


def test_what_is_not_written_would_be_seen():
    assert torch.empty(3).isnan().all()


# --- right ---------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("n, m, g", [(61, 61, 2), (37, 97, 1), (97, 37, 2)])
def test_error_is_that_of_plain_pytorch(device, dtype, mask, n, m, g):
    check(made(n, m, 32, g=g, dtype=dtype, device=device), MASKS[mask])


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 16, 32, 40, 59, 64, 80, 96, 111, 128, 200, 256])
def test_every_head_size(device, dtype, d):
    check(made(19, 41, d, dtype=dtype, device=device, h=1, g=1), {"causal": True})


@everywhere
@pytest.mark.parametrize("d, dv", [(48, 17), (16, 80)])
def test_values_of_another_width(device, d, dv):
    check(made(19, 41, d, dv, device=device), {"causal": True})


@everywhere
@pytest.mark.parametrize("h, g", [(6, 1), (6, 2), (6, 3)])
def test_grouped_heads_in_a_batch(device, h, g):
    check(made(17, 23, 16, b=2, h=h, g=g, device=device), {"causal": True})


@everywhere
@pytest.mark.parametrize("mask", ["full", "causal", "window 23"])
@pytest.mark.parametrize("n", [0, 1, 2, 17, 97])
@pytest.mark.parametrize("m", [0, 1, 2, 17, 97])
def test_short_sequences(device, n, m, mask):
    inputs = made(n, m, 16, h=1, g=1, device=device)
    check(inputs, MASKS[mask])
    out, lse = flash_attention(*inputs, **MASKS[mask], return_lse=True, impl="triton")
    nothing = ~allowed(n, m, device, **MASKS[mask]).any(-1)
    assert (out[:, :, nothing] == 0).all() and (lse[:, :, nothing] == -torch.inf).all()
    assert lse[:, :, ~nothing].isfinite().all()


@everywhere
@pytest.mark.parametrize("b, h", [(0, 2), (2, 0)])
def test_no_batch_and_no_heads(device, b, h):
    q, k, v = (torch.randn(b, h, 5, 16, device=device, requires_grad=True) for _ in range(3))
    out = flash_attention(q, k, v, impl="triton")
    out.sum().backward()
    assert out.shape == (b, h, 5, 16) and q.grad.shape == q.shape


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_sees_nothing_is_zero_and_has_no_gradient(device, dtype):
    n, m = 41, 7
    inputs = made(n, m, 16, dtype=dtype, device=device)
    out, lse = flash_attention(*inputs, causal=True, return_lse=True, impl="triton")
    d_lse = torch.randn(lse.shape, device=device)
    grads = torch.autograd.grad((out, lse), inputs, (incoming(out), d_lse))
    assert (out[:, :, : n - m] == 0).all() and (lse[:, :, : n - m] == -torch.inf).all()
    assert (grads[0][:, :, : n - m] == 0).all()
    assert all(x.isfinite().all() for x in (out, lse[:, :, n - m :], *grads))


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e4, -1e4, -1.0, 0.0])
def test_any_scale_and_scores_of_ten_thousand(device, dtype, scale):
    q, k, v = inputs = made(29, 41, 16, dtype=dtype, device=device)
    out, lse = flash_attention(q, k, v, scale=scale, causal=True, impl="triton", return_lse=True)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask = allowed(29, 41, device, causal=True)
    truth = textbook(*exact, mask, scale=scale)
    assert (
        lse.double() - (exact[0] @ exact[1].mT * scale).masked_fill(~mask, -torch.inf).logsumexp(-1)
    ).abs().max() <= max(1, abs(scale)) * 2e-5
    # Scores of 1e4 are known in float32 to about 1e-3, and so are the weights of keys that nearly tie.
    loose = 3e-2 if dtype == torch.float16 else 2e-1 if dtype == torch.bfloat16 else 1e-2
    torch.testing.assert_close(out.double(), truth, atol=loose, rtol=loose)
    check(made(29, 41, 16, dtype=dtype, device=device), {"causal": True}, scale=math.copysign(0.5, scale))


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_all_far_below_zero(device, dtype):
    q, k, v = made(17, 23, 16, dtype=dtype, device=device)
    q, k = (torch.full_like(x, 60.0) for x in (q, k))
    check([x.detach().requires_grad_() for x in (q, k, v)], {}, scale=-1.0)  # 16 · 60 · 60 = 57600


@everywhere
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_lse_and_its_gradient(device, impl):
    inputs = made(29, 41, 16, h=2, g=1, device=device)
    _, lse = flash_attention(*inputs, causal=True, return_lse=True, impl=impl)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    scores = (exact[0] @ exact[1].repeat_interleave(2, 1).mT / 4).masked_fill(
        ~masks.causal(29, 41, device=device), -torch.inf
    )
    truth = scores.logsumexp(-1)
    torch.testing.assert_close(lse, truth.float())
    d_lse = incoming(lse)
    for a, t in zip(torch.autograd.grad(lse, inputs[:2], d_lse), torch.autograd.grad(truth, exact[:2], d_lse.double())):
        torch.testing.assert_close(a, t.float(), atol=1e-5, rtol=1e-5)


@everywhere
@pytest.mark.parametrize("impl", ["reference", "sdpa", "triton"])
@pytest.mark.parametrize("window", [1, 2, 7, 16, 33, 99])
def test_a_window_is_exactly_that_many_keys(device, impl, window):
    n, m = 37, 41
    q, k = (torch.randn(1, 1, x, 16, device=device) for x in (n, m))
    v = torch.eye(m, device=device)[None, None]  # the output is then the weights
    seen = flash_attention(q, k, v, window=window, impl=impl) > 0
    assert torch.equal(seen[0, 0], masks.sliding_window(n, m, window=window, device=device))
    assert (seen[0, 0, window:].sum(-1) == min(window, m)).all() or window > n


OPS = [
    ("attention", "reference"),
    ("attention", "sdpa"),
    ("flash", "reference"),
    ("flash", "sdpa"),
    ("flash", "triton"),
]


def bounds(q, k, v, out, d_out, mask, scale, dtype, exact, rounded):
    """By how much each number of out, dq, dk and dv may be off: the rounding of each step, carried through by hand.

    A weight is known to `dtype` once, and twice as badly as its row's worst score (without error where scores are
    `exact`) or, with `rounded`, as the row's log-sum-exp that float32 holds in one number; a term dP - delta is known
    to `dtype` and to a float32's last places of what it is summed from.
    """
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    weights = masked_softmax(scale * q @ k.mT, mask)
    score = eps32 * (abs(scale) * (q @ k.mT).abs()).masked_fill(~mask, 0).amax(-1, True) if rounded else 0
    if not exact:
        score = score + 4 * eps32 * abs(scale) * (q.abs() @ k.mT.abs()).masked_fill(~mask, 0).amax(-1, True)
    weight = weights * (2 * score + eps + 16 * eps32)
    terms = d_out.abs() @ v.mT.abs()
    ds = weights * (2 * score + eps + 16 * eps32) * (terms + (weights * terms).sum(-1, keepdim=True))
    return {
        "out": 2 * weight @ v.abs() + eps * out.abs(),
        "dq": 2 * abs(scale) * ds @ k.abs(),
        "dk": 2 * abs(scale) * ds.mT @ q.abs(),
        "dv": 2 * weight.mT @ d_out.abs(),
    }


@everywhere
@pytest.mark.parametrize("op, impl", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "scale, tied", [(256.0, True), (-256.0, True), (1e4, False), (-1e4, False), (-1.0, False), (0.0, False)]
)
def test_scores_of_ten_thousand_tied_or_nearly(device, op, impl, dtype, scale, tied):
    """Every number of the output and of each gradient lies within the bound of its own roundings.

    Tied: small integers give scores up to 16,384 without rounding, many equal; weights are 1 / the number of the tied,
    and a key that is not among them has none.
    """
    n, m, options = 29, 41, {"causal": True}
    inputs = made(n, m, 16, dtype=dtype, device=device)
    if tied:
        draw = torch.Generator().manual_seed(7)
        whole = [torch.randint(-2, 3, x.shape, generator=draw).to(x) for x in inputs[:2]]
        whole[1][:, :, 1::2] = whole[1][:, :, 0:-1:2]  # every key but the last stands twice
        inputs = [*(x.requires_grad_() for x in whole), inputs[2]]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask = allowed(n, m, device, **options)
    truth = textbook(*exact, mask, scale=scale)
    run = {"attention": attention, "flash": flash_attention}[op]
    out = run(*inputs, **options, scale=scale, impl=impl)
    d_out = incoming(out)
    grads = zip(torch.autograd.grad(out, inputs, d_out), torch.autograd.grad(truth, exact, d_out.double()))
    plain = [x.detach() for x in exact]
    limits = bounds(
        *plain,
        truth.detach(),
        d_out.double(),
        mask,
        scale,
        dtype,
        exact=tied,
        rounded=(op, impl) == ("attention", "sdpa"),
    )
    if tied:
        assert (masked_softmax(scale * plain[0] @ plain[1].mT, mask).amax(-1) <= 0.5).float().mean() > 0.8
    for name, (a, t) in {"out": (out, truth), **dict(zip(("dq", "dk", "dv"), grads))}.items():
        fits = t.abs() < torch.finfo(dtype).max
        off = ((a.double() - t).abs() - limits[name] - torch.finfo(dtype).eps * t.abs() - torch.finfo(dtype).tiny)[fits]
        assert off.max() <= 0, f"{name}: {off.max():.1e} beyond its bound"


# --- engines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("n, m", [(37, 53), (53, 37), (1, 37), (37, 1), (0, 5), (5, 0)])
@pytest.mark.parametrize("impl", ["reference", "sdpa", "auto"])
def test_engines_are_exact_in_float64(impl, n, m, mask):
    q, k, v = inputs = made(n, m, 12, 20, b=2, h=6, g=3, dtype=torch.float64)
    ours = flash_attention(q, k, v, **MASKS[mask], impl=impl)
    truth = textbook(q, k, v, allowed(n, m, "cpu", **MASKS[mask]))
    torch.testing.assert_close(ours, truth)
    grads = (torch.autograd.grad(out, inputs, incoming(out)) for out in (ours, truth))
    for name, a, b in zip("qkv", *grads):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_two_halves_of_the_keys_join_by_their_lse():
    q, k, v = (x.detach() for x in made(7, 20, 8, dtype=torch.float64))
    (a, la), (b, lb) = (
        flash_attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 13), slice(13, 20))
    )
    lse = torch.logaddexp(la, lb)
    joined = a * (la - lse).exp()[..., None] + b * (lb - lse).exp()[..., None]
    torch.testing.assert_close(joined, attention(q, k, v))


def test_auto_on_a_cpu_is_sdpa_and_with_lse_the_reference():
    q, k, v = (x.detach() for x in made(7, 7, 16))
    assert torch.equal(flash_attention(q, k, v), flash_attention(q, k, v, impl="sdpa"))
    auto, named = (flash_attention(q, k, v, return_lse=True, impl=impl) for impl in ("auto", "reference"))
    assert torch.equal(auto[0], named[0]) and torch.equal(auto[1], named[1])


@pytest.mark.gpu
def test_auto_on_a_gpu_is_triton_where_it_can():
    q, k, v = (x.detach() for x in made(7, 7, 16, device="cuda"))
    assert torch.equal(flash_attention(q, k, v), flash_attention(q, k, v, impl="triton"))
    wide = flash_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(wide, attention(q.double(), k.double(), v.double()))


# --- refused -------------------------------------------------------------------------------------------------------


def zeros(q=(2, 6, 5, 16), k=(2, 3, 7, 16), v=(2, 3, 7, 16), dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in (q, k, v)]


@pytest.mark.parametrize("inputs, options, says", [
    (zeros(q=(6, 5, 16)), {}, r"q must be 4-dimensional .* got \(6, 5, 16\)"),
    (zeros(k=(2, 3, 7, 8)), {}, "k must have q's width D=16, got 8"),
    (zeros(v=(2, 3, 8, 16)), {}, r"v must have k's batch, heads and length \(2, 3, 7\), got \(2, 3, 8\)"),
    (zeros(v=(2, 3, 7, 0)), {}, "v must have a width of 1 or more, got 0"),
    (zeros(q=(2, 4, 5, 16)), {}, "multiple of k's, got 4 and 3"),
    (zeros(dtype=torch.int64), {}, "q must be floating point"),
    ([zeros()[0], zeros()[1].half(), zeros()[2]], {}, "k must have q's dtype"),
    (zeros(), {"window": 0}, "window must be an integer of 1 or more .* got 0"),
    (zeros(), {"window": 2.5}, "window must be an integer"),
    (zeros(), {"window": True}, "window must be an integer"),
    (zeros(), {"impl": "cuda"}, "impl must be one of .*'triton'.* got 'cuda'"),
    (zeros(), {"impl": "sdpa", "return_lse": True}, "keeps its log-sum-exp"),
    (zeros(dtype=torch.float64), {"impl": "triton"}, "q must be float16, bfloat16 or float32 for impl='triton'"),
    (zeros((1, 1, 2, 257), (1, 1, 2, 257), (1, 1, 2, 8)), {"impl": "triton"}, "q must be at most 256 wide"),
    (zeros((1, 1, 2, 8), (1, 1, 2, 8), (1, 1, 2, 300)), {"impl": "triton"}, "v must be at most 256 wide"),
])  # fmt: skip
def test_bad_input_is_named(inputs, options, says):
    with pytest.raises(ValueError, match=says):
        flash_attention(*inputs, **options)


@pytest.mark.parametrize("name, given, says", [
    ("q", [[1.0]], "got list; use torch.tensor"), ("k", None, "got NoneType"),
    ("v", "array", "got ndarray; use torch.from_numpy"),
])  # fmt: skip
def test_what_is_no_tensor_is_named(name, given, says):
    inputs = dict(zip("qkv", zeros()))
    inputs[name] = inputs[name].numpy() if given == "array" else given
    with pytest.raises(TypeError, match=f"{name} must be a Tensor, {says}"):
        flash_attention(**inputs)


def test_bfloat16_is_refused_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    with pytest.raises(ValueError, match="float16 or float32 in Triton's interpreter"):
        flash_attention(*zeros(dtype=torch.bfloat16), impl="triton")


def test_without_the_interpreter_a_cpu_is_refused_and_auto_works():
    code = """
import torch
from nondual.ops.flash_attention import flash_attention
q = torch.randn(1, 1, 3, 16)
assert torch.equal(flash_attention(q, q, q), flash_attention(q, q, q, impl="sdpa"))
try:
    flash_attention(q, q, q, impl="triton")
except ValueError as error:
    print(error)
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(SRC)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=100)
    said = ran.stdout
    assert "q must be on a CUDA device for impl='triton', got cpu" in said and "TRITON_INTERPRET=1" in said


def test_without_triton_its_engine_is_refused(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("nondual.ops.flash_attention.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(door, "triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="needs triton"):
        flash_attention(*zeros(), impl="triton")
    assert flash_attention(*zeros()).shape == (2, 6, 5, 16)
