"""The image tower of emoji_clip against torch's own layers, and the pictures that it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from nondual.pretrained.emoji_clip_network import D_IMAGE, PictureTower


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return PictureTower().eval()


def pictures(count=3, seed=1):
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def of_torch(tower):
    """The same function made of torch's own modules, with the tower's weights."""
    vit = tower.vit
    layer = nn.TransformerEncoderLayer(D_IMAGE, 4, 384, 0.0, "gelu", batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, 3, nn.LayerNorm(D_IMAGE), enable_nested_tensor=False)
    for ours, theirs in zip(vit.encoder.layers, stack.layers):
        mixer = ours.mixer
        theirs.self_attn.in_proj_weight = nn.Parameter(
            torch.cat([mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight])
        )
        theirs.self_attn.in_proj_bias = nn.Parameter(
            torch.cat([mixer.q_proj.bias, mixer.k_proj.bias, mixer.v_proj.bias])
        )
        theirs.self_attn.out_proj.load_state_dict(mixer.out_proj.state_dict())
        theirs.norm1.load_state_dict(ours.norm1.state_dict())
        theirs.norm2.load_state_dict(ours.norm2.state_dict())
        first, second = (m for m in ours.feed_forward.modules() if isinstance(m, nn.Linear))
        theirs.linear1.load_state_dict(first.state_dict())
        theirs.linear2.load_state_dict(second.state_dict())
    stack.norm.load_state_dict(vit.encoder.norm.state_dict())
    stack = stack.to(vit.position.dtype)

    def run(given):
        x = (given.to(vit.position.dtype) / 255 - 0.75) / 0.3
        x = F.conv2d(x, vit.patches.weight, vit.patches.bias, stride=8).flatten(2).mT + vit.position
        return stack(x).mean(1)

    return run


def test_it_is_torchs_own_layers_and_the_mean_with_every_gradient():
    torch.manual_seed(0)
    tower = PictureTower().double()
    given = pictures()
    ours, theirs = tower(given), of_torch(tower)(given)
    assert ours.shape == (3, D_IMAGE)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    direct = {"patches": tower.vit.patches.weight, "bias": tower.vit.patches.bias, "position": tower.vit.position}
    mine, its = (torch.autograd.grad(y.square().sum(), list(direct.values())) for y in (ours, theirs))
    for name, a, b in zip(direct, mine, its):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    tower(given).square().sum().backward()
    silent = [
        name for name, parameter in tower.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert not [name for name in silent if "k_proj.bias" not in name]  # softmax drops what all keys share


def test_pictures_may_be_bytes_or_floats(tower):
    with torch.no_grad():
        assert torch.equal(tower(pictures()), tower(pictures().float()))
        assert tower(pictures()[:0]).shape == (0, D_IMAGE)
        together, alone = tower(pictures()), tower(pictures()[1:2])
    torch.testing.assert_close(together[1:2], alone)


@pytest.mark.parametrize(
    "given, error, says",
    [
        ([[0.0]], TypeError, "pictures must be a Tensor"),
        (torch.zeros(3, 32, 32), ValueError, r"RGB from 0 to 255, uint8 or floating point, got torch.float32 \(3, 32"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"pictures must be \(B, 3, 32, 32\)"),
        (torch.zeros(1, 3, 64, 64), ValueError, r"pictures must be \(B, 3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), ValueError, "uint8 or floating point, got torch.int64"),
    ],
)
def test_what_is_no_small_picture_is_refused(tower, given, error, says):
    with pytest.raises(error, match=says):
        tower(given)


def test_one_exported_program_for_every_batch(tower):
    program = torch.export.export(tower, (pictures(4),), dynamic_shapes=({0: Dim("b", min=2)},))
    with torch.no_grad():
        for count in (2, 7):
            given = pictures(count, seed=count)
            torch.testing.assert_close(program.module()(given), tower(given), atol=1e-5, rtol=1e-5)
