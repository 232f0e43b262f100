"""The kernels of flash attention: layouts, tiles, memory and decoding, in Triton's interpreter or on a GPU.

On a GPU the same tests run compiled, with bfloat16, and large ones besides.
"""

import math

import pytest
import torch
from flash_cases import MASKS, allowed, check, made, textbook
from harness import DTYPES, everywhere, incoming, laid, needs_the_interpreter

from nondual.ops.flash_attention import flash_attention
from nondual.ops.flash_attention import triton as kernels
from nondual.ops.flash_attention.triton import launch
from nondual.ops.kernels import chip_of, strides

pytestmark = pytest.mark.usefixtures("poisoned")


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
    sum_of_300 = 300 * torch.finfo(torch.float32).eps / 2  # on a GPU the tied weights are near 1: each sum rounds
    assert (out[:, :, 0].double() - expected).abs().max() <= (torch.finfo(dtype).eps + sum_of_300) * 3e4
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
