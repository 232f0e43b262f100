"""The prefix language model: its mask by what each position depends on, its loss, and its cached generation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nondual.efficient_attention.mamba import Mamba
from nondual.language_models.causal import CausalLM
from nondual.language_models.gpt_family import GPTFamily, GPTSize
from nondual.language_models.mamba import MambaLM
from nondual.language_models.prefix_lm import PrefixLM
from nondual.transformer_layer import TransformerLayer

B, N, V, E, HEADS, LONGEST = 2, 11, 31, 20, 5, 23


def make():
    torch.manual_seed(0)
    model = PrefixLM(GPTFamily(GPTSize(V, LONGEST, E, 2, HEADS))).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4)
        model.model.norm_f.bias.zero_()  # or one token would be the likeliest everywhere
    return model


def tokens(length=N, batch=B, seed=1):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


def depends(model, ids, prefix):
    """Whether the scores after position i change with the vector at j, (N, N)."""
    x = model.model.embeddings(ids[:1]).detach().requires_grad_()
    model.model.embeddings.register_forward_hook(lambda *_: x)
    scores = model(ids[:1], prefix)[0]
    rows = [torch.autograd.grad(scores[i].square().sum(), x, retain_graph=True)[0][0] for i in range(ids.shape[1])]
    return torch.stack(rows).abs().amax(-1) > 0


@pytest.mark.parametrize("prefix", [1, 4, N])
def test_the_prefix_is_read_both_ways_and_the_rest_from_the_past(prefix):
    i, j = torch.arange(N)[:, None], torch.arange(N)
    assert torch.equal(depends(make(), tokens(), prefix), (j <= i) | (j < prefix))


def test_a_prefix_of_one_is_the_causal_model_and_rows_may_differ():
    model, ids = make(), tokens()
    torch.testing.assert_close(model(ids, 1), model.model(ids), atol=1e-12, rtol=1e-12)
    both = model(ids, torch.tensor([4, 7], dtype=torch.int32))
    for row, prefix in enumerate((4, 7)):
        torch.testing.assert_close(both[row], model(ids[row : row + 1], prefix)[0], atol=1e-12, rtol=1e-12)


def test_against_torchs_encoder_with_the_mask_as_torch_writes_it():
    """nn.TransformerEncoder with copied weights: True in its mask is where attending is forbidden."""
    model, ids, prefix = make(), tokens(), 4
    layer = nn.TransformerEncoderLayer(E, HEADS, 4 * E, 0.0, lambda x: F.gelu(x, approximate="tanh"), 1e-5, True, True)
    judge = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E), enable_nested_tensor=False).double()
    state = {}
    for i, ours in enumerate(model.model.layers):
        mixer = ours.mixer
        for kind in ("weight", "bias"):
            stacked = [getattr(getattr(mixer, f"{name}_proj"), kind) for name in "qkv"]
            state[f"layers.{i}.self_attn.in_proj_{kind}"] = torch.cat(stacked)
            state[f"layers.{i}.self_attn.out_proj.{kind}"] = getattr(mixer.out_proj, kind)
            for name in ("linear1", "linear2"):
                state[f"layers.{i}.{name}.{kind}"] = getattr(getattr(ours.feed_forward, name), kind)
            for name in ("norm1", "norm2"):
                state[f"layers.{i}.{name}.{kind}"] = getattr(getattr(ours, name), kind)
            state[f"norm.{kind}"] = getattr(model.model.norm_f, kind)
    judge.load_state_dict(state)
    forbidden = torch.ones(N, N).triu(1).bool()
    forbidden[:, :prefix] = False
    x = model.model.embeddings(ids) + model.model.positions(N)
    right = judge(x, mask=forbidden) @ model.model.embeddings.weight.T
    torch.testing.assert_close(model(ids, prefix), right, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("prefix", [4, torch.tensor([4, N])])
def test_the_loss_is_of_the_tokens_after_the_prefix(prefix):
    model, ids = make(), tokens()
    scores, each = model(ids, prefix), []
    for row, length in enumerate([4, 4] if isinstance(prefix, int) else prefix.tolist()):
        each.append(F.cross_entropy(scores[row, length - 1 : -1], ids[row, length:], reduction="none"))
    loss = model.loss(ids, prefix)
    torch.testing.assert_close(loss, torch.cat(each).mean(), atol=1e-12, rtol=1e-12)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.loss(ids, N).item() == 0


def test_with_a_cache_it_writes_what_it_writes_without():
    model, prompt = make(), tokens(5)
    found = model.generate(prompt, 12)
    assert torch.equal(found, model.generate(prompt, 12, cached=False)) and found.shape == (B, 17)
    right = prompt
    for _ in range(12):
        right = torch.cat([right, model(right, 5)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, right) and not torch.equal(found, model.model.generate(prompt, 12))
    drawn = [
        model.generate(
            prompt, 12, temperature=1.3, top_k=9, top_p=0.9, generator=torch.Generator().manual_seed(3), cached=cached
        )
        for cached in (True, False)
    ]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], found)


def test_padded_on_the_left_each_row_goes_on_as_it_does_alone():
    model, lengths = make(), (7, 4)
    ids, reset = torch.zeros(B, 7, dtype=torch.long), torch.zeros(B, 7, dtype=torch.bool)
    for row, length in enumerate(lengths):
        ids[row, 7 - length :], reset[row, 7 - length] = tokens(length, 1, seed=row)[0], True
    both = model.generate(ids, 9, reset=reset)
    for row, length in enumerate(lengths):
        assert torch.equal(both[row, 7:], model.generate(tokens(length, 1, seed=row), 9)[0, length:])


def test_a_finished_row_repeats_its_last_token():
    model, prompt = make(), tokens(5)
    eos = int(model.generate(prompt, 4)[0, 7])
    rest = model.generate(prompt, 12, eos=eos)[0, 5:].tolist()
    assert eos in rest and set(rest[rest.index(eos) :]) == {eos}


def test_two_programs_serve_every_length():
    model = make().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for length in (3, 7, N):
        torch.testing.assert_close(compiled(tokens(length), 2), model(tokens(length), 2))


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda m, x: m(x, 0), ValueError, "prefix must lie in 1 to 11, the length of ids, got 0 to 0"),
        (lambda m, x: m.loss(x, 12), ValueError, "prefix must lie in 1 to 11, the length of ids, got 12 to 12"),
        (lambda m, x: m(x, torch.tensor([0, 3])), ValueError, "prefix must lie in 1 to 11, .*, got 0 to 3"),
        (lambda m, x: m(x, torch.tensor([3])), ValueError, "prefix must be a length for each of 2 rows, got 1"),
        (lambda m, x: m(x, torch.tensor([3.0, 2.0])), ValueError, r"prefix must be integers \(B,\), got torch.float32"),
        (lambda m, x: m(x + V, 3), ValueError, "ids must lie in 0 to 30"),
        (lambda m, x: m.generate(x[:, :0], 3), ValueError, "ids must hold a token or more to go on from"),
        (lambda m, x: m.generate(x, 14), ValueError, "ids and n_new must be 23 positions or fewer"),
        (lambda m, x: m.generate(x, 3, temperature=-1.0), ValueError, "temperature must be above 0, got -1.0"),
        (
            lambda m, x: m.generate(x, 3, reset=torch.zeros(B, N) > 0, cached=False),
            ValueError,
            "reset must be left out with cached=False",
        ),
    ],
)
def test_what_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call(make(), tokens())


def test_mixers_without_a_mask_are_named():
    model = PrefixLM(MambaLM(V, 8, 2))
    with pytest.raises(ValueError, match="mask must be left out: the mixer of layer 0, Mamba, does not take it"):
        model(tokens(), 3)

    def layer(i):
        return TransformerLayer(Mamba(8), nn.Identity(), 8, norm_first=True)

    with pytest.raises(ValueError, match="the mixer of layer 0, Mamba, does not take it"):
        PrefixLM(CausalLM(V, 8, 1, layer=layer)).generate(tokens(), 3)
