"""Flash attention against float64, at its edges, in every layout; the kernels in Triton's interpreter or on a GPU.

Where there is no GPU the kernels run in the interpreter, in float32 and float16 and with small tiles: see conftest.py.
On a GPU the same tests run compiled, with bfloat16, and larger ones besides.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import DTYPES, Error, errors, everywhere, incoming, laid, needs_the_interpreter
from harness import check as check_errors

from nondual.ops import flash_attention as door
from nondual.ops import masks
from nondual.ops.attention import attention, masked_softmax
from nondual.ops.flash_attention import flash_attention, reference
from nondual.ops.flash_attention import tiles as by_tiles
from nondual.ops.flash_attention import triton as kernels
from nondual.ops.flash_attention.triton import launch
from nondual.ops.kernels import chip_of, strides

SRC = Path(__file__).parents[2] / "src"
MASKS = {"full": {}, "causal": {"causal": True}, "window 1": {"window": 1}, "window 23": {"window": 23}}


def test_the_kernels_can_run_here():
    assert kernels.INTERPRETED or torch.cuda.is_available(), "unset TRITON_INTERPRET=0: there is no GPU to compile for"


pytestmark = pytest.mark.usefixtures("poisoned")


def test_what_is_not_written_would_be_seen():
    assert torch.empty(3).isnan().all()


def made(n, m, d, dv=None, *, b=1, h=2, g=2, dtype=torch.float32, device="cpu", seed=0):
    """q, k and v, drawn once for all devices and dtypes."""
    draw = torch.Generator().manual_seed(seed)
    shapes = (b, h, n, d), (b, g, m, d), (b, g, m, dv or d)
    return [torch.randn(s, generator=draw).to(dtype).to(device).requires_grad_() for s in shapes]


def allowed(n, m, device, causal=False, window=None, **_):
    if window:
        return masks.sliding_window(n, m, window=window, device=device)
    return masks.causal(n, m, device=device) if causal else torch.ones(n, m, dtype=torch.bool, device=device)


def textbook(q, k, v, mask, scale=None):
    """Plain PyTorch in whatever dtype it is given."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return masked_softmax(scores, mask) @ v


def compared(inputs, options, impl="triton", d_out=None, **more) -> dict[str, Error]:
    """The errors of the output and of each gradient, by name. (Plain PyTorch has none where a row has one key.)"""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask = allowed(inputs[0].shape[2], inputs[1].shape[2], inputs[0].device, **options)
    ours = flash_attention(*inputs, **options, **more, impl=impl)
    assert ours.dtype == inputs[0].dtype
    d_out = incoming(ours) if d_out is None else d_out

    def results(out, of):
        grads = torch.autograd.grad(out, of, d_out.to(out.dtype))
        return {"out": out, **dict(zip(("dq", "dk", "dv"), grads))}

    return errors(
        results(ours, inputs),
        results(textbook(*inputs, mask, **more), inputs),
        results(textbook(*exact, mask, **more), exact),
    )


def check(inputs, options, **more):
    check_errors(compared(inputs, options, **more), outputs={"out"})


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


# --- any layout ----------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("layout", ["transposed", "heads inside", "sliced", "strided", "one number", "one head"])
def test_any_layout_of_inputs_and_of_the_incoming_gradient(device, layout):
    inputs = [laid(x.detach(), layout).requires_grad_() for x in made(17, 37, 24, b=2, device=device)]
    out = torch.randn(2, 2, 17, 24, device=device)
    check(inputs, {"causal": True}, d_out=laid(out, layout))


@everywhere
@pytest.mark.parametrize("impl", ["reference", "sdpa", "triton"])
@pytest.mark.parametrize("which", ["q", "k", "v", "dy"])
def test_each_tensor_in_layouts_of_its_own(device, impl, which):
    """One tensor at a time, forward, backward and in decoding; what is read with another's strides would show."""
    options = {"window": 9}
    given = dict(zip("qkv", (x.detach() for x in made(17, 37, 24, 20, b=2, h=4, g=2, device=device))))
    given["dy"] = torch.randn(2, 4, 17, 20, generator=torch.Generator().manual_seed(2)).to(device)
    expected = None
    for layout in ("plain", "transposed", "heads inside", "sliced", "strided"):
        case = given | {which: laid(given[which], layout)}
        inputs = [case[name].detach().requires_grad_() for name in "qkv"]
        out = flash_attention(*inputs, **options, impl=impl)
        got = [out, *torch.autograd.grad(out, inputs, case["dy"])]
        if impl == "triton" and which != "dy":
            few = case["q"][:, :, -3:]
            got += kernels.launch_decode(few, case["k"], case["v"], True, 9, 0.25, 2)
        expected = got if layout == "plain" else expected
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@everywhere
def test_the_gradient_of_a_sum_and_the_layout_of_a_module(device):
    q, k, v = made(17, 37, 24, device=device)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    out = flash_attention(q, k, v, impl="triton")
    assert out.transpose(1, 2).is_contiguous()  # so that (B, N, H D) needs no copy
    out.sum().backward()  # a gradient of one number, expanded
    textbook(*exact, allowed(17, 37, device)).sum().backward()
    for x, e in zip((q, k, v), exact):
        torch.testing.assert_close(x.grad, e.grad.float(), atol=1e-5, rtol=1e-5)


