"""Attention against torch, against a loop, and at its edges. Every dimension is its own prime."""

import math

import pytest
import torch
import torch.nn.functional as F
from harness import DRAWS, ErrorBudget

from nondual.ops import masks
from nondual.ops.attention import attention, masked_softmax

B, H, G, N, M, D, DV = 2, 6, 3, 5, 11, 7, 13
ENGINES = ["reference", "sdpa"]


def qkv(n=N, m=M, h=H, g=H, dv=DV, dtype=torch.float64, seed=0, grad=True):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(B, h, n, D), (B, g, m, D), (B, g, m, dv)]
    return [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


def gradients(out, inputs, seed=1):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad((out * weight).sum(), inputs)


def literal(q, k, v, allowed, scale):
    """The definition as loops over batch, head, query and key."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            for i in range(q.shape[2]):
                keys = [j for j in range(k.shape[2]) if allowed[i, j]]
                if keys:
                    e = [math.exp(scale * float(q[b, h, i] @ k[b, g, j])) for j in keys]
                    out[b, h, i] = sum(x / sum(e) * v[b, g, j] for x, j in zip(e, keys))
    return out


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("g", [1, 2, 3, 6])
def test_equals_a_literal_loop_with_grouped_heads(impl, g):
    q, k, v = qkv(g=g, grad=False)
    allowed = masks.causal(N, M)
    expected = literal(q, k, v, allowed, 1 / math.sqrt(D))
    torch.testing.assert_close(attention(q, k, v, causal=True, impl=impl), expected)


def test_by_hand():
    q = torch.tensor([[[[1.0, 0.0]]]])
    k = torch.tensor([[[[math.log(3.0), 0.0], [0.0, 5.0]]]])
    v = torch.tensor([[[[4.0], [8.0]]]])
    out, weights = attention(q, k, v, scale=1.0, return_weights=True)
    torch.testing.assert_close(weights, torch.tensor([[[[0.75, 0.25]]]]))
    torch.testing.assert_close(out, torch.tensor([[[[5.0]]]]))


@pytest.mark.parametrize("n, m", [(N, M), (M, N), (1, M), (M, 1), (1, 1), (N, N)])
@pytest.mark.parametrize("kind", ["none", "causal", "window", "padding", "per head", "added", "added and causal"])
def test_engines_agree_forward_and_backward(n, m, kind):
    q, k, v = inputs = qkv(n, m)
    draw = torch.Generator().manual_seed(3)
    added = torch.randn(B, 1, n, m, generator=draw, dtype=torch.float64)
    options = {
        "none": {},
        "causal": {"causal": True},
        "window": {"mask": masks.sliding_window(n, m, window=3)},
        "padding": {"mask": masks.padding(torch.tensor([m, max(1, m - 2)]), m)},
        "per head": {"mask": torch.rand(1, H, n, m, generator=draw) < 0.7},
        "added": {"mask": added},
        "added and causal": {"mask": added, "causal": True},
    }[kind]
    ours, fused = (attention(q, k, v, impl=impl, **options) for impl in ENGINES)
    torch.testing.assert_close(ours, fused)
    for name, a, b in zip("qkv", gradients(ours, inputs), gradients(fused, inputs)):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", ENGINES)
def test_error_in_low_precision_is_that_of_plain_pytorch(dtype, impl):
    """Against float64: at most twice the error of the textbook formula in the same dtype, gradients three times."""

    def textbook(q, k, v):
        return F.softmax(q @ k.mT / math.sqrt(D), -1) @ v

    budget = ErrorBudget()
    for seed in range(DRAWS):
        inputs = qkv(37, 41, dtype=dtype, seed=seed)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        truth, plain, ours = textbook(*exact), textbook(*inputs), attention(*inputs, impl=impl)
        assert ours.dtype == dtype
        budget.add("out", ours=ours, plain=plain, exact=truth)
        grads = gradients(truth, exact), gradients(plain, inputs), gradients(ours, inputs)
        for name, g_truth, g_plain, g_ours in zip("qkv", *grads):
            budget.add(f"gradient of {name}", ours=g_ours, plain=g_plain, exact=g_truth)
    budget.check({"out": 2}, otherwise=3, ulps=1 if dtype == torch.float32 else 0)


def test_rows_of_weights_sum_to_one_and_rebuild_the_output():
    q, k, v = qkv(g=G, grad=False)
    out, weights = attention(q, k, v, mask=masks.sliding_window(N, M, window=4), return_weights=True)
    assert weights.shape == (B, H, N, M)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, N, dtype=torch.float64))
    torch.testing.assert_close(weights @ v.repeat_interleave(H // G, 1), out)


def test_gradcheck_and_second_derivative():
    q, k, v = (x[:1, :2, :3].detach().requires_grad_() for x in qkv())
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)

    def run(q, k, v):
        return attention(q, k, v, mask=mask, impl="reference")

    assert torch.autograd.gradcheck(run, (q, k, v))
    assert torch.autograd.gradgradcheck(run, (q, k, v))


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("form", ["boolean", "added", "causal, more queries than keys"])
def test_a_row_with_nothing_to_attend_is_zero_with_zero_gradient(impl, dtype, form):
    if form.startswith("causal"):
        q, k, v = inputs = qkv(M, N, dtype=dtype)
        options, empty = {"causal": True}, slice(0, M - N)
    else:
        q, k, v = inputs = qkv(dtype=dtype)
        mask = torch.ones(N, M, dtype=torch.bool)
        mask[2] = False
        added = torch.zeros(N, M, dtype=dtype).masked_fill(~mask, -torch.inf)
        options, empty = {"mask": mask if form == "boolean" else added}, slice(2, 3)
    out = attention(q, k, v, impl=impl, **options)
    assert (out[:, :, empty] == 0).all()
    grads = gradients(out, inputs)
    assert all(torch.isfinite(x).all() for x in (out, *grads))
    assert (grads[0][:, :, empty] == 0).all()


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("b, n, m", [(2, 5, 0), (2, 0, 5), (2, 0, 0), (0, 5, 5)])
def test_nothing_there_gives_zeros_or_nothing(impl, causal, b, n, m):
    q, k, v = (torch.randn(b, H, x, D, requires_grad=True) for x in (n, m, m))
    out = attention(q, k, v, causal=causal, impl=impl)
    assert out.shape == (b, H, n, D)
    assert (out == 0).all()
    out.sum().backward()
    assert all(x.grad is None or (x.grad == 0).all() for x in (q, k, v))


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_scores_stay_finite_and_right(impl, dtype):
    q, k, v = (x.to(dtype) for x in qkv(grad=False))
    for factor in (1e4, -1e4):
        out = attention(q, k, v, scale=factor, impl=impl)
        truth = attention(q.double(), k.double(), v.double(), scale=factor, impl="reference")
        torch.testing.assert_close(out.double(), truth, atol=2e-2 if dtype == torch.float16 else 1e-3, rtol=1e-2)
    low = torch.full((N, M), -6e4, dtype=dtype)
    assert torch.isfinite(attention(q, k, v, mask=low, impl=impl)).all()


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_layout_of_inputs_and_of_the_incoming_gradient(impl, layout):
    def laid(x):
        if layout == "transposed":
            return x.mT.contiguous().mT
        if layout == "sliced":
            return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
        return x[:1, :1, :, :1].expand(x.shape)

    q, k, v = [laid(x.detach()).requires_grad_() for x in qkv()]
    plain = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    out, expected = attention(q, k, v, impl=impl), attention(*plain, impl=impl)
    torch.testing.assert_close(out, expected)
    incoming = laid(torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    ours = torch.autograd.grad(out, (q, k, v), incoming)
    theirs = torch.autograd.grad(expected, plain, incoming.contiguous())
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_in_a_masked_value_reaches_every_row_as_in_torch(poison):
    q, k, v = qkv(N, N, grad=False)
    v[:, :, -1] = poison
    torch_says = F.scaled_dot_product_attention(q, k, v, attn_mask=masks.causal(N)).isfinite()
    assert not torch_says.any()
    for impl in ENGINES:
        assert torch.equal(attention(q, k, v, mask=masks.causal(N), impl=impl).isfinite(), torch_says)


def test_nan_in_a_query_stays_in_its_row():
    q, k, v = qkv(grad=False)
    q[:, :, 1] = torch.inf
    for impl in ENGINES:
        bad = attention(q, k, v, impl=impl).isnan().any(-1)
        assert bad[:, :, 1].all() and bad.sum() == B * H


def test_mask_and_causal_combine():
    q, k, v = qkv(grad=False)
    kept = torch.rand(N, M, generator=torch.Generator().manual_seed(2)) < 0.5
    both = attention(q, k, v, mask=kept & masks.causal(N, M))
    torch.testing.assert_close(attention(q, k, v, mask=kept, causal=True), both)


@pytest.mark.parametrize("impl", ENGINES)
def test_dropout_keeps_the_mean(impl):
    torch.manual_seed(0)
    q, k, v = (x[:1, :1].float() for x in qkv(grad=False))
    mean = torch.stack([attention(q, k, v, dropout=0.3, impl=impl) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, attention(q, k, v, impl=impl), atol=0.06, rtol=0)


def test_masked_softmax_is_softmax_where_nothing_is_masked():
    scores = torch.randn(3, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(masked_softmax(scores), scores.softmax(-1))


def test_weights_are_asked_of_the_engine_that_forms_them():
    q, k, v = qkv(grad=False)
    with pytest.raises(ValueError, match="never forms the weights"):
        attention(q, k, v, return_weights=True, impl="sdpa")


def test_runs_on_meta_tensors_and_compiles_whole():
    q, k, v = (x.float().detach() for x in qkv())
    assert attention(q.to("meta"), k.to("meta"), v.to("meta"), causal=True).shape == (B, H, N, DV)
    compiled = torch.compile(lambda *a: attention(*a, causal=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, causal=True))


@pytest.mark.parametrize("impl", ENGINES)
def test_autocast(impl):
    q, k, v = (x.float().detach() for x in qkv())
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, impl=impl)
    torch.testing.assert_close(out.float(), attention(q, k, v), atol=5e-2, rtol=5e-2)


def made(**shapes):
    shape = {"q": (B, H, N, D), "k": (B, H, M, D), "v": (B, H, M, DV)} | shapes
    return [torch.zeros(shape[name]) for name in "qkv"]


@pytest.mark.parametrize(
    "inputs, options, says",
    [
        (made(q=(B, N, D)), {}, r"q must be 4-dimensional .* got \(2, 5, 7\)"),
        (made(k=(B, H, M, D + 1)), {}, "k must have q's width D=7, got 8"),
        (made(q=(B, H, N, 0), k=(B, H, M, 0)), {}, "width D of 1 or more"),
        (made(v=(B, H, M + 1, DV)), {}, r"v must have k's batch, heads and length \(2, 6, 11\), got \(2, 6, 12\)"),
        (made(k=(1, H, M, D), v=(1, H, M, DV)), {}, "batch B=2, got 1"),
        (made(k=(B, 4, M, D), v=(B, 4, M, DV)), {}, "multiple of k's, got 6 and 4"),
        (made(k=(B, 0, M, D), v=(B, 0, M, DV)), {}, "multiple of k's, got 6 and 0"),
        ([x.long() for x in made()], {}, r"q must be floating point, got torch.int64; .* q.float\(\)"),
        (
            [made()[0], made()[1].double(), made()[2]],
            {},
            "k must have q's dtype and device, torch.float32 on cpu, got torch.float64",
        ),
        ([made()[0], made()[1], made()[2].to("meta")], {}, "v must have q's dtype and device, .* on meta"),
        (made(), {"mask": torch.ones(N, M, dtype=torch.long)}, "mask must be torch.bool"),
        (made(), {"mask": torch.ones(N, M, dtype=torch.float64)}, "mask must be torch.bool"),
        (made(), {"mask": torch.ones(B, M, dtype=torch.bool)}, "a padding mask"),
        (made(), {"mask": torch.ones(H, N, M, dtype=torch.bool)}, r"got \(6, 5, 11\)"),
        (
            made(),
            {"mask": torch.ones(N, M, dtype=torch.bool, device="meta")},
            "mask must be on q's device cpu, got meta",
        ),
        (made(), {"dropout": 1.5}, "dropout must be in"),
        (made(), {"impl": "magic"}, "impl must be one of .* got 'magic'"),
    ],
)
def test_bad_input_is_named(inputs, options, says):
    with pytest.raises(ValueError, match=says):
        attention(*inputs, **options)


@pytest.mark.parametrize("name, given, says", [
    ("q", [[1.0]], "q must be a Tensor, got list; use torch.tensor"),
    ("k", None, "k must be a Tensor, got NoneType"),
    ("v", "array", "v must be a Tensor, got ndarray; use torch.from_numpy"),
    ("mask", "array", "mask must be a Tensor, got ndarray"),
])  # fmt: skip
def test_what_is_no_tensor_is_named(name, given, says):
    given = torch.zeros(B, H, M, D).numpy() if given == "array" else given
    inputs = dict(zip("qkv", made())) | {name: given}
    with pytest.raises(TypeError, match=says):
        attention(**inputs)
    with pytest.raises(TypeError, match="scores must be a Tensor, got list"):
        masked_softmax([[0.0]])


def test_what_is_no_mask_or_no_score_is_named():
    with pytest.raises(ValueError, match=r"mask must be boolean .* got torch.int64; .*mask.bool\(\)"):
        masked_softmax(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="scores must be floating point"):
        masked_softmax(torch.zeros(2, 3, dtype=torch.long))


# --- float32 or better -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["no mask", "boolean", "added"])
def test_a_softmax_of_many_half_precision_scores_sums_to_one(dtype, form):
    """70,000 equal scores: their sum is beyond float16, and beyond what bfloat16 counts in ones."""
    m = 70_000
    mask = {"no mask": None, "boolean": torch.ones(m, dtype=torch.bool), "added": torch.zeros(m, dtype=dtype)}[form]
    weights = masked_softmax(torch.full((1, m), 3.0, dtype=dtype), mask)
    assert weights.dtype == dtype
    assert (weights.double() - 1 / m).abs().max() <= torch.finfo(dtype).eps / m + 2.0**-25  # float16: half a subnormal
    _, weights = attention(*(torch.zeros(1, 1, n, 4, dtype=dtype) for n in (1, m, m)), return_weights=True)
    assert (weights.double() - 1 / m).abs().max() <= torch.finfo(dtype).eps / m + 2.0**-25


def test_a_softmax_adds_its_mask_in_float32():
    scores = torch.full((1, 2), -6e4, dtype=torch.float16)
    added = torch.tensor([[-6e4, -6e4 + 32]], dtype=torch.float16)  # the sums are beyond float16
    torch.testing.assert_close(masked_softmax(scores, added), (scores.float() + added.float()).softmax(-1).half())


@pytest.mark.parametrize("compiled", [False, True])
def test_the_reference_multiplies_in_float32_under_autocast_too(compiled):
    """Cast on the way in, as torch casts, and nothing after that: to the bit what it gives without autocast."""
    inputs = [(8 * x).float().detach().requires_grad_() for x in qkv()]
    half = [x.detach().bfloat16().requires_grad_() for x in inputs]
    run = lambda *a: attention(*a, causal=True, return_weights=True, impl="reference")  # noqa: E731
    expected, rows = run(*half)
    op = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = op(*inputs)
    assert out.dtype == weights.dtype == torch.bfloat16
    assert torch.equal(out, expected) and torch.equal(weights, rows)
    exact, exact_rows = run(*(x.detach().double() for x in half))
    assert (out - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (weights - exact_rows).abs().max() <= torch.finfo(torch.bfloat16).eps
    if not compiled:  # torch.compile traces a backward pass under the autocast around it
        for a, b in zip(gradients(out, inputs), gradients(expected, half)):
            torch.testing.assert_close(a.bfloat16(), b)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("q_dtype, kv_dtype, mask_dtype", [
    (torch.float32, torch.bfloat16, torch.float32), (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16), (torch.float64, torch.float64, torch.float64),
])  # fmt: skip
def test_autocast_takes_the_dtypes_that_torch_takes(impl, q_dtype, kv_dtype, mask_dtype):
    q, k, v = (x.detach().to(t) for x, t in zip(qkv(), (q_dtype, kv_dtype, kv_dtype)))
    mask = torch.randn(N, M, generator=torch.Generator().manual_seed(1)).to(mask_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        out = attention(q, k, v, mask=mask, impl=impl)
        masked = attention(q, k, v, mask=mask, causal=True, impl=impl)
    assert out.dtype == masked.dtype == expected.dtype
    loose = 1e-12 if out.dtype == torch.float64 else 2e-2
    torch.testing.assert_close(out, expected, atol=loose, rtol=loose)


def test_under_autocast_a_float32_mask_beside_float64_is_taken_as_it_is():
    q, k, v = (x.detach() for x in qkv())
    mask = torch.randn(N, M)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, mask=mask)
    torch.testing.assert_close(out, attention(q, k, v, mask=mask.double()))


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
def test_a_float32_mask_beside_other_queries_keeps_its_digits(impl, dtype, causal):
    """As torch takes it: a bias of hundreds whose differences bfloat16 could not tell apart, and its gradient."""
    q, k, v = inputs = qkv(dtype=dtype)
    bias = (300 + torch.rand(N, M, generator=torch.Generator().manual_seed(4))).requires_grad_()
    out = attention(q, k, v, mask=bias, causal=causal, impl=impl)
    assert out.dtype == dtype
    exact = [x.detach().double().requires_grad_() for x in (*inputs, bias)]
    truth = attention(*exact[:3], mask=exact[3], causal=causal, impl="reference")
    loose = 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * 300)
    torch.testing.assert_close(out.double(), truth, atol=loose, rtol=loose)
    for a, t in zip(gradients(out, [*inputs, bias]), gradients(truth, exact)):
        torch.testing.assert_close(a.double(), t, atol=8 * loose, rtol=8 * loose)


# --- layouts, one tensor at a time ---------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("which", ["q", "k", "v", "mask", "dy"])
@pytest.mark.parametrize("layout", ["transposed", "heads inside", "sliced", "expanded"])
def test_each_tensor_in_a_layout_of_its_own(impl, which, layout):
    def laid(x, name):
        if name != which:
            return x
        if layout == "transposed":
            return x.mT.contiguous().mT
        if layout == "heads inside":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "sliced":
            return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
        return x[:, :1].expand(x.shape)

    draw = torch.Generator().manual_seed(6)
    bias, dy = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((B, H, N, M), (B, H, N, DV)))
    given = dict(zip("qkv", (x.detach() for x in qkv(g=G)))) | {"mask": bias, "dy": dy}
    given = {name: laid(x, name) for name, x in given.items()}
    plain = {name: x.contiguous() for name, x in given.items()}
    results = []
    for case in (given, plain):
        inputs = [case[name].requires_grad_() for name in ("q", "k", "v", "mask")]
        out = attention(*inputs[:3], mask=inputs[3], impl=impl)
        results.append([out, *torch.autograd.grad(out, inputs, case["dy"])])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


# --- transforms ----------------------------------------------------------------------------------------------------


# Values as wide as queries: else torch takes its unfused attention, which has every derivative.


def squares(q, k, v, **options):
    return attention(q, k, v, **options).square().sum()


@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"mask": masks.sliding_window(N, M, window=3)}, {"mask": torch.randn(N, M).double()},
])  # fmt: skip
def test_forward_mode_is_the_directional_derivative(options):
    """Against the reverse mode's gradient, for q, k and v at once, by torch.func.jvp and by forward_ad."""
    inputs = qkv(g=G, dv=D)
    tangents = [torch.randn_like(x) for x in inputs]
    expected = sum((g * t).sum() for g, t in zip(torch.autograd.grad(squares(*inputs, **options), inputs), tangents))
    plain = tuple(x.detach() for x in inputs)
    _, got = torch.func.jvp(lambda *a: squares(*a, **options), plain, tuple(tangents))
    torch.testing.assert_close(got, expected)
    with torch.autograd.forward_ad.dual_level() as _:
        duals = [torch.autograd.forward_ad.make_dual(x, t) for x, t in zip(plain, tangents)]
        got = torch.autograd.forward_ad.unpack_dual(squares(*duals, **options)).tangent
    torch.testing.assert_close(got, expected)
    bias = torch.randn(N, M, dtype=torch.float64)  # a tangent of the mask alone
    _, got = torch.func.jvp(lambda bias: squares(*plain, mask=bias), (bias,), (bias,))
    bias.requires_grad_()
    torch.testing.assert_close(got, (torch.autograd.grad(squares(*plain, mask=bias), bias)[0] * bias).sum().detach())


def test_every_transform_of_torch_func_works_through_auto():
    q, k, v = (x.detach() for x in qkv(g=G, dv=D))
    f = lambda q: squares(q, k, v, causal=True)  # noqa: E731
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(f)(q), expected)
    torch.testing.assert_close(torch.func.vjp(f, q)[1](torch.ones((), dtype=q.dtype))[0], expected)
    torch.testing.assert_close(torch.func.jacrev(f)(q), expected)
    torch.testing.assert_close(torch.func.jacfwd(f)(q), expected)
    small = q[:1, :1, :2], k[:1, :1, :3], v[:1, :1, :3]
    f = lambda q: squares(q, *small[1:])  # noqa: E731
    by_reverse = torch.autograd.functional.hessian(lambda q: squares(q, *small[1:], impl="reference"), small[0])
    for hessian in (
        torch.func.hessian(f),
        torch.func.jacrev(torch.func.jacrev(f)),
        torch.func.jacfwd(torch.func.jacfwd(f)),
    ):
        torch.testing.assert_close(hessian(small[0]), by_reverse)
    one = lambda q, k, v: squares(q[None], k[None], v[None], causal=True)  # noqa: E731
    each = torch.func.vmap(torch.func.grad(one, argnums=(0, 1, 2)))(q, k, v)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    for a, b in zip(each, torch.autograd.grad(squares(*inputs, causal=True), inputs)):
        torch.testing.assert_close(a, b)


