"""The kernels of linear attention against float64: sums and the delta rule; in Triton's interpreter or on a GPU.

In the interpreter a chunk has 32 steps and a tile 16 channels: 37 steps are a whole chunk and a part of another. On a
GPU the same tests run compiled, with bfloat16.
"""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import (
    DRAWS,
    DTYPES,
    INTERPRETED,
    check,
    errors,
    everywhere,
    incoming,
    laid,
    needs_the_interpreter,
    with_signs,
)
from linear_cases import FORMS, exactly, made, resets

from nondual.ops.linear_attention import linear_attention
from nondual.ops.linear_attention import triton as kernels
from nondual.ops.linear_attention.triton import launch
from nondual.ops.ssd.triton import launch as launch_of_sum

pytestmark = pytest.mark.usefixtures("poisoned")

TAKEN = [form for form in FORMS if form != "each channel"]
DELTA = ["delta", "gated delta"]


def given_for(form, length, *, dtype=torch.float32, device="cpu", b=1, h=2, g=2, d=8, dv=8, **more):
    """Every tensor by name: q, k and v in this dtype, the others in float32; gates are mild without `strength`."""
    given, options = made(form, length, b=b, h=h, g=g, d=d, dv=dv, **{"strength": 0.3} | more)
    placed = {name: x.detach().to(dtype if name in "qkv" else torch.float32) for name, x in given.items()}
    return {name: x.to(device).requires_grad_() for name, x in placed.items()}, options


# --- plain PyTorch ---------------------------------------------------------------------------------------------------


def textbook(q, k, v, log_decay=None, beta=None, state=None, *, normalise=False, scale=1.0, reset=None):
    """Plain PyTorch: the matrix of the parallel form times v, with the products in whatever dtype q has."""
    dtype, n, share = q.dtype, q.shape[2], q.shape[1] // k.shape[1]
    wide = torch.promote_types(dtype, torch.float32)
    k, v = (x.repeat_interleave(share, 1) for x in (k, v))
    if normalise:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    lower = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    log = q.new_zeros(q.shape[:3], dtype=wide)
    if log_decay is not None:
        log = log + (log_decay[:, None] if log_decay.ndim == 1 else log_decay)
    between = log[..., None].expand(*log.shape, n).masked_fill(~lower.tril(-1), 0).cumsum(-2)
    sequence = (torch.zeros_like(lower[:1]) if reset is None else reset).cumsum(1)
    visible = (lower & (sequence[:, :, None] == sequence[:, None]))[:, None]
    decay = between.masked_fill(~visible, -torch.inf).exp()
    passed = log.cumsum(-1).masked_fill((sequence > 0)[:, None], -torch.inf).exp()[..., None]
    state = q.new_zeros(*q.shape[:2], k.shape[3], v.shape[3], dtype=wide) if state is None else state
    if beta is not None:
        v = beta[..., None].to(dtype) * (v - passed.to(dtype) * (k @ state.to(dtype)))
        a = ((k @ k.mT) * decay.to(dtype) * beta[..., None].to(dtype)).tril(-1)
        v = torch.linalg.solve_triangular(a.to(wide), v.to(wide), upper=False, unitriangular=True).to(dtype)
    out = ((q @ k.mT * decay.to(dtype)) @ v + passed.to(dtype) * (q @ state.to(dtype))) * scale
    last = ((decay[:, :, -1, :, None].to(dtype) * k).mT @ v).to(wide) + passed[:, :, -1:] * state
    if normalise:
        out = (out[..., :-1] / out[..., -1:]).to(dtype)
    return out, last


def both_ways(run, given, received):
    """The output, the last state and every gradient of a run, by name."""
    out, state = run(**given)
    d_out, d_state = received
    grads = torch.autograd.grad((out, state), list(given.values()), (d_out.to(out.dtype), d_state.to(state.dtype)))
    found = {"out": out, "last state": state} | {f"d{name}": x for name, x in zip(given, grads)}
    return {name: x.detach() for name, x in found.items()}


