"""CLIP and SigLIP: what they compute and learn, the scale and its limit, and classifiers made of texts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from nondual import CLIP, SigLIP
from nondual.multimodal.clip import SentenceTower, zero_shot_classifier, zero_shot_weights
from nondual.training import optimiser, train

B, P, T, D = 7, 6, 5, 4  # pairs, width of an image and of a text, joint width
KINDS = [CLIP, SigLIP]


def model(kind=CLIP, dtype=torch.float64, seed=0, **more):
    torch.manual_seed(seed)
    return kind(nn.Linear(P, 11), nn.Identity(), D, d_image=11, d_text=T, **more).to(dtype)


def batch(pairs=B, seed=1, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(pairs, P, generator=draw, dtype=dtype), torch.randn(pairs, T, generator=draw, dtype=dtype)


# --- what is computed ------------------------------------------------------------------------------------------------


def test_by_hand():
    """Towers and projections that do nothing, vectors on the axes and between: cosines 1, 0 and 0.6, times 10."""
    both = CLIP(nn.Identity(), nn.Identity(), None, d_image=2, d_text=2, scale=10.0)
    found = both(torch.tensor([[7.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.1, 0.0], [0.0, 9.0], [-1.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[10.0, 0.0, -10.0], [6.0, 8.0, -6.0]]))
    other = SigLIP(nn.Identity(), nn.Identity(), None, d_image=2, d_text=2)
    torch.testing.assert_close(other(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.1, 0.0]])), torch.tensor([[-4.0]]))


@pytest.mark.parametrize("kind", KINDS)
def test_similarities_are_cosines_times_the_exponential_of_tau(kind):
    ours, (images, texts) = model(kind), batch()
    z_images = F.normalize(ours.image_tower(images) @ ours.image_projection.weight.T, dim=-1)
    z_texts = F.normalize(texts @ ours.text_projection.weight.T, dim=-1)
    torch.testing.assert_close(ours.encode_images(images), z_images)
    torch.testing.assert_close(ours.encode_texts(texts), z_texts)
    right = ours.log_scale.exp() * z_images @ z_texts.T + (ours.bias if kind is SigLIP else 0)
    torch.testing.assert_close(ours(images, texts), right)
    torch.testing.assert_close(ours.logits(z_images, z_texts), right)
    assert ours(images[:3], texts).shape == (3, B) and ours(images[:0], texts).shape == (0, B)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_follows_from_the_similarities_and_so_does_every_gradient(kind):
    ours, (images, texts) = model(kind), batch()
    s, right = ours(images, texts), torch.arange(B)
    if kind is CLIP:
        formula = (F.cross_entropy(s, right) + F.cross_entropy(s.T, right)) / 2
    else:
        formula = F.binary_cross_entropy_with_logits(s, torch.eye(B, dtype=s.dtype), reduction="sum") / B
    loss = ours.loss(images, texts)
    torch.testing.assert_close(loss, formula)
    names, parameters = zip(*ours.named_parameters())
    assert "log_scale" in names and ("bias" in names) == (kind is SigLIP)
    mine, its = torch.autograd.grad(loss, parameters), torch.autograd.grad(formula, parameters)
    for name, a, b in zip(names, mine, its):
        assert (a != 0).any(), name
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


def test_it_starts_where_the_papers_say():
    clip, siglip = model(dtype=torch.float32), model(SigLIP, dtype=torch.float32)
    assert math.isclose(clip.log_scale.item(), math.log(1 / 0.07), rel_tol=1e-6) and clip.shift is None
    assert math.isclose(siglip.log_scale.item(), math.log(10), rel_tol=1e-6) and siglip.bias.item() == -10
    images, texts = batch(64, dtype=torch.float32)
    assert siglip.loss(images, texts).item() < 15  # the B pairs alone are wrong, by about 10 each
    assert model(SigLIP, torch.float32, bias=0.0).loss(images, texts).item() > 100  # all B² cost something


def test_in_chunks_the_loss_of_siglip_is_the_same():
    ours, (images, texts) = model(SigLIP), batch()
    torch.testing.assert_close(ours.loss(images, texts, chunk=3), ours.loss(images, texts))


# --- the scale and its limit -----------------------------------------------------------------------------------------


def test_the_gradient_of_the_scale_is_the_one_of_finite_differences():
    for kind in KINDS:
        ours, (images, texts) = model(kind), batch()
        (gradient,) = torch.autograd.grad(ours.loss(images, texts), ours.log_scale)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                ours.log_scale += step
                values.append(ours.loss(images, texts).item())
                ours.log_scale -= step
        assert math.isclose(gradient.item(), (values[0] - values[1]) / 2e-6, rel_tol=1e-5)


def test_the_clamp_is_after_the_step_so_that_the_scale_can_come_back():
    ours, (images, texts) = model(), batch()
    with torch.no_grad():
        ours.log_scale.fill_(math.log(100) + 1)
    (gradient,) = torch.autograd.grad(ours.loss(images, texts), ours.log_scale)
    assert gradient != 0  # a clamp within the loss would have none here
    ours.clamp_scale()
    assert (
        math.isclose(ours.log_scale.item(), math.log(100)) and ours.log_scale.requires_grad and ours.log_scale.is_leaf
    )
    before = ours.log_scale.item()
    ours.clamp_scale()
    with torch.no_grad():
        ours.log_scale -= 0.5
    ours.clamp_scale()
    assert ours.log_scale.item() == before - 0.5  # below the limit nothing is changed


def test_as_a_hook_of_the_optimiser_the_limit_holds_at_every_step():
    """Texts that are the images themselves ask for an ever larger scale."""
    seen = {}
    for clamped in (True, False):
        torch.manual_seed(0)
        ours = CLIP(nn.Identity(), nn.Identity(), D, d_image=D, d_text=D, scale=2.0, largest_scale=2.5)
        adam = optimiser(ours, 0.05)
        if clamped:
            adam.register_step_post_hook(lambda *_, m=ours: m.clamp_scale())
        scales = []
        train(
            ours,
            lambda x, m=ours: m.loss(x, x),
            lambda draw: torch.randn(B, D, generator=draw),
            optimiser=adam,
            steps=40,
            name=None,
            measure=lambda m=ours, s=scales: s.append(float(m.scale.detach())) or {},
            log_every=1,
        )
        seen[clamped] = scales
    assert max(seen[True]) <= 2.5 + 1e-6 and seen[True][-1] > 2.49 and seen[False][-1] > 2.6


def test_pairs_are_learnt_and_retrieved_and_the_scale_has_no_weight_decay():
    from nondual.multimodal.retrieval import recall

    for kind in KINDS:
        torch.manual_seed(0)
        ours = kind(nn.Linear(P, 16), nn.Identity(), 8, d_image=16, d_text=T)
        mix = torch.randn(P, T)
        adam = optimiser(ours, 0.02)
        (decayed,) = [group["params"] for group in adam.param_groups if group["weight_decay"]]
        assert all(p.ndim > 1 for p in decayed)

        def draw(generator, size=64, mix=mix):
            images = torch.randn(size, P, generator=generator)
            return images, images @ mix

        train(ours, lambda pair, m=ours: m.loss(*pair), draw, optimiser=adam, steps=150, name=None)
        images, texts = draw(torch.Generator().manual_seed(99), 200)
        with torch.no_grad():
            found = recall(ours(images, texts), k=[1])
        assert min(found.image_to_text[1], found.text_to_image[1]) > 0.5  # chance is 0.005


# --- classifiers made of texts ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_stacked_as_a_linear_layer_give_the_very_same_similarities(kind):
    """To the bit: what is called zero-shot classification is this layer, and the text tower has written its weights."""
    ours, (images, texts) = model(kind, torch.float32), batch(dtype=torch.float32)
    layer = nn.Linear(D, B, bias=kind is SigLIP)
    layer.weight.copy_(ours.scale * ours.encode_texts(texts))
    if kind is SigLIP:
        layer.bias.fill_(ours.bias)
    assert torch.equal(layer(ours.encode_images(images)), ours(images, texts))
    made = zero_shot_classifier(ours, [text[None] for text in texts])
    torch.testing.assert_close(made.weight, layer.weight, rtol=1e-6, atol=1e-6)  # the texts went in one by one
    torch.testing.assert_close(made(ours.encode_images(images)), ours(images, texts), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in made.parameters()) and (made.bias is not None) == (kind is SigLIP)


def test_prompts_are_averaged_at_unit_length():
    ours, (_, texts) = model(), batch()
    classes = [texts[:3], texts[3:4], texts[4:]]
    found = zero_shot_weights(ours, classes)
    for row, prompts in zip(found, classes):
        z = F.normalize(ours.text_projection(prompts), dim=-1).mean(0)
        torch.testing.assert_close(row, z / z.norm())
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3, dtype=torch.float64))
    louder = [texts[:3] * torch.tensor([[9.0], [1], [0.1]]), *classes[1:]]
    torch.testing.assert_close(zero_shot_weights(ours, louder), found)  # no prompt counts more for its length
    assert not found.requires_grad


def test_prompts_that_cancel_leave_nothing():
    ours, (_, texts) = model(dtype=torch.float32), batch(dtype=torch.float32)
    assert (zero_shot_weights(ours, [torch.stack([texts[0], -texts[0]]), texts[1:]])[0] == 0).all()
    nearly = torch.stack([texts[0], -texts[0] * (1 + 1e-6) + 1e-7])  # but for rounding, which differs by processor
    assert (zero_shot_weights(ours, [nearly, texts[1:]])[0] == 0).all()


def test_the_modes_of_all_modules_are_as_before():
    ours = CLIP(nn.Linear(P, 11), nn.Sequential(nn.Dropout(0.9), nn.Dropout(0.9)), D, d_image=11, d_text=T)
    ours.train()
    ours.text_tower[0].eval()
    prompts = [batch(dtype=torch.float32)[1]]
    assert torch.equal(zero_shot_weights(ours, prompts), zero_shot_weights(ours, prompts))  # without dropout
    with pytest.raises(ValueError):
        zero_shot_weights(ours, [torch.ones(2, 2)])
    assert ours.training and ours.text_tower[1].training and not ours.text_tower[0].training


@pytest.mark.parametrize(
    "prompts, error, says",
    [
        (torch.ones(2, T), TypeError, r"prompts must be a list with the texts of each class, got Tensor"),
        ("a cat", TypeError, r"prompts must be a list with the texts of each class, got str"),
        ({"cat": 1}, TypeError, r"prompts must be a list with the texts of each class, got dict"),
        ([], ValueError, r"prompts must have 1 class or more, got none"),
        ([torch.ones(1, T), torch.ones(0, T)], ValueError, r"a text or more for each class, got none for class 1"),
        (
            [torch.full((1, T), math.nan)],
            ValueError,
            r"prompts must have finite vectors, got NaN or infinity in class 0",
        ),
        ([torch.ones(T)], ValueError, r"text_tower must give floating point \(B, d_text\) = \(B, 5\), got .* \(5,\)"),
    ],
)
def test_prompts_that_make_no_classifier_are_refused(prompts, error, says):
    with pytest.raises(error, match=says):
        zero_shot_classifier(model(dtype=torch.float32), prompts)


# --- a frozen sentence encoder ---------------------------------------------------------------------------------------


class Letters(nn.Module):
    """A sentence encoder: how often each of five letters stands in the text."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(T))

    def encode(self, sentences):
        return torch.tensor([[float(text.count(letter)) for letter in "aeiou"] for text in sentences]) * self.weight


