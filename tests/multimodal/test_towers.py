"""The towers: patches and tokens by hand, pooling against torch's own attention, programs, dtypes, what is refused.

Whole towers are judged by transformers' in tests/pretrained/test_clip.py.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from torch.func import functional_call, grad, vmap

from nondual import CLIP
from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.multimodal.towers import (
    AttentionPool,
    FirstOf,
    TextTower,
    VisionTower,
    at_highest_id,
    at_last,
    quick_gelu,
    start_as_clip,
)
from nondual.transformer import Encoder

B, E, H, FF, V, N, SIZE, PATCH = 3, 12, 4, 19, 31, 11, 10, 5


def vision(seed=0, **more):
    torch.manual_seed(seed)
    return VisionTower(SIZE, PATCH, E, H, FF, **({"n_layers": 2} | more))


def text(seed=0, **more):
    torch.manual_seed(seed)
    return TextTower(V, N, E, H, FF, **({"n_layers": 2} | more))


def images(batch=B, size=SIZE, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def ids(batch=B, n=N):
    return torch.randint(V - 1, (batch, n), generator=torch.Generator().manual_seed(1))


# --- texts -----------------------------------------------------------------------------------------------------------


def test_which_token_stands_for_the_text_by_hand():
    tokens = torch.tensor([[3, 9, 4, 9], [9, 0, 0, 0], [1, 2, 9, 7]])
    assert at_highest_id(tokens).tolist() == FirstOf(9)(tokens).tolist() == [1, 0, 2]
    assert FirstOf(0)(tokens[1:2]).tolist() == [1]
    assert at_last(tokens).tolist() == [3, 3, 3]
    with pytest.raises(ValueError, match=r"ids must have the end-of-text token 7 in each row, got none in row 0"):
        FirstOf(7)(tokens)
    assert repr(FirstOf(7)) == "FirstOf(7)"


@torch.no_grad()
def test_the_vector_is_that_of_the_place_and_then_of_the_head():
    tokens, head = ids(), nn.Linear(E, 7)
    tower = text(place=at_last)
    features = tower.features(tokens)
    assert features.shape == (B, N, E)
    torch.testing.assert_close(tower(tokens), features[:, -1])
    tower.place = lambda given: torch.tensor([4, 0, 2])
    torch.testing.assert_close(tower(tokens), features[[0, 1, 2], [4, 0, 2]])
    tower.head = head
    torch.testing.assert_close(tower(tokens), head(features[[0, 1, 2], [4, 0, 2]]))
    x = tower.token(tokens) + tower.position.table.weight
    torch.testing.assert_close(features, tower.encoder(x))


@torch.no_grad()
def test_a_causal_tower_sees_nothing_after_the_end_and_another_sees_it_all():
    tokens = ids()
    tokens[:, 4] = V - 1
    other = tokens.clone()
    other[:, 5:] = torch.randint(V - 1, (B, N - 5))
    assert torch.equal(text()(tokens), text()(other))
    torch.testing.assert_close(text()(tokens), text()(tokens[:, :5]))  # padding may as well be cut off
    assert not torch.allclose(text(causal=False)(tokens), text(causal=False)(other))


@pytest.mark.parametrize(
    "given, error, says",
    [
        ([[1, 2]], TypeError, r"ids must be a Tensor, got list"),
        (torch.ones(2, 3), ValueError, r"ids must be integers \(B, N\), got torch.float32 \(2, 3\)"),
        (torch.ones(3, dtype=torch.int64), ValueError, r"ids must be integers \(B, N\), got torch.int64 \(3,\)"),
        (torch.tensor([[0, V]]), ValueError, r"ids must lie in 0 to 30, got 0 to 31"),
        (ids(2, N + 1), ValueError, r"ids must have 1 to 11 tokens in a row, got 12: shorten the texts"),
        (ids(2, 0), ValueError, r"ids must have 1 to 11 tokens in a row, got 0"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(given, error, says):
    for call in (text(), text().features):
        with pytest.raises(error, match=says):
            call(given)


# --- images ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_patches_by_hand():
    """One layer that does nothing: what comes out is the norm of each patch's weighted sum and its position."""
    tower = VisionTower(4, 2, 2, 1, 3, 0, n_channels=1, class_token=False, norm_before=False, pool=nn.Flatten())
    tower.patches.weight[:] = torch.tensor([[[[1.0, 0], [0, 0]]], [[[0.0, 0], [0, 1]]]])  # first and last pixel
    tower.position[:] = torch.arange(8.0).view(4, 2)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    right = torch.tensor([[0.0, 5], [2, 7], [8, 13], [10, 15]]) + tower.position
    torch.testing.assert_close(tower.features(x)[0], F.layer_norm(right, (2,)))
    torch.testing.assert_close(tower(x), F.layer_norm(right, (2,)).view(1, 8))


