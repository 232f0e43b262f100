"""Test-time training: by hand, against the loss differentiated by autograd, and against other operations it equals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nondual.ops.linear_attention import linear_attention
from nondual.ops.ttt import PLAIN, NormedResidual, TTTState, ttt

B, H, N, D, M = 2, 3, 17, 5, 7
MODELS = {"linear": (D,), "linear, no bias": (D,), "mlp": (11, D), "three maps": (11, 13, D)}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n=N):
    q, k, v = (draw(B, H, n, D, seed=i) for i in range(3))
    return q, k, v, 0.2 * draw(B, H, n, seed=3).sigmoid()


def weights_of(name):
    widths, bias = MODELS[name], name != "linear, no bias"
    ins = (D, *widths[:-1])
    return [0.5 * draw(H, a + bias, z, seed=10 + i) for i, (a, z) in enumerate(zip(ins, widths, strict=True))]


def normed():
    return NormedResidual(1 + 0.3 * draw(H, D, seed=20), 0.3 * draw(H, D, seed=21))


def shares():
    return draw(M, seed=22).sigmoid()


# --- by hand -------------------------------------------------------------------------------------------------------


def test_two_steps_by_hand():
    """One number each: w = 0, rate ½. Mini-batches of 1: 0 - ½(0·2 - 4)·2 = 4, then 4 - ½(4·1 - 2)·1 = 3."""
    one = torch.tensor([1.0, 1.0])[None, None, :, None]
    k, v = torch.tensor([2.0, 1.0])[None, None, :, None], torch.tensor([4.0, 2.0])[None, None, :, None]
    rate, start = torch.full((1, 1, 2), 0.5), [torch.zeros(1, 1, 1)]
    out, state = ttt(one, k, v, rate, start, mini_batch=1)
    assert out.flatten().tolist() == [4.0, 3.0] and state.weights[0].item() == 3.0
    # In one mini-batch the second gradient is taken at w = 0 too: 4 - ½(0·1 - 2)·1 = 5.
    out, state = ttt(one, k, v, rate, start, mini_batch=2)
    assert out.flatten().tolist() == [4.0, 5.0] and state.weights[0].item() == 5.0 and state.seen == 0


# --- the loss itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [PLAIN, normed()])
@pytest.mark.parametrize("name", MODELS)
def test_the_dual_form_is_the_loss_differentiated_token_by_token(name, head):
    ours = ttt(*inputs(), weights_of(name), head=head, share=shares(), mini_batch=M)
    theirs = ttt(*inputs(), weights_of(name), head=head, share=shares(), mini_batch=M, impl="reference")
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_every_outer_gradient_is_that_of_the_token_by_token_form(name):
    leaves = [*inputs(), *weights_of(name), shares(), *normed()[:2]]
    found = []
    for impl in ("dual", "reference"):
        q, k, v, rate, *rest = own = [x.clone().requires_grad_() for x in leaves]
        *weights, share, w, b = rest
        out, state = ttt(q, k, v, rate, weights, head=NormedResidual(w, b), share=share, mini_batch=M, impl=impl)
        loss = (out * draw(*out.shape, seed=30)).sum() + sum(x.sin().sum() for x in (*state.weights, *state.sums))
        found.append(torch.autograd.grad(loss, own))
    torch.testing.assert_close(*found, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_gradients_through_the_inner_steps(name):
    """First derivatives by differences, in reverse and in forward mode; second ones."""
    q, k, v = (x[:1, :1, :5, :3] for x in inputs()[:3])
    rate = inputs()[3][:1, :1, :5]
    shapes = [(1, 4, 3)] if name == "linear" else [(1, 4, 2), (1, 3, 3)]
    weights = [0.5 * draw(*shape, seed=40 + i) for i, shape in enumerate(shapes)]
    leaves = [x.clone().requires_grad_() for x in (q, k, v, rate, draw(3, seed=50).sigmoid(), *weights)]

    def run(q, k, v, rate, share, *weights):
        head = NormedResidual(torch.ones(1, 3, dtype=q.dtype), torch.zeros(1, 3, dtype=q.dtype), eps=0.1)
        return ttt(q, k, v, rate, weights, head=head, share=share, mini_batch=3)[0]

    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, leaves)


# --- judges --------------------------------------------------------------------------------------------------------


class NormedSum(NormedResidual):
    """z + LayerNorm(z), as the function of fla-core ends."""

    def output(self, z, x):
        return z + F.layer_norm(z, z.shape[-1:], eps=self.eps) * self.weight[:, None] + self.bias[:, None]


@pytest.mark.parametrize("mini_batch", [1, 4])
def test_fla_core_computes_the_same_outputs_state_and_gradients(mini_batch):
    """Its rate multiplies all of a mini-batch up to a token, as our share does; in mini-batches of 1 it is the rate."""
    naive = pytest.importorskip("fla.ops.ttt.naive")
    n = 16
    q, k, v, rate = (x.float() for x in inputs(n))
    share = torch.ones(1) if mini_batch == 1 else shares()[:4].float()
    if mini_batch > 1:
        rate = torch.ones_like(rate)
    w = weights_of("linear")[0].float()
    norm_weight, norm_bias = (x.float() for x in normed()[:2])
    leaves = [q, k, v, rate if mini_batch == 1 else share, w, norm_weight, norm_bias]
    g, found = draw(B, H, n, D, seed=31).float(), []
    for ours in (True, False):
        own = [x.clone().requires_grad_() for x in leaves]
        q, k, v, eta, w, norm_weight, norm_bias = own
        if ours:
            rates, places = (eta, share) if mini_batch == 1 else (rate, eta)
            head = NormedSum(norm_weight, norm_bias)
            out, state = ttt(q, k, v, rates, [w], head=head, share=places, mini_batch=mini_batch)
            state = state.weights[0]
        else:
            eta = eta if mini_batch == 1 else eta.repeat(n // mini_batch).expand(B, H, n)
            # It multiplies q by its scale in place, so that it gets a tensor of its own.
            theirs = [x.transpose(1, 2).clone() for x in (q, k, v)]
            start = w.expand(B, *w.shape)
            out, h, hb = naive.chunk_ttt_linear_ref(
                *theirs, norm_weight, norm_bias, eta.transpose(1, 2)[..., None], scale=1.0, mini_batch_size=mini_batch,
                initial_state=start[:, :, :D], initial_state_bias=start[:, :, D:], output_final_state=True,
            )  # fmt: skip
            out, state = out.transpose(1, 2), torch.cat([h, hb], 2)
        found.append((out, state, torch.autograd.grad((out * g).sum() + state.sin().sum(), own)))
    torch.testing.assert_close(*found, atol=2e-4, rtol=2e-4)


def test_one_mini_batch_from_zero_is_linear_attention():
    """No norm, W_0 = 0, η = 1: every gradient is taken at 0, where it is -v kᵀ, and their sum is the state."""
    q, k, v, rate = inputs()
    for n in (N, N + 5):
        out, state = ttt(q, k, v, torch.ones_like(rate), [torch.zeros(H, D, D).double()], mini_batch=n)
        theirs, memory = linear_attention(q, k, v)
        torch.testing.assert_close(out, theirs, atol=1e-12, rtol=1e-12)
        left = state.weights[0] if n == N else -state.sums[0]
        torch.testing.assert_close(left, memory, atol=1e-12, rtol=1e-12)


def test_token_by_token_it_is_the_delta_rule():
    """W + η k (v - Wᵀ k)ᵀ, from any start: the squared loss's own step."""
    q, k, v, rate = inputs()
    start = weights_of("linear, no bias")[0]
    out, state = ttt(q, k, v, rate, [start], mini_batch=1)
    theirs, memory = linear_attention(q, k, v, beta=rate, state=start.expand(B, H, D, D))
    torch.testing.assert_close(out, theirs, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state.weights[0], memory, atol=1e-12, rtol=1e-12)


