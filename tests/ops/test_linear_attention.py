"""Linear attention: by hand, the laws that all its engines in plain torch keep, and their errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from harness import DRAWS, ErrorBudget
from linear_cases import FORMS, PLAIN, both_ways, exactly, made, resets

from nondual.ops.attention import attention
from nondual.ops.linear_attention import linear_attention, linear_attention_matrix, linear_attention_step
from nondual.ops.linear_attention.resets import since_reset
from nondual.ops.ssd import ssd

pytestmark = pytest.mark.usefixtures("poisoned")


def close(found, expected, tolerance=1e-10):
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# --- by hand -------------------------------------------------------------------------------------------------------


def one_head(*rows):
    return torch.tensor(rows, dtype=torch.float64)[None, None]


@pytest.mark.parametrize("impl", PLAIN)
def test_by_hand(impl):
    """Two writes at one key, 3 and then 5: the sum reads 8, half of the first is left with a decay of ½, the delta rule
    reads 5, and the mean is 4."""
    k = q = one_head([1.0, 0.0], [1.0, 0.0])
    v = one_head([3.0], [5.0])
    read = lambda **more: linear_attention(q, k, v, impl=impl, **more)[0].flatten().tolist()  # noqa: E731
    assert read() == [3, 8]
    assert read(scale=2.0) == [6, 16]
    assert read(normalise=True) == [3, 4]
    half = torch.full((1, 1, 2), 0.5, dtype=torch.float64).log()
    assert read(log_decay=half) == pytest.approx([3, 6.5])
    assert read(log_decay=half[0, 0, :1]) == pytest.approx([3, 6.5])
    assert read(log_decay=half[..., None].expand(1, 1, 2, 2)) == pytest.approx([3, 6.5])
    one = torch.ones(1, 1, 2, dtype=torch.float64)
    assert read(beta=one) == [3, 5]
    assert read(beta=0.5 * one) == [1.5, 3.25]  # half of the way from what is read to 3, and from there to 5
    assert read(beta=one, log_decay=half) == [3, 5]  # what decays is the old value, which is overwritten
    assert read(beta=0.5 * one, log_decay=half) == pytest.approx([1.5, 0.75 + 0.5 * (5 - 0.75)])  # it decays first
    assert read(causal=False) == [8, 8]
    assert read(reset=torch.tensor([[False, True]])) == [3, 5]


@pytest.mark.parametrize("impl", PLAIN)
def test_the_state_holds_keys_in_rows_and_the_normaliser_in_the_last_column(impl):
    k = q = one_head([1.0, 0.0, 0.0], [0.0, 2.0, 0.0])
    v = one_head([3.0, 4.0], [5.0, 6.0])
    _, state = linear_attention(q, k, v, normalise=True, impl=impl)
    assert state[0, 0].tolist() == [[3, 4, 1], [10, 12, 2], [0, 0, 0]]


@pytest.mark.parametrize("impl", PLAIN)
def test_a_sum_of_weights_of_0_gives_0_and_no_gradient(impl):
    q, k = torch.zeros(1, 1, 3, 2, requires_grad=True), torch.ones(1, 1, 3, 2, requires_grad=True)
    out, _ = linear_attention(q, k, torch.ones(1, 1, 3, 1), normalise=True, impl=impl)
    assert not out.any()
    for gradient in torch.autograd.grad(out.sum(), (q, k)):
        assert not gradient.any()


# --- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("length, chunk", [(1, None), (2, 1), (23, 4), (23, None), (23, 7), (64, 16)])
@pytest.mark.parametrize("form", FORMS)
def test_engines_agree_forward_and_backward(form, length, chunk, reset):
    given, options = made(form, length)
    options |= {"reset": resets(length) if reset else None, "chunk": chunk, "scale": 0.5}
    expected = both_ways("reference", given, options)
    close(both_ways("chunked", given, options), expected)
    if chunk in (None, 4):  # the matrix knows no chunks
        close(both_ways("parallel", given, options), expected)


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("form", FORMS)
def test_split_and_handed_on_it_is_the_whole(form, impl):
    given, options = made(form, 23, requires_grad=False)
    whole, last = linear_attention(**given, **options, impl=impl)
    timed = [name for name, x in given.items() if x.ndim > 2 and name != "state"]
    state, parts = given["state"], []
    for begin, end in ((0, 5), (5, 5), (5, 6), (6, 23)):
        part = given | {name: given[name][:, :, begin:end] for name in timed} | {"state": state}
        out, state = linear_attention(**part, **options, chunk=4, impl=impl)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("form", FORMS)
def test_step_by_step_it_is_the_whole(form):
    given, options = made(form, 6, requires_grad=False)
    whole, last = linear_attention(**given, **options)
    state, outputs = given.pop("state"), []
    for t in range(6):
        one = {name: x[:, :, t] if x.ndim > 2 else x for name, x in given.items()}
        out, state = linear_attention_step(**one, **options, state=state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 2), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("form", FORMS)
def test_packed_each_is_as_if_alone(form, impl):
    given, options = made(form, 23, b=1, requires_grad=False)
    starts, marks = [4, 5, 17], torch.zeros(1, 23, dtype=torch.bool)
    marks[0, starts] = True
    out, last = linear_attention(**given, **options, reset=marks, chunk=4, impl=impl)
    for begin, end in zip([0, *starts], [*starts, 23]):
        part = {name: x[:, :, begin:end] if x.ndim > 2 and name != "state" else x for name, x in given.items()}
        if begin:
            del part["state"]
        alone, state = linear_attention(**part, **options, impl=impl)
        torch.testing.assert_close(out[:, :, begin:end], alone)
    torch.testing.assert_close(last, state)


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_does_not_pass_a_reset_and_no_gradient_does(form, impl, value):
    """It reaches the later steps of its own sequence, those alone, and of a value its own channel alone."""
    given, options = made(form, 23, b=1)
    marks = torch.zeros(1, 23, dtype=torch.bool)
    marks[0, [4, 9, 20]] = True
    clean, _ = linear_attention(**given, **options, reset=marks, chunk=8, impl=impl)
    expected = torch.autograd.grad(clean[:, :, 9:].sum(), list(given.values()), allow_unused=True)
    for name, x in given.items():
        if x.ndim < 3:
            continue
        spoilt = x.detach().clone()
        at = (0, slice(None), 0, 0) if name == "state" else (0, slice(None), 6, *[0] * (x.ndim - 3))
        spoilt[at] = torch.nan if name == "log_decay" else value
        mixed = given | {name: spoilt.requires_grad_()}
        out, last = linear_attention(**mixed, **options, reset=marks, chunk=8, impl=impl)
        after = slice(0, 4) if name == "state" else slice(6, 9)
        good = torch.ones(23, dtype=torch.bool)
        good[after] = False
        torch.testing.assert_close(out[:, :, good], clean[:, :, good])
        channel = slice(0, 1) if name in ("v", "state") else slice(None)
        if name != "q":
            assert not out[:, :, 6 if name != "state" else 0, channel].isfinite().any(), name
        else:
            assert not out[:, :, 6].isfinite().any() and out[:, :, 7:].isfinite().all()
        if name == "v":
            assert out[..., 1:].isfinite().all()
        assert last.isfinite().all()
        found = torch.autograd.grad(out[:, :, 9:].sum(), list(mixed.values()), allow_unused=True)
        for (key, x), gradient, wanted in zip(mixed.items(), found, expected):
            if x.ndim > 2 and key != "state":  # elsewhere the reference may have 0 times NaN
                torch.testing.assert_close(gradient[:, :, 9:], wanted[:, :, 9:])
            elif impl != "reference" and wanted is not None:
                torch.testing.assert_close(gradient, wanted)


def test_the_sum_since_the_last_reset_by_hand():
    counts = torch.tensor([1, 0, 2, 1, 3])[None, None, :, None]
    reset = torch.tensor([[False, False, True, False, True]])
    assert since_reset(counts, None, reset).flatten().tolist() == [1, 1, 2, 3, 3]
    assert since_reset(counts, torch.tensor([[[5]]]), reset).flatten().tolist() == [6, 6, 2, 3, 3]


@pytest.mark.parametrize("impl", PLAIN)
def test_without_order_it_is_two_products_and_may_have_another_number_of_keys(impl):
    torch.manual_seed(0)
    q, k, v = torch.rand(2, 4, 7, 3), torch.rand(2, 2, 9, 3), torch.randn(2, 2, 9, 5)
    out, state = linear_attention(q, k, v, causal=False, normalise=True, impl=impl)
    weights = q @ k.repeat_interleave(2, 1).mT
    torch.testing.assert_close(out, weights / weights.sum(-1, keepdim=True) @ v.repeat_interleave(2, 1))
    first, begun = linear_attention(q[:, :, :3], k[:, :, :4], v[:, :, :4], causal=False, normalise=True, impl=impl)
    assert first.shape == (2, 4, 3, 5)
    rest, ended = linear_attention(
        q, k[:, :, 4:], v[:, :, 4:], causal=False, normalise=True, state=begun, impl=impl
    )  # what was summed before counts
    torch.testing.assert_close((rest, ended), (out, state))


@pytest.mark.parametrize("form", FORMS)
def test_the_matrix_that_is_never_formed(form):
    given, options = made(form, 11, state=False, requires_grad=False)
    marks = resets(11)
    M = linear_attention_matrix(**{k: x for k, x in given.items() if k != "v"}, **options, reset=marks, scale=0.5)
    out, _ = linear_attention(**given, **options, reset=marks, scale=0.5)
    torch.testing.assert_close(M @ given["v"].repeat_interleave(2, 1), out)
    assert not M.triu(1).any()
    if options["normalise"]:
        torch.testing.assert_close(M.sum(-1), torch.ones_like(M[..., 0]))


def test_softmax_attention_in_another_order_of_the_same_products():
    """With the exponential itself as the weight there is no φ; with any φ of products the order does not matter, and
    costs N² one way and D² the other."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64).unbind(0)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    weights = (q @ k.mT) / (q @ k.mT).sum(-1, keepdim=True)
    out, _ = linear_attention(q, k, v, normalise=True, causal=False)
    torch.testing.assert_close(out, weights @ v)
    exponential = attention(q, k, v, scale=1.0)
    assert not torch.allclose(exponential, out, atol=1e-2)


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("form", ["sum", "delta"])
def test_keys_at_right_angles_are_read_exactly(form, impl):
    """D pairs fit into a state of D rows; and the delta rule also keeps them when they are written again."""
    torch.manual_seed(0)
    k, v = torch.linalg.qr(torch.randn(1, 1, 8, 8, dtype=torch.float64)).Q, torch.randn(1, 1, 8, 8).double()
    beta = torch.ones(1, 1, 8, dtype=torch.float64) if form == "delta" else None
    _, state = linear_attention(k, k, v, beta=beta, impl=impl)
    torch.testing.assert_close(k @ state, v)
    _, state = linear_attention(k, k, v, beta=beta, state=state, impl=impl)
    torch.testing.assert_close(k @ state, v if form == "delta" else 2 * v)


