"""The papers' sizes, how the models begin, and the objective by exact windows; transformers judges in test_gpt2.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from nondual.language_models.gpt_family import SIZES, GPTFamily, GPTSize, gelu_new, log_likelihood
from nondual.language_models.mamba import MambaLM

B, N, V, E, HEADS, LAYERS, LONGEST = 2, 11, 31, 20, 5, 3, 23
SIZE = GPTSize(V, LONGEST, E, LAYERS, HEADS)
KINDS = {"GPT-2": SIZE, "GPT-1": GPTSize(V, LONGEST, E, LAYERS, HEADS, norm_first=False, d_ff=29)}


def tokens(length=N):
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(1))


def make(kind="GPT-2", **options):
    """A model whose scores are far from even."""
    torch.manual_seed(0)
    model = GPTFamily(KINDS[kind], **options).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4)
    return model


# --- sizes and beginnings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, count, millions",
    [
        ("openai-gpt", 116_534_784, 117),
        ("gpt2", 124_439_808, 124),
        ("gpt2-medium", 354_823_168, 355),
        ("gpt2-large", 774_030_080, 774),
        ("gpt2-xl", 1_557_611_200, 1558),
    ],
)
def test_the_released_models_tensor_by_tensor(name, count, millions):
    size = SIZES[name]
    with torch.device("meta"):
        model = GPTFamily(size)
    made = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert made == size.shapes()
    assert size.n_parameters() == sum(p.numel() for p in model.parameters()) == count
    v, c, e, n = size.vocabulary, size.max_len, size.d_model, size.n_layers
    assert count == v * e + c * e + n * (12 * e * e + 13 * e) + (2 * e if size.norm_first else 0)
    assert round(count / 1e6) == millions


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_one_has_the_shapes_that_its_size_says(kind):
    assert {name: tuple(p.shape) for name, p in GPTFamily(KINDS[kind]).named_parameters()} == KINDS[kind].shapes()
    untied = GPTFamily(KINDS[kind], tied=False)
    assert untied.lm_head.weight.shape == (V, E)


def test_how_they_begin():
    torch.manual_seed(0)
    wide = GPTFamily(GPTSize(997, 61, 256, 8, 4))
    for name, p in wide.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            last = name.endswith(("out_proj.weight", "linear2.weight"))
            expected = 0.02 / math.sqrt(16) if last else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(p.mean().item()) < 0.03 * expected, name
    post = GPTFamily(GPTSize(61, 7, 256, 8, 4, norm_first=False))
    assert post.layers[0].mixer.out_proj.weight.std().item() == pytest.approx(0.02, rel=0.03)
    ids = torch.randint(997, (2, 17))
    assert wide.loss(ids).item() == pytest.approx(math.log(997), abs=0.1)  # it knows nothing


def test_gelu_new_by_hand():
    x = 1.0
    expected = 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert gelu_new(torch.tensor(x)).item() == pytest.approx(expected, abs=1e-6)
    assert expected == pytest.approx(0.8412, abs=1e-4)


def test_where_the_norms_stand():
    """Post-norm: each layer's output has mean 0 and variance 1 at its first; pre-norm: it is the stream and its sum."""
    torch.manual_seed(0)
    ids = tokens()
    for kind, size in KINDS.items():
        model, seen = GPTFamily(size), []
        for layer in model.layers:
            layer.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        hidden = model.hidden(model.embeddings(ids))
        if kind == "GPT-1":
            assert torch.equal(hidden, seen[-1])
            torch.testing.assert_close(seen[0].var(-1, unbiased=False), torch.ones(B, N), atol=1e-3, rtol=0)
        else:
            torch.testing.assert_close(hidden, F.layer_norm(seen[-1], (E,)))


