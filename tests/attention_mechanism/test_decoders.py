"""Bahdanau's and Luong's decoders against their equations, one number at a time; steps, padding and errors."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nondual.attention_mechanism import (
    AdditiveAttention,
    BahdanauDecoder,
    CoverageAttention,
    DotAttention,
    GeneralAttention,
    LastState,
    LocationAttention,
    LuongDecoder,
    UniformAttention,
)

B, N, M, S, H, A, Y, L = 3, 4, 7, 5, 6, 11, 13, 2
ATTENTIONS = {
    "additive": lambda: AdditiveAttention(S, H, A),
    "general": lambda: GeneralAttention(S, H),
    "location": lambda: LocationAttention(S, H, A, 2, 3),
    "coverage": lambda: CoverageAttention(S, H, A),
    "uniform": lambda: UniformAttention(S, H),
    "last state": lambda: LastState(S, H),
}
DECODERS = {"Bahdanau": BahdanauDecoder, "Luong": LuongDecoder}


def make(decoder, attention="additive"):
    torch.manual_seed(0)
    return DECODERS[decoder](Y, ATTENTIONS[attention](), L).double()


def given(seed=1):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=draw, dtype=torch.float64) for size in ((B, N, Y), (B, M, H)))


def padded(lengths=(7, 4, 1)):
    return (torch.arange(M) < torch.tensor(lengths)[:, None])[:, None]


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def test_bahdanau_decoder_equals_appendix_a_2_2():
    """Every gate, the deep output and its maxout, for one sentence at a time, with the paper's letters."""
    decoder = make("Bahdanau")
    y, h = given()
    t, weights = decoder(y, h)
    W_z, W_r, W = decoder.w.weight.chunk(3)
    b_z, b_r, b = decoder.w.bias.chunk(3)
    U_z, U_r = decoder.u_gates.weight.chunk(2)
    C_z, C_r, C = decoder.c.weight.chunk(3)
    attention = decoder.attention
    for row in range(B):
        s = torch.tanh(decoder.w_0.weight @ h[row, 0, H // 2 :] + decoder.w_0.bias)
        for i in range(N):
            e = [
                attention.v @ torch.tanh(attention.w_s.weight @ s + attention.w_h.weight @ h[row, j]) for j in range(M)
            ]
            alpha = torch.stack(e).softmax(0)
            torch.testing.assert_close(weights[row, i], alpha)
            c = sum(alpha[j] * h[row, j] for j in range(M))
            u = decoder.u_o.weight @ s + decoder.v_o.weight @ y[row, i] + decoder.v_o.bias + decoder.c_o.weight @ c
            for j in range(L):
                assert t[row, i, j].item() == pytest.approx(max(u[2 * j].item(), u[2 * j + 1].item()))
            z = sigmoid(W_z @ y[row, i] + b_z + U_z @ s + C_z @ c)
            r = sigmoid(W_r @ y[row, i] + b_r + U_r @ s + C_r @ c)
            new = torch.tanh(W @ y[row, i] + b + decoder.u.weight @ (r * s) + C @ c)
            s = (1 - z) * s + z * new


def test_luong_decoder_equals_equation_5_with_input_feeding():
    decoder = make("Luong", "general")
    y, h = given()
    out, weights = decoder(y, h)
    for row in range(B):
        s = torch.tanh(decoder.w_0.weight @ h[row, 0, H // 2 :] + decoder.w_0.bias)
        fed = torch.zeros(L, dtype=torch.float64)
        for i in range(N):
            s = decoder.cell(torch.cat([y[row, i], fed])[None], s[None])[0]
            alpha = torch.stack([s @ decoder.attention.w.weight @ h[row, j] for j in range(M)]).softmax(0)
            torch.testing.assert_close(weights[row, i], alpha)
            fed = torch.tanh(decoder.w_c.weight @ torch.cat([alpha @ h[row], s]))
            torch.testing.assert_close(out[row, i], fed)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_steps_equal_the_whole_and_a_padded_batch_each_row_alone(decoder, attention):
    made = make(decoder, attention)
    y, h = given()
    mask = padded()
    out, weights = made(y, h, mask)
    memory = made.memory(h, mask)
    state = made.start(memory)
    for i in range(N):
        one, state, row = made.step(y[:, i], state, memory)
        torch.testing.assert_close((out[:, i], weights[:, i]), (one, row))
    for b, n in enumerate((7, 4, 1)):
        alone = made(y[b : b + 1], h[b : b + 1, :n])
        torch.testing.assert_close((out[b : b + 1], weights[b : b + 1, :, :n]), alone)
    out.square().sum().backward()
    unused = {"uniform", "last state"} & {attention}
    for name, p in made.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and (unused or p.grad.abs().sum() > 0), name


@pytest.mark.parametrize("decoder", DECODERS)
def test_gradients(decoder):
    made = make(decoder, "location")
    y, h = (x[:, :3].clone().requires_grad_() for x in given())
    assert torch.autograd.gradcheck(lambda y, h: made(y, h), (y, h))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_source_all_masked_gives_no_context_and_no_nan(decoder):
    """It is then a decoder without a source, as with h = 0 and no mask."""
    made = make(decoder, "general")
    y, h = given()
    h[1, 0, H // 2 :] = 0  # what s_0 is made from
    mask = padded((7, 0, 1))
    out, weights = made(y, h, mask)
    assert (weights[1] == 0).all() and out.isfinite().all()
    torch.testing.assert_close(out[1:2], made(y[1:2], torch.zeros(1, M, H, dtype=torch.float64))[0])


def products(run):
    """Multiply-adds of the matrix products, as torch counts them."""
    with FlopCounterMode(display=False) as count:
        run()
    return count.get_total_flops() // 2


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_encoders_states_are_projected_once_a_sentence(decoder):
    made, projections = make(decoder), []
    made.attention.w_h.register_forward_hook(lambda *_: projections.append(1))
    y, h = given()
    made(y, h)
    assert projections == [1]
    cost = [products(lambda n=n: made(y[:, :n], h)) for n in (1, 2, 3)]
    once = products(lambda: made.attention.project(h))
    assert once == B * M * A * H
    memory = made.memory(h)
    state = made.start(memory)
    step = products(lambda: made.step(y[:, 0], state, memory))
    assert cost[2] - cost[1] == cost[1] - cost[0] == step


def test_a_decoder_sees_no_later_output():
    """Output i depends on y_0 .. y_{i-1} as they stand at its place and before, and on nothing after."""
    for decoder in DECODERS:
        made = make(decoder)
        y, h = given()
        jacobian = (
            torch.autograd.functional.jacobian(lambda y, made=made, h=h: made(y, h)[0], y).abs().sum((0, 2, 3, 5))
        )
        assert torch.equal(jacobian > 0, torch.ones(N, N).tril().bool())


@pytest.mark.parametrize("decoder", DECODERS)
def test_compiled_for_two_lengths(decoder):
    made = make(decoder, "coverage")
    compiled = torch.compile(copy.deepcopy(made), fullgraph=True, backend="eager")
    y, h = given()
    for n, m in ((4, 7), (2, 3)):
        torch.testing.assert_close(compiled(y[:, :n], h[:, :m]), made(y[:, :n], h[:, :m]))


@pytest.mark.parametrize("decoder", DECODERS)
def test_autocast(decoder):
    made = make(decoder).float()
    y, h = (x.float() for x in given())
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = made(y, h, padded())
    expected, rows = made(y, h, padded())
    torch.testing.assert_close(out.float(), expected, atol=5e-2, rtol=5e-2)
    torch.testing.assert_close(weights.float(), rows, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize(
    "call, says",
    [
        (
            lambda: make("Bahdanau")(torch.zeros(B, N, 3), torch.zeros(B, M, H)),
            r"y must be \(B, N, 13\), got \(3, 4, 3\)",
        ),
        (lambda: make("Luong")(torch.zeros(B, 0, Y), torch.zeros(B, M, H)), "y must hold one step or more"),
        (lambda: make("Luong")(torch.zeros(B, N, Y), torch.zeros(B, 0, H)), "h must hold one position or more"),
        (lambda: make("Bahdanau")(torch.zeros(B, N, Y), torch.zeros(B, M, 4)), r"h must be \(B, length, 6\)"),
        (lambda: make("Bahdanau").step(torch.zeros(B, 3), (), None), r"y must be \(B, 13\), got \(3, 3\)"),
        (lambda: BahdanauDecoder(0, AdditiveAttention(S, H, A), L), "d_input must be 1 or more, got 0"),
        (lambda: LuongDecoder(Y, AdditiveAttention(S, H, A), 0), "d_output must be 1 or more, got 0"),
        (lambda: BahdanauDecoder(Y, DotAttention(7, 7), L), "d_memory must be even"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
