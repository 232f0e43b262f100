"""What autocast does to our operations' inputs is what it does to torch's own attention; and where it does nothing."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nondual.analysis.circuits import composition_score, ov_circuit, qk_circuit
from nondual.analysis.heads import head_contributions
from nondual.analysis.rollout import attention_rollout
from nondual.efficient_attention.feature_maps import PositiveRandomFeatures
from nondual.extensions.head_fusion import TalkingHeads
from nondual.extensions.self_liberating import CertifiedStream, DecayingAttention
from nondual.ops.autocast import as_autocast_does, autocast_off, is_autocasting, without_autocast
from nondual.ops.flash_attention.partial import engine_of
from nondual.ops.linear_attention import linear_attention_matrix
from nondual.ops.selective_scan.matrix import selective_scan_matrix
from nondual.ops.ssd.matrix import ssd_matrix
from nondual.self_attention import MultiHeadAttention


def test_the_dtypes_are_those_of_torchs_own_attention():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        x = torch.randn(1, 1, 3, 4).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            (ours,), theirs = as_autocast_does(x), F.scaled_dot_product_attention(x, x, x)
        assert ours.dtype == theirs.dtype


def test_what_is_not_there_stays_so_and_integers_stay_integers():
    with torch.autocast("cpu", torch.bfloat16):
        nothing, mask, x = as_autocast_does(None, torch.ones(2, dtype=torch.bool), torch.randn(2))
    assert nothing is None and mask.dtype == torch.bool and x.dtype == torch.bfloat16
    x = torch.randn(2)
    assert as_autocast_does(x)[0] is x, "outside of autocast nothing is cast"


def test_a_pass_runs_as_wide_as_it_was_given():
    @without_autocast
    def run(ctx, x):
        return nn.functional.linear(x, x)

    x = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(None, x).dtype == torch.float32 and F.linear(x, x).dtype == torch.bfloat16
    assert run(None, torch.ones(2, 2, device="meta")).is_meta, "where there is no autocast it simply runs"


def test_autocast_off_is_off_inside_and_as_it_was_after():
    x = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        with autocast_off("cpu"):
            assert not is_autocasting("cpu") and F.linear(x, x).dtype == torch.float32
        assert is_autocasting("cpu") and F.linear(x, x).dtype == torch.bfloat16
    assert not is_autocasting("cpu") and not is_autocasting("meta")


class WideParts(DecayingAttention):
    """With queries, keys and values that autocast leaves alone, as its output: the rest must not need it to."""

    def __init__(self):
        super().__init__(16, 2)
        self.out_proj = nn.Identity()

    def parts(self, x, start=0):
        with autocast_off("cpu"):
            return super().parts(x, start)


def streamed(x):
    stream = CertifiedStream(WIDE_PARTS, 1e-3)
    return torch.cat([stream.step(x[:, n : n + 1]) for n in range(x.shape[1])], 1)


def part_of_attention(q, k, v):
    engine = engine_of("reference", q, k, v)
    whole = engine.forward(q, k, v, True, 0.5)
    return torch.stack([whole.out, *engine.backward(v, q, k, v, whole, True, 0.5)])


def composed():
    return torch.tensor([*composition_score((ATTENTION, 0), (ATTENTION, 1)).values()])


def drawn(*shapes):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw) for shape in shapes]


torch.manual_seed(0)
WIDE_PARTS, ATTENTION = WideParts(), MultiHeadAttention(16, 2)
QK = [(2, 4, 7, 5), (2, 2, 7, 5)]
FROM_INPUTS = {  # these promise float32 or better for what comes in half precision too
    "selective_scan_matrix": (
        partial(selective_scan_matrix, delta_softplus=True),
        [(2, 7, 4), (4, 3), *[(2, 7, 3)] * 2],
    ),
    "ssd_matrix": (partial(ssd_matrix, delta_softplus=True), [(2, 7, 4), (4,), *[(2, 7, 2, 3)] * 2]),
    "linear_attention_matrix": (linear_attention_matrix, QK),
    "linear_attention_matrix, normalised": (partial(linear_attention_matrix, normalise=True), QK),
    "linear_attention_matrix, delta rule": (lambda q, k: linear_attention_matrix(q, k, beta=q[..., 0]), QK),
    "PositiveRandomFeatures": (PositiveRandomFeatures(5, 8), [(2, 4, 7, 5)]),
    "attention_rollout": (attention_rollout, [(3, 2, 2, 5, 5)]),
    "a part of flash attention": (part_of_attention, [(2, 2, 7, 5)] * 3),
}
UNDER_AUTOCAST = FROM_INPUTS | {
    "CertifiedStream": (streamed, [(2, 6, 16)]),
    "TalkingHeads": (TalkingHeads(4), [QK[0], QK[1], QK[1]]),
    "qk_circuit": (partial(qk_circuit, ATTENTION, 0), []),
    "ov_circuit": (partial(ov_circuit, ATTENTION, 0), []),
    "composition_score": (composed, []),
    "head_contributions": (partial(head_contributions, ATTENTION), [(2, 5, 2, 8)]),
}


@pytest.mark.parametrize("name", UNDER_AUTOCAST)
def test_what_is_computed_in_float32_is_so_under_autocast(name):
    run, shapes = UNDER_AUTOCAST[name]
    expected = run(*drawn(*shapes))
    with torch.autocast("cpu", torch.bfloat16):
        found = run(*drawn(*shapes))
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", FROM_INPUTS)
def test_what_comes_in_half_precision_is_computed_in_float32(name, autocast):
    run, shapes = FROM_INPUTS[name]
    half = [x.bfloat16() for x in drawn(*shapes)]
    expected = run(*(x.float() for x in half))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = run(*half)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
