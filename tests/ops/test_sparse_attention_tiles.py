"""Block-sparse attention by rows of tiles: what is read, joined and held, and in compiled and exported programs."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nondual.ops import masks
from nondual.ops.sparse_attention import BlockMask, compiled, sparse_attention, tiles


@pytest.fixture(params=["c", "torch"])
def way(request, monkeypatch) -> str:
    """How the tiles are computed here: by the loop in C, or in plain torch."""
    monkeypatch.setenv("NONDUAL_CPU_SPARSE", request.param)
    assert (compiled.library(torch.empty(0)) is None) == (request.param == "torch")
    return request.param


def made(n, m=None, d=8, h=2, g=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    m = n if m is None else m
    return [torch.randn(1, *s, d, generator=draw).requires_grad_() for s in ((h, n), (g, m), (g, m))]


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator gave, looked at inside our own operators."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        for x in given if isinstance(given, tuple | list) else (given,):
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.numel())
        return given


@pytest.mark.usefixtures("way")
def test_what_lies_in_a_tile_that_is_not_kept_is_not_read():
    """NaN in its keys and values reaches neither output nor gradient."""
    mask = masks.sliding_window(64, window=16)
    mask[:, 32:48] = False
    kept = BlockMask.from_mask(mask, 16)
    q, k, v = made(64)
    clean = sparse_attention(q, k, v, kept, impl="tiles")
    with torch.no_grad():
        k[:, :, 32:48], v[:, :, 32:48] = torch.nan, torch.nan
    out = sparse_attention(q, k, v, kept, impl="tiles")
    assert torch.equal(out, clean)
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert dq.isfinite().all() and not dk[:, :, 32:48].any() and not dv[:, :, 32:48].any()


def test_rows_with_one_list_are_one_call():
    """A block of four rows of tiles that keep the same columns; not more queries than the limit at once."""
    mask = BlockMask.from_mask(torch.block_diag(*(torch.ones(64, 64) for _ in range(3))).bool(), 16)
    starts = mask.row_start[0, 0].tolist()
    assert list(tiles.joined(starts, mask.columns.tolist(), 16)) == [(0, 4), (4, 8), (8, 12)]
    assert list(tiles.joined(starts, mask.columns.tolist(), 3)) == [(0, 3), (3, 4), (4, 7), (7, 8), (8, 11), (11, 12)]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("n", [1024, 2048])
def test_no_tensor_of_n_by_m_is_made(n):
    """Beyond inputs and outputs: one row of tiles with the keys in its list."""
    q, k, v = (x.detach() for x in made(n, d=16, h=1, g=1))
    mask = BlockMask.from_predicate(n, n, lambda i, j: (j <= i) & ((j > i - 128) | (j % 256 == 255)), 64)
    lists = (mask.row_start, mask.columns, mask.row_kinds, mask.tile_masks, 0.25, False)
    row = 64 * int(mask.row_start.diff().max()) * 64
    with Largest() as forward:
        out, lse = tiles.forward(q, k, v, *lists)
    with Largest() as backward:
        tiles.backward(q, lse, q, k, v, out, lse, *lists)
    assert max(forward.most, backward.most) <= max(row, n * 16) < n * n / 4


def test_elsewhere_than_on_a_cpu_the_weights_of_a_row_are_formed(monkeypatch):
    """The same steps in plain torch, which any device has."""
    monkeypatch.setenv("NONDUAL_CPU_SPARSE", "torch")
    q, k, v = made(50, 70, h=4)
    mask = BlockMask.from_mask(torch.rand(1, 2, 50, 70, generator=torch.Generator().manual_seed(1)) < 0.03, 16)
    results = []
    for there in ("cpu", "elsewhere"):
        if there == "elsewhere":
            monkeypatch.setattr(tiles, "_fused", lambda q: False)
        out, lse = sparse_attention(q, k, v, mask, return_lse=True, impl="tiles")
        seen = lse > -torch.inf
        assert not out[~seen].any() and not seen.all()
        results.append((out, lse, *torch.autograd.grad(out.square().sum() + lse[seen].sin().sum(), (q, k, v))))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


class Sparse(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, q, k, v):
        return sparse_attention(q, k, v, self.mask)


@pytest.mark.timeout(400)  # torch's compiler on a busy machine
@pytest.mark.usefixtures("way")
def test_compiled_for_two_lengths_forward_and_backward():
    compiled = torch.compile(lambda q, k, v, mask: sparse_attention(q, k, v, mask), fullgraph=True, backend="aot_eager")
    for n in (40, 70):
        q, k, v = made(n, seed=n)
        mask = BlockMask.from_mask(masks.sliding_window(n, window=20), 16)
        out, plain = compiled(q, k, v, mask), sparse_attention(q, k, v, mask)
        torch.testing.assert_close(out, plain)
        for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, plain))):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("way")
def test_an_exported_program_has_its_mask_and_its_length():
    q, k, v = (x.detach() for x in made(40))
    module = Sparse(BlockMask.from_mask(masks.sliding_window(40, window=20), 16))
    program = torch.export.export(module, (q, k, v)).module()
    torch.testing.assert_close(program(q, k, v), module(q, k, v))


@pytest.mark.usefixtures("way")
def test_operators_of_ours_keep_torchs_rules():
    """Fake results of the same shapes, and gradients registered: torch's own check of custom operators."""
    q, k, v = made(20, 30, h=4)
    mask = BlockMask.from_mask(masks.sliding_window(20, 30, window=9), 8)
    lists = (mask.row_start, mask.columns, mask.row_kinds, mask.tile_masks, 0.5, True)
    torch.library.opcheck(tiles.attention_by_rows, (q, k, v, *lists))