@everywhere
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_two_to_the_31(device, axis, monkeypatch):
    """Rows, heads or batches so far apart that the last offset passes 2^31; the memory between is never touched."""
    sizes = [(3, 1, 5, 16), (1, 3, 5, 16), (1, 1, 17, 16)][axis]
    strides = [80, 80, 16, 1]
    strides[axis] = -(-(2**31 + 5) // (sizes[axis] - 1))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    room = torch.empty(2**31 + 4096, dtype=torch.float16, device=device)

    def far(seed):
        x = torch.as_strided(room, sizes, strides, seed * 512)
        return x.copy_(torch.randn(sizes, generator=torch.Generator().manual_seed(seed)))

    q, k, v, d_out = (far(seed) for seed in range(4))
    assert sum((size - 1) * stride for size, stride in zip(sizes, strides)) > 2**31
    near = [x.clone(memory_format=torch.contiguous_format).requires_grad_() for x in (q, k, v)]
    spread = [x.requires_grad_() for x in (q, k, v)]
    expected = flash_attention(*near, causal=True, impl="triton")
    got = flash_attention(*spread, causal=True, impl="triton")
    assert torch.equal(got, expected)
    for a, b in zip(torch.autograd.grad(got, spread, d_out), torch.autograd.grad(expected, near, d_out.contiguous())):
        assert torch.equal(a, b)


# --- tiles ---------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("n, m", [(97, 97), (31, 257)])
def test_tiles_out_of_sight_are_never_visited(device, n, m):
    """NaN in every key, value and query that no visited tile may hold changes nothing: out, lse, dq, dk, dv."""
    chip = chip_of(torch.device(device))
    names = ("BLOCK_Q", "BLOCK_KV")
    far = max(
        kernels.configuration(x, chip, 16, 16, torch.float32)[n] for x in ("forward", "dkdv", "dq") for n in names
    )
    window = 5
    if m < n + window + 2 * far and not kernels.INTERPRETED:
        n, m = 8 * n, 8 * n + 4 * far
    q, k, v = made(n, m, 16, h=1, g=1, device=device)
    unseen = m - n - window - far  # no tile of keys that starts so early reaches the first query's window
    if unseen > 0:
        poisoned = [torch.cat([torch.full_like(x[:, :, :unseen], torch.nan), x[:, :, unseen:]], 2) for x in (k, v)]
        ours = flash_attention(q, *poisoned, window=window, impl="triton")
        assert torch.equal(ours, flash_attention(q, k, v, window=window, impl="triton"))
        dq, dk, dv = torch.autograd.grad(ours.sum(), (q, *poisoned), retain_graph=True)
        assert all(x.isfinite().all() for x in (dq, dk, dv))
    late = max(n // 2, n - far)  # under causality, queries before this see no key after their tile
    after = [
        torch.cat([x[:, :, : m - n + late], torch.full_like(x[:, :, m - n + late :], torch.nan)], 2) for x in (k, v)
    ]
    ours = flash_attention(q, *after, causal=True, impl="triton")
    first = (late // far - 1) * far
    assert ours[:, :, : max(0, first)].isfinite().all()


@everywhere
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_nan_stays_in_its_row_and_masked_nan_does_not_stay_away(device, impl):
    q, k, v = (x.detach() for x in made(17, 17, 16, device=device))
    bad = q.clone()
    bad[:, :, 3] = torch.inf
    rows = flash_attention(bad, k, v, causal=True, impl=impl).isnan().any(-1)
    assert rows[:, :, 3].all() and rows.sum() == 2
    v[:, :, -1] = torch.nan  # only the last query sees it, yet it lies in the tile of all: 0 · NaN
    assert flash_attention(q, k, v, causal=True, impl=impl).isnan().all()


@everywhere
@pytest.mark.parametrize("tiles", [(16, 16), (16, 64), (64, 16), (128, 32)])
def test_any_tiles_give_the_same(device, tiles, monkeypatch):
    def other(kernel, *_):
        return {
            "BLOCK_Q": tiles[0],
            **({} if kernel == "delta" else {"BLOCK_KV": tiles[1]}),
            "num_warps": 4,
            "num_stages": 1,
        }

    monkeypatch.setattr(launch, "configuration", other)
    for options in ({"causal": True}, {"window": 19}):
        check(made(67, 83, 16, h=1, g=1, device=device), options)


@everywhere
def test_runs_are_equal_to_the_bit(device):
    times = 3 if device == "cpu" else 100
    inputs = made(61, 67, 32, h=4, g=2, device=device)

    def run():
        out, lse = flash_attention(*inputs, causal=True, return_lse=True, impl="triton")
        return out, lse, *torch.autograd.grad(out, inputs, incoming(out))

    first = run()
    for _ in range(times - 1):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


# --- memory --------------------------------------------------------------------------------------------------------


@needs_the_interpreter
@pytest.mark.parametrize("mask", ["full", "causal", "window 23"])
@pytest.mark.parametrize("n, m, d, dv", [(37, 61, 24, 19), (61, 37, 16, 16)])
def test_no_kernel_leaves_its_tensors_or_writes_twice(mask, n, m, d, dv, monkeypatch, watch):
    """The tensors lie inside larger ones, whose other elements count as outside."""
    watched = {}
    for name in ("forward", "decode", "combine", "delta", "dq", "dkdv"):
        watched[name] = watch(getattr(launch, f"{name}_kernel"))
        monkeypatch.setattr(launch, f"{name}_kernel", watched[name])
    q, k, v = (laid(x.detach(), "sliced").requires_grad_() for x in made(n, m, d, dv, h=2, g=1))
    out = flash_attention(q, k, v, **MASKS[mask], impl="triton")
    torch.autograd.grad(out, (q, k, v), laid(incoming(out), "sliced"))
    options = MASKS[mask]
    few = q[:, :, :3].detach()
    kernels.launch_decode(few, k.detach(), v.detach(), bool(options), options.get("window", 0), 0.25, 3)
    assert all(kernel.launches == 1 for kernel in watched.values())


@needs_the_interpreter
def test_a_fault_in_memory_would_be_seen(watch):
    x = torch.zeros(1, 1, 5, 16)
    delta = torch.zeros(1, 1, 5)
    watched = watch(kernels.delta_kernel)
    sizes = {"DV": 16, "BLOCK_DV": 16, "BLOCK_Q": 16}
    given = {"p_out": x, "p_do": x, "p_dtotal": delta, "p_delta": delta, **strides("bhn", o=x, g=x), "heads": 1}
    watched[(1,)](**given, n=5, **sizes)
    with pytest.raises(Exception, match="read outside"):
        watched[(1,)](**given, n=6, **sizes)
    watched = watch(kernels.forward_kernel)
    one_row = torch.zeros(1, 1, 1, 16).expand(x.shape)
    given = {"p_q": x, "p_k": x, "p_v": x, "p_out": one_row, "p_top": delta, "p_total": delta.clone()}
    given |= strides("bhn", q=x, k=x, v=x, o=one_row)
    sizes |= {"D": 16, "BLOCK_D": 16, "BLOCK_KV": 16, "SHARE": 1, "CAUSAL": False, "WINDOWED": False}
    with pytest.raises(AssertionError, match="a race"):
        watched[(1,)](**given, n=5, m=5, heads=1, window=0, scale=0.25, **sizes)


# --- decoding ------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, h, g, options", [
    (1, 2, 2, {}), (1, 6, 2, {}), (3, 4, 2, {"causal": True}), (5, 3, 1, {"window": 150}), (2, 2, 2, {"window": 3}),
])  # fmt: skip
def test_decoding_is_the_plain_kernel_to_rounding(device, dtype, n, h, g, options):
    q, k, v = (x.detach() for x in made(n, 203, 24, 40, h=h, g=g, dtype=dtype, device=device))
    causal, window = bool(options), options.get("window", 0)
    exact = textbook(q.double(), k.double(), v.double(), allowed(n, 203, device, **options))
    out, top, total = kernels.launch_forward(q, k, v, causal, window, 24**-0.5)
    for splits in (1, 5):
        split_out, split_top, split_total = kernels.launch_decode(q, k, v, causal, window, 24**-0.5, splits)
        torch.testing.assert_close(split_top + split_total, top + total)
        assert (split_out - exact).abs().max() <= 2 * (out - exact).abs().max() + torch.finfo(dtype).eps / 2


@everywhere
def test_decoding_takes_over_by_its_rule_and_has_gradients(device):
    def shapes(n, m, h=8, g=2):
        return torch.empty(1, h, n, 16, device=device), torch.empty(1, g, m, 16, device=device)

    assert kernels.splits_of(*shapes(1, 4096), 0) > 1
    assert kernels.splits_of(*shapes(16, 4096), 0) > 1
    assert kernels.splits_of(*shapes(17, 4096), 0) == 0  # 17 · 4 > 64
    assert kernels.splits_of(*shapes(1, 511), 0) == 0
    assert kernels.splits_of(*shapes(1, 4096), 256) == 0  # a window of 256 is all that is read
    check(made(3, 521, 16, h=2, g=1, device=device), {"causal": True})


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_partial_sums_of_decoding_are_kept_in_float32(device, dtype, tied):
    """A part's sum of 300 values of 3e4 is beyond float16; and of parts a thousand apart in score only one counts."""
    n, m, splits = 1, 600, 2
    q, k, v = (torch.ones(1, 2, x, 16, dtype=dtype, device=device) for x in (n, m, m))
    v = (v * 3e4).to(dtype)
    v[:, :, m // 2 :] = 2e4
    k = k * 0 if tied else k * 40  # scores of 0, or of 640 and, in the second half, 0
    k[:, :, m // 2 :] *= 0
    out, top, total = kernels.launch_decode(q, k, v, False, 0, 1.0, splits)
    halves = v[:, :, :: m // 2].double()
    expected = halves.mean(2) if tied else halves[:, :, 0]
    assert (out[:, :, 0].double() - expected).abs().max() <= torch.finfo(dtype).eps * 3e4
    scores = (q.double() @ k.double().mT).logsumexp(-1)
    torch.testing.assert_close((top + total).double() * math.log(2), scores, atol=1e-3, rtol=1e-6)


@everywhere
@pytest.mark.parametrize("scale", [256.0, 1e4])
def test_decoding_of_scores_of_ten_thousand(device, scale):
    """Small integers: scores are exact and many are tied, within a part and across parts."""
    draw = torch.Generator().manual_seed(3)
    q, k = (torch.randint(-2, 3, (1, 2, x, 16), generator=draw).float().to(device) for x in (2, 700))
    k[:, :, 350:] = k[:, :, :350]
    v = torch.randn(1, 2, 700, 16, generator=draw).to(device)
    out = kernels.launch_decode(q, k, v, False, 0, scale, 4)[0]
    truth = textbook(q.double(), k.double(), v.double(), allowed(2, 700, device), scale=scale)
    assert (out - truth).abs().max() <= 64 * torch.finfo(torch.float32).eps * v.abs().max()


@everywhere
def test_decoding_with_more_queries_than_the_cache_is_long_is_empty_above(device):
    q, k, v = (x.detach() for x in made(9, 4, 16, device=device))
    for split, plain in zip(
        kernels.launch_decode(q, k, v, True, 0, 0.25, 2), kernels.launch_forward(q, k, v, True, 0, 0.25)
    ):
        torch.testing.assert_close(split, plain)


# --- as an operator of torch ---------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("layout", ["plain", "heads inside", "transposed", "strided", "one head"])
def test_opcheck(device, layout):
    """What the operators say of their results while compiling is true: shapes, strides, dtypes, in every layout."""
    q, k, v = (laid(x.detach(), layout).requires_grad_() for x in made(9, 13, 16, h=2, g=1, device=device))
    torch.library.opcheck(torch.ops.nondual.flash_attention.default, (q, k, v, True, 0, 0.25))
    out, top, total = kernels.launch_forward(*(x.detach() for x in (q, k, v)), True, 0, 0.25)
    d_out = laid(torch.randn(out.shape, device=device), layout)
    given = [x.detach() for x in (d_out, total, q, k, v, out, top, total)]
    torch.library.opcheck(torch.ops.nondual.flash_attention_backward.default, (*given, True, 0, 0.25))
    torch.library.opcheck(torch.ops.nondual.attention_by_tiles.default, (q, k, v, 5, 0.25))
    given = [x.detach() for x in (d_out, q, k, v)]
    torch.library.opcheck(torch.ops.nondual.attention_by_tiles_backward.default, (*given, 5, 0.25))
    torch.library.opcheck(torch.ops.nondual.flash_attention_reference.default, (q, k, v, True, 0, 0.25, 8, 8))
    visible = reference.Visible(9, 13, True, None, q.device)
    given = [x.detach() for x in (d_out, total, q, k, v, *reference.forward(q, k, v, visible, 0.25, (8, 8)))]
    torch.library.opcheck(torch.ops.nondual.flash_attention_reference_backward.default, (*given, True, 0, 0.25, 8, 8))


@everywhere
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_forward_and_backward(device, dynamic):
    backend = "aot_eager" if device == "cpu" else "inductor"

    def run(q, k, v):
        return flash_attention(q * 1.5, k, v, causal=True, impl="triton") * 2

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=backend)
    for n in (9, 14):
        inputs = made(n, 21, 16, device=device)
        ours, plain = compiled(*inputs), run(*inputs)
        torch.testing.assert_close(ours, plain)
        grads = (torch.autograd.grad(out, inputs, incoming(out)) for out in (ours, plain))
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 3}, {"causal": True, "return_lse": True}])
def test_auto_on_a_cpu_compiles_whole(options):
    torch._dynamo.reset()
    q, k, v = made(9, 14, 16)
    compiled = torch.compile(lambda *a: flash_attention(*a, **options), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), flash_attention(q, k, v, **options))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("options", [{"causal": True}, {"window": 4}, {"window": 4, "return_lse": True}])