def judge(given, *, chunk=None, received=None, **options):
    """Assert that an output is off by at most twice plain PyTorch's error, and a gradient by three times."""
    ours = partial(linear_attention, impl="triton", chunk=chunk, **options)
    plain, exact = partial(textbook, **options), partial(linear_attention, impl="reference", **options)
    out, state = ours(**given)
    assert out.dtype == given["q"].dtype and state.dtype == torch.float32
    received = received or (incoming(out), incoming(state, 3))

    def again():
        for seed in range(1, DRAWS):
            drawn = given | {"v": with_signs(given["v"], seed)}
            more = with_signs(received[0], -seed).detach(), received[1]
            yield both_ways(plain, drawn, more), both_ways(exact, exactly(drawn), more)

    found = errors(
        both_ways(ours, given, received),
        both_ways(plain, given, received),
        both_ways(exact, exactly(given), received),
        draws=again(),
    )
    check(found, outputs={"out", "last state"})


# --- right in every form and size ------------------------------------------------------------------------------------


def test_the_kernels_can_run_here():
    assert kernels.INTERPRETED or torch.cuda.is_available(), "unset TRITON_INTERPRET=0: there is no GPU to compile for"


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form, g, reset", [*((form, 2, True) for form in TAKEN), ("gated delta", 1, False)])
def test_error_is_that_of_plain_pytorch(device, dtype, form, g, reset):
    given, options = given_for(form, 37, g=g, dtype=dtype, device=device)
    judge(given, **options, scale=0.3, reset=resets(37, 1).to(device) if reset else None)


@everywhere
@pytest.mark.parametrize(
    "form, d, dv", [("delta", 1, 1), ("gated delta", 33, 19), ("delta", 17, 130), ("gated", 24, 19)]
)
def test_any_width(device, form, d, dv):
    given, options = given_for(form, 19, h=1, g=1, d=d, dv=dv, device=device)
    judge(given, **options)


@everywhere
@pytest.mark.parametrize("length", [1, 2, 16, 17, 33])
def test_short_sequences(device, length):
    given, options = given_for("gated delta", length, h=1, g=1, device=device)
    judge(given, **options)


@everywhere
@pytest.mark.parametrize("form, chunk", [("gated delta", 16), ("gated delta", 64), ("gated", 256)])
def test_any_chunk_gives_the_same(device, form, chunk):
    given, options = given_for(form, 70, h=1, g=1, device=device)
    judge(given, **options, chunk=chunk, reset=resets(70, 1).to(device))


def test_chunks_of_the_delta_rule_have_64_steps_at_most():
    half, full = torch.bfloat16, torch.float32
    assert [kernels.chunk_of(half, True, chunk) for chunk in (16, 64, 128, 256)] == [16, 64, 64, 64]
    assert [kernels.chunk_of(full, False, chunk) for chunk in (16, 64, 128, 256)] == [16, 64, 128, 256]
    assert set(kernels.CHUNK.values()) <= set(kernels.CHUNKS)


@everywhere
def test_batches_of_packed_sequences(device):
    given, options = given_for("gated delta", 21, b=3, h=4, device=device)
    judge(given, **options, reset=resets(21, 3).to(device), chunk=16)


