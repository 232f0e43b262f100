"""Training: who decays, the schedule, a log, and a run that is killed and goes on as if it never had been."""

import copy
import fcntl
import itertools
import json
import math
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nondual.efficient_attention.mamba2 import Mamba2
from nondual.efficient_attention.s4d import S4D
from nondual.language_models.mamba import MambaLM
from nondual.self_attention import MultiHeadAttention
from nondual.training import constant, decay_groups, optimiser, train, warmup_cosine, warmup_inverse_root
from nondual.transformer import Encoder

SRC = Path(__file__).parent.parent / "src"


def model():
    """With dropout, so that torch's own random numbers matter."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 1))


def points(generator):
    x = torch.randn(11, 3, generator=generator)
    return x, x.square().sum(1, keepdim=True)


def run(net, steps=10, *, draw=points, rate=1e-2, **options):
    def loss(batch):
        x, y = batch
        return F.mse_loss(net(x), y)

    options = {"seed": 3, "log_every": 4, "checkpoint_every": 3} | options
    return train(net, loss, draw, optimiser=optimiser(net, rate), steps=steps, **options)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- the optimiser -------------------------------------------------------------------------------------------------


def names(net):
    groups = {group["weight_decay"]: {name for name, _ in group["params"]} for group in decay_groups(net, 0.3)}
    return groups.get(0.3, set()), groups.get(0.0, set())


def test_matrices_decay_and_vectors_embeddings_norms_and_a_do_not():
    decaying, others = names(MambaLM(13, 8, 1))
    assert decaying == {
        "layers.0.mixer.in_proj.weight",
        "layers.0.mixer.conv1d.weight",
        "layers.0.mixer.x_proj.weight",
        "layers.0.mixer.dt_proj.weight",
        "layers.0.mixer.out_proj.weight",
    }
    assert others == {
        "embeddings.weight",
        "norm_f.weight",
        "layers.0.norm.weight",
        "layers.0.mixer.A_log",
        "layers.0.mixer.D",
        "layers.0.mixer.conv1d.bias",
        "layers.0.mixer.dt_proj.bias",
    }


def test_a_table_tied_to_the_scores_does_not_decay_and_untied_scores_do():
    assert "lm_head.weight" in names(MambaLM(13, 8, 1, tied=False))[0]
    net = MultiHeadAttention(8, 2)
    assert names(net)[0] == {f"{part}_proj.weight" for part in ("q", "k", "v", "out")}
    tied = nn.ModuleDict({"scores": nn.Linear(8, 13, bias=False), "table": nn.Embedding(13, 8)})
    tied["scores"].weight = tied["table"].weight
    assert names(tied) == (set(), {"scores.weight"})


def test_a_norm_of_two_dimensions_does_not_decay():
    assert names(nn.Sequential(nn.LayerNorm((3, 4)), nn.RMSNorm((3, 4)))) == (set(), {"0.weight", "0.bias", "1.weight"})


def test_the_parameters_of_a_do_not_decay_in_mamba_2_and_s4d_nor_under_a_parametrization():
    assert {"A_log", "D", "dt_bias"} <= names(Mamba2(8, d_head=4))[1]
    assert {"log_A_real", "A_imag", "log_dt", "D"} <= names(S4D(6))[1] and "C" in names(S4D(6))[0]
    net = MambaLM(13, 8, 1)
    mixer = net.layers[0].mixer
    nn.utils.parametrize.register_parametrization(mixer, "A_log", nn.Identity())
    assert "layers.0.mixer.parametrizations.A_log.original" in names(net)[1]


def test_a_parameter_may_say_itself_that_it_does_not_decay_and_a_frozen_one_is_left_out():
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 5, bias=False), nn.Linear(5, 6, bias=False))
    net[0].weight._no_weight_decay = True
    net[2].requires_grad_(False)
    assert names(net) == ({"1.weight"}, {"0.weight"})


def test_a_module_may_say_which_of_its_parameters_do_not_decay_and_a_copy_of_it_says_so_too():
    class Kept(nn.Linear):
        no_weight_decay = ("weight",)

    net = nn.Sequential(Kept(3, 4), nn.Linear(4, 5, bias=False))
    assert names(net) == names(copy.deepcopy(net)) == ({"1.weight"}, {"0.weight", "0.bias"})
    nn.utils.parametrize.register_parametrization(net[0], "weight", nn.Identity())
    assert "0.parametrizations.weight.original" in names(net)[1]


def test_the_optimiser_is_adamw_over_every_trained_parameter_once():
    net = Encoder(8, 2, 2, 16)
    adam = optimiser(net, 0.02, decay=0.3, betas=(0.8, 0.9))
    assert isinstance(adam, torch.optim.AdamW)
    assert [group["weight_decay"] for group in adam.param_groups] == [0.3, 0.0]
    assert {(group["lr"], group["betas"]) for group in adam.param_groups} == {(0.02, (0.8, 0.9))}
    assert {id(p) for group in adam.param_groups for p in group["params"]} == {id(p) for p in net.parameters()}


@pytest.mark.parametrize(
    "net, options, said",
    [
        (nn.Linear(2, 2), {"rate": 0}, "rate must be above 0, got 0"),
        (nn.Linear(2, 2), {"rate": math.nan}, "rate must be above 0, got nan"),
        (nn.Linear(2, 2), {"rate": 1, "decay": -0.1}, "decay must be 0 or more, got -0.1"),
        (nn.Tanh(), {"rate": 1}, "model must have a parameter that requires a gradient, got none"),
    ],
)
def test_what_the_optimiser_refuses(net, options, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        optimiser(net, **options)


# --- the schedule --------------------------------------------------------------------------------------------------


def test_the_schedule_by_hand():
    shares = [warmup_cosine(step, 20) for step in range(20)]
    assert shares[:3] == [0.5, 1.0, 1.0]
    assert math.isclose(shares[11], 0.55)  # half way down, from 1 to 0.1
    assert all(a > b for a, b in itertools.pairwise(shares[2:])) and 0.1 < shares[-1] < 0.11
    assert [round(warmup_cosine(step, 4, warmup=0, last=0), 3) for step in range(4)] == [1.0, 0.854, 0.5, 0.146]
    assert warmup_cosine(0, 1) == 1 and constant(7, 20) == 1


@pytest.mark.parametrize("step, steps, options", [(-1, 5, {}), (5, 5, {}), (0, 0, {}), (0, 5, {"warmup": 1})])
def test_what_the_schedule_refuses(step, steps, options):
    with pytest.raises(ValueError, match="must lie in"):
        warmup_cosine(step, steps, **options)


def test_the_transformers_schedule_is_the_papers_equation():
    width, warmup, steps = 512, 40, 1000
    peak = 1 / math.sqrt(width * warmup)
    for step in range(steps):
        t = step + 1  # the paper counts from 1
        papers = width**-0.5 * min(t**-0.5, t * warmup**-1.5)
        assert math.isclose(peak * warmup_inverse_root(step, steps, warmup=warmup), papers)
    shares = [warmup_inverse_root(step, steps, warmup=warmup) for step in range(steps)]
    assert shares.index(max(shares)) == warmup - 1 and shares[warmup - 1] == 1
    assert math.isclose(shares[0], 1 / 40) and math.isclose(shares[159], 1 / 2) and math.isclose(shares[639], 1 / 4)
    assert warmup_inverse_root(7, 10, warmup=4) == warmup_inverse_root(7, 10**6, warmup=4)  # steps do not count


def test_a_run_takes_the_transformers_schedule():
    history = run(model(), 9, schedule=partial(warmup_inverse_root, warmup=4), log_every=1)
    assert [round(row["rate"] / 1e-2, 3) for row in history] == [0.25, 0.5, 0.75, 1, 0.894, 0.816, 0.756, 0.707, 0.667]


@pytest.mark.parametrize(
    "step, steps, warmup, says",
    [
        (-1, 5, 1, "step must lie in 0 to steps - 1, got -1 of 5"),
        (5, 5, 1, "step must lie in 0 to steps - 1, got 5 of 5"),
        (0, 5, 0, "warmup must be 1 step or more, got 0"),
    ],
)
def test_what_the_transformers_schedule_refuses(step, steps, warmup, says):
    with pytest.raises(ValueError, match=says):
        warmup_inverse_root(step, steps, warmup=warmup)


# --- the loop ------------------------------------------------------------------------------------------------------


def test_two_steps_by_hand():
    """Equal to AdamW, clipping and the schedule written out."""
    ours, theirs = model(), model()
    history = run(ours, 2, clip=0.05, log_every=1)
    adam, generator = optimiser(theirs, 1e-2), torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    for step in range(2):
        for group in adam.param_groups:
            group["lr"] = 1e-2 * warmup_cosine(step, 2)
        adam.zero_grad()
        x, y = points(generator)
        loss = F.mse_loss(theirs(x), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        adam.step()
        row = {"step": step + 1, "loss": loss.item(), "rate": 1e-2 * warmup_cosine(step, 2), "norm": norm.item()}
        assert history[step] == pytest.approx(row, rel=1e-6)
    assert equal(ours, theirs)


def test_it_learns_logs_every_few_steps_and_the_last_and_leaves_modes_and_rates_as_they_were():
    net, modes = model().eval(), []
    adam = optimiser(net, 3e-2)

    def measure():
        modes.append((net.training, torch.is_grad_enabled()))
        return {"bias": net[3].bias}

    def loss(batch):
        modes.append(net.training)
        return F.mse_loss(net(batch[0]), batch[1])

    history = train(net, loss, points, optimiser=adam, steps=202, log_every=100, clip=None, measure=measure)
    assert [row["step"] for row in history] == [100, 200, 202] and "norm" not in history[0]
    assert history[1]["loss"] < 0.95 * history[0]["loss"] and history[2]["bias"] == net[3].bias.item()
    assert modes.count(True) == 202 and modes.count((False, False)) == 3 and len(modes) == 205
    assert not net.training and all(group["lr"] == 3e-2 for group in adam.param_groups)


def test_the_seed_decides():
    first, again, other = (run(model(), seed=seed) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize(
    "options, said",
    [
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"log_every": 0}, "log_every must be 1 or more, got 0"),
        ({"checkpoint_every": -1}, "checkpoint_every must be 1 or more, got -1"),
        ({"clip": 0}, "clip must be above 0, or None, got 0"),
    ],
)
def test_what_the_loop_refuses(options, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        run(model(), **options)


@pytest.mark.parametrize(
    "loss, found",
    [(lambda x: 1.0, "float"), (lambda x: x[0], r"\(11, 3\)"), (lambda x: x[0].sum(), r"\(\) without a gradient")],
)
def test_a_loss_that_cannot_be_trained_is_named(loss, found):
    net = model()
    with pytest.raises(ValueError, match=f"must return a scalar Tensor that has a gradient, got {found}"):
        train(net, loss, points, optimiser=optimiser(net, 1e-2), steps=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_leaves_the_weights_before_it(bad, tmp_path):
    count = itertools.count(1)

    def draw(generator):
        x, y = points(generator)
        return x, y * bad if next(count) == 6 else y

    net, before = model(), model()
    with pytest.raises(FloatingPointError, match=f"^the loss is {bad} at step 6: try a lower learning rate"):
        run(net, draw=draw, schedule=constant, checkpoint=tmp_path / "run.pt")
    run(before, 5, schedule=constant)
    assert equal(net, before)
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 3


def test_a_gradient_that_is_not_finite_stops_too():
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    with pytest.raises(FloatingPointError, match=r"^the norm of the gradients is nan at step 1:"):
        train(
            net, lambda x: net(x).abs().sqrt().sum(), lambda g: torch.ones(1, 1), optimiser=optimiser(net, 1), steps=1
        )
    assert net.weight == 0


# --- stopped, and gone on with -------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopping(after):
    count = itertools.count(1)

    def draw(generator):
        if next(count) > after:
            raise Stop
        return points(generator)

    return draw


@pytest.mark.parametrize("stops", [[2], [3], [5], [9], [4, 2, 3]], ids=str)
def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(stops, tmp_path):
    """Stopped before the first checkpoint, at one, between two, after the last, and several times."""
    whole = model()
    history = run(whole, log=tmp_path / "whole.jsonl")
    for after in stops:
        with pytest.raises(Stop):
            run(model(), draw=stopping(after), checkpoint=tmp_path / "run.pt", log=tmp_path / "run.jsonl")
        torch.rand(5)  # other random numbers drawn in between
    net = model()
    assert run(net, checkpoint=tmp_path / "run.pt", log=tmp_path / "run.jsonl") == history
    assert equal(net, whole)
    rows = [[json.loads(line) for line in (tmp_path / f"{x}.jsonl").read_text().splitlines()] for x in ("whole", "run")]
    assert rows[0][1:] == rows[1][1:] == history
    assert not list(tmp_path.glob("*.part"))


def test_a_run_that_is_done_returns_at_once(tmp_path):
    net, again = model(), model()
    history = run(net, checkpoint=tmp_path / "run.pt")
    assert run(again, draw=stopping(0), checkpoint=tmp_path / "run.pt") == history and equal(net, again)


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {src!r}]
from test_training import model, points, run

drawn = 0

def draw(generator):
    global drawn
    drawn += 1
    if drawn == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    return points(generator)

run(model(), draw=draw, checkpoint="run.pt", log="run.jsonl", log_every=1)
"""


