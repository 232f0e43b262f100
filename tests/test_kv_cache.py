"""The key/value cache by itself; its laws together with attention are in test_self_attention.py."""

import pytest
import torch

from nondual.kv_cache import KVCache, ProjectedMemory

B, G, D = 2, 3, 4


def rows(n, seed=0):
    return torch.randn(B, G, n, D, generator=torch.Generator().manual_seed(seed))


def test_it_gives_back_all_that_was_appended():
    cache, k, v = KVCache(B, G, 7, D), rows(5), rows(5, 1)
    cache.append(k[:, :, :2], v[:, :, :2])
    keys, values = cache.append(k[:, :, 2:], v[:, :, 2:])
    assert torch.equal(keys, k) and torch.equal(values, v) and cache.length == 5
    assert keys.data_ptr() == cache.keys.data_ptr()  # a view: nothing is copied a second time


def test_after_reset_it_holds_nothing():
    cache = KVCache(B, G, 7, D)
    cache.append(rows(5), rows(5))
    cache.start = torch.tensor([1, 2])
    cache.reset()
    assert cache.length == 0 and cache.start is None
    assert torch.equal(cache.append(rows(2, 3), rows(2))[0], rows(2, 3))


@pytest.mark.parametrize(
    "k, error, says",
    [
        (rows(8), ValueError, r"cache holds 7 positions, and 8 were asked of it"),
        (rows(2)[:1], ValueError, r"k must be \(2, 3, 2, 4\) for this cache, got \(1, 3, 2, 4\)"),
        (rows(2).double(), ValueError, r"k must be torch.float32 on cpu for this cache, got torch.float64 on cpu"),
        (rows(2).requires_grad_(), RuntimeError, r"a KVCache is for inference"),
        (rows(2).tolist(), TypeError, r"k must be a Tensor, got list"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(k, error, says):
    cache = KVCache(B, G, 7, D)
    with pytest.raises(error, match=says):
        cache.append(k, k if error is TypeError else k.detach())
    assert cache.length == 0


def test_selected_rows_are_a_cache_of_their_own():
    cache, k, v = KVCache(B, G, 7, D), rows(5), rows(5, 1)
    cache.append(k, v)
    cache.start = torch.tensor([1, 2])
    chosen = torch.tensor([1, 1, 0])
    other = cache.select(chosen)
    assert other.start.tolist() == [2, 2, 1] and other.length == 5
    keys, values = other.append(k[chosen, :, :2], v[chosen, :, :2])
    assert torch.equal(keys, torch.cat([k, k[:, :, :2]], 2)[chosen])
    assert torch.equal(values, torch.cat([v, v[:, :, :2]], 2)[chosen])
    assert cache.length == 5 and torch.equal(cache.keys[:, :, :5], k)
    with pytest.raises(ValueError, match="cache holds 7 positions, and 8 were asked of it"):
        other.append(k[chosen, :, :1], v[chosen, :, :1])


def test_rows_of_a_projected_memory():
    memory, chosen = ProjectedMemory(rows(5), rows(5, 1)), torch.tensor([1, 1, 0])
    other = memory.select(chosen)
    assert torch.equal(other.keys, memory.keys[chosen]) and torch.equal(other.values, memory.values[chosen])