@pytest.mark.parametrize("lengths", [
    [(5, 5), (9, 9), (130, 130), (33, 33), (200, 200)], [(5, 9), (9, 17), (130, 150), (17, 9), (1, 33)],
])  # fmt: skip
def test_one_program_serves_many_lengths(dynamic, options, lengths):
    """One for the first length, one for any, and more for a single query and for more queries than keys."""
    torch._dynamo.reset()
    programs = []

    def backend(graph, inputs):
        programs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def run(q, k, v):
        return flash_attention(q, k, v, **options)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=backend)
    for n, m in lengths:
        inputs = made(n, m, 8, h=4, g=2)
        ours, plain = compiled(*inputs), run(*inputs)
        torch.testing.assert_close(ours, plain)
        ours, plain = (x[0] if "return_lse" in options else x for x in (ours, plain))
        grads = (torch.autograd.grad(out, inputs, incoming(out)) for out in (ours, plain))
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b)
    assert len(programs) <= (3 if lengths[0] == (5, 5) else 4)


@pytest.mark.timeout(400)  # inductor calls a C++ compiler
def test_a_window_compiles_by_inductor_for_two_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: flash_attention(*a, window=5) * 2, fullgraph=True, dynamic=True)
    for n in (9, 150):
        inputs = made(n, n, 8)
        ours, plain = compiled(*inputs), flash_attention(*inputs, window=5) * 2
        torch.testing.assert_close(ours, plain)
        grads = (torch.autograd.grad(out, inputs, incoming(out)) for out in (ours, plain))
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["reference", "sdpa", "triton"])
def test_meta_tensors(impl):
    q, k, v = (torch.zeros(2, 4, 7, 16, device="meta") for _ in range(3))
    assert flash_attention(q, k, v, causal=True, impl=impl).shape == (2, 4, 7, 16)


