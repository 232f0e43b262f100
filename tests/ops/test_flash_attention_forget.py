"""Forget gates in flash attention: every engine against the decay written out, and its edges.

The judge is `decay_between`, which sums each stretch by itself, with a masked softmax in float64. Kernels run in
Triton's interpreter where there is no GPU. On a GPU the same tests run compiled, and larger ones besides.
"""

import math

import pytest
import torch
from flash_cases import allowed, made
from harness import DTYPES, check, errors, everywhere, incoming, needs_the_interpreter

from nondual.extensions.self_liberating import decay_between
from nondual.ops.attention import masked_softmax
from nondual.ops.flash_attention import flash_attention, reference
from nondual.ops.flash_attention import triton as kernels
from nondual.ops.flash_attention.forget import sums_of
from nondual.ops.flash_attention.triton import launch

pytestmark = pytest.mark.usefixtures("poisoned")
NAMES = ("dq", "dk", "dv", "d_log_forget")


def textbook(q, k, v, log_forget, window=None, scale=None):
    """out and lse in plain PyTorch, in the dtype of q; the queries stand last among the keys."""
    n, m = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    decay = decay_between(log_forget)[..., max(0, m - n) :, :]
    decay = torch.nn.functional.pad(decay, (0, 0, max(0, n - m), 0))
    scores = (q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))).to(decay.dtype) + decay
    scores = scores.masked_fill(~allowed(n, m, q.device, causal=True, window=window), -torch.inf)
    return masked_softmax(scores).to(v.dtype) @ v, scores.logsumexp(-1)


def gates(h, m, strength, closed=0.0, *, b=1, device="cpu", seed=5):
    """log f (B, H, M) between 0 and -strength; a share of them, `closed`, is -inf."""
    draw = torch.Generator().manual_seed(seed)
    size = -strength * torch.rand(b, h, m, generator=draw)
    shut = torch.rand(b, h, m, generator=draw) < closed
    return size.masked_fill(shut, -torch.inf).to(device).requires_grad_()


def compared(inputs, impl, window=None, scale=None):
    """The errors of out, lse and each gradient beside plain PyTorch's in the same dtype, against float64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    plain = [x.detach().requires_grad_() for x in inputs]
    ours = flash_attention(
        *inputs[:3], log_forget=inputs[3], causal=True, window=window, scale=scale, return_lse=True, impl=impl
    )
    d_out = incoming(ours[0])
    d_lse = torch.randn(ours[1].shape, generator=torch.Generator().manual_seed(3)).to(d_out.device)

    def results(found, of):
        out, lse = found
        seen = lse > -torch.inf
        grads = torch.autograd.grad((out, lse[seen]), of, (d_out.to(out.dtype), d_lse[seen].to(lse.dtype)))
        return {"out": out, "lse": torch.where(seen, lse, 0), **dict(zip(NAMES, grads))}

    options = {"window": window, "scale": scale}
    return errors(
        results(ours, inputs), results(textbook(*plain, **options), plain), results(textbook(*exact, **options), exact)
    )


CASES = [  # n, m, h, g, dv, window, strength, closed
    (37, 37, 2, 1, 17, None, 0.3, 0.0),
    (19, 53, 2, 2, 16, 13, 3.0, 0.15),
    (41, 23, 1, 1, 16, None, 0.1, 0.1),
]


# --- right -----------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_as_exact_as_plain_pytorch(device, dtype, case):
    n, m, h, g, dv, window, strength, closed = case
    inputs = [*made(n, m, 16, dv, h=h, g=g, dtype=dtype, device=device), gates(h, m, strength, closed, device=device)]
    check(compared(inputs, "triton", window), outputs={"out", "lse"})


@pytest.mark.parametrize("case", [*CASES, (150, 290, 4, 2, 9, None, 0.05, 0.01), (1, 1, 1, 1, 3, None, 1.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_reference_is_as_exact_as_plain_pytorch(dtype, case):
    n, m, h, g, dv, window, strength, closed = case
    inputs = [*made(n, m, 8, dv, b=2, h=h, g=g, dtype=dtype), gates(h, m, strength, closed, b=2)]
    check(compared(inputs, "reference", window), outputs={"out", "lse"})


def test_by_hand():
    """Two positions, equal scores: a half-closed gate leaves the first key a third of the second query's weight."""
    q = torch.zeros(1, 1, 2, 1)
    v = torch.tensor([[[[1.0], [0.0]]]])
    log_forget = torch.tensor([[[-7.0, math.log(0.5)]]])  # the first stands before no key
    for impl in ("reference", "triton"):
        out = flash_attention(q, q, v, causal=True, log_forget=log_forget, impl=impl)
        torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 1 / 3]))


