"""Recurrent networks: torch's own to the last bit that float64 has, lengths, states handed on, and a mixer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from nondual.language_models.causal import CausalLM
from nondual.recurrent import GRU, LSTM, RNN, Recurrent, RecurrentCache, RecurrentNetwork, gru_step, lstm_step, rnn_step
from nondual.transformer import MixerBlock

KINDS = {"RNN": (RNN, nn.RNN), "LSTM": (LSTM, nn.LSTM), "GRU": (GRU, nn.GRU)}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
B, N, I, H = 3, 11, 5, 7
LENGTHS = torch.tensor([4, 11, 1])


def pair(kind, n_layers=2, *, bidirectional=True, bias=True, **more):
    """Ours and torch's, drawn from the same seed, in float64."""
    ours, theirs = KINDS[kind]
    torch.manual_seed(0)
    a = ours(I, H, n_layers, bidirectional=bidirectional, bias=bias, **more).double()
    torch.manual_seed(0)
    b = theirs(I, H, n_layers, bidirectional=bidirectional, bias=bias, batch_first=True, **more).double()
    return a, b


def initial(kind, network, batch=B):
    shape = (network.n_layers * network.directions, batch, H)
    states = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    return tuple(states) if kind == "LSTM" else states[0]


def flat(*things):
    """Every Tensor in them, in order."""
    for thing in things:
        if isinstance(thing, torch.Tensor) and not isinstance(thing, PackedSequence):
            yield thing
        elif thing is not None:
            yield from flat(thing.data) if isinstance(thing, PackedSequence) else flat(*thing)


def assert_same(network, theirs, x, y, z, state, inputs):
    """Outputs, states, and the gradient of a random sum of both by parameters, x and the initial state."""
    given = [(*network.parameters(), *flat(x, state)), (*theirs.parameters(), *flat(x, state))]
    outs = [list(flat(*y)), list(flat(*z))]
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)
    weights = [torch.randn_like(out) for out in outs[0]]
    grads = [
        torch.autograd.grad(sum((w * out).sum() for w, out in zip(weights, out_of)), by, retain_graph=True)
        for out_of, by in zip(outs, given)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# --- torch's own -----------------------------------------------------------------------------------------------------


@EVERY_KIND
@pytest.mark.parametrize("n_layers, bidirectional, bias", [(1, False, True), (3, False, False), (2, True, True)])
@pytest.mark.parametrize("with_state", [False, True])
def test_outputs_states_and_every_gradient_are_torch_s(kind, n_layers, bidirectional, bias, with_state):
    network, theirs = pair(kind, n_layers, bidirectional=bidirectional, bias=bias)
    x = torch.randn(B, N, I, dtype=torch.float64, requires_grad=True)
    state = initial(kind, network) if with_state else None
    assert_same(network, theirs, x, network(x, state), theirs(x, state), state, x)


@EVERY_KIND
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_a_packed_sequence_is_answered_as_torch_does(kind, enforce_sorted):
    network, theirs = pair(kind)
    x = torch.randn(B, N, I, dtype=torch.float64, requires_grad=True)
    lengths = LENGTHS.sort(descending=True).values if enforce_sorted else LENGTHS
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted)
    state = initial(kind, network)
    y, z = network(packed, state), theirs(packed, state)
    assert isinstance(y[0], PackedSequence) and torch.equal(y[0].batch_sizes, z[0].batch_sizes)
    for a, b in zip(y[0][2:], z[0][2:]):
        assert (a is None and b is None) or torch.equal(a, b)
    assert_same(network, theirs, x, y, z, state, x)


@EVERY_KIND
def test_lengths_give_what_packing_gives(kind):
    network, theirs = pair(kind)
    x = torch.randn(B, N, I, dtype=torch.float64, requires_grad=True)
    state = initial(kind, network)
    packed, last = theirs(pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False), state)
    padded, _ = pad_packed_sequence(packed, batch_first=True, total_length=N)
    assert_same(network, theirs, x, network(x, state, lengths=LENGTHS), (padded, last), state, x)


