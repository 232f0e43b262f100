"""DenseFormer: by hand, the start, the number of weights, a judge that keeps every output, what it refuses; A8.4."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from nondual.analysis.critical_path import longest_chain
from nondual.analysis.direct_paths import cut_paths, stream_parts
from nondual.connections import LayerCall
from nondual.language_models.gpt import GPT
from nondual.recent.attention_residuals import AttentionResiduals, keys_of
from nondual.recent.denseformer import DenseFormer, n_weights, weighted_sum

B, N, V, E, L = 2, 5, 11, 12, 7
MEASURED = Path(__file__).parent.parent.parent / "docs" / "measured"


class Add(nn.Module):
    """A layer that adds a number."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return x + self.number


def calls(*numbers):
    return [LayerCall(Add(number), {}) for number in numbers]


def moved(connection, seed=3):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in connection.parameters():
            x += torch.randn(x.shape, generator=draw).to(x)
    return connection


def gpt(connection):
    torch.manual_seed(0)
    model = GPT(V, E, L, 3, max_len=N)
    model.connection = connection
    with torch.no_grad():
        model.embeddings.weight *= 40
    return model.double()


def ids(seed=1):
    return torch.randint(V, (B, N), generator=torch.Generator().manual_seed(seed))


def test_two_layers_by_hand():
    dense, x = DenseFormer(2), torch.zeros(1, 1, 1)
    with torch.no_grad():
        dense.weights[0].copy_(torch.tensor([5.0, 2.0]))
        dense.weights[1].copy_(torch.tensor([1.0, -1.0, 3.0]))
    # X_0 = 10. X_1 = 10 + 1 = 11, Y_1 = 5 · 10 + 2 · 11 = 72. X_2 = 72 + 4 = 76, Y_2 = 10 - 11 + 3 · 76 = 227.
    assert dense(x + 10, calls(1, 4)).item() == 227
    assert dense.matrix().tolist() == [[5, 2, 0], [1, -1, 3]]


