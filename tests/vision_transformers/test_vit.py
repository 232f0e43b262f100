"""The Vision Transformer against equations 1 to 4 in torch's own layers; its tokens, sizes, pools and refusals.

The other judge, transformers with copied weights, is in tests/pretrained/test_vit.py.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, export

from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.efficient_attention.linear_attention import LinearAttention
from nondual.ops.attention import attention
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import Encoder
from nondual.vision_transformers import VisionTransformer

B, E, HEADS, FF = 3, 16, 4, 29
SMALL = {"d_model": E, "n_heads": HEADS, "d_ff": FF, "n_layers": 2}


def vit(size=(8, 15), patch=(4, 5), classes=6, **options):
    torch.manual_seed(0)
    model = VisionTransformer(size, patch, classes, **(SMALL | options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(std=0.3)
    return model.eval()


def images(*size, batch=B, channels=3, dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *(size or (8, 15)), generator=draw, dtype=dtype)


# --- the equations ---------------------------------------------------------------------------------------------------


def by_torch(model, x):
    """Equations 1 to 4 of the paper: patches cut by slicing, a matrix, torch's own pre-norm layers, the last norm."""
    (high, wide), weight = model.patches.patch_size, model.patches.projection.weight
    rows = [x[:, :, i : i + high, j : j + wide].flatten(1) for i in range(0, 8, high) for j in range(0, 15, wide)]
    patches = torch.stack(rows, 1) @ weight.flatten(1).T + model.patches.projection.bias
    z = torch.cat([model.class_token.expand(len(x), 1, E), patches], 1) + model.positions
    gradients = {}
    for i, layer in enumerate(model.encoder.layers):
        theirs = nn.TransformerEncoderLayer(
            E, HEADS, FF, 0.0, F.gelu, layer_norm_eps=1e-6, batch_first=True, norm_first=True, dtype=x.dtype
        )
        mixer, network = layer.mixer, layer.feed_forward
        for kind in ("weight", "bias"):
            parts = [getattr(p, kind) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
            getattr(theirs.self_attn, f"in_proj_{kind}").data.copy_(torch.cat(parts))
            for name, ours in {
                "self_attn.out_proj": mixer.out_proj,
                "linear1": network.linear1,
                "linear2": network.linear2,
                "norm1": layer.norm1,
                "norm2": layer.norm2,
            }.items():
                p = getattr(theirs.get_submodule(name), kind)
                p.data.copy_(getattr(ours, kind))
                gradients[f"encoder.layers.{i}.", name, kind] = p
        z = theirs(z)
    z = F.layer_norm(z, (E,), model.encoder.norm.weight, model.encoder.norm.bias, 1e-6)
    return model.head(z[:, 0]), gradients


def test_it_is_the_papers_equations_forward_and_backward():
    model = vit().double()
    a, b = (images(dtype=torch.float64).requires_grad_() for _ in range(2))
    right, theirs = by_torch(model, b)
    (right * torch.arange(6)).sum().backward()
    shared = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert {
        "class_token",
        "positions",
        "patches.projection.weight",
        "encoder.norm.bias",
        "head.weight",
    } <= shared.keys()
    model.zero_grad()
    found = model(a)
    torch.testing.assert_close(found, right)
    (found * torch.arange(6)).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    for name, gradient in shared.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
    for (stem, name, kind), p in theirs.items():
        ours = {"self_attn.out_proj": "mixer.out_proj", "linear1": "feed_forward.linear1"}
        ours = (ours | {"linear2": "feed_forward.linear2"}).get(name, name)
        torch.testing.assert_close(model.get_parameter(f"{stem}{ours}.{kind}").grad, p.grad)


@pytest.mark.parametrize(
    "options, millions",
    [
        ({}, 86),
        ({"d_model": 1024, "n_heads": 16, "d_ff": 4096, "n_layers": 24}, 307),
        ({"patch_size": 14, "d_model": 1280, "n_heads": 16, "d_ff": 5120, "n_layers": 32}, 632),
    ],
    ids=["Base", "Large", "Huge"],
)
def test_the_sizes_of_the_papers_table_1(options, millions):
    with torch.device("meta"):
        model = VisionTransformer(**options)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 / millions - 1) < 0.01


