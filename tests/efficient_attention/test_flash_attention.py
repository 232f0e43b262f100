"""Flash attention as the op of a module: the same module, and a clear no to what needs the weights."""

import copy

import pytest
import torch

from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.ops import masks
from nondual.ops.flash_attention import triton as kernels
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


def test_two_processes_worth_of_training_in_one(tmp_path):
    """DistributedDataParallel finds the gradients of every parameter through the op."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, flash = pair(impl="triton" if kernels.INTERPRETED else "reference")
        wrapped = torch.nn.parallel.DistributedDataParallel(flash)
        x = torch.randn(B, N, E)
        wrapped(x).sum().backward()
        plain(x).sum().backward()
        for a, b in zip(plain.parameters(), flash.parameters()):
            torch.testing.assert_close(b.grad, a.grad, atol=1e-4, rtol=1e-4)
    finally:
        dist.destroy_process_group()
