"""emoji_clip: a small file, loaded in float32; unit vectors from both towers; what it never met."""

import json
from pathlib import Path

import pytest
import torch

from nondual.data import emoji
from nondual.multimodal.clip import SentenceTower
from nondual.pretrained import emoji_clip
from nondual.pretrained.emoji_clip import STYLE_NOT_MET, STYLES_MET, unseen_concepts

ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / "src" / "nondual" / "pretrained" / "emoji_clip.safetensors"
MEASURED = json.loads((ROOT / "docs" / "measured" / "clip.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model():
    return emoji_clip()


def test_it_is_small_ready_and_in_float32(model):
    assert FILE.stat().st_size == MEASURED["bytes"] < 2_000_000
    trained = MEASURED["figures"]["longest"]["parameters"]
    assert sum(parameter.numel() for parameter in model.parameters()) == trained == 572_289
    assert not model.training and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert isinstance(model.text_tower, SentenceTower) and 1 < model.scale.item() <= 100


def test_what_was_held_out_is_told():
    codes = unseen_concepts()
    assert len(codes) == len(set(codes)) == 150 and "1F353" in codes  # a strawberry
    assert sorted([*STYLES_MET, STYLE_NOT_MET]) == sorted(MEASURED["data"]["emoji"]["styles"])
    assert STYLE_NOT_MET not in STYLES_MET


def test_both_towers_give_unit_vectors_of_one_width(model):
    drawn = emoji(["noto"])
    names = [concept.name for concept in drawn.concepts[:7]]
    with torch.no_grad():
        z, w = model.encode_images(drawn.pictures["noto"][:7]), model.encode_texts(names)
        again = model.encode_texts(model.text_tower(names))  # MiniLM's vectors, made before
        torch.testing.assert_close(model(drawn.pictures["noto"][:7], names), model.scale * z @ w.T)
    for vectors in (z, w):
        assert vectors.shape == (7, 96)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(again, w, atol=1e-5, rtol=0)


def test_it_finds_the_names_of_concepts_that_it_met(model):
    drawn, held = emoji([STYLE_NOT_MET]), set(unseen_concepts())
    rows = [
        i for i, concept in enumerate(drawn.concepts) if concept.hexcode not in held and drawn.has[STYLE_NOT_MET][i]
    ]
    rows = rows[::20]
    with torch.no_grad():
        z = model.encode_images(drawn.pictures[STYLE_NOT_MET][rows])
        w = model.encode_texts([drawn.concepts[i].name for i in rows])
    assert ((z @ w.T).argmax(1) == torch.arange(len(rows))).double().mean() > 0.4