def test_forward_mode_through_a_compiled_program():
    q, k, v = (x.detach() for x in qkv(dv=D))
    run = lambda q: torch.func.jvp(lambda q: attention(q, k, v, causal=True), (q,), (q,))[1]  # noqa: E731
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(q), run(q))


def test_sdpa_by_name_says_that_it_has_no_forward_mode():
    q, k, v = (x.detach() for x in qkv(dv=D))
    f = lambda q: squares(q, k, v, impl="sdpa")  # noqa: E731
    for asked in (lambda: torch.func.jvp(f, (q,), (q,)), lambda: torch.func.hessian(f)(q)):
        with pytest.raises(
            RuntimeError, match="impl='sdpa' has no forward-mode derivative; use impl='reference' or 'auto'"
        ):
            asked()
    torch.testing.assert_close(torch.func.grad(f)(q), torch.func.grad(lambda q: squares(q, k, v))(q))


# --- any length by one program ---------------------------------------------------------------------------------------

SAME = [(5, 5), (9, 9), (17, 17), (130, 130), (33, 33), (1, 1)]
OTHER = [(5, 9), (9, 17), (130, 150), (3, 7), (17, 9), (1, 6)]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("lengths", [SAME, OTHER])
@pytest.mark.parametrize("form", ["causal", "causal and mask", "weights"])
def test_compiles_whole_for_many_lengths(dynamic, lengths, form):
    """At most three programs: the first length, any length, and a single query. Grouped heads, forward and backward."""

    def run(q, k, v):
        mask = torch.ones(q.shape[0], 1, 1, k.shape[2], dtype=torch.bool) if "mask" in form else None
        return attention(q, k, v, mask=mask, causal=True, return_weights=form == "weights")

    torch._dynamo.reset()
    programs = []
    backend = lambda graph, inputs: programs.append(graph) or torch._dynamo.lookup_backend("aot_eager")(graph, inputs)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=backend)
    for n, m in lengths:
        inputs = qkv(n, m, g=G, dv=D)
        ours, plain = (f(*inputs) for f in (compiled, run))
        torch.testing.assert_close(ours, plain)
        ours, plain = (x[0] if form == "weights" else x for x in (ours, plain))
        for a, b in zip(gradients(ours, inputs), gradients(plain, inputs)):
            torch.testing.assert_close(a, b)
    assert len(programs) <= 3


