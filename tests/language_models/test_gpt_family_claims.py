"""What the essays say of a GPT: its objective and window, what the mask keeps out, decoding, and the printed lines."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.language_models.causal import CausalLM
from nondual.language_models.gpt import GPT
from nondual.language_models.gpt_family import GPTFamily, GPTSize, log_likelihood
from nondual.language_models.hybrid import HybridLM
from nondual.language_models.mamba import MambaLM
from nondual.ops import masks
from nondual.ops.attention import attention
from nondual.pretrained import hama_p2g, minilm
from nondual.self_attention import MultiHeadAttention, SelfAttention
from nondual.transformer import Encoder
from nondual.transformer_layer import TransformerLayer

B, N, V, E, HEADS, LAYERS = 2, 13, 31, 20, 5, 3
PRE, POST = (GPTSize(V, 23, E, LAYERS, HEADS, norm_first=first) for first in (True, False))


def loud(model):
    """The model in float64 with weights at which every token that may matter does."""
    with torch.no_grad():
        for p in model.double().parameters():
            if p.ndim > 1:
                p.normal_(std=0.4)
    return model


def tokens(length=N, batch=B):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


def jacobian(run, x):
    """How much the output at i changes with the input at j at most, (N, N): x (1, N, E) to run(x) (1, N, ·)."""
    whole = torch.autograd.functional.jacobian(lambda x: run(x)[0].square().sum(-1), x)
    return whole[:, 0].abs().amax(-1)


def vectors():
    return torch.randn(1, N, E, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


# --- A7.1 -------------------------------------------------------------------------------------------------------------


@pytest.mark.claim("A7.1", "holds")
@pytest.mark.parametrize("size", [PRE, POST], ids=["GPT-2", "GPT-1"])
def test_the_objective_is_cross_entropy_and_nothing_outside_the_window_counts(size):
    torch.manual_seed(0)
    model, ids, k = loud(GPTFamily(size, tied=False)), torch.arange(N)[None], 4
    endings = [torch.cat([ids[:, :-1], torch.full((1, 1), v)], 1) for v in range(V)]
    last = torch.stack([log_likelihood(model, ending, k)[0, -1] for ending in endings])
    torch.testing.assert_close(last.logsumexp(0).exp().item(), 1.0)  # P is a distribution over what may follow
    whole = log_likelihood(model, ids, N)
    torch.testing.assert_close(-whole.mean(), F.cross_entropy(model(ids)[0, :-1], ids[0, 1:]), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(-whole.mean(), model.loss(ids), atol=1e-12, rtol=1e-12)
    for i in range(1, N):  # every token has a row of the table of its own, and the scores have another table
        rows = torch.autograd.grad(log_likelihood(model, ids, k)[0, i - 1], model.embeddings.weight)[0].abs().sum(-1)
        assert (rows > 0).nonzero().flatten().tolist() == list(range(max(0, i - k), i))
        assert (rows[: max(0, i - k)] == 0).all()


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_a_window_in_every_layer_reaches_further_with_every_layer(n_layers):
    """Of w keys a layer, the query's own counted: w - 1 more places with each layer."""
    torch.manual_seed(0)
    window = 3
    model = loud(GPT(V, E, n_layers, HEADS, max_len=N, op=FlashAttention(window=window)))
    found = jacobian(lambda x: model.scores(model.hidden(x)), vectors()) > 0
    assert torch.equal(found, masks.sliding_window(N, window=n_layers * (window - 1) + 1))


# --- C7 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.claim("C7", "holds if")
def test_every_other_token_is_taken_in_without_a_causal_mask_and_with_one_only_the_earlier():
    torch.manual_seed(0)
    encoder, decoder = (loud(Encoder(E, HEADS, 29, LAYERS, norm_first=True, causal=c)) for c in (False, True))
    assert (jacobian(encoder, vectors()) > 0).all()
    assert torch.equal(jacobian(decoder, vectors()) > 0, masks.causal(N))
    model, ids = loud(GPTFamily(PRE)), tokens()
    for i in range(1, N):  # another token at i, and all after it
        other = torch.cat([ids[:, :i], (ids[:, i:] + 1) % V], 1)
        assert torch.equal(model(other)[:, :i], model(ids)[:, :i]) and not torch.equal(model(other), model(ids))