@everywhere
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 5}])
@pytest.mark.parametrize("impl", ["reference", "sdpa", "triton", "auto"])
def test_dtypes_meet_under_autocast(device, impl, options):
    q, k, v = (x.detach() for x in made(17, 23, 16, device=device))
    expected = flash_attention(q.half(), k.half(), v.half(), **options, impl=impl)
    with torch.autocast(device, torch.float16):
        for dtypes in ((torch.float32, torch.float16, torch.float32), (torch.float16, torch.float32, torch.float32)):
            out = flash_attention(*(x.half().to(t) for x, t in zip((q, k, v), dtypes)), **options, impl=impl)
            assert torch.equal(out, expected)


@everywhere
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_autocast(device, impl):
    q, k, v = inputs = made(17, 23, 16, device=device)
    with torch.autocast(device, torch.float16):
        out = flash_attention(q, k.half(), v, impl=impl)  # the dtypes meet, as in torch's own attention
        out.sum().backward()
    assert out.dtype == torch.float16 and all(x.grad.dtype == torch.float32 for x in inputs)
    half = [x.detach().half() for x in inputs]
    torch.testing.assert_close(out, flash_attention(*half, impl=impl))
    with torch.autocast(device, torch.float16):
        wide = flash_attention(*(x.double() for x in inputs), impl="reference")
    assert wide.dtype == torch.float64


