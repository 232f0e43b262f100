"""One step of a continuous system, by the three rules."""

import math

import pytest
import torch

from nondual.ops.discretize import discretize, phi, step_length


def by_rule(delta, a, b, rule):
    """The formulas, with plain numbers."""
    step = delta * a
    if rule == "bilinear":
        return (1 + step / 2) / (1 - step / 2), delta * b / (1 - step / 2)
    if rule == "zoh":
        return math.exp(step), (math.exp(step) - 1) / a * b
    return math.exp(step), delta * b


@pytest.mark.parametrize("rule", ["zoh-euler", "zoh", "bilinear"])
@pytest.mark.parametrize("delta, a, b", [(0.5, -1.0, 2.0), (3.0, -0.7, -1.0), (0.01, 0.3, 1.0)])
def test_by_hand(rule, delta, a, b):
    given = (torch.tensor(x, dtype=torch.float64) for x in (delta, a, b))
    made = torch.stack(discretize(*given, rule))
    torch.testing.assert_close(made, torch.tensor(by_rule(delta, a, b, rule), dtype=torch.float64))


def test_zero_order_hold_is_exact_where_the_input_is_constant():
    """Two half steps are one whole step, for any constant input."""
    A, B = torch.tensor([-1.3, 0.4], dtype=torch.float64), torch.tensor([0.7, 2.0], dtype=torch.float64)
    half, whole = (discretize(torch.tensor(d, dtype=torch.float64), A, B, "zoh") for d in (0.25, 0.5))
    h, u = torch.tensor([1.0, -2.0], dtype=torch.float64), 3.0
    twice = half[0] * (half[0] * h + half[1] * u) + half[1] * u
    torch.testing.assert_close(twice, whole[0] * h + whole[1] * u)


def test_a_complex_diagonal():
    A, B = torch.tensor([-0.5 + 2j]), torch.tensor([1.0 + 0j])
    A_bar, B_bar = discretize(torch.tensor(0.1), A, B, "zoh")
    torch.testing.assert_close(A_bar, torch.exp(0.1 * A))
    torch.testing.assert_close(B_bar, (torch.exp(0.1 * A) - 1) / A)


def test_phi_near_zero_and_far_from_it():
    """(eˣ - 1) / x without cancellation, across the switch from the series at 0.1; and its derivative ½ at 0."""
    x = torch.tensor([-3.0, -0.1001, -0.0999, -1e-9, 0.0, 1e-9, 0.0999, 0.1001, 3.0], dtype=torch.float64)
    expected = torch.tensor([math.expm1(v) / v if v else 1.0 for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(phi(x), expected, atol=0, rtol=1e-14)
    assert torch.autograd.gradcheck(phi, x.requires_grad_())
    (slope,) = torch.autograd.grad(phi(zero := torch.zeros((), requires_grad=True)), zero)
    assert slope == 0.5


def test_step_lengths():
    delta, bias = torch.tensor([[-1.0, 2.0]]), torch.tensor([0.5, -0.5])
    assert torch.equal(step_length(delta), delta)
    assert torch.equal(step_length(delta, bias), delta + bias)
    torch.testing.assert_close(step_length(delta, bias, softplus=True), torch.log1p(torch.exp(delta + bias)))
