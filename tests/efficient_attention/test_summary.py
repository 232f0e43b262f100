"""What a summary of fixed size can hold: laws of linear attention's state, what was measured, and other names of it."""

import json
import math
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F

from nondual.efficient_attention import mamba2
from nondual.efficient_attention.mamba2 import Mamba2
from nondual.ops.attention import attention
from nondual.ops.linear_attention import linear_attention, linear_attention_matrix, linear_attention_step
from nondual.ops.ssd import ssd

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured():
    return json.loads((ROOT / "docs/measured/summary.json").read_text())["figures"]


def pairs(draws, m, d, seed=0):
    """Keys (draws, 1, m, d) of length 1 and values with a square of 1 on average."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(draws, 1, m, d, generator=generator, dtype=torch.float64) for _ in range(2))
    return F.normalize(keys, dim=-1), values / math.sqrt(d)


def error(read, values):
    """The squared error of reads, over the values' square, which is 1 on average."""
    return (read - values).square().sum(-1).mean().item()


def ones(k):
    """β = 1 at every step."""
    return torch.ones(k.shape[:3], dtype=k.dtype)


# --- A4.11: all-to-all becomes all-to-summary ----------------------------------------------------------------------

RULES = {
    "sum": {},
    "normalised": {"normalise": True},
    "decay": {"log_decay": torch.tensor([-0.05], dtype=torch.float64)},
    "delta": {"beta": True},
}


def of(rule, k):
    """The arguments of a rule, with a β for each step of k."""
    return {**RULES[rule], "beta": 0.7 * ones(k)} if "beta" in RULES[rule] else RULES[rule]


@pytest.mark.claim("A4.11", "holds")
@pytest.mark.parametrize("rule", RULES)
def test_what_was_read_reaches_later_positions_by_a_state_of_one_size_alone(rule):
    """As large after 200 positions as after 1; and whoever is handed it answers as one who has read them all."""
    q, (k, v) = pairs(2, 207, 5, seed=1)[0], pairs(2, 207, 5)
    if rule == "normalised":
        q, k = q.exp(), k.exp()
    whole, _ = linear_attention(q, k, v, **of(rule, k))
    sizes = set()
    for n in (1, 7, 200):
        _, state = linear_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], **of(rule, k[:, :, :n]))
        sizes.add(state.shape[1:].numel())
        rest, _ = linear_attention(q[:, :, n:], k[:, :, n:], v[:, :, n:], state=state, **of(rule, k[:, :, n:]))
        torch.testing.assert_close(rest, whole[:, :, n:], rtol=1e-9, atol=1e-12)
    assert sizes == {5 * (5 + (rule == "normalised"))}


@pytest.mark.claim("A4.11", "holds")
def test_five_pairs_stand_for_two_hundred_where_softmax_attention_tells_them_apart():
    """The state of 200 pairs is also that of the 5 pairs which its singular vectors make: no later query can tell."""
    k, v = pairs(1, 200, 5)
    _, state = linear_attention(k, k, v)
    left, size, right = torch.linalg.svd(state)
    few_keys, few_values = left.mT, size[..., None] * right
    torch.testing.assert_close(linear_attention(few_keys, few_keys, few_values)[1], state)
    q = pairs(1, 50, 5, seed=1)[0]
    many, few = (linear_attention(q, *of_all, causal=False)[0] for of_all in ((k, v), (few_keys, few_values)))
    torch.testing.assert_close(many, few)
    assert (attention(q, k, v) - attention(q, few_keys, few_values)).norm(dim=-1).min() > 0.1


@pytest.mark.claim("A4.11", "holds")
@pytest.mark.parametrize("rule", RULES)
def test_the_weights_of_later_for_earlier_positions_have_the_rank_of_the_state(rule):
    """There are N x N weights all the same; but those of later rows for earlier columns have rank d at most."""
    q, k = pairs(1, 40, 5, seed=1)[0], pairs(1, 40, 5)[0]
    if rule == "normalised":
        q, k = q.exp(), k.exp()
    weights = linear_attention_matrix(q, k, **of(rule, k))[0, 0]
    soft = attention(q, k, k, causal=True, scale=3.0, return_weights=True)[1][0, 0]
    for n in (8, 20, 32):
        ranks = [torch.linalg.matrix_rank(w[n:, :n], rtol=1e-9).item() for w in (weights, soft)]
        assert ranks == [5, min(n, 40 - n)]


