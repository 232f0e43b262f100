"""What the essays say of look-up and of memory: limits that are counted, laws that are exact, and what was measured."""

import itertools
import json
import math
from pathlib import Path

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