@everywhere
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_second_derivative_is_refused(device, impl):
    q, k, v = made(5, 7, 16, device=device)
    out = flash_attention(q, k, v, impl=impl)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize("options", [{"window": 3}, {"causal": True}])
def test_a_second_derivative_through_torchs_own_attention_by_tiles_is_refused(options):
    q, k, v = made(5, 7, 16)
    (grad,) = torch.autograd.grad(flash_attention(q, k, v, **options, impl="sdpa").sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"impl='sdpa'\) has no second derivative; .*impl='reference'\) has one"):
        grad.sum().backward()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 3}, {"window": 3, "return_lse": True}])
@pytest.mark.parametrize("n, m", [(5, 7), (7, 5), (6, 6)])
def test_every_transform_works_through_auto(options, n, m):
    """Forward mode, gradients for each sample, Hessians: as through the written formula. Rows that see nothing too."""
    q, k, v = (x.detach() for x in made(n, m, 4, b=3, h=2, g=1, dtype=torch.float64))
    mask = allowed(n, m, "cpu", **options)

    def ours(q, k, v):
        found = flash_attention(q, k, v, **options)
        out, lse = found if "return_lse" in options else (found, torch.zeros(()))
        return out.square().sum() + torch.where(lse.isfinite(), lse, 0).square().sum()

    def written(q, k, v):
        scores = (q @ k.repeat_interleave(2, -3).mT / q.shape[-1] ** 0.5).masked_fill(~mask, -1e9)
        lse = torch.where(mask.any(-1), scores.logsumexp(-1), 0) if "return_lse" in options else torch.zeros(())
        return textbook(q, k, v, mask).square().sum() + lse.square().sum()

    by = (0, 1, 2)
    expected = torch.func.grad(written, by)(q, k, v)
    for got in (
        torch.func.grad(ours, by)(q, k, v),
        torch.func.jacrev(ours, by)(q, k, v),
        torch.func.jacfwd(ours, by)(q, k, v),
    ):
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b)
    tangents = tuple(torch.randn_like(x) for x in (q, k, v))
    _, along = torch.func.jvp(ours, (q, k, v), tangents)
    torch.testing.assert_close(along, sum((g * t).sum() for g, t in zip(expected, tangents)))
    one = lambda f: lambda q, k, v: f(q[None], k[None], v[None])  # noqa: E731
    for a, b in zip(torch.func.vmap(torch.func.grad(one(ours), by))(q, k, v), expected):
        torch.testing.assert_close(a, b)
    small = [x[:1, :, :, :2] for x in (q, k, v)]
    second = torch.func.hessian(ours)(*small)
    torch.testing.assert_close(second, torch.func.hessian(written)(*small))
    torch.testing.assert_close(second, torch.func.jacrev(torch.func.jacrev(ours))(*small))


