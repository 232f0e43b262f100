"""The Mamba block: by hand, against mambapy's, and the claims about it. Its laws are in test_mamba_laws.py."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mamba_cases import WIDTH, B, assert_close, block, gradients, mambapys_block, sequence

from nondual.efficient_attention.mamba import Mamba
from nondual.ops.selective_scan import selective_scan, selective_scan_matrix

MEASURED = Path(__file__).parents[2] / "docs/measured/selection.json"

# --- what it computes ----------------------------------------------------------------------------------------------


def test_a_case_by_hand():
    """One channel, one state, a window of one step: all weights 1, but Δ's, which make it softplus(0) = ln 2."""
    mamba = Mamba(1, d_state=1, d_conv=1, expand=1, dt_rank=1, conv_bias=False)
    with torch.no_grad():
        for weight in (mamba.in_proj, mamba.conv1d, mamba.x_proj, mamba.out_proj):
            weight.weight.fill_(1)
        mamba.dt_proj.weight.zero_(), mamba.dt_proj.bias.zero_()
    assert mamba.A_log.item() == 0 and mamba.D.item() == 1  # A = -1, so that half of the state stays: exp(-ln 2)
    h, expected = 0.0, []
    for x in (1.0, -2.0, 3.0):
        u = gate = x / (1 + math.exp(-x))  # silu; B = C = u
        h = h / 2 + math.log(2) * u * u
        expected.append((u * h + u) * gate)
    y = mamba(torch.tensor([[[1.0], [-2.0], [3.0]]]))
    torch.testing.assert_close(y.flatten(), torch.tensor(expected))


@pytest.mark.parametrize(
    "more",
    [dict(), dict(expand=1, d_state=1), dict(d_conv=2, bias=True), dict(conv_bias=False), dict(d_conv=1, dt_rank=3)],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 2, 11])
def test_it_is_mambapys_block_forward_and_backward(more, length, in_float64):
    ours = block("mamba", **more)
    theirs = mambapys_block(ours)
    ours.load_state_dict(theirs.state_dict())
    x, g = sequence("mamba", length), torch.randn(B, length, WIDTH["mamba"], dtype=torch.float64)
    y = ours(x)
    with in_float64:  # mambapy narrows A and D to float32
        judged = theirs(x)
    torch.testing.assert_close(y, judged, atol=1e-13, rtol=1e-13)
    assert_close(gradients(ours, x, y, g), gradients(theirs, x, judged, g))