@EVERY_KIND
def test_a_row_gives_what_it_gives_alone(kind):
    network, _ = pair(kind)
    x = torch.randn(B, N, I, dtype=torch.float64)
    y, state = network(x, lengths=LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        alone, last = network(x[row : row + 1, :length])
        torch.testing.assert_close(y[row, :length], alone[0])
        assert not y[row, length:].any()
        for a, b in zip(flat(state), flat(last)):
            torch.testing.assert_close(a[:, row], b[:, 0])


@EVERY_KIND
def test_what_stands_in_the_padding_changes_nothing(kind):
    network, _ = pair(kind)
    x = torch.randn(B, N, I, dtype=torch.float64)
    y, _ = network(x, lengths=LENGTHS)
    beyond = torch.arange(N) >= LENGTHS[:, None]
    spoilt = x.masked_fill(beyond[..., None], torch.nan).requires_grad_()
    z, _ = network(spoilt, lengths=LENGTHS)
    assert torch.equal(y, z)
    grads = torch.autograd.grad(z.sum(), (spoilt, *network.parameters()))
    assert all(grad.isfinite().all() for grad in grads) and not grads[0][beyond].any()


@EVERY_KIND
def test_parameters_have_torch_s_names_and_first_values(kind):
    network, theirs = pair(kind)
    assert list(network.state_dict()) == list(theirs.state_dict())
    for a, b in zip(network.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(1)
    theirs.load_state_dict(KINDS[kind][0](I, H, 2, bidirectional=True).state_dict())
    network.load_state_dict(theirs.state_dict())
    x = torch.randn(B, N, I, dtype=torch.float64)
    torch.testing.assert_close(network(x), theirs(x))


def test_relu_as_torch_s():
    network, theirs = pair("RNN", nonlinearity="relu")
    x = torch.randn(B, N, I, dtype=torch.float64)
    torch.testing.assert_close(network(x), theirs(x))


@pytest.mark.parametrize("kind, cell", [("RNN", nn.RNNCell), ("LSTM", nn.LSTMCell), ("GRU", nn.GRUCell)])
def test_a_step_is_torch_s_cell(kind, cell):
    cell = cell(I, H).double()
    x, h, c = (torch.randn(B, width, dtype=torch.float64) for width in (I, H, H))
    step = {"RNN": rnn_step, "LSTM": lstm_step, "GRU": gru_step}[kind]
    given = x @ cell.weight_ih.T + cell.bias_ih
    state = (h, c) if kind == "LSTM" else (h,)
    torch.testing.assert_close(
        step(given, *state, cell.weight_hh, cell.bias_hh), cell(x, state if kind == "LSTM" else h)
    )


def test_the_paper_s_reset_gate_acts_before_the_product():
    """Written out number by number from 1406.1078, equations 5 to 8."""
    torch.manual_seed(0)
    network = GRU(I, H, bias=False, reset_after=False).double()
    x, h = torch.randn(1, 1, I).double(), torch.randn(1, 1, H).double()
    (w_r, w_z, w), (u_r, u_z, u) = network.weight_ih_l0.chunk(3), network.weight_hh_l0.chunk(3)
    was, expected = h[0, 0], []
    r = [torch.sigmoid(w_r[j] @ x[0, 0] + u_r[j] @ was) for j in range(H)]
    for j in range(H):
        z = torch.sigmoid(w_z[j] @ x[0, 0] + u_z[j] @ was)
        candidate = torch.tanh(w[j] @ x[0, 0] + sum(u[j, k] * r[k] * was[k] for k in range(H)))
        expected.append(z * was[j] + (1 - z) * candidate)
    torch.testing.assert_close(network(x, h)[0][0, 0], torch.stack(expected))
    with_bias = GRU(I, H, reset_after=False).double()
    torch.testing.assert_close(with_bias(x, 0 * h)[0].shape, (1, 1, H))
    after = GRU(I, H, bias=False).double()
    after.load_state_dict(network.state_dict())
    assert (after(x, h)[0] - network(x, h)[0]).abs().max() > 1e-3  # the two places are not the same model


def test_an_lstm_keeps_a_number_as_long_as_its_forget_gate_says():
    """By hand: gates held open or shut by their biases, one number in at the first step."""
    cell = LSTM(1, 1).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        cell.weight_ih_l0[2] = 1.0  # g = tanh(x)
        cell.bias_ih_l0[:] = torch.tensor([30.0, torch.log(torch.tensor(9.0)), 0.0, 30.0])  # i = 1, f = 0.9, o = 1
    x = torch.tensor([0.5, 0, 0, 0]).double()[None, :, None]
    y, (_, c) = cell(x)
    held = torch.tensor(0.5).double().tanh() * 0.9 ** torch.arange(4).double()
    torch.testing.assert_close(y[0, :, 0], held.tanh(), atol=1e-7, rtol=0)
    torch.testing.assert_close(c[0, 0, 0], held[3], atol=1e-7, rtol=0)


def test_a_forget_bias_is_what_the_gates_begin_with():
    cell = LSTM(I, H, 2, bidirectional=True, forget_bias=1.0)
    for end in ("l0", "l0_reverse", "l1", "l1_reverse"):
        gates = getattr(cell, f"bias_ih_{end}") + getattr(cell, f"bias_hh_{end}")
        assert (gates[H : 2 * H] == 1).all() and (gates[:H] != 1).all()
    with pytest.raises(ValueError, match=r"forget_bias must be left out where bias=False, got 1\.0"):
        LSTM(I, H, bias=False, forget_bias=1.0)


# --- the same in parts -----------------------------------------------------------------------------------------------


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_reading_in_parts_and_handing_on_the_state_is_reading_at_once(kind, dtype):
    network = pair(kind, bidirectional=False)[0].to(dtype)
    x = torch.randn(B, N, I, dtype=dtype)
    whole, last = network(x)
    state, parts = None, []
    for part in x.split([1, 4, 0, 6], dim=1):
        y, state = network(part, state)
        parts.append(y)
    near = {} if dtype == torch.float64 else {"atol": 0.01, "rtol": 0.0}  # W x_t is rounded to 8 bits
    torch.testing.assert_close(torch.cat(parts, 1), whole, **near)
    for a, b in zip(flat(state), flat(last)):
        torch.testing.assert_close(a, b, **near)
        assert a.dtype == torch.promote_types(dtype, torch.float32)


@EVERY_KIND
def test_a_reset_begins_anew(kind):
    network, _ = pair(kind, bidirectional=False)
    x, state = torch.randn(B, N, I, dtype=torch.float64), initial("LSTM" if kind == "LSTM" else kind, pair(kind)[0])
    state = tuple(s[:2] for s in state) if kind == "LSTM" else state[:2]
    reset = torch.zeros(B, N, dtype=torch.bool)
    reset[1, 4], reset[2, 0] = True, True
    y, _ = network(x, state, reset=reset)
    for a, b in ((y[1, 4:], network(x[1:2, 4:])[0][0]), (y[2], network(x[2:])[0][0]), (y[0], network(x, state)[0][0])):
        torch.testing.assert_close(a, b)


@EVERY_KIND
def test_dropout_acts_between_layers_in_training_alone(kind):
    network, theirs = pair(kind, dropout=1.0)
    x = torch.randn(B, N, I, dtype=torch.float64)
    torch.testing.assert_close(network.eval()(x), theirs.eval()(x))
    y, z = network.train()(x)[0], theirs.train()(x)[0]  # with dropout 1 the second layer hears nothing, and no chance
    torch.testing.assert_close(y, z)
    assert y.any()
    half = KINDS[kind][0](I, H, 2, dropout=0.5)
    assert not torch.equal(half(x.float())[0], half(x.float())[0])


@EVERY_KIND
def test_no_positions_and_no_rows_are_no_error(kind):
    network, _ = pair(kind)
    y, state = network(torch.randn(B, 0, I, dtype=torch.float64))
    assert y.shape == (B, 0, 2 * H) and all(not s.any() for s in flat(state))
    y, state = network(torch.randn(0, N, I, dtype=torch.float64))
    assert y.shape == (0, N, 2 * H) and next(flat(state)).shape == (4, 0, H)


# --- with the rest of torch ------------------------------------------------------------------------------------------


@EVERY_KIND
def test_compiled_it_serves_two_lengths(kind):
    network = KINDS[kind][0](I, H, 1)
    program = torch.compile(network, fullgraph=True, backend="aot_eager")
    for n in (3, 5):
        x, lengths = torch.randn(2, n, I), torch.tensor([n, 2])
        torch.testing.assert_close(program(x, lengths=lengths), network(x, lengths=lengths))


@EVERY_KIND
def test_under_autocast_products_are_narrow_and_states_wide(kind):
    network, x = KINDS[kind][0](I, H, 2), torch.randn(B, N, I)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = network(x)
        z, _ = network(x.bfloat16(), state)
    assert y.dtype == z.dtype == torch.bfloat16 and all(s.dtype == torch.float32 for s in flat(state))
    torch.testing.assert_close(y.float(), network(x)[0], atol=0.03, rtol=0)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())


@EVERY_KIND
def test_forward_derivatives_and_vmap(kind):
    network, x = pair(kind)[0], torch.randn(B, N, I, dtype=torch.float64)
    tangent = torch.randn_like(x)
    _, along = torch.func.jvp(lambda x: network(x, lengths=LENGTHS)[0], (x,), (tangent,))
    with torch.no_grad():
        ahead, behind = (network(x + step * tangent, lengths=LENGTHS)[0] for step in (1e-6, -1e-6))
    torch.testing.assert_close(along, (ahead - behind) / 2e-6, atol=1e-8, rtol=1e-6)
    each = torch.func.vmap(lambda row: network(row[None])[0][0])(x)
    torch.testing.assert_close(each, network(x)[0])
    small = x[:1, :3].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: network(x)[0], (small,))


