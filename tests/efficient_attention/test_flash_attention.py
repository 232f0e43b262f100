"""Flash attention as the op of a module, and the claims of the chapter that bears its name."""

import copy
import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nondual.data import BANK
from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.ops import masks
from nondual.ops.attention import attention
from nondual.ops.flash_attention import flash_attention, reference
from nondual.ops.flash_attention import tiles as by_tiles
from nondual.ops.flash_attention import triton as kernels
from nondual.ops.flash_attention.triton import launch
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


@torch.no_grad()
def test_one_query_is_what_flash_attention_gives_it():
    q, k, v = torch.randn(B, H, 1, 8), torch.randn(B, G, 7, 8), torch.randn(B, G, 7, 8)
    torch.testing.assert_close(FlashAttention(scale=0.3)(q, k, v, causal=True), flash_attention(q, k, v, scale=0.3))
    with pytest.raises(ValueError, match="k must have q's width"):
        FlashAttention()(q, k[..., :5], v)


def test_cross_attention():
    plain, flash = pair(impl="auto")
    x, memory = torch.randn(B, 4, E), torch.randn(B, 9, E)
    torch.testing.assert_close(flash(x, memory), plain(x, memory), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options, says", [
    ({"mask": torch.ones(N, N, dtype=torch.bool)}, r"mask must be None .* \(19, 19\), .*attention\.attention"),
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
    import gc
    import sys

    import torch
    import torch.distributed as dist
    import torch.multiprocessing

    from nondual.efficient_attention.flash_attention import FlashAttention
    from nondual.self_attention import MultiHeadAttention


    def train(rank, store, *engines):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        compare(rank, engines)
        gc.collect()  # the wrapper's reducer uses the group while it is freed, so it has to go first
        dist.barrier()
        dist.destroy_process_group()


    def compare(rank, engines):
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


def untiled_in_float32(q, k, v):
    """The control: the textbook's table, whole, in float32 whatever comes in."""
    return textbook(q.float(), k.float(), v.float()).to(q.dtype)


@pytest.mark.claim("A4.2", "holds")
def test_tiles_give_the_textbooks_result_and_float32_inside_gives_half_precision_a_truer_one(layers):
    """Errors in half precision are pooled over the layers: one layer alone may be lucky."""
    for qkv in layers:
        exact = [x.double() for x in qkv]
        truth = textbook(*exact)
        for engine in (tiled, flash_attention):
            assert (engine(*exact) - truth).abs().max() < 1e-13 * truth.abs().max() * 246
    for dtype in (torch.float16, torch.bfloat16):
        errors = {engine: [] for engine in (tiled, untiled_in_float32, flash_attention, textbook)}
        least = []  # what remains if all is exact but the rounding of the output
        for qkv in layers:
            half = [x.to(dtype) for x in qkv]
            truth = textbook(*(x.double() for x in half))
            for engine, found in errors.items():
                found.append((engine(*half) - truth).abs() / truth.abs().max())
            least.append((truth.to(dtype) - truth).abs() / truth.abs().max())
        mean = {engine: torch.cat(found).mean() for engine, found in errors.items()}
        assert mean[tiled] < 0.7 * mean[textbook] and torch.cat(errors[tiled]).max() < torch.cat(errors[textbook]).max()
        assert abs(mean[tiled] / mean[untiled_in_float32] - 1) < 0.01, "it is the precision inside, and not the tiles"
        assert mean[tiled] < 1.01 * torch.cat(least).mean()
        assert mean[flash_attention] < 0.7 * mean[textbook], "torch's fused kernel keeps float32 inside as well"


KERNELS = ("forward", "decode", "combine", "delta", "dq", "dkdv")


class Watched:
    """A kernel that notes, at each launch, its name and how many numbers the largest of its tensors holds."""

    def __init__(self, name, kernel, launched):
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid):
        def start(**given):
            self.launched.append((self.name, max(x.numel() for x in given.values() if isinstance(x, torch.Tensor))))
            return self.kernel[grid](**given)

        return start


def watch_launches(monkeypatch):
    """The list to which every launch from now on adds (kernel, numbers in its largest tensor)."""
    launched = []
    for name in KERNELS:
        attribute = f"{name}_kernel"
        monkeypatch.setattr(launch, attribute, Watched(name, getattr(launch, attribute), launched))
    return launched


