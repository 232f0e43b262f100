"""A mask as one of torch's FlexAttention and back, and the two operations beside each other."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nondual.ops import masks
from nondual.ops.sparse_attention import BlockMask, sparse_attention

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def made(n, m, h=4, g=2, d=16):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(2, *s, d, generator=draw) for s in ((h, n), (g, m), (g, m))]


MASKS = {
    "window": lambda n, m: masks.sliding_window(n, m, window=20),
    "drawn": lambda n, m: torch.rand(n, m, generator=torch.Generator().manual_seed(0)) < 0.2,
    "by group": lambda n, m: torch.rand(1, 2, n, m, generator=torch.Generator().manual_seed(0)) < 0.2,
    "by sequence and group": lambda n, m: torch.rand(2, 2, n, m, generator=torch.Generator().manual_seed(0)) < 0.2,
    "whole": lambda n, m: torch.ones(n, m).bool(),
    "whole and empty tiles": lambda n, m: (torch.arange(n)[:, None] // 16 + torch.arange(m) // 16) % 3 == 0,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("n, m", [(50, 50), (33, 70), (70, 33)])
def test_flex_attention_gives_the_same_and_the_mask_comes_back(name, n, m):
    q, k, v = made(n, m)
    mask = BlockMask.from_mask(MASKS[name](n, m), 16)
    flex = mask.to_flex(4)
    theirs = flex_attention(q, k, v, block_mask=flex, enable_gqa=True)
    torch.testing.assert_close(sparse_attention(q, k, v, mask), theirs, atol=1e-5, rtol=1e-5)
    again = BlockMask.from_flex(flex, groups=mask.groups)
    assert torch.equal(again.mask(), mask.mask())
    for field in ("row_start", "columns", "col_start", "rows"):
        assert torch.equal(getattr(again, field), getattr(mask, field)), field


def test_a_mask_made_by_torch():
    def document(b, h, q, k):
        return (ends[q] == ends[k]) & (q >= k) & (h < 2)

    ends = torch.arange(100) // 37
    flex = create_block_mask(document, 2, 4, 100, 100, device="cpu", BLOCK_SIZE=32)
    mask = BlockMask.from_flex(flex, groups=2)
    dense = (ends[:, None] == ends) & masks.causal(100)
    assert torch.equal(mask.mask(), torch.stack([dense, torch.zeros_like(dense)])[None].expand(2, 2, -1, -1))
    q, k, v = made(100, 100)
    theirs = flex_attention(q, k, v, block_mask=flex, enable_gqa=True)
    torch.testing.assert_close(sparse_attention(q, k, v, mask), theirs, atol=1e-5, rtol=1e-5)


def test_query_heads_of_a_group_that_keep_other_tiles_are_refused():
    flex = create_block_mask(lambda b, h, q, k: q >= k + h, None, 4, 100, 100, device="cpu", BLOCK_SIZE=32)
    assert BlockMask.from_flex(flex, groups=4).groups == 4
    with pytest.raises(ValueError, match="groups that keep the same tiles, got groups=2"):
        BlockMask.from_flex(flex, groups=2)


def test_lists_by_group_need_the_number_of_heads():
    mask = BlockMask.from_mask(torch.ones(1, 2, 20, 20).bool(), 16)
    for heads in (None, 3):
        with pytest.raises(ValueError, match="heads must be given, a multiple of the mask's 2 key/value heads"):
            mask.to_flex(heads)


@pytest.mark.timeout(400)  # torch's compiler on a busy machine
def test_compiled_by_torch_on_a_cpu():
    q, k, v = made(128, 128, g=4)
    mask = BlockMask.from_mask(MASKS["window"](128, 128), 64)
    compiled = torch.compile(flex_attention, dynamic=False)
    with torch.no_grad():
        theirs = compiled(q, k, v, block_mask=mask.to_flex())
        torch.testing.assert_close(sparse_attention(q, k, v, mask), theirs, atol=1e-5, rtol=1e-5)
