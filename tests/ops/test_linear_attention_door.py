"""What linear attention refuses, and in what words."""

import pytest
import torch
from linear_cases import PLAIN

from nondual.ops.linear_attention import linear_attention, linear_attention_matrix, linear_attention_step

ONE = torch.ones(2, 4, 5, 3)
VALUES = torch.ones(2, 2, 5, 7)


def call(**changed):
    given = {"q": ONE, "k": ONE[:, :2], "v": VALUES} | changed
    return linear_attention(**given)


@pytest.mark.parametrize("changed, says", [
    ({"q": ONE[0]}, r"q must be 4-dimensional \(B, H, N, D\) with D of 1 or more, got \(4, 5, 3\)"),
    ({"q": ONE[..., :0], "k": ONE[:, :2, :, :0]}, "with D of 1 or more"),
    ({"k": ONE[:, :2, :4]}, r"k must be \(2, G, 5, D\) for q \(2, 4, 5, 3\), got \(2, 2, 4, 3\)"),
    ({"k": ONE[:1, :2]}, r"k must be \(2, G, 5, D\)"),
    ({"v": VALUES[:, :, :4]}, r"v must be \(2, G, 5, D\)"),
    ({"k": ONE[:, :2, :, :2]}, "k must have the width of q, 3"),
    ({"v": VALUES[:, :1]}, r"v must be \(B, G, M, Dv\) with \(B, G, M\) as in k"),
    ({"k": ONE[:, :3], "v": ONE[:, :3]}, "heads of k and v must divide those of q, 4, got 3"),
    ({"k": ONE[:, :0], "v": ONE[:, :0]}, "heads of k and v must divide"),
    ({"log_decay": ONE[0, :, 0]}, r"log_decay must be \(H,\), \(B, H, N\) or \(B, H, N, D\) = \(4,\), .*got \(4, 3\)"),
    ({"beta": ONE}, r"beta must be \(B, H, N\) = \(2, 4, 5\), got \(2, 4, 5, 3\)"),
    ({"state": ONE}, r"state must be \(B, H, D, Dv\) = \(2, 4, 3, 7\)"),
    ({"state": torch.ones(2, 4, 3, 7), "normalise": True}, r"state must be \(B, H, D, Dv \+ 1\) = \(2, 4, 3, 8\)"),
    ({"reset": torch.zeros(2, 4, dtype=torch.bool)}, r"reset must be \(B, N\) = \(2, 5\)"),
    ({"reset": torch.zeros(2, 5)}, "reset must be boolean"),
    ({"log_decay": -ONE, "beta": ONE[..., 0]}, "with beta, got one for each channel: average it over the channels"),
    ({"beta": ONE[..., 0], "normalise": True}, "normalise must be False with beta"),
    ({"causal": False, "log_decay": -torch.ones(4)}, "must be left out with causal=False: they have an order"),
    ({"causal": False, "beta": ONE[..., 0]}, "must be left out with causal=False"),
    ({"causal": False, "reset": torch.zeros(2, 5, dtype=torch.bool)}, "must be left out with causal=False"),
    ({"q": ONE.long(), "k": ONE[:, :2].long(), "v": VALUES.long()}, "q must be floating point"),
    ({"v": VALUES.double()}, r"v must have the dtype of q, torch.float32, got torch.float64; convert it with"),
    ({"q": ONE.to("meta")}, "must be on the device of q"),
    ({"chunk": 0}, "chunk must be an integer of 1 or more, or None"),
    ({"chunk": True}, "chunk must be an integer"),
    ({"impl": "chunk"}, r"impl must be one of \['auto', 'reference', 'parallel', 'chunked', 'triton'\], got 'chunk'"),
    ({"impl": "triton", "q": ONE.double(), "k": ONE.double(), "v": ONE.double()}, "float16, bfloat16 or float32"),
    ({"impl": "triton", "log_decay": -ONE}, "log_decay must be .* for impl='triton'; impl='chunked' takes one"),
    ({"impl": "triton", "causal": False}, "causal must be True for impl='triton'"),
    ({"impl": "triton", "chunk": 48}, "chunk must be one of .* for impl='triton', got 48; impl='chunked' takes any"),
])  # fmt: skip
def test_what_does_not_fit(changed, says):
    with pytest.raises(ValueError, match=says):
        call(**changed)


@pytest.mark.parametrize("name", ["q", "k", "v", "log_decay", "beta", "state", "reset"])
def test_what_is_no_tensor(name):
    with pytest.raises(TypeError, match=f"{name} must be a Tensor, got list; use torch.tensor"):
        call(**{name: [[1.0]]})


def test_one_step():
    with pytest.raises(ValueError, match=r"for one step, got .*; linear_attention takes whole sequences"):
        linear_attention_step(ONE, ONE, ONE)
    with pytest.raises(ValueError, match=r"beta \(B, H\), for one step"):
        linear_attention_step(ONE[0], ONE[0], ONE[0], beta=ONE)
    with pytest.raises(TypeError, match="k must be a Tensor"):
        linear_attention_step(ONE[0], None, ONE[0])


def test_the_matrix():
    with pytest.raises(ValueError, match=r"q must be \(B, H, N, D\) and k \(B, G, N, D\)"):
        linear_attention_matrix(ONE[0], ONE)
    with pytest.raises(TypeError, match="k must be a Tensor"):
        linear_attention_matrix(ONE, 1)


@pytest.mark.parametrize("impl", PLAIN)
def test_nothing_to_sum(impl):
    for shapes in (((0, 4, 5, 3), (0, 2, 5, 3), (0, 2, 5, 7)), ((2, 4, 5, 3), (2, 2, 5, 3), (2, 2, 5, 0))):
        q, k, v = (torch.ones(shape) for shape in shapes)
        out, state = linear_attention(q, k, v, impl=impl)
        assert out.shape == (*q.shape[:3], v.shape[3]) and state.shape == (*q.shape[:2], 3, v.shape[3])
    q, k, v = torch.ones(2, 4, 5, 3), torch.ones(2, 2, 0, 3), torch.ones(2, 2, 0, 7)  # no keys: nothing is read
    out, state = linear_attention(q, k, v, causal=False, normalise=True, impl=impl)
    assert out.shape == (2, 4, 5, 7) and not out.any() and not state.any()