def test_a_process_killed_in_the_middle_is_gone_on_with(tmp_path):
    for after, step in ((5, 3), (3, 3), (5, 6)):
        code = KILLED.format(tests=str(Path(__file__).parent), src=str(SRC), after=after)
        ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=150)
        assert ran.returncode == -signal.SIGKILL, ran.stderr
        assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == step
    with open(tmp_path / "run.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # as a kill in the middle of a write would leave it
    net, whole = model(), model()
    history = run(net, checkpoint=tmp_path / "run.pt", log=tmp_path / "run.jsonl", log_every=1)
    assert history == run(whole, log_every=1) and equal(net, whole)
    first, *rows = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert rows == history and [each["step"] for each in first["resumed"]] == [3, 6]


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    with pytest.raises(Stop):
        run(model(), draw=stopping(4), checkpoint=tmp_path / "run.pt")
    save = torch.save

    def half(state, file):
        save(state, file)
        file.write_bytes(file.read_bytes()[:100])
        raise Stop

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Stop):
        run(model(), checkpoint=tmp_path / "run.pt")
    monkeypatch.undo()
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 3 and len(list(tmp_path.iterdir())) == 1
    net, whole = model(), model()
    run(net, checkpoint=tmp_path / "run.pt")
    run(whole)
    assert equal(net, whole)


