"""benchmarks/clip*.py: what is held out, how pictures and captions are drawn, intervals, and the files of the page."""

import importlib
import json
import sys
from io import BytesIO
from pathlib import Path

import pytest
import torch

from nondual.pretrained.emoji_clip import unseen_concepts

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "docs" / "assets" / "models"


@pytest.fixture(scope="module")
def modules():
    """The benchmark's helpers."""
    sys.path.insert(0, str(ROOT))
    try:
        return {name: importlib.import_module(f"benchmarks.clip_{name}") for name in ("data", "run", "judge", "ship")}
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def data(modules):
    return modules["data"]


@pytest.fixture
def small(data):
    """Twenty concepts in three styles, of which the last draws only the even ones; 2 to 4 captions each."""
    draw = torch.Generator().manual_seed(0)
    rows = [(i, s) for s in range(3) for i in range(20) if s < 2 or i % 2 == 0]
    concept, style = (torch.tensor(column) for column in zip(*rows))
    pictures = torch.full((len(rows), 3, 32, 32), 255, dtype=torch.uint8)
    pictures[:, :, 8:24, 8:24] = (concept * 10)[:, None, None, None].to(torch.uint8)
    captions = torch.nn.functional.normalize(torch.randn(20, 4, 384, generator=draw), dim=-1)
    counts = 2 + torch.arange(20) % 3
    captions[torch.arange(4)[None] >= counts[:, None]] = 0
    names = tuple(f"thing {i}" for i in range(20))
    return data.Pairs(
        pictures, concept, style, ("noto", "twemoji", data.HELD_STYLE), names, ((),) * 20, ("g",) * 20, names,
        captions, counts, torch.arange(12), torch.arange(12, 15), torch.arange(15, 20),
    )  # fmt: skip


# --- what is held out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hexcode, family",
    [
        ("1F353", "1F353"),
        ("1F9D1-200D-1F33E", "1F33E"),  # farmer
        ("1F468-200D-1F33E", "1F33E"),  # man farmer
        ("1F3CB-FE0F-200D-2640-FE0F", "1F3CB"),  # woman lifting weights
        ("1F3CB-FE0F", "1F3CB"),
        ("1F6B6-200D-2640-FE0F-200D-27A1-FE0F", "1F6B6"),  # woman walking, facing right
        ("27A1-FE0F", "27A1"),  # an arrow is a concept of its own
        ("1F469", "person"),
    ],
)
def test_families(data, hexcode, family):
    assert data.family(hexcode) == family


def test_what_is_held_out_is_held_out_with_its_family(data):
    families = tuple(f"family {i // 3}" for i in range(1200)) + ("person",) * 6
    drawn = torch.rand(len(families), generator=torch.Generator().manual_seed(0)) < 0.7
    train, tune, test = (part.tolist() for part in data.split(families, drawn))
    assert (len(tune), len(test)) == (100, 150) and drawn[tune + test].all()
    held = [families[i] for i in tune + test]
    assert len(set(held)) == 250 and not set(held) & {families[i] for i in train}
    assert set(range(1200, 1206)) <= set(train)


def test_the_models_unseen_concepts_are_those_of_the_split(data):
    from nondual.data.emoji import concepts

    found, families = concepts(), tuple(data.family(each.hexcode) for each in concepts())
    codes = set(unseen_concepts())
    held = {family for family, each in zip(families, found) if each.hexcode in codes}
    assert len(held) == 150 and "person" not in held


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_a_batch_has_different_concepts_of_the_training_with_captions_of_their_own(data, small):
    draw = data.Draw(small, ("noto", data.HELD_STYLE), 8)
    assert len(draw.rows) == 12 + 6
    seen = set()
    for seed in range(100):
        pictures, captions = draw(torch.Generator().manual_seed(seed))
        assert pictures.shape == (8, 3, 32, 32) and captions.shape == (8, 384)
        matches = (small.captions.flatten(0, 1) @ captions.T > 0.999).nonzero()
        concepts = (matches[:, 0] // 4).tolist()
        assert len(set(concepts)) == 8 and max(concepts) < 12
        seen |= {(place // 4, place % 4) for place in matches[:, 0].tolist()}
    assert seen == {(i, k) for i in range(12) for k in range(2 + i % 3)}  # every caption, and nothing beyond


def test_one_seed_draws_one_batch_and_shuffled_it_has_the_same_pictures(data, small):
    plain, shuffled = (data.Draw(small, ("noto",), 12, shuffled=mixed) for mixed in (False, True))
    a, b, c = (draw(torch.Generator().manual_seed(3)) for draw in (plain, plain, shuffled))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and torch.equal(a[0], c[0]) and not torch.equal(a[1], c[1])
    assert sorted(shuffled.captioned.tolist()) == list(range(12)) and not torch.equal(
        plain.captioned, shuffled.captioned
    )


def test_varied_pictures_stand_on_white(data):
    pictures = torch.full((64, 3, 32, 32), 255, dtype=torch.uint8)
    pictures[:, :, 10:22, 10:22] = 0
    out = data.varied(pictures, torch.Generator().manual_seed(0))
    torch.testing.assert_close(out[:, :, 0, 0], torch.full((64, 3), 255.0))
    assert (out[:, :, 14:18, 14:18].mean((1, 2, 3)) < 200).double().mean() > 0.9
    assert torch.equal(out, data.varied(pictures, torch.Generator().manual_seed(0)))


# --- what is counted -------------------------------------------------------------------------------------------------


def test_intervals_are_of_the_mean_over_concepts(modules):
    interval = modules["judge"].interval
    assert interval(torch.full((9,), 0.25)) == [0.25, 0.25, 0.25]
    half = torch.arange(150) % 2
    mean, low, high = interval(half.double())
    spread = 1.96 * 0.5 / 150**0.5
    assert (
        mean == 0.5 and low == pytest.approx(0.5 - spread, abs=0.02) and high == pytest.approx(0.5 + spread, abs=0.02)
    )


def test_what_is_found_by_hand(modules):
    class Fixed:
        def encode_images(self, x):
            return x

        encode_texts = encode_images

        def logits(self, images, texts):
            return images @ texts.T

    pictures = torch.eye(3)
    names = torch.tensor([[0.9, 0.5, 0.0], [1.0, 0.4, 0.0], [0.0, 0.0, 1.0]])
    found = modules["run"].looked_for(Fixed(), pictures, names)
    assert found["picture to name, 1"] == [0, 0, 1] and found["picture to name, reciprocal"] == [0.5, 0.5, 1]
    assert found["name to picture, 1"] == [1, 0, 1] and found["picture to name, 5"] == [1, 1, 1]


# --- what the page loads ---------------------------------------------------------------------------------------------


def test_the_pages_files_fit_each_other():
    from PIL import Image
    from safetensors import safe_open

    assert (MODELS / "clip.webp").stat().st_size < 100_000 and (MODELS / "clip.bin").stat().st_size < 700_000
    sheet = Image.open(BytesIO((MODELS / "clip.webp").read_bytes()))
    assert sheet.size == (15 * 40, 20 * 40)
    with safe_open(MODELS / "clip.bin", framework="pt") as file:
        words = json.loads(file.metadata()["words"])
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    assert words == sorted(set(words)) and {"fruit", "strawberry"} <= set(words)
    assert shapes == {
        "words": (len(words), 96), "words.scale": (len(words),), "pictures": (300, 96), "pictures.scale": (300,),
    }  # fmt: skip