@everywhere
@pytest.mark.parametrize("form", ["normalised", "gated delta"])
def test_split_is_whole(device, form):
    given, options = given_for(form, 41, h=1, g=1, device=device)
    given = {name: x.detach() for name, x in given.items()}
    run = partial(linear_attention, impl="triton", **options)
    whole, last = run(**given)
    state, parts = given["state"], []
    for part in (slice(0, 5), slice(5, 41)):
        piece = {name: x[:, :, part] for name, x in given.items() if name != "state"}
        out, state = run(**piece, state=state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(state, last, atol=2e-5, rtol=2e-5)


@everywhere
@pytest.mark.parametrize("form", ["normalised", "gated delta"])
def test_without_a_state(device, form):
    given, options = given_for(form, 19, h=1, g=1, device=device, state=False)
    judge(given, **options)


@everywhere
def test_runs_are_equal_to_the_bit(device):
    given, _ = given_for("gated delta", 37, device=device)
    run = partial(linear_attention, impl="triton")
    first = both_ways(run, given, received := (incoming(given["q"]), incoming(given["state"])))
    for _ in range(2 if device == "cpu" else 50):
        again = both_ways(run, given, received)
        assert all(torch.equal(first[name], again[name]) for name in first)


# --- decays, write strengths and ranges ------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("form", ["gated", "gated delta"])
@pytest.mark.parametrize("strength", [1e-6, 30.0, 1e4])
def test_decays_near_1_and_near_0(device, form, strength):
    given, options = given_for(form, 19, h=1, g=1, device=device, strength=strength)
    judge(given, **options)


@everywhere
@pytest.mark.parametrize("form", ["gated", "gated delta"])
def test_a_decay_that_forgets_all_beside_decays_that_forget_nothing(device, form):
    """-inf at every seventh step, and in the sum of the others one that a large one would hide."""
    given, options = given_for(form, 37, h=1, g=1, device=device)
    with torch.no_grad():
        given["log_decay"].mul_(1e-5)
        given["log_decay"][..., ::7] = -torch.inf
        given["log_decay"][..., 3::7] = -400
    ours, exact = (
        both_ways(partial(linear_attention, impl=impl, **options), x, (incoming(given["q"]), incoming(given["state"])))
        for impl, x in (("triton", given), ("reference", exactly(given)))
    )
    for name in exact:
        where = exact[name].isfinite()  # the gradient by a decay of -inf is not asked for
        torch.testing.assert_close(ours[name].double()[where], exact[name][where], atol=2e-5, rtol=2e-5)


@everywhere
@pytest.mark.parametrize("strength", [0.0, 1.0, 1.9])
def test_one_key_written_again_and_again(device, strength):
    """The worst case for the inverse: every number below the diagonal of its matrix is β. By a series of powers, terms
    of 10¹⁷ would have to cancel."""
    given, _ = given_for("delta", 70, h=1, g=1, device=device)
    with torch.no_grad():
        given["k"][:] = given["k"][:, :, :1].clone()
        given["beta"][:] = strength
    received = incoming(given["q"]), incoming(given["state"])
    ours = both_ways(partial(linear_attention, chunk=64, impl="triton"), given, received)
    exact = both_ways(partial(linear_attention, impl="reference"), exactly(given), received)
    for name in exact:
        assert (ours[name] - exact[name]).abs().max() <= 1e-4 * exact[name].abs().max(), name


@everywhere
def test_a_key_reads_what_was_written_last(device):
    """Eight keys at right angles, written twice in other orders: the delta rule reads the second value of each."""
    k = torch.eye(8, device=device)[torch.cat([torch.arange(8), torch.arange(8).flip(0)])][None, None]
    v = torch.randn(1, 1, 16, 5, device=device)
    _, state = linear_attention(k, k, v, beta=torch.ones(1, 1, 16, device=device), impl="triton")
    torch.testing.assert_close(state[0, 0], v[0, 0, 8:].flip(0))


@everywhere
def test_sums_that_float16_does_not_hold_are_normalised(device):
    """The weights of a row sum to 2⁶ · 2¹⁰ and more, and the mean of the values is what float16 holds."""
    q = torch.full((1, 1, 70, 16), 8.0, dtype=torch.float16, device=device)
    v = torch.randn(1, 1, 70, 4, device=device).half()
    out, state = linear_attention(q, q, v, normalise=True, impl="triton")
    assert state[..., -1].min() * 8 * 16 > torch.finfo(torch.float16).max
    mean = v.double().cumsum(2) / torch.arange(1, 71, device=device)[:, None]
    torch.testing.assert_close(out.double(), mean, atol=2e-3, rtol=2e-3)


@everywhere
def test_weights_of_0_give_0_and_no_gradient(device):
    q, k = (torch.zeros(1, 1, 5, 4, device=device).requires_grad_() for _ in range(2))
    v = torch.ones(1, 1, 5, 4, device=device).requires_grad_()
    out, _ = linear_attention(q, k, v, normalise=True, impl="triton")
    assert not out.any()
    assert not any(x.any() for x in torch.autograd.grad(out.sum(), (q, k, v)))


@everywhere
@pytest.mark.parametrize("form", ["gated", "gated delta"])
def test_a_scale_of_0(device, form):
    given, _ = given_for(form, 7, h=1, g=1, device=device)
    run = partial(linear_attention, scale=0.0)
    received = incoming(given["q"]), incoming(given["state"])
    ours, exact = (both_ways(partial(run, impl=impl), given, received) for impl in ("triton", "reference"))
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], atol=1e-5, rtol=1e-5)


@everywhere
@pytest.mark.parametrize("form", ["gated", "gated delta"])
@pytest.mark.parametrize("name", ["k", "v", "log_decay", "state"])
def test_nan_before_a_resets_chunk_is_forgotten(device, form, name):
    """The reset is at the start of a chunk: within its own chunk a NaN may reach any step."""
    given = {key: x.detach() for key, x in given_for(form, 40, h=1, g=1, device=device)[0].items()}
    reset = torch.arange(40, device=device).eq(16)[None]
    run = partial(linear_attention, reset=reset, chunk=16, impl="triton")
    out, state = run(**given)
    bad = given | {name: given[name].clone()}
    bad[name][:, :, *(() if name == "state" else (slice(9, 11),))] = torch.nan
    spoilt, last = run(**bad)
    assert spoilt[:, :, 10].isnan().any()
    assert torch.equal(spoilt[:, :, 16:], out[:, :, 16:]) and torch.equal(last, state)


