"""torch's own attention one tile of queries at a time: the tiles, the error, the memory and the time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flash_cases import allowed, check, made

from nondual.ops.flash_attention import flash_attention
from nondual.ops.flash_attention import tiles as by_tiles

SRC = Path(__file__).parents[2] / "src"
pytestmark = pytest.mark.usefixtures("poisoned")


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