@pytest.mark.claim("A2.2", "holds")
def test_vit_base_tensor_by_tensor():
    """Layer, width, feed-forward and heads of table 1; N = 224² / 16² patches and a class token."""
    with torch.device("meta"):
        model = VisionTransformer()
    e, f, n = 768, 3072, 224 * 224 // 16**2
    layer = 4 * (e * e + e) + (e * f + f) + (f * e + e) + 2 * 2 * e
    parts = {"patches": 3 * 16 * 16 * e + e, "class_token": e, "positions": (n + 1) * e, "encoder.layers": 12 * layer}
    parts |= {"encoder.norm": 2 * e, "head": 1000 * e + 1000}
    for part, count in parts.items():
        assert sum(p.numel() for name, p in model.named_parameters() if name.startswith(part)) == count, part
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters()) == 86_567_656
    assert [layer.mixer.n_heads for layer in model.encoder.layers] == [12] * 12
    assert (model.n_patches, model.n_special, model.grid) == (196, 1, (14, 14))


@pytest.mark.claim("A5.1", "holds")
def test_an_image_is_n_tokens_for_the_same_layers_that_read_a_text():
    """N = HW/P²; and one Encoder object, with the same weights, reads words and patches, and learns from both."""
    model = vit()
    words = nn.Embedding(50, E)
    text = words(torch.randint(50, (2, 11), generator=torch.Generator().manual_seed(0)))
    blocks = model.encoder
    assert isinstance(blocks, Encoder) and model.embed(images()).shape == (B, 1 + 8 * 15 // 20, E)
    read, seen = blocks(text), model.features(images())
    assert read.shape == (2, 11, E) and seen.shape == (B, 7, E)
    assert torch.equal(seen, blocks(model.embed(images())))
    weight = blocks.layers[0].mixer.q_proj.weight
    from_text, from_image = (torch.autograd.grad(x.square().sum(), weight, retain_graph=True)[0] for x in (read, seen))
    both = torch.autograd.grad(read.square().sum() + seen.square().sum(), weight)[0]
    torch.testing.assert_close(both, from_text + from_image)
    assert from_text.abs().min() > 0 and from_image.abs().min() > 0


def test_one_layer_reaches_the_whole_image():
    """The support of the Jacobian: every patch's vector after one layer moves with every patch."""
    model = vit(n_layers=1).double()
    x = model.embed(images(batch=1, dtype=torch.float64))[0]
    slope = torch.autograd.functional.jacobian(lambda x: model.encoder.layers[0](x[None])[0], x)
    assert (slope.abs().amax((1, 3)) > 0).all()


# --- tokens, positions and pools -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["class", "mean", "class and mean"])
def test_what_the_head_reads(pool):
    model = vit(pool=pool, n_registers=2)
    x = model.features(images())
    read = {"class": x[:, 0], "mean": x[:, 3:].mean(1)}
    read["class and mean"] = torch.cat([read["class"], read["mean"]], -1)
    torch.testing.assert_close(model(images()), model.head(read[pool]))
    assert model.head.in_features == (2 * E if pool == "class and mean" else E)
    torch.testing.assert_close(vit(pool=pool, classes=0)(images()).shape[1], model.head.in_features)


def test_without_a_class_token_the_patches_are_alone():
    model = vit(pool="mean", class_token=False)
    assert model.class_token is None and model.n_special == 0 and model.positions.shape == (6, E)
    assert model.features(images()).shape == (B, 6, E) and model(images()).shape == (B, 6)


def test_registers_have_no_position_and_come_after_the_class_token():
    model = vit(n_registers=3, distilled=True)
    assert model.positions.shape == (2 + 6, E) and model.n_special == 5
    x = model.embed(images())
    torch.testing.assert_close(x[:, 2:5], model.registers.expand(B, 3, E))
    torch.testing.assert_close(x[:, 0], (model.class_token + model.positions[0]).expand(B, E))
    torch.testing.assert_close(x[:, 1], (model.distillation_token + model.positions[1]).expand(B, E))
    torch.testing.assert_close(x[:, 5:], model.patches(images()) + model.positions[2:])


def test_the_distillation_token_has_a_head_of_its_own():
    model = vit(distilled=True)
    x = model.features(images())
    first, second = model.head(x[:, 0]), model.distillation_head(x[:, 1])
    torch.testing.assert_close(model(images()), (first + second) / 2)
    both = model.train()(images())
    torch.testing.assert_close(both, (first, second))
    model.eval().distillation_head = None
    torch.testing.assert_close(model(images()), first)


def test_without_positions_an_image_is_a_set_of_patches():
    model, order = vit(positions="none"), torch.randperm(6, generator=torch.Generator().manual_seed(0))
    x = images()
    moved = x.unflatten(2, (2, 4)).unflatten(4, (3, 5)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]
    moved = moved.unflatten(1, (2, 3)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    torch.testing.assert_close(model(moved), model(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.features(moved)[:, 1:], model.features(x)[:, 1:][:, order], atol=1e-5, rtol=1e-5)
    for positions in ("learned", "fixed"):
        other = vit(positions=positions)
        assert (other(moved) - other(x)).abs().max() > 0.01


def test_fixed_positions_are_stored_and_not_trained():
    for positions in ("fixed", "none"):
        model = vit(positions=positions)
        assert "positions" in model.state_dict() and "positions" not in dict(model.named_parameters())
        assert not model.positions[0].any()
    assert not model.positions.any()
    assert isinstance(vit().positions, nn.Parameter)


def test_learned_tokens_start_small_and_different():
    torch.manual_seed(0)
    model = VisionTransformer(32, 4, 10, d_model=64, n_heads=4, d_ff=64, n_layers=1, n_registers=4, distilled=True)
    for learned in (model.positions, model.registers, model.class_token, model.distillation_token):
        assert 0.014 < float(learned.detach().std()) < 0.026


# --- other sizes -----------------------------------------------------------------------------------------------------


def test_another_size_takes_interpolated_positions_and_leaves_the_class_tokens_alone():
    model = vit((8, 10), (4, 5))
    for size in ((8, 10), (16, 30), (4, 5), (12, 10)):
        rows, columns = size[0] // 4, size[1] // 5
        table = model.positions_at(rows, columns)
        assert table.shape == (1 + rows * columns, E) and torch.equal(table[0], model.positions[0])
        patches = model.positions[1:].T.view(1, E, 2, 2)
        expected = F.interpolate(patches, (rows, columns), mode="bicubic").flatten(2)[0].T
        torch.testing.assert_close(table[1:], expected)
        assert model(images(*size)).shape == (B, 6)
    assert model.positions_at(2, 2) is model.positions
    model(images(16, 30)).sum().backward()
    assert (model.positions.grad.abs().sum(1) > 0).all(), "interpolated positions teach the table"


# --- weights, engines, training --------------------------------------------------------------------------------------


@torch.no_grad()
def test_weights_of_every_layer():
    model = vit(n_registers=1)
    scores, weights = model(images(), return_weights=True)
    assert weights.shape == (2, B, HEADS, 8, 8)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, B, HEADS, 8))
    torch.testing.assert_close(scores, model(images()))
    torch.testing.assert_close(model.features(images(), return_weights=True)[1], weights)


@torch.no_grad()
def test_any_op_and_any_mixer():
    plain, flash = vit(), vit(op=FlashAttention())
    torch.testing.assert_close(flash(images()), plain(images()), atol=1e-5, rtol=1e-5)
    assert (vit(op=LinearAttention())(images()) - plain(images())).abs().max() > 1e-3

    class Mean(nn.Module):
        def __init__(self, d_model):
            super().__init__()
            self.out = nn.Linear(d_model, d_model)

        def forward(self, x):
            return self.out(x.mean(1, keepdim=True).expand_as(x))

    model = vit(mixer=Mean)
    assert not any(isinstance(m, MultiHeadAttention) for m in model.modules()) and model(images()).shape == (B, 6)


def test_dropout_and_stochastic_depth_act_in_training_alone():
    model = vit(dropout=0.2, drop_path=0.5)
    right = vit()(images())
    torch.testing.assert_close(model(images()), right)
    model.train()
    assert (model(images()) - model(images())).abs().max() > 0
    assert [layer.drop_path.p for layer in model.encoder.layers] == [0, 0.5]
    assert model.dropout.p == 0.2


def test_an_empty_batch_gives_no_scores():
    assert vit()(images(batch=0)).shape == (0, 6)


def test_it_learns():
    """Which half of the image is brighter: 40 steps."""
    torch.manual_seed(0)
    model = VisionTransformer(8, 4, 2, d_model=16, n_heads=2, d_ff=32, n_layers=2, n_channels=1)
    x = torch.randn(64, 1, 8, 8)
    label = (x[..., :4].mean((1, 2, 3)) > x[..., 4:].mean((1, 2, 3))).long()
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        adam.zero_grad()
        F.cross_entropy(model(x), label).backward()
        adam.step()
    assert (model(x).argmax(1) == label).float().mean() > 0.9


# --- compiled, exported, transformed, in half precision --------------------------------------------------------------


@torch.no_grad()
def test_compiled_for_several_batches_and_sizes():
    model = vit(n_registers=2, pool="class and mean", layer_scale=0.1)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for batch, size in ((2, (8, 15)), (5, (8, 15)), (3, (16, 30))):
        x = images(*size, batch=batch)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"n_registers": 2, "antialias": True, "positions": "fixed"}])