# --- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["dual", "reference"])
@pytest.mark.parametrize("cuts", [[7, 7, 3], [3, 5, 0, 1, 8], [1] * N, [0, N], [16, 1]])
def test_in_parts_it_is_the_whole_also_within_a_mini_batch(cuts, impl):
    views, weights, options = inputs(), weights_of("mlp"), {"head": normed(), "share": shares(), "mini_batch": M}
    whole, last = ttt(*views, weights, **options)
    state, outs = None, []
    for part in zip(*(x.split(cuts, 2) for x in views), strict=True):
        out, state = ttt(*part, weights, state=state, impl=impl, **options)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state, last, atol=1e-12, rtol=1e-12)


def test_no_token_sees_a_later_one_and_the_first_of_a_mini_batch_sees_its_own_step():
    q, k, v, rate = inputs()
    weights, options = weights_of("mlp"), {"head": normed(), "mini_batch": M}
    out, _ = ttt(q, k, v, rate, weights, **options)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 9:], v2[:, :, 9:] = 1.0, 2.0
    other, _ = ttt(q, k2, v2, rate, weights, **options)
    torch.testing.assert_close(other[:, :, :9], out[:, :, :9], atol=0, rtol=0)
    assert not torch.isclose(other[:, :, 9:], out[:, :, 9:]).all(-1).any()


