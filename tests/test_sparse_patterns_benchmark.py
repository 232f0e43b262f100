"""benchmarks/sparse_patterns.py, sparse_stream.py and noise.py: masks, a stream in parts, gradients, rows by hand."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import noise, sparse_patterns, sparse_stream
from benchmarks.sparse_patterns import SINKS, attending, either, families, first, mask_of, overall, patterns, window
from benchmarks.sparse_stream import Stream, in_bins, read
from nondual.efficient_attention import sparse_attention as ours
from nondual.efficient_attention.sparse_attention import SparseAttention
from nondual.language_models.causal import CausalLM
from nondual.ops.attention import attention
from nondual.relative_positions import Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import FeedForward, TransformerLayer


@pytest.fixture
def model():
    """Two layers of grouped heads with rotary positions, in float64."""
    torch.manual_seed(0)

    def layer(_):
        mixer = MultiHeadAttention(24, 4, n_kv_heads=2, causal=True, positions=Rotary(6))
        return TransformerLayer(mixer, FeedForward(24, 48), 24, norm_first=True)

    return CausalLM(13, 24, 2, layer=layer, norm=nn.LayerNorm).double().eval().requires_grad_(False)


# --- masks -----------------------------------------------------------------------------------------------------------


def test_the_patterns_are_those_of_the_library():
    theirs = {
        "window 128": ours.local(128),
        "window 256": ours.local(256),
        "window 512": ours.local(512),
        "strided 248": ours.strided(248),
        "blocks 512": ours.blocks(512),
    }
    for name, pattern in theirs.items():
        assert torch.equal(mask_of(patterns()[name], 1100), pattern.mask(1100)), name
        sunk = (pattern | ours.sinks(SINKS)).mask(1100)
        assert torch.equal(mask_of(patterns()[f"{name}, {SINKS} sinks"], 1100), sunk), name
    assert torch.equal(mask_of(patterns()["full"], 70), torch.ones(70, 70, dtype=torch.bool).tril())


def test_random_blocks_are_whole_earlier_and_drawn_anew_with_each_seed():
    masks = [mask_of(families(seed)["window 128, 2 random blocks of 64"], 2048) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    far = masks[0] & ~mask_of(window(128), 2048)
    tiles = far.view(32, 64, 32, 64).any(3).any(1)
    assert not tiles.triu().any() and (tiles.sum(1) <= 2).all() and (tiles[4:].sum(1) >= 1).all()
    assert torch.equal(far, tiles.repeat_interleave(64, 0).repeat_interleave(64, 1) & ~mask_of(window(128), 2048))


def test_all_but_two_windows_keep_about_as_many_keys():
    kept = {name: mask_of(p, 2048).sum().item() / 2048 for name, p in families(0).items()}
    assert all(215 < keys < 260 for name, keys in kept.items() if name not in ("window 128", "window 512"))


def test_sparse_attention_gives_what_the_dense_mask_gives(model):
    ids = torch.randint(13, (1, 90))
    pattern = ours.local(16) | ours.sinks(4)
    with attending(model, sparse_patterns.Masked(mask_of(either(window(16), first(4)), 90))):
        masked = model(ids)
    with attending(model, SparseAttention(pattern, block=8)):
        torch.testing.assert_close(model(ids), masked)
    assert not torch.allclose(model(ids), masked)  # after the block the model attends as before


def test_the_mean_over_bins_counts_each_token_once():
    each = torch.randn(2047)
    bins = [part.mean().item() for part in each.split(128)]
    assert overall(bins, 2048) == pytest.approx(each.mean().item(), abs=1e-6)
    assert overall(bins, 2048, 512) == pytest.approx(each[512:].mean().item(), abs=1e-6)


# --- a stream --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sinks", "w"), [(0, 16), (4, 16), (0, None)])
def test_a_stream_gives_what_the_whole_text_gives_under_the_mask(model, monkeypatch, sinks, w):
    ids = torch.randint(13, (91,), generator=torch.Generator().manual_seed(1))
    seen = first(SINKS) if w is None else window(w)
    seen = patterns()["full"] if w is None else either(seen, first(sinks))
    with attending(model, sparse_patterns.Masked(mask_of(seen, 90))):
        each = nn.functional.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
    for block in (90, 16, 7, 4):
        monkeypatch.setattr(sparse_stream, "BLOCK", block)
        found = read(model, ids, window=w, sinks=sinks)
        assert found["bins"] == pytest.approx(in_bins(each.float()), abs=2e-4), block
        kept = sparse_stream.memory(model, 90, window=w, sinks=sinks)
        if w is not None:  # a window less the query's own, and the sinks: two layers, two heads of 6, keys and values
            assert kept[-1] == 2 * 2 * 2 * 6 * 8 * (min(w - 1, block * len(kept)) + sinks)
        else:
            assert kept == [2 * 2 * 2 * 6 * 8 * block * (i + 1) for i in range(len(kept))]
    mixer = model.layers[0].mixer
    assert isinstance(mixer.positions, Rotary) and not isinstance(mixer.op, Stream)


def test_positions_counted_in_the_cache_are_those_of_streaming_attention():
    draw = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, h, 40, 8, generator=draw) for h in (4, 2, 2))
    rotary, w, sinks = Rotary(8), 7, 3
    stream = Stream(rotary, w, sinks, in_place=True)
    parts = [stream(*(x[:, :, a:b] for x in (q, k, v))) for a, b in ((0, 9), (9, 10), (10, 31), (31, 40))]
    out = torch.cat(parts, 2)
    for i in range(40):
        held = [j for j in range(i + 1) if j < sinks or i - j < w]
        places = held if i < w + sinks else list(range(len(held)))  # in the cache, once it is full
        turned = torch.stack([rotary.turn(k[:, :, j : j + 1], p)[:, :, 0] for j, p in zip(held, places)], 2)
        query = rotary.turn(q[:, :, i : i + 1], places[-1])
        torch.testing.assert_close(out[:, :, i : i + 1], attention(query, turned, v[:, :, held]), atol=1e-5, rtol=1e-5)


def test_a_block_read_afresh_sees_the_window_before_it(model, monkeypatch):
    monkeypatch.setattr(sparse_stream, "BLOCK", 8)
    monkeypatch.setattr(sparse_stream, "WINDOW", 8)
    monkeypatch.setattr(in_bins, "__defaults__", (1,))
    ids = torch.randint(13, (41,))
    bins = sparse_stream.afresh(model, ids)["bins"]
    assert [place for place, value in enumerate(bins) if value is None] == [*range(8, 16), *range(24, 32)]
    scores = model(ids[None, 8:24])[0, 8:]
    each = nn.functional.cross_entropy(scores.float(), ids[17:25], reduction="none")
    assert bins[16:24] == [round(x, 4) for x in each.tolist()]


# --- influence -------------------------------------------------------------------------------------------------------


def test_one_layer_lets_nothing_in_from_outside_of_its_pattern(model, monkeypatch):
    monkeypatch.setattr(sparse_patterns, "smollm2", lambda: (model, None))
    monkeypatch.setattr(sparse_patterns, "tokens", lambda play: torch.arange(300) % 13)
    monkeypatch.setattr(sparse_patterns, "NARROW", 128)
    found = sparse_patterns.gradients("window 128, 4 sinks", "macbeth", 290)
    assert found["one layer: outside the pattern, moved"] == found["one layer: inside the pattern, not moved"] == 0
    assert found["places past the window with influence"] == 127 + 4  # two layers reach back 2 (w - 1); and the sinks
    through = sparse_patterns.gradients("full", "macbeth", 290)
    assert through["places past the window with influence"] == 290 - 128


# --- noise -----------------------------------------------------------------------------------------------------------


def test_figures_of_rows_by_hand(monkeypatch):
    monkeypatch.setattr(noise, "TOP", 2)
    weights = torch.tensor([[[[0.5, 0.25, 0.125, 0.125]]]])
    values = torch.tensor([[[[1.0, 0.0], [0.0, 0.0], [0.0, 8.0], [0.0, -4.0]]]])
    found = {name: x.item() for name, x in noise.of_rows(weights, values).items()}
    assert found == pytest.approx({"largest": 0.5, "outside": 0.25, "added": 0.5 / math.hypot(0.5, 0.5)})


def test_the_law_is_that_of_equal_scores():
    scores = torch.cat([torch.full((8,), 3.0), torch.zeros(2040)])
    outside = [1 - scores[:n].softmax(0)[:8].sum().item() for n in (64, 2048)]
    assert noise.law(outside[0], 64, 2048) == pytest.approx(outside[1])


def test_it_runs_and_what_is_measured_is_kept(tmp_path):
    measured = []
    for _ in range(2):
        found = sparse_stream.kept(tmp_path / "a" / "b.json", lambda x: measured.append(x) or {"x": x}, 3)
        assert found == {"x": 3} == json.loads((tmp_path / "a" / "b.json").read_text())
    assert measured == [3]
