"""What the essays say of look-up and of memory: limits that are counted, laws that are exact, and what was measured."""

import itertools
import json
import math
from pathlib import Path
from statistics import mean

import pytest
import torch

from nondual.ops.attention import attention

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def measured():
    return json.loads((ROOT / "docs/measured/recall.json").read_text())["figures"]


def looked_up(keys, values, sharpness):
    """Each key asks for its own value: what soft attention gives (N, D)."""
    q, k, v = (x[None, None] for x in (keys, keys, values))
    return attention(q, k, v, scale=sharpness)[0, 0]


# --- E1: look-up by content ----------------------------------------------------------------------------------------


@pytest.mark.claim("E1", "holds")
@pytest.mark.parametrize("n", [1, 2, 17, 300])
def test_attention_becomes_a_dictionary_as_its_scores_sharpen(n):
    """The error is at most (N - 1) exp(-sharpness · gap) times the distance of two values; the gap is that of keys."""
    torch.manual_seed(n)
    keys = torch.nn.functional.normalize(torch.randn(n, 24, dtype=torch.float64), dim=-1)
    values = torch.randn(n, 5, dtype=torch.float64)
    apart = torch.cdist(values, values).max()
    gap = (1 - (keys @ keys.T).fill_diagonal_(-1)).min()
    for sharpness in (0.5, 3.0, 20.0, 120.0, 900.0):
        error = (looked_up(keys, values, sharpness) - values).norm(dim=-1).max()
        assert error <= (n - 1) * torch.exp(-sharpness * gap) * apart + 1e-12
    assert error < 1e-12
    if n > 2:  # and blunt, it is a mean
        blunt = looked_up(keys, values, 1e-9)
        torch.testing.assert_close(blunt, values.mean(0).expand_as(blunt), rtol=0, atol=1e-6)


@pytest.mark.claim("E1", "holds")
def test_what_is_asked_for_and_not_there_is_answered_all_the_same():
    """A dictionary refuses a key that it does not have; the weights of attention sum to 1 whatever is asked."""
    torch.manual_seed(0)
    keys, values = torch.eye(6, dtype=torch.float64)[:5], torch.randn(5, 3, dtype=torch.float64)
    absent = torch.eye(6, dtype=torch.float64)[5:]
    out, weights = attention(absent[None, None], keys[None, None], values[None, None], scale=50.0, return_weights=True)
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(out[0, 0, 0], values.mean(0))


@pytest.mark.claim("E1", "holds")
def test_trained_attention_puts_its_weight_on_the_pair_that_is_asked_for(measured):
    """Of two layers one does the look-up; on recall its best head gives the pair nearly all, of 1 pair as of 16."""
    for run in measured["recall"]["arms"]["attention 64"]["runs"]:
        assert max(run["weight"]["1"]) > 0.95 and max(run["weight"]["16"]) > 0.95
        assert min(run["right"]) > 0.99 and len(run["right"]) == 16


# --- E4: a recurrence must compress --------------------------------------------------------------------------------


def given_back(step, read, vocabulary, length):
    """How many of all rows of tokens a machine tells: `step(state, token) -> state`, and the row read off the state."""
    told = 0
    for row in itertools.product(range(vocabulary), repeat=length):
        state = 0
        for token in row:
            state = step(state, token)
        told += read(state) == row
    return told


@pytest.mark.claim("E4", "holds")
@pytest.mark.parametrize("states, vocabulary, length", [(8, 2, 5), (7, 3, 3), (20, 3, 4)])
def test_no_machine_tells_more_histories_apart_than_it_has_states(states, vocabulary, length):
    """The best reading of a state is right for one history at most, whatever the transitions are."""
    for seed in range(20):
        table = torch.randint(states, (states, vocabulary), generator=torch.Generator().manual_seed(seed)).tolist()
        reached: dict[int, tuple[int, ...]] = {}
        for row in itertools.product(range(vocabulary), repeat=length):
            state = 0
            for token in row:
                state = table[state][token]
            reached.setdefault(state, row)
        told = given_back(lambda s, t, table=table: table[s][t], lambda s, r=reached: r[s], vocabulary, length)
        assert told == len(reached) <= states < vocabulary**length