def test_with_rate_zero_it_is_its_start_for_ever():
    q, k, v, rate = inputs()
    weights = weights_of("linear")
    out, state = ttt(q, k, v, 0 * rate, weights, head=normed(), mini_batch=M)
    z = q @ weights[0][:, :D] + weights[0][:, D:]
    torch.testing.assert_close(out, normed().output(z, q))
    torch.testing.assert_close(state.weights[0], weights[0].expand(B, -1, -1, -1))


def test_small_steps_lower_the_inner_loss():
    """The inner loop does learn: on pairs that a linear map made, the loss of the last tokens is below the first's."""
    n = 400
    k = draw(1, 1, n, D, seed=5)
    v = k @ draw(1, 1, D, D, seed=6)
    out, _ = ttt(k, k, v, torch.full((1, 1, n), 0.05).double(), [torch.zeros(1, D, D).double()], mini_batch=1)
    wrong = (out - v).square().mean((0, 1, 3))
    assert wrong[-40:].mean() < 0.01 * wrong[:40].mean()


# --- dtypes, layouts, transforms, programs -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_state_in_float32(dtype):
    q, k, v, rate = inputs()
    out, state = ttt(*(x.to(dtype) for x in (q, k, v)), rate.float(), [w.float() for w in weights_of("mlp")])
    exact, _ = ttt(*(x.to(dtype).double() for x in (q, k, v)), rate.float(), [w.float() for w in weights_of("mlp")])
    assert out.dtype == dtype and all(x.dtype == torch.float32 for x in (*state.weights, *state.sums))
    torch.testing.assert_close(out.double(), exact, atol=0.02, rtol=0.02)


def test_autocast_casts_the_views_and_not_the_state():
    q, k, v, rate = (x.float() for x in inputs())
    weights = [w.float() for w in weights_of("linear")]
    with torch.autocast("cpu", torch.bfloat16):
        out, state = ttt(q, k, v, rate, weights)
    theirs, _ = ttt(*(x.bfloat16() for x in (q, k, v)), rate, weights)
    torch.testing.assert_close(out, theirs, atol=0, rtol=0)
    assert out.dtype == torch.bfloat16 and state.sums[0].dtype == torch.float32


def test_any_layout_and_no_argument_or_state_is_written_to():
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs()[:3]]
    rate, weights = inputs()[3], weights_of("mlp")
    torch.testing.assert_close(ttt(*views, rate, weights), ttt(*inputs(), weights), atol=1e-12, rtol=1e-12)
    _, state = ttt(*inputs(), weights)
    kept = [x.clone() for x in (*weights, *state.weights, *state.sums)]
    ttt(*inputs(), weights, state=state)
    assert all(map(torch.equal, kept, (*weights, *state.weights, *state.sums)))
    for own in (state.weights[0], ttt(*inputs(0), weights)[1].weights[0]):
        assert own.untyped_storage().data_ptr() != weights[0].untyped_storage().data_ptr()


def test_no_token_changes_nothing():
    _, state = ttt(*inputs(), weights_of("mlp"))
    out, after = ttt(*inputs(0), weights_of("mlp"), state=state)
    assert out.shape == (B, H, 0, D) and after.seen == state.seen == N - 16
    torch.testing.assert_close(after, state)