@everywhere
@pytest.mark.parametrize("form", ["gated", "gated delta"])
@pytest.mark.parametrize("name", ["q", "k", "v", "log_decay"])
def test_nan_is_not_hidden(device, form, name):
    given = {key: x.detach() for key, x in given_for(form, 20, h=1, g=1, device=device)[0].items()}
    given[name][:, :, 9] = torch.nan
    out, state = linear_attention(**given, impl="triton")
    assert out[:, :, 9].isnan().all() and (name == "q" or state.isnan().all())


# --- judged by others ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fla():
    """fla-core's functions in plain torch, which want (B, N, H, ·)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fla.ops.delta_rule.naive import delta_rule_recurrence
        from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
        from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    return {
        "delta": lambda q, k, v, beta, state: delta_rule_recurrence(q, k, v, beta, state),
        "gated delta": lambda q, k, v, log_decay, beta, state: naive_recurrent_gated_delta_rule(
            *(x.transpose(1, 2) for x in (q, k, v, beta, log_decay)), initial_state=state, output_final_state=True
        ),
        "gated": lambda q, k, v, log_decay, state: naive_recurrent_simple_gla(
            *(x.transpose(1, 2) for x in (q, k, v, log_decay)), initial_state=state, output_final_state=True
        ),
    }


@pytest.mark.parametrize("form", ["gated", *DELTA])
@pytest.mark.skipif(not INTERPRETED, reason="fla-core's functions are asked on a CPU")
def test_fla_says_the_same(form, fla):
    given, _ = given_for(form, 21, dv=7)
    theirs = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    out, state = fla[form](**{name: x.clone() for name, x in theirs.items()})  # some change their inputs in place
    out = out if form == "delta" else out.transpose(1, 2)
    grads = torch.autograd.grad((out.sin().sum(), state.sin().sum()), list(theirs.values()))
    ours = linear_attention(**given, scale=8**-0.5, impl="triton")
    torch.testing.assert_close(ours, (out, state), atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad((ours[0].sin().sum(), ours[1].sin().sum()), list(given.values()))
    for name, a, b in zip(given, found, grads):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5, msg=lambda text, name=name: f"d{name}: {text}")


# --- any layout ------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("layout", ["heads inside", "sliced", "one number"])
@pytest.mark.parametrize("form", ["gated", "gated delta"])
def test_any_layout_of_inputs_and_of_the_incoming_gradients(device, form, layout):
    given, options = given_for(form, 17, b=2, h=2, device=device)
    lie = lambda x: laid(x, layout if x.ndim == 4 or layout != "heads inside" else "plain")  # noqa: E731
    given = {name: lie(x.detach()).requires_grad_() for name, x in given.items()}
    received = lie(incoming(given["q"])), lie(incoming(given["state"], 3))
    if layout == "one number" and form == "gated delta":
        with torch.no_grad():  # all keys are one then, and of length 1
            given["k"] = torch.full_like(given["k"][..., :1], 8**-0.5).expand(given["k"].shape).requires_grad_()
    judge(given, **options, received=received)


@everywhere
@pytest.mark.parametrize("form", ["gated", "gated delta"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_offsets_beyond_two_to_the_31(device, form, name, monkeypatch):
    """Steps so far apart that the last offset passes 2³¹; the memory between is never touched."""
    given, _ = given_for(form, 17, h=1, g=1, d=4, dv=4, dtype=torch.float16, device=device)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    room = torch.empty(2**31 + 4096, dtype=torch.float16, device=device)
    x = given[name].detach()
    far = torch.as_strided(room, x.shape, [*x.stride()[:2], -(-(2**31 + 5) // 16), 1]).copy_(x)
    received = incoming(given["q"]), incoming(given["state"])
    one, other = (
        both_ways(partial(linear_attention, impl="triton"), each, received)
        for each in (given, given | {name: far.requires_grad_()})
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


# --- memory ----------------------------------------------------------------------------------------------------------


@needs_the_interpreter
@pytest.mark.parametrize("form", ["sum", "gated delta"])
def test_no_kernel_leaves_its_tensors_or_writes_twice(form, monkeypatch, watch):
    """The tensors lie inside larger ones, whose other elements count as outside."""
    table = launch.KERNELS if form in DELTA else launch_of_sum.KERNELS
    watched = {name: watch(kernel) for name, kernel in table.items()}
    for name, kernel in watched.items():
        monkeypatch.setitem(table, name, kernel)
    given, _ = given_for(form, 35, d=19, dv=5)
    given = {name: laid(x.detach(), "sliced").requires_grad_() for name, x in given.items()}
    received = laid(incoming(given["v"]), "sliced"), laid(incoming(given["state"]), "sliced")
    both_ways(partial(linear_attention, reset=resets(35, 1), impl="triton"), given, received)
    launches = {name: kernel.launches for name, kernel in watched.items()}
    if form in DELTA:  # the backward computes the first three anew
        assert launches == dict.fromkeys(table, 1) | {"steps": 2, "solve": 2, "carry": 2}
    else:  # without decays nothing is summed and none has a gradient
        assert launches == dict.fromkeys(table, 1) | {"steps": 0, "steps_back": 0, "states": 3, "pass": 2}


# --- as operators of torch -------------------------------------------------------------------------------------------


@everywhere
def test_opcheck(device):
    given, _ = given_for("gated delta", 5, h=1, g=1, dtype=torch.float16, device=device)
    q, k, v = (given[name].detach().transpose(1, 2).requires_grad_() for name in "qkv")
    log, beta, state = (given[name] for name in ("log_decay", "beta", "state"))
    reset = resets(5, 1).to(device)
    log = log.detach().mT.requires_grad_()
    sum_, delta = torch.ops.nondual.linear_attention, torch.ops.nondual.delta_rule
    torch.library.opcheck(sum_.default, (q, k, v, log, state, reset, 0.5, 16, True))
    torch.library.opcheck(sum_.default, (q, k, v, None, None, None, 0.5, 16, False))
    torch.library.opcheck(delta.default, (q, k, v, log, beta, state, reset, 0.5, 16))
    torch.library.opcheck(delta.default, (q, k, v, None, beta, None, None, 0.5, 16))
    q, k, v, log, beta, state = (x.detach() for x in (q, k, v, log, beta, state))
    received = torch.randn_like(v), torch.randn_like(state)
    backward = torch.ops.nondual.linear_attention_backward, torch.ops.nondual.delta_rule_backward
    torch.library.opcheck(backward[0].default, (*received, q, k, v, log, state, reset, 0.5, 16, False))
    torch.library.opcheck(backward[1].default, (*received, q, k, v, log, beta, state, reset, 0.5, 16))


@everywhere
@pytest.mark.parametrize("form", ["normalised", "gated delta"])
def test_compiles_whole_forward_and_backward(device, form):
    options = {"normalise": form == "normalised"}

    def run(**given):
        out, state = linear_attention(**given | {"v": given["v"] * 1.5}, **options, impl="triton")
        return out * 2, state

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager" if device == "cpu" else "inductor")
    for length in (9, 17):
        given, _ = given_for(form, length, h=1, g=1, device=device)
        received = incoming(given["v"]), incoming(given["state"])
        ours, plain = both_ways(compiled, given, received), both_ways(run, given, received)
        for name in plain:
            torch.testing.assert_close(ours[name], plain[name])


@everywhere
@pytest.mark.parametrize("form", ["gated", "gated delta"])
def test_no_second_derivative_and_it_says_so(device, form):
    given, _ = given_for(form, 5, h=1, g=1, device=device)
    out, _ = linear_attention(**given, impl="triton")
    (grad,) = torch.autograd.grad(out.sin().sum(), given["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; impl='chunked' has one"):
        torch.autograd.grad(grad.sum(), given["k"])


# --- larger, on a GPU ------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["normalised", "gated", *DELTA])
@pytest.mark.parametrize("d, dv", [(64, 64), (128, 128), (256, 256), (59, 111)])
def test_at_full_width_on_a_gpu(form, d, dv, dtype):
    given, options = given_for(form, 1025, b=2, h=2, d=d, dv=dv, dtype=dtype, device="cuda", strength=0.05)
    judge(given, **options, scale=d**-0.5, reset=resets(1025, 2).cuda())


def test_keys_of_length_1_are_what_the_cases_draw():
    given, _ = given_for("delta", 9)
    torch.testing.assert_close(F.normalize(given["k"], dim=-1), given["k"])