def test_dropout_is_on_embeddings_weights_and_branches_while_training():
    model, ids = make(dropout=0.5), tokens()
    assert torch.equal(model.eval()(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    first = []
    model.layers[0].register_forward_pre_hook(lambda _, given: first.append(given[0]))
    model(ids)
    assert 0.4 < (first[0] == 0).double().mean() < 0.6
    assert model.layers[0].mixer.dropout == 0.5


# --- the objective ----------------------------------------------------------------------------------------------------


def literal(model, row, k):
    """Equation 1 of GPT-1, one token at a time."""
    return torch.stack([model(row[None, max(0, i - k) : i])[0, -1].log_softmax(-1)[row[i]] for i in range(1, len(row))])


@pytest.mark.parametrize("k", [1, 2, 4, N - 2, N - 1, N, 99])
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_predicted_from_the_k_before_it(kind, k):
    model, ids = make(kind), tokens()
    right = torch.stack([literal(model, row, k) for row in ids])
    for rows in (1, 7, 64):
        torch.testing.assert_close(log_likelihood(model, ids, k, rows=rows), right, atol=1e-12, rtol=1e-12)
    if k >= N - 1:
        torch.testing.assert_close(-right.mean(), model.loss(ids), atol=1e-12, rtol=1e-12)


def test_gradients_of_the_windows_are_those_of_the_literal_sum():
    model, ids = make(), tokens()
    found = torch.autograd.grad(log_likelihood(model, ids, 3, rows=5).sum(), list(model.parameters()))
    right = torch.autograd.grad(torch.stack([literal(model, row, 3) for row in ids]).sum(), list(model.parameters()))
    for name, a, b in zip(model.state_dict(), found, right, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_other_models_and_narrow_numbers():
    torch.manual_seed(0)
    mamba, ids = MambaLM(V, 8, 2).double(), tokens()
    torch.testing.assert_close(log_likelihood(mamba, ids, 4)[0], literal(mamba, ids[0], 4), atol=1e-12, rtol=1e-12)
    found = log_likelihood(make().bfloat16(), ids.to(torch.uint8), 4)
    assert found.dtype == torch.float32 and found.shape == (B, N - 1) and (found <= 0).all()
    assert log_likelihood(make(), ids[:0], 4).shape == (0, N - 1)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda m, x: log_likelihood(m, x, 0), ValueError, "k and rows must be 1 or more, got 0 and 64"),
        (lambda m, x: log_likelihood(m, x, 3, rows=0), ValueError, "k and rows must be 1 or more, got 3 and 0"),
        (lambda m, x: log_likelihood(m, x[:, :1], 3), ValueError, r"2 tokens or more a row .* got \(2, 1\)"),
        (lambda m, x: log_likelihood(m, x + V, 3), ValueError, "ids must lie in 0 to 30, got "),
        (lambda m, x: log_likelihood(m, x.tolist(), 3), TypeError, "ids must be a Tensor, got list"),
        (
            lambda m, x: log_likelihood(m, x.repeat(1, 3), 24),
            ValueError,
            "k must be 23 positions or fewer, the longest that this model reads, got 24: give a smaller k",
        ),
        (lambda m, x: GPTFamily({"d_model": 8}), TypeError, r"size must be a GPTSize, such as .*, got dict"),
        (lambda m, x: GPTFamily(GPTSize(9, 9, 8, 1, 3)), ValueError, "d_model must be a multiple of n_heads"),
        (lambda m, x: GPTFamily(SIZE, dropout=1.0), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_what_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call(make(), tokens())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "ids, options, says",
    [
        (torch.tensor([[0, V]]), {}, "ids must lie in 0 to 30, got 0 to 31"),
        (torch.zeros(1, 0, dtype=torch.long), {}, "ids must hold a token or more to go on from"),
        (torch.zeros(1, 20, dtype=torch.long), {"n_new": 5}, "ids and n_new must be 23 positions or fewer, .* got 24"),
        (torch.zeros(1, 2, dtype=torch.long), {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        (torch.zeros(1, 2, dtype=torch.long), {"temperature": float("nan")}, "temperature must be above 0, got nan"),
        (torch.zeros(1, 2, dtype=torch.long), {"n_new": -1}, "n_new must be 0 or more, got -1"),
    ],
)
def test_what_it_does_not_go_on_from(kind, ids, options, says):
    with pytest.raises(ValueError, match=says):
        make(kind).generate(ids, **({"n_new": 3} | options))
