"""Patterns of sparse attention, the op of a module, how far influence travels, and the claims of the chapter."""

import json
import math
from pathlib import Path

import pytest
import torch

from nondual.efficient_attention.sparse_attention import (
    SparseAttention,
    blocks,
    causal,
    fixed,
    global_tokens,
    layers_to_reach_all,
    local,
    random_blocks,
    reach,
    sinks,
    strided,
    work,
)
from nondual.ops import masks
from nondual.ops.attention import attention
from nondual.ops.flash_attention import flash_attention
from nondual.ops.sparse_attention import BlockMask
from nondual.self_attention import MultiHeadAttention

MEASURED = Path(__file__).parents[2] / "docs/measured"

PATTERNS = {
    "local": local(7),
    "local, dilated": local(4, dilation=3),
    "local, both sides": local(5, causal=False),
    "strided": strided(5),
    "strided, both sides": strided(5, causal=False),
    "fixed": fixed(6, 2),
    "fixed, both sides": fixed(6, causal=False),
    "blocks": blocks(9),
    "global": local(4) | global_tokens(2),
    "listed global": local(4) | global_tokens([3, 11]),
    "global, both sides": local(4, causal=False) | global_tokens([3, 11], causal=False),
    "sinks": local(4) | sinks(2),
    "random": random_blocks(2, size=5),
    "random, both sides": random_blocks(2, seed=3, size=5, causal=False),
    "three parts": local(4) | global_tokens(1) | random_blocks(1, size=8),
    "both": strided(5) & local(13),
    "all before": causal(),
}

# --- patterns --------------------------------------------------------------------------------------------------------


def drawn(pattern, n, m=None):
    return ["".join("01"[x] for x in row) for row in pattern.mask(n, m).int().tolist()]


@pytest.mark.parametrize("pattern, picture", [
    (local(3), "10000 11000 11100 01110 00111"),
    (local(2, dilation=2), "10000 01000 10100 01010 00101"),
    (local(2, causal=False), "11000 11100 01110 00111 00011"),
    (strided(3), "1000000 1100000 1110000 1111000 0111100 0011110 1001111"),
    (fixed(3), "100000 110000 111000 001100 001110 001111"),
    (fixed(3, 2), "100000 110000 111000 011100 011110 011111"),
    (blocks(2), "1000 1100 0010 0011"),
    (global_tokens(1), "1000 1000 1000 1000"),
    (global_tokens([2]), "0000 0000 1110 0010"),
    (global_tokens([2], causal=False), "0010 0010 1111 0010"),
    (sinks(1), "1000 1000 1000"),
])  # fmt: skip
def test_patterns_by_hand(pattern, picture):
    """The pictures of their docstrings."""
    rows = picture.split()
    assert drawn(pattern, len(rows), len(rows[0])) == rows or drawn(pattern, len(rows[0]))[: len(rows)] == rows


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("n, m", [(40, 40), (7, 33), (1, 20)])
def test_the_tiles_of_a_pattern_are_those_of_its_mask(name, n, m):
    """A BlockMask asks only where the pattern's spans say, and misses nothing."""
    pattern = PATTERNS[name]
    for block in (4, (8, 3)):
        kept, by_mask = pattern.block_mask(n, m, block), BlockMask.from_mask(pattern.mask(n, m), block)
        assert torch.equal(kept.mask()[0, 0], pattern.mask(n, m))
        assert torch.equal(kept.columns, by_mask.columns) and torch.equal(kept.row_start, by_mask.row_start)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_longer_sequence_keeps_the_rows_of_a_shorter_one(name):
    """Decoding sees what reading the whole sees, if no pattern changes while the sequence grows."""
    pattern = PATTERNS[name]
    assert pattern.causal == ("both sides" not in name)
    if pattern.causal:
        assert not pattern.mask(40).triu(1).any()
        assert torch.equal(pattern.mask(3, 25), pattern.mask(40)[22:25, :25])


