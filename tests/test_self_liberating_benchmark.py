"""The benchmark of self-liberating attention: what it measures is what it says, at a small size."""

import json
import math
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import self_liberating
from benchmarks.proposals_run import TASKS, model_of
from benchmarks.self_liberating_run import (
    Exact,
    Run,
    Streamed,
    bits,
    by_position,
    carry_out,
    gates,
    half_life,
    heads_of,
    held_out,
    kept_by_rule,
    mixers,
    read_by,
    streamed,
    what_came_of,
)
from nondual.extensions import CertifiedStream, DecayingAttention

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    """A model of short memory, whose gates depend on what is read."""
    model = model_of(TASKS["Shakespeare"](), "decay", 1).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mixer in mixers(model):
            mixer.forget.weight.normal_(std=0.5, generator=generator)
            mixer.forget.bias.fill_(0.5)
    return model


def ids_of(n, rows=1):
    return torch.randint(60, (rows, n), generator=torch.Generator().manual_seed(1))


def test_heads_in_blocks_are_the_mixers_own(model):
    ids = ids_of(37, 2)
    mixer, x = mixers(model)[1], read_by(model, ids)[1]
    with torch.no_grad():
        torch.testing.assert_close(mixer.out_proj(heads_of(mixer, x, block=8)), mixer(x))
        torch.testing.assert_close(Exact(mixer, block=5)(x), mixer(x))


def test_what_the_mixers_read_is_what_the_model_gives_them(model):
    ids = ids_of(11)
    first, second = read_by(model, ids)
    with torch.no_grad():
        x = model.inputs[0](ids)
        torch.testing.assert_close(first, model.layers[0].norm1(x))
        torch.testing.assert_close(second, model.layers[1].norm1(model.layers[0](x)))


def test_the_rule_by_hand():
    """Gates of a half and scores of 0: the bounds are 1/2, 1/4, …, the oldest smallest."""
    log_forget = torch.full((1, 6), math.log(0.5))
    # At step i = 0 … 5 the bounds of the first p keys sum to (2^p - 1) / 2^i, which is at most 0.2 where 2^p - 1 is
    # at most 0.2, 0.4, 0.8, 1.6, 3.2, 6.4: for p up to 0, 0, 0, 1, 2, 2.
    assert kept_by_rule(log_forget, torch.zeros(1), 0.2).tolist() == [[1, 2, 3, 3, 3, 4]]
    assert kept_by_rule(log_forget, torch.zeros(1), 1e-9).tolist() == [[1, 2, 3, 4, 5, 6]]
    assert kept_by_rule(torch.full((1, 3), -50.0), torch.zeros(1), 0.2).tolist() == [[1, 1, 1]]


def test_a_stream_keeps_what_the_rule_says(model):
    ids = ids_of(90)
    mixer, x = mixers(model)[0], read_by(model, ids)[0]
    stream, kept = CertifiedStream(mixer, 1e-3), []
    for i in range(90):
        stream.step(x[:, i : i + 1])
        kept.append(stream.kept)
    rule = kept_by_rule(mixer.parts(x).log_forget[0], mixer.bound(), 1e-3)
    assert (rule.amax(0) - torch.tensor(kept)).abs().max() <= 1 and max(kept) < 90


def test_a_streaming_model_is_the_model_to_within_what_is_promised(model):
    ids = ids_of(81)
    with torch.no_grad():
        found, wanted = streamed(model, ids, 1e-9), bits(model, ids).mean().item()
        assert found["bits"] == pytest.approx(wanted, abs=1e-5)
        rough = streamed(model, ids, 0.5)
    for layers, epsilon in ((found["layers"], 1e-9), (rough["layers"], 0.5)):
        for layer in layers:
            assert layer["within"] and layer["as_the_rule"] and layer["missing_most"] <= epsilon
            assert layer["worst_error"] <= layer["promised_there"]
    assert all(r["kept_most"] < f["kept_most"] for r, f in zip(rough["layers"], found["layers"]))
    assert all(layer["worst_error"] > 1e-4 for layer in rough["layers"])


def test_an_output_that_is_off_by_more_is_seen(model):
    """The check of the bound can fail: here a stream lets keys go that it may not."""
    ids = ids_of(60)
    mixer, x = mixers(model)[0], read_by(model, ids)[0]
    layer = Streamed(mixer, 1e-3)
    layer.stream.epsilon = 0.9
    with torch.no_grad():
        for i in range(60):
            layer(x[:, i : i + 1])
        assert not what_came_of(layer, 60)["within"]


def test_bytes_are_those_of_the_tensors_held(model):
    mixer, x = mixers(model)[0], read_by(model, ids_of(30))[0]
    layer = Streamed(mixer, 1e-6)
    with torch.no_grad():
        for i in range(30):
            layer(x[:, i : i + 1])
    keys_and_values = 2 * layer.kept[-1] * 64 * 8
    assert keys_and_values <= layer.bytes[-1] <= 1.3 * keys_and_values + 1000


def test_loss_by_position_covers_the_same_text_twice(model, tmp_path):
    run = Run("decay", 0.003, 1, tmp_path, tmp_path, long=256, rows=2)
    model = model.float()
    found, ids = by_position(model, run), held_out(256, 2)
    assert len(found["one window"]) == 4
    assert found["one window"][:2] == pytest.approx(found["windows of 128"][:2], abs=1e-4)  # the same until 128
    with torch.no_grad():
        wanted = bits(model, ids[:, 128:257])[:, 64:].mean().item()
    assert found["windows of 128"][3] == pytest.approx(wanted, abs=1e-4)


