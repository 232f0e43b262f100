"""The linear layer of benchmarks/llava.py between the emoji tower and SmolLM2, and the claim of its chapter."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from nondual.data import emoji
from nondual.multimodal.llava import Llava, Projector
from nondual.pretrained import emoji_clip, our_smollm2
from nondual.pretrained.emoji_clip import unseen_concepts

ROOT = Path(__file__).parent.parent.parent
MEASURED = json.loads((ROOT / "docs" / "measured" / "llava.json").read_text(encoding="utf-8"))
FOUND = MEASURED["figures"]
BEGIN, MARK, STOP = 1, -200, 30


@pytest.fixture(scope="module")
def smollm2():
    """The language model and its tokenizer, read once."""
    return our_smollm2()


@pytest.fixture(scope="module")
def model(smollm2):
    projector = Projector(128, 576, layers=1)
    stored = load_file(ROOT / "docs" / "assets" / "models" / "llava.safetensors")
    projector.linear1.load_state_dict({name: w.float() for name, w in stored.items()})
    return Llava(nn.Identity(), smollm2[0], projector, mark=MARK, d_vision=128).eval()


@pytest.fixture(scope="module")
def unseen(smollm2):
    """The vectors of the 150 pictures that were never met (150, 1, 128), and the tokens of their names."""
    pictures, (_, tokenizer) = emoji(["noto"]), smollm2
    row = {concept.hexcode: i for i, concept in enumerate(pictures.concepts)}
    rows = [row[code] for code in unseen_concepts()]
    with torch.no_grad():
        vectors = emoji_clip().image_tower(pictures.pictures["noto"][rows])[:, None]
    return vectors, [tokenizer(f" {pictures.concepts[i].name}").input_ids for i in rows]


@torch.no_grad()
def losses(model, vectors, names):
    """Nats per token of each name and its full stop."""
    found = torch.empty(len(names))
    order = sorted(range(len(names)), key=lambda i: len(names[i]))  # names of about one length together
    for rows in torch.tensor(order).split(30):
        part = [names[i] for i in rows]
        longest = max(map(len, part)) + 1
        ids = torch.tensor([[BEGIN, MARK, *name, *[STOP] * (longest - len(name))] for name in part])
        labels = ids[:, 1:].clone()
        for row, name in zip(labels, part):
            row[0] = -100
            row[len(name) + 2 :] = -100
        scores = model(ids[:, :-1], vectors[rows])
        each = F.cross_entropy(scores.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        found[rows] = each.sum(1) / (labels != -100).sum(1)
    return found


@pytest.mark.claim("A6.5", "holds if")
def test_one_linear_layer_tells_a_frozen_language_model_something_about_unseen_pictures(model, unseen):
    vectors, names = unseen
    own = losses(model, vectors, names)
    others = torch.stack([losses(model, vectors.roll(k, 0), names) for k in (1, 31)]).mean(0)
    torch.testing.assert_close(own.mean().item(), FOUND["arms"]["linear"]["by seed"][0], atol=0.02, rtol=0)
    difference = others - own
    assert difference.mean() > 3 * difference.std() / len(difference) ** 0.5  # its own picture helps
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "projector.linear1.weight", "projector.linear1.bias",
    }  # fmt: skip
    assert FOUND["linear - deaf"]["interval"][2] < 0
    chosen = FOUND["arms"]["linear"]["gains most"]["name"]
    assert chosen[1] > 1 / 150 and chosen[2] < 0.5  # above guessing, and far from "powerful"


@pytest.mark.claim("A6.5", "holds if")
def test_measured_the_kind_gets_across_more_than_the_thing_and_nine_names_of_ten_are_wrong():
    """Paired by picture. Against the MLP loss and choices contradict each other; against CLIP nothing is certain."""
    choices, written = FOUND["choices"], FOUND["written"]["linear"]
    against = {name: choices[f"linear - {name}"] for name in ("deaf", "MLP", "CLIP")}
    assert against["deaf"]["name"][1] > 0.05 and against["deaf"]["group"][1] > 0.3
    assert FOUND["linear - MLP"]["interval"][1] > 0 and against["MLP"]["name"][1] > 0 and against["MLP"]["group"][1] > 0
    assert against["CLIP"]["name"][2] >= 0 and against["CLIP"]["group"][1] < 0 < against["CLIP"]["group"][0]
    right = sum(chosen == i for i, chosen in enumerate(choices["chosen"]["linear"]))
    assert right == 17 and not any(each["written"] == each["name"] for each in written)