def test_patterns_combine():
    near, far = local(4), sinks(2)
    assert torch.equal((near | far).mask(20), near.mask(20) | far.mask(20))
    assert torch.equal((near & far).mask(20), near.mask(20) & far.mask(20))
    assert (near | far).name == "local(4) | sinks(2)" and (
        (near | far) & causal()
    ).name == "(local(4) | sinks(2)) & causal"
    both = local(3, causal=False) & causal()
    assert both.causal and torch.equal(both.mask(20), local(3).mask(20))
    assert torch.equal(local(9).mask(30), masks.sliding_window(30, window=9))
    assert torch.equal(causal().mask(30), masks.causal(30))


def test_random_blocks_are_drawn_by_the_seed_alone():
    one, two = (random_blocks(2, seed=seed, size=8).mask(400) for seed in (0, 1))
    assert torch.equal(one, random_blocks(2, seed=0, size=8).mask(400)) and not torch.equal(one, two)
    rows = one[:, ::8].sum(1)  # blocks that a query sees
    assert rows[:8].eq(1).all() and rows[80:].float().mean() > 1.5
    columns = one[::8, ::8].float().sum(0)
    assert columns.max() < 12  # of 50 rows that draw two each: no block is drawn by most of them


@pytest.mark.parametrize("make, says", [
    (lambda: local(0), "window must be an integer of 1 or more, got 0"),
    (lambda: local(4, dilation=0), "dilation must be an integer of 1 or more"),
    (lambda: strided(2.0), "stride must be an integer of 1 or more, got 2.0"),
    (lambda: fixed(4, 5), "summary must be at most the stride 4, got 5"),
    (lambda: blocks(True), "size must be an integer"),
    (lambda: global_tokens(0), "which must be an integer of 1 or more"),
    (lambda: sinks(-1), "count must be an integer of 1 or more"),
    (lambda: random_blocks(0), "count must be an integer of 1 or more"),
    (lambda: reach(torch.ones(3, 4).bool(), 1), "mask must be square"),
    (lambda: reach(torch.ones(3, 3).bool(), -1), "layers must be 0 or more, got -1"),
])  # fmt: skip
def test_what_a_pattern_cannot_be(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# --- the op of a module ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
def test_a_module_with_the_op_is_one_with_the_mask(name):
    """Forward and backward, grouped heads."""
    pattern = PATTERNS[name]
    torch.manual_seed(0)
    ours = MultiHeadAttention(24, 4, n_kv_heads=2, op=SparseAttention(pattern, block=8))
    plain = MultiHeadAttention(24, 4, n_kv_heads=2)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 37, 24)
    results = []
    for module, options in ((ours, {}), (plain, {"mask": pattern.mask(37)})):
        y = module(x, **options)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_a_causal_module_looks_back_only_whatever_the_pattern():
    torch.manual_seed(0)
    module = MultiHeadAttention(16, 2, op=SparseAttention(local(5, causal=False), block=8), causal=True)
    back = MultiHeadAttention(16, 2, op=SparseAttention(local(5), block=8))
    back.load_state_dict(module.state_dict())
    x = torch.randn(1, 30, 16)
    torch.testing.assert_close(module(x), back(x))
    assert not torch.allclose(module(x, causal=False), back(x))


@pytest.mark.parametrize("name", [name for name, pattern in PATTERNS.items() if pattern.causal])
@pytest.mark.parametrize("steps", [[1] * 29, [11, 1, 1, 7, 9]])
def test_decoding_with_a_cache_is_reading_the_whole(name, steps):
    torch.manual_seed(0)
    module = MultiHeadAttention(16, 4, n_kv_heads=2, op=SparseAttention(PATTERNS[name], block=8)).requires_grad_(False)
    x = torch.randn(2, 29, 16)
    whole, cache, parts = module(x), module.new_cache(2, 29), []
    for part in x.split(steps, 1):
        parts.append(module(part, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)


def test_one_query_reads_no_key_that_it_does_not_see():
    q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8)
    k[:, :, 2:46] = v[:, :, 2:46] = torch.nan
    out = SparseAttention(local(4) | sinks(2))(q, k, v)
    assert out.isfinite().all()
    torch.testing.assert_close(out, SparseAttention(local(4) | sinks(2), impl="tiles", block=2)(q, k, v))


