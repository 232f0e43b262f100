"""Direct paths: a closed form for linear layers, a judge made of hooks, what nothing does, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nondual.analysis.direct_paths import cut_paths, direct_paths, random_direction, stream_parts
from nondual.language_models.causal import CausalLM
from nondual.language_models.gpt import GPT
from nondual.recent.denseformer import DenseFormer
from nondual.transformer_layer import MixerBlock

B, N, V, E, L = 3, 7, 11, 5, 4


class Product(nn.Module):
    """A mixer that mixes no positions: x W."""

    def __init__(self):
        super().__init__()
        self.out_proj = nn.Linear(E, E, bias=False)

    def forward(self, x):
        return self.out_proj(x)


@pytest.fixture
def ids():
    return torch.randint(V, (B, N), generator=torch.Generator().manual_seed(1))


def linear():
    torch.manual_seed(0)
    return CausalLM(V, E, L, layer=lambda _: MixerBlock(Product(), E, norm=lambda *_, **__: nn.Identity())).double()


def gpt():
    torch.manual_seed(0)
    model = GPT(V, 12, L, 3, max_len=N).double()
    with torch.no_grad():
        model.embeddings.weight *= 40
    return model


def test_the_parts_sum_to_what_each_layer_reads(ids):
    model, read = gpt(), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    parts = stream_parts(model, ids)
    assert len(parts) == L
    for k, x in enumerate(read, start=1):
        torch.testing.assert_close(sum(parts[:k]), x)
    torch.testing.assert_close(parts[0], model.embeddings(ids) + model.positions(N))


def test_of_linear_layers_a_cut_moves_the_output_by_the_layer_s_matrix_times_the_part(ids):
    model = linear()
    parts, found = stream_parts(model, ids), direct_paths(model, ids)
    for k in range(1, L + 1):
        w = model.layers[k - 1].mixer.out_proj.weight
        added = sum(parts[:k]) @ w.T
        for j in range(L):
            right = (
                ((parts[j] @ w.T).norm(dim=-1) / added.norm(dim=-1)).mean(1) if j < k else torch.full((B,), torch.nan)
            )
            torch.testing.assert_close(
                found.output[j, k - 1].double(), right.double(), equal_nan=True, atol=1e-6, rtol=1e-5
            )
    assert found.loss is None


@pytest.mark.parametrize("first", [0, 2])
def test_it_is_what_hooks_on_the_one_layer_give(ids, first):
    """A judge: the layer's input is changed by a hook before it, and the stream put right by one after it."""
    model, j, k = gpt(), 1, 3
    parts = stream_parts(model, ids)
    removed = parts[j].clone()
    removed[:, :first] = 0
    outputs = []

    def run(removed):
        layer = model.layers[k - 1]
        before = layer.register_forward_pre_hook(lambda _, args: (args[0] - removed, *args[1:]))
        after = layer.register_forward_hook(lambda _, args, y: (outputs.append(y - args[0]), y + removed)[1])
        with torch.no_grad():
            scores = model(ids)
        before.remove(), after.remove()
        each = F.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(B, N - 1)
        return each[:, first:].mean(1)

    rise = run(removed) - run(0 * removed)
    changed, added = outputs
    moved = ((changed - added).norm(dim=-1) / added.norm(dim=-1))[:, first:].mean(1)
    found, _ = cut_paths(model, ids, parts, k, [parts[j], parts[0]], first=first)
    torch.testing.assert_close(found.output, moved)
    torch.testing.assert_close(found.loss, rise, atol=1e-12, rtol=1e-7)
    assert (found.loss.abs() > 1e-6).all()


def test_nothing_removed_changes_nothing_and_the_last_layer_may_be_cut(ids):
    model = gpt()
    parts = stream_parts(model, ids)
    for k in (1, L):
        (effect,) = cut_paths(model, ids, parts, k, [0 * parts[0]])
        assert not effect.output.any() and not effect.loss.any()
    one = direct_paths(model, ids, layers=[L], loss=True)
    assert one.loss[:, L - 1].isfinite().all() and one.loss[:, : L - 1].isnan().all()


def test_a_random_direction_has_the_part_s_lengths_and_is_drawn_anew():
    part = torch.randn(B, N, E, dtype=torch.float64)
    draw = random_direction(torch.Generator().manual_seed(0))
    one, two = draw(part), draw(part)
    torch.testing.assert_close(one.norm(dim=-1), part.norm(dim=-1))
    assert not torch.allclose(one, two) and one.dtype == part.dtype


def test_what_it_refuses(ids):
    model = gpt()
    parts = stream_parts(model, ids)
    with pytest.raises(TypeError, match="model must be a CausalLM, got Linear"):
        stream_parts(nn.Linear(2, 2), ids)
    with pytest.raises(ValueError, match="model must have the plain residual stream, got another connection"):
        stream_parts(GPT(V, 12, L, 3, max_len=N, connection=DenseFormer(L)), ids)
    with pytest.raises(ValueError, match="k must be a layer, 1 to 4, got 5"):
        cut_paths(model, ids, parts, 5, parts[:1])
    with pytest.raises(ValueError, match=r"removed must be \(B, N, E\) = \(3, 7, 12\) each, got \(7, 12\)"):
        cut_paths(model, ids, parts, 1, parts[0])
    with pytest.raises(ValueError, match="first must lie in 0 to 5"):
        cut_paths(model, ids, parts, 1, parts[:1], first=6)
