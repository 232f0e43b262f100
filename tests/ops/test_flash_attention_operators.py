"""Flash attention as operators of torch: opcheck, torch.compile, meta tensors, autocast, derivatives and transforms."""

import pytest
import torch
from flash_cases import allowed, made, textbook
from harness import everywhere, incoming, laid

from nondual.ops.flash_attention import flash_attention, reference
from nondual.ops.flash_attention import triton as kernels

pytestmark = pytest.mark.usefixtures("poisoned")


@everywhere
@pytest.mark.parametrize("layout", ["plain", "heads inside", "transposed", "strided", "one head"])
def test_opcheck(device, layout):
    """What the operators say of their results while compiling is true: shapes, strides, dtypes, in every layout."""
    q, k, v = (laid(x.detach(), layout).requires_grad_() for x in made(9, 13, 16, h=2, g=1, device=device))
    torch.library.opcheck(torch.ops.nondual.flash_attention.default, (q, k, v, True, 0, 0.25))
    out, top, total = kernels.launch_forward(*(x.detach() for x in (q, k, v)), True, 0, 0.25)
    d_out = laid(torch.randn(out.shape, device=device), layout)
    given = [x.detach() for x in (d_out, total, q, k, v, out, top, total)]
    torch.library.opcheck(torch.ops.nondual.flash_attention_backward.default, (*given, True, 0, 0.25))
    torch.library.opcheck(torch.ops.nondual.attention_by_tiles.default, (q, k, v, 5, 0.25))
    given = [x.detach() for x in (d_out, q, k, v)]
    torch.library.opcheck(torch.ops.nondual.attention_by_tiles_backward.default, (*given, 5, 0.25))
    torch.library.opcheck(torch.ops.nondual.flash_attention_reference.default, (q, k, v, True, 0, 0.25, 8, 8))
    visible = reference.Visible(9, 13, True, None, q.device)
    given = [x.detach() for x in (d_out, total, q, k, v, *reference.forward(q, k, v, visible, 0.25, (8, 8)))]
    torch.library.opcheck(torch.ops.nondual.flash_attention_reference_backward.default, (*given, True, 0, 0.25, 8, 8))


@everywhere
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_forward_and_backward(device, dynamic):
    backend = "aot_eager" if device == "cpu" else "inductor"

    def run(q, k, v):
        return flash_attention(q * 1.5, k, v, causal=True, impl="triton") * 2

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=backend)
    for n in (9, 14):
        inputs = made(n, 21, 16, device=device)
        ours, plain = compiled(*inputs), run(*inputs)
        torch.testing.assert_close(ours, plain)
        grads = (torch.autograd.grad(out, inputs, incoming(out)) for out in (ours, plain))
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 3}, {"causal": True, "return_lse": True}])
def test_auto_on_a_cpu_compiles_whole(options):
    torch._dynamo.reset()
    q, k, v = made(9, 14, 16)
    compiled = torch.compile(lambda *a: flash_attention(*a, **options), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), flash_attention(q, k, v, **options))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("options", [{"causal": True}, {"window": 4}, {"window": 4, "return_lse": True}])
@pytest.mark.parametrize("lengths", [
    [(5, 5), (9, 9), (130, 130), (33, 33), (200, 200)], [(5, 9), (9, 17), (130, 150), (17, 9), (1, 33)],
])  # fmt: skip
def test_one_program_serves_many_lengths(dynamic, options, lengths):
    """One for the first length, one for any, and more for a single query and for more queries than keys."""
    torch._dynamo.reset()
    programs = []

    def backend(graph, inputs):
        programs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def run(q, k, v):
        return flash_attention(q, k, v, **options)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=backend)
    for n, m in lengths:
        inputs = made(n, m, 8, h=4, g=2)
        ours, plain = compiled(*inputs), run(*inputs)
        torch.testing.assert_close(ours, plain)
        ours, plain = (x[0] if "return_lse" in options else x for x in (ours, plain))
        grads = (torch.autograd.grad(out, inputs, incoming(out)) for out in (ours, plain))
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b)
    assert len(programs) <= (3 if lengths[0] == (5, 5) else 4)


