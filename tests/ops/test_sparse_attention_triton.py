"""The kernels of block-sparse attention: right, within their tiles and their memory, in the interpreter or on a GPU.

On a GPU the same tests run compiled, with bfloat16, and large ones besides.
"""

import math

import pytest
import torch
from flash_cases import made, textbook
from harness import DTYPES, check, errors, everywhere, incoming, laid, needs_the_interpreter

from nondual.ops import masks
from nondual.ops.sparse_attention import BlockMask, sparse_attention
from nondual.ops.sparse_attention.triton import launch
from nondual.ops.sparse_attention.triton.autograd import lists_of

pytestmark = pytest.mark.usefixtures("poisoned")


def patchwork(n, m, b=1, g=1, seed=0, side=16):
    """A mask (b, g, n, m) of patches of 16 x 16: some empty, some whole, some with holes.

    The second row of patches and the third column are empty, where there are so many.
    """
    draw = torch.Generator().manual_seed(seed)
    patches = torch.rand(b, g, -(-n // side), -(-m // side), generator=draw)
    if patches.shape[2] > 2 and patches.shape[3] > 2:
        patches[:, :, 1] = patches[..., 2] = 0
    wide = patches.repeat_interleave(side, -1).repeat_interleave(side, -2)[..., :n, :m]
    return (wide > 0.4) & ((wide > 0.7) | (torch.rand(b, g, n, m, generator=draw) > 0.5))


def compared(inputs, mask, block, scale=None, d_out=None):
    """The errors of the output and of each gradient, by name, for plain PyTorch with the mask and in float64."""
    q = inputs[0]
    listed = BlockMask.from_mask(mask, block).to(q.device)
    dense = mask.to(q.device).repeat_interleave(q.shape[1] // mask.shape[1], 1)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours = sparse_attention(*inputs, listed, scale=scale, impl="triton")
    assert ours.dtype == q.dtype
    d_out = incoming(ours) if d_out is None else d_out

    def results(out, of):
        grads = torch.autograd.grad(out, of, d_out.to(out.dtype))
        return {"out": out, **dict(zip(("dq", "dk", "dv"), grads))}

    return errors(
        results(ours, inputs),
        results(textbook(*inputs, dense, scale=scale), inputs),
        results(textbook(*exact, dense, scale=scale), exact),
    )


def right(inputs, mask, block, **more):
    """Assert that the output is off by at most twice plain PyTorch's error, and each gradient by three times."""
    check(compared(inputs, mask, block, **more), outputs={"out"})


def window(n, m, size):
    return masks.sliding_window(n, m, window=size)[None, None]


# --- right ---------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, m, block", [(61, 61, 16), (37, 83, (32, 16)), (83, 37, (16, 48))])
def test_error_is_that_of_plain_pytorch(device, dtype, n, m, block):
    """Rows and columns of tiles without a key or a query among them, and tiles that N and M cut."""
    right(made(n, m, 24, h=1, g=1, dtype=dtype, device=device), patchwork(n, m), block)


@everywhere
@pytest.mark.parametrize("d, dv", [(1, 1), (17, 40), (59, 16), (16, 111), (256, 256)])
def test_head_sizes(device, d, dv):
    right(made(17, 33, d, dv, h=1, g=1, device=device), patchwork(17, 33), 16)


@everywhere
@pytest.mark.parametrize("bm, gm", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_heads_of_a_group_share_their_lists(device, bm, gm):
    """One list for all, one for each sequence, for each key head, and for each of both."""
    right(made(18, 35, 16, b=2, h=4, g=2, device=device), patchwork(18, 35, bm, gm, side=8), 16)


@everywhere
@pytest.mark.parametrize("n, m", [(1, 1), (1, 40), (40, 1), (0, 5), (5, 0)])
def test_short_sequences(device, n, m):
    mask = torch.ones(1, 1, n, m, dtype=torch.bool)
    inputs = made(n, m, 16, h=1, g=1, device=device)
    right(inputs, mask, 32)
    out, lse = sparse_attention(*inputs, BlockMask.from_mask(mask, 32).to(device), return_lse=True, impl="triton")
    assert out.shape == (1, 1, n, 16) and lse.isfinite().all() == (m > 0 or n == 0)


@everywhere
@pytest.mark.parametrize("b, h", [(0, 2), (2, 0)])
def test_no_batch_and_no_heads(device, b, h):
    q, k, v = (torch.randn(b, h, 5, 16, device=device, requires_grad=True) for _ in range(3))
    listed = BlockMask.from_mask(torch.ones(5, 5, dtype=torch.bool), 16).to(device)
    out = sparse_attention(q, k, v, listed, impl="triton")
    out.sum().backward()
    assert out.shape == (b, h, 5, 16) and q.grad.shape == q.shape


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_or_column_that_sees_nothing_is_zero_and_has_no_gradient(device, dtype):
    """With whole tiles elsewhere, with empty rows inside of a listed tile, and where no tile at all is listed."""
    inside = torch.ones(1, 1, 33, 33, dtype=torch.bool)
    inside[..., 5:9, :], inside[..., 20:22] = False, False
    for mask in (inside, patchwork(33, 49), torch.zeros(1, 1, 33, 33, dtype=torch.bool)):
        inputs = made(33, mask.shape[-1], 16, h=1, g=1, dtype=dtype, device=device)
        listed = BlockMask.from_mask(mask, 16).to(device)
        out, lse = sparse_attention(*inputs, listed, return_lse=True, impl="triton")
        grads = torch.autograd.grad((out, lse), inputs, (incoming(out), incoming(lse)))
        rows, columns = (~mask[0, 0].any(axis) for axis in (1, 0))
        assert rows.any() and columns.any()
        assert (out[:, :, rows] == 0).all() and (lse[:, :, rows] == -torch.inf).all()
        assert (grads[0][:, :, rows] == 0).all()
        assert (grads[1][:, :, columns] == 0).all() and (grads[2][:, :, columns] == 0).all()
        assert all(x.isfinite().all() for x in (out, lse[:, :, ~rows], *grads))


@everywhere
def test_lse_and_its_gradient(device):
    inputs, mask = made(29, 41, 16, h=2, g=1, device=device), patchwork(29, 41)
    _, lse = sparse_attention(*inputs, BlockMask.from_mask(mask, 16).to(device), return_lse=True, impl="triton")
    exact = [x.detach().double().requires_grad_() for x in inputs]
    rows = mask[0, 0].any(-1)
    scores = (exact[0] @ exact[1].repeat_interleave(2, 1).mT / 4).masked_fill(~mask.to(device), -torch.inf)
    truth = scores[:, :, rows].logsumexp(-1)
    torch.testing.assert_close(lse[:, :, rows], truth.float())
    d_lse = incoming(truth)
    ours = torch.autograd.grad(lse[:, :, rows], inputs[:2], d_lse.float())
    for a, t in zip(ours, torch.autograd.grad(truth, exact[:2], d_lse)):
        torch.testing.assert_close(a, t.float(), atol=1e-5, rtol=1e-5)


@everywhere
@pytest.mark.parametrize("scale", [1e4, -1.0, 0.0])
def test_any_scale_and_scores_of_ten_thousand(device, scale):
    """Small integers: scores are exact, and in the first case many are tied."""
    draw = torch.Generator().manual_seed(3)
    q, k = (torch.randint(-2, 3, (1, 1, x, 16), generator=draw).float().to(device) for x in (29, 41))
    v, mask = torch.randn(1, 1, 41, 16, generator=draw).to(device), patchwork(29, 41).to(device)
    out = sparse_attention(q, k, v, BlockMask.from_mask(mask, 16), scale=scale, impl="triton")
    truth = textbook(q.double(), k.double(), v.double(), mask, scale=scale)
    assert (out - truth).abs().max() <= 64 * torch.finfo(torch.float32).eps * v.abs().max()


@everywhere
@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (64, 16), (64, 64)])
def test_any_blocks_of_the_kernels_give_the_same(device, blocks, monkeypatch):
    """The mask's tiles stay 64 x 64: a program passes them whole or in parts."""

    def other(*_):
        return {"BLOCK_Q": blocks[0], "BLOCK_KV": blocks[1], "num_warps": 4, "num_stages": 1}

    monkeypatch.setattr(launch, "configuration", other)
    right(made(70, 90, 16, h=1, g=1, device=device), patchwork(70, 90), 64)


# --- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, m, block", [(61, 61, 16), (64, 32, 16), (37, 97, (32, 16)), (97, 37, (16, 48)), (5, 7, 16)]
)
def test_lists_have_the_tiles_that_need_no_mask_first(n, m, block):
    """The same tiles as the mask's own lists; those before `part` whole and uncut, the others partial or cut."""
    for seed in range(4):
        mask = BlockMask.from_mask(patchwork(n, m, 2, 2, seed), block)
        lists = lists_of(mask)
        kinds = mask.kinds()
        for by, across in ((lists.rows, 2), (lists.columns, 3)):
            size, edge = ((mask.block_kv, m), (mask.block_q, n))[across - 2]
            for b in range(2):
                for g in range(2):
                    for i in range(by.part.shape[-1]):
                        first, part, end = int(by.start[b, g, i]), int(by.part[b, g, i]), int(by.start[b, g, i + 1])
                        line = kinds[b, g, i] if across == 2 else kinds[b, g, :, i]
                        plain = [j for j in range(len(line)) if line[j] == -1 and (j + 1) * size <= edge]
                        rest = [j for j in range(len(line)) if line[j] > -2 and j not in plain]
                        assert by.across[first:part].tolist() == plain
                        assert by.across[part:end].tolist() == rest
                        assert by.kinds[first:end].tolist() == [int(line[j]) for j in plain + rest]


def test_lists_are_made_once_for_a_mask():
    from nondual.ops.sparse_attention.triton import autograd

    mask = BlockMask.from_mask(patchwork(33, 33), 16)
    assert autograd._tensors_of(mask) is autograd._tensors_of(mask)
    assert autograd._tensors_of(mask) is not autograd._tensors_of(mask.to("cpu"))


# --- tiles that are not listed ---------------------------------------------------------------------------------------


@everywhere
def test_nothing_is_read_of_a_tile_that_is_not_listed(device):
    """NaN in every key and value of the columns that no row of tiles lists, and in every query of the empty rows."""
    n = m = 64
    mask = torch.ones(1, 1, n, m, dtype=torch.bool).tril()
    mask[..., 16:32, :], mask[..., 32:48] = False, False
    listed = BlockMask.from_mask(mask, 16).to(device)
    q, k, v = made(n, m, 16, h=1, g=1, device=device)
    bad = [x.detach().clone() for x in (q, k, v)]
    bad[0][:, :, 16:32], bad[1][:, :, 32:48], bad[2][:, :, 32:48] = torch.nan, torch.nan, torch.nan
    bad = [x.requires_grad_() for x in bad]
    ours, clean = (sparse_attention(*x, listed, return_lse=True, impl="triton") for x in (bad, (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(ours, clean))
    d_out = incoming(clean[0])
    for a, b in zip(torch.autograd.grad(ours[0], bad, d_out), torch.autograd.grad(clean[0], (q, k, v), d_out)):
        assert torch.equal(a, b)


@everywhere
def test_a_tile_is_kept_from_the_rows_that_do_not_list_it(device):
    """NaN in one column of tiles reaches the rows that list it, and no other."""
    mask = window(64, 64, 20)
    q, k, v = (x.detach() for x in made(64, 64, 16, h=1, g=1, device=device))
    v[:, :, :16] = torch.nan
    out = sparse_attention(q, k, v, BlockMask.from_mask(mask, 16).to(device), impl="triton")
    reached = out.isnan().any(-1)[0, 0]
    assert reached[:35].all() and not reached[48:].any()


# --- memory and layouts ----------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("which", ["q", "k", "v", "dy"])
def test_each_tensor_in_layouts_of_its_own(device, which):
    """One tensor at a time; what is read with another's strides would show."""
    listed = BlockMask.from_mask(patchwork(17, 20, side=8), 16).to(device)
    given = dict(zip("qkv", (x.detach() for x in made(17, 20, 16, 12, b=2, h=2, g=1, device=device))))
    given["dy"] = torch.randn(2, 2, 17, 12, generator=torch.Generator().manual_seed(2)).to(device)
    expected = None
    for layout in ("plain", "heads inside", "strided"):
        case = given | {which: laid(given[which], layout)}
        inputs = [case[name].detach().requires_grad_() for name in "qkv"]
        out = sparse_attention(*inputs, listed, impl="triton")
        got = [out, *torch.autograd.grad(out, inputs, case["dy"])]
        expected = got if layout == "plain" else expected
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@everywhere
def test_the_gradient_of_a_sum_and_the_layout_of_a_module(device):
    mask = patchwork(17, 37)
    q, k, v = made(17, 37, 24, device=device)
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    out = sparse_attention(q, k, v, BlockMask.from_mask(mask, 16).to(device), impl="triton")
    assert out.transpose(1, 2).is_contiguous()  # so that (B, N, H D) needs no copy
    out.sum().backward()  # a gradient of one number, expanded
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    textbook(*exact, mask.to(device)).sum().backward()
    for x, e in zip((q, k, v), exact):
        torch.testing.assert_close(x.grad, e.grad.float(), atol=1e-5, rtol=1e-5)


@needs_the_interpreter
@pytest.mark.parametrize("n, m, d, dv, block", [(37, 45, 24, 19, (32, 16)), (33, 20, 16, 16, 16)])
def test_no_kernel_leaves_its_tensors_or_writes_twice(n, m, d, dv, block, monkeypatch, watch):
    """The tensors lie inside larger ones, whose other elements count as outside."""
    watched = {}
    for name in ("forward", "delta", "dq", "dkdv"):
        watched[name] = watch(getattr(launch, f"{name}_kernel"))
        monkeypatch.setattr(launch, f"{name}_kernel", watched[name])
    q, k, v = (laid(x.detach(), "sliced").requires_grad_() for x in made(n, m, d, dv, h=2, g=1))
    out = sparse_attention(q, k, v, BlockMask.from_mask(patchwork(n, m), block), impl="triton")
    torch.autograd.grad(out, (q, k, v), laid(incoming(out), "sliced"))
    assert all(kernel.launches == 1 for kernel in watched.values())


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
    near = [x.clone(memory_format=torch.contiguous_format).requires_grad_() for x in (q, k, v)]
    spread = [x.requires_grad_() for x in (q, k, v)]
    listed = BlockMask.from_mask(masks.causal(sizes[2], sizes[2]), 16).to(device)
    expected, got = (sparse_attention(*x, listed, impl="triton") for x in (near, spread))
    assert torch.equal(got, expected)
    for a, b in zip(torch.autograd.grad(got, spread, d_out), torch.autograd.grad(expected, near, d_out.contiguous())):
        assert torch.equal(a, b)


@everywhere
def test_runs_are_equal_to_the_bit(device):
    inputs, listed = made(34, 34, 16, h=2, g=1, device=device), BlockMask.from_mask(patchwork(34, 34), 16).to(device)

    def run():
        out, lse = sparse_attention(*inputs, listed, return_lse=True, impl="triton")
        return out, lse, *torch.autograd.grad(out, inputs, incoming(out))

    first = run()
    for _ in range(1 if device == "cpu" else 99):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


# --- operators of torch ----------------------------------------------------------------------------------------------


@everywhere
def test_a_second_derivative_is_refused(device):
    q, k, v = made(5, 7, 16, h=1, g=1, device=device)
    listed = BlockMask.from_mask(torch.ones(5, 7, dtype=torch.bool), 16).to(device)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        (grad,) = torch.autograd.grad(sparse_attention(q, k, v, listed, impl="triton").sum(), q, create_graph=True)
        grad.sum().backward()


@everywhere
def test_compiles_whole_for_two_lengths(device):
    torch._dynamo.reset()

    def run(q, k, v, listed):
        return sparse_attention(q * 1.5, k, v, listed, impl="triton") * 2

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager" if device == "cpu" else "inductor")
    for n in (9, 34):
        inputs = made(n, 21, 16, h=1, g=1, device=device)
        listed = BlockMask.from_mask(patchwork(n, 21, side=8), 16).to(device)
        ours, plain = compiled(*inputs, listed), run(*inputs, listed)
        torch.testing.assert_close(ours, plain)
        grads = (torch.autograd.grad(out, inputs, incoming(out)) for out in (ours, plain))
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b)


@everywhere
def test_the_operators_pass_torchs_own_check(device):
    q, k, v = made(17, 18, 16, h=1, g=1, device=device)
    tensors = lists_of(BlockMask.from_mask(patchwork(17, 18, side=8), 16).to(device)).tensors()
    torch.library.opcheck(
        torch.ops.nondual.sparse_attention.default,
        (q, k, v, tensors, 0.25),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


# --- the benchmark ---------------------------------------------------------------------------------------------------


@everywhere
def test_the_benchmark_looks_at_its_results_before_it_times(device):
    from benchmarks import sparse

    worst = sparse.look(device, torch.float32, 50, 16)
    assert set(worst) == {"tiles", "window"} and max(worst.values()) < 1e-5


def test_the_benchmark_is_passed_over_without_a_gpu(monkeypatch, capsys):
    from benchmarks import sparse

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sparse.main([])
    assert "needs a CUDA device" in capsys.readouterr().out


# --- large, on a GPU -----------------------------------------------------------------------------------------------


def some_tiles(n, m, block, b=1, g=1, share=0.3, seed=0):
    """A share of the tiles of a causal mask, whole below the diagonal, and all tiles on it."""
    draw = torch.Generator().manual_seed(seed)
    tiles = -(-n // block), -(-m // block)
    kept = torch.rand(b, g, *tiles, generator=draw) < share
    on = (torch.arange(tiles[1]) * block)[None] <= torch.arange(tiles[0])[:, None] * block + (m - n)
    last = on.sum(-1).clamp(min=1) - 1
    kept[:, :, torch.arange(tiles[0]), last] = True
    return BlockMask.from_blocks(kept, block, n=n, m=m, causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n, m, block", [(1025, 1025, 64), (2048, 2048, 128), (200, 2049, 128), (1500, 1500, 32)])
@pytest.mark.parametrize("d, h, g", [(64, 4, 4), (128, 4, 1), (256, 2, 2), (80, 4, 2), (111, 2, 1)])
def test_large(dtype, n, m, block, d, h, g):
    for mask in (window(n, m, 257), some_tiles(n, m, block, 1, g).mask()):
        right(made(n, m, d, h=h, g=g, dtype=dtype, device="cuda"), mask, block)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_large_runs_are_equal_to_the_bit(dtype, d):
    inputs = made(2049, 2049, d, b=2, h=8, g=2, dtype=dtype, device="cuda")
    listed = some_tiles(2049, 2049, 64, 2, 2).to("cuda")

    def run():
        out = sparse_attention(*inputs, listed, impl="triton")
        return out, *torch.autograd.grad(out, inputs, incoming(out))

    first = run()
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.gpu
def test_all_tiles_are_flash_attention():
    """A causal mask listed tile by tile gives what flash attention gives, to rounding, forward and backward."""
    from nondual.ops.flash_attention import flash_attention

    inputs = made(1000, 1000, 64, h=4, g=2, dtype=torch.float32, device="cuda")
    listed = BlockMask.from_mask(masks.causal(1000, 1000), 64).to("cuda")
    pair = sparse_attention(*inputs, listed, impl="triton"), flash_attention(*inputs, causal=True, impl="triton")
    grads = (torch.autograd.grad(out, inputs, incoming(out)) for out in pair)
    for a, b in [pair, *zip(*grads)]:
        torch.testing.assert_close(a, b, atol=math.sqrt(torch.finfo(torch.float32).eps) / 10, rtol=1e-4)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """One head at the far end of 2^31 numbers, with the rest and alone: the same bits, forward and backward."""
    h, n, d = 4100, 4096, 128
    q, k, v = (torch.randn(1, h, n, d, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3))
    listed = BlockMask.from_mask(masks.sliding_window(n, n, window=200), 64).to("cuda")
    out = sparse_attention(q, k, v, listed, impl="triton")
    d_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), d_out)
    alone = [x[:, -1:].detach().clone().requires_grad_() for x in (q, k, v)]
    last = sparse_attention(*alone, listed, impl="triton")
    assert torch.equal(out[:, -1:], last)
    for a, b in zip(grads, torch.autograd.grad(last, alone, d_out[:, -1:])):
        assert torch.equal(a[:, -1:], b)
