"""benchmarks/meditation.py and meditation_trained.py: what is counted, kept and moved, by hand; and that both run."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import meditation, meditation_trained
from benchmarks.meditation import TINY, Bench, between, counted, disturbance, largest, latest, measured, moved
from benchmarks.meditation_trained import ARMS, Run, carry_out, hard, sampled, score_function, straight_through
from nondual.analysis import weights_of
from nondual.language_models.causal import CausalLM
from nondual.ops import masks
from nondual.ops.attention import masked_softmax
from nondual.relative_positions import Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import FeedForward, TransformerLayer

SEEN = masks.causal(4)
ROW = torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.7, 0.3, 0.0, 0.0], [0.2, 0.3, 0.5, 0.0], [0.4, 0.1, 0.3, 0.2]])
ROW[0, 0] = 1.0


class Letters:
    """A tokenizer: a token for each byte."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(text.encode())}


@pytest.fixture(scope="module")
def model():
    """Two layers of grouped heads with rotary positions."""
    torch.manual_seed(0)

    def layer(_):
        mixer = MultiHeadAttention(24, 4, n_kv_heads=2, causal=True, positions=Rotary(6))
        return TransformerLayer(mixer, FeedForward(24, 48), 24, norm_first=True)

    return CausalLM(257, 24, 2, layer=layer, norm=nn.LayerNorm).eval().requires_grad_(False)


def test_which_keys_are_kept():
    close = torch.testing.assert_close
    last = lambda change: change(ROW, ROW, SEEN)[3]  # noqa: E731
    close(last(largest(1)), torch.tensor([1.0, 0, 0, 0]))
    close(last(largest(2)), torch.tensor([4 / 7, 0, 3 / 7, 0]))
    close(last(largest(2, even=True)), torch.tensor([0.5, 0, 0.5, 0]))
    close(largest(2, first=True)(ROW, ROW, SEEN)[2], torch.tensor([2 / 7, 0, 5 / 7, 0]))  # not the two largest
    close(last(latest(2)), torch.tensor([4 / 6, 0, 0, 2 / 6]))
    for change in (largest(9), largest(9, first=True), latest(9)):
        close(change(ROW, ROW, SEEN), ROW)
    close(largest(9, even=True)(ROW, ROW, SEEN), SEEN / SEEN.sum(-1, keepdim=True))


@pytest.mark.parametrize("kind", meditation.STRENGTHS)
def test_disturbed_weights_are_weights_and_do_what_their_name_says(kind):
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 3, 7, 7, generator=draw)
    seen = masks.causal(7)
    intact = masked_softmax(scores, seen)
    after = disturbance(kind, meditation.STRENGTHS[kind][-1], draw)(scores, intact, seen)
    torch.testing.assert_close(after.sum(-1), torch.ones(1, 3, 7))
    assert (after[seen.expand_as(after)] > 0).all() and (after[~seen.expand_as(after)] == 0).all()
    entropy = [float(torch.special.entr(x).sum(-1).mean()) for x in (intact, after)]
    if kind in ("flatter", "mixed with an even spread"):
        assert entropy[1] > entropy[0]
    if kind == "sharper":
        assert entropy[1] < entropy[0]
    if kind.startswith("noise"):  # the same drawing for all heads, or another one for each
        change = (after / intact).log()[..., -1, :]
        change = change - change.mean(-1, keepdim=True)
        assert torch.allclose(change[:, 0], change[:, 1], atol=1e-5) == ("one" in kind)


def test_another_order_is_the_same_weights_on_other_keys():
    after = disturbance("mixed with another order", 1.0, torch.Generator().manual_seed(1))(ROW, ROW, SEEN)
    torch.testing.assert_close(after.sort(-1).values, ROW.sort(-1).values)
    assert not torch.equal(after, ROW) and (after.triu(1) == 0).all()