def test_a_parametrized_weight_is_read_through_its_parametrization():
    network = torch.nn.utils.parametrizations.weight_norm(GRU(I, H), "weight_hh_l0")
    theirs = nn.GRU(I, H, batch_first=True)
    theirs.load_state_dict({k: getattr(network, k).detach() for k, _ in theirs.named_parameters()})
    x = torch.randn(B, N, I)
    torch.testing.assert_close(network(x), theirs(x))


# --- the mixer -------------------------------------------------------------------------------------------------------


@EVERY_KIND
def test_the_mixer_reads_in_parts_by_its_cache(kind):
    mixer = Recurrent(I, KINDS[kind][0](I, H, 2)).double()
    x = torch.randn(B, N, I, dtype=torch.float64)
    cache = mixer.new_cache(B)
    parts = torch.cat([mixer(part, cache=cache) for part in x.split([1, 3, 7], 1)], 1)
    torch.testing.assert_close(parts, mixer(x))
    kept = copy.copy(cache)
    again = cache.select(torch.tensor([2, 0, 2, 1]))
    y = mixer(x[[2, 0, 2, 1]], cache=again)
    torch.testing.assert_close(y[[1, 3, 0]], mixer(x, cache=cache))
    assert all(torch.equal(a, b) is False for a, b in zip(flat(kept.state), flat(cache.state)))
    cache.reset()
    torch.testing.assert_close(mixer(x, cache=cache), mixer(x))