def test_sentences_or_their_vectors_and_the_encoder_is_no_part_of_the_model():
    tower = SentenceTower(Letters())
    ours = CLIP(nn.Linear(P, 11), tower, D, d_image=11, d_text=T)
    texts = ["a cat", "a zebra", "an owl and a bee"]
    vectors = tower(texts)
    assert not vectors.requires_grad
    torch.testing.assert_close(ours.encode_texts(texts), ours.encode_texts(vectors))
    assert not any("tower.encoder" in name for name in [*ours.state_dict(), *dict(ours.named_parameters())])
    loose = CLIP(nn.Linear(P, 11), nn.Identity(), D, d_image=11, d_text=T)
    loose.load_state_dict(ours.state_dict())  # trained on vectors or on sentences, it is one checkpoint
    torch.testing.assert_close(loose.encode_texts(vectors), ours.encode_texts(texts))
    assert ours.double().encode_texts(texts).dtype == torch.float64
    with pytest.raises(ValueError, match=r"text_tower must give floating point .*, got torch.int64 \(2, 5\)"):
        ours.encode_texts(torch.ones(2, T, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"encoder must have a method encode\(sentences\), got Linear"):
        SentenceTower(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"encoder must have a method encode\(sentences\), got str"):
        SentenceTower("minilm")


@torch.no_grad()
def test_minilm_is_a_text_tower():
    from nondual.pretrained import minilm

    torch.manual_seed(0)
    tower = SentenceTower(minilm())
    ours = CLIP(nn.Linear(P, 11), tower, 16, d_image=11, d_text=384)
    texts = ["a red apple", "an apple that is red", "a train"]
    z = ours.encode_texts(texts)
    torch.testing.assert_close(z, ours.encode_texts(tower(texts)))
    assert z[0] @ z[1] > z[0] @ z[2]
    assert zero_shot_weights(ours, [texts[:2], texts[2:]]).shape == (2, 16)


# --- dtypes, programs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_and_in_half_precision_similarities_are_in_float32(kind):
    ours, (images, texts) = model(kind, torch.float32), batch(dtype=torch.float32)
    right = ours(images, texts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = ours.encode_images(images), ours.encode_texts(texts)
        found, loss = ours(images, texts), ours.loss(images, texts)
    assert found.dtype == loss.dtype == z[0].dtype == torch.float32
    torch.testing.assert_close(found, ours.logits(*z))  # the towers ran in bfloat16, the similarities did not
    torch.testing.assert_close(found, right, atol=0.5, rtol=0.1)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())
    half = ours.to(torch.bfloat16)(images.bfloat16(), texts.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, right, atol=0.5, rtol=0.1)


def test_a_tower_that_gives_zeros_or_nan_breaks_no_other_row():
    ours, (images, texts) = model(dtype=torch.float32), batch(dtype=torch.float32)
    texts[1] = 0
    ours.loss(images, texts).backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())
    texts[2] = math.nan
    found = ours(images, texts)
    assert found[:, 2].isnan().all() and found[:, [0, 1, 3, 4, 5, 6]].isfinite().all()
    assert (found[:, 1] == 0).all() and ours.loss(images, texts).isnan()