def test_what_is_moved_and_what_is_read_off_between_two_strengths():
    other = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.4, 0.3, 0.2]])
    assert moved(ROW, other) == pytest.approx((0.2 + 0 + 0.3) / 3)  # the first row has no choice
    move, rise = torch.tensor([[0.0, 0.1, 0.3]]), torch.tensor([[0.0, 1.0, 2.0]])
    assert between(move, rise, 0.2) == [1.5] and between(move, rise, 0.4) is None


def test_zeros_are_counted_as_they_are_stored():
    weights = torch.tensor([[1.0, 2.0**-140, 2.0**-30, 2.0**-20]])
    found = counted(weights, torch.ones(1, 4, dtype=torch.bool))
    assert [found[f"zero in {name}"] for name in ("float32", "bfloat16", "float16")] == [0, 1, 2]
    assert found["weights"] == 4 and found["smallest"] == -140 and found["below half a unit of bfloat16"] == 3


def test_an_unchanged_table_changes_nothing_and_the_model_is_whole_again(model):
    bench = Bench(model, Letters(), TINY)
    ids = torch.randint(257, (1, 13), generator=torch.Generator().manual_seed(0))
    clean, right = bench.losses(ids)
    assert clean.shape == right.shape == (12,)
    with bench.changed(lambda _, weights, __: weights):
        torch.testing.assert_close(bench.losses(ids)[0], clean)
    own = weights_of(model, ids)[:, 0]
    torch.testing.assert_close(meditation.bench_with(bench, ids, own, range(2)), clean.mean())
    with bench.changed(largest(1)):
        assert not torch.allclose(bench.losses(ids)[0], clean)
    assert torch.equal(bench.losses(ids)[0], clean)


def test_the_whole_runs_small(model):
    found = measured(Bench(model, Letters(), TINY), tiny=True)
    assert set(found) == {"zeros", "spread", "disturbed", "fixed", "fewer", "at equal change"}


def test_hard_weights_have_no_gradient_and_straight_through_has_that_of_the_softmax():
    scores = torch.randn(2, 3, 5, 5, requires_grad=True, generator=torch.Generator().manual_seed(0))
    soft = scores.softmax(-1)
    value = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    assert not hard(soft)[0].requires_grad
    through = straight_through(soft)[0]
    torch.testing.assert_close(through, hard(soft)[0])
    given, expected = (torch.autograd.grad((w @ value).sum(), scores, retain_graph=True)[0] for w in (through, soft))
    torch.testing.assert_close(given, expected)


def test_the_score_function_has_the_gradient_of_the_expected_loss():
    """One query, three keys: the mean over many drawings against the exact gradient of the mean loss."""
    scores, losses = torch.tensor([0.5, -0.3, 0.1], requires_grad=True), torch.tensor([1.0, 2.0, 4.0])
    (exact,) = torch.autograd.grad((scores.softmax(-1) * losses).sum(), scores)
    torch.manual_seed(0)
    one = ARMS["sampled"]()
    weights, one.log_prob = sampled(scores.softmax(-1).expand(60_000, 1, 1, 3))
    (found,) = torch.autograd.grad(score_function(nn.Sequential(one), (weights[:, 0, 0] * losses).sum(-1)), scores)
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0)


def test_a_run_is_kept_and_arms_of_a_seed_start_alike(tmp_path, one_thread):
    run = Run("recall", "soft", 0.01, 3, 2, tmp_path)
    first = carry_out(run)
    assert set(first) >= {"right", "right, judged hard", "loss"} and carry_out(run) == first
    starts = {carry_out(run._replace(arm=arm))["loss"][0] for arm in ("hard", "straight-through")}
    assert len(starts) == 1  # the same weights, and so the same first loss


def test_the_trainings_run_and_write_nothing(monkeypatch, capsys, one_thread):
    monkeypatch.setattr(meditation_trained, "write", None)  # to call it would raise
    monkeypatch.setattr(meditation_trained, "TRAINED", {"recall": ("soft", "sampled"), "copy": ("fixed",)})
    meditation_trained.main(["--tiny"])
    assert "soft, judged hard" in capsys.readouterr().out
