"""What the essays say of recurrence: what must wait, how far back it reaches, what is fixed, what attention changed."""

import json
from pathlib import Path
from statistics import mean

import pytest
import torch

from benchmarks.recurrence import factor, gate_of, newton_errors, scan, shares
from benchmarks.recurrence_run import CUES, LENGTH, NOISE, Reader, Run, draw, gradient
from nondual.analysis.critical_path import is_arithmetic, longest_chain
from nondual.attention_mechanism import AttentionDecoder
from nondual.language_models.gpt import GPT
from nondual.ops.attention import attention
from nondual.ops.linear_recurrence import linear_recurrence, parallel, sequential
from nondual.recurrent import GRU, LSTM, RNN
from nondual.self_attention import MultiHeadAttention

STORED = Path(__file__).parent.parent / "docs/measured/recurrence.json"
KEPT = ("RNN", "LSTM, forget bias 0", "LSTM, forget bias 1", "GRU")


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text(encoding="utf-8"))["figures"]


# --- E3: what must wait --------------------------------------------------------------------------------------------


@pytest.mark.claim("E3", "holds if")
def test_a_nonlinear_recurrence_waits_n_times_and_a_linear_one_2_log_n():
    for n in (16, 64):
        x = torch.randn(1, n, 8)
        for kind in (RNN, GRU, LSTM):
            assert longest_chain(kind(8, 8)(x)[0]) == n
        layer = MultiHeadAttention(8, 1, causal=True)
        assert longest_chain(layer(x, return_weights=True)[0]) == 4  # projections, scores, values, output
    rounds = {}
    for n in (64, 128, 256, 512):
        a, b = (torch.randn(1, n, 8, requires_grad=True) for _ in range(2))
        rounds[n] = [longest_chain(run(a, b, torch.zeros(1, 8)), is_arithmetic) for run in (sequential, parallel)]
    assert [rounds[n][0] for n in rounds] == [2 * n for n in rounds]
    assert len({rounds[2 * n][1] - rounds[n][1] for n in (64, 128, 256)}) == 1  # the same few more for each doubling


@pytest.mark.claim("E3", "holds if")
def test_even_a_gru_s_states_are_found_for_all_positions_at_once():
    """By Newton's method: a round is one step at every position, and a scan. There are fewer rounds than positions."""
    torch.manual_seed(0)
    errors = newton_errors(GRU(8, 16).double(), torch.randn(64, 8, dtype=torch.float64))
    assert len(errors) < 8 and errors[-1] <= 1e-6


def test_the_scan_of_matrices_is_the_loop():
    a, b = torch.randn(13, 3, 3).double(), torch.randn(13, 3).double()
    h, expected = torch.zeros(3).double(), []
    for a_t, b_t in zip(a, b):
        h = a_t @ h + b_t
        expected.append(h)
    torch.testing.assert_close(scan(a, b), torch.stack(expected))


@pytest.mark.claim("E3", "holds if")
def test_time_and_rounds_as_measured(stored):
    for row in stored["chain"]:
        if row["of"] in ("RNN", "GRU", "LSTM"):
            assert row["products"] == row["n"]
        else:
            assert row["products"] <= 4
    assert stored["time"]["loop_over_once"]["low"] > 2  # the same arithmetic takes longer one product after another
    for name in ("before", "after"):
        for rounds in stored["newton"][name]:
            assert all(n is None or n < length for n, length in zip(rounds, stored["newton"]["lengths"]))


# --- E5: how far back ----------------------------------------------------------------------------------------------


@pytest.mark.claim("E5", "holds if")
def test_at_the_start_the_scores_of_recurrent_networks_hardly_change_with_a_far_input():
    """Gradients at 64 steps against 1: recurrent ones are as good as gone, attention's is not."""
    left = {}
    for arm in (*KEPT, "attention"):
        torch.manual_seed(0)
        model = Reader(arm).eval()
        left[arm] = gradient(model, 64, rows=8) / gradient(model, 1, rows=8)
    assert all(left[arm] < 1e-4 for arm in KEPT) and left["attention"] > 0.3


@pytest.mark.claim("E5", "holds if")
def test_a_fixed_point_keeps_what_no_gradient_shows():
    """A network with two states that stay: which of them it is in tells of the first input, and the slope does not."""
    network = RNN(1, 1).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.weight_ih_l0[:], network.weight_hh_l0[:] = 3.0, 3.0
    x = torch.zeros(2, 1000, 1, dtype=torch.float64)
    x[0, 0], x[1, 0] = 1.0, -1.0
    x.requires_grad_()
    y, _ = network(x)
    assert y[0, -1] > 0.9 and y[1, -1] < -0.9
    (slope,) = torch.autograd.grad(y[:, -1].sum(), x)
    assert slope[:, 0].abs().max() < 1e-300


