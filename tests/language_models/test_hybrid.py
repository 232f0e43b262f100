"""Which blocks of the hybrid attend; what all models share is in test_causal.py."""

import pytest
import torch

from nondual.efficient_attention.mamba import Mamba, MambaCache
from nondual.kv_cache import KVCache
from nondual.language_models.hybrid import HybridLM
from nondual.self_attention import MultiHeadAttention


@pytest.mark.parametrize("every, attending", [(3, [2, 5]), (2, [1, 3, 5]), (1, [0, 1, 2, 3, 4, 5]), (7, [])])
def test_every_so_many_blocks_attend(every, attending):
    model = HybridLM(13, 12, 6, 4, every=every)
    kinds = [type(layer.mixer) for layer in model.layers]
    assert [i for i, kind in enumerate(kinds) if kind is MultiHeadAttention] == attending
    assert kinds.count(Mamba) == 6 - len(attending)


def test_only_attention_keeps_more_for_a_longer_text():
    model = HybridLM(13, 12, 3, 4, n_kv_heads=2)
    short, long = model.new_cache(2, 10), model.new_cache(2, 1000)
    assert [type(one) for one in long] == [MambaCache, MambaCache, KVCache]
    assert short[0].state.shape == long[0].state.shape
    assert long[2].keys.shape == (2, 2, 1000, 3) and short[2].keys.shape == (2, 2, 10, 3)


def test_the_residual_is_kept_wide():
    model, seen = HybridLM(13, 12, 3, 4).bfloat16(), []
    model.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    assert model(torch.zeros(2, 5, dtype=torch.long)).dtype == torch.bfloat16 and seen == [torch.float32]


def test_a_period_that_cannot_be():
    with pytest.raises(ValueError, match="every must be 1 or more, got 0"):
        HybridLM(13, 12, 3, 4, every=0)
