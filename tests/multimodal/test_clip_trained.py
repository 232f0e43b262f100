"""The small CLIP of emoji, and the claims of its chapter: one similarity, one space, a classifier made of names."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from nondual.analysis import close_gap, modality_gap, probe_modality
from nondual.data import emoji
from nondual.multimodal.clip import zero_shot_classifier
from nondual.multimodal.retrieval import found, recall
from nondual.pretrained import emoji_clip, from_clip
from nondual.pretrained.emoji_clip import STYLE_NOT_MET, unseen_concepts
from nondual.training import optimiser

ROOT = Path(__file__).parent.parent.parent
MEASURED = json.loads((ROOT / "docs" / "measured" / "clip.json").read_text(encoding="utf-8"))
FOUND = MEASURED["figures"]
NEW_CONCEPT, NEW_STYLE, BOTH_NEW = (
    "seen style, unseen concept",
    "unseen style, seen concept",
    "unseen style, unseen concept",
)
WAYS = ("picture to name", "name to picture")
CHANCE = {1: 1 / 150, 5: 5 / 150}


@pytest.fixture(scope="module")
def model():
    return emoji_clip()


@pytest.fixture(scope="module")
def unseen(model):
    """Vectors of the 150 concepts that it never met: pictures by style, and names."""
    pictures = emoji(["noto", STYLE_NOT_MET])
    row = {concept.hexcode: i for i, concept in enumerate(pictures.concepts)}
    rows = [row[code] for code in unseen_concepts()]
    names = [pictures.concepts[i].name for i in rows]
    with torch.no_grad():
        z = {style: model.encode_images(pictures.pictures[style][rows]) for style in pictures.pictures}
        return z, model.encode_texts(names), names


# --- A6.1 ------------------------------------------------------------------------------------------------------------


@pytest.mark.claim("A6.1", "holds")
def test_the_similarity_is_the_dot_product_times_exp_tau_as_in_an_independent_clip():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config=size | {"vocab_size": 99, "eos_token_id": 98},
        vision_config=size | {"image_size": 12, "patch_size": 4},
        projection_dim=24,
    )
    theirs = transformers.CLIPModel(config).eval()
    ours, ids = from_clip(theirs), torch.randint(98, (5, 7))
    ids[:, -1] = 98
    images = torch.randn(5, 3, 12, 12)
    judge = theirs(input_ids=ids, pixel_values=images, return_loss=True)
    z, w = ours.encode_images(images), ours.encode_texts(ids)
    torch.testing.assert_close(ours.log_scale.exp() * z @ w.T, judge.logits_per_image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.loss(images, ids), judge.loss, atol=1e-5, rtol=1e-5)
    # what the essay leaves out: unit length, and the limit of exp(τ)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))
    ours.log_scale.data.fill_(math.log(99.9))
    adam = optimiser(ours, 0.1)
    adam.register_step_post_hook(lambda *_: ours.clamp_scale())
    ours.log_scale.grad = torch.tensor(-1.0)
    adam.step()
    assert ours.scale.item() == pytest.approx(100, rel=1e-5)


# --- A6.2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.claim("A6.2", "holds if")
def test_unseen_pictures_and_names_find_each_other_and_yet_a_plane_tells_them_apart(unseen):
    z, w, _ = unseen
    for style, pictures in z.items():
        share = recall(pictures @ w.T, k=(1, 5))
        for k in (1, 5):
            assert min(share.image_to_text[k], share.text_to_image[k]) > 3 * CHANCE[k], style
        assert probe_modality(pictures, w) > 0.95 and modality_gap(pictures, w).distance > 0.3, style
    half = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    assert (
        abs(probe_modality(z["noto"][half[:75]], z["noto"][half[75:]]) - 0.5) < 0.15
    )  # the probe finds no more than is there


def test_they_find_each_other_in_every_part_and_with_shuffled_captions_they_do_not():
    for part in (NEW_CONCEPT, NEW_STYLE, BOTH_NEW):
        for way in WAYS:
            for k in (1, 5):
                assert FOUND["longest"]["recall"][part]["name"][f"{way}, {k}"][1] > 3 * CHANCE[k], (part, way, k)
    for part in (NEW_CONCEPT, BOTH_NEW):
        share = FOUND["controls"]["shuffled"]["recall"][part]["name"]["picture to name, 5"]
        assert share[1] < CHANCE[5] < share[2] or share[2] < 2 * CHANCE[5]


def test_the_gap_is_there_before_training_and_closing_it_finds_no_more(unseen):
    z, w, _ = unseen
    assert all(each["probe"] > 0.99 and each["distance"] > 0.3 for each in FOUND["gap"]["untrained"])
    gap = FOUND["gap"]["longest"]
    assert gap["probe"] > 0.95 and gap["probe, gap closed"] < gap["probe"]
    closed = close_gap(z["noto"], w)
    assert modality_gap(*closed).distance < 0.1 < modality_gap(z["noto"], w).distance
    before, after = (found((a @ b.T).float(), 5).mean() for a, b in ((z["noto"], w), closed))
    assert abs(float(after - before)) < 0.1


# --- A6.3 ------------------------------------------------------------------------------------------------------------


@pytest.mark.claim("A6.3", "holds if")
def test_names_alone_make_a_classifier_which_is_a_linear_layer(model, unseen):
    """No step of training; and yet a weight is written, and it is an ordinary linear layer's."""
    z, _, names = unseen
    before = [parameter.clone() for parameter in model.parameters()]
    layer = zero_shot_classifier(model, [[name] for name in names])
    assert type(layer) is nn.Linear and layer.weight.shape == (150, 96) and not layer.weight.requires_grad
    one_by_one = torch.cat([model.encode_texts([name]) for name in names]).detach()
    for pictures in z.values():
        assert torch.equal(layer(pictures), model.logits(pictures, one_by_one))  # the very same scores
        assert (layer(pictures).argmax(1) == torch.arange(150)).double().mean() > 3 * CHANCE[1]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_groups_are_told_by_words_and_by_a_trained_layer_better():
    longest, shuffled = FOUND["zero shot"]["longest"], FOUND["zero shot"]["shuffled"]
    for part in ("seen style", "unseen style"):
        words = longest[part]["three words averaged"]["right"]
        assert words[1] > longest["largest group"] and words[0] > shuffled[part]["three words averaged"]["right"][2]
        assert longest[part]["trained read-out"]["right"][0] > words[0]
