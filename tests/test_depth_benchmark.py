"""benchmarks/depth*.py and benchmarks/direct_paths.py: that they run, and what arms, rates and measures are."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import depth, direct_paths
from benchmarks.depth import Plan, best_of, multiply_adds, sweep
from benchmarks.depth_run import ARMS, CONTEXT, LAYERS, WIDTH, Run, carry_out, draw, learned, model_of, read
from benchmarks.direct_paths import measure
from nondual.language_models.gpt import GPT
from nondual.ops.attention import attention


@pytest.fixture(autouse=True)
def threads():
    """As many threads after a test as before it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_parts_of_the_text_share_no_play_and_windows_are_one_longer_than_the_context():
    text = read()
    assert text.choose_on.shape[1] == text.held_out.shape[1] == CONTEXT + 1
    assert len(text.held_out) == 480 and len(text.choose_on) == 160 and text.vocabulary == 80
    assert draw(torch.Generator().manual_seed(0)).shape == (8, CONTEXT + 1)


def test_the_arms_of_a_seed_start_with_the_same_layers_and_differ_by_few_parameters():
    models = {}
    for arm in ARMS:
        torch.manual_seed(1)
        models[arm] = model_of(arm, 80)
    plain = dict(models["plain"].named_parameters())
    for arm, model in models.items():
        for name, x in model.named_parameters():
            assert "connection" in name or torch.equal(x, plain[name]), arm
    more = {
        arm: sum(x.numel() for x in m.parameters()) - sum(x.numel() for x in plain.values())
        for arm, m in models.items()
    }
    assert more["plain"] == 0 and more["scaled"] == LAYERS and more["denseformer"] == LAYERS * (LAYERS + 3) // 2
    assert more["attention residuals"] == 2 * LAYERS * 2 * WIDTH and more["value residual"] == 2 * (LAYERS - 1)
    assert max(more.values()) < 0.03 * sum(x.numel() for x in plain.values())


def test_a_run_is_kept_and_says_what_was_learned(tmp_path):
    run = Run("denseformer", 1e-2, 1, 2, tmp_path, 1)
    found = carry_out(run)
    assert found == run.result() == carry_out(run) and 5 < found["held_out"] < 8 and len(found["learned"]) == LAYERS
    torch.manual_seed(0)
    weights = learned(model_of("attention residuals", 80), read().held_out[:1])
    assert [len(row) for row in weights["mean"]] == list(range(2, 2 * LAYERS + 2))
    assert weights["mean"][3] == [0.2] * 5 and max(map(max, weights["spread"])) == 0  # as it starts


def test_a_rate_is_chosen_inside_the_grid(tmp_path, monkeypatch):
    asked = []

    def made_up(run):
        asked.append(run.rate)
        return {"tune": abs(run.rate - 1e-3)}

    monkeypatch.setattr(depth, "carry_out", made_up)
    found = sweep(Plan(2, tmp_path), "plain")
    assert best_of(found) == 1e-3 and min(found) == 5e-4 and asked[:3] == [4e-3, 8e-3, 1.6e-2]
    assert best_of({1.0: 2.0, 2.0: 1.0, 3.0: 1.0}) == 2.0


def test_the_formula_of_the_multiply_adds_is_torchs_count_less_the_masked_half_of_attention():
    model = model_of("plain", 80)
    for layer in model.layers:
        layer.mixer.op = partial(attention, impl="reference")  # torch does not count inside of its fused attention
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, CONTEXT, dtype=torch.long))
    masked = LAYERS * WIDTH * (CONTEXT - 1)
    assert counter.get_total_flops() // 2 // CONTEXT - masked == multiply_adds(80)["plain"]
    assert all(1 <= n / multiply_adds(80)["plain"] < 1.3 for n in multiply_adds(80).values())


def test_paths_of_a_small_model_are_measured():
    torch.manual_seed(0)
    figures = measure(GPT(50, 12, 4, 3, max_len=9), torch.randint(50, (3, 9)), (4,), (2, 4))
    assert figures["output"][0][0] == pytest.approx(1, abs=0.3) and figures["output"][3][0] is None
    assert figures["loss"][1][3] is not None and figures["loss"][0][0] is None
    assert set(figures["groups"]) == {2, 4} and len(figures["output_by_distance"]["cut"]) == 4


def test_both_run_tiny():
    depth.main(["--tiny"])
    direct_paths.main(["--tiny"])