@EVERY_KIND
def test_a_language_model_of_it_generates_alike_with_and_without_its_cache(kind):
    torch.manual_seed(0)
    model = CausalLM(17, 8, 2, layer=lambda _: MixerBlock(Recurrent(8, KINDS[kind][0](8, 12)), 8)).double()
    ids = torch.randint(17, (2, 5))
    assert torch.equal(model.generate(ids, 9), model.generate(ids, 9, cached=False))
    model.loss(ids).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_mixer_that_reads_both_ways_has_no_cache():
    mixer = Recurrent(I, GRU(I, H, bidirectional=True))
    assert mixer(torch.randn(B, N, I)).shape == (B, N, I)
    with pytest.raises(ValueError, match="a cache must be left out: the network also reads from the end"):
        mixer.new_cache(B)
    with pytest.raises(ValueError, match="cache must be left out"):
        mixer(torch.randn(B, N, I), cache=RecurrentCache(torch.zeros(2, B, H)))
    with pytest.raises(ValueError, match="reset must be left out where the sequence is also read from its end"):
        mixer(torch.randn(B, N, I), reset=torch.zeros(B, N, dtype=torch.bool))


# --- what is refused -------------------------------------------------------------------------------------------------

X = torch.randn(B, N, I)
ZEROS = torch.zeros(1, B, H)


