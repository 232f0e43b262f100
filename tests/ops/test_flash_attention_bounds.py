"""Which tiles flash attention visits, by brute force over every small length, window and tile."""

from itertools import product

import pytest
import torch
from whole_numbers import ANYTHING, visits

from nondual.ops import masks
from nondual.ops.flash_attention import reference
from nondual.ops.flash_attention.triton import backward, forward, launch, primitives, tiles

LENGTHS = range(1, 10)
WINDOWS = (0, 1, 2, 3, 5, 8, 11)
TILES = ((1, 1), (2, 2), (2, 3), (3, 2), (4, 2), (2, 4), (4, 4))


def seen_by(n: int, m: int, causal: bool, window: int) -> torch.Tensor:
    """The mask of `nondual.ops.masks` that these options mean."""
    if window:
        return masks.sliding_window(n, m, window=window)
    return masks.causal(n, m) if causal else torch.ones(n, m, dtype=torch.bool)


def check_tiles(seen: torch.Tensor, tiles: list[tuple[range, range, bool]], where) -> None:
    """Every visible pair in one visited tile; no tile without a visible pair; masked just where it has to be.

    Args:
        seen: (rows, columns), True where visible.
        tiles: rows and columns of each visited tile, as far as the tile reaches, and whether it is masked.
        where: said with a failure.
    """
    left = seen.clone()
    for rows, columns, masked in tiles:
        inside = 0 <= columns.start and columns.stop <= seen.shape[1]
        assert 0 <= columns.start < seen.shape[1], f"a tile outside of the tensor: {where}"
        part = slice(rows.start, min(rows.stop, seen.shape[0])), slice(columns.start, min(columns.stop, seen.shape[1]))
        assert seen[part].any(), f"a tile without a visible pair is visited: {where} {rows} {columns}"
        whole = inside and bool(seen[part].all())
        assert masked or whole, f"a tile with a masked pair is not masked: {where} {rows} {columns}"
        assert not masked or not whole, f"a whole tile is masked: {where} {rows} {columns}"
        assert (left[part] == seen[part]).all(), f"a tile is visited twice: {where} {rows} {columns}"
        left[part] = False
    assert not left.any(), f"visible pairs are never visited: {where} {left.nonzero().tolist()}"


def flash_cases():
    """(n, m, causal, window) of every small case that the door lets through."""
    for n, m, window in product(LENGTHS, LENGTHS, WINDOWS):
        for causal in (False, True) if not window else (True,):
            yield n, m, causal, window


STEP = (("lo", "hi", "MASKED"), (ANYTHING,) * 3)


