"""Coins: Bayes' rule by hand and by integration, and that flips come from coins of the prior."""

import pytest
import torch

from nondual.language_models.in_context_learning.coins import (
    BEGIN,
    HEAD,
    TAIL,
    VOCABULARY,
    divergence,
    flips,
    posterior_predictive,
)


def test_laplace_s_rule_by_hand():
    ids = torch.tensor([[BEGIN, HEAD, HEAD, TAIL]])
    expected = torch.tensor([[1 / 2, 2 / 3, 3 / 4, 3 / 5]], dtype=torch.float64)
    torch.testing.assert_close(posterior_predictive(ids), expected)


def test_it_is_bayes_rule_integrated_over_every_bias():
    a, b = 2.5, 1.5
    ids = torch.tensor([[BEGIN, HEAD, TAIL, HEAD, HEAD]])
    bias = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    prior = bias ** (a - 1) * (1 - bias) ** (b - 1)
    likelihood = torch.cat([torch.ones(1, 200_000), torch.stack([bias, 1 - bias, bias, bias]).cumprod(0)])
    belief = prior * likelihood  # after 0 to 4 flips
    expected = (belief * bias).sum(1) / belief.sum(1)
    torch.testing.assert_close(posterior_predictive(ids, a=a, b=b)[0], expected, atol=1e-6, rtol=0)


def test_what_was_believed_is_what_happens():
    """Of all flips that were given a probability of about p, a share of about p were heads."""
    ids = flips(20_000, 7, a=2.0, b=5.0, generator=torch.Generator().manual_seed(0))
    believed, happened = posterior_predictive(ids, a=2.0, b=5.0)[:, :-1], (ids[:, 1:] == HEAD).double()
    for low in (0.1, 0.2, 0.3, 0.4):
        chosen = (believed >= low) & (believed < low + 0.1)
        assert abs(happened[chosen].mean() - believed[chosen].mean()) < 0.02


def test_flips_have_the_mean_and_the_spread_of_their_prior():
    ids = flips(20_000, 50, a=2.0, b=6.0, generator=torch.Generator().manual_seed(0))
    assert ids.shape == (20_000, 51) and (ids[:, 0] == BEGIN).all() and ids[:, 1:].max() == HEAD < VOCABULARY
    share = (ids[:, 1:] == HEAD).double().mean(1)
    bias = torch.distributions.Beta(2.0, 6.0)
    assert abs(share.mean() - bias.mean) < 0.005
    expected = bias.variance + (bias.mean - bias.mean**2 - bias.variance) / 50
    assert abs(share.var() - expected) < 0.002
    again = flips(20_000, 50, a=2.0, b=6.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ids, again)


def test_the_divergence_is_zero_for_the_exact_answer_and_by_hand_elsewhere():
    exact = torch.tensor([0.3, 0.9], dtype=torch.float64)
    scores = torch.stack([1 - exact, exact, torch.zeros(2)], -1).log()
    torch.testing.assert_close(divergence(exact, scores), torch.zeros(2, dtype=torch.float64))
    even = torch.zeros(2, 3)  # a third for each token
    by_hand = [0.3 * torch.log(torch.tensor(0.9)) + 0.7 * torch.log(torch.tensor(2.1))]
    torch.testing.assert_close(divergence(exact, even)[0], by_hand[0].double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda: flips(0, 3), ValueError, "batch must be 1 or more, got 0"),
        (lambda: flips(3, 0), ValueError, "n must be 1 or more, got 0"),
        (lambda: flips(3, 3, a=0.0), ValueError, "a and b must be above 0, got 0.0 and 1.0"),
        (lambda: posterior_predictive(torch.tensor([[HEAD, TAIL]])), ValueError, "ids must be integers"),
        (lambda: posterior_predictive(torch.tensor([[BEGIN, BEGIN]])), ValueError, "2 and then flips"),
        (lambda: posterior_predictive(torch.tensor([[2.0, 1.0]])), ValueError, "got torch.float32"),
        (lambda: posterior_predictive([[2, 1]]), TypeError, "ids must be a Tensor, got list"),
    ],
)
def test_what_is_refused(call, kind, said):
    with pytest.raises(kind, match=said):
        call()
