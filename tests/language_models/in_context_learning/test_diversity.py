"""The exact errors of linear attention trained on few tasks: against ridge over features, samples and the limit."""

import pytest
import torch

from nondual.language_models.in_context_learning.diversity import errors, limit_errors, optimal_matrix
from nondual.language_models.in_context_learning.functions import dense, linear, prompts, stored


def tasks(m, d, seed=0):
    return dense(m, d, torch.Generator().manual_seed(seed)).double()


def sampled(functions, batch, n, d, noise, seed=1):
    """h (B, D) of the first n examples, and the question's x and answer without noise."""
    x, y, target = prompts(
        batch, n + 1, d, functions=functions, noise=noise, generator=torch.Generator().manual_seed(seed)
    )
    h = torch.einsum("bn,bnd->bd", y[:, :n], x[:, :n]) / n
    return h.double(), x[:, n].double(), target[:, n].double()


def test_one_dimension_by_hand():
    """One task w = 2, N = 1, no noise: h = 2 x², E h = 2, E h² = 12, so Γ = 4/12; the error is 4 - 2 · 4/3 + 12/9."""
    w = torch.tensor([[2.0]])
    gamma = optimal_matrix(w, 1, 0.0)
    torch.testing.assert_close(gamma, torch.tensor([[1 / 3]], dtype=torch.float64))
    assert errors(gamma, w, 1, 0.0).stored == pytest.approx(4 - 8 / 3 + 4 / 3)


def test_ridge_over_the_features_of_many_prompts_finds_the_same_matrix():
    """The features are x h, D² of them; the answers of 200,000 prompts are regressed on them directly."""
    d, n, noise, w = 3, 7, 0.5, tasks(2, 3)
    h, x, target = sampled(linear(stored(w.float())), 200_000, n, d, noise)
    features = torch.einsum("bd,be->bde", x, h).flatten(1)
    solved = torch.linalg.solve(features.mT @ features + 1e-6 * torch.eye(d * d), features.mT @ target)
    torch.testing.assert_close(solved.view(d, d), optimal_matrix(w, n, noise), atol=0.03, rtol=0)


def test_the_errors_are_those_of_sampled_prompts():
    d, n, noise, w = 5, 11, 0.5, tasks(3, 5)
    gamma = optimal_matrix(w, n, noise)
    found = errors(gamma, w, n, noise)
    for functions, exact in ((linear(stored(w.float())), found.stored), (linear(), found.new)):
        h, x, target = sampled(functions, 100_000, n, d, noise)
        off = (torch.einsum("bd,de,be->b", x, gamma, h) - target).square().mean().item()
        assert off == pytest.approx(exact, rel=0.04)


def test_no_other_matrix_does_better_on_the_stored_tasks():
    w = tasks(4, 3)
    gamma = optimal_matrix(w, 5, 0.3)
    best = errors(gamma, w, 5, 0.3).stored
    for seed in range(20):
        other = gamma + 0.1 * torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))
        assert errors(other, w, 5, 0.3).stored > best


@pytest.mark.parametrize("kappa", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_a_large_dimension_comes_near_the_limit(kappa, alpha):
    d, noise = 400, 0.5
    w = tasks(int(kappa * d), d)
    n = int(alpha * d)
    found, limit = errors(optimal_matrix(w, n, noise), w, n, noise), limit_errors(kappa, alpha, noise)
    assert found.stored == pytest.approx(limit.stored, rel=0.02) and found.new == pytest.approx(limit.new, rel=0.02)


def test_for_long_contexts_the_error_on_new_tasks_is_what_lies_outside_of_the_span_of_the_stored():
    for kappa in (0.25, 0.5, 0.9, 1.1, 2.0, 8.0):
        assert limit_errors(kappa, 1e8, 0.5).new == pytest.approx(max(0.0, 1 - kappa), abs=1e-4)
        assert limit_errors(kappa, 1e8, 0.5).stored == pytest.approx(0, abs=1e-6)


def test_m2_is_minus_the_derivative_of_m():
    """By differences: the error on stored tasks is c (1 - c m), from which m can be read off."""
    kappa, noise = 1.7, 0.4

    def m(c):
        return (1 - limit_errors(kappa, (1 + noise**2) / c, noise).stored / c) / c

    c = 0.6
    m2 = (m(c - 1e-5) - m(c + 1e-5)) / 2e-5
    new = 1 - 2 * (1 - c * m(c)) + (1 + c) * (1 - 2 * c * m(c) + c * c * m2)
    assert limit_errors(kappa, (1 + noise**2) / c, noise).new == pytest.approx(new, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda: optimal_matrix(torch.zeros(3), 1, 0.0), ValueError, r"tasks must be floating point \(M, D\)"),
        (lambda: optimal_matrix(torch.zeros(0, 3), 1, 0.0), ValueError, "tasks must be"),
        (lambda: optimal_matrix(torch.zeros(2, 3), 0, 0.0), ValueError, "n must be 1 or more, got 0"),
        (lambda: optimal_matrix(torch.zeros(2, 3), 1, -1.0), ValueError, "noise must be 0 or more, got -1.0"),
        (
            lambda: errors(torch.zeros(2, 2), torch.zeros(2, 3), 1, 0.0),
            ValueError,
            r"matrix must be \(D, D\) = \(3, 3\)",
        ),
        (lambda: limit_errors(0.0, 1.0, 0.0), ValueError, "kappa must be above 0, got 0.0"),
        (lambda: limit_errors(1.0, -1.0, 0.0), ValueError, "alpha must be above 0, got -1.0"),
        (lambda: limit_errors(1.0, 1.0, -1.0), ValueError, "noise must be 0 or more, got -1.0"),
        (lambda: errors([[1.0]], torch.zeros(2, 1), 1, 0.0), TypeError, "matrix must be a Tensor, got list"),
    ],
)
def test_what_is_refused(call, kind, said):
    with pytest.raises(kind, match=said):
        call()