def test_it_begins_as_the_released_code_does():
    torch.manual_seed(0)
    mamba = Mamba(256)
    assert mamba.dt_rank == 16 and mamba.d_inner == 512
    torch.testing.assert_close(-mamba.A_log.exp(), -torch.arange(1.0, 17).expand(512, 16))
    assert torch.equal(mamba.D, torch.ones(512))
    delta = F.softplus(mamba.dt_proj.bias.double())
    assert 0.001 <= delta.min() * 1.001 and delta.max() <= 0.1 * 1.001
    spread = (delta.log() - math.log(0.001)) / math.log(100)  # uniform on [0, 1]: every tenth holds about a tenth
    counts = torch.histc(spread.float(), 10, 0, 1)
    assert counts.sum() == 512 and counts.min() > 25
    assert mamba.dt_proj.weight.abs().max() <= 16**-0.5


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(d_model=0), r"d_model must be 1 or more, got 0"),
        (dict(d_state=0), r"d_state must be 1 or more, got 0"),
        (dict(d_conv=0), r"d_conv must be 1 or more, got 0"),
        (dict(expand=0.1), r"d_inner must be 1 or more, got 0"),
        (dict(dt_rank=0), r"dt_rank must be 1 or more, got 0"),
        (dict(dt_min=0.2), r"dt_min and dt_max must be in order and above 0, got 0.2 and 0.1"),
        (dict(dt_min=0.0), r"dt_min and dt_max must be in order and above 0, got 0.0 and 0.1"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(ValueError, match=says):
        Mamba(**(dict(d_model=WIDTH["mamba"]) | settings))


# --- the claims ----------------------------------------------------------------------------------------------------


@pytest.mark.claim("A4.12", "holds if")
def test_the_transition_follows_the_content_and_the_continuous_A_does_not():
    """Both readings of the printed A, seen from outside: two states put into the block tell the transition of a step.

    As the discrete transition exp(Δ_t A) it follows the content, and so do B and C. As the continuous A it does not:
    whatever is read, the logarithms of a channel's transitions stand to each other as the entries of the parameter A,
    so that the content chooses one number for each channel, the step Δ_t.
    """
    torch.manual_seed(0)
    mixer = Mamba(6, d_state=5).double()
    A = -mixer.A_log.detach().exp()
    x = torch.randn(2, 40, 6, dtype=torch.float64)
    transitions = []
    for t in range(40):
        after = []
        for fill in (0.0, 1.0):
            cache = mixer.new_cache(2)
            cache.state = torch.full_like(cache.state, fill)
            mixer.step(x[:, t], cache)
            after.append(cache.state.detach())
        transitions.append((after[1] - after[0]).log())  # (B, D, S): Δ_t A
    transitions = torch.stack(transitions)
    assert (transitions.std((0, 1)) > 1e-3 * transitions.abs().mean((0, 1))).all(), "the transition follows the content"
    steps = transitions / A
    torch.testing.assert_close(steps, steps[..., :1].expand_as(steps), rtol=1e-6, atol=0)  # A itself does not
    u = torch.randn(1, 9, 12, dtype=torch.float64)
    for one, other in zip(mixer.select(u), mixer.select(-u)):
        assert ((one - other).abs().amax(-1) > 1e-6).all(), "Δ, B and C are made from the content"


def test_the_recurrence_as_printed_is_linear_and_knows_no_time():
    """With A, B and C constant it weighs by age alone; with B, C and Δ from the content it does not even scale."""
    torch.manual_seed(0)
    W = [torch.randn(3, n, dtype=torch.float64) for n in (3, 4, 4)]
    A, B, C = -torch.rand(3, 4).double(), torch.randn(3, 4).double(), torch.randn(3, 4).double()

    def printed(u):
        return selective_scan(u, torch.ones_like(u), A, B, C)[0]

    def selective(u):
        return selective_scan(u, u @ W[0], A, u @ W[1], u @ W[2], delta_softplus=True)[0]

    u, v = torch.randn(2, 1, 30, 3, dtype=torch.float64)
    late = torch.cat([torch.zeros(1, 5, 3), u], 1)
    torch.testing.assert_close(printed(2 * u + v), 2 * printed(u) + printed(v))
    torch.testing.assert_close(printed(late)[:, 5:], printed(u))
    assert not torch.allclose(selective(2 * u), 2 * selective(u), rtol=0.1)


@pytest.mark.claim("A4.13", "holds if")
def test_the_state_integrates_the_whole_past_and_only_selection_chooses_what_stays():
    """Every input keeps a weight, and finer steps come to the integral at the rate of theory. Of real values N numbers
    tell no more than N apart, and of digits one number holds many. In float32 an input whose decay has grown large is
    lost, and one after which the steps are zero is kept. Of two twins, tuned alike, only the selective one holds what
    matters past the length it was trained at."""
    torch.manual_seed(0)
    mixer = Mamba(4, d_state=4).double()
    u = torch.randn(1, 300, 8, dtype=torch.float64)
    delta, B, C = mixer.select(u)
    A = -mixer.A_log.exp()
    M = selective_scan_matrix(delta, A, B, C, None, mixer.dt_proj.bias, True)
    assert (M[0, :, torch.tril(torch.ones(300, 300)).bool()] != 0).all(), "nothing in the past is without weight"
    M = selective_scan_matrix(torch.zeros_like(delta), A, -A, A, None, mixer.dt_proj.bias, True)
    torch.testing.assert_close(M[..., 1:, 1:], M[..., :-1, :-1])  # nothing selected: by age alone

    far = torch.zeros(1, 400, 1)
    far[0, 0] = 1
    one, steps = torch.ones(1, 1), torch.ones(1, 400, 1)
    assert selective_scan(far, steps, -one, one, one)[1] == 0, "in float32 the far past is gone"
    assert selective_scan(far, far, -one, one, one)[1] == 1, "where the later steps are zero it is kept"
    digits = torch.randint(10, (12,)).tolist()
    tenth, ones = torch.full((1, 1), -math.log(10), dtype=torch.float64), torch.ones(1, 12, 1).double()
    _, h = selective_scan(torch.tensor(digits).view(1, 12, 1).double(), ones, tenth, one.double(), one.double())
    held = f"{round(h.item() * 10**11):012d}"
    assert [int(d) for d in reversed(held)] == digits, "one number tells twelve digits, the latest first"
    assert selective_scan(far.double(), steps.double(), -one.double(), one.double(), one.double())[1] > 0

    def error(n, rule, at):  # a bump at 1, of width σ, through h' = -a h + u, to a time when it still pushes
        a, sigma, T = 2.0, 0.2, 1.2
        t = T / n * (torch.arange(n).double() + at)
        bump = torch.exp(-((t - 1) ** 2) / (2 * sigma**2)).view(1, n, 1)
        one = torch.ones(1, 1).double()
        _, h = selective_scan(
            bump, torch.full_like(bump, T / n), -a * one, one, one, discretization=rule, impl="reference"
        )
        root = sigma * math.sqrt(2)
        exact = math.exp(-a * (T - 1) + (a * sigma) ** 2 / 2) * sigma * math.sqrt(math.pi / 2)
        exact *= math.erf((T - 1 - a * sigma**2) / root) + math.erf((1 + a * sigma**2) / root)
        return abs(h.item() - exact)

    for rule, at, order in (("zoh-euler", 0.0, 1), ("zoh-euler", 1.0, 1), ("zoh", 1.0, 1), ("zoh", 0.5, 2)):
        slope = math.log2(error(200, rule, at) / error(800, rule, at)) / 2
        assert abs(slope - order) < 0.1, (rule, at, slope)

    check_that_n_numbers_hold_no_more_than_n()

    found = json.loads(MEASURED.read_text())["figures"]
    selective, twin = found["models"].values()
    for model in (selective, twin):
        rates = [float(rate) for rate in model["rates"]]
        assert min(rates) < model["rate"] < max(rates) and len(model["runs"]) == 8
    trained, twice, four_times = found["selective less time-invariant"]
    assert statistics.median(run["right"][0] for run in selective["runs"]) > 0.95
    assert statistics.median(run["right"][1] for run in selective["runs"]) > 0.9
    assert twice["interval"][0] > 0 and four_times["interval"][0] > 0, (trained, twice, four_times)


def check_that_n_numbers_hold_no_more_than_n(N=4):
    """The steps that a text chose, one channel: N values are told again from the N states, of N + 1 not all can be."""
    torch.manual_seed(0)
    delta, B = torch.rand(1, N + 1, 1).double() + 0.5, torch.randn(1, N + 1, N).double()
    A = -torch.arange(1.0, N + 1).double()[None]

    def state(u):  # (any number of pasts, length) -> (pasts, N)
        length = u.shape[1]
        given = (x[:, -length:].expand(len(u), -1, -1) for x in (delta, B))
        step, into = given
        return selective_scan(u[..., None], step, A, into, into)[1][:, 0]

    into = state(torch.eye(N).double()).T  # (N, values): from the past to the state
    assert torch.linalg.matrix_rank(into) == N
    values = torch.randn(1, N).double()
    torch.testing.assert_close(torch.linalg.solve(into, state(values)[0]), values[0])  # N can be recovered
    into = state(torch.eye(N + 1).double()).T
    assert torch.linalg.matrix_rank(into) == N
    unseen = torch.linalg.svd(into).Vh[-1:]  # a past of length 1 that leaves a state of zero
    values = torch.randn(1, N + 1).double()
    assert unseen.norm() > 0.99
    torch.testing.assert_close(state(values + 5 * unseen), state(values))  # two pasts, one state: nobody can say which


@pytest.mark.claim("A4.14", "holds if")
def test_no_table_is_made_and_yet_c_and_b_do_what_a_query_and_a_key_do(largest):
    """No tensor of a layer has L x L numbers, forward or backward. But its output is a matrix times its inputs, and the
    entries are C_t · (decays) B_s Δ_s: C_t made from the position that reads, B_s and Δ_s from the one that is read."""
    torch.manual_seed(0)
    L, mixer = 2048, Mamba(6, d_state=5)
    x = torch.randn(1, L, 6, requires_grad=True)
    assert largest(lambda: mixer(x).sum().backward()) < L * L / 10, "the matrix is made nowhere"

    L, K, mixer = 30, 4, mixer.double()
    x = torch.randn(2, L, 6, dtype=torch.float64)
    seen = []
    select = mixer.select
    mixer.select = lambda u: seen.append((u, select(u))) or seen[-1][1]
    out = mixer(x)
    u, (delta, B, C) = seen[0]
    A = -mixer.A_log.exp()

    def matrix(delta, B, C, skip=None):
        return selective_scan_matrix(delta, A, B, C, skip, mixer.dt_proj.bias, True)

    # Its output is the matrix times the inputs.
    M = matrix(delta, B, C, mixer.D)
    assert torch.equal(M, M.tril())
    by_matrix = torch.einsum("bdts,bsd->btd", M, u) * F.silu(mixer.in_proj(x).chunk(2, -1)[1])
    torch.testing.assert_close(mixer.out_proj(by_matrix), out)

    # Who makes what: at p, Δ, B and C come of the token at p and, by the short convolution, of the K - 1 before it.
    p = 11
    other = x.clone()
    other[:, p] = torch.randn(2, 6, dtype=torch.float64)
    mixer(other)
    elsewhere = [t for t in range(L) if not p <= t < p + K]
    for before, after in zip((delta, B, C), seen[-1][1]):
        moved = (before != after).any(-1)  # (B, L)
        assert moved[:, p : p + K].all() and not moved[:, elsewhere].any()

    # A query moves its row, a key its column, each alone; a step weighs a column, and fades what passes over it.
    M = matrix(delta, B, C)
    lower = torch.ones(L, L, dtype=torch.bool).tril()
    row, column, past = (torch.zeros(L, L, dtype=torch.bool) for _ in range(3))
    row[p], column[:, p], past[p:, : p + 1] = True, True, True
    put = lambda old, new: torch.cat([old[:, :p], new[:, p : p + 1], old[:, p + 1 :]], 1)  # noqa: E731
    delta_, B_, C_ = seen[-1][1]
    for swapped, reached in (((delta, B, put(C, C_)), row), ((delta, put(B, B_), C), column)):
        assert torch.equal((matrix(*swapped) != M).all(0).all(0), reached & lower)
    assert torch.equal((matrix(put(delta, delta_), B, C) != M).all(0).all(0), past & lower)

    # Where a channel's states share one rate, the decays come out of the sum: queries times keys, under one mask.
    step = F.softplus(delta + mixer.dt_proj.bias)
    time = step.cumsum(1)
    fade = torch.exp(-(time[:, :, None] - time[:, None]).clamp(min=0)).movedim(-1, 1).tril()  # (B, D, t, s)
    linear = (C @ B.mT)[:, None] * fade * step.mT[:, :, None]  # the step weighs the value
    shared = selective_scan_matrix(step, -torch.ones(12, 5).double(), B, C)
    torch.testing.assert_close(shared, linear)