@pytest.mark.parametrize("options", [{"causal": True}, {"window": 2}])
def test_a_row_that_sees_nothing_has_no_forward_mode_derivative_either(options):
    """lse is the constant -inf there: its tangent is 0, not NaN, and so is that of the row's output."""
    q, k, v = (x.detach() for x in made(5, 3, 4, dtype=torch.float64))
    tangents = tuple(torch.randn_like(x) for x in (q, k, v))
    (out, lse), (d_out, d_lse) = torch.func.jvp(
        lambda q, k, v: flash_attention(q, k, v, return_lse=True, **options), (q, k, v), tangents
    )
    assert (lse[:, :, :2] == -torch.inf).all() and (out[:, :, :2] == 0).all()
    assert (d_lse[:, :, :2] == 0).all() and (d_out[:, :, :2] == 0).all()
    assert d_lse.isfinite().all() and (d_lse[:, :, 2:] != 0).all()


@everywhere
@pytest.mark.parametrize("impl", ["reference", "sdpa", "triton"])
@pytest.mark.parametrize("asked, says", [
    ("jvp", "no forward-mode derivative"), ("dual", "no forward-mode derivative"),
    ("vmap", "cannot be transformed by torch.func"), ("grad", "cannot be transformed by torch.func"),
])  # fmt: skip
def test_an_engine_by_name_says_which_transform_it_lacks(device, impl, asked, says):
    """Never zeros without a word, as torch would give through an operator that has a backward pass alone."""
    q, k, v = (x.detach() for x in made(5, 7, 16, device=device))
    f = lambda q: flash_attention(q, k, v, window=3, impl=impl).sum()  # noqa: E731
    with pytest.raises(RuntimeError, match=f"impl='{impl}' of flash_attention .*{says}.*; use impl='auto'"):
        if asked == "jvp":
            torch.func.jvp(f, (q,), (q,))
        elif asked == "vmap":
            torch.func.vmap(lambda q: flash_attention(q[None], k, v, impl=impl, window=3))(q)
        elif asked == "grad":
            torch.func.grad(f)(q)
        else:
            with torch.autograd.forward_ad.dual_level():
                f(torch.autograd.forward_ad.make_dual(q, q))