@torch.no_grad()
def test_the_class_token_stands_first_and_is_what_comes_out():
    tower = vision()
    x = tower.patches(images()).flatten(2).mT
    x = torch.cat([tower.class_token.expand(B, 1, E), x], 1) + tower.position
    right = tower.encoder(tower.norm_before(x))
    torch.testing.assert_close(tower.embed(images()), tower.norm_before(x))
    torch.testing.assert_close(tower.features(images()), right)
    torch.testing.assert_close(tower(images()), right[:, 0])
    assert right.shape == (B, 5, E)


@torch.no_grad()
def test_positions_for_another_grid_are_those_of_torch_and_its_own_are_untouched():
    tower = vision()
    assert tower.positions(2, 2) is tower.position
    found = tower.positions(4, 6)
    grid = tower.position[1:].view(1, 2, 2, E).permute(0, 3, 1, 2)
    right = F.interpolate(grid, (4, 6), mode="bicubic").permute(0, 2, 3, 1).reshape(24, E)
    torch.testing.assert_close(found, torch.cat([tower.position[:1], right]))
    assert tower(torch.randn(2, 3, 20, 30)).shape == (2, E)
    assert tower.to(torch.bfloat16).positions(4, 6).dtype == torch.bfloat16


@torch.no_grad()
def test_what_is_left_over_at_the_edge_is_not_read():
    torch.manual_seed(0)
    tower = VisionTower(14, 4, E, H, FF, 1)
    x = images(size=14)
    other = x.clone()
    other[..., 12:], other[..., 12:, :] = 9, 9
    assert tower.position.shape == (1 + 9, E) and torch.equal(tower(x), tower(other))


@torch.no_grad()
def test_the_pool_is_torchs_attention_of_one_query():
    torch.manual_seed(0)
    pool, judge, x = AttentionPool(E, H, FF), nn.MultiheadAttention(E, H, batch_first=True), torch.randn(B, N, E)
    pool.mixer.load_state_dict(judge.state_dict())
    joined = judge(pool.query.expand(B, 1, E), x, x)[0][:, 0]
    torch.testing.assert_close(pool(x), joined + pool.feed_forward(pool.norm(joined)))
    torch.testing.assert_close(pool(x[:, torch.randperm(N)]), pool(x))  # a set has no order
    with pytest.raises(ValueError, match=r"features must be \(B, N, E\), got \(11, 12\)"):
        pool(x[0])


@pytest.mark.parametrize(
    "given, error, says",
    [
        (images().numpy(), TypeError, r"images must be a Tensor, got ndarray; use torch.from_numpy"),
        (images()[0], ValueError, r"images must be \(B, C, H, W\), got \(3, 10, 10\); a single image goes in as image"),
        (images().to(torch.uint8), ValueError, r"images must be floating point, got torch.uint8: divide by 255"),
        (images(channels=1), ValueError, r"images must have 3 channels, \(B, C, H, W\), got \(3, 1, 10, 10\)"),
        (images().movedim(1, 3), ValueError, r"images must have 3 channels, \(B, C, H, W\), got \(3, 10, 10, 3\)"),
        (
            images(size=11),
            ValueError,
            r"images must be 10 pixels .* multiples of the patch size 5, got 11 x 11: resize",
        ),
        (images()[..., :0], ValueError, r"images must be 10 pixels high and wide, .*, got 10 x 0"),
    ],
)
def test_images_that_have_no_patches_are_refused(given, error, says):
    with pytest.raises(error, match=says):
        vision()(given)