@pytest.mark.claim("E4", "holds")
@pytest.mark.parametrize("length", [1, 3, 4, 5, 6])
def test_a_shift_register_keeps_all_that_its_bits_can_hold_and_no_more(length):
    """Eight bits keep four tokens of two bits: up to there a recurrence loses nothing, and then the oldest is lost."""
    bits, vocabulary = 8, 4
    kept = min(length, int(bits / math.log2(vocabulary)))

    def step(state, token):
        return (state * vocabulary + token) % 2**bits

    def read(state):
        row = tuple(state // vocabulary**i % vocabulary for i in reversed(range(kept)))
        return (0,) * (length - kept) + row  # of what is lost, a guess

    assert given_back(step, read, vocabulary, length) == vocabulary**kept == min(vocabulary**length, 2**bits)


def mean_of(arm, what):
    """The mean over an arm's runs, number by number."""
    return [mean(column) for column in zip(*(run[what] for run in arm["runs"]))]


@pytest.mark.claim("E4", "holds")
def test_trained_recurrences_lose_what_their_state_does_not_hold(measured):
    copying = measured["copying"]["arms"]
    right = {arm: mean_of(copying[arm], "right") for arm in copying}
    assert min(right["attention 64"]) > 0.999  # of 1 to 16 tokens
    for arm in ("LSTM 64", "LSTM 16", "Mamba 16"):
        assert right[arm][3] > 0.9 and right[arm][15] < 0.75
    assert right["LSTM 64"][15] > right["LSTM 16"][15] + 0.1  # a larger state holds more
    others = [max(copying[arm]["runs"][0]["bits"]) for arm in ("LSTM 64", "LSTM 16", "Mamba 16")]
    assert max(others) < 33 < 48 - 0.1 < max(copying["attention 64"]["runs"][0]["bits"])


@pytest.mark.claim("E4", "holds")
def test_of_a_long_row_the_latest_tokens_are_kept_best(measured):
    """Sixteen tokens, asked from the last to the first: the last three, the middle four, and the first of all."""
    for run in measured["copying"]["arms"]["LSTM 64"]["runs"]:
        asked = run["right_by_question"]["16"]
        assert mean(asked[:3]) > 0.95 > 0.65 > mean(asked[6:10])
        assert asked[-1] > mean(asked[6:10])  # what came first is not the worst


# --- E16: scaling ----------------------------------------------------------------------------------------------------


@pytest.mark.claim("E16", "holds")
def test_a_larger_state_recalls_more_pairs_and_still_has_a_limit(measured):
    arms = measured["recall"]["arms"]
    sizes = ("LSTM 16", "LSTM 64", "LSTM 128")
    most = {arm: mean(arms[arm]["most_recalled"]) for arm in arms}
    bits = {arm: mean(arms[arm]["most_bits"]) for arm in arms}
    assert [arms[arm]["state"] for arm in sizes] == [32, 128, 256]
    assert 1 <= most["LSTM 16"] < 3 <= most["LSTM 64"] < 5 <= most["LSTM 128"] < 8
    assert 6 < bits["LSTM 16"] < 8 < 16 < bits["LSTM 64"] < 20 < 24 < bits["LSTM 128"] < 27
    assert most["attention 64"] == 16 and bits["attention 64"] > 47.9  # all that there is
    small = mean_of(arms["LSTM 16"], "bits")
    assert max(small[3:]) - min(small[3:]) < 1  # from 4 pairs to 16: level


@pytest.mark.claim("E16", "holds")
def test_more_training_moves_the_limit_too_and_the_count_of_bits_is_far_off(measured):
    arms = measured["recall"]["arms"]
    for arm in ("LSTM 16", "LSTM 64"):
        longer = arms[f"{arm}, 3 times as long"]
        assert mean(longer["most_bits"]) > 1.3 * mean(arms[arm]["most_bits"])
        assert max(longer["most_recalled"]) <= 6
        assert mean(longer["most_bits"]) < 0.011 * 32 * longer["state"]  # of the bits of a state in float32
    assert arms["Mamba 16"]["state"] == 2432 and mean(arms["Mamba 16"]["most_bits"]) < mean(
        arms["LSTM 64"]["most_bits"]
    )


# --- E13: keeping ----------------------------------------------------------------------------------------------------


@pytest.mark.claim("E13", "holds if")
def test_how_long_one_token_is_kept_depends_on_how_the_forget_gate_starts(measured):
    gap = measured["gap"]

    def learned(found):
        return sum(best >= measured["settings"]["solved"] for best in found["best"])

    one = {arm: {int(n): learned(found) for n, found in gaps.items()} for arm, gaps in gap["one"].items()}
    assert one["RNN"] == {3: 3, 10: 0}
    assert one["LSTM, forget bias 0"] == one["LSTM, forget bias 1"] == {3: 3, 10: 3, 30: 0}
    again = {arm: (found["gap"], learned(found)) for arm, found in gap["longer"].items()}  # four times the batches
    assert again["LSTM, forget bias 1"] == (30, 3) and again["LSTM, forget bias 0"] == (30, 1)
    assert one["GRU"] == {3: 3, 10: 3, 30: 3, 100: 2, 300: 2}
    assert all(one["LSTM, chrono"][n] == 3 for n in (3, 10, 30, 100)) and one["LSTM, chrono"][1000] == 2
    assert all(one["attention"][n] == 3 for n in (3, 10, 30, 100, 300, 1000))


@pytest.mark.claim("E13", "holds if")
def test_of_several_tokens_fewer_are_kept_over_the_same_gap(measured):
    several = {int(n): mean(found["best"]) for n, found in measured["gap"]["several"]["LSTM, chrono"].items()}
    assert 0.8 < several[2] < 0.95 and 0.55 < several[4] < 0.7 and 0.35 < several[8] < 0.5


# --- E14: look-up and continuity -------------------------------------------------------------------------------------


@pytest.mark.claim("E14", "holds if")
def test_where_the_task_is_look_up_global_access_decides(measured):
    less = measured["recall"]["at 16, attention less LSTM"]
    assert len(less["each"]) == 8 and less["interval"][0] > 0.45
    longer = mean_of(measured["recall"]["arms"]["LSTM 64, 3 times as long"], "right")
    assert longer[-1] < 0.65  # the LSTM with twelve times the batches of attention


@pytest.mark.claim("E14", "holds if")
def test_where_samples_are_smooth_neither_is_ahead(measured):
    """The next four samples of an EEG: the interval of the difference holds 0 and ends within three points of it."""
    eeg = measured["EEG"]
    low, high = eeg["less attention"]["LSTM"]["interval"]
    assert -0.03 < low < 0 < high < 0.03 and len(eeg["less attention"]["LSTM"]["each"]) == 8
    missed = {arm: mean(run["missed"] for run in found["runs"]) for arm, found in eeg["arms"].items()}
    assert max(missed.values()) < eeg["by_rule"]["linear"]["test"] < eeg["by_rule"]["last value"]["test"]
    assert eeg["less attention"]["attention, ALiBi"]["mean"] < 0  # a bias for what is near does not harm


# --- E17: what one output tells ------------------------------------------------------------------------------------


@pytest.mark.claim("E17", "holds if")
def test_one_output_is_d_numbers_however_much_is_stored():
    """As a function of all N values, one query's output of width d has rank d; n queries reach n · d at most."""
    torch.manual_seed(0)
    d, n = 6, 40
    q, k, v = torch.randn(1, 1, 3, d), torch.randn(1, 1, n, d), torch.randn(1, 1, n, d)
    q, k, v = q.double(), k.double(), v.double()

    def rank(queries):
        jacobian = torch.autograd.functional.jacobian(lambda v: attention(q[:, :, :queries], k, v).flatten(), v)
        return int(torch.linalg.matrix_rank(jacobian.flatten(1)))

    assert [rank(1), rank(2), rank(3)] == [d, 2 * d, 3 * d] and 3 * d < n * d


@pytest.mark.claim("E17", "holds if")
@pytest.mark.parametrize("n", [4, 8, 16, 64])
def test_of_n_stored_numbers_a_linear_reading_of_one_output_tells_d_over_n(n):
    """Each number lies along a direction of its own. The weights here are even: the best case for all at once."""
    torch.manual_seed(1)
    d, draws = 8, 3000
    directions = torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.float64), dim=-1)
    stored = torch.randn(draws, n, dtype=torch.float64)
    q, k = torch.zeros(draws, 1, 1, d).double(), torch.randn(draws, 1, n, d).double()
    out = attention(q, k, stored[:, None, :, None] * directions)[:, 0, 0]
    fit = torch.linalg.lstsq(out[:2000], stored[:2000]).solution
    told = 1 - (out[2000:] @ fit - stored[2000:]).square().mean() / stored[2000:].square().mean()
    assert told == pytest.approx(min(1, d / n), abs=0.02)


@pytest.mark.claim("E17", "holds if")
def test_nothing_in_the_store_is_lost_a_query_of_its_own_reads_each_value():
    """The question comes after the store was filled: any of 500 values is read, with one output of 24 numbers each."""
    torch.manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(500, 24, dtype=torch.float64), dim=-1)
    values = torch.randn(500, 24, dtype=torch.float64)
    torch.testing.assert_close(looked_up(keys, values, 300.0), values, rtol=0, atol=1e-12)