def test_vmap_runs_each_by_itself():
    many = [torch.stack([x, 2 * x, -x]) for x in inputs()[:3]]
    rate, weights, head = inputs()[3], weights_of("mlp"), normed()
    found = torch.func.vmap(lambda q, k, v: ttt(q, k, v, rate, weights, head=head)[0])(*many)
    each = [ttt(*(x[i] for x in many), rate, weights, head=head)[0] for i in range(3)]
    torch.testing.assert_close(found, torch.stack(each), atol=1e-12, rtol=1e-12)


class Program(nn.Module):
    def forward(self, q, k, v, rate, w):
        out, state = ttt(q, k, v, rate, [w], mini_batch=4)
        return out, state.weights[0], state.sums[0]


@pytest.mark.parametrize("n", [3, 4, 9])
def test_compiled_and_exported_at_several_lengths(n):
    """A program is of one length: how many mini-batches there are is decided while it is traced."""
    given = (*inputs(n), weights_of("linear")[0])
    expected = Program()(*given)
    torch.testing.assert_close(torch.compile(Program(), backend="aot_eager")(*given), expected)
    torch.testing.assert_close(torch.export.export(Program(), given).module()(*given), expected)


def test_a_nan_reaches_later_tokens_and_no_other_head():
    q, k, v, rate = inputs()
    v[0, 1, 9] = torch.nan
    out, _ = ttt(q, k, v, rate, weights_of("linear"), head=normed(), mini_batch=M)
    lost = out.isnan().any(-1)
    assert lost[0, 1, 9:].all() and lost.sum() == lost[0, 1].sum() and not lost[0, 1, :M].any()


# --- errors --------------------------------------------------------------------------------------------------------


def test_wrong_inputs_are_named():
    q, k, v, rate = inputs()
    w = weights_of("linear")
    state = ttt(q, k, v, rate, w)[1]
    wrong = {
        r"q must be \(B, H, N, D\), got": (q[0], k, v, rate, w, {}),
        r"k must be \(B, H, N, D\) = \(2, 3, 17, 5\), got \(2, 3, 16, 5\)": (q, k[:, :, 1:], v, rate, w, {}),
        r"v must be \(B, H, N, Dv\), got": (q, k, v[0], rate, w, {}),
        r"rate must be \(B, H, N\) = \(2, 3, 17\), got": (q, k, v, rate[..., None], w, {}),
        r"share must be \(mini_batch,\) = \(16,\), got \(7,\)": (q, k, v, rate, w, {"share": shares()}),
        "weights must be a sequence of one Tensor or more": (q, k, v, rate, w[0], {}),
        r"weights\[0\] must be \(3, 5 or 6 with a bias, D'\), got \(3, 4, 5\)": (q, k, v, rate, [w[0][:, :4]], {}),
        "the last of weights must end in v's width, 5, got 4": (q, k, v, rate, [w[0][..., :4]], {}),
        "k must have the dtype of q, torch.float64, got torch.float32": (q, k.float(), v, rate, w, {}),
        "rate must be floating point, got torch.int64": (q, k, v, rate.long(), w, {}),
        "mini_batch must be an integer of 1 or more, got 0": (q, k, v, rate, w, {"mini_batch": 0}),
        "impl must be one of dual, reference, got 'triton'": (q, k, v, rate, w, {"impl": "triton"}),
        "state must have 1 weights and sums, as weights has, got 2": (
            q, k, v, rate, w, {"state": TTTState(state.weights * 2, state.sums * 2, 0)},
        ),
        r"state.weights\[0\] must be \(B, H, D, D'\) = \(2, 3, 6, 5\), got \(1, 3, 6, 5\)": (
            q, k, v, rate, w, {"state": state.select(torch.tensor([0]))},
        ),
        "state.seen must be 0 to mini_batch - 1 = 0, got 1": (q, k, v, rate, w, {"state": state, "mini_batch": 1}),
    }  # fmt: skip
    for says, (*given, options) in wrong.items():
        with pytest.raises(ValueError, match=says):
            ttt(*given, **options)
    with pytest.raises(TypeError, match="q must be a Tensor, got list"):
        ttt([1.0], k, v, rate, w)
