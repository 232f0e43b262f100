"""What the tests of kernels are judged by is right itself."""

import pytest
import torch
from harness import DRAWS, LAYOUTS, Error, ErrorBudget, addresses, check, errors, half_a_place, laid, with_signs


def test_errors_by_hand():
    exact = {"y": torch.tensor([1.0, -4.0], dtype=torch.float64), "empty": torch.zeros(0)}
    ours = {"y": torch.tensor([1.0, -4.5]), "empty": torch.zeros(0)}
    plain = {"y": torch.tensor([1.25, -4.0]), "empty": torch.zeros(0)}
    found = errors(ours, plain, exact, floor=lambda truth, dtype: truth.abs().max() / 64)
    assert found == {"y": Error(ours=0.5, plain=0.25, floor=0.0625)}
    worse = {"y": exact["y"] + 0.125}, {"y": torch.zeros(2, dtype=torch.float64)}
    found = errors(ours, plain, exact, draws=[worse])
    assert found["y"].plain == 3.875, "the worst of plain PyTorch's draws counts"
    assert found["y"].floor == float(half_a_place(exact["y"], torch.float32)) == 2.0**-22 + 4 * 2.0**-20


def test_a_result_that_is_too_far_off_is_named():
    found = {"y": Error(2.1, 1.0, 0.2), "dx": Error(3.1, 1.0, 0.2)}
    check(found, outputs={"y"})
    with pytest.raises(AssertionError, match=r"dx: off by 3\.1e\+00, allowed 2\.2e\+00"):
        check(found, outputs={"y", "dx"})
    with pytest.raises(AssertionError, match="y: off by"):
        check(found | {"y": Error(2.3, 1.0, 0.2)}, outputs={"y"})
    with pytest.raises(AssertionError, match="y is not finite"):
        errors(*({"y": torch.tensor([x])} for x in (torch.nan, 1.0, 1.0)))
    with pytest.raises(AssertionError, match=r"y: \(2,\), wanted \(3,\)"):
        errors(*({"y": torch.ones(n)} for n in (2, 3, 3)))


def test_one_unlucky_draw_is_not_held_against_us_and_a_lasting_error_is():
    """In the draw where plain PyTorch is exact by luck we may be off by what it is off by elsewhere."""
    budget = ErrorBudget()
    exact = torch.ones(3, dtype=torch.float64)
    for seed in range(DRAWS):
        plain = 1.0 if seed == 2 else 1.01
        budget.add("y", ours=torch.full((3,), 1.015), plain=torch.full((3,), plain), exact=exact)
    budget.check(2)
    with pytest.raises(AssertionError, match=r"y: off by 1\.5e-02, allowed 1\.2e-02; .*plain=0\.00999"):
        budget.check({"y": 1.2})


def test_a_complex_error_counts_whole():
    budget, exact = ErrorBudget(), torch.ones(1, dtype=torch.complex128)
    for _ in range(DRAWS):
        budget.add("state", ours=(exact + 0.03j).to(torch.complex64), plain=exact + 0.01, exact=exact)
    budget.check(4)
    with pytest.raises(AssertionError, match=r"state: off by 3\.0e-02, allowed 2\.0e-02; .*plain=0\.01"):
        budget.check(2)


def test_a_budget_wants_several_draws_and_a_factor_and_sees_a_nan():
    budget, one = ErrorBudget(), torch.ones(1)
    with pytest.raises(AssertionError, match="nothing was added"):
        budget.check(2)
    for _ in range(DRAWS - 1):
        budget.add("y", ours=one, plain=one, exact=one)
    with pytest.raises(AssertionError, match="4 draws; an error is judged over 5 or more"):
        budget.check(2)
    budget.add("y", ours=one * torch.nan, plain=one, exact=one)
    with pytest.raises(AssertionError, match="no factor"):
        budget.check({"x": 2})
    with pytest.raises(AssertionError, match="off by nan"):
        budget.check(2)
    with pytest.raises(AssertionError, match=r"shape \(2,\), wanted \(1,\)"):
        budget.add("z", ours=torch.ones(2), plain=one, exact=one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_keeps_the_shape_and_but_for_repeated_parts_the_numbers(layout):
    x = torch.randn(2, 3, 4, 5)
    other = laid(x, layout)
    assert other.shape == x.shape and not other.isnan().any()
    assert torch.equal(other, x) or 0 in other.stride()
    assert (layout == "plain") == (other.stride() == x.stride() and other.storage_offset() == 0)
    assert len(addresses(other).unique()) == (x.numel() if 0 not in other.stride() else other.unique().numel())


def test_other_signs_of_the_same_numbers():
    x = torch.randn(50, dtype=torch.float16)
    one, other = with_signs(x, 1), with_signs(x, 2)
    assert torch.equal(one.abs(), x.abs()) and torch.equal(other.abs(), x.abs()) and not torch.equal(one, other)
