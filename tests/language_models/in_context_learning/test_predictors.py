"""The predictors in closed form: by hand, against numpy and scikit-learn's formulas, and that they are Bayes' rule."""

import numpy as np
import pytest
import torch

from nondual.language_models.in_context_learning.functions import linear, normal, prompts, stored
from nondual.language_models.in_context_learning.predictors import (
    gradient_descent,
    least_squares,
    predict,
    ridge,
    stored_tasks,
)


def drawn(batch=3, n=11, d=5, noise=0.3, **more):
    return prompts(batch, n, d, noise=noise, generator=torch.Generator().manual_seed(0), **more)


def test_one_input_by_hand():
    x, y = torch.tensor([[[2.0], [1.0], [1.0]]]), torch.tensor([[4.0, 5.0, 0.0]])
    # after one example 4 = 2 w; after two the least squares are (2·4 + 1·5) / (4 + 1)
    torch.testing.assert_close(least_squares(x, y)[0, :, 0], torch.tensor([0, 2, 13 / 5], dtype=torch.float64))
    torch.testing.assert_close(ridge(x, y, 3.0)[0, :, 0], torch.tensor([0, 8 / 7, 13 / 8], dtype=torch.float64))
    descent = gradient_descent(x, y, steps=1, rate=0.1)[0, :, 0]  # 0.1 times the mean of x y
    torch.testing.assert_close(descent, torch.tensor([0, 0.8, 0.65], dtype=torch.float64))
    weights = stored_tasks(x, y, torch.tensor([[1.0], [3.0]]), noise=1.0)[0, :, 0]
    # both are off by 2 after one example, so the mean is 2; the second is nearer to 5 at x = 1: off by 4 and by 2
    share = 1 / (1 + np.exp(-(16 - 4) / 2))
    torch.testing.assert_close(weights, torch.tensor([2, 2, 1 + 2 * share], dtype=torch.float64))
    torch.testing.assert_close(predict(weights[None, :, None], x)[0, 0], torch.tensor(4.0, dtype=torch.float64))


def test_each_place_is_solved_by_numpy_from_the_examples_before_it():
    x, y, _ = drawn()
    shortest, shrunk, slow = least_squares(x, y), ridge(x, y, 0.7), gradient_descent(x, y, steps=3, rate=0.2)
    for b in range(3):
        for i in range(11):
            X, Y = x[b, :i].double().numpy(), y[b, :i].double().numpy()
            w = np.linalg.lstsq(X, Y, rcond=None)[0] if i else np.zeros(5)
            np.testing.assert_allclose(shortest[b, i], w, atol=1e-10)
            np.testing.assert_allclose(shrunk[b, i], np.linalg.inv(X.T @ X + 0.7 * np.eye(5)) @ X.T @ Y, atol=1e-10)
            w = np.zeros(5)
            for _ in range(3):
                w = w - 0.2 * X.T @ (X @ w - Y) / max(i, 1)
            np.testing.assert_allclose(slow[b, i], w, atol=1e-12)


def test_no_place_knows_its_own_answer_or_a_later_one():
    x, y, _ = drawn()
    changed = y.clone()
    changed[:, 6:] += 100
    tasks = torch.randn(7, 5)
    for judge in (
        least_squares,
        lambda x, y: ridge(x, y, 0.1),
        lambda x, y: stored_tasks(x, y, tasks, 0.5),
        lambda x, y: gradient_descent(x, y, steps=2, rate=0.1),
    ):
        one, other = judge(x, y), judge(x, changed)
        assert torch.equal(one[:, :7], other[:, :7]) and not torch.isclose(one[:, 7], other[:, 7]).all()


def test_ridge_is_the_limit_of_stored_tasks_when_ever_more_normal_tasks_are_stored():
    """So both are the same rule of Bayes, with another prior."""
    x, y, _ = drawn(5, 7, 1, noise=0.5)
    share = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    tasks = torch.special.ndtri(share)[:, None]  # as many below any number as a normal w is likely to be
    torch.testing.assert_close(stored_tasks(x, y, tasks, 0.5), ridge(x, y, 0.25), atol=1e-3, rtol=0)


