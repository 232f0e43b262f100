"""Prompts of functions: their scale, their families, the curriculum, and what is refused."""

from functools import partial

import pytest
import torch

from nondual.language_models.in_context_learning.functions import (
    curriculum,
    dense,
    linear,
    normal,
    prompts,
    quadratic,
    relu_network,
    sparse,
    stored,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", [linear(), linear(sparse(2)), quadratic, relu_network(13)])
def test_every_family_has_a_mean_square_of_one_and_shapes_as_told(family):
    x, y, target = prompts(4001, 7, 5, functions=family, generator=seeded())
    assert x.shape == (4001, 7, 5) and y.shape == target.shape == (4001, 7) and torch.equal(y, target)
    assert abs(target.square().mean() - 1) < 0.1


def test_a_linear_function_by_hand():
    family = linear(lambda batch, d, generator: torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
    x, y, _ = prompts(2, 3, 2, functions=family, generator=seeded())
    torch.testing.assert_close(y[0], x[0, :, 0] + 2 * x[0, :, 1])
    torch.testing.assert_close(y[1], -x[1, :, 1])


def test_noise_is_added_to_the_answers_alone():
    _, y, target = prompts(997, 11, 3, noise=0.5, generator=seeded())
    assert abs((y - target).std() - 0.5) < 0.02


def test_sparse_weights_have_as_many_that_are_not_zero_and_the_places_change():
    w = sparse(2)(501, 7, seeded())
    assert ((w != 0).sum(1) == 2).all() and ((w != 0).float().mean(0) - 2 / 7).abs().max() < 0.1


def test_stored_weights_are_rows_of_the_table_each_as_often():
    tasks = dense(3, 5, seeded(1))
    w = stored(tasks)(3001, 5, seeded())
    which = (w[:, None] == tasks).all(2)
    assert (which.sum(1) == 1).all() and (which.float().mean(0) - 1 / 3).abs().max() < 0.05


def test_a_quadratic_has_no_linear_part_and_a_relu_network_is_not_linear():
    x, y, _ = prompts(1, 50_000, 3, functions=quadratic, generator=seeded())
    assert (x[0].mT @ y[0] / 50_000).abs().max() < 0.05
    f = relu_network(5)(1, 3, seeded())
    x = torch.randn(1, 9, 3, generator=seeded(2))
    assert (f(x) + f(-x)).abs().max() > 0.1  # of a linear function both would cancel


def test_inputs_are_shifted_scaled_or_of_the_first_dimensions():
    x = normal(2003, 3, 5, seeded(), mean=2.0, scale=3.0)
    assert abs(x.mean() - 2) < 0.1 and abs(x.std() - 3) < 0.1
    x = prompts(3, 5, 7, inputs=partial(normal, dims=2), generator=seeded()).x
    assert (x[..., 2:] == 0).all() and (x[..., :2] != 0).all()


def test_the_same_seed_gives_the_same_prompts():
    one, again = (prompts(3, 5, 7, functions=relu_network(3), noise=0.1, generator=seeded(4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, again))


def test_the_curriculum_rises_from_first_to_last_and_stays_there():
    both = [curriculum(step, 100, dims=(2, 5), lengths=(6, 16), rises=0.5) for step in range(100)]
    assert both[0] == (2, 6) and set(both[50:]) == {(5, 16)} and both == sorted(both)
    assert {d for d, _ in both} == {2, 3, 4, 5}
    assert curriculum(0, 1, dims=(3, 3), lengths=(4, 4)) == (3, 4)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: prompts(0, 3, 2), "batch must be 1 or more, got 0"),
        (lambda: prompts(3, 0, 2), "n must be 1 or more, got 0"),
        (lambda: prompts(3, 3, 0), "d must be 1 or more, got 0"),
        (lambda: prompts(3, 3, 2, noise=-1.0), "noise must be a number of 0 or more, got -1.0"),
        (lambda: sparse(0), "count must be 1 or more, got 0"),
        (lambda: prompts(3, 3, 2, functions=linear(sparse(3))), "count must be at most the number of inputs, 2, got 3"),
        (lambda: stored(torch.zeros(3)), r"tasks must be \(M, D\) with M of 1 or more, got \(3,\)"),
        (lambda: stored(torch.zeros(0, 3)), r"tasks must be \(M, D\) with M of 1 or more, got \(0, 3\)"),
        (lambda: prompts(3, 3, 2, functions=linear(stored(torch.zeros(5, 3)))), "inputs, 2, got 3"),
        (lambda: relu_network(0), "hidden must be 1 or more, got 0"),
        (lambda: curriculum(3, 3, dims=(1, 2), lengths=(1, 2)), "step must lie in 0 to steps - 1, got 3 of 3"),
        (lambda: curriculum(0, 3, dims=(1, 2), lengths=(1, 2), rises=0.0), "rises must be above 0 and at most 1"),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