@pytest.mark.timeout(400)  # inductor calls a C++ compiler
def test_a_window_compiles_by_inductor_for_two_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: flash_attention(*a, window=5) * 2, fullgraph=True, dynamic=True)
    for n in (9, 150):
        inputs = made(n, n, 8)
        ours, plain = compiled(*inputs), flash_attention(*inputs, window=5) * 2
        torch.testing.assert_close(ours, plain)
        grads = (torch.autograd.grad(out, inputs, incoming(out)) for out in (ours, plain))
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["reference", "sdpa", "triton"])
def test_meta_tensors(impl):
    q, k, v = (torch.zeros(2, 4, 7, 16, device="meta") for _ in range(3))
    assert flash_attention(q, k, v, causal=True, impl=impl).shape == (2, 4, 7, 16)


@everywhere
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 5}])
@pytest.mark.parametrize("impl", ["reference", "sdpa", "triton", "auto"])
def test_dtypes_meet_under_autocast(device, impl, options):
    q, k, v = (x.detach() for x in made(17, 23, 16, device=device))
    expected = flash_attention(q.half(), k.half(), v.half(), **options, impl=impl)
    with torch.autocast(device, torch.float16):
        for dtypes in ((torch.float32, torch.float16, torch.float32), (torch.float16, torch.float32, torch.float32)):
            out = flash_attention(*(x.half().to(t) for x, t in zip((q, k, v), dtypes)), **options, impl=impl)
            assert torch.equal(out, expected)


@everywhere
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_autocast(device, impl):
    q, k, v = inputs = made(17, 23, 16, device=device)
    with torch.autocast(device, torch.float16):
        out = flash_attention(q, k.half(), v, impl=impl)  # the dtypes meet, as in torch's own attention
        out.sum().backward()
    assert out.dtype == torch.float16 and all(x.grad.dtype == torch.float32 for x in inputs)
    half = [x.detach().half() for x in inputs]
    torch.testing.assert_close(out, flash_attention(*half, impl=impl))
    with torch.autocast(device, torch.float16):
        wide = flash_attention(*(x.double() for x in inputs), impl="reference")
    assert wide.dtype == torch.float64


@everywhere
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_second_derivative_is_refused(device, impl):
    q, k, v = made(5, 7, 16, device=device)
    out = flash_attention(q, k, v, impl=impl)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize("options", [{"window": 3}, {"causal": True}])
def test_a_second_derivative_through_torchs_own_attention_by_tiles_is_refused(options):
    q, k, v = made(5, 7, 16)
    (grad,) = torch.autograd.grad(flash_attention(q, k, v, **options, impl="sdpa").sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"impl='sdpa'\) has no second derivative; .*impl='reference'\) has one"):
        grad.sum().backward()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 3}, {"window": 3, "return_lse": True}])
