"""Where images stand in a text, what a vision tower may give, and what each position has to predict."""

import pytest
import torch
from torch import nn

from nondual.multimodal.image_marks import checked_marks, image_vectors, next_labels

MARK, VOCABULARY = 9, 10
IDS = torch.tensor([[1, 9, 2], [9, 3, 9]])
THREE = torch.zeros(3, 2, 4)


def test_the_marks_of_each_row_are_found():
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        ids, marked = checked_marks(IDS.to(dtype), THREE, MARK, VOCABULARY)
        assert ids.dtype == torch.int64 and ids.equal(IDS)
        assert marked.tolist() == [[False, True, False], [True, False, True]]


def test_a_mark_that_is_no_token_of_the_model_becomes_0():
    ids, marked = checked_marks(torch.tensor([[1, -200, 2]]), THREE[:1], -200, VOCABULARY, own_id=False)
    assert ids.tolist() == [[1, 0, 2]] and marked.tolist() == [[False, True, False]]
    with pytest.raises(ValueError, match="ids"):
        checked_marks(torch.tensor([[1, -200, 2]]), THREE[:1], -200, VOCABULARY)


def test_a_text_without_images_needs_none():
    ids, marked = checked_marks(torch.tensor([[1, 2]]), None, MARK, VOCABULARY)
    assert ids.tolist() == [[1, 2]] and not marked.any()


@pytest.mark.parametrize("ids, images, kind, says", [
    ([[1, 9]], THREE[:1], TypeError, "ids must be a Tensor, got list"),
    (IDS, [1, 2, 3], TypeError, "images must be a Tensor, got list"),
    (IDS, THREE[:2], ValueError, r"as many as the marks \(id 9\) in ids, 3 \(1, 2 in the rows\), got 2"),
    (IDS, None, ValueError, "3 .* got 0"),
    (IDS, torch.tensor(1.0), ValueError, "images must be .* got a number"),
    (torch.zeros(0, 3, dtype=torch.int64), None, ValueError, "1 row and 1 token"),
    (torch.zeros(2, 0, dtype=torch.int64), None, ValueError, "1 row and 1 token"),
    (torch.tensor([[10]]), None, ValueError, "ids"),
    (torch.tensor([[1.0]]), None, ValueError, "ids"),
    (torch.tensor([1]), None, ValueError, "ids"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(ids, images, kind, says):
    with pytest.raises(kind, match=says):
        checked_marks(ids, images, MARK, VOCABULARY)


class Gives(nn.Module):
    """A tower that gives what it was made with."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, images):
        return self.out


def test_a_towers_vectors_are_handed_on():
    assert image_vectors(nn.Identity(), THREE, 4) is THREE


@pytest.mark.parametrize("out, kind, says", [
    ((THREE,), TypeError, "vision must give a Tensor"),
    (THREE[0], ValueError, "vision must give floating point"),
    (THREE[:2], ValueError, "vision must give floating point"),
    (THREE[..., :3], ValueError, "vision must give floating point"),
    (THREE.long(), ValueError, "vision must give floating point"),
    (THREE[:, :0], ValueError, "1 vector or more"),
])  # fmt: skip
def test_a_tower_that_gives_something_else_is_refused(out, kind, says):
    with pytest.raises(kind, match=says):
        image_vectors(Gives(out), THREE, 4)


def test_each_position_predicts_the_token_after_it_and_no_image():
    marked = IDS == MARK
    assert next_labels(IDS, marked, None, None).tolist() == [[-100, 2, -100], [3, -100, -100]]
    labels = torch.tensor([[-100, -100, 2], [-100, -100, -100]])
    assert next_labels(IDS, marked, labels, None).tolist() == [[-100, 2, -100], [-100, -100, -100]]


def test_the_first_token_of_a_packed_sequence_is_not_predicted():
    ids, reset = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[True, False, True, False]])
    assert next_labels(ids, ids == MARK, None, reset).tolist() == [[2, -100, 4, -100]]


@pytest.mark.parametrize("ids, labels, kind, says", [
    (IDS[:, :1], None, ValueError, "2 tokens or more"),
    (IDS, [[1]], TypeError, "labels must be a Tensor"),
    (IDS, IDS.int(), ValueError, "labels must be int64"),
    (IDS, IDS[:, 1:], ValueError, "labels must be int64"),
    (IDS, IDS, ValueError, "got 9 in row 0, place 1: an image cannot be predicted"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_refused(ids, labels, kind, says):
    with pytest.raises(kind, match=says):
        next_labels(ids, ids == MARK, labels, None)
