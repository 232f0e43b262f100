"""The Perceiver Resampler: a fixed number of tokens, by hand, against Idefics' own, gradients, what is refused."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from nondual.multimodal.perceiver import PerceiverResampler, ResamplerLayer, UnbiasedFeedForward

D, R, H, W = 10, 3, 2, 4


def resampler(seed=0, **more):
    torch.manual_seed(seed)
    return PerceiverResampler(D, R, **(dict(n_layers=2, n_heads=H, d_head=W) | more))


def features(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.claim("A6.4", "holds if")
@pytest.mark.parametrize("n", [1, 2, 63, 111])
def test_the_number_of_tokens_does_not_depend_on_how_many_vectors_there_are(n):
    assert resampler()(features(5, n)).shape == (5, R, D)
    assert resampler(n_frames=4)(features(5, 3, n)).shape == (5, R, D)


@torch.no_grad()
def test_a_layer_by_hand():
    """One head: softmax over features and latents side by side, what is found added to the latents."""
    layer = ResamplerLayer(D, 1, D, 7)
    layer.feed_forward.linear2.weight.zero_()
    latents, x = features(2, R), features(2, 5, seed=2)
    queries = layer.norm_latents(latents)
    memory = torch.cat([layer.norm_features(x), queries], 1)
    project = layer.mixer
    weights = (project.q_proj(queries) @ project.k_proj(memory).mT / D**0.5).softmax(-1)
    right = latents + project.out_proj(weights @ project.v_proj(memory))
    torch.testing.assert_close(layer(latents, x), right)
    assert weights.shape == (2, R, 5 + R)


@torch.no_grad()
def test_where_a_vector_stands_does_not_matter_and_when_does():
    one = resampler()
    x = features(2, 7)
    torch.testing.assert_close(one(x), one(x[:, torch.randperm(7)]))
    several = resampler(n_frames=3)
    video = features(2, 3, 7)
    torch.testing.assert_close(several(video), several(video[:, :, torch.randperm(7)]))
    assert not torch.allclose(several(video), several(video.flip(1)), atol=1e-3)
    still = resampler(n_frames=3)
    still.time.zero_()
    torch.testing.assert_close(still(video), still(video.flip(1)))
    # an image is a video of one frame, with the first frame's time
    torch.testing.assert_close(several(x), several(x[:, None]))


def idefics():
    """Idefics' resampler with random weights and with GELU, as in the paper, where it has ReLU."""
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    torch.manual_seed(3)
    config = IdeficsConfig(vision_config={"embed_dim": D}, perceiver_config={"qk_layer_norms_perceiver": False})
    made = IdeficsPerceiverResampler(config, D, depth=2, n_heads=H, head_dim=W, n_latents=R)
    for p in made.parameters():
        p.data = p.data + 0.3 * torch.randn_like(p)
    for _, network in made.blocks:
        network.act = nn.GELU()
    return made


NAMES = {
    "layer_norm.": "norm.",
    "0.context_layer_norm.": "norm_features.",
    "0.latents_layer_norm.": "norm_latents.",
    "0.output_proj.": "mixer.out_proj.",
    "0.": "mixer.",
    "1.ln.": "feed_forward.norm.",
    "1.fc.": "feed_forward.linear1.",
    "1.c_proj.": "feed_forward.linear2.",
}


def renamed(name):
    """Idefics' name of a tensor in ours; there 0 is the attention of a layer and 1 its feed-forward network."""
    layer, name = name.split(".", 2)[1:] if name.startswith("blocks.") else (None, name)
    start = next((theirs for theirs in NAMES if name.startswith(theirs)), "")
    name = NAMES.get(start, "") + name.removeprefix(start)
    return name if layer is None else f"layers.{layer}.{name}"


def test_it_is_idefics_resampler_forward_and_backward():
    theirs, ours = idefics(), resampler()
    ours.load_state_dict({renamed(name): tensor.clone() for name, tensor in theirs.state_dict().items()})
    x = features(3, 11)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, right = ours(one), theirs(other)
    torch.testing.assert_close(out, right, atol=1e-5, rtol=1e-5)
    seed = torch.randn_like(right)
    out.backward(seed)
    right.backward(seed)
    torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.latents.grad, theirs.latents.grad, atol=1e-4, rtol=1e-4)
    for i, (attention, network) in enumerate(theirs.blocks):
        layer = ours.layers[i]
        for a, b in (
            (layer.mixer.k_proj, attention.k_proj),
            (layer.norm_features, attention.context_layer_norm),
            (layer.feed_forward.linear2, network.c_proj),
        ):
            torch.testing.assert_close(a.weight.grad, b.weight.grad, atol=1e-4, rtol=1e-4)


def test_gradients_by_finite_differences():
    made = resampler(n_layers=1, n_frames=2).double()
    x = features(1, 2, 3, dtype=torch.float64).requires_grad_()
    names = [name for name, _ in made.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in made.parameters()]

    def call(x, *values):
        return torch.func.functional_call(made, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


def test_nothing_but_the_norms_has_a_bias():
    for name, module in resampler().named_modules():
        assert not isinstance(module, nn.Linear) or module.bias is None, name


def test_one_program_for_every_number_of_vectors():
    made = resampler().eval()
    program = torch.export.export(made, (features(2, 5),), dynamic_shapes=({1: Dim("s", min=2, max=500)},)).module()
    for n in (2, 5, 77):
        torch.testing.assert_close(program(features(2, n)), made(features(2, n)))


def test_half_precision():
    made = resampler().to(torch.bfloat16)
    assert made(features(2, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert UnbiasedFeedForward(D, 7).to(torch.bfloat16)(features(2, 5)).dtype == torch.bfloat16  # wider than it


@pytest.mark.parametrize(
    "given, error, says",
    [
        ([[1.0]], TypeError, r"features must be a Tensor, got list"),
        (torch.ones(2, 3, D + 1), ValueError, r"features must be floating point \(I, S, 10\) or \(I, T, S, 10\), got"),
        (torch.ones(3, D), ValueError, r"got torch.float32 \(3, 10\)"),
        (torch.ones(2, 3, D, dtype=torch.int64), ValueError, r"got torch.int64 \(2, 3, 10\)"),
        (torch.ones(2, 0, D), ValueError, r"1 to 2 frames of 1 vector or more, got \(2, 1, 0, 10\)"),
        (torch.ones(2, 3, 5, D), ValueError, r"1 to 2 frames .* got \(2, 3, 5, 10\): take fewer frames, or make the"),
    ],
)
def test_features_that_cannot_be_read(given, error, says):
    with pytest.raises(error, match=says):
        resampler(n_frames=2)(given)


@pytest.mark.parametrize("more", [dict(n_layers=0), dict(n_frames=0), dict(d_head=0)])
def test_sizes_below_one(more):
    (name,) = more
    with pytest.raises(ValueError, match=rf"{name} must be 1 or more, got 0"):
        resampler(**more)
    with pytest.raises(ValueError, match=r"n_latents must be 1 or more, got 0"):
        PerceiverResampler(D, 0)


def test_it_says_what_it_is():
    assert resampler(n_frames=2).extra_repr() == "10, n_latents=3, n_frames=2"