def test_the_algorithm_itself_refuses_a_transform():
    q, k, v = (x.detach() for x in made(5, 7, 16))
    with pytest.raises(RuntimeError, match=r"reference.flash_attention has no forward-mode derivative .*attention"):
        torch.func.jvp(lambda q: reference.flash_attention(q, k, v)[0], (q,), (q,))


# --- torch's own attention, by tiles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 2, 3, 5, 8])
def test_tiles_cover_exactly_what_a_mask_shows(tile):
    """Every length up to 7, every window: the keys and masks of all tiles, put together, are the mask."""
    for n in range(8):
        for m in range(8):
            for window in range(m + 2):
                seen = torch.zeros(n, m, dtype=torch.bool)
                mask = by_tiles.tile_mask(m, window, min(n, tile), torch.zeros(()))
                scores = 0
                for rows, keys, columns in by_tiles.tiles(n, m, window, tile):
                    part = mask[: rows.stop - rows.start, columns]
                    assert part.shape == seen[rows, keys].shape
                    assert (part == 0).any(-1).all(), "a row without a key"
                    seen[rows, keys] |= part == 0
                    scores += part.numel()
                assert torch.equal(seen, allowed(n, m, "cpu", causal=True, window=window))
                assert not window or scores <= n * (window + tile - 1)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 77}, {"window": 300}, {"window": 511}, {"causal": True}])
