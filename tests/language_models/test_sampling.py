"""The next token from scores: top-k and top-p against plain formulas, and what they refuse."""

import pytest
import torch

from nondual.language_models.sampling import check_sampling, choose

DRAWS = 20_000


def shares(scores, **settings):
    """How often each token is drawn."""
    rows = torch.tensor(scores).expand(DRAWS, -1)
    settings = dict(temperature=1.0, top_k=None) | settings
    drawn = choose(rows, generator=torch.Generator().manual_seed(0), **settings)
    return torch.bincount(drawn, minlength=len(scores)) / DRAWS


def nucleus(scores, top_p, temperature=1.0):
    """Holtzman et al. 2020, equations 2 and 3, one token after another."""
    probabilities = (torch.tensor(scores) / temperature).softmax(-1)
    kept, total = torch.zeros_like(probabilities), 0.0
    for i in probabilities.argsort(descending=True):
        kept[i] = probabilities[i]
        total += probabilities[i].item()
        if total >= top_p:
            break
    return kept / kept.sum()


def assert_near(found, expected):
    assert (found - expected).abs().max() < 4 * (0.25 / DRAWS) ** 0.5  # four standard deviations of a share
    assert not found[expected == 0].any()


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.6, 0.85, 0.95, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_top_p_is_the_papers_formula(top_p, temperature):
    scores = [0.3, -1.0, 2.0, 1.1, -0.4, 1.9]
    assert_near(shares(scores, top_p=top_p, temperature=temperature), nucleus(scores, top_p, temperature))


def test_top_p_by_hand():
    """Shares of a half, a quarter and two eighths: three quarters are reached by two tokens."""
    scores = torch.tensor([0.125, 0.5, 0.125, 0.25]).log().tolist()
    assert_near(shares(scores, top_p=0.74), torch.tensor([0, 2 / 3, 0, 1 / 3]))
    assert_near(shares(scores, top_p=0.49), torch.tensor([0.0, 1.0, 0.0, 0.0]))


def test_top_p_is_taken_of_what_top_k_leaves():
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert_near(shares(scores, top_k=2, top_p=0.57), torch.tensor([1.0, 0, 0, 0]))  # 4/7 of what is left
    assert_near(shares(scores, top_k=2, top_p=0.58), torch.tensor([4 / 7, 3 / 7, 0, 0]))


def test_narrow_scores_and_scores_of_no_chance():
    rows = torch.tensor([[0.0, 1.0, -torch.inf]], dtype=torch.bfloat16).expand(1000, -1)
    drawn = choose(rows, 1.0, None, torch.Generator().manual_seed(0), top_p=1.0)
    assert drawn.dtype == torch.int64 and drawn.unique().tolist() == [0, 1]
    assert choose(rows, None, None).unique().tolist() == [1]


@pytest.mark.parametrize(
    "settings, says",
    [
        ((0.0, None, None), "temperature must be above 0, got 0.0; leave it out to take the likeliest"),
        ((None, 3, None), "top_k must be 1 or more and go with a temperature, got 3 and None"),
        ((1.0, 0, None), "top_k must be 1 or more and go with a temperature, got 0 and 1.0"),
        ((None, None, 0.5), r"top_p must be in \(0, 1\] and go with a temperature, got 0.5 and None"),
        ((1.0, None, 0.0), r"top_p must be in \(0, 1\] and go with a temperature, got 0.0 and 1.0"),
        ((1.0, None, 1.5), r"top_p must be in \(0, 1\] and go with a temperature, got 1.5 and 1.0"),
        ((1.0, None, float("nan")), r"top_p must be in \(0, 1\] and go with a temperature, got nan and 1.0"),
    ],
)
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(ValueError, match=says):
        check_sampling(*settings)
    check_sampling(0.7, 5, 0.9)
    check_sampling(None, None, None)