def test_towers_that_cannot_be_are_refused():
    for patch in (0, 11):
        with pytest.raises(ValueError, match=rf"patch_size must be 1 to image_size=10, got {patch}"):
            VisionTower(10, patch, E, H, FF, 1)
    with pytest.raises(ValueError, match=r"pool must be given without a class token, such as AttentionPool"):
        vision(class_token=False)


# --- both ------------------------------------------------------------------------------------------------------------


def test_quick_gelu_is_transformers_own():
    from transformers.activations import ACT2FN

    x = torch.linspace(-9, 9, 101, dtype=torch.float64)
    torch.testing.assert_close(quick_gelu(x), ACT2FN["quick_gelu"](x))


def test_weights_start_as_the_released_code_draws_them():
    torch.manual_seed(0)
    encoder = Encoder(96, 4, 384, 8, norm_first=True)
    start_as_clip(encoder)
    mixer, network = encoder.layers[3].mixer, encoder.layers[3].feed_forward
    spread = {
        mixer.q_proj: 96**-0.5,
        mixer.v_proj: 96**-0.5,
        mixer.out_proj: 96**-0.5 * 16**-0.5,
        network.linear1: (2 * 96) ** -0.5,
        network.linear2: 96**-0.5 * 16**-0.5,
    }
    for module, std in spread.items():
        assert module.weight.std().item() == pytest.approx(std, rel=0.05)
    assert not mixer.q_proj.bias.any() and not mixer.out_proj.bias.any()


def both(**more):
    return CLIP(vision(**more), text(**more), 7, d_image=E, d_text=E)


def test_every_parameter_has_a_gradient_and_an_empty_batch_gives_nothing():
    ours = both()
    ours.loss(images(), ids()).backward()
    for name, p in ours.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        key = name.endswith("k_proj.bias")  # a shift of all scores: its gradient is 0 but for rounding
        assert key or name.endswith("position.table.weight") or (p.grad != 0).any(), name
    assert ours(images(0), ids(0)).shape == (0, 0)
    assert ours(images(), ids(0)).shape == (3, 0)


def test_another_operation_joins_queries_keys_and_values():
    ours, other = both(), both(op=FlashAttention())
    other.load_state_dict(ours.state_dict())
    torch.testing.assert_close(other(images(), ids()), ours(images(), ids()))


def test_compiled_and_exported_for_every_batch():
    ours = both(n_layers=1).eval()
    pairs = Dim("pairs", min=2, max=64)
    program = torch.export.export(ours, (images(5), ids(5)), dynamic_shapes=({0: pairs}, {0: pairs}))
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="eager")
    for size in (4, 9):
        right = ours(images(size), ids(size))
        torch.testing.assert_close(program.module()(images(size), ids(size)), right)
        torch.testing.assert_close(compiled(images(size), ids(size)), right)


def test_gradients_of_each_pair_by_itself():
    """torch.func: the similarity of a pair, differentiated for each of a batch at once."""
    ours = both().eval()
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def similarity(given, image, tokens):
        return functional_call(ours, given, (image[None], tokens[None]))[0, 0]

    whole = vmap(grad(similarity), (None, 0, 0))(parameters, images(), ids())
    for row in range(B):
        ours.zero_grad()
        ours(images()[row : row + 1], ids()[row : row + 1])[0, 0].backward()
        for name, p in ours.named_parameters():
            torch.testing.assert_close(whole[name][row], p.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: n + m)


def test_half_precision_and_autocast_stay_near():
    ours = both().eval()
    right = ours(images(), ids())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(images(), ids())
    narrow = copy.deepcopy(ours).to(torch.bfloat16)(images().bfloat16(), ids())
    for other in (found, narrow):
        assert other.dtype == torch.float32 and (other - right).abs().max() < 0.1 / 0.07
    assert math.isfinite(float(narrow.sum().detach()))