@pytest.mark.claim("A4.11", "holds")
def test_the_error_of_a_sum_is_the_number_of_other_pairs_over_the_width():
    """(m - 1) / d for random keys, 0 for orthogonal ones; softmax attention over the same pairs keeps them apart."""
    d = 32
    for m in (2, 16, 32, 128):
        k, v = pairs(96, m, d)
        _, state = linear_attention(k, k, v)
        assert error(k @ state, v) == pytest.approx((m - 1) / d, rel=0.15)
        assert error(attention(k, k, v, scale=4 * math.sqrt(d)), v) < 1e-4
        if m <= d:
            basis = torch.linalg.qr(k.mT).Q.mT
            assert error(basis @ linear_attention(basis, basis, v)[1], v) < 1e-20


@pytest.mark.claim("A4.11", "holds")
def test_no_state_reads_more_than_d_random_pairs_without_error():
    """The best d x d matrix reads up to d pairs exactly, and of more it misses 1 - d / m of the values' square."""
    d = 16
    for m in (8, 16, 24, 64):
        k, v = pairs(64, m, d)
        best = torch.linalg.pinv(k) @ v
        least = error(k @ best, v)
        assert least == pytest.approx(max(0, 1 - d / m), abs=0.03)
        for beta in (None, ones(k)):
            assert error(k @ linear_attention(k, k, v, beta=beta)[1], v) > least


@pytest.mark.claim("A4.11", "holds")
def test_the_laws_are_those_that_were_measured(measured):
    """Each expected error lies within twice the 95 % interval of its mean, where there is one."""
    for found in measured["law"].values():
        for at in found.values():
            for rule, expected in at["expected"].items():
                middle, _, high = at["error"][rule]
                assert abs(middle - expected) <= 2 * (high - middle) + 1e-5
            assert at["error"]["softmax, 4 times as sharp"][2] < 1e-3


@pytest.mark.claim("A4.11", "holds")
def test_trained_states_of_one_size_lose_pairs_that_softmax_attention_keeps(measured):
    """From the first number of pairs to the last; each arm at its best rate, with eight seeds in common."""
    recall, settings = measured["recall"], measured["settings"]
    last = str(settings["tested_on"][-1])
    assert settings["tested_on"][-1] >= 4 * settings["d"]
    right = {
        arm: [mean(run["right"][i] for run in found["runs"]) for i in range(len(settings["tested_on"]))]
        for arm, found in recall["arms"].items()
    }
    at_d = settings["tested_on"].index(settings["d"])
    percent = {arm: (round(100 * right[arm][at_d]), round(100 * right[arm][-1])) for arm in ("sum", "delta")}
    assert percent == {"sum": (96, 58), "delta": (95, 56)}  # as the ledger says
    assert min(right.pop("softmax")) > 0.99
    for arm, curve in right.items():
        difference = recall["differences"][f"{arm} less softmax"][last]
        assert curve[-1] < curve[0] - 0.2 and difference["interval"][1] < -0.2
        assert len(difference["each"]) == 8
    by_width = [mean(run["right"][at_d] for run in found["runs"]) for found in recall["by_width"].values()]
    assert by_width[0] < right["delta"][at_d] - 0.2 and by_width[-1] > right["delta"][at_d]  # 8 and 32 rows
    sizes = [found["parameters"] for found in recall["arms"].values()]
    assert max(sizes) < 1.07 * min(sizes)


# --- overwriting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [0, 1, 9, 100])
def test_a_key_that_is_written_twice(between):
    """A sum reads both values, the delta rule the last, a decay the last and what is left of the first."""
    k, v = pairs(3, between + 2, 16)
    k[:, :, -1] = k[:, :, 0]

    def read(**how):
        return k[:, :, :1] @ linear_attention(k, k, v, **how)[1]

    def without_first(**how):
        return k[:, :, :1] @ linear_attention(k[:, :, 1:], k[:, :, 1:], v[:, :, 1:], **how)[1]

    decay = torch.tensor([math.log(0.9)], dtype=torch.float64)
    torch.testing.assert_close(read(beta=ones(k)), v[:, :, -1:])
    torch.testing.assert_close(read() - without_first(), v[:, :, :1])
    left = read(log_decay=decay) - without_first(log_decay=decay)
    torch.testing.assert_close(left, 0.9 ** (between + 1) * v[:, :, :1])


def test_softmax_attention_without_positions_reads_the_mean_of_both():
    k, v = pairs(1, 12, 16)
    k[:, :, -1] = k[:, :, 0]
    read = attention(k[:, :, :1], k, v, scale=400.0)
    torch.testing.assert_close(read, (v[:, :, :1] + v[:, :, -1:]) / 2)


# --- parity --------------------------------------------------------------------------------------------------------