@pytest.mark.parametrize(
    "call, kind, error",
    [
        (lambda: GRU(I, H)(X.numpy()), TypeError, "x must be a Tensor, got ndarray"),
        (lambda: GRU(I, H)(X[0]), ValueError, r"x must be \(B, N, 5\), got \(11, 5\)"),
        (lambda: GRU(I, H)(X.double()), ValueError, "dtype of the weights, torch.float32, got torch.float64"),
        (lambda: GRU(I, H)(X.long()), ValueError, "dtype of the weights, torch.float32, got torch.int64"),
        (lambda: GRU(I, H)(X, lengths=[1, 2, 3]), TypeError, "lengths must be a Tensor, got list"),
        (lambda: GRU(I, H)(X, lengths=torch.tensor([0, 2, 3])), ValueError, "between 1 and N = 11, got 0; leave empty"),
        (lambda: GRU(I, H)(X, lengths=torch.tensor([1, 12, 3])), ValueError, "between 1 and N = 11, got 12"),
        (lambda: GRU(I, H)(X, lengths=torch.ones(3)), ValueError, r"integers \(B,\) = \(3,\), got torch.float32"),
        (lambda: GRU(I, H)(X, lengths=torch.tensor([1, 2])), ValueError, r"= \(3,\), got torch.int64 \(2,\)"),
        (lambda: GRU(I, H)(X, ZEROS[:, :2]), ValueError, r"state must be .* = \(1, 3, 7\), got \(1, 2, 7\)"),
        (lambda: GRU(I, H)(X, ZEROS.long()), ValueError, "state must be floating point, got torch.int64"),
        (lambda: GRU(I, H)(X, (ZEROS, ZEROS)), TypeError, "state must be a Tensor, got tuple"),
        (lambda: LSTM(I, H)(X, ZEROS), TypeError, r"state must be a pair of Tensors \(h, c\), got Tensor"),
        (lambda: LSTM(I, H)(X, (ZEROS, ZEROS[0])), ValueError, r"c must be .* = \(1, 3, 7\), got \(3, 7\)"),
        (lambda: GRU(I, H)(X, reset=torch.zeros(B, N)), ValueError, r"reset must be boolean \(B, N\) = \(3, 11\)"),
        (lambda: GRU(I, H)(pack_sequence([X[0]]), lengths=LENGTHS), ValueError, "must be left out where x is a Packed"),
        (lambda: GRU(I + 1, H)(pack_sequence([X[0]])), ValueError, r"x must be \(B, N, 6\), got \(1, 11, 5\)"),
        (lambda: GRU(I, H)(pack_sequence([X[0]]), ZEROS), ValueError, r"state must be .* = \(1, 1, 7\), got"),
        (lambda: GRU(0, H), ValueError, "d_input must be 1 or more, got 0"),
        (lambda: GRU(I, H, 0), ValueError, "n_layers must be 1 or more, got 0"),
        (lambda: GRU(I, H, 2, dropout=1.5), ValueError, "dropout must be a probability between 0 and 1, got 1.5"),
        (lambda: GRU(I, H, dropout=0.5), ValueError, "dropout acts between layers: with one layer it must be 0"),
        (lambda: RNN(I, H, nonlinearity="sigmoid"), ValueError, "nonlinearity must be 'tanh' or 'relu', got 'sigmoid'"),
        (lambda: RecurrentNetwork(I, H)(X), NotImplementedError, "make one of those"),
        (lambda: Recurrent(I, nn.GRU(I, H)), TypeError, "network must be an RNN, LSTM or GRU of this module, got GRU"),
        (lambda: Recurrent(I, GRU(I + 1, H)), ValueError, "network must read x of width d_model = 5, got one of 6"),
        (lambda: Recurrent(I, GRU(I, H))(X, cache=ZEROS), TypeError, "cache must be a RecurrentCache, .* got Tensor"),
    ],
)
def test_what_does_not_fit_is_refused_once_and_by_name(call, kind, error):
    with pytest.raises(kind, match=error):
        call()


def test_what_it_says_of_itself():
    assert repr(GRU(5, 7)) == "GRU(5, 7)"
    assert repr(LSTM(5, 7, 2, bidirectional=True, dropout=0.5, bias=False)) == (
        "LSTM(5, 7, 2, bidirectional=True, dropout=0.5, bias=False)"
    )
