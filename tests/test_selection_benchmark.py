"""Whether a state that selects copies further: what benchmarks/selection.py measures."""

import pytest
import torch

from benchmarks import selection
from benchmarks.selection import LENGTH, LONGER, TimeInvariant, copying
from nondual.ops.selective_scan import selective_scan_matrix


def test_nothing_is_selected_in_the_twin():
    """What is read changes no weight: the matrix of a block is the same for every input, and along each diagonal."""
    torch.manual_seed(0)
    mixer = TimeInvariant(4, d_state=3).double()
    assert sum(one.numel() for one in mixer.parameters()) > 0
    tables = []
    for u in torch.randn(2, 1, 9, mixer.d_inner, dtype=torch.float64):
        delta, B, C = mixer.select(u)
        tables.append(selective_scan_matrix(delta, -mixer.A_log.exp(), B, C, None, mixer.dt_proj.bias, True))
    torch.testing.assert_close(tables[0], tables[1])
    torch.testing.assert_close(tables[0][..., 1:, 1:], tables[0][..., :-1, :-1])


@pytest.mark.parametrize("name", selection.MODELS)
def test_a_seed_fixes_a_run(name):
    first = copying(name, 0.02, 5, steps=2)
    assert first == copying(name, 0.02, 5, steps=2) != copying(name, 0.02, 6, steps=2)
    assert first["loss"] > 0 and len(first["right"]) == len(LONGER) and all(0 <= each <= 1 for each in first["right"])


def test_both_are_trained_and_asked_alike(monkeypatch):
    asked = {name: [] for name in selection.MODELS}
    draw = selection.selective_copying
    for name, calls in asked.items():
        monkeypatch.setattr(
            selection,
            "selective_copying",
            lambda *sizes, calls=calls, **more: calls.append(sizes) or draw(*sizes, **more),
        )
        copying(name, 0.02, 1, steps=2)
    assert asked["selective"] == asked["time-invariant"]
    assert [length for _, length in asked["selective"]] == [LENGTH] * 2 + [times * LENGTH for times in LONGER]


def test_the_command_runs(capsys):
    selection.main(["--tiny"])
    assert "[1, 2, 4]" in capsys.readouterr().out
