"""The machine against the paper's listings written with loops; its loss, its stopping, and how thinking time is free.

The parts are judged in test_ctm_parts.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, export

from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.recent import (
    ContinuousThoughtMachine,
    NeuronModels,
    Synapses,
    Synchronisation,
    UNetSynapses,
    certainty,
    dense_pairs,
    random_pairs,
    two_tick_loss,
)

B, N, FEATURES, D, INPUT, HEADS, MEMORY, TICKS, CLASSES = 3, 11, 5, 17, 6, 2, 4, 7, 13
SIZES = {"d_model": D, "d_input": INPUT, "n_heads": HEADS, "ticks": TICKS, "memory": MEMORY}


def machine(out=CLASSES, **options):
    torch.manual_seed(0)
    model = ContinuousThoughtMachine(FEATURES, out, **({"action": 19, "output": 23} | SIZES | options))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            new = torch.randn(p.shape, generator=draw)
            p.copy_(new.abs() / 5 if name.endswith("decay") else new * (1 if "norm" in name else 0.6))
    return model.eval()


def surer(**options):
    """One whose certainty lies between 0.2 and 1."""
    model = machine(**options)
    with torch.no_grad():
        model.to_prediction.weight.mul_(2.5)
    return model


def features(batch=B, n=N, dtype=torch.float32, seed=2):
    return torch.randn(batch, n, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- the equations ---------------------------------------------------------------------------------------------------


def by_listing(model, x):
    """Listings 1 to 3 for one input x (N, F): whole histories, a loop over ticks, over neurons and over pairs."""

    def synchronised(history, of):
        total = []
        for i, j, r in zip(*of.pairs.tolist(), of.decay):
            weights = [torch.exp(-r * back) for back in range(len(history) - 1, -1, -1)]
            product = sum(w * z[i] * z[j] for w, z in zip(weights, history))
            total.append(product / sum(weights).sqrt())
        return torch.stack(total)

    def linear(layer, row):
        return layer.weight @ row + layer.bias

    def glu(row):
        return row[: len(row) // 2] * torch.sigmoid(row[len(row) // 2 :])

    def normal(norm, row):
        return norm.weight * (row - row.mean()) / (row.var(correction=0) + norm.eps).sqrt() + norm.bias

    heard = torch.stack([normal(model.to_features[1], linear(model.to_features[0], row)) for row in x])
    joint = nn.MultiheadAttention(INPUT, HEADS, batch_first=True, dtype=x.dtype)
    ours = model.attention
    for kind in ("weight", "bias"):
        parts = [getattr(p, kind) for p in (ours.q_proj, ours.k_proj, ours.v_proj)]
        getattr(joint, f"in_proj_{kind}").data.copy_(torch.cat(parts))
        getattr(joint.out_proj, kind).data.copy_(getattr(ours.out_proj, kind))

    pre = list(model.first_history.T)  # each (D,)
    post = [model.first_neurons]
    predictions, weights = [], []
    for _ in range(TICKS):
        query = linear(model.to_query, synchronised(post, model.action))
        seen, weight = joint(query[None, None], heard[None], heard[None], average_attn_weights=False)
        mixed = torch.cat([seen[0, 0], post[-1]])
        pre.append(normal(model.synapses.norm, glu(linear(model.synapses.linear, mixed))))
        last = torch.stack(pre[-MEMORY:], 1)  # (D, M)
        nets = model.neurons
        z = []
        for d in range(D):
            hidden = glu(last[d] @ nets.weight1[d] + nets.bias1[d])
            z.append(glu(hidden @ nets.weight2[d] + nets.bias2[d])[0])
        post.append(torch.stack(z))
        predictions.append(linear(model.to_prediction, synchronised(post, model.output)))
        weights.append(weight[0, :, 0])
    return torch.stack(predictions), torch.stack(post[1:]), torch.stack(weights)


def test_it_is_the_papers_listings_forward_and_backward():
    model = machine().double()
    ours, theirs = (features(dtype=torch.float64).requires_grad_() for _ in range(2))
    found = model(ours, return_attention=True)
    slope = torch.randn(B, TICKS, CLASSES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (found.predictions * slope).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    right = [torch.stack(each) for each in zip(*(by_listing(model, x) for x in theirs))]
    (right[0] * slope).sum().backward()
    torch.testing.assert_close(found.predictions, right[0])
    torch.testing.assert_close(found.neurons, right[1])
    torch.testing.assert_close(found.attention, right[2])
    torch.testing.assert_close(ours.grad, theirs.grad)
    for name, p in model.named_parameters():
        if not name.startswith("attention."):  # there the judge has copies
            torch.testing.assert_close(gradients[name], p.grad, msg=name)
        assert gradients[name].abs().max() > 0 or name == "attention.k_proj.bias"  # equal for all keys


def test_a_prediction_by_hand():
    """Certainty of (log 3, 0): probabilities 3/4 and 1/4, so 1 - (3/4 log 4/3 + 1/4 log 4) / log 2."""
    right = 1 - (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(2)
    assert abs(certainty(torch.tensor([[math.log(3), 0.0]])).item() - right) < 1e-6
    assert certainty(torch.zeros(1, CLASSES)).item() == pytest.approx(0, abs=1e-6)
    assert certainty(torch.tensor([[0.0, 90.0, 0.0]])).item() == 1
    both = certainty(torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]]))  # two answers: their mean
    assert abs(both.item() - right / 2) < 1e-6


def test_tick_by_tick_is_the_whole():
    model = machine()
    state, whole = model.begin(features()), model(features())
    for t in range(TICKS):
        now = model.tick(state)
        torch.testing.assert_close(now.prediction, whole.predictions[:, t])
        torch.testing.assert_close(now.certainty, whole.certainties[:, t])
        state = now.state


# --- thinking time and input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, N, 64])
@pytest.mark.parametrize("ticks", [1, 2, TICKS, 31])
def test_ticks_and_length_are_chosen_apart(n, ticks):
    """The number of ticks does not follow from the length, nor do the weights depend on either."""
    model = machine()
    found = model(features(n=n), ticks=ticks)
    assert found.predictions.shape == (B, ticks, CLASSES)
    assert found.certainties.shape == (B, ticks)
    assert found.neurons.shape == (B, ticks, D)
    assert found.attention is None
    torch.testing.assert_close(found.predictions[:, :1], model(features(n=n), ticks=1).predictions)


def test_the_order_of_the_features_says_nothing():
    x = features()
    torch.testing.assert_close(machine()(x).predictions, machine()(x.flip(1)).predictions)


def test_no_features_at_all_still_think():
    assert machine()(features(n=0)).predictions.isfinite().all()


def test_an_empty_batch():
    model = machine()
    assert model(features(batch=0)).predictions.shape == (0, TICKS, CLASSES)
    assert model.think_until(features(batch=0), 0.5).ticks.shape == (0,)


# --- stopping --------------------------------------------------------------------------------------------------------


def by_search(thoughts, threshold):
    """For each input: the first tick that is sure enough, or the surest."""
    predictions, ticks = [], []
    for rows, sure in zip(thoughts.predictions, thoughts.certainties):
        enough = (sure >= threshold).nonzero().flatten()
        at = enough[0] if len(enough) else sure.argmax()
        predictions.append(rows[at])
        ticks.append(int(at) + 1 if len(enough) else len(sure))
    return torch.stack(predictions), torch.tensor(ticks)


@pytest.mark.parametrize("threshold", [0.0, 0.45, 0.6, 0.75, 2.0])
def test_stopping_gives_what_all_ticks_would_have_shown(threshold):
    model, x = surer(), features(batch=29)
    found, whole = model.think_until(x, threshold), model(x)
    predictions, ticks = by_search(whole, threshold)
    torch.testing.assert_close(found.predictions, predictions)
    torch.testing.assert_close(found.certainties, certainty(predictions))
    assert torch.equal(found.ticks, ticks)
    assert threshold != 0.75 or len(ticks.unique()) > 1
    if threshold == 2:
        torch.testing.assert_close(found.predictions, whole.most_certain())


def test_who_has_stopped_is_not_computed_further():
    rows = []

    class Counting(Synapses):
        def forward(self, x):
            rows.append(len(x))
            return super().forward(x)

    model = surer(synapses=Counting)
    found = model.think_until(features(batch=29), 0.75)
    assert sum(rows) == found.ticks.sum() < 29 * TICKS


def test_a_nan_stays_in_its_input():
    x = features()
    x[1, 3, 2] = math.nan
    model = machine()
    whole, stopped = model(x), model.think_until(x, 0.6)
    for predictions in (whole.predictions, stopped.predictions):
        assert predictions[1].isnan().all()
        assert predictions[[0, 2]].isfinite().all()
    assert stopped.ticks[1] == TICKS


# --- the loss --------------------------------------------------------------------------------------------------------


def loss_by_loop(predictions, certainties, targets):
    """Listing 4, one input after another; several answers share the two ticks."""
    total = 0.0
    for rows, sure, target in zip(predictions, certainties, targets):
        losses = torch.stack([F.cross_entropy(row.view(-1, row.shape[-1]), target.view(-1)) for row in rows])
        total = total + (losses[losses.argmin()] + losses[sure.argmax()]) / 2
    return total / len(predictions)


@pytest.mark.parametrize("asked", [(), (5,), (2, 3)])
def test_the_loss_is_listing_4_forward_and_backward(asked):
    draw = torch.Generator().manual_seed(0)
    predictions = torch.randn(B, TICKS, *asked, CLASSES, generator=draw, dtype=torch.float64)
    ours, theirs = (predictions.clone().requires_grad_() for _ in range(2))
    targets = torch.randint(CLASSES, (B, *asked), generator=draw)
    sure = torch.rand(B, TICKS, generator=draw)
    found, right = two_tick_loss(ours, sure, targets), loss_by_loop(theirs, sure, targets)
    torch.testing.assert_close(found, right)
    found.backward()
    right.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert (ours.grad.flatten(2).abs().sum(-1) > 0).sum() <= 2 * B  # two ticks of each input learn


def test_it_learns_to_count_what_one_glance_cannot_show():
    """Parity of two bits: ticks of a small machine learn it."""
    torch.manual_seed(0)
    model = ContinuousThoughtMachine(4, 2, d_model=16, d_input=8, ticks=4, memory=3, action=16, output=16)
    bits = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    x = torch.cat([F.one_hot(bits, 2), torch.eye(2, dtype=torch.int64).expand(4, 2, 2)], -1).float()
    step = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(60):
        thoughts = model(x)
        loss = two_tick_loss(thoughts.predictions, thoughts.certainties, bits.sum(1) % 2)
        step.zero_grad()
        loss.backward()
        step.step()
    assert torch.equal(model(x).most_certain().argmax(-1), bits.sum(1) % 2)


# --- how it is put together ------------------------------------------------------------------------------------------


def test_parts_of_ones_own():
    """A backbone, a U-Net, neuron models, dense and semi-dense pairs, another op: each reaches the machine."""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, FEATURES)

        def forward(self, text):
            return self.linear(torch.stack([torch.tensor([len(word), 1.0]) for word in text])[:, None])

    model = machine(
        backbone=Halves(),
        synapses=lambda a, b: UNetSynapses(a, b, levels=2, narrowest=3),
        neurons=lambda d, m: NeuronModels(d, m, d_hidden=2),
        action=Synchronisation(dense_pairs(torch.arange(4)), D),
        output=Synchronisation(dense_pairs(torch.arange(4, 9), torch.arange(9, 14)), D),
        op=FlashAttention(),
        out=(5, 3),
    )
    assert model(["a", "word"]).predictions.shape == (2, TICKS, 5, 3)
    assert model.to_prediction.in_features == 15
    assert model.to_query.in_features == 10
    assert "backbone.linear.weight" in model.state_dict()


def test_a_state_dict_brings_its_pairs():
    first, second = machine(), ContinuousThoughtMachine(FEATURES, CLASSES, **SIZES, action=19, output=23)
    assert not torch.equal(first.output.pairs, second.output.pairs)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(features()), second.eval()(features()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    right, found = machine()(features()), machine().to(dtype)(features().to(dtype))
    assert found.predictions.dtype == dtype
    assert found.certainties.dtype == torch.float32
    error = (found.predictions[:, 0].float() - right.predictions[:, 0]).abs().max() / right.predictions[
        :, 0
    ].abs().max()
    assert error < (0.01 if dtype == torch.float16 else 0.08)  # at the first tick; later ones amplify it
    assert found.predictions.isfinite().all()


def test_autocast():
    model = machine()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(features())
        stopped = model.think_until(features(), 2.0)
    assert found.predictions.dtype == torch.bfloat16
    torch.testing.assert_close(stopped.predictions, found.most_certain())


def test_non_contiguous_features():
    x = features().mT.contiguous().mT
    torch.testing.assert_close(machine()(x).predictions, machine()(x.contiguous()).predictions)


def test_exported_it_takes_other_batches_and_lengths():
    model = machine(ticks=3)
    batch, n = Dim("batch", min=2, max=64), Dim("n", min=2, max=64)
    program = export(model, (features(),), dynamic_shapes={"x": {0: batch, 1: n}})
    for size, length in ((B, N), (7, 23)):
        x = features(size, length)
        torch.testing.assert_close(program.module()(x).predictions, model(x).predictions)


def test_compiled_it_takes_other_batches():
    model = machine(ticks=2)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for size in (B, 7):
        ours, theirs = (features(size).requires_grad_() for _ in range(2))
        found, right = compiled(ours), model(theirs)
        torch.testing.assert_close(found.predictions, right.predictions)
        found.predictions.sum().backward()
        right.predictions.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ({"ticks": 0}, "ticks must be a whole number of 1 or more, got 0"),
        ({"memory": 0}, "memory must be a whole number of 1 or more, got 0"),
        ({"out": 1}, "out must be a number of classes, 2 or more, or end with one, got 1"),
        ({"out": (3, 0)}, r"out\[1\] must be"),
        ({"n_heads": 4}, "d_model must be a multiple of n_heads"),
        ({"action": 0}, "action must be"),
        ({"output": D * D}, "n_pairs must be n_self \\+ 136 at the most"),
        ({"output": Synchronisation(random_pairs(40, 39), 40)}, "output must pair neurons 0 to 16, got"),
    ],
)
def test_what_is_refused_when_it_is_made(options, said):
    with pytest.raises(ValueError, match=said):
        machine(**options)


def test_what_is_refused_when_it_is_called():
    model = machine()
    with pytest.raises(ValueError, match=r"x must be \(B, N, 5\), got \(3, 11, 4\)"):
        model(features()[..., :4])
    with pytest.raises(ValueError, match="ticks must be"):
        model(features(), ticks=0)
    with pytest.raises(ValueError, match="threshold must be a number, got nan"):
        model.think_until(features(), math.nan)
    with pytest.raises(TypeError, match="x must be a Tensor, got list"):
        model([[1.0]])
    with pytest.raises(TypeError, match="action must be a number of pairs or a Synchronisation, got str"):
        machine(action="many")
    model.backbone = lambda x: x[0]
    with pytest.raises(ValueError, match="what backbone gives must be"):
        model(features())


@pytest.mark.parametrize(
    "predictions, sure, targets, said",
    [
        (torch.zeros(B, CLASSES), torch.zeros(B, TICKS), torch.zeros(B, dtype=torch.int64), "predictions must be"),
        (
            torch.zeros(B, TICKS, 2),
            torch.zeros(B, 2),
            torch.zeros(B, dtype=torch.int64),
            r"certainties must be \(B, T\)",
        ),
        (torch.zeros(B, TICKS, 2), torch.zeros(B, TICKS), torch.zeros(B), r"targets must be \(3,\) int64"),
        (
            torch.zeros(B, TICKS, 5, 2),
            torch.zeros(B, TICKS),
            torch.zeros(B, dtype=torch.int64),
            r"must be \(3, 5\) int64",
        ),
    ],
)
def test_what_the_loss_refuses(predictions, sure, targets, said):
    with pytest.raises(ValueError, match=said):
        two_tick_loss(predictions, sure, targets)


def test_what_certainty_refuses():
    with pytest.raises(ValueError, match=r"predictions must be \(B, …, C\) with C of 2 or more"):
        certainty(torch.zeros(B, 1))
