"""Flash attention as the op of a module, and the claims of the chapter that bears its name."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nondual.data import BANK
from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.ops import masks
from nondual.ops.flash_attention import reference
from nondual.ops.flash_attention import triton as kernels
from nondual.pretrained import minilm
from nondual.self_attention import KVCache, MultiHeadAttention

B, N, E, H, G = 2, 19, 48, 6, 3
IMPLS = ["auto", "reference", *(["triton"] if kernels.INTERPRETED else [])]


def pair(**options):
    """One module twice: with plain attention, and with flash attention."""
    torch.manual_seed(0)
    plain = MultiHeadAttention(E, H, n_kv_heads=G)
    flash = copy.deepcopy(plain)
    flash.op = FlashAttention(**options)
    return plain, flash


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_module_is_the_same_forward_and_backward(impl, causal):
    plain, flash = pair(impl=impl)
    x = torch.randn(B, N, E)
    one, two = plain(x, causal=causal), flash(x, causal=causal)
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)
    one.square().sum().backward()
    two.square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), flash.parameters()):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_window_is_a_mask_of_the_last_positions(impl):
    plain, flash = pair(impl=impl, window=5)
    x = torch.randn(B, N, E)
    expected = plain(x, mask=masks.sliding_window(N, window=5))
    torch.testing.assert_close(flash(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flash(x, causal=True), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window", [None, 4])
@torch.no_grad()
def test_token_by_token_is_the_whole_sequence(impl, window):
    _, flash = pair(impl=impl, window=window)
    x, cache = torch.randn(B, 7, E), KVCache(B, G, 7, E // H)
    steps = [flash(x[:, a:b], causal=True, cache=cache) for a, b in ((0, 3), (3, 4), (4, 5), (5, 7))]
    torch.testing.assert_close(torch.cat(steps, 1), flash(x, causal=True), atol=1e-5, rtol=1e-5)


def test_cross_attention():
    plain, flash = pair(impl="auto")
    x, memory = torch.randn(B, 4, E), torch.randn(B, 9, E)
    torch.testing.assert_close(flash(x, memory), plain(x, memory), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options, says", [
    ({"mask": torch.ones(N, N, dtype=torch.bool)}, r"mask must be None .* \(19, 19\); .*attention\.attention"),
    ({"return_weights": True}, "return_weights must be False"),
])  # fmt: skip
def test_what_needs_the_weights_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        pair()[1](torch.randn(B, N, E), **options)


def test_dropout_is_refused_while_training_only():
    module = MultiHeadAttention(E, H, dropout=0.1, op=FlashAttention())
    with pytest.raises(ValueError, match=r"dropout must be 0 .* got 0\.1"):
        module(torch.randn(B, N, E))
    assert module.eval()(torch.randn(B, N, E)).shape == (B, N, E)


TWO_RANKS = """
    import sys

    import torch
    import torch.distributed as dist
    import torch.multiprocessing

    from nondual.efficient_attention.flash_attention import FlashAttention
    from nondual.self_attention import MultiHeadAttention


    def train(rank, store, *engines):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        x = torch.randn(2, 19, 48, generator=torch.Generator().manual_seed(0))
        for impl in engines:
            torch.manual_seed(1)
            module = MultiHeadAttention(48, 6, n_kv_heads=3, op=FlashAttention(impl=impl))
            module(x).sum().backward()
            expected = [p.grad / 2 for p in module.parameters()]
            module.zero_grad()

            wrapped = torch.nn.parallel.DistributedDataParallel(module)
            wrapped(x[rank : rank + 1]).sum().backward()
            for parameter, right in zip(module.parameters(), expected):
                torch.testing.assert_close(parameter.grad, right, atol=1e-4, rtol=1e-4)
            sys.stdout.write(f"rank {rank}, {impl}: right\\n")
            del wrapped  # before its process group: its reducer uses the group while it is freed
        dist.destroy_process_group()


    if __name__ == "__main__":
        torch.multiprocessing.spawn(train, sys.argv[1:], nprocs=2)