@pytest.mark.parametrize("n, m", [(5, 7), (7, 5), (6, 6)])
def test_every_transform_works_through_auto(options, n, m):
    """Forward mode, gradients for each sample, Hessians: as through the written formula. Rows that see nothing too."""
    q, k, v = (x.detach() for x in made(n, m, 4, b=3, h=2, g=1, dtype=torch.float64))
    mask = allowed(n, m, "cpu", **options)

    def ours(q, k, v):
        found = flash_attention(q, k, v, **options)
        out, lse = found if "return_lse" in options else (found, torch.zeros(()))
        return out.square().sum() + torch.where(lse.isfinite(), lse, 0).square().sum()

    def written(q, k, v):
        scores = (q @ k.repeat_interleave(2, -3).mT / q.shape[-1] ** 0.5).masked_fill(~mask, -1e9)
        lse = torch.where(mask.any(-1), scores.logsumexp(-1), 0) if "return_lse" in options else torch.zeros(())
        return textbook(q, k, v, mask).square().sum() + lse.square().sum()

    by = (0, 1, 2)
    expected = torch.func.grad(written, by)(q, k, v)
    for got in (
        torch.func.grad(ours, by)(q, k, v),
        torch.func.jacrev(ours, by)(q, k, v),
        torch.func.jacfwd(ours, by)(q, k, v),
    ):
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b)
    tangents = tuple(torch.randn_like(x) for x in (q, k, v))
    _, along = torch.func.jvp(ours, (q, k, v), tangents)
    torch.testing.assert_close(along, sum((g * t).sum() for g, t in zip(expected, tangents)))
    one = lambda f: lambda q, k, v: f(q[None], k[None], v[None])  # noqa: E731
    for a, b in zip(torch.func.vmap(torch.func.grad(one(ours), by))(q, k, v), expected):
        torch.testing.assert_close(a, b)
    small = [x[:1, :, :, :2] for x in (q, k, v)]
    second = torch.func.hessian(ours)(*small)
    torch.testing.assert_close(second, torch.func.hessian(written)(*small))
    torch.testing.assert_close(second, torch.func.jacrev(torch.func.jacrev(ours))(*small))


@pytest.mark.parametrize("options", [{"causal": True}, {"window": 2}])
def test_a_row_that_sees_nothing_has_no_forward_mode_derivative_either(options):
    """lse is the constant -inf there: its tangent is 0, not NaN, and so is that of the row's output."""
    q, k, v = (x.detach() for x in made(5, 3, 4, dtype=torch.float64))
    tangents = tuple(torch.randn_like(x) for x in (q, k, v))
    (out, lse), (d_out, d_lse) = torch.func.jvp(
        lambda q, k, v: flash_attention(q, k, v, return_lse=True, **options), (q, k, v), tangents
    )
    assert (lse[:, :, :2] == -torch.inf).all() and (out[:, :, :2] == 0).all()
    assert (d_lse[:, :, :2] == 0).all() and (d_out[:, :, :2] == 0).all()
    assert d_lse.isfinite().all() and (d_lse[:, :, 2:] != 0).all()


@everywhere
@pytest.mark.parametrize("impl", ["reference", "sdpa", "triton"])
@pytest.mark.parametrize("asked, says", [
    ("jvp", "no forward-mode derivative"), ("dual", "no forward-mode derivative"),
    ("vmap", "cannot be transformed by torch.func"), ("grad", "cannot be transformed by torch.func"),
])  # fmt: skip
def test_an_engine_by_name_says_which_transform_it_lacks(device, impl, asked, says):
    """Never zeros without a word, as torch would give through an operator that has a backward pass alone."""
    q, k, v = (x.detach() for x in made(5, 7, 16, device=device))
    f = lambda q: flash_attention(q, k, v, window=3, impl=impl).sum()  # noqa: E731
    with pytest.raises(RuntimeError, match=f"impl='{impl}' of flash_attention .*{says}.*; use impl='auto'"):
        if asked == "jvp":
            torch.func.jvp(f, (q,), (q,))
        elif asked == "vmap":
            torch.func.vmap(lambda q: flash_attention(q[None], k, v, impl=impl, window=3))(q)
        elif asked == "grad":
            torch.func.grad(f)(q)
        else:
            with torch.autograd.forward_ad.dual_level():
                f(torch.autograd.forward_ad.make_dual(q, q))


def test_the_algorithm_itself_refuses_a_transform():
    q, k, v = (x.detach() for x in made(5, 7, 16))
    with pytest.raises(RuntimeError, match=r"reference.flash_attention has no forward-mode derivative .*attention"):
        torch.func.jvp(lambda q: reference.flash_attention(q, k, v)[0], (q,), (q,))