@torch.no_grad()
def test_in_real_models_it_is_the_mask_that_decides():
    """MiniLM takes in a later word; hama's speller another phoneme later in its prefix, and no letter that follows."""
    vectors, real = minilm().vectors([f"They sat on the bank of the {word}" for word in ("river", "money")])
    assert real.all() and ((vectors[0] - vectors[1])[:-2].norm(dim=-1) > 0.1).all()
    speller = hama_p2g()
    prompt = speller.prompt("n aɪ t".split())
    letters = [speller.tokens.index(letter) for letter in "night"]
    ids, prefix = torch.tensor([prompt + letters]), len(prompt)
    scores, other = speller.model(ids, prefix), ids.clone()
    other[0, prefix - 2] = speller.tokens.index("m")  # the last phoneme
    assert ((speller.model(other, prefix) - scores)[0].abs().amax(-1) > 0.1).all()
    other = ids.clone()
    other[0, -2:] = speller.tokens.index("e")  # the last two letters
    torch.testing.assert_close(speller.model(other, prefix)[:, :-2], scores[:, :-2], atol=1e-4, rtol=1e-4)
    assert ((speller.model(other, prefix) - scores)[0, -2:].abs().amax(-1) > 0.1).all()


# --- D8 ---------------------------------------------------------------------------------------------------------------


class AcrossPositions(nn.BatchNorm1d):
    """Batch norm over (B, N, E), as `norm=` of a layer: its mean is taken over batch and positions."""

    def __init__(self, d_model, eps=1e-5):
        super().__init__(d_model, eps=eps)

    def forward(self, x):
        return super().forward(x.mT).mT


MODELS = {
    "GPT-2": lambda: GPTFamily(PRE, dropout=0.3),
    "GPT-1": lambda: GPTFamily(POST, dropout=0.3),
    "RMS norm": lambda: CausalLM(V, E, 2, layer=lambda _: block(nn.RMSNorm)),
    "Mamba": lambda: MambaLM(V, E, 2),
    "hybrid": lambda: HybridLM(V, E, 2, HEADS, every=2),
}


def block(norm):
    feed_forward = nn.Sequential(nn.Linear(E, 29), nn.GELU(), nn.Linear(29, E))
    return TransformerLayer(MultiHeadAttention(E, HEADS, causal=True), feed_forward, E, norm_first=True, norm=norm)


def seeded(model):
    """Scores of vectors, every draw of dropout the same."""

    def run(x):
        torch.manual_seed(5)
        return model.scores(model.hidden(x))

    return run


@pytest.mark.claim("D8", "holds if")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_of_the_future_nothing_gets_through_the_mask_nor_past_it(kind, training):
    """Scores after i depend on tokens up to i; so the score of token i + 1 on none from i + 1 on: strictly lower."""
    torch.manual_seed(0)
    model = loud(MODELS[kind]()).train(training)
    found = jacobian(seeded(model), vectors())
    assert (found.triu(1) == 0).all()
    if not training:  # in training dropout leaves some out
        assert (found[masks.causal(N)] > 0).all()
        ids = tokens()
        each = log_likelihood(model, ids, N)
        other = torch.cat([ids[:, :6], (ids[:, 6:] + 1) % V], 1)
        assert torch.equal(log_likelihood(model, other, N)[:, :5], each[:, :5])  # tokens 1 to 5
        with torch.no_grad():
            cache = model.new_cache(B, N)
            parts = torch.cat([model(part, cache=cache) for part in ids.split([4, *[1] * 9], 1)], 1)
        torch.testing.assert_close(parts, model(ids), atol=1e-10, rtol=1e-10)  # at step i the future was not there


@pytest.mark.claim("D8", "holds if")
def test_a_norm_over_positions_lets_the_future_in_though_the_mask_stands():
    """The control: batch norm in place of layer norm; in evaluation, with stored means, it lets nothing through."""
    torch.manual_seed(0)
    model = loud(CausalLM(V, E, 2, layer=lambda _: block(AcrossPositions)))
    assert (jacobian(seeded(model.train()), vectors()) > 0).all()
    assert (jacobian(seeded(model.eval()), vectors()).triu(1) == 0).all()


# --- D9 ---------------------------------------------------------------------------------------------------------------


class Watched:
    """Attention that notes how many queries and keys each call had, and the weights of its last query."""

    def __init__(self):
        self.shapes, self.rows = [], []

    def __call__(self, q, k, v, *, return_weights=False, **options):
        out, weights = attention(q, k, v, return_weights=True, **options)
        self.shapes.append((q.shape[2], k.shape[2]))
        self.rows.append(weights[:, :, -1])
        return (out, weights) if return_weights else out