@pytest.mark.parametrize("dilation, period", [(1, 1), (2, 1), (3, 2), (2, 3), (9, 1), (1, 8)])
def test_it_starts_as_the_plain_stream_to_the_bit_and_has_as_many_weights_as_the_formula_says(dilation, period):
    dense = DenseFormer(L, dilation=dilation, period=period)
    plain, joined = GPT(V, E, L, 3, max_len=N), GPT(V, E, L, 3, max_len=N, connection=dense)
    joined.load_state_dict(plain.state_dict() | {f"connection.{name}": x for name, x in dense.state_dict().items()})
    assert torch.equal(joined(ids()), plain(ids()))
    found = sum(x.numel() for x in dense.parameters())
    assert found == n_weights(L, dilation, period) == sum(1 + i // dilation for i in range(1, L + 1) if i % period == 0)
    if (dilation, period) == (1, 1):
        assert found == L * (L + 3) / 2
    assert (dense.matrix() != 0).sum() == len(dense.weights)  # a single 1 a row


@pytest.mark.parametrize("dilation, period", [(1, 1), (3, 2)])
def test_output_and_gradients_are_those_of_a_sum_over_all_that_was_kept(dilation, period):
    dense = moved(DenseFormer(L, dilation=dilation, period=period))
    model = gpt(dense)
    rows = {(i + 1) * period: i for i in range(len(dense.weights))}
    hidden = model.embeddings(ids()) + model.positions(N)
    kept, matrix = [hidden], [x for x in dense.weights]
    for i, layer in enumerate(model.layers, start=1):
        kept.append(layer(hidden))
        hidden = kept[-1]
        if i in rows:
            chosen = [j for j in range(i + 1) if (i - j) % dilation == 0]
            hidden = sum(w * kept[j] for w, j in zip(matrix[rows[i]], chosen, strict=True))
    right = model.scores(model.norm_f(hidden))
    torch.testing.assert_close(model(ids()), right, atol=1e-12, rtol=1e-12)
    pull = torch.randn(right.shape, dtype=torch.float64)
    given = list(model.parameters())
    for name, ours, theirs in zip(
        dict(model.named_parameters()),
        torch.autograd.grad(model(ids()), given, pull),
        torch.autograd.grad(right, given, pull),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-10, msg=name)


def test_a_weighted_sum_keeps_the_vectors_dtype():
    vectors = [torch.randn(3, 5), torch.randn(3, 5)]
    with torch.autocast("cpu", torch.bfloat16):
        found = weighted_sum(torch.tensor([2.0, -1.0], dtype=torch.float64), vectors)
    torch.testing.assert_close(found, 2 * vectors[0] - vectors[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weighted_sum_of_half_precision_is_rounded_once(dtype):
    vectors = [torch.randn(5, 7, 13).to(dtype) for _ in range(23)]
    weights = torch.randn(23, generator=torch.Generator().manual_seed(2))
    exact = sum(weight.double() * vector.double() for weight, vector in zip(weights, vectors))
    torch.testing.assert_close(weighted_sum(weights, vectors), exact.to(dtype), atol=1e-5, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_keeps_each_vector_once(dtype):
    x, kept = torch.randn(B, N, E, dtype=dtype, requires_grad=True), {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage, storage.nbytes())  # holds it, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        DenseFormer(L).to(dtype)(x, calls(*range(L)))
    vectors = sum(size for _, size in kept.values() if size >= x.untyped_storage().nbytes())
    assert vectors == (L + 1) * x.untyped_storage().nbytes()  # X_0 to X_L


def test_a_weighted_sum_refuses_another_number_of_weights():
    for vectors in ([], [torch.zeros(3)]):
        with pytest.raises(ValueError, match=r"weights must be one number for each vector, got \(2,\) for "):
            weighted_sum(torch.ones(2), vectors)


@pytest.mark.parametrize("name", ["n_layers", "dilation", "period"])
def test_what_it_refuses(name):
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        DenseFormer(**({"n_layers": 2} | {name: 0}))
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        n_weights(**({"n_layers": 2} | {name: 0}))
    with pytest.raises(ValueError, match="connection must be made for the model's 2 layers, got one for 3"):
        DenseFormer(3)(torch.zeros(1, 1, 1), calls(1, 1))


# --- claims --------------------------------------------------------------------------------------------------------


def carried(connection, k, other):
    """How far the last output moves when all that was given before layer k's output changes, and that output does not.

    The layers up to k give what they gave, whatever they read; the embeddings and the outputs below k are exchanged.
    """
    model = gpt(connection)
    given = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, y: given.append(y.detach()))
    right = model.hidden(model.embeddings(ids()))
    for layer in model.layers:
        layer._forward_hooks.clear()
    for i, layer in enumerate(list(model.layers)[:k]):
        changed = given[i] + (other if i + 1 < k else 0)
        layer.register_forward_hook(lambda _, __, y, changed=changed: changed)
    return (model.hidden(model.embeddings(ids()) + other) - right).abs().max().item()


@pytest.mark.claim("A8.4", "holds if")
def test_earlier_outputs_are_read_beside_the_last_one_but_the_layers_wait_for_one_another_as_before():
    torch.manual_seed(5)
    other = torch.randn(B, N, E, dtype=torch.float64)
    plain = gpt(DenseFormer(L))  # at its start: the plain stream
    dense, attention = moved(DenseFormer(L)), moved(AttentionResiduals(E, 2 * L))
    # In the plain stream all that reaches a later layer goes through the one vector before it. In a DenseFormer not.
    assert carried(plain.connection, 3, other) < 1e-9 < 1e-3 < carried(dense, 3, other)

    # What waits for what: as many products of matrices one after another as without it.
    chains = [longest_chain(gpt(connection).loss(ids())) for connection in (DenseFormer(L), dense, attention)]
    chain = longest_chain(gpt_of_plain_stream().loss(ids()))
    assert chains[0] == chains[1] == chain < chains[2]

    # A DenseFormer's weights are numbers: the same for every token. Attention over depth weighs anew at each position.
    vectors = [torch.randn(B, N, E, dtype=torch.float64) for _ in range(3)]
    keys = [keys_of(x) for x in vectors]
    weights = attention.double().averages[1].weights(keys)
    torch.testing.assert_close(weights.sum(0), torch.ones(B, N, dtype=torch.float64))
    assert weights.flatten(1).std(1).min() > 0.01
    assert all(x.ndim == 1 for x in dense.weights) and sum(x.numel() for x in dense.weights) == n_weights(L)

    # Trained for equally many steps with six seeds, none differs from the plain stream by more than its interval; the
    # most that a DenseFormer may have gained by it is a hundredth of a bit per character.
    arms = json.loads((MEASURED / "depth.json").read_text(encoding="utf-8"))["figures"]["arms"]
    assert len(arms) == 6 and all(len(of["seeds"]) == 6 for of in arms.values())
    assert arms["denseformer"]["less_plain"]["interval"][0] > -0.01
    for name, of in arms.items():
        if name != "plain":
            low, high = of["less_plain"]["interval"]
            assert low < 0 < high


@pytest.mark.claim("A8.9", "holds if")
@torch.no_grad()
def test_a_layer_reads_one_vector_and_what_each_earlier_layer_added_stands_in_it_as_it_was_written():
    model = gpt_of_plain_stream()
    model.embeddings.weight *= 40
    parts = stream_parts(model, ids())
    k, read = 5, []
    model.layers[k - 1].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    model(ids())
    # What layer k reads is the output of the one before it, and nothing else; that is the sum of what all have added.
    torch.testing.assert_close(read[0], sum(parts[:k]))
    torch.testing.assert_close(read[0], model.layers[k - 2](sum(parts[: k - 1])))
    # Each part counts by itself: what any of them added, taken out of what layer k alone reads, moves its output.
    effects = torch.stack([effect.output for effect in cut_paths(model, ids(), parts, k, parts[:k], loss=False)])
    assert effects.shape == (k, B) and effects.min() > 0.01
    # In SmolLM2 a layer cannot do with the last part alone: its output moves by more than its own length, and further
    # than without a random vector as long; the loss rises.
    run = json.loads((MEASURED / "direct_paths.json").read_text(encoding="utf-8"))["figures"]
    assert list(run["groups"]) == ["10", "20", "30"]
    for of in run["groups"].values():
        last_alone, at_random = of["all but the one before"], of["as long, at random"]
        assert last_alone["output"]["interval"][0] > max(1, at_random["output"]["interval"][1])
        assert last_alone["loss"]["interval"][0] > max(1, at_random["loss"]["interval"][1])
        assert 0.25 < at_random["loss"]["mean"] < 1.15 and 1.85 < last_alone["loss"]["mean"] < 3.65
    # One path alone counts for little: on average hardly more than a random vector of its length.
    one, as_long = (run["earlier_than_the_one_before"][name] for name in ("cut", "random"))
    assert as_long["interval"][1] < one["interval"][0] and one["mean"] < 1.2 * as_long["mean"]


def gpt_of_plain_stream():
    torch.manual_seed(0)
    return GPT(V, E, L, 3, max_len=N).double()
