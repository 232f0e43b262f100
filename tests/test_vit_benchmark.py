"""benchmarks/vit*.py: that they run, what the pictures, the models and the measures are, and how rates are chosen."""

import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import vit, vit_dinov2, vit_inside, vit_run
from benchmarks.vit import ARMS, BETWEEN, SEEDS, SIZES, SWEEP_SEED, Plan, best_of, cells, multiply_adds, sweep
from benchmarks.vit_inside import Moves, mirrored, nearest_is, next_to, of_moves, rank_correlation, states_of
from benchmarks.vit_run import (
    Pictures,
    Run,
    Task,
    augment,
    batches,
    carry_out,
    model_of,
    reorder,
    shuffled,
    shuffled_order,
    subset,
    task_of,
)
from nondual.analysis import patch_distances


@pytest.fixture(autouse=True)
def threads():
    """As many threads after a test as before it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def size(model: nn.Module) -> int:
    return sum(x.numel() for x in model.parameters())


def made_up(count: int = 40) -> Task:
    """A task of 28 x 28 with two classes that a mean tells apart."""
    draw = torch.Generator().manual_seed(3)
    y = torch.arange(count) % 2
    x = torch.randn(count, 1, 28, 28, generator=draw) + y[:, None, None, None]
    return Task(Pictures(x, y), Pictures(x, y), Pictures(x, y), 7, 2, True, True)


# --- pictures ------------------------------------------------------------------------------------------------------


def test_the_parts_of_both_tasks_share_no_picture_and_have_mean_0_and_variance_1():
    for name, counts in (("fashion", (55_000, 5_000, 10_000)), ("digits", (1197, 200, 400))):
        task = task_of(name)
        assert tuple(len(part.y) for part in (task.train, task.tune, task.test)) == counts and task.grid == 4
        assert abs(task.train.x.mean()) < 1e-3 and abs(task.train.x.std() - 1) < 1e-3
    seen = {x.numpy().tobytes() for x in task_of("digits").train.x}
    assert not any(x.numpy().tobytes() in seen for x in task_of("digits").test.x)


def test_patches_are_put_into_another_order_and_back():
    x = torch.arange(2 * 1 * 8 * 8.0).view(2, 1, 8, 8)
    order = shuffled_order(16)
    assert sorted(order.tolist()) == list(range(16)) and order.tolist() != list(range(16))
    y = reorder(x, 2, order)
    top, left = (2 * at for at in divmod(int(order[5]), 4))  # place 5 shows the patch that stood at order[5]
    torch.testing.assert_close(y[:, :, 2:4, 2:4], x[:, :, top : top + 2, left : left + 2])
    torch.testing.assert_close(reorder(y, 2, order.argsort()), x)
    task = shuffled(made_up())
    torch.testing.assert_close(task.shown(task.test.x), reorder(task.test.x, 7, shuffled_order(16)))
    pixels = torch.tensor([2, 0, 3, 1])
    z = reorder(x, 2, torch.arange(16), pixels)
    torch.testing.assert_close(z[:, :, 4:6, 2:4].flatten(2), x[:, :, 4:6, 2:4].flatten(2)[..., pixels])


@torch.no_grad()
def test_no_order_of_patches_or_pixels_matters_to_a_vision_transformer_whose_weights_follow():
    """What the shuffled arms rest on: the function that a ViT learns of pictures it can learn of shuffled ones."""
    task = shuffled(made_up(), pixels=True)
    assert task.order is not None and task.pixels is not None
    torch.manual_seed(0)
    model = vit_run.vit(28, 7).eval()
    before = model(task.test.x)
    model.positions[1:] = model.positions[1:][task.order]
    weight = model.patches.projection.weight
    weight.copy_(weight.flatten(2)[..., task.pixels].view_as(weight))
    torch.testing.assert_close(model(task.shown(task.test.x)), before, atol=1e-5, rtol=1e-4)


def test_an_augmented_picture_is_shifted_mirrored_or_has_a_square_put_out():
    x = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    found = augment(x, torch.Generator().manual_seed(1), 2, flip=True, hide=True)
    square = (found == 0).flatten(1).sum(1)
    assert set(square.tolist()) == {0, 36} and 15 < int((square > 0).sum()) < 49
    around = torch.nn.functional.pad(x, (2,) * 4, value=x.min().item())
    for picture, original in zip(found, around):
        kept = picture != 0
        ways = [
            (torch.where(kept, way[:, i : i + 28, j : j + 28], 0) == picture).all()
            for i in range(5)
            for j in range(5)
            for way in (original, original.flip(-1))
        ]
        assert sum(map(bool, ways)) == 1
    unhidden = augment(x, torch.Generator().manual_seed(1), 2, flip=True, hide=False)
    assert not (unhidden == 0).any() and torch.equal(found[found != 0], unhidden[found != 0])
    unmirrored = augment(x, torch.Generator().manual_seed(1), 2, flip=False, hide=False)
    mirrored_too = [bool((a == b.flip(-1)).all()) for a, b in zip(unhidden, unmirrored)]
    assert all(mirror or (a == b).all() for mirror, a, b in zip(mirrored_too, unhidden, unmirrored))
    assert 15 < sum(mirrored_too) < 49
    torch.testing.assert_close(augment(x, torch.Generator().manual_seed(1), 2, flip=True, hide=True), found)


def test_all_chosen_pictures_come_once_before_any_again_and_a_seed_fixes_them():
    task = task_of("digits")
    chosen = subset(task, 96, seed=5)
    assert torch.equal(chosen, subset(task, 200, seed=5)[:96]) and not torch.equal(chosen, subset(task, 96, seed=6))
    draw, generator = batches(task, chosen, False), torch.Generator().manual_seed(0)
    drawn = torch.cat([draw(generator).x for _ in range(3)]).flatten(1)
    unique, times = drawn.unique(dim=0, return_counts=True)
    assert len(drawn) == 192 and len(unique) == len(task.train.x[chosen].flatten(1).unique(dim=0))
    assert times.max() <= 2 * len(drawn) / len(unique)


# --- models and rates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "parameters", "work"), [("fashion", 0.01, 0.2), ("digits", 0.03, 0.34)])
def test_the_two_models_are_of_one_size(task, parameters, work):
    vit_size, cnn_size = (size(model_of(arm, task_of(task))) for arm in ARMS)
    assert abs(vit_size - cnn_size) < parameters * vit_size
    vit_work, cnn_work = (multiply_adds(arm, task) for arm in ARMS)
    assert abs(vit_work - cnn_work) < work * vit_work


def test_torchs_count_of_multiply_adds_is_that_by_hand():
    n, d = 17, vit_run.WIDTH
    by_layer = n * (4 * d * d + 2 * d * 2 * d) + 2 * n * n * d  # four projections, the feed-forward, attention
    by_hand = 16 * 49 * d + vit_run.LAYERS * by_layer + 10 * d
    assert multiply_adds("ViT", "fashion") == by_hand
    sides, channels = (14, 7, 4, 4), (1, *vit_run.CHANNELS)
    assert multiply_adds("CNN", "fashion") == 660 + sum(
        side**2 * 9 * a * b for side, a, b in zip(sides, channels, channels[1:])
    )


def test_a_sweep_goes_on_until_the_best_rate_is_not_at_the_edge(monkeypatch, tmp_path):
    monkeypatch.setattr(vit, "carry_out", lambda run: {"tune": -abs(run.rate - 0.05)})
    plan = Plan(SIZES, 10, {"fashion": 1}, tmp_path)
    found = sweep(plan, "fashion", "CNN", 300)
    assert min(found) < best_of(found) < max(found) and best_of(found) == pytest.approx(0.064)
    assert best_of({1e-3: 0.5, 2e-3: 0.7, 4e-3: 0.7}) == 2e-3


def test_seeds_that_are_reported_had_no_part_in_choosing_the_rate_and_the_plan_is_that_of_its_words():
    assert SWEEP_SEED not in SEEDS and set(BETWEEN) < set(SEEDS)
    plan = vit.full_plan(Path("."))
    assert [plan.swept_at("fashion", count) for count in SIZES] == [300, 300, 55_000, 55_000]
    table = cells(plan)
    assert len({cell[:5] for cell in table}) == len(table) == 14
    assert all(len(cell[5]) == 5 for cell in table if cell[2] in (300, 55_000, 1197) and cell[0] != "longer")


# --- runs ----------------------------------------------------------------------------------------------------------


def test_it_runs_and_writes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(vit, "write", None)  # to call it would raise
    vit.main(["--tiny"])
    said = capsys.readouterr().out
    assert (
        "fashion ViT, shuffled 40 False" in said
        and "fashion CNN, shuffled pixels 40 False" in said
        and "digits CNN 30 True" in said
    )


def test_a_run_is_kept_and_not_made_again(tmp_path, monkeypatch):
    run = Run("digits", "ViT", 30, True, 1e-3, 3, 2, tmp_path, 50)
    first = carry_out(run)
    assert run.file.exists() and first["seed"] == 3 and 0 <= first["test"] <= 1
    monkeypatch.setattr(vit_run, "fit", None)
    assert carry_out(run) == first


@pytest.mark.parametrize("arm", ARMS)
def test_both_models_learn(arm):
    task = made_up()
    torch.manual_seed(0)
    model = model_of(arm, task)
    vit_run.fit(model, task, torch.arange(40), False, 2e-3, 0, 12)
    assert vit_run.scores(model, task, task.test)[0] > 0.9 and not model.training


# --- measures of vit_inside ----------------------------------------------------------------------------------------


def test_neighbours_are_found_in_vectors_that_know_the_grid_and_not_in_others():
    grid = 7
    touching = next_to(grid)
    assert touching.sum() == 4 * grid * (grid - 1) and touching[0].nonzero().flatten().tolist() == [1, grid]
    knows = torch.exp(-(patch_distances(grid) ** 2) / 4)  # a bump around each place
    assert nearest_is(knows, touching) == 1
    draw = torch.randn(49, 64, generator=torch.Generator().manual_seed(0))
    assert nearest_is(draw, touching) < 0.3
    image = mirrored(grid)
    assert image[0].nonzero().item() == 6 and image[3, 3] and torch.equal(image, image.T) and image.sum() == 49


def test_rank_correlation_is_scipys():
    a, b = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    a = a.round(decimals=0)  # with ties
    theirs = [spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy())]
    torch.testing.assert_close(
        rank_correlation(a, b).double(), torch.tensor(theirs, dtype=torch.float64), atol=1e-5, rtol=0
    )
    assert rank_correlation(torch.ones(1, 4), torch.arange(4.0)[None]).item() == 0


def moved_pair(patch: int = 4) -> Moves:
    a, b = torch.randn(2, 3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return Moves(a, b, torch.tensor([0, 3, 6]), torch.tensor([1, 2, 6]), patch)


def test_a_patch_is_set_into_the_other_picture_and_nothing_else():
    moved = moved_pair()
    both = moved.patched(moved.b, moved.a)
    assert torch.equal(both[1, :, 12:16, 8:12], moved.a[1, :, 12:16, 8:12])
    assert (both != moved.b).sum() == 3 * 16


@torch.no_grad()
def test_before_the_first_layer_the_surroundings_move_a_patch_not_at_all():
    torch.manual_seed(0)
    model, moved = vit_run.vit(28, 4).eval(), moved_pair()
    found = of_moves(model, moved)
    assert found["surroundings"][0] == 0 and found["patch"][0] == 1 and min(found["surroundings"][1:]) > 0
    assert len(found["patch"]) == 1 + vit_run.LAYERS
    last = states_of(model, moved.a, moved)[-1]
    assert last.shape == (3, vit_run.WIDTH)


def test_a_convolutions_first_layer_sees_of_a_patch_only_what_is_near():
    torch.manual_seed(0)
    model = vit_run.ConvNet(28).eval()
    found = of_moves(model, moved_pair())
    assert found["surroundings"][0] == 0 and found["patch"][0] == 1, "the cell's 3 x 3 pixels lie within the patch"
    assert len(found["patch"]) == 4


def test_it_looks_inside_and_writes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(vit_inside, "write", None)
    vit_inside.main(["--tiny"])
    assert capsys.readouterr().out.count("trained") == len(vit_inside.ARMS)


def test_weights_are_stored_in_half_precision_and_read_again(tmp_path):
    torch.manual_seed(0)
    model = vit_run.vit(28, vit_inside.PATCH).eval()
    vit_inside.store(model, tmp_path / "vit.safetensors")
    again = vit_inside.load(tmp_path / "vit.safetensors")
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(again(x), model(x), atol=5e-3, rtol=0)
    assert (tmp_path / "vit.safetensors").stat().st_size < 300_000


# --- photographs ---------------------------------------------------------------------------------------------------


def test_the_middle_of_a_photograph_is_square_whichever_way_it_stands():
    bright = torch.zeros(3, 60, 100, dtype=torch.uint8)
    bright[:, :, 40:60] = 200  # the middle fifth
    lying, standing = vit_dinov2.middle(bright, 30), vit_dinov2.middle(bright.mT, 30)
    assert lying.shape == standing.shape == (3, 30, 30) and torch.equal(lying, standing.mT)
    assert lying[0, 15, 15] == 200 and lying[0, 15, 0] == 0 and lying.dtype == torch.uint8


def test_it_looks_inside_a_trained_network_and_writes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(vit_dinov2, "write", None)
    vit_dinov2.main(["--tiny"])
    assert capsys.readouterr().out == "trained measured\nuntrained measured\n"