# --- Mamba-2's scan is one of the family -----------------------------------------------------------------------------


@pytest.mark.parametrize("impl", PLAIN)
def test_a_decay_of_each_head_and_step_is_the_scan_of_mamba_2(impl):
    """S = hᵀ with q = C, k = B, v = Δ x and log decay Δ A: state space duality."""
    torch.manual_seed(0)
    x, delta, A = torch.randn(2, 11, 4, 5).double(), torch.rand(2, 11, 4).double(), -torch.rand(4).double()
    B, C, h = torch.randn(2, 11, 2, 3).double(), torch.randn(2, 11, 2, 3).double(), torch.randn(2, 4, 5, 3).double()
    reset = resets(11)
    y, last = ssd(x, delta, A, B, C, state=h, reset=reset, impl="reference")
    out, state = linear_attention(
        C.transpose(1, 2).repeat_interleave(2, 1),
        B.transpose(1, 2).repeat_interleave(2, 1),
        (delta[..., None] * x).transpose(1, 2),
        log_decay=(delta * A).transpose(1, 2),
        state=h.mT,
        reset=reset,
        impl=impl,
    )
    torch.testing.assert_close(out.transpose(1, 2), y)
    torch.testing.assert_close(state.mT, last)


# --- decays and write strengths far out ------------------------------------------------------------------------------