def test_it_is_forgetting_attention():
    """fla-core's naive function, with grouped heads and a window."""
    naive = pytest.importorskip("fla.ops.forgetting_attn.naive", reason="fla-core is one of the tests' requirements")
    inputs = [*made(29, 29, 12, b=2, h=6, g=3), gates(6, 29, 0.5, b=2)]
    for window in (None, 11):
        out = flash_attention(*inputs[:3], log_forget=inputs[3], causal=True, window=window)
        theirs = naive.naive_forgetting_attn(*(x.transpose(1, 2) for x in inputs), window_size=window).transpose(1, 2)
        torch.testing.assert_close(out, theirs, atol=1e-5, rtol=1e-5)
        for a, b in zip(*(torch.autograd.grad(x, inputs, incoming(out)) for x in (out, theirs))):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_gates_of_1_change_nothing(impl):
    q, k, v = (x.detach() for x in made(37, 37, 16, h=2, g=1))
    out = flash_attention(q, k, v, causal=True, log_forget=torch.zeros(1, 2, 37), impl=impl)
    torch.testing.assert_close(out, flash_attention(q, k, v, causal=True, impl=impl), atol=1e-6, rtol=1e-6)


# --- long sequences, and gates of 0 ----------------------------------------------------------------------------------


def strong_then_weak(m, device="cpu"):
    """log f (1, 1, M): c falls by 50 a step, so that float32 would know it to a hundredth, and at last by 0.001."""
    return torch.cat([torch.full((m - 60,), -50.0), torch.full((60,), -1e-3)])[None, None].to(device).requires_grad_()


def test_a_long_sequence_keeps_its_digits():
    m = 2100
    inputs = [*made(m, m, 8, h=1, g=1), strong_then_weak(m)]
    check(compared(inputs, "reference"), outputs={"out", "lse"})
    assert strong_then_weak(m).cumsum(-1).min() < -100_000


@everywhere
def test_kernels_keep_the_digits_of_a_long_sequence(device):
    """The last queries alone, for the interpreter's sake: by the plain kernel and by decoding."""
    n, m = 3, 777
    inputs = [*made(n, m, 16, h=1, g=1, device=device), strong_then_weak(m, device)]
    assert kernels.splits_of(*inputs[:2], 0) > 1
    check(compared(inputs, "triton"), outputs={"out", "lse"})
    q, k, v, log_forget = (x.detach() for x in inputs)
    forget = sums_of(log_forget)
    exact, _ = textbook(*(x.double() for x in (q, k, v, log_forget)))
    out, *lse = launch.launch_forward(q, k, v, True, 0, 0.25, forget)
    split, *split_lse = launch.launch_decode(q, k, v, True, 0, 0.25, 3, forget)
    torch.testing.assert_close(sum(lse), sum(split_lse))
    assert max((x.double() - exact).abs().max() for x in (out, split)) < 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n, m", [(2049, 2049), (4096, 4096), (200, 2049), (1, 8191), (7, 4099)])
