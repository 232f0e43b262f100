"""Patches by hand, as the strided convolution that they are, and back; positions for another grid; what is refused."""

import pytest
import torch
import torch.nn.functional as F

from nondual.vision_transformers import PatchEmbedding, grid_code, patchify, resampled, unpatchify


def images(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_by_hand():
    """An image of 4 x 6 pixels, numbered row by row, in patches of 2 x 3."""
    image = torch.arange(24).view(1, 1, 4, 6)
    expected = [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11], [12, 13, 14, 18, 19, 20], [15, 16, 17, 21, 22, 23]]
    assert patchify(image, (2, 3))[0].tolist() == expected
    colours = torch.stack([image[:, 0], 100 + image[:, 0]], 1)
    assert patchify(colours, (2, 3))[0, 0].tolist() == [0, 1, 2, 6, 7, 8, 100, 101, 102, 106, 107, 108]


@pytest.mark.parametrize("size, patch", [((12, 12), 4), ((6, 20), (3, 5)), ((7, 7), 7), ((5, 3), 1)])
def test_what_is_cut_is_put_together_again(size, patch):
    x = images(2, 3, *size)
    high, wide = patch if isinstance(patch, tuple) else (patch, patch)
    cut = patchify(x, patch)
    assert cut.shape == (2, size[0] * size[1] // (high * wide), 3 * high * wide)
    assert torch.equal(unpatchify(cut, patch, size), x)


@pytest.mark.parametrize("bias", [True, False])
def test_the_embedding_is_a_linear_map_of_each_patch_and_a_strided_convolution(bias):
    """The same weight, read as a matrix or as a kernel; forward and every gradient."""
    torch.manual_seed(0)
    embedding = PatchEmbedding((3, 5), 7, n_channels=2, bias=bias).double()
    weight, x = embedding.projection.weight, images(2, 2, 6, 20).requires_grad_()
    found = embedding(x)
    assert found.shape == (2, 8, 7) and embedding.grid(x) == (2, 4)
    by_matrix = F.linear(patchify(x, (3, 5)), weight.flatten(1), embedding.projection.bias)
    by_convolution = F.conv2d(x, weight, embedding.projection.bias, stride=(3, 5)).flatten(2).transpose(1, 2)
    wanted = images(2, 8, 7)
    gradients = [
        torch.autograd.grad((y * wanted).sum(), [x, *embedding.parameters()])
        for y in (found, by_matrix, by_convolution)
    ]
    for y, gradient in ((by_matrix, gradients[1]), (by_convolution, gradients[2])):
        torch.testing.assert_close(found, y)
        torch.testing.assert_close(gradients[0], gradient)


def test_a_pixel_moves_its_own_patch_alone():
    embedding, x = PatchEmbedding(4, 6, n_channels=1).double(), images(1, 1, 12, 8)
    moved = x.clone()
    moved[0, 0, 5, 6] += 1  # row 1, column 1 of a grid of 3 x 2
    changed = (embedding(x) != embedding(moved)).any(-1)[0]
    assert changed.tolist() == [False, False, False, True, False, False]


# --- positions -------------------------------------------------------------------------------------------------------


def test_positions_of_the_same_grid_are_the_very_same():
    table = images(6, 5)
    assert resampled(table, (2, 3), (2, 3)) is table


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("to", [(4, 6), (1, 2), (3, 3), (5, 2)])
def test_each_channel_is_interpolated_as_an_image_is(to, antialias):
    table = images(6, 5)
    found = resampled(table, (2, 3), to, antialias=antialias)
    assert found.shape == (to[0] * to[1], 5) and found.dtype == torch.float64
    for channel in range(5):
        image = table[:, channel].view(1, 1, 2, 3)
        expected = F.interpolate(image, to, mode="bicubic", antialias=antialias)
        torch.testing.assert_close(found[:, channel], expected.flatten())
    same = torch.full((6, 5), 0.3, dtype=torch.float64)
    torch.testing.assert_close(resampled(same, (2, 3), to, antialias=antialias), same[:1].expand(to[0] * to[1], 5))


def test_half_precision_is_interpolated_in_float32():
    table = images(6, 5, dtype=torch.float32)
    found = resampled(table.half(), (2, 3), (4, 5))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, resampled(table.half().float(), (2, 3), (4, 5)).half(), atol=0, rtol=0)


def test_the_fixed_code_tells_rows_and_columns_apart():
    code = grid_code(3, 4, 8)
    assert code.shape == (12, 8)
    at = code.view(3, 4, 8)
    assert torch.equal(at[1, :, :4], at[1, :1, :4].expand(4, 4)), "the first half says the row, whatever the column"
    assert torch.equal(at[:, 2, 4:], at[:1, 2, 4:].expand(3, 4)), "the second half says the column"
    step = torch.tensor([1.0, 2.0], dtype=torch.float64)
    angle = torch.stack([step, step / 10000**0.5], 1)  # of rows 1 and 2
    expected = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
    torch.testing.assert_close(at[1:, 0, :4].double(), expected, atol=1e-6, rtol=1e-6)
    assert len({tuple(row) for row in code.tolist()}) == 12


# --- what is refused -------------------------------------------------------------------------------------------------

X = torch.randn(2, 3, 12, 8)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: patchify([1], 4), "images must be a Tensor, got list"),
        (lambda: patchify(X[0], 4), r"images must be \(B, C, H, W\), got \(3, 12, 8\)"),
        (lambda: patchify(X, 5), "whole patches of 5 x 5 pixels, got 12 x 8: resize or crop them"),
        (lambda: patchify(X, (4, 16)), "whole patches of 4 x 16 pixels"),
        (lambda: patchify(X, 0), r"patch_size must be a positive integer, or \(height, width\), got 0"),
        (lambda: patchify(X, True), "patch_size must be a positive integer"),
        (lambda: patchify(X, (4, 4, 4)), "patch_size must be a positive integer"),
        (lambda: patchify(X, 4.0), r"patch_size must be a positive integer, .*, got 4\.0"),
        (lambda: patchify(X, None), "patch_size must be a positive integer"),
        (lambda: unpatchify(X[0, 0], 4, 8), r"x must be \(B, N, C P²\) with N = 2 · 2 patches"),
        (lambda: unpatchify(torch.randn(1, 4, 15), 4, 8), "x must be"),
        (lambda: unpatchify(torch.randn(1, 4, 16), 4, 9), "x must be"),
        (lambda: PatchEmbedding(4, 6)(X.byte()), "floating point, got torch.uint8: divide by 255 and normalise"),
        (lambda: PatchEmbedding(4, 6)(X[:, :1]), r"images must have 3 channels, .*, got \(2, 1, 12, 8\)$"),
        (lambda: PatchEmbedding(4, 6)(X.permute(0, 2, 3, 1)), r"move the channels with images.permute\(0, 3, 1, 2\)"),
        (lambda: PatchEmbedding(4, 6)(X[0]), r"a single image goes in as image\[None\]"),
        (lambda: PatchEmbedding(4, 6)(X[:, :, :0]), "whole patches of 4 x 4 pixels, got 0 x 8"),
        (lambda: resampled(torch.randn(5, 2), (2, 3), (4, 6)), r"positions must be .* \(2 · 3, E\), got \(5, 2\)"),
        (lambda: grid_code(2, 2, 6), "d_model must be a multiple of 4"),
    ],
)
def test_what_is_refused(call, says):
    with pytest.raises((TypeError, ValueError), match=says):
        call()
