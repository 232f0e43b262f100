"""Linear attention against what others wrote: fla-core's plain functions for each member of the family, and ssd."""

import math
import warnings
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from nondual.efficient_attention.feature_maps import Taylor
from nondual.ops.linear_attention import linear_attention

B, H, D, DV = 2, 3, 8, 6
SCALE = D**-0.5


@pytest.fixture(scope="module")
def fla():
    """A function from an operation's name to its plain functions; importing them warns that there is no GPU."""

    def load(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(f"fla.ops.{name}.naive")

    return load


def drawn(length, *more, seed=0):
    """q, k of length 1, v, and then the logs of decays of these shapes, some near 0 and some near -inf."""
    torch.manual_seed(seed)
    q, k, v = (
        torch.randn(B, H, length, D),
        F.normalize(torch.randn(B, H, length, D), dim=-1),
        torch.randn(B, H, length, DV),
    )
    return [x.requires_grad_() for x in (q, k, v, *(-((3 * torch.rand(shape)) ** 6) - 1e-4 for shape in more))]


def compare(ours, judged, inputs, tolerance=1e-5):
    """Outputs, and every gradient; fla's functions work in float32."""
    outputs = [*zip(ours, judged)]
    for a, b in outputs:
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    losses = (sum(x.sin().sum() for x in side) for side in zip(*outputs))
    for a, b in zip(*(torch.autograd.grad(loss, inputs, retain_graph=True) for loss in losses)):
        torch.testing.assert_close(a, b, atol=10 * tolerance, rtol=10 * tolerance)


def swap(*tensors):
    """Heads and steps swapped, in memory of their own: some of fla's functions write into what they are given."""
    return [x.transpose(1, 2).clone() for x in tensors]


@pytest.mark.parametrize("impl", ["parallel", "chunked"])
@pytest.mark.parametrize("normalise", [False, True])
def test_linear_attention(fla, impl, normalise):
    inputs = drawn(37)
    q, k, v = (inputs[0].exp(), inputs[1].exp(), inputs[2])
    ours, _ = linear_attention(q, k, v, normalise=normalise, scale=SCALE, impl=impl)
    judged, _ = fla("linear_attn").naive_recurrent_linear_attn(*swap(q, k, v), normalize=normalise)
    compare([ours], swap(judged), inputs, 1e-5 if normalise else 1e-4)  # without, sums of up to 50


@pytest.mark.parametrize("impl", ["parallel", "chunked"])
def test_retention(fla, impl):
    inputs = drawn(37)
    decay = torch.log1p(-(2.0 ** (-5 - torch.arange(H))))
    ours, _ = linear_attention(*inputs, log_decay=decay, scale=SCALE, impl=impl)
    compare([ours], [fla("retention").naive_retention(*inputs)], inputs)


@pytest.mark.parametrize("impl", ["parallel", "chunked"])
@pytest.mark.parametrize("length", [1, 37])
def test_a_decay_of_each_channel(fla, impl, length):
    inputs = q, k, v, g = drawn(length, (B, H, length, D))
    ours = linear_attention(q, k, v, log_decay=g, scale=SCALE, impl=impl, chunk=16)
    out, state = fla("gla").naive_recurrent_gla(*swap(q, k, v, g), output_final_state=True)
    compare(ours, [*swap(out), state], inputs)


@pytest.mark.parametrize("impl", ["parallel", "chunked"])
@pytest.mark.parametrize("length", [1, 37])
def test_a_decay_of_each_head_and_step(fla, impl, length):
    inputs = q, k, v, g = drawn(length, (B, H, length))
    ours = linear_attention(q, k, v, log_decay=g, scale=SCALE, impl=impl, chunk=16)
    out, state = fla("simple_gla").naive_recurrent_simple_gla(*swap(q, k, v, g), output_final_state=True)
    compare(ours, [*swap(out), state], inputs)


def test_a_decay_of_each_head_and_step_by_their_chunks(fla):
    """Decays that are not far apart: theirs take sums of logs in float32."""
    q, k, v = drawn(37)
    g = -torch.rand(B, H, 37)
    ours = linear_attention(q, k, v, log_decay=g, scale=SCALE)
    out, state = fla("simple_gla").naive_chunk_simple_gla(*swap(q, k, v, g), output_final_state=True, chunk_size=16)
    compare(ours, [*swap(out), state], [q, k, v])


@pytest.mark.parametrize("impl", ["parallel", "chunked"])
@pytest.mark.parametrize("beta_max", [1, 2])
def test_the_delta_rule(fla, impl, beta_max):
    inputs = q, k, v = drawn(64)
    beta = beta_max * torch.rand(B, H, 64)
    inputs.append(beta.requires_grad_())
    ours = linear_attention(q, k, v, beta=beta, scale=SCALE, impl=impl, chunk=16)
    compare(ours, fla("delta_rule").delta_rule_recurrence(q, k, v, beta), inputs, 2e-5)
    out, state = fla("delta_rule").delta_rule_chunkwise(*(x.detach().clone() for x in inputs))
    torch.testing.assert_close((ours[0].detach(), ours[1].detach()), (out, state), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("impl", ["parallel", "chunked"])
def test_the_gated_delta_rule(fla, impl):
    inputs = q, k, v, g = drawn(37, (B, H, 37))
    beta = torch.rand(B, H, 37).requires_grad_()
    inputs.append(beta)
    state = torch.randn(B, H, D, DV).requires_grad_()
    inputs.append(state)
    ours = linear_attention(q, k, v, log_decay=g, beta=beta, scale=SCALE, state=state, impl=impl, chunk=16)
    theirs = fla("gated_delta_rule")
    options = {"initial_state": state, "output_final_state": True}
    out, last = theirs.naive_recurrent_gated_delta_rule(*swap(q, k, v, beta, g), **options)
    compare(ours, [*swap(out), last], inputs)
    if impl == "chunked":  # their chunks take sums of logs in float32: decays that are not far apart
        g = (-torch.rand(B, H, 37)).requires_grad_()
        ours = linear_attention(q, k, v, log_decay=g, beta=beta, scale=SCALE, state=state, impl=impl)
        out, last = theirs.naive_chunk_gated_delta_rule(*swap(q, k, v, g, beta), **options)
        compare(ours, [*swap(out), last], inputs[:3], 1e-4)


@pytest.mark.parametrize("impl", ["parallel", "chunked"])
def test_based_by_the_features_of_its_series(fla, impl):
    inputs = q, k, v = drawn(37)
    features = Taylor()
    ours, _ = linear_attention(features(q), features(k), v, normalise=True, impl=impl, chunk=16)
    compare([ours], [fla("based").naive_parallel_based(q, k, v)], inputs)
    assert features(q).shape[-1] == 1 + D + D**2
    one = q[0, 0, 0].detach()
    score = float(one @ one) * SCALE
    assert math.isclose(float(features(one) @ features(one)), 1 + score + score**2 / 2, rel_tol=1e-5)