@pytest.mark.parametrize("d, h, g, window", [(64, 4, 4, None), (128, 4, 1, None), (256, 2, 2, 257), (80, 4, 2, None)])
def test_large(dtype, n, m, d, h, g, window):
    for strength, closed in ((1e-3, 0.0), (0.3, 0.001), (30.0, 0.01)):
        inputs = [*made(n, m, d, h=h, g=g, dtype=dtype, device="cuda"), gates(h, m, strength, closed, device="cuda")]
        check(compared(inputs, "triton", window), outputs={"out", "lse"})


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("value", [-torch.inf, -1e30])
def test_a_gate_of_0_begins_anew(impl, value):
    """What comes after it is as if nothing had been before: the same numbers, no NaN, and no gradient."""
    n, at = 48, 32
    inputs = [*made(n, n, 16, h=1, g=1), gates(1, n, 0.2).detach()]
    inputs[3][..., at] = value
    inputs[3].requires_grad_()
    out = flash_attention(*inputs[:3], causal=True, log_forget=inputs[3], impl=impl)
    later = flash_attention(*(x[:, :, at:] for x in inputs[:3]), causal=True, log_forget=inputs[3][..., at:], impl=impl)
    torch.testing.assert_close(out[:, :, at:], later, atol=1e-6, rtol=1e-6)
    grads = torch.autograd.grad(out[:, :, at:].sum(), inputs)
    assert all(x.isfinite().all() for x in grads)
    assert all((x[:, :, :at] == 0).all() for x in grads) and grads[3][0, 0, at] == 0
    assert (grads[3][0, 0, at + 1 :].abs() > 0).all()


def test_the_running_sum_by_hand():
    inf = math.inf
    log_forget = torch.tensor([[[-1.0, -2.0, -inf, -4.0]]], requires_grad=True)
    sums, first = sums_of(log_forget)
    assert sums.tolist() == [[[0, -2, 0, -4]]] and first.tolist() == [[[0, 0, 2, 2]]] and sums.dtype == torch.float64
    (grad,) = torch.autograd.grad((sums * torch.tensor([1.0, 10, 100, 1000])).sum(), log_forget)
    assert grad.tolist() == [[[0, 10, 0, 1000]]]


def test_gradcheck():
    inputs = [*made(4, 5, 3, 2, h=2, g=1, dtype=torch.float64), gates(2, 5, 2.0).detach().double().requires_grad_()]

    def run(q, k, v, log_forget):
        return reference.flash_attention(q, k, v, causal=True, forget=sums_of(log_forget), tile=(2, 3))

    assert torch.autograd.gradcheck(run, inputs)


# --- memory ----------------------------------------------------------------------------------------------------------


@needs_the_interpreter
def test_no_kernel_leaves_its_tensors_or_writes_twice(monkeypatch, watch):
    watched = {name: watch(getattr(launch, f"{name}_kernel")) for name in ("forward", "decode", "dq", "dkdv")}
    for name, kernel in watched.items():
        monkeypatch.setattr(launch, f"{name}_kernel", kernel)
    inputs = [*made(19, 29, 16, h=2, g=1), gates(2, 29, 0.5, 0.1)]
    out = flash_attention(*inputs[:3], window=11, log_forget=inputs[3], impl="triton")
    torch.autograd.grad(out, inputs, incoming(out))
    q, k, v, log_forget = (x.detach() for x in inputs)
    launch.launch_decode(q[:, :, :3], k, v, True, 0, 0.25, 2, sums_of(log_forget))
    assert all(kernel.launches == 1 for kernel in watched.values())


# --- as operators of torch -------------------------------------------------------------------------------------------


@everywhere
def test_opcheck(device):
    """What the operators say of their results while compiling is true."""
    q, k, v = (x.detach() for x in made(3, 5, 16, h=2, g=1, device=device))
    forget = sums_of(gates(2, 5, 0.5, device=device).detach())
    ops, quick = torch.ops.nondual, ("test_schema", "test_faketensor", "test_autograd_registration")
    out, top, total = kernels.launch_forward(q, k, v, True, 0, 0.25, forget)
    torch.library.opcheck(ops.forgetting_attention.default, (q, k, v, *forget, 0, 0.25), test_utils=quick)
    given = (out, total, q, k, v, *forget, out, top, total, 0, 0.25)
    torch.library.opcheck(ops.forgetting_attention_backward.default, given, test_utils=quick)
    given = (q, k, v, *forget, 0, 0.25, 8, 8)
    torch.library.opcheck(ops.forgetting_attention_reference.default, given, test_utils=quick)
    given = (out, total, q, k, v, *forget, out, total, total, 0, 0.25, 8, 8)
    torch.library.opcheck(ops.forgetting_attention_reference_backward.default, given, test_utils=quick)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_one_program_for_two_lengths(impl):
    torch._dynamo.reset()

    def run(q, k, v, log_forget):
        return flash_attention(q, k, v, causal=True, log_forget=log_forget, impl=impl) * 2

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9):
        inputs = [*made(n, n, 16, h=2, g=1), gates(2, n, 0.5, 0.2)]
        ours, plain = compiled(*inputs), run(*inputs)
        torch.testing.assert_close(ours, plain)
        for a, b in zip(*(torch.autograd.grad(out, inputs, incoming(out)) for out in (ours, plain))):
            torch.testing.assert_close(a, b)