@pytest.mark.parametrize("options, says", [
    ({"mask": torch.ones(5, 5).bool()}, r"mask must be None for sparse attention.*got a mask \(5, 5\); for that use"),
    ({"dropout": 0.1}, "dropout must be 0 for sparse attention"),
    ({"return_weights": True}, "return_weights must be False for sparse attention"),
])  # fmt: skip
def test_what_the_op_cannot_do(options, says):
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=says):
        SparseAttention(local(3))(q, q, q, **options)


def test_an_exported_module_serves_every_length():
    torch.manual_seed(0)
    module = MultiHeadAttention(16, 2, op=SparseAttention(local(5) | sinks(2), block=8)).eval()
    n = torch.export.Dim("n", min=2, max=100)
    program = torch.export.export(module, (torch.randn(1, 20, 16),), dynamic_shapes=({1: n},), strict=False).module()
    for length in (2, 7, 50):
        x = torch.randn(1, length, 16)
        torch.testing.assert_close(program(x), module(x), atol=1e-5, rtol=1e-4)


@pytest.mark.timeout(400)  # torch's compiler on a busy machine
def test_a_compiled_module_for_two_lengths():
    torch.manual_seed(0)
    module = MultiHeadAttention(16, 2, op=SparseAttention(local(5) | sinks(2), block=8))
    compiled = torch.compile(module, backend="aot_eager")
    for length in (20, 33):
        x = torch.randn(1, length, 16)
        torch.testing.assert_close(compiled(x), module(x), atol=1e-5, rtol=1e-4)


# --- how far influence travels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [2, 3, 7])
@pytest.mark.parametrize("layers", [0, 1, 2, 5])
def test_a_window_reaches_further_by_as_much_in_every_layer(window, layers):
    """After L layers a position depends on the last L (w - 1) + 1."""
    reached = reach(local(window).mask(40), layers)
    assert torch.equal(reached, masks.sliding_window(40, window=layers * (window - 1) + 1))
    assert layers_to_reach_all(local(window).mask(40)) == math.ceil(39 / (window - 1))


@pytest.mark.parametrize("pattern, layers", [
    (strided(6), 2), (fixed(6), 2), (fixed(6, 3), 2), (causal(), 1), (blocks(6), None), (sinks(2), None),
    (local(4) | sinks(2), 13), (local(3, causal=False) | global_tokens(1, causal=False), 2),
    (local(4, dilation=2), None), (local(4, dilation=2) | local(2), 8),
])  # fmt: skip
def test_after_how_many_layers_all_have_reached_all(pattern, layers):
    """Strided and fixed patterns need two; between blocks nothing ever passes."""
    mask = pattern.mask(40)
    assert layers_to_reach_all(mask) == layers
    assert layers_to_reach_all(pattern.block_mask(40, block=8)) == layers
    if layers:
        wanted = masks.causal(40) if pattern.causal else torch.ones(40, 40).bool()
        assert torch.equal(reach(mask, layers), wanted) and not torch.equal(reach(mask, layers - 1), wanted)


def depends(run, n, width):
    """Which inputs each output depends on, (N, N) bool: derivatives that are not exactly 0."""
    x = torch.randn(1, n, width, dtype=torch.float64, requires_grad=True)
    y = run(x)
    rows = [torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)[0][0].abs().sum(-1) > 0 for i in range(n)]
    return torch.stack(rows)


@pytest.mark.parametrize(
    "pattern", [local(4), strided(5), fixed(6), blocks(6), local(3) | sinks(1)], ids=lambda p: p.name
)
def test_reach_is_what_gradients_show(pattern):
    """Layers with a path around attention, as in a transformer."""
    torch.manual_seed(0)
    layers = [MultiHeadAttention(8, 2, op=SparseAttention(pattern, block=4)).double() for _ in range(3)]

    def run(x, count):
        for layer in layers[:count]:
            x = x + layer(x)
        return x

    for count in (1, 2, 3):
        assert torch.equal(depends(lambda x, count=count: run(x, count), 24, 8), reach(pattern.mask(24), count))


# --- claims ----------------------------------------------------------------------------------------------------------


