"""Learned choice of blocks: against fla-core's plain functions, by hand, read in parts, and where gradients go."""

import warnings

import pytest
import torch
from torch import nn

from nondual.efficient_attention.native_sparse_attention import (
    BlockMean,
    BlockMLP,
    NativeSparseAttention,
    NativeSparseCache,
    SelectedBlocks,
    attend_to_blocks,
    choose_blocks,
)
from nondual.language_models.causal import CausalLM
from nondual.ops.attention import attention
from nondual.ops.flash_attention import flash_attention
from nondual.relative_positions import ALiBi, Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import MixerBlock

DOUBLE = {"dtype": torch.float64}


@pytest.fixture(scope="module")
def fla():
    """fla-core's plain functions for native sparse attention; positions come before heads there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fla.ops.nsa import naive
    return naive


def made(**more):
    torch.manual_seed(0)
    settings = {"n_kv_heads": 2, "d_head": 6, "block": 5, "selected": 4, "window": 7, "positions": Rotary(6)} | more
    return NativeSparseAttention(12, 4, **settings).double()


def drawn(n=43, batch=2, width=12):
    return torch.randn(batch, n, width, generator=torch.Generator().manual_seed(1), **DOUBLE)


def qkv(n=37, d=6, dv=7):
    draw = torch.Generator().manual_seed(2)
    return [torch.randn(2, h, n, w, generator=draw, **DOUBLE) for h, w in ((6, d), (2, d), (2, dv))]


def places_first(*tensors):
    return [x.transpose(1, 2).clone() for x in tensors]


def means(x, block):
    whole = x.shape[2] // block
    return x[:, :, : whole * block].unflatten(2, (whole, block)).mean(3)


def behind(n, block):
    """True where a whole block ends at or before a query (N, C)."""
    return torch.arange(1, n // block + 1) * block - 1 <= torch.arange(n)[:, None]


# --- the choice ----------------------------------------------------------------------------------------------------


def test_a_choice_by_hand():
    scores = torch.tensor([0.1, 0.4, 0.3, 0.4, 0.2, 0.9, 0.9]).expand(1, 1, 14, 7)
    kept = choose_blocks(scores, 14, 2, 4)
    rows = {3: "11", 5: "111", 9: "11011", 11: "110011", 13: "1100011"}
    for query, blocks in rows.items():
        assert kept[0, 0, query].nonzero().flatten().tolist() == [i for i, b in enumerate(blocks) if b == "1"]


def test_of_equal_scores_the_earlier_block_is_chosen():
    kept = choose_blocks(torch.zeros(1, 1, 40, 20), 40, 2, 6)
    assert kept[0, 0, -1].nonzero().flatten().tolist() == [0, 1, 2, 3, 18, 19]
    high = torch.zeros(1, 1, 40, 20)
    high[..., 7:15] = 1.0
    assert choose_blocks(high, 40, 2, 6)[0, 0, -1].nonzero().flatten().tolist() == [0, 7, 8, 9, 18, 19]


def test_no_block_after_the_querys_own_is_chosen_and_never_more_than_the_count():
    for n, m, block in ((17, 17, 3), (5, 23, 4), (1, 8, 8), (0, 9, 4), (3, 3, 5)):
        scores = torch.randn(2, 3, n, m // block)
        kept = choose_blocks(scores, m, block, 4)
        own = torch.arange(m - n, m) // block
        assert kept.shape == (2, 3, n, -(-m // block)) and (kept.sum(-1) == (own + 1).clamp(max=4)).all()
        assert not (kept & (torch.arange(kept.shape[-1]) > own[:, None])).any()


@pytest.mark.parametrize(("block", "count"), [(4, 3), (5, 4), (3, 7), (16, 5)])
def test_the_choice_is_that_of_fla(fla, block, count):
    q, k, _ = qkv()
    blocks = means(k, block)
    weights = attention(q, blocks, blocks, mask=behind(37, block), return_weights=True)[1]
    kept = choose_blocks(weights.unflatten(1, (2, 3)).sum(2), 37, block, count)
    theirs_q, theirs_k = places_first(q, blocks)
    last = torch.zeros_like(theirs_k[:, :1])  # theirs counts an unfinished block, which no query may score
    theirs_k = torch.cat([theirs_k, last], 1) if 37 % block else theirs_k
    found = fla.naive_nsa_topk(theirs_q, theirs_k, count, block, 6**-0.5)  # (B, N, G, count), -1 for none
    theirs = torch.zeros_like(kept)
    for b, n, g, index in (found >= 0).nonzero().tolist():
        theirs[b, g, n, found[b, n, g, index]] = True
    assert torch.equal(kept, theirs)


# --- the branches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "tiles"])
def test_the_selected_branch_is_that_of_fla_forward_and_backward(fla, impl):
    q, k, v = (x.float().requires_grad_() for x in qkv())
    kept = choose_blocks(torch.randn(2, 2, 37, 9, generator=torch.Generator().manual_seed(3)), 37, 4, 4)
    out = attend_to_blocks(q, k, v, kept, 4, impl=impl)
    indices = torch.where(kept, torch.arange(10), -1).sort(-1, descending=True).values[..., :4].transpose(1, 2)
    theirs = [x.detach().transpose(1, 2).clone().requires_grad_() for x in (q, k, v)]
    # theirs takes the width of the values' table for the output's number of heads: the same after repeating
    expected = fla.naive_nsa_selection(*theirs, indices.contiguous(), 4)
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=2e-6, rtol=1e-5)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), grad)
    for mine, other in zip(ours, torch.autograd.grad(expected, theirs, grad.transpose(1, 2)), strict=True):
        torch.testing.assert_close(mine, other.transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_the_compressed_branch_is_that_of_fla_forward_and_backward(fla):
    q, k, v = (x.requires_grad_() for x in qkv())
    out = attention(q, means(k, 5), means(v, 5), mask=behind(37, 5))
    theirs = [x.detach().transpose(1, 2).clone().requires_grad_() for x in (q, k, v)]
    blocks = [means(x.transpose(1, 2), 5).transpose(1, 2) for x in theirs[1:]]
    expected, _ = fla.naive_nsa_compression(theirs[0], *blocks, 5, 6**-0.5)  # in float32 inside
    torch.testing.assert_close(out, expected.transpose(1, 2).double(), atol=1e-6, rtol=1e-5)
    assert (out[:, :, :4] == 0).all()  # no whole block is behind these queries
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), grad)
    for mine, other in zip(ours, torch.autograd.grad(expected, theirs, grad.transpose(1, 2)), strict=True):
        torch.testing.assert_close(mine, other.transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_the_module_is_the_gated_sum_of_its_three_branches():
    module, x = made(positions=None, compress=BlockMean), drawn()
    q = module.q_proj(x).view(2, 43, 4, 6).transpose(1, 2)
    (kc, ks, kw), (vc, vs, vw) = (
        p(x).view(2, 43, 3, 2, 6).permute(2, 0, 3, 1, 4) for p in (module.k_proj, module.v_proj)
    )
    gates = module.gate_proj(x).sigmoid().view(2, 43, 3, 4).permute(2, 0, 3, 1)[..., None]
    out, weights = attention(q, means(kc, 5), means(vc, 5), mask=behind(43, 5), return_weights=True)
    kept = choose_blocks(weights.unflatten(1, (2, 2)).sum(2), 43, 5, 4)
    seen = kept.repeat_interleave(5, -1)[..., :43] & torch.ones(43, 43, dtype=torch.bool).tril()
    selected = attention(q, ks, vs, mask=seen.repeat_interleave(2, 1))
    window = flash_attention(q, kw, vw, window=7, impl="reference")
    y = gates[0] * out + gates[1] * selected + gates[2] * window
    torch.testing.assert_close(module(x), module.out_proj(y.transpose(1, 2).flatten(2)), atol=1e-12, rtol=0)


def test_where_every_block_is_chosen_the_selected_branch_is_causal_attention():
    q, k, v = qkv()
    kept = choose_blocks(torch.zeros(2, 2, 37, 9), 37, 4, 10)
    torch.testing.assert_close(attend_to_blocks(q, k, v, kept, 4), attention(q, k, v, causal=True))


# --- the mixer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[43], [1] * 43, [4, 1, 5, 20, 13]])
@pytest.mark.parametrize("more", [{}, {"compress": BlockMean, "positions": None}, {"window": 1}, {"block": 50}])
def test_read_in_parts_it_gives_what_it_gives_at_once(sizes, more):
    module, x = made(**more), drawn()
    with torch.no_grad():
        cache = module.new_cache(2, 50)
        parts = [module(part, cache=cache) for part in x.split(sizes, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), module(x), atol=1e-12, rtol=0)
    assert cache.length == 43 and cache.compressed.length == 43 // module.block


def test_no_output_depends_on_a_later_input():
    module, x = made(), drawn(batch=1)
    clean = module(x)
    for place in (0, 4, 5, 21, 42):
        changed = x.clone()
        changed[:, place] += 1
        moved = (module(changed) != clean).any(-1)[0]
        assert not moved[:place].any() and moved[place]


def test_gates_and_compression_get_gradients_and_the_choice_gets_none():
    module, x = made(), drawn()
    module(x).square().sum().backward()
    for name in ("gate_proj", "compress_k", "compress_v", "q_proj"):
        for parameter in getattr(module, name).parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    # With the gates of the compressed branch shut, its keys still decide what is chosen, and get no gradient.
    module.zero_grad()
    with torch.no_grad():
        module.gate_proj.weight.zero_()
        module.gate_proj.bias.copy_(torch.tensor([-torch.inf] * 4 + [1.0] * 8))
    module(x).square().sum().backward()
    assert all((p.grad == 0).all() for p in module.compress_k.parameters())
    before = module(x)
    with torch.no_grad():
        module.compress_k.linear2.weight.neg_()
    assert not torch.allclose(module(x), before)


def test_it_serves_a_language_model_which_generates_alike_with_a_cache_and_without():
    torch.manual_seed(0)
    mixer = {"block": 4, "selected": 3, "window": 5, "positions": Rotary(8)}
    model = CausalLM(11, 16, 2, layer=lambda i: MixerBlock(NativeSparseAttention(16, 2, **mixer), 16)).double()
    prompt = torch.randint(11, (2, 9))
    assert torch.equal(model.generate(prompt, 20), model.generate(prompt, 20, cached=False))


def test_a_cache_is_as_before_where_a_call_raises_and_selects_rows():
    module, x = made(), drawn(n=20)
    with torch.no_grad():
        cache = module.new_cache(2, 20)
        module(x[:, :13], cache=cache)
        with pytest.raises(ValueError, match="holds"):
            module(x, cache=cache)
        assert cache.length == 13 and cache.compressed.length == 2 and cache.unfinished[0].shape[2] == 3
        swapped = cache.select(torch.tensor([1, 0]))
        expected = module(x)[:, 13:]
        torch.testing.assert_close(module(x[:, 13:], cache=cache), expected)
        torch.testing.assert_close(module(x[:, 13:].flip(0), cache=swapped), expected.flip(0))
    with pytest.raises(RuntimeError, match="inference"):
        module(x[:, :3], cache=module.new_cache(2, 20))


def test_a_batch_or_a_sequence_may_be_empty():
    module = made()
    assert module(drawn(n=0)).shape == (2, 0, 12) and module(drawn(batch=0)).shape == (0, 43, 12)


def test_a_block_may_be_made_into_one_by_any_module():
    network = BlockMLP(5, 6)
    assert network(torch.randn(2, 3, 5, 6)).shape == BlockMean()(torch.randn(2, 3, 5, 6)).shape == (2, 3, 6)
    swapped = torch.randn(1, 5, 6)
    assert not torch.allclose(network(swapped), network(swapped.flip(1)))  # it knows a place in the block
    assert isinstance(made(compress=lambda block, d: nn.Sequential(BlockMean())).compress_k, nn.Sequential)


# --- chosen blocks as the op of a module -----------------------------------------------------------------------------


def test_selected_blocks_serve_a_trained_module():
    torch.manual_seed(0)
    module = MultiHeadAttention(12, 2, n_kv_heads=1, causal=True, positions=Rotary(6)).double()
    x = drawn()
    full = module(x)
    module.op = SelectedBlocks(block=4, count=11)
    torch.testing.assert_close(module(x), full)
    module.op = SelectedBlocks(block=4, count=3)
    few = module(x)
    torch.testing.assert_close(few[:, :12], full[:, :12])
    assert not torch.allclose(few[:, 20:], full[:, 20:])
    with torch.no_grad():
        cache = module.new_cache(2, 43)
        parts = [module(part, cache=cache) for part in x.split([10, 1, 1, 20, 11], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), few, atol=1e-12, rtol=0)


def test_selected_blocks_are_the_querys_own_and_those_of_the_highest_mean():
    k = torch.zeros(1, 1, 12, 2, **DOUBLE)
    k[:, :, 3:6, 0] = 1.0  # the second block of four
    q = torch.tensor([1.0, 0.0], **DOUBLE).expand(1, 1, 12, 2)
    v = torch.arange(12.0, **DOUBLE).view(1, 1, 12, 1)
    out = SelectedBlocks(block=3, count=2, scale=0.0)(q, k, v, causal=True)
    assert out[0, 0, 11].item() == pytest.approx((3 + 4 + 5 + 9 + 10 + 11) / 6)
    first = SelectedBlocks(block=3, count=2, first=1, scale=0.0)(q, k, v, causal=True)
    assert first[0, 0, 11].item() == pytest.approx((0 + 1 + 2 + 9 + 10 + 11) / 6)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"n_kv_heads": 3}, "multiple of n_kv_heads"),
        ({"d_head": None, "positions": None, "n_kv_heads": None, "n_heads": 5}, "multiple of n_heads"),
        ({"block": 0}, "block and window must be 1 or more"),
        ({"selected": 2}, "selected must be 3 or more"),
        ({"positions": ALiBi(4)}, "must turn queries and keys"),
        ({"positions": Rotary(8)}, "must be Rotary\\(6\\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(more, said):
    with pytest.raises(ValueError, match=said):
        if "n_heads" in more:
            NativeSparseAttention(12, more.pop("n_heads"))
        made(**more)


def test_bad_input_is_named():
    module, x = made(), drawn()
    with pytest.raises(TypeError, match="x must be"):
        module(None)
    with pytest.raises(ValueError, match=r"x must be \(B, N, 12\)"):
        module(x[..., :5])
    with pytest.raises(TypeError, match="NativeSparseCache"):
        module(x, cache=object())
    with pytest.raises(ValueError, match="max_len must be given"):
        module.new_cache(2)
    with torch.no_grad(), pytest.raises(ValueError, match="this module's own"):
        module(x, cache=module.new_cache(3, 50))
    with pytest.raises(ValueError, match="count must be"):
        choose_blocks(torch.zeros(1, 1, 4, 2), 4, 2, 2)
    with pytest.raises(ValueError, match="scores must be"):
        choose_blocks(torch.zeros(1, 1, 4, 3), 4, 2, 3)
    with pytest.raises(ValueError, match="count more than first"):
        SelectedBlocks(count=1, first=1)
    q, k, v = qkv()
    for more in ({"causal": False}, {"causal": True, "dropout": 0.1}, {"causal": True, "return_weights": True}):
        with pytest.raises(ValueError, match="SelectedBlocks"):
            SelectedBlocks()(q, k, v, **more)
    assert isinstance(module.new_cache(1, 9), NativeSparseCache)