def test_one_exported_program_for_every_batch_and_size(options):
    model = vit(**options)
    rows, columns = Dim("rows", min=2, max=64), Dim("columns", min=2, max=64)
    sizes = {0: Dim("batch", min=2, max=64), 2: 4 * rows, 3: 5 * columns}
    program = export(model, (images(16, 25),), dynamic_shapes={"images": sizes}).module()
    for batch, size in ((3, (8, 15)), (2, (16, 30)), (5, (12, 40))):
        x = images(*size, batch=batch)
        torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-5)


def test_the_gradient_of_each_sample():
    model = vit(op=attention)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x, label = images(), torch.tensor([0, 3, 5])

    def loss(parameters, x, label):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x[None],)), label[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, label)
    for i in range(B):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), label[i : i + 1]).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(each[name][i], p.grad, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_half_precision_and_autocast():
    right = vit()(images())
    for dtype in (torch.bfloat16, torch.float16):
        found = vit().to(dtype)(images().to(dtype))
        assert found.dtype == dtype
        assert (found.float() - right).norm() < 0.1 * right.norm()
    with torch.autocast("cpu", torch.bfloat16):
        found = vit(n_registers=1)(images(16, 30))
    assert found.isfinite().all()
    assert (found.float() - vit(n_registers=1)(images(16, 30))).norm() < 0.1 * right.norm()


def test_state_comes_back():
    model, other = (
        vit(n_registers=2, distilled=True, layer_scale=0.1),
        vit(n_registers=2, distilled=True, layer_scale=1),
    )
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images()), model(images()))


