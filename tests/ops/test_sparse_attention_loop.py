"""The loop in C of block-sparse attention: sizes that its tables do not fit, extreme numbers, threads, no compiler."""

import re

import pytest
import torch
from harness import check as check_errors
from harness import errors, incoming

from nondual.ops import c_loop, masks
from nondual.ops.sparse_attention import BlockMask, compiled, sparse_attention


@pytest.fixture(autouse=True)
def loop(monkeypatch):
    """The loop is there, and is taken."""
    monkeypatch.delenv("NONDUAL_CPU_SPARSE", raising=False)
    assert compiled.library(torch.empty(0)) is not None


def made(n, m=None, d=8, dv=None, *, b=1, h=2, g=2, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = (b, h, n, d), (b, g, m or n, d), (b, g, m or n, dv or d)
    return [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def results(inputs, mask, impl, **options):
    """out, lse and every gradient; a row with nothing to attend to counts with lse 0."""
    out, lse = sparse_attention(*inputs, mask, return_lse=True, impl=impl, **options)
    lse = lse.masked_fill(lse == -torch.inf, 0)
    grads = torch.autograd.grad((out, lse), inputs, (incoming(out), incoming(lse, 2)))
    return {"out": out, "lse": lse, **dict(zip("qkv", grads))}


# --- sizes -----------------------------------------------------------------------------------------------------------

SIZES = {  # N, M, D, Dv, tile, H, G
    "tiles larger than a band and its keys": (301, 403, 24, 16, (131, 150), 2, 1),
    "just larger": (200, 200, 16, 16, (65, 65), 2, 2),
    "just smaller": (200, 200, 16, 16, (63, 63), 2, 2),
    "small tiles": (50, 61, 16, 16, (1, 3), 4, 2),
    "a wide head": (70, 75, 130, 200, 32, 2, 1),
    "a vector and three numbers": (70, 75, 19, 35, 32, 3, 1),
    "one number": (70, 75, 1, 1, 64, 2, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("poisoned")
def test_sizes_that_do_not_fit_its_tables(size, dtype):
    n, m, d, dv, block, h, g = SIZES[size]
    inputs = made(n, m, d, dv, b=2, h=h, g=g, dtype=dtype)
    share = torch.rand(2, g, n, m, generator=torch.Generator().manual_seed(1))
    mask = BlockMask.from_mask((share < 0.5) & masks.sliding_window(n, m, window=n // 2), block)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = errors(
        *(results(x, mask, impl) for x, impl in ((inputs, "tiles"), (inputs, "reference"), (exact, "reference")))
    )
    check_errors(found, outputs={"out", "lse"})


def test_lists_of_each_sequence_and_head_and_rows_with_none():
    inputs = made(150, d=16, b=3, h=4, dtype=torch.float64)
    kept = torch.rand(3, 2, 5, 5, generator=torch.Generator().manual_seed(2)) < 0.3
    mask = BlockMask.from_blocks(kept, 32, n=150, m=150)
    assert (mask.row_start.diff() == 0).any()
    ours, theirs = (results(inputs, mask, impl) for impl in ("tiles", "reference"))
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], msg=name)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.01, 1.0, 30.0, -30.0])
def test_scores_that_rise_or_fall_from_key_to_key(step):
    """The greatest score so far grows a little, or much, at every key, or not at all after the first."""
    q, k, v = (
        torch.ones(1, 1, 90, 1, dtype=torch.float64),
        *(x for x in made(90, d=1, h=1, g=1, dtype=torch.float64)[1:]),
    )
    with torch.no_grad():
        k.copy_(step * torch.arange(90.0)[:, None])
    inputs, mask = (q.requires_grad_(), k, v), BlockMask.from_mask(masks.causal(90), 16)
    ours, theirs = (results(inputs, mask, impl, scale=1.0) for impl in ("tiles", "reference"))
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], msg=name, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("size", [1e4, 1e18])
def test_scores_of_any_size(size):
    """One weight is 1, the others are 0; a key far below or above all others changes nothing of that."""
    q, k, v = made(40, d=4, h=1, g=1)
    with torch.no_grad():
        q[:], k[..., 0], k[..., 1:] = 1, size * torch.arange(-20, 20), 0
    mask = BlockMask.from_mask(masks.causal(40), 16)
    out, lse = sparse_attention(q, k, v, mask, return_lse=True, scale=1.0, impl="tiles")
    assert torch.equal(out, v) and torch.allclose(lse[0, 0], k[0, 0, :, 0], rtol=1e-6)
    torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))


def test_a_nan_stays_in_the_rows_that_see_it():
    """In a query it stays in that query's output; in a key, in rows whose tiles hold the key."""
    q, k, v = (x.detach() for x in made(64, d=16))
    mask = BlockMask.from_mask(masks.causal(64), 16)
    clean, lse = sparse_attention(q, k, v, mask, return_lse=True, impl="tiles")
    spoilt = q.clone()
    spoilt[:, :, 33, 5] = torch.nan
    out, its = sparse_attention(spoilt, k, v, mask, return_lse=True, impl="tiles")
    others = torch.arange(64) != 33
    assert out[:, :, 33].isnan().all() and its[:, :, 33].isnan().all()
    assert torch.equal(out[:, :, others], clean[:, :, others]) and torch.equal(its[:, :, others], lse[:, :, others])
    for bad in (torch.nan, torch.inf):
        spoilt = k.clone()
        spoilt[:, :, 20, 5] = bad
        out = sparse_attention(q, spoilt, v, mask, impl="tiles")
        assert torch.equal(out[:, :, :16], clean[:, :, :16])
        assert out[:, :, 20:].isnan().any(-1).any() and (bad == torch.inf or out[:, :, 20:].isnan().all())


# --- threads ---------------------------------------------------------------------------------------------------------


def test_the_result_does_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(compiled, "EACH_THREAD", 1)
    inputs, mask = made(700, d=16, b=2, h=4), BlockMask.from_mask(masks.sliding_window(700, window=90), 32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(inputs, mask, "tiles"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, other[name]) for name, x in found[0].items())


# --- the library -----------------------------------------------------------------------------------------------------


def test_without_a_compiler_it_runs_in_torch_and_says_so_once(monkeypatch, tmp_path):
    monkeypatch.setattr(c_loop, "_loops", {})
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "none-of-this-name")
    mask = BlockMask.from_mask(masks.causal(40), 16)
    with pytest.warns(
        RuntimeWarning, match="block-sparse attention's loop could not be compiled.* no C compiler"
    ) as seen:
        for dtype in (torch.float32, torch.float64, torch.float32):
            q, k, v = made(40, dtype=dtype)
            ours, plain = (sparse_attention(q, k, v, mask, impl=impl) for impl in ("tiles", "reference"))
            torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)
    assert len(seen) == 1


def test_the_source_travels_with_the_package_and_its_struct_is_ours():
    text = compiled.LOOP.source.read_text(encoding="utf-8")

    def declared(struct: str, kinds: str) -> list[str]:
        body = text[text.index(f"struct {struct} {{") :].split("\n", 1)[1].split("\n};")[0]
        body = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL)
        lines = [re.sub(rf"^\s*(const )?({kinds})\s", "", line) for line in body.split(";")]
        return [name.strip(" *\n") for line in lines for name in line.split(",") if name.strip()]

    every = "int64_t|double|int32_t|uint64_t|real|struct tensor"
    assert declared("tensor", every) == ["at", *"bhn"]
    assert declared("tiles", every) == [*compiled.SIZES, "scale", *compiled.LISTS, *compiled.TENSORS]