FAR = [0.0, -1e-9, -1e-3, -1.0, -30.0, -100.0, -999.0, -1e4, -torch.inf]


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("form", [form for form, options in FORMS.items() if "gate" in options])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decays_near_0_and_1_and_beside_each_other(form, impl, dtype):
    """As exact as the reference, whose every decay is one exponential; NaN nowhere, in gradients neither."""
    given, options = made(form, 40, h=9, g=9, dtype=dtype)
    far = torch.tensor(FAR, dtype=torch.float32)
    shape = given["log_decay"].shape
    places = torch.randint(len(FAR), shape, generator=torch.Generator().manual_seed(4))
    given["log_decay"] = (far if len(shape) == 1 else far[places]).clone().requires_grad_()
    options |= {"chunk": 16}
    found, plain = (both_ways(way, given, options) for way in (impl, "reference"))
    exact = both_ways("reference", exactly(given), options)
    for name, x in found.items():
        assert x.isfinite().all(), name
        error, allowed = ((y[name].double() - exact[name]).abs().max() for y in (found, plain))
        scale = exact[name].abs().max() * torch.finfo(x.dtype).eps
        assert error <= 4 * allowed + 16 * scale, (name, float(error), float(allowed), float(scale))


@pytest.mark.parametrize("impl", PLAIN)
def test_a_state_decays_by_what_it_should_however_fast(impl):
    """Without input, a state of 1 is exp(g) after a step: to the last places of float32 down to exp(-80)."""
    logs, state = torch.tensor([-0.1, -9.0, -11.0, -16.0, -30.0, -80.0]), torch.ones(1, 6, 1, 1)
    q, zero = torch.ones(1, 6, 1, 1), torch.zeros(1, 6, 1, 1)
    for log_decay in (logs, logs[None, :, None], logs[None, :, None, None]):
        out, last = linear_attention(q, zero, zero, log_decay=log_decay, state=state, impl=impl)
        for found in (out, last):
            torch.testing.assert_close(found.flatten().double(), logs.double().exp(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("impl", PLAIN)
def test_one_key_written_again_and_again_with_a_strength_of_2(impl):
    """The state's eigenvalue along the key is -1: it is turned over at each step, and neither grows nor fades."""
    n = 200
    k = torch.zeros(1, 1, n, 4)
    k[..., 0] = 1
    v, beta, state = torch.zeros(1, 1, n, 1), torch.full((1, 1, n), 2.0), torch.ones(1, 1, 4, 1)
    out, last = linear_attention(k, k, v, beta=beta, state=state, impl=impl)
    assert out.flatten().tolist() == [-1.0, 1.0] * (n // 2) and last.flatten().tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(
        linear_attention(k, k, v + 1, beta=beta, impl=impl)[0].flatten()[:4], torch.tensor([2.0, 0, 2, 0])
    )


# --- errors --------------------------------------------------------------------------------------------------------


def plainly(given, options):
    """Plain PyTorch in the inputs' dtype, but for the decays: the N x N matrix by cumulated sums, and a solve."""
    q, k, v = (x.float() for x in (given["q"], given["k"], given["v"]))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    n, state = q.shape[2], given["state"]
    log = given.get("log_decay", torch.zeros(q.shape[1], dtype=torch.float32)).float()
    log = log[None, :, None].expand(q.shape[0], -1, n) if log.ndim == 1 else log
    log = (log[..., None] if log.ndim == 3 else log).expand(-1, -1, -1, q.shape[3]).cumsum(2)
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    decay = (log[:, :, :, None] - log[:, :, None]).masked_fill(~visible[..., None], -torch.inf).exp()
    if options["normalise"]:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    from_start = log.exp()
    if "beta" in given:
        beta = given["beta"].float()[..., None]
        lower = (beta * torch.einsum("bhtd,bhsd,bhtsd->bhts", k, k, decay)).tril(-1)
        v = torch.linalg.solve_triangular(lower, beta * (v - (from_start * k) @ state), upper=False, unitriangular=True)
    out = torch.einsum("bhtd,bhsd,bhtsd->bhts", q, k, decay) @ v + (from_start * q) @ state
    last = from_start[:, :, -1, :, None] * state + (decay[:, :, -1] * k).mT @ v
    if options["normalise"]:
        out = out[..., :-1] / out[..., -1:]
    return out.to(given["q"].dtype), last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["parallel", "chunked"])
@pytest.mark.parametrize("form", FORMS)
def test_error_beside_plain_pytorch(form, impl, dtype):
    """At most twice plain PyTorch's error against float64 in the outputs, three times in every gradient."""
    budget = ErrorBudget()
    for seed in range(DRAWS):
        given, options = made(form, 37, b=1, dtype=dtype, seed=seed, strength=0.3)
        given = {name: x if name in "qkv" else x.detach().float().requires_grad_() for name, x in given.items()}
        ours = both_ways(impl, given, options | {"chunk": 16})
        exact = both_ways("reference", exactly(given), options)
        out, state = plainly(given, options)
        received = [
            torch.randn(x.shape, generator=torch.Generator().manual_seed(s)).to(x) for x, s in ((out, 1), (state, 3))
        ]
        gradients = torch.autograd.grad((out, state), list(given.values()), received)
        plain = {"out": out, "last state": state} | {f"d{name}": x for name, x in zip(given, gradients)}
        assert ours["out"].dtype == dtype and ours["last state"].dtype == torch.float32
        for name, x in exact.items():
            budget.add(name, ours=ours[name], plain=plain[name], exact=x)
    budget.check({"out": 2, "last state": 2}, otherwise=3)


def test_an_output_of_no_steps_and_a_state_of_its_own():
    given, options = made("gated delta", 0, requires_grad=False)
    for impl in PLAIN:
        out, state = linear_attention(**given, **options, impl=impl)
        assert out.shape == (2, 4, 0, 5) and torch.equal(state, given["state"]) and state is not given["state"]
        state.zero_()
        assert given["state"].any()
    assert math.isfinite(float(given["state"].sum()))
