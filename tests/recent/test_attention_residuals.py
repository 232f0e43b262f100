"""Attention residuals: by hand, fla-core's function for outputs and gradients, the start, blocks, what it refuses."""

import pytest
import torch
from fla.ops.attnres.naive import naive_attnres
from torch import nn

from nondual.connections import LayerCall
from nondual.language_models.gpt import GPT
from nondual.recent.attention_residuals import AttentionResiduals, DepthAttention, keys_of

B, N, V, E, L = 2, 5, 11, 12, 3


def ids():
    return torch.randint(V, (B, N), generator=torch.Generator().manual_seed(1))


def moved(connection, seed=3):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in connection.parameters():
            x += 0.7 * torch.randn(x.shape, generator=draw).to(x)
    return connection


def gpt(connection, eps=1e-5):
    torch.manual_seed(0)
    model = GPT(V, E, L, 3, max_len=N, eps=eps)
    if connection is not None:
        model.connection = connection
    with torch.no_grad():
        model.embeddings.weight *= 40
    return model.double()


def test_two_vectors_by_hand():
    average = DepthAttention(2)
    with torch.no_grad():
        average.query.copy_(torch.tensor([1.0, 0.0]))
    vectors = [torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 2.0]]])]
    keys = [keys_of(x, eps=0.0) for x in vectors]
    # The root of the mean square of (3, 4) is √12.5, of (0, 2) √2: scores 3 / √12.5 and 0.
    first = torch.tensor(3 / 12.5**0.5).sigmoid()
    torch.testing.assert_close(average.weights(keys)[:, 0, 0], torch.stack([first, 1 - first]))
    torch.testing.assert_close(average(vectors, keys)[0, 0], torch.stack([3 * first, 4 * first + 2 * (1 - first)]))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_it_is_flas_function_output_weights_and_every_gradient(count):
    average = moved(DepthAttention(13))
    vectors = [torch.randn(3, 5, 13, requires_grad=True) for _ in range(count)]
    keys = [keys_of(x) for x in vectors]
    theirs, weights = naive_attnres(average.query, vectors, average.key_scale, return_weights=True)
    ours = average(vectors, keys)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(average.weights(keys), weights)
    pull, given = torch.randn(3, 5, 13), [*vectors, average.query, average.key_scale]
    for a, b in zip(torch.autograd.grad(ours, given, pull), torch.autograd.grad(theirs, given, pull)):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("block", [1, 2, 4, 9])
def test_a_model_is_the_sum_over_depth_written_with_flas_function(block):
    """Its judge: blocks of branches, kept in lists, and fla's function before each branch and at the end."""
    model = gpt(moved(AttentionResiduals(E, 2 * L, block=block)))
    branches = [
        part for layer in model.layers for part in ((layer.norm1, layer.mixer), (layer.norm2, layer.feed_forward))
    ]
    reads = model.embeddings(ids()) + model.positions(N)
    added = []
    for (norm, branch), average in zip(branches, model.connection.averages):
        added.append(branch(norm(reads)))
        blocks = [sum(added[i : i + block]) for i in range(0, len(added), block)]
        sources = [model.embeddings(ids()) + model.positions(N), *blocks]
        reads = naive_attnres(average.query, sources, average.key_scale).double()  # it computes in float32
    right = model.scores(model.norm_f(reads))
    torch.testing.assert_close(model(ids()), right, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("block", [1, 4])
def test_it_starts_as_the_plain_stream_since_a_norm_makes_the_same_of_a_mean_and_a_sum(block):
    plain, joined = gpt(None, eps=1e-18), gpt(AttentionResiduals(E, 2 * L, block=block), eps=1e-18)
    torch.testing.assert_close(joined(ids()), plain(ids()), atol=1e-10, rtol=1e-10)
    means = []
    joined.layers[2].norm1.register_forward_pre_hook(lambda _, args: means.append(args[0]))
    sums = []
    plain.layers[2].norm1.register_forward_pre_hook(lambda _, args: sums.append(args[0]))
    joined(ids()), plain(ids())
    torch.testing.assert_close(means[0] * (5 if block == 1 else 2), sums[0])  # the embeddings and four branches


def test_what_it_refuses():
    for name in ("n_branches", "block"):
        with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
            AttentionResiduals(E, **({"n_branches": 2} | {name: 0}))
    with pytest.raises(ValueError, match="vectors must be one or more with a key for each, got 0 and 0"):
        DepthAttention(E)([], [])
    with pytest.raises(ValueError, match=r"layers must have branches for this connection, .*, got Linear"):
        AttentionResiduals(E, 1)(torch.zeros(1, 1, E), [LayerCall(nn.Linear(E, E), {})])