def test_a_checkpoint_of_another_run_is_refused_and_its_arguments_are_named(tmp_path):
    run(model(), checkpoint=tmp_path / "run.pt", arguments={"width": (7, 1)})
    with pytest.raises(
        ValueError, match=r"run.pt is the checkpoint of another run, with seed 3, not 4, width \[7, 1\]"
    ):
        run(model(), checkpoint=tmp_path / "run.pt", seed=4, arguments={"width": (8, 1)})
    with pytest.raises(ValueError, match="steps 10, not 20: delete it, or name another file"):
        run(model(), 20, checkpoint=tmp_path / "run.pt", arguments={"width": (7, 1)})


# --- what it says --------------------------------------------------------------------------------------------------


def test_the_log_opens_with_where_the_run_was_made_and_has_a_line_a_step(tmp_path):
    history = run(model(), log=tmp_path / "deep" / "run.jsonl", arguments={"width": 7})
    first, *rows = [json.loads(line) for line in (tmp_path / "deep" / "run.jsonl").read_text().splitlines()]
    assert rows == history and [row["step"] for row in rows] == [4, 8, 10]
    assert first["versions"]["torch"] == torch.__version__ and set(first["versions"]) == {"python", "torch", "nondual"}
    assert first["device"] == "cpu" and first["seed"] == 3 and "resumed" not in first
    assert first["arguments"] == {"steps": 10, "clip": 1.0, "log_every": 4, "width": 7}