PEAKS = """
    import json
    import math
    import multiprocessing
    import resource
    import sys

    import torch

    from nondual.ops.flash_attention import flash_attention

    torch.set_num_threads(1)  # before the forks


    def textbook(q, k, v):
        return ((q / math.sqrt(q.shape[-1])) @ k.mT).softmax(-1) @ v


    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


    def held(case, n):
        case = dict(case)
        more, heads, width = case.pop("more", 0), case.pop("heads", (2, 2)), case.pop("width", (16, 16))
        run = textbook if case.pop("textbook", False) else flash_attention
        gaps = case.pop("gaps", False)
        above = []
        for n in (64, n):  # the first run makes what is made once in a process
            m = max(1, n + more)
            shapes = (heads[0], n, width[0]), (heads[1], m, width[0]), (heads[1], m, width[1])
            given = [torch.randn(1, *shape) for shape in shapes]
            given = [(x.mT.contiguous().mT if gaps else x).requires_grad_() for x in given]
            before = peak()
            out = run(*given, **case)
            out = out[0] + out[1][..., None] if isinstance(out, tuple) else out
            torch.autograd.grad(out.sum(), given)
            above.append(peak() - before)
        return above[1]


    if __name__ == "__main__":
        cases, lengths = json.loads(sys.argv[1])
        flash_attention(*torch.ones(3, 1, 1, 4, 4).requires_grad_(), window=2)  # loads what every case would load
        fork = multiprocessing.get_context("fork")
        peaks = []
        for case in cases:
            peaks.append([])
            for n in lengths:
                with fork.Pool(1) as pool:  # each case in a process of its own
                    peaks[-1].append(pool.apply(held, (case, n)))
        sys.stdout.write(json.dumps(peaks))
"""
TABLE = {"textbook": True, "heads": (1, 1)}


def peaks(run, cases, lengths=(1024, 4096)):
    """MiB that forward and backward hold above their inputs, for each case at each length."""
    return json.loads(run(PEAKS, json.dumps([cases, lengths]), timeout=300).stdout)


@pytest.mark.claim("A4.3", "holds")
def test_no_tensor_of_n_times_n_is_ever_made_by_any_engine(largest, monkeypatch, in_a_process_of_its_own):
    """Forward and backward: the largest tensor is counted, and what torch's own kernel holds is measured."""

    def both_ways(f, n):
        q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))
        return lambda: f(q, k, v).sum().backward()

    for n in (256, 512):
        assert largest(both_ways(textbook, n)) == n * n
        assert largest(both_ways(tiled, n)) == max(8 * n, 32 * 32)

    # "auto" on a CPU where it walks the tiles itself: a window, or causality with more keys than queries.
    n, m, d, tile = 1024, 1100, 8, by_tiles.TILE
    q, k, v = (torch.randn(1, 2 if rows == n else 1, rows, d) for rows in (n, m, m))
    for window, bound in ((16, tile * (tile + 16)), (0, tile * (m + tile))):
        assert largest(lambda: by_tiles.forward(q, k, v, window, 0.3)) <= max(bound, 2 * m * d)  # noqa: B023
        assert largest(lambda: by_tiles.backward(q, q, k, v, window, 0.3)) <= 2 * bound < 2 * n * m / 3  # noqa: B023

    # The kernels: every tensor that a launch is handed, to read from or to write to.
    on = "cpu" if kernels.INTERPRETED else "cuda"
    n, m, d, launched = 96, 112, 4, watch_launches(monkeypatch)
    for options in ({}, {"causal": True}, {"window": 16}):
        q, k, v = (torch.randn(1, h, rows, d, device=on, requires_grad=True) for h, rows in ((2, n), (1, m), (1, m)))
        flash_attention(q, k, v, impl="triton", **options).sum().backward()
    with torch.no_grad():
        few, k, v = (torch.randn(1, h, rows, d, device=on) for h, rows in ((2, 1), (1, 1024), (1, 1024)))
        flash_attention(few, k, v, impl="triton")
    assert {name for name, _ in launched} == set(KERNELS)
    assert max(numbers for name, numbers in launched if name not in ("decode", "combine")) == 2 * n * d < n * m / 10
    assert max(numbers for name, numbers in launched if name in ("decode", "combine")) == 1024 * d, "the keys"

    # What a process holds: a table is sixteen times as large where N is four times as large.
    grouped = {"heads": (2, 1)}
    cases = [TABLE, {}, {"causal": True, **grouped}, {"causal": True, **grouped, "more": 300}]
    cases += [{"causal": True, **grouped, "more": -300}, {"window": 16, **grouped}, {"window": 16, "more": 300}]
    cases += [{"width": (16, 24)}, {"gaps": True}, {"return_lse": True}, {"impl": "reference", **grouped, "more": 300}]
    (short, long), *ours = peaks(in_a_process_of_its_own, cases)
    assert long > 8 * short and long > 2 * 4096**2 * 4 / 2**20  # a process holds some MiB besides its table
    for case, (short, long) in zip(cases[1:], ours, strict=True):
        assert long < 6 * short + 4, f"{case}: {short:.1f} and {long:.1f} MiB"