# --- what is refused -------------------------------------------------------------------------------------------------


def spoilt(value):
    x = images()
    x[1, 0, 3, 2] = value
    return x


@pytest.mark.parametrize(
    "x, says",
    [
        (None, "images must be a Tensor, got NoneType"),
        (images()[0], r"images must be \(B, C, H, W\), got \(3, 8, 15\); a single image goes in as image\[None\]"),
        (images(channels=1), r"images must have 3 channels, \(B, C, H, W\), got \(3, 1, 8, 15\)"),
        (images().permute(0, 2, 3, 1), "move the channels with images.permute"),
        (images(9, 15), "images must be of whole patches of 4 x 5 pixels, got 9 x 15: resize or crop them"),
        (images(0, 15), "images must be of whole patches"),
        ((255 * images()).byte(), "images must be floating point, got torch.uint8: divide by 255"),
        (spoilt(float("nan")), "images must be finite, got NaN or infinity in image 1"),
        (spoilt(float("inf")), "images must be finite, got NaN or infinity in image 1"),
    ],
)
def test_images_that_are_refused(x, says):
    with pytest.raises((TypeError, ValueError), match=says):
        vit()(x)


@pytest.mark.parametrize(
    "arguments, options, says",
    [
        ((8, 3), {}, r"patch_size must divide image_size=\(8, 8\), got \(3, 3\)"),
        ((0, 4), {}, "image_size must be a positive integer"),
        ((8, (4, -4)), {}, "patch_size must be a positive integer"),
        ((8, 4, -1), {}, "n_registers and n_classes must be 0 or more, got 0 and -1"),
        ((8, 4), {"n_registers": -2}, "n_registers and n_classes must be 0 or more, got -2 and 1000"),
        ((8, 4), {"pool": "max"}, "pool must be one of 'class', 'mean', 'class and mean', got 'max'"),
        ((8, 4), {"positions": "rotary"}, "positions must be one of 'learned', 'fixed', 'none', got 'rotary'"),
        ((8, 4), {"positions": "fixed", "d_model": 6, "n_heads": 2}, "d_model must be a multiple of 4"),
        ((8, 4), {"class_token": False}, 'class_token=False needs pool="mean"'),
        ((8, 4), {"class_token": False, "pool": "mean", "distilled": True}, "class_token=False needs"),
        ((8, 4), {"distilled": True, "pool": "mean"}, "distilled=True needs pool=\"class\", got 'mean'"),
        ((8, 4), {"drop_path": 1.0}, "drop_path must be at least 0 and below 1"),
        ((8, 4), {"n_heads": 5}, "n_heads"),
    ],
)
def test_arguments_that_are_refused(arguments, options, says):
    with pytest.raises(ValueError, match=says):
        VisionTransformer(*arguments, **(SMALL | options))