def test_the_task_is_one_cue_among_noise():
    ids, cues = draw(torch.Generator().manual_seed(0), 64)
    assert ids.shape == (64, LENGTH) and ((ids < CUES).sum(1) == 1).all() and (ids[:, -1] == CUES + NOISE).all()
    assert torch.equal(ids[ids < CUES], cues)
    far, _ = draw(torch.Generator().manual_seed(0), 64, nearest=64)
    assert (LENGTH - 1 - (far < CUES).int().argmax(1)).min() >= 64
    at, _ = draw(torch.Generator().manual_seed(0), 64, 200, 150)
    assert ((at < CUES).int().argmax(1) == 49).all()


@pytest.mark.parametrize("arm", [*KEPT, "Mamba", "attention"])
def test_a_run_is_kept_and_can_be_looked_at(arm, tmp_path):
    from benchmarks.recurrence_run import carry_out

    run = Run(arm, 1, 0.02, 0, 2, tmp_path)
    carry_out(run)
    kept = run.file.read_text()
    carry_out(run)
    assert run.file.read_text() == kept and run.result()["chosen_on_loss"] > 0
    assert gradient(run.model(), 3, rows=2) > 0
    if arm in KEPT:
        network, embeddings = run.ours()
        ids, _ = draw(torch.Generator().manual_seed(0), 3, 9)
        torch.testing.assert_close(network(embeddings(ids))[0], run.model().mixer(embeddings(ids)))


# --- D14: what was fixed -------------------------------------------------------------------------------------------


@pytest.mark.claim("D14", "holds if")
def test_what_a_path_lets_through_varies_with_the_input_even_untrained():
    torch.manual_seed(0)
    network, x = LSTM(8, 8), torch.randn(64, 20, 8)
    gate = gate_of(network, x)
    assert factor(gate, 16) > 2
    blind = network.weight_ih_l0.detach().clone()
    with torch.no_grad():  # the control: the forget gate hears neither the input nor the state
        network.weight_ih_l0[8:16], network.weight_hh_l0[8:16] = 0, 0
    assert factor(gate_of(network, x), 16) == 1 and not torch.equal(blind, network.weight_ih_l0)


def test_the_shares_of_a_gate_s_variance_add_up_and_name_their_source():
    torch.manual_seed(0)
    ids = torch.randint(5, (200, 7))
    unit, place, token = torch.randn(1, 1, 3), torch.randn(1, 7, 1), torch.randn(5, 1)
    place = place - place.mean()
    of_units = shares((0 * ids[..., None] + unit), ids)
    assert of_units == {"unit": 1.0, "place": 0.0, "token": 0.0, "state": 0.0}
    of_places = shares((place + 0 * ids[..., None]).expand(-1, -1, 3), ids)
    assert of_places["place"] == 1
    of_tokens = shares(token[ids].expand(-1, -1, 3), ids)
    assert of_tokens["token"] > 0.95 and abs(sum(of_tokens.values()) - 1) < 1e-3


@pytest.mark.claim("D14", "holds if")
def test_in_trained_networks_the_input_decides_what_is_kept(stored):
    for arm, found in stored["gates"].items():
        for of in found["after"]:
            assert of["factor"] > 10, arm
            assert of["shares"]["token"] + of["shares"]["state"] > 0.1


# --- E12: a structural break ---------------------------------------------------------------------------------------


@pytest.mark.claim("E12", "holds if")
def test_attention_began_inside_a_recurrent_network():
    """The decoder of 2014: every weight waits for the state before it."""
    decoder = AttentionDecoder(3, 4, 5, 6)
    chains = []
    for n in (4, 8, 16):
        states, _ = decoder(torch.randn(1, n, 3), torch.randn(1, 4, requires_grad=True), torch.randn(1, 7, 5))
        chains.append(longest_chain(states))
    assert chains[2] - chains[1] == 2 * (chains[1] - chains[0]) and chains[0] > 8


@pytest.mark.claim("E12", "holds if")
def test_a_transformer_still_writes_one_token_after_another():
    model, calls = GPT(17, 8, 1, 2, max_len=32).eval(), []
    model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model.generate(torch.tensor([[3]]), 20)
    assert len(calls) == 20