def test_the_log_names_the_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
        )

    def commit():
        run(model(), 1, log=tmp_path / "run.jsonl")
        return json.loads((tmp_path / "run.jsonl").read_text().splitlines()[0])["commit"]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None
    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    assert commit() == git("rev-parse", "--short=12", "HEAD").stdout.strip()
    (tmp_path / "file").write_text("b")
    assert commit().endswith("+changes")
    monkeypatch.setenv("PATH", "")
    assert commit() is None


BAR = (
    f"import sys\nsys.path[:0] = [{str(Path(__file__).parent)!r}, {str(SRC)!r}]\nfrom test_training import model, run\n"
)
BAR += "run(model(), name='a small one')"


def test_nothing_is_printed_where_standard_error_is_no_terminal(tmp_path):
    ran = subprocess.run([sys.executable, "-c", BAR], cwd=tmp_path, capture_output=True, text=True, timeout=150)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_a_bar_is_shown_on_a_terminal_and_standard_output_stays_empty(tmp_path):
    pytest.importorskip("tqdm")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # without a width tqdm shows nothing
    ran = subprocess.run(
        [sys.executable, "-c", BAR], cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=150
    )
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert ran.returncode == 0 and ran.stdout == "" and "a small one" in shown and "0/10" in shown, shown