"""


def test_distributed_data_parallel_averages_the_gradients_of_two_ranks(tmp_path, in_a_process_of_its_own):
    """Each rank sees one of two sequences, and every parameter gets the gradient of the whole batch, halved."""
    ran = in_a_process_of_its_own(TWO_RANKS, tmp_path / "store", *IMPLS, timeout=180)
    assert sorted(ran.stdout.splitlines()) == sorted(f"rank {rank}, {impl}: right" for rank in (0, 1) for impl in IMPLS)


# --- the chapter's claims --------------------------------------------------------------------------------

MEASURED = Path(__file__).parents[2] / "docs/measured"
TILE = (32, 32)


def textbook(q, k, v):
    """The table and all: three lines, every step in the dtype of its input."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ v


@pytest.fixture(scope="module")
def layers():
    """Queries, keys and values of five trained layers on a real text of 246 tokens, each (1, 12, 246, 32)."""
    encoder = minilm()
    states = encoder.layers([" ".join(BANK["river"])])[0]
    mixers = [layer.mixer for layer in encoder.model.encoder.layers][:5]
    return [
        [p(x).detach().unflatten(-1, (12, 32)).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
        for mixer, x in zip(mixers, states)
    ]


def tiled(q, k, v, **more):
    return reference.flash_attention(q, k, v, scale=1 / math.sqrt(q.shape[-1]), tile=TILE, **more)[0]


@pytest.mark.claim("A4.2", "holds")
def test_tiles_give_the_textbooks_result_and_in_half_precision_a_truer_one(layers):
    """Errors in half precision are pooled over the layers: one layer alone may be lucky."""
    for qkv in layers:
        exact = [x.double() for x in qkv]
        truth = textbook(*exact)
        assert (tiled(*exact) - truth).abs().max() < 1e-13 * truth.abs().max() * 246
    for dtype in (torch.float16, torch.bfloat16):
        ours, theirs = [], []
        for qkv in layers:
            half = [x.to(dtype) for x in qkv]
            truth = textbook(*(x.double() for x in half))
            for f, errors in ((tiled, ours), (textbook, theirs)):
                errors.append((f(*half) - truth).abs() / truth.abs().max())
        ours, theirs = torch.cat(ours), torch.cat(theirs)
        assert ours.mean() < 0.7 * theirs.mean() and ours.max() < theirs.max()


@pytest.mark.claim("A4.3", "holds")
def test_no_tensor_of_n_times_n_is_ever_made(largest):
    """Forward and backward: the largest tensor grows with N for the tiles and with its square for the textbook."""

    def both_ways(f, n):
        q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))
        return lambda: f(q, k, v).sum().backward()

    for n in (256, 512):
        assert largest(both_ways(textbook, n)) == n * n
        assert largest(both_ways(tiled, n)) == max(8 * n, 32 * 32)


@pytest.mark.claim("A4.5", "does not hold")
def test_the_work_is_not_less_it_is_more_and_what_is_saved_is_traffic():
    """Multiplications counted by torch: the same forward, a quarter more backward. Numbers moved: far fewer."""
    n, d = 256, 32

    def flops(f):
        q, k, v = (torch.randn(1, 1, n, d, requires_grad=True) for _ in range(3))
        with FlopCounterMode(display=False) as forward:
            out = f(q, k, v)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    assert flops(textbook) == (4 * n * n * d, 8 * n * n * d)
    assert flops(tiled) == (4 * n * n * d, 10 * n * n * d)

    count = reference.Count()
    q, k, v = (torch.randn(1, 1, n, d) for _ in range(3))
    reference.flash_attention(q, k, v, tile=(128, 128), count=count)
    table = 4 * n * n + 4 * n * d  # the textbook writes and reads scores, then weights; and reads q, k, v, writes out
    assert count.scores == n * n
    assert (count.loaded + count.stored) < table / 4


@pytest.mark.claim("A4.4", "holds if")
def test_memory_is_linear_and_the_speed_up_is_no_one_number():
    """As measured on a CPU: the slopes of memory, and ratios to the textbook both inside two to four and outside."""
    cases = json.loads((MEASURED / "flash_attention_cpu.json").read_text())["figures"]["cases"]
    slopes = {engine: [c["memory_slope"] for c in cases if c["engine"] == engine] for engine in ("textbook", "sdpa")}
    assert min(slopes["textbook"]) > 1.8 and max(slopes["sdpa"]) < 1.2
    ratios = [ratio for c in cases if c["engine"] == "textbook" for ratio in c["over_sdpa"]]
    assert any(2 <= ratio <= 4 for ratio in ratios) and not all(2 <= ratio <= 4 for ratio in ratios)