@pytest.mark.claim("D9", "holds")
@torch.no_grad()
def test_each_step_makes_one_new_row_of_routing_over_states_that_stay_as_they_were():
    torch.manual_seed(0)
    op = Watched()
    model, ids = loud(GPT(V, E, 1, HEADS, max_len=23, op=op)), tokens(4)
    written = model.generate(ids, 7)
    with_cache, rows = op.shapes.copy(), op.rows.copy()
    op.shapes.clear(), op.rows.clear()
    assert torch.equal(model.generate(ids, 7, cached=False), written)
    assert with_cache == [(4, 4), *[(1, n) for n in range(5, 11)]]  # one query a step, over all that came before
    assert op.shapes == [(n, n) for n in range(4, 11)]  # every row again, though none of them has changed
    for cached, whole in zip(rows, op.rows, strict=True):
        torch.testing.assert_close(cached, whole, atol=1e-10, rtol=1e-10)

    cache = model.new_cache(B, 12)
    model(written[:, :5], cache=cache)
    before = cache[1].keys[:, :, :5].clone()
    model(written[:, 5:6], cache=cache)
    assert torch.equal(cache[1].keys[:, :, :5], before) and cache[1].length == 6  # past states are read, not changed
    mamba = MambaLM(V, E, 1).double()
    states = mamba.new_cache(B)
    sizes = []
    for part in written.split(1, 1):
        mamba(part, cache=states)
        sizes.append(sum(x.numel() for x in vars(states[0]).values() if isinstance(x, torch.Tensor)))
    assert len(set(sizes)) == 1  # a recurrent state does not grow, and routes anew over nothing


# --- D11 --------------------------------------------------------------------------------------------------------------

PRINTED = """
Q = X @ W_q
K = X @ W_k
V = X @ W_v

scores = (Q @ K.T) / sqrt(d_k)

if causal:
    scores = mask_future_tokens(scores)

weights = softmax(scores)

X_next = weights @ V
"""
"""The lines of the essay's section 14, "Minimal pseudocode"."""


def run(softmax, mask_future_tokens, X, matrices, causal):
    """X_next and the weights by the printed lines, with the names that they leave open bound to these functions."""
    scope = dict(zip(("W_q", "W_k", "W_v"), matrices)) | {"X": X, "d_k": 7, "causal": causal, "sqrt": math.sqrt}
    exec(PRINTED, scope | (given := {"softmax": softmax, "mask_future_tokens": mask_future_tokens}), given)
    return given["X_next"], given["weights"]


def by_torch(scores):
    return scores.masked_fill(~masks.causal(N), -math.inf)


def by_numpy(scores):
    return np.where(masks.causal(N).numpy(), scores, -np.inf)


@pytest.mark.claim("D11", "holds if")
@pytest.mark.parametrize("causal", [False, True])
def test_the_printed_lines_are_one_head_if_softmax_is_taken_of_each_row(causal):
    torch.manual_seed(0)
    X, layer = torch.randn(N, E, dtype=torch.float64), SelfAttention(E, 7, 11, bias=False).double()
    matrices = [getattr(layer, f"{name}_proj").weight.T.detach() for name in "qkv"]
    right, rows = (x.detach() for x in layer(X[None], causal=causal, return_weights=True))
    out, weights = run(lambda scores: scores.softmax(-1), by_torch, X, matrices, causal)
    torch.testing.assert_close(out, right[0])
    torch.testing.assert_close(weights, rows[0])

    def over_all(scores):  # what a softmax without an axis is in scipy.special
        e = np.exp(scores - scores.max())
        return e / e.sum()

    out, weights = run(over_all, by_numpy, X.numpy(), [m.numpy() for m in matrices], causal)
    assert weights.sum() == pytest.approx(1) and weights.sum(-1).max() < 0.9
    assert not np.allclose(out, right[0].numpy())
    with pytest.raises(TypeError):
        run(torch.softmax, by_torch, X, matrices, causal)  # torch asks which axis


def test_of_a_batch_the_printed_transpose_turns_every_axis():
    """K.T is for one sequence; of a batch (B, N, D) numpy's turns the batch too, and the shapes do not fit."""
    X, matrices = np.ones((B, N, E)), [np.ones((E, 7))] * 3
    with pytest.raises(ValueError, match="matmul"):
        run(lambda scores: scores, by_numpy, X, matrices, False)