def saved(f, n, d):
    """How many numbers the forward pass keeps for the backward pass."""
    held = {}

    def keep(x):
        held[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        f(*(torch.randn(1, 1, n, d, requires_grad=True) for _ in range(3)))
    return sum(held.values())


@pytest.mark.claim("A4.4", "holds if")
def test_memory_is_linear_and_the_gain_in_speed_is_below_two_here_and_above_four_there(in_a_process_of_its_own):
    """Memory measured now, and memory and time as the benchmark measured them on a CPU."""
    wide = {"width": (64, 64), "heads": (1, 1)}
    cases = [{"textbook": True, **wide}, wide, {"causal": True, **wide}, {"impl": "reference", **wide}]
    (short, long), *ours = peaks(in_a_process_of_its_own, cases)
    assert long > 8 * short  # twice what a linear memory would allow
    for case, (short, long) in zip(cases[1:], ours, strict=True):
        assert long < 6 * short + 1, f"{case}: {short:.1f} and {long:.1f} MiB"
    assert saved(textbook, 1024, 64) > 3 * saved(textbook, 512, 64)
    for f in (flash_attention, tiled):
        assert saved(f, 1024, 64) <= 2 * saved(f, 512, 64), "kept for the backward pass"

    run = json.loads((MEASURED / "flash_attention_cpu.json").read_text())["figures"]["cases"]
    kinds = [(backward, causal) for backward in (False, True) for causal in (False, True)]
    cases = {(c["engine"], c["backward"], c["causal"]): c for c in run}
    assert set(cases) == {(e, *kind) for e in ("textbook", "auto", "reference", "fused") for kind in kinds}
    for (engine, _, _), case in cases.items():
        assert case["n"] == [256, 512, 1024, 2048, 4096, 8192]
        assert case["memory_slope"] > 1.9 if engine == "textbook" else case["memory_slope"] < 1.1
    ratios = {kind: cases["auto", *kind]["times_as_fast"] for kind in kinds}
    assert all(ratio[0] < 2 for ratio in ratios.values()), "at the shortest length it is below two"
    assert all(ratios[False, causal][-1] > 4 for causal in (False, True)), "forward, at the longest, above four"
    assert all(ratio > 1 for rows in ratios.values() for ratio in rows), "faster at every length"
    assert all(2 <= ratio <= 4 for ratio in ratios[True, False][2:]), "forward and backward, from 1,024 on: within"
    assert all(cases["auto", backward, True]["low"][-1] > 4 for backward in (False, True)), (
        "with causality, every round"
    )
    for kind in kinds:  # "auto" is torch's fused kernel here, but for what the call itself takes
        fused = cases["fused", *kind]
        assert cases["auto", *kind]["peak_mib"][-1] < 1.1 * fused["peak_mib"][-1]
        assert ratios[kind][-1] > 0.7 * fused["times_as_fast"][-1]
    tiles = {kind: cases["reference", *kind]["times_as_fast"] for kind in kinds}  # the same without a compiled kernel
    assert all(tile[0] < 1 for tile in tiles.values()), "slower at the shortest length"
    assert all((tiles[kind][-1] > 1) == (kind != (True, False)) for kind in kinds), "faster at the longest, but for one"
    assert max(tiles[True, False]) < 1


@pytest.mark.claim("A4.5", "holds if")
def test_it_moves_and_holds_far_fewer_numbers_and_multiplies_no_fewer():
    """Multiplications, by torch's count: equal forward, a quarter more backward. Numbers moved and held: far fewer."""
    n, d = 512, 32

    def counted(f):
        q, k, v = (torch.randn(1, 1, n, d, requires_grad=True) for _ in range(3))
        with FlopCounterMode(display=False) as forward:
            out = f(q, k, v)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    assert counted(textbook) == (4 * n * n * d, 8 * n * n * d)
    assert counted(tiled) == (4 * n * n * d, 10 * n * n * d)
    hidden, _ = counted(lambda *qkv: tiled(*qkv, causal=True))
    assert 2 * n * n * d < hidden < 2.2 * n * n * d, "with causality, tiles that the mask hides are skipped"
    assert saved(textbook, n, d) >= n * n + 3 * n * d
    assert saved(tiled, n, d) == 4 * n * d + 2 * n, "q, k, v, the output, and two numbers a row"

    count = reference.Count()
    q, k, v = (torch.randn(1, 1, n, d, requires_grad=True) for _ in range(3))
    out = reference.flash_attention(q, k, v, tile=(128, 128), count=count)[0]
    table = 4 * n * n + 4 * n * d  # the textbook writes and reads scores, then weights; and reads q, k, v, writes out
    assert count.scores == n * n
    assert (count.loaded + count.stored) < table / 5
    forward = count.loaded + count.stored
    for width in (64, 128):  # a constant factor, which comes near 2 * 128 / D from below as N grows
        factors = []
        for length in (512, 1024, 2048):
            few, q1, k1, v1 = reference.Count(), *torch.randn(3, 1, 1, length, width)
            reference.flash_attention(q1, k1, v1, tile=(128, 128), count=few)
            factors.append((4 * length * length + 4 * length * width) / (few.loaded + few.stored))
        assert factors == sorted(factors) and 0.85 * 256 / width < factors[-1] < 256 / width
    out.sum().backward()
    table = 7 * n * n + 8 * n * d  # P is read for dV; dP written; P and dP read, dS written; dS read for dQ and for dK
    assert (count.loaded + count.stored - forward) < table / 2


@pytest.mark.claim("A4.18", "holds")
def test_forward_is_one_kernel_that_stores_its_result_alone_and_backward_is_three(monkeypatch):
    """Launches and numbers stored are counted here; shared memory is what the compiler reported for four chips."""
    given = inspect.signature(kernels.forward_kernel.fn).parameters
    assert "constexpr" in str(given["D"]) and "constexpr" not in str(given["n"]) + str(given["m"]), "compiled for any N"
    launched = watch_launches(monkeypatch)
    moved = {"load": 0, "store": 0}
    if kernels.INTERPRETED:
        from triton.runtime.interpreter import interpreter_builder

        builder = type(interpreter_builder)
        load, store = builder.create_masked_load, builder.create_masked_store

        def counted_load(self, ptrs, mask, *rest):
            moved["load"] += int(mask.data.sum())
            return load(self, ptrs, mask, *rest)

        def counted_store(self, ptrs, value, mask, *rest):
            moved["store"] += int(mask.data.sum())
            return store(self, ptrs, value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(builder, "create_masked_store", counted_store)

    def names():
        found = [name for name, _ in launched]
        launched.clear()
        return found

    on = "cpu" if kernels.INTERPRETED else "cuda"
    n, d = 96, 16
    q, k, v = (torch.randn(1, 1, n, d, device=on, requires_grad=True) for _ in range(3))
    out = flash_attention(q, k, v, impl="triton")
    assert names() == ["forward"]
    if kernels.INTERPRETED:
        rows = kernels.configuration("forward", "sm_90", d, d, q.dtype)["BLOCK_Q"]
        assert moved["store"] == n * d + 2 * n, "the output, and two numbers a row from which the weights come back"
        assert moved["load"] == n * d + math.ceil(n / rows) * 2 * n * d, "K and V once for each tile of queries"
    out.sum().backward()
    assert names() == ["delta", "dq", "dkdv"]
    with torch.no_grad():
        few, k, v = (torch.randn(1, 1, rows, d, device=on) for rows in (1, 1024, 1024))
        flash_attention(few, k, v, impl="triton")
    assert names() == ["decode", "combine"], "few queries over many keys: parts, then a kernel that joins them"

    limits = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB that one block may take
    report = json.loads((MEASURED / "flash_attention_compile.json").read_text())["figures"]
    forward = {name: chips for name, chips in report.items() if name.startswith("forward ")}
    assert len(forward) > 10
    for chips in forward.values():
        assert set(chips) == set(limits)
        assert all(0 < chips[chip]["shared"] <= 1024 * limits[chip] and chips[chip]["spills"] == 0 for chip in limits)


def test_another_op_takes_what_flash_attention_does_not():
    """With `otherwise` a mask, a dropout and the weights are had from it; all else stays with the flash kernels."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    op, mask = FlashAttention(scale=0.3, otherwise=attention), torch.ones(7, 7, dtype=torch.bool).tril(-1)
    torch.testing.assert_close(op(q, k, v, mask=mask), attention(q, k, v, mask=mask, scale=0.3))
    torch.testing.assert_close(op(q, k, v, causal=True), attention(q, k, v, causal=True, scale=0.3))
    out, weights = op(q, k, v, causal=True, return_weights=True)
    torch.testing.assert_close(weights @ v, out)
    called = []
    op = FlashAttention(otherwise=lambda *args, **more: called.append(more))
    op(q, k, v)
    assert not called
    op(q, k, v, dropout=0.1)
    assert called == [dict(mask=None, causal=False, dropout=0.1, return_weights=False)]
    with pytest.raises(ValueError, match="otherwise must be None with a window, which it does not know"):
        FlashAttention(window=3, otherwise=attention)