@pytest.mark.parametrize("n, m", [(300, 512), (512, 300), (129, 128), (127, 128), (2, 500)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_torchs_attention_by_tiles_is_as_exact_as_plain_pytorch(options, n, m, dtype):
    check(made(n, m, 12, 20, b=2, h=4, g=2, dtype=dtype), options, impl="sdpa")


@pytest.mark.parametrize("options, n", [({"window": 64}, 2048), ({"window": 64}, 4096), ({"causal": True}, 512)])
def test_no_tensor_of_n_by_m_is_made_for_a_window_or_for_fewer_queries_than_keys(options, n, largest):
    """Looked at inside the operator, forward and backward: the largest tensor is q, or the scores of one tile."""
    m, d, window = 2048 if "causal" in options else n, 16, options.get("window", 0)
    q, k, v = (x.detach() for x in made(n, m, d, h=1, g=1))
    tile = by_tiles.TILE * ((window or m) + by_tiles.TILE)
    assert largest(lambda: by_tiles.forward(q, k, v, window, 0.25)) <= max(m * d, tile)
    assert largest(lambda: by_tiles.backward(q, q, k, v, window, 0.25)) <= max(m * d, tile)
    assert max(m * d, tile) < n * m / 3
    assert largest(lambda: flash_attention(q[:, :, -1:], k, v, window=64)) <= 64 * d, "one query needs no mask at all"


WINDOW = """
import resource, sys, time, torch
from nondual.ops.flash_attention import flash_attention

torch.set_num_threads(1)
def both_ways(n, m, impl="auto", **options):
    q, k, v = (torch.randn(1, 1, x, 64, requires_grad=True) for x in (n, m, m))
    start = time.process_time()
    flash_attention(q, k, v, **options, impl=impl).sum().backward()
    return time.process_time() - start

both_ways(500, 600, window=64), both_ways(500, 600, causal=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
times = [min(both_ways(n, n, window=128) for _ in range(3)) for n in (10_000, 20_000)]
both_ways(2_000, 20_000, causal=True)
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(memory, *times, both_ways(20_000, 20_000, "reference", window=128))
"""


@pytest.mark.timeout(400)  # on a busy machine
def test_a_window_over_20000_positions_takes_little_memory_and_time():
    """A whole mask took 1.9 GB. Memory beyond the start, in KiB; processor time linear and below the reference's."""
    env = os.environ | {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", WINDOW], env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    memory, half, whole, theirs = (float(x) for x in ran.stdout.split())
    assert memory < 200 * 1024
    assert whole < 4 * half and whole < 1.5 * theirs


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


# --- the reference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["full", "causal", "window 1"])
def test_gradcheck(mask):
    options = MASKS[mask]
    inputs = made(5, 4, 3, 2, h=2, g=1, dtype=torch.float64)

    def run(q, k, v):
        return reference.flash_attention(q, k, v, **options, scale=0.7, tile=(2, 3))

    mended = lambda *a: tuple(x.masked_fill(x == -torch.inf, 0) for x in run(*a))  # noqa: E731
    assert torch.autograd.gradcheck(mended, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
def test_reference_error_is_that_of_plain_pytorch(dtype, mask):
    check(made(131, 257, 32, h=4, g=2, dtype=dtype), MASKS[mask], impl="reference")


def test_scores_are_counted():
    n, d, t = 64, 8, 16
    q, k, v = made(n, n, d, h=3, g=3)
    count = {}
    for mask, options in {"full": {}, "causal": {"causal": True}, "window": {"window": 16}}.items():
        count[mask] = reference.Count()
        out, _ = reference.flash_attention(q, k, v, **options, tile=(t, t), count=count[mask])
    assert count["full"].scores == 3 * n * n  # no fewer than the standard computation
    assert count["full"].multiplications == 2 * d * 3 * n * n
    assert count["causal"].scores == 3 * t * t * (4 + 3 + 2 + 1)  # tiles on and under the diagonal
    assert count["window"].scores == 3 * t * t * (4 + 3)  # the diagonal's, and those before
    assert count["full"].tiles == 16
    forward = reference.Count()
    out, _ = reference.flash_attention(q, k, v, tile=(t, t), count=forward)
    once = forward.multiplications
    assert forward.loaded == q.numel() + (n // t) * 2 * k.numel()  # each tile of queries reads all keys and values
    assert forward.stored == out.numel() + 2 * (out.numel() // d)  # the log-sum-exp in two parts
    out.sum().backward()
    assert forward.multiplications - once == 3 * n * n * (3 * d + 2 * d)  # five products, one of them a second time


def test_a_page_can_follow_every_tile():
    q, k, v = (x.detach() for x in made(5, 7, 4))
    steps = []
    out, lse = reference.flash_attention(q, k, v, causal=True, tile=(2, 3), trace=steps.append)
    assert [(s.queries, s.keys) for s in steps[:2]] == [(range(0, 2), range(0, 3)), (range(0, 2), range(3, 4))]
    seen = {s.queries: s for s in steps}  # the last step of each tile of queries
    assert len(seen) == 3
    for queries, step in seen.items():
        torch.testing.assert_close(step.accumulator / step.total[..., None], out[:, :, queries.start : queries.stop])
        torch.testing.assert_close(step.highest + step.total.log(), lse[:, :, queries.start : queries.stop])


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 100}])
def test_the_reference_never_holds_n_by_m(options, largest):
    n, d, t = 1024, 8, 64
    inputs = made(n, n, d, h=1, g=1)

    def both_ways():
        out, _ = reference.flash_attention(*inputs, **options, tile=(t, t))
        out.sum().backward()

    assert largest(both_ways) == n * d  # the inputs themselves
    assert largest(lambda: textbook(*inputs, allowed(n, n, "cpu", **options))) == n * n


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


# --- large, on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mask", ["full", "causal", "window 257"])
@pytest.mark.parametrize("n, m", [(1025, 1025), (4096, 4096), (200, 2049), (2049, 257)])
@pytest.mark.parametrize("d, h, g", [(64, 4, 4), (128, 4, 1), (256, 2, 2), (80, 4, 2), (111, 2, 1)])
def test_large(dtype, mask, n, m, d, h, g):
    options = {"full": {}, "causal": {"causal": True}, "window 257": {"window": 257}}[mask]
    check(made(n, m, d, h=h, g=g, dtype=dtype, device="cuda"), options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_large_runs_are_equal_to_the_bit(dtype, d):
    inputs = made(2049, 2049, d, b=2, h=8, g=2, dtype=dtype, device="cuda")

    def run():
        out = flash_attention(*inputs, causal=True, impl="triton")
        return out, *torch.autograd.grad(out, inputs, incoming(out))

    first = run()
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, m, h, g", [(1, 8191, 32, 8), (1, 65537, 8, 1), (7, 4099, 16, 4), (64, 1031, 1, 1)])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_large_decoding(dtype, n, m, h, g, d):
    for options in ({}, {"causal": True}, {"window": 1000}):
        check(made(n, m, d, h=h, g=g, dtype=dtype, device="cuda"), options)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """One head at the far end of 2^31 numbers, with the rest and alone: the same bits, forward and backward."""
    h, n, d = 4100, 4096, 128
    assert h * n * d > 2**31
    q, k, v = (torch.randn(1, h, n, d, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3))
    out = flash_attention(q, k, v, causal=True)
    d_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), d_out)
    alone = [x[:, -1:].detach().clone().requires_grad_() for x in (q, k, v)]
    last = flash_attention(*alone, causal=True)
    assert torch.equal(out[:, -1:], last)
    for a, b in zip(grads, torch.autograd.grad(last, alone, d_out[:, -1:])):
        assert torch.equal(a[:, -1:], b)