@pytest.mark.parametrize(
    "module, kernel, step", [(forward, "forward_kernel", "attend"), (backward, "dq_kernel", "gather_dq")]
)
def test_tiles_of_keys(module, kernel, step):
    """Forward, and backward for dq: a tile of queries passes the keys."""
    recorded = {step: (STEP[0], (ANYTHING,) * (3 if step == "attend" else 2))}
    for (n, m, causal, window), (block_q, block_kv) in product(flash_cases(), TILES):
        seen, visited = seen_by(n, m, causal, window), []
        for program in range(-(-n // block_q)):
            events = visits(
                module, kernel, program, recorded, ("key_bounds", "attend_all"), n=n, m=m, heads=1, window=window,
                SHARE=1, CAUSAL=causal, WINDOWED=window > 0, BLOCK_Q=block_q, BLOCK_KV=block_kv,
            )  # fmt: skip
            i = -(-n // block_q) - 1 - program  # the last tile first
            for _, lo, hi, masked in events:
                for start in range(lo, hi, block_kv):
                    visited.append((range(i * block_q, (i + 1) * block_q), range(start, start + block_kv), masked))
        check_tiles(seen, visited, (n, m, causal, window, block_q, block_kv))


def test_tiles_of_queries():
    """Backward for dk and dv: a tile of keys passes the queries that see it."""
    recorded = {"gather_dkdv": (STEP[0], (ANYTHING,) * 3)}
    for (n, m, causal, window), (block_q, block_kv) in product(flash_cases(), TILES):
        seen, visited = seen_by(n, m, causal, window), []
        for program in range(-(-m // block_kv)):
            events = visits(
                backward, "dkdv_kernel", program, recorded, ("query_bounds",), n=n, m=m, groups=1, window=window,
                SHARE=1, CAUSAL=causal, WINDOWED=window > 0, BLOCK_Q=block_q, BLOCK_KV=block_kv,
            )  # fmt: skip
            for _, lo, hi, masked in events:
                for start in range(lo, hi, block_q):
                    visited.append(
                        (range(program * block_kv, (program + 1) * block_kv), range(start, start + block_q), masked)
                    )
        check_tiles(seen.T, visited, (n, m, causal, window, block_q, block_kv))


def test_the_mask_within_a_tile():
    """`visible`, which the masked tiles go by, is the mask of `nondual.ops.masks`, and nothing beyond the last key."""
    for n, m, causal, window in flash_cases():
        q, kv = torch.arange(n)[:, None], torch.arange(m + 3)[None]
        seen = primitives.visible.fn(q, kv, m, m - n, window, causal, window > 0).expand(n, m + 3)
        assert torch.equal(seen[:, :m], seen_by(n, m, causal, window)) and not seen[:, m:].any(), (n, m, causal, window)


class Launched(Exception):
    """The launcher has come as far as the launch."""


def test_tiles_of_split_keys(monkeypatch):
    """Decoding: the parts of the keys that the launcher cuts, and the tiles of each that its program passes."""
    recorded = {"attend": STEP}
    launched = {}

    class Recorder:
        def __getitem__(self, grid):
            def launch(*given, **named):
                names = real.fn.__code__.co_varnames[: real.fn.__code__.co_argcount]
                launched.update(dict(zip(names, given)) | named | {"programs": grid[0]})
                raise Launched

            return launch

    real = launch.decode_kernel
    for (n, m, causal, window), block_kv, splits in product(flash_cases(), (1, 2, 3, 4), (1, 2, 3, 7)):
        if n > 4:  # decoding has few queries
            continue
        q, kv = torch.empty(1, 1, n, 1, device="meta"), torch.empty(1, 1, m, 1, device="meta")
        with monkeypatch.context() as patch:
            patch.setattr(launch, "decode_kernel", Recorder())
            tiles = {"BLOCK_Q": 16, "BLOCK_KV": block_kv}
            patch.setattr(launch, "configuration", lambda *_, tiles=tiles: dict(tiles))
            with pytest.raises(Launched):
                launch.launch_decode(q, kv, kv, causal, window, 1.0, splits)
        seen, visited = seen_by(n, m, causal, window), []
        numbers = {x: launched[x] for x in ("n", "m", "groups", "window", "first", "length", "splits")}
        assert launched["programs"] == launched["splits"] <= splits
        assert numbers["first"] % block_kv == numbers["length"] % block_kv == 0
        for program in range(launched["programs"]):
            events = visits(
                forward, "decode_kernel", program, recorded, ("key_bounds", "attend_all"), **numbers, SHARE=1,
                CAUSAL=causal, WINDOWED=window > 0, BLOCK_Q=16, BLOCK_KV=block_kv,
            )  # fmt: skip
            passed = [
                (range(n), range(i, i + block_kv), masked)
                for _, lo, hi, masked in events
                for i in range(lo, hi, block_kv)
            ]
            assert passed, f"a program without keys: {(n, m, causal, window, block_kv, splits)}"
            visited += passed
        check_tiles(seen, visited, (n, m, causal, window, block_kv, splits))


def test_tiles_of_the_reference():
    """The plain torch engine, forward and backward: its tiles are cut at the last key that is seen."""
    for (n, m, causal, window), (block_q, block_kv) in product(flash_cases(), TILES[1:5]):
        seen, visited = seen_by(n, m, causal, window), []
        visible = reference.Visible(n, m, causal, window or None, torch.device("cpu"))
        for queries in reference.tiles(range(n), block_q):
            for keys in reference.tiles(visible.span(queries), block_kv):
                part = seen[queries.start : queries.stop, keys.start : keys.stop]
                assert part.shape == (len(queries), len(keys)), "a tile reaches past the tensor"
                assert torch.equal(visible.mask(queries, keys), part), (n, m, causal, window)
                visited.append((queries, keys, not bool(part.all())))
        check_tiles(seen, visited, (n, m, causal, window, block_q, block_kv))


def test_the_references_backward_visits_the_same_pairs():
    """Counted in a run: the backward's tiles of keys are aligned, and none without a visible pair is visited."""
    for n, m, window in ((5, 5, 0), (3, 7, 2), (7, 3, 2), (6, 9, 4), (9, 2, 0), (4, 4, 1)):
        seen = seen_by(n, m, True, window)
        x = [torch.randn(1, 1, length, 2, requires_grad=True) for length in (n, m, m)]
        count = reference.Count()
        out, _ = reference.flash_attention(*x, causal=True, window=window or None, tile=(2, 3), count=count)
        forward = count.tiles
        out.sum().backward()
        needed = sum(bool(seen[i : i + 2, j : j + 3].any()) for i in range(0, n, 2) for j in range(0, m, 3))
        assert (forward, count.tiles - forward) == (needed, needed), (n, m, window)


def test_splits_of_decoding_follow_the_rule():
    """Few queries and 512 visible keys or more; parts of 256 keys or more; at most 128 parts."""
    for n, heads, groups, m, window in product((1, 4, 9), (8, 16), (1, 8), (511, 512, 513, 5000, 10**6), (0, 300, 600)):
        q, k = torch.empty(1, heads, n, 1, device="meta"), torch.empty(1, groups, m, 1, device="meta")
        splits, seen = tiles.splits_of(q, k, window), min(m, window + n - 1) if window else m
        assert (splits > 0) == (n * (heads // groups) <= 64 and seen >= 512)
        if splits:
            assert 1 <= splits <= 128 and splits * 256 <= seen