def test_each_bayesian_has_the_least_error_on_what_it_believes_in():
    d, noise, tasks = 5, 0.5, torch.randn(4, 5, generator=torch.Generator().manual_seed(2)) / 5**0.5
    for functions, mine in ((linear(), "ridge"), (linear(stored(tasks)), "stored")):
        x, y, target = drawn(4000, 9, d, noise, functions=functions)
        weights = {
            "ridge": ridge(x, y, noise**2 * d),
            "stored": stored_tasks(x, y, tasks, noise),
            "least squares": least_squares(x, y),
            "descent": gradient_descent(x, y, steps=2, rate=0.3),
        }
        off = {name: (predict(w, x) - target).square().mean().item() for name, w in weights.items()}
        assert min(off, key=lambda name: off[name]) == mine, off


def test_descent_ends_at_least_squares_and_ridge_with_a_small_penalty_does_too():
    x, y, _ = drawn(3, 23, 3)
    exact = least_squares(x, y)[:, 12:]
    torch.testing.assert_close(gradient_descent(x, y, steps=2000, rate=0.3)[:, 12:], exact)
    torch.testing.assert_close(ridge(x, y, 1e-9)[:, 12:], exact)
    assert (gradient_descent(x, y, steps=0, rate=0.3) == 0).all()


def test_each_place_may_have_a_rate_of_its_own():
    x, y, _ = drawn()
    rates = torch.linspace(0.1, 0.5, 11)
    together = gradient_descent(x, y, steps=3, rate=rates)
    for i in (0, 4, 10):
        torch.testing.assert_close(together[:, i], gradient_descent(x, y, steps=3, rate=rates[i].item())[:, i])
    with pytest.raises(ValueError, match=r"rate must be a number or \(N,\) = \(11,\), got \(7,\)"):
        gradient_descent(x, y, steps=3, rate=rates[:7])


def test_lengths_of_one_and_other_dtypes():
    x, y, _ = drawn(2, 1, 3)
    assert all((w == 0).all() for w in (least_squares(x, y), ridge(x, y, 1.0), gradient_descent(x, y, steps=1, rate=1)))
    torch.testing.assert_close(stored_tasks(x, y, x[0], 0.5)[0, 0], x[0, 0].double())
    x, y = normal(2, 7, 3).to(torch.bfloat16), torch.randn(2, 7).to(torch.bfloat16)
    assert ridge(x, y, 1.0).dtype == torch.float64
    assert torch.equal(ridge(x, y, 1.0), ridge(x.float(), y.float(), 1.0))


X, Y = torch.randn(2, 5, 3), torch.randn(2, 5)


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda: least_squares(X[0], Y), ValueError, r"x must be floating point \(B, N, D\)"),
        (lambda: least_squares(X.long(), Y), ValueError, "x must be floating point"),
        (lambda: ridge(X, Y[:, 1:], 1.0), ValueError, r"y must be floating point \(B, N\) = \(2, 5\)"),
        (lambda: ridge(X, Y, 0.0), ValueError, "penalty must be above 0, got 0.0; for none use least_squares"),
        (lambda: stored_tasks(X, Y, X[0, :, :2], 1.0), ValueError, r"tasks must be \(M, 3\)"),
        (lambda: stored_tasks(X, Y, X[0], 0.0), ValueError, "noise must be above 0, got 0.0"),
        (lambda: gradient_descent(X, Y, steps=-1, rate=1.0), ValueError, "steps must be 0 or more, got -1"),
        (lambda: least_squares([1.0], Y), TypeError, "x must be a Tensor, got list"),
        (lambda: stored_tasks(X, Y, [[1.0]], 1.0), TypeError, "tasks must be a Tensor, got list"),
    ],
)
def test_what_is_refused(call, kind, said):
    with pytest.raises(kind, match=said):
        call()