def test_with_beta_of_2_a_key_turns_the_sign_of_what_it_reads():
    """Parity in one state: a one turns the sign, which is an eigenvalue of -1, and a zero changes nothing."""
    torch.manual_seed(0)
    bits = torch.randint(2, (1, 1, 500))
    key = F.normalize(torch.randn(7, dtype=torch.float64), dim=0).expand(1, 1, 500, 7)
    value = torch.zeros(1, 1, 500, 1, dtype=torch.float64)
    start = key[:, :, 0, :, None].clone()
    out, _ = linear_attention(key, key, value, beta=2.0 * bits.double(), state=start)
    torch.testing.assert_close(out[..., 0], (1 - 2 * (bits.cumsum(2) % 2)).double())


def test_only_eigenvalues_below_0_count_parity_beyond_the_trained_length(measured):
    """Of one layer: the delta rule with β up to 1 and Mamba-2 guess, the same delta rule with β up to 2 does not."""
    arms, trained_on = measured["parity"]["arms"], measured["settings"]["bits"]
    beyond = {arm: [mean(run["right"][trained_on:]) for run in found["runs"]] for arm, found in arms.items()}
    assert max(beyond["delta"]) < 0.55 and max(beyond["Mamba-2"]) < 0.55
    assert mean(beyond["delta 2"]) > 0.9 and mean(beyond["LSTM"]) > 0.99


# --- other names of the same formula -------------------------------------------------------------------------------


def scan_as_attention(x, delta, A, B, C, D, z, delta_bias, *, delta_softplus, **_):
    """What `ssd` gives, computed by linear attention: q = C, k = B, v = Δ x, and the log of the decay Δ A."""
    delta = F.softplus(delta + delta_bias) if delta_softplus else delta
    q, k = (each.repeat_interleave(x.shape[2] // each.shape[2], 2).transpose(1, 2) for each in (C, B))
    v = (delta[..., None] * x).transpose(1, 2)
    y, state = linear_attention(q, k, v, log_decay=(delta * A).mT)
    return (y.transpose(1, 2) + D[:, None] * x) * F.silu(z), state.mT


@pytest.mark.parametrize("n_groups", [1, 2])
def test_the_scan_of_mamba_2_is_linear_attention_with_a_gate_for_each_head(n_groups, monkeypatch):
    """The whole module gives the same outputs and gradients with the one in the place of the other."""
    torch.manual_seed(0)
    block = Mamba2(24, d_state=11, d_head=12, n_groups=n_groups).double()
    x = torch.randn(2, 37, 24, dtype=torch.float64)
    found = {}
    for name, scan in (("ssd", ssd), ("linear attention", scan_as_attention)):
        monkeypatch.setattr(mamba2, "ssd", scan)
        block.zero_grad()
        y = block(x)
        y.square().sum().backward()
        found[name] = [y.detach(), *(parameter.grad for parameter in block.parameters())]
    for ours, theirs in zip(found["linear attention"], found["ssd"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_linear_attention_with_a_gate_for_each_head_is_the_scan_of_mamba_2():
    """The other way: A = -1, so that Δ is minus the log of the decay, and x = v / Δ."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 3, 41, 7, dtype=torch.float64) for _ in range(2))
    v, log_decay = torch.randn(2, 3, 41, 5, dtype=torch.float64), -torch.rand(2, 3, 41, dtype=torch.float64) - 0.01
    out, state = linear_attention(q, k, v, log_decay=log_decay)
    delta = -log_decay.mT
    x = v.transpose(1, 2) / delta[..., None]
    y, last = ssd(x, delta, -torch.ones(3, dtype=torch.float64), k.transpose(1, 2), q.transpose(1, 2))
    torch.testing.assert_close(out, y.transpose(1, 2))
    torch.testing.assert_close(state, last.mT)


def test_the_state_is_the_weight_of_a_layer_that_is_trained_as_it_reads():
    """Fast weights (Schmidhuber 1992; Schlag et al. 2021, 2102.11174): writing is a step of gradient descent.

    The sum is a step of size 1 on -v · Sᵀk, and the delta rule one of size β on |v - Sᵀk|² / 2.
    """
    torch.manual_seed(0)
    state = torch.randn(1, 1, 6, 4, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(1, 1, 6, dtype=torch.float64), torch.randn(1, 1, 4, dtype=torch.float64)
    said = (k[:, :, None] @ state)[:, :, 0]
    losses = {None: -(v * said).sum(), 0.3: (v - said).square().sum() / 2}
    for rate, loss in losses.items():
        (slope,) = torch.autograd.grad(loss, state, retain_graph=True)
        beta = None if rate is None else torch.full((1, 1), rate, dtype=torch.float64)
        _, written = linear_attention_step(k, k, v, beta=beta, state=state)
        torch.testing.assert_close(written, state - (1.0 if rate is None else rate) * slope)