@pytest.mark.timeout(400)  # inductor calls a C++ compiler
def test_compiles_whole_by_inductor_for_two_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: attention(*a, causal=True), fullgraph=True, dynamic=True)
    for n in (5, 19):
        q, k, v = (x.float().detach() for x in qkv(n, n, g=G, dv=D))
        torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, causal=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n, m", [(1025, 1025), (1, 4097), (257, 1031), (1031, 257)])
@pytest.mark.parametrize("kind", ["none", "causal", "padding"])
@pytest.mark.parametrize("g", [2, 6])
def test_on_a_gpu_both_engines_are_as_near_to_float64_as_plain_pytorch(dtype, n, m, kind, g):
    """Output at most twice plain PyTorch's error in the same dtype, gradients three times; nothing NaN."""
    inputs = [x.detach().to("cuda").requires_grad_() for x in qkv(n, m, g=g, dv=D, dtype=dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    allowed = {
        "none": torch.ones(n, m, dtype=torch.bool, device="cuda"),
        "causal": masks.causal(n, m, device="cuda"),
        "padding": masks.padding(torch.tensor([m, m // 3], device="cuda"), m),
    }[kind]
    options = {"none": {}, "causal": {"causal": True}, "padding": {"mask": allowed}}[kind]

    def textbook(q, k, v):
        k, v = (x.repeat_interleave(H // g, 1) for x in (k, v))
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(~allowed, torch.finfo(q.dtype).min)
        return scores.softmax(-1).masked_fill(~allowed, 0) @ v

    truth, plain = attention(*exact, impl="reference", **options), textbook(*inputs)
    incoming = torch.randn(truth.shape, dtype=torch.float64, device="cuda")
    g_truth = torch.autograd.grad(truth, exact, incoming)
    g_plain = torch.autograd.grad(plain, inputs, incoming.to(dtype))
    for impl in ENGINES:
        out = attention(*inputs, impl=impl, **options)
        assert (out - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-6
        for t, p, o in zip(g_truth, g_plain, torch.autograd.grad(out, inputs, incoming.to(dtype))):
            assert o.isfinite().all()
            assert (o - t).abs().max() <= 3 * (p - t).abs().max() + 1e-5


@pytest.mark.gpu
def test_on_a_gpu_a_mask_left_on_the_cpu_is_named():
    q, k, v = (x.detach().cuda() for x in qkv())
    with pytest.raises(ValueError, match="mask must be on q's device cuda:0, got cpu"):
        attention(q, k, v, mask=masks.causal(N, M))
    with pytest.raises(ValueError, match="k must have q's dtype and device"):
        attention(q, k.cpu(), v)