class Loss(nn.Module):
    def __init__(self, whole):
        super().__init__()
        self.whole = whole

    def forward(self, images, texts):
        return self.whole.loss(images, texts)


@pytest.mark.parametrize("kind", KINDS)
def test_one_compiled_program_and_one_exported_for_every_batch(kind):
    ours = model(kind, torch.float32)
    compiled = torch.compile(ours.loss, fullgraph=True, dynamic=True, backend="aot_eager")
    pairs = Dim("pairs", min=2, max=512)
    shapes = {"dynamic_shapes": ({0: pairs}, {0: pairs})}
    program = torch.export.export(ours, batch(5, dtype=torch.float32), **shapes)
    of_loss = torch.export.export(Loss(ours), batch(5, dtype=torch.float32), **shapes)
    for size in (4, 9):
        images, texts = batch(size, dtype=torch.float32)
        torch.testing.assert_close(compiled(images, texts), ours.loss(images, texts))
        torch.testing.assert_close(program.module()(images, texts), ours(images, texts))
        torch.testing.assert_close(of_loss.module()(images, texts), ours.loss(images, texts))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_towers_that_do_not_fit_are_refused(kind):
    ours, (images, texts) = model(kind, torch.float32), batch(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"texts must be as many as images, one for each, got 6 for 7"):
        ours.loss(images, texts[:-1])
    with pytest.raises(ValueError, match=r"a batch must have 1 pair or more, got none"):
        ours.loss(images[:0], texts[:0])
    with pytest.raises(
        ValueError, match=r"text_tower must give floating point \(B, d_text\) = \(B, 5\), got .* \(7, 3\)"
    ):
        ours(images, texts[:, :3])
    with pytest.raises(ValueError, match=r"text_tower must give floating point .*got torch.int64 \(7, 5\)"):
        ours(images, texts.long())
    with pytest.raises(TypeError, match=r"text_tower must give a Tensor, got list"):
        ours(images, ["a cat"])
    ours.image_tower = nn.Linear(P, 12)
    with pytest.raises(ValueError, match=r"image_tower must give .*\(B, d_image\) = \(B, 11\), got .* \(7, 12\)"):
        ours(images, texts)


@pytest.mark.parametrize(
    "joint, options, says",
    [
        (0, {}, "d_joint must be 1 or more, got 0"),
        (3, {"d_image": -1}, "d_image must be 1 or more, got -1"),
        (None, {}, "d_joint must be given, since d_image=6 is not d_text=5: it joins the two"),
        (3, {"scale": 0.0}, "scale must be above 0 and at most largest_scale, got 0.0 and 100.0"),
        (3, {"scale": 101.0}, "scale must be above 0 and at most largest_scale, got 101.0 and 100.0"),
        (3, {"scale": math.nan}, "scale must be above 0 and at most largest_scale, got nan and 100.0"),
    ],
)
def test_a_model_that_cannot_be_is_refused(joint, options, says):
    for kind in KINDS:
        with pytest.raises(ValueError, match=says):
            kind(nn.Identity(), nn.Identity(), joint, **({"d_image": P, "d_text": T} | options))