@pytest.mark.claim("E12", "holds if")
def test_attention_without_softmax_is_a_recurrence():
    """Katharopoulos et al. 2020 (2006.16236), section 3.4: the sum over the past, or a state that is carried along."""
    q, k, v = (torch.randn(2, 9, 4, dtype=torch.float64) for _ in range(3))
    looked_up = (q @ k.mT).tril() @ v
    ones = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    state, _ = linear_recurrence(ones, k[..., :, None] * v[..., None, :])  # (B, N, D, D): what is carried along
    torch.testing.assert_close((q[..., None, :] @ state)[..., 0, :], looked_up)


# --- and what was measured -----------------------------------------------------------------------------------------


@pytest.mark.claim("E5", "holds if")
def test_what_was_named_at_each_distance(stored):
    found = stored["distance"]
    assert found["setup"]["distances"][-1] == 2047
    for arm in KEPT:
        before = found["any"]["arms"][arm]["half_distance_before"]
        assert max(before) < 8, arm
    any_distance, far_alone = (found[name]["arms"] for name in ("any", "far"))
    for arm in KEPT:
        assert all(min(row[:8]) > 0.97 and row[-1] > 0.85 for row in any_distance[arm]["accuracy"]), arm
    for arm in KEPT[:3]:  # trained on far cues alone: they guess one of eight
        assert all(mean(row) < 0.2 for row in far_alone[arm]["accuracy"]), arm
        assert min(far_alone[arm]["sweep_loss"].values()) > 2, arm
    assert sum(loss < 0.01 for loss in far_alone["GRU"]["loss"]) == 2


# --- E4, E13, E14, E16: beside what was measured -------------------------------------------------------------------


def recalled(pairs, width):
    """Of pairs with random keys, the largest error of a value read back: from a state of width², and by attention."""
    torch.manual_seed(pairs)
    keys = torch.nn.functional.normalize(torch.randn(1, pairs, width, dtype=torch.float64), dim=-1)
    values = torch.randint(2, (1, pairs, 1)).double() * 2 - 1
    ones = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    _, state = linear_recurrence(ones, keys[..., :, None] * values[..., None, :].expand(-1, -1, -1, width))
    from_state = (keys[0] @ state[0])[:, :1]
    looked_up = attention(keys[:, None], keys[:, None], values[:, None], scale=400.0)[0, 0]
    return (from_state - values[0]).abs().max().item(), (looked_up - values[0]).abs().max().item()


@pytest.mark.claim("E4", "holds")
@pytest.mark.claim("E16", "holds")
def test_a_sum_of_pairs_mixes_them_and_a_larger_one_mixes_them_later():
    """The largest number of pairs whose values a state tells apart: more with a wider one, and always some limit."""
    limits = {}
    for width in (8, 32, 128):
        told = [pairs for pairs in (1, 2, 4, 8, 16, 32, 64, 128, 256) if recalled(pairs, width)[0] < 1]
        limits[width] = max(told)
        assert recalled(256, width)[0] > 1
    assert limits[8] < limits[32] < limits[128] < 128
    assert recalled(256, 32)[1] < 0.01  # the look-up has kept them all


@pytest.mark.claim("E13", "holds if")
def test_an_lstm_keeps_one_number_for_as_long_as_its_forget_gate_is_set_to():
    kept = {}
    for bias in (0.0, 1.0, 9.2):
        cell = LSTM(1, 1, forget_bias=bias).double()
        with torch.no_grad():
            for name, parameter in cell.named_parameters():
                if name.startswith("weight"):
                    parameter.zero_()
            cell.weight_ih_l0[2] = 1.0  # what is taken in is x
            cell.bias_ih_l0[[0, 3]], cell.bias_hh_l0[:] = 30.0, 0.0
            cell.bias_ih_l0[2] = 0.0
            x = torch.zeros(1, 1001, 1, dtype=torch.float64)
            x[0, 0] = 0.5
            _, (_, c) = cell(x)
        kept[bias] = (c / torch.tensor(0.5).tanh()).item()
    assert kept[0.0] < 1e-300 and kept[1.0] < 1e-100 and 0.9 < kept[9.2] < 0.91


@pytest.mark.claim("E14", "holds if")
def test_attention_reads_a_set_and_a_recurrence_a_course():
    """What came before in another order: attention without positions answers alike, and a GRU does not."""
    torch.manual_seed(0)
    x = torch.randn(1, 20, 8)
    shuffled = torch.cat([x[:, torch.randperm(19)], x[:, -1:]], 1)
    looks_up, goes_on = MultiHeadAttention(8, 1, causal=True), GRU(8, 8)
    torch.testing.assert_close(looks_up(x)[:, -1], looks_up(shuffled)[:, -1])
    assert (goes_on(x)[0][:, -1] - goes_on(shuffled)[0][:, -1]).abs().max() > 1e-3