def test_half_lives():
    assert half_life(math.log(0.5)) == 1 and half_life(math.log(0.5) / 64) == 64 and half_life(0.0) is None


def test_gates_of_every_head(model):
    found = gates(model.float())
    assert [(row["layer"], row["head"]) for row in found] == [(i, h) for i in (1, 2) for h in (1, 2, 3, 4)]
    for row in found:
        low, middle, high = row["half_life_of_a_gate"]
        assert low < middle < high and row["half_life_of_the_product"] < row["half_life"]
        shares = row["forgetting_on"]
        assert 0.5 < sum(of["of_characters"] for of in shares.values()) <= 1
        assert 0 < sum(of["of_forgetting"] for of in shares.values()) <= 1.001


@pytest.mark.timeout(400)
def test_the_whole_plan(tmp_path, monkeypatch):
    task = TASKS["Shakespeare"]()
    monkeypatch.setitem(TASKS, "Shakespeare", lambda: task._replace(fresh=lambda: islice(task.fresh(), 1)))
    small = {"steps": 1, "long": 256, "rows": 2, "stream": 16, "epsilons": (1e-1, 1e-3)}
    found = self_liberating.carried_out(
        tmp_path / "own", tmp_path / "shared", (1, 2), rates=(0.003,), choosing=(1,), **small
    )
    assert len(list((tmp_path / "shared").iterdir())) == 10  # the choosing seed is one of the two here
    assert set(found["losses"]) == {"1 to 128", "129 to 256"}
    first = found["losses"]["129 to 256"]
    n = [len(first[name]["each"]) for name in ("decay", "persistence", "together more than apart")]
    assert n == [2, 2, 2]
    sums = [first["bits"][arm]["mean"] for arm in self_liberating.ARMS[:4]]
    assert first["decay"]["mean"] == pytest.approx((sums[0] + sums[2] - sums[1] - sums[3]) / 2, abs=1e-4)
    assert set(found["half_lives"]) == {"decay", "decay and persistence", "decay, no positions"}
    assert all(of["outputs_within"] for arm in found["streams"].values() for of in arm.values())
    assert "passage" in found["runs"]["decay"][0] and "passage" not in found["runs"]["decay"][1]
    kept = carry_out(Run("decay", 0.003, 1, tmp_path / "own", tmp_path / "shared", **small))
    assert self_liberating.shorter(kept) == found["runs"]["decay"][0]
    assert len(kept["streams"]["0.1"]["layers"][0]["kept_by_part"]) == 16 and len(kept["trained"]["curve"]) == 5


# --- the claim -------------------------------------------------------------------------------------------------------


MEASURED = Path(__file__).parent.parent / "docs/measured"


@pytest.mark.claim("A8.6", "holds if")
def test_the_two_halves_together_help_on_some_tasks_mostly_by_fading_and_what_is_let_go_is_within_its_promise():
    """By the protocol's own words, on ten tasks; beyond the training length; and by streams that let keys go."""
    compared = json.loads((MEASURED / "proposals_self_liberating.json").read_text())["figures"]["compared"]

    def tasks(arm, *words):
        rows = compared[f"{arm} less normalised"]
        assert len(rows) == 10
        found = [(task, row) for task, row in rows.items() if row["is"] in words]
        return [task for task, row in found if "worse" in row["is"] or row["remains with Holm"]]  # Holm's for gains

    texts = ["Shakespeare", "Gita"]
    assert tasks("decay and persistence", "better as named") == ["selective copy", "direction", *texts]
    assert tasks("decay", "better as named") == ["direction", *texts]
    assert not tasks("decay and persistence", "worse as named") and not tasks("decay", "worse as named")
    assert tasks("persistence", "better", "better as named") == ["conjunction"]
    assert tasks("persistence", "worse as named") == ["reverse", "Gita"]

    found = json.loads((MEASURED / "self_liberating.json").read_text())["figures"]
    late = found["losses"]["513 to 1,024"]  # up to eight times the training length
    for arm in ("decay", "decay and persistence", "decay, no positions"):
        assert late["against the control"][arm]["interval"][0] > 0.5
        assert late["less than windows of 128"][arm]["interval"][0] > 0
    for of in (row for arm in found["streams"].values() for row in arm.values()):
        assert of["outputs_within"] and of["worst_share_of_promise"] < 0.5 and of["kept_most"] < 8192 / 10
        assert of["most_in_second_half_over_first"] < 1.5

    torch.manual_seed(0)  # and here: gates that go down bound what is held, and one that stays at 1 holds everything
    mixer, x, epsilon, held = DecayingAttention(64, 4, half_life=2).double(), torch.randn(1, 200, 64).double(), 1e-2, []
    with torch.no_grad():
        mixer.out_proj.weight.copy_(torch.eye(64))  # so that heads are seen one by one
        for bias in (float(mixer.forget.bias[0]), 100.0):
            mixer.forget.bias[0] = bias
            stream = CertifiedStream(mixer, epsilon)
            given = torch.cat([stream.step(x[:, i : i + 1]) for i in range(200)], 1)
            off = (given - mixer(x)).unflatten(-1, (4, 16)).norm(dim=-1).max()
            assert off <= 2 * epsilon * mixer.parts(x).v.norm(dim=-1).max()
            held.append(stream.kept)
    assert held[0] < 60 and held[1] == 200
