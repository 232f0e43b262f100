"""Hyper-connections: by hand, the paper's algorithm written out, transformers' mHC, the start, Sinkhorn, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Config, DeepseekV4HyperConnection

from nondual.language_models.gpt import GPT
from nondual.recent.hyper_connections import (
    DoublyStochasticMaps,
    DynamicMaps,
    HyperConnections,
    StaticMaps,
    sinkhorn,
)

B, N, V, E, L = 2, 5, 11, 12, 3
KINDS = [StaticMaps, DynamicMaps, DoublyStochasticMaps]


def ids():
    return torch.randint(V, (B, N), generator=torch.Generator().manual_seed(1))


def moved(module, by=0.5, seed=3):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in module.parameters():
            x += by * torch.randn(x.shape, generator=draw).to(x)
    return module


def gpt(connection=None, eps=1e-5):
    torch.manual_seed(0)
    model = GPT(V, E, L, 3, max_len=N, eps=eps)
    if connection is not None:
        model.connection = connection
    with torch.no_grad():
        model.embeddings.weight *= 40
    return model.double()


class Tenfold:
    """A layer of one branch, ten times what it reads."""

    def branches(self):
        return [lambda x: 10 * x]


def test_one_branch_on_two_streams_by_hand():
    connection = HyperConnections(1, 1, 2, maps=StaticMaps)
    maps = connection.maps[0]
    with torch.no_grad():
        maps.read.copy_(torch.tensor([1.0, 2.0]))
        maps.mix.copy_(torch.tensor([[0.0, 1.0], [5.0, 0.0]]))
        maps.write.copy_(torch.tensor([1.0, -1.0]))
    # Both streams 1: it reads 1 + 2 = 3 and adds 30. Streams: 5 · 1 + 30 = 35 and 1 · 1 - 30 = -29; their mean 3.
    assert connection(torch.ones(1, 1, 1), [Tenfold()]).item() == 3


@pytest.mark.parametrize("kind", [StaticMaps, DynamicMaps])
def test_it_is_the_papers_algorithm_one_token_at_a_time_output_and_gradients(kind):
    """Algorithm 1 and equations 10 to 13 of 2409.19606, with matrices (n, E) for each token."""
    n = 3
    model = gpt(moved(HyperConnections(E, 2 * L, n, maps=kind)))
    branches = [
        part for layer in model.layers for part in ((layer.norm1, layer.mixer), (layer.norm2, layer.feed_forward))
    ]
    h = (model.embeddings(ids()) + model.positions(N)).flatten(0, 1)
    streams = [x.expand(n, E) for x in h]
    for maps, (norm, branch) in zip(model.connection.maps, branches):
        reads, mixed, writes = [], [], []
        for x in streams:
            a_m, a_r, b = maps.read, maps.mix, maps.write
            if kind is DynamicMaps:
                normed, w = maps.norm(x), maps.project.weight
                a_m = a_m + maps.scale[0] * torch.tanh(normed @ w[0])
                b = b + maps.scale[1] * torch.tanh(normed @ w[1])
                a_r = a_r + maps.scale[0] * torch.tanh(normed @ w[2:].T)
            reads.append(a_m @ x), mixed.append(a_r.T @ x), writes.append(b)
        added = branch(norm(torch.stack(reads).view(B, N, E))).flatten(0, 1)
        streams = [x + torch.outer(b, y) for x, b, y in zip(mixed, writes, added)]
    right = model.scores(model.norm_f(torch.stack(streams).mean(1).view(B, N, E)))
    torch.testing.assert_close(model(ids()), right, atol=1e-11, rtol=1e-11)
    pull, given = torch.randn(right.shape, dtype=torch.float64), list(model.parameters())
    for name, ours, theirs in zip(
        dict(model.named_parameters()),
        torch.autograd.grad(model(ids()), given, pull),
        torch.autograd.grad(right, given, pull),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-8, msg=name)


def test_doubly_stochastic_maps_are_those_of_transformers_output_and_every_gradient():
    n = 3
    ours = moved(DoublyStochasticMaps(E, n, 1, iterations=60)).double()
    config = DeepseekV4Config(hc_mult=n, hidden_size=E, hc_sinkhorn_iters=60, hc_eps=0.0, rms_norm_eps=1e-6)
    theirs = DeepseekV4HyperConnection(config).double()
    with torch.no_grad():  # the two divide rows and columns in another order: far from the identity both have converged
        ours.static[2 * n :] /= 8
        theirs.fn.copy_(ours.project.weight)
        theirs.base.copy_(ours.static)
        theirs.scale.copy_(ours.scale)
    streams = torch.randn(B, N, n, E, dtype=torch.float64, requires_grad=True)
    write, mix, reads = theirs(streams)  # in float32 inside
    maps = ours(streams)
    found = ((maps.read[..., None] * streams).sum(-2), maps.mix, maps.write)
    for a, b in zip(found, (reads, mix, write)):
        torch.testing.assert_close(a, b.double(), atol=3e-6, rtol=1e-4)
    pulls = [torch.randn(x.shape, dtype=torch.float64) for x in found]
    gradients = [
        torch.autograd.grad(outputs, [streams, *weights], [pull.to(x.dtype) for pull, x in zip(pulls, outputs)])
        for outputs, weights in (
            (found, (ours.project.weight, ours.static, ours.scale)),
            ((reads, mix, write), (theirs.fn, theirs.base, theirs.scale)),
        )
    ]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b.double(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_plain_stream(kind, n):
    plain, joined = gpt(eps=1e-18), gpt(HyperConnections(E, 2 * L, n, maps=kind), eps=1e-18)
    torch.testing.assert_close(joined(ids()), plain(ids()), atol=1e-10, rtol=1e-10)
    if kind is StaticMaps:
        assert torch.equal(gpt(HyperConnections(E, 2 * L, n, maps=kind))(ids()), gpt()(ids()))
        assert sum(x.numel() for x in joined.connection.parameters()) == 2 * L * n * (n + 2)


def test_sinkhorn_gives_rows_and_columns_that_sum_to_1_and_no_vector_grows():
    logits = 3 * torch.randn(7, 4, 4, dtype=torch.float64)
    found = sinkhorn(logits, 200)
    ones = torch.ones(7, 4, dtype=torch.float64)
    torch.testing.assert_close(found.sum(-1), ones)
    torch.testing.assert_close(found.sum(-2), ones)
    assert (found >= 0).all() and torch.linalg.matrix_norm(found, 2).max() < 1 + 1e-9
    whole = torch.linalg.multi_dot(list(found))  # a product of them is one, too
    torch.testing.assert_close(whole.sum(-1), ones[0])
    assert sinkhorn(1e4 * logits, 20).isfinite().all()
    assert F.one_hot(torch.tensor(0), 1) == sinkhorn(torch.zeros(1, 1))


def test_weight_decay_leaves_mixing_matrices_that_start_at_the_identity_alone():
    from nondual.training import decay_groups

    model = gpt(HyperConnections(E, 2 * L, 2))
    decayed = {name for name, _ in decay_groups(model, 0.1)[0]["params"]}
    assert not any(name.endswith(("mix", "read", "write", "scale")) for name in decayed)
    assert "connection.maps.0.project.weight" in decayed
    again = {name for name, _ in decay_groups(copy.deepcopy(model), 0.1)[0]["params"]}  # as for a running average
    assert again == decayed


def test_what_it_refuses():
    with pytest.raises(ValueError, match="n must be 1 or more, got 0"):
        HyperConnections(E, 2, 0)
    with pytest.raises(ValueError, match="n_branches must be 1 or more, got 0"):
        HyperConnections(E, 0)
    for made in (lambda: DoublyStochasticMaps(E, 2, 0, iterations=0), lambda: sinkhorn(torch.zeros(2, 2), 0)):
        with pytest.raises(ValueError, match="iterations must be 1 or more, got 0"):
            made()
    for shape in ((3,), (2, 3)):
        with pytest.raises(ValueError, match=r"logits must be square matrices \(..., n, n\), got"):
            sinkhorn(torch.zeros(shape))