@pytest.mark.claim("A4.7", "holds")
def test_a_pattern_decides_which_relations_are_computed():
    """A pair outside has no effect at all, a pair inside has one; and what is computed is as much as the pattern keeps:
    counted, and measured on a CPU."""
    torch.manual_seed(0)
    for pattern in (
        local(6),
        strided(5),
        blocks(8),
        fixed(6, 2),
        local(4) | global_tokens(1) | random_blocks(1, size=4),
    ):
        q, k, v = (torch.randn(1, 1, 32, 8) for _ in range(3))
        out = SparseAttention(pattern, block=4)(q, k, v)
        torch.testing.assert_close(out, attention(q, k, v, mask=pattern.mask(32)), atol=1e-5, rtol=1e-5)
        layer = MultiHeadAttention(8, 2, op=SparseAttention(pattern, block=4)).double()
        assert torch.equal(depends(layer, 20, 8), pattern.mask(20))

    def count(make, n):
        return work(make(n).block_mask(n, block=32), 64)

    for n in (1024, 2048, 4096):
        window, steps = count(lambda n: local(128), n), count(lambda n: strided(math.isqrt(n) // 32 * 32), n)
        assert window.allowed == n * 128 - 128 * 127 // 2 <= window.computed < 1.3 * window.allowed
        assert window.flops == 4 * 64 * window.computed
        assert steps.allowed < 2 * n * (math.isqrt(n) + 32)  # of the order of N √N
    twice = count(lambda n: local(128), 4096).computed / count(lambda n: local(128), 2048).computed
    assert 1.9 < twice < 2.1

    run = json.loads((MEASURED / "sparse_cpu.json").read_text())["figures"]
    longest = [case for case in run["cases"] if case["n"] == 8192]
    assert all(case["of_ideal"]["high"] < 1.3 and case["of_causal"]["high"] < 0.6 for case in longest)
    assert all(case["of_dense_mask"]["high"] < 0.3 for case in longest)
    memory = [case["peak_mib"] for case in longest]
    assert all(held["tiles"] < 1.1 * held["all pairs"] for held in memory)
    assert all(case["seconds"]["dense mask"] > case["seconds"]["all pairs"] for case in longest)
    assert len(longest) >= 12 and all(rate < 2.4 for rate in run["window"]["growth"])


@pytest.mark.claim("A4.8", "holds if")
def test_what_is_left_out_has_no_influence_in_one_layer_and_some_through_several():
    """Not periphery but nothing, in one layer; more weight on what is kept; and with depth the rest returns, unless no
    path leads there. What is chosen depends on positions alone."""
    torch.manual_seed(0)
    window, n = local(6), 32
    layers = [MultiHeadAttention(8, 2, op=SparseAttention(window, block=8)).double() for _ in range(7)]
    x = torch.randn(1, n, 8, dtype=torch.float64, requires_grad=True)
    y, first = x, []
    for layer in layers:
        y = y + layer(y)
        (slope,) = torch.autograd.grad(y[0, -1].sum(), x, retain_graph=True)
        first.append(slope[0].norm(dim=-1))
    assert (first[0][: n - 6] == 0).all() and (first[0][n - 6 :] > 0).all()
    assert (first[6] > 0).all() and layers_to_reach_all(window.mask(n)) == 7
    assert layers_to_reach_all(blocks(8).mask(n)) is None

    q, k, v = (torch.randn(1, 2, n, 8) for _ in range(3))
    weights = [attention(q, k, v, mask=p.mask(n), return_weights=True)[1] for p in (window, causal())]
    inside = window.mask(n).expand_as(weights[0])
    assert (weights[0] >= weights[1] - 1e-7)[inside].all() and not weights[0][~inside].any()

    run = json.loads((MEASURED / "sparse_patterns.json").read_text())["figures"]["influence"]  # in SmolLM2
    full, narrow = run["full"], run["window 128, 4 sinks"]
    assert (
        not any(narrow["one layer: outside the pattern, moved"])
        and min(narrow["places past the window with influence"]) > 600
    )
    assert 0.05 < max(narrow["share past the window"]) < min(full["share past the window"])
    assert max(narrow["moved by a block"]["352"]) < 0.1 * min(full["moved by a block"]["352"])


def test_a_window_by_the_op_is_flash_attentions():
    q, k, v = (torch.randn(1, 2, 200, 16) for _ in range(3))
    torch.testing.assert_close(
        SparseAttention(local(33))(q, k, v), flash_attention(q, k, v, window=33), atol=1e-5, rtol=1e-5
    )