def test_one_exported_program_serves_two_lengths():
    class Forgetting(torch.nn.Module):
        def forward(self, q, k, v, log_forget):
            return flash_attention(q, k, v, causal=True, log_forget=log_forget)

    def given(n):
        return tuple(x.detach() for x in (*made(n, n, 8, h=2, g=1), gates(2, n, 0.5, 0.2)))

    length = torch.export.Dim("n", min=2, max=255)
    program = torch.export.export(Forgetting(), given(7), dynamic_shapes=[{2: length}] * 4).module()
    for n in (7, 150):
        torch.testing.assert_close(program(*given(n)), Forgetting()(*given(n)))


@pytest.mark.parametrize("n, m", [(5, 7), (7, 5)])
def test_every_transform_works_through_auto(n, m):
    """Forward mode, reverse mode and vmap, as through the written formula; a gate of 0 has no derivative, not NaN."""
    inputs = [x.detach() for x in (*made(n, m, 4, b=3, h=2, g=1, dtype=torch.float64), gates(2, m, 1.0, 0.2, b=3))]
    inputs[3] = inputs[3].double()

    def ours(*x):
        return flash_attention(*x[:3], causal=True, log_forget=x[3]).square().sum()

    by = (0, 1, 2, 3)
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(textbook(*leaves)[0].square().sum(), leaves)
    for found in (torch.func.grad(ours, by)(*inputs), torch.func.jacfwd(ours, by)(*inputs)):
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)
    each = torch.func.vmap(torch.func.grad(lambda *x: ours(*(one[None] for one in x)), by))(*inputs)
    for a, b in zip(each, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_second_derivative_and_a_transform_of_the_gates_are_refused(impl):
    q, k, v, log_forget = [*made(3, 3, 16), gates(2, 3, 1.0)]
    out = flash_attention(q, k, v, causal=True, log_forget=log_forget, impl=impl)
    (grad,) = torch.autograd.grad(out.sum(), log_forget, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(
            lambda gate: flash_attention(q, k, v, causal=True, log_forget=gate, impl=impl),
            (log_forget.detach(),),
            (log_forget.detach(),),
        )


def test_autocast_leaves_the_gates_in_float32():
    q, k, v = (x.detach() for x in made(9, 9, 8))
    log_forget = gates(2, 9, 1e-3).detach()
    half = [x.bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attention(q, k, v, causal=True, log_forget=log_forget)
    assert torch.equal(out, flash_attention(*half, causal=True, log_forget=log_forget))


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_forget, options, says", [
    (torch.zeros(1, 2, 5), {"causal": False}, "causal must be True, or a window given, with log_forget"),
    (torch.zeros(1, 2, 4), {}, r"log_forget must be \(B, H, M\).* = \(1, 2, 5\), got \(1, 2, 4\)"),
    (torch.zeros(1, 1, 5), {}, r"\(1, 2, 5\), got \(1, 1, 5\)"),
    (torch.zeros(1, 2, 5, dtype=torch.int64), {}, "log_forget must be floating point, got torch.int64"),
    (torch.zeros(1, 2, 5, device="meta"), {}, "log_forget must be on q's device cpu, got meta"),
    (torch.zeros(1, 2, 5), {"impl": "sdpa"}, "impl='sdpa' has no forget gates; with log_forget use 'reference'"),
])  # fmt: skip
def test_bad_gates_are_named(log_forget, options, says):
    q, k, v = (x.detach() for x in made(3, 5, 16, h=2, g=1))
    with pytest.raises(ValueError, match=says):
        flash_attention(q, k, v, **{"causal": True, **options}, log_forget=log_forget)


def test_gates_that_are_no_tensor_are_named():
    q, k, v = (x.detach() for x in made(1, 1, 16))
    with pytest.raises(TypeError, match="log_forget must be a Tensor, got list"):
        flash_attention(q, k, v, causal=True, log_forget=[0.0])
