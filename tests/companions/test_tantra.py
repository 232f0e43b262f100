"""Essay B, Transformer Tantra: its code for attention, as printed and mended; query, key and value; order."""

import copy
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nondual.analysis.heads import overlap
from nondual.data import BANK
from nondual.ops.attention import attention
from nondual.positional_encoding import Sinusoidal
from nondual.pretrained import minilm
from nondual.self_attention import MultiHeadAttention, SelfAttention
from nondual.transformer import Encoder

MEASURED = Path(__file__).parent.parent.parent / "docs/measured"
PRINTED = {  # as printed, without the docstrings
    "attention": """
def scaled_dot_product_attention(Q, K, V):
    scores = Q @ K.T / sqrt(d_k)
    attention_weights = softmax(scores)
    return attention_weights @ V
""",
    "heads": """
class MultiHeadAttention:
    def __init__(self, d_model, num_heads):
        self.heads = [AttentionHead() for _ in range(num_heads)]

    def forward(self, x):
        outputs = [head(x) for head in self.heads]
        return self.combine(outputs)
""",
    "understanding": """
relevance = cosine_similarity(query, key)
understanding = relevance * value
""",
    "positions": """
def positional_encoding(position, d_model):
    pos_encoding = np.zeros((position, d_model))
    for i in range(0, d_model, 2):
        pos_encoding[:, i] = np.sin(position / (10000 ** (i/d_model)))
        pos_encoding[:, i+1] = np.cos(position / (10000 ** (i/d_model)))
    return pos_encoding
""",
}


def printed(name, **given):
    """What the printed lines define, with the names that they leave open bound to these."""
    exec(PRINTED[name], given)
    return given


@pytest.fixture(scope="module")
def encoder():
    return minilm()


def rows(x):
    return x.softmax(-1)


# --- attention and heads -------------------------------------------------------------------------------------------


@pytest.mark.claim("B1", "holds")
def test_the_printed_function_is_attention_over_matrices_if_three_names_are_what_the_paper_says():
    torch.manual_seed(0)
    q, k, v = torch.randn(7, 5).double(), torch.randn(11, 5).double(), torch.randn(11, 3).double()
    for name in ("sqrt", "d_k", "softmax"):
        given = {"sqrt": math.sqrt, "d_k": 5, "softmax": rows}
        del given[name]
        with pytest.raises(NameError, match=name):
            printed("attention", **given)["scaled_dot_product_attention"](q, k, v)
    f = printed("attention", sqrt=math.sqrt, d_k=5, softmax=rows)["scaled_dot_product_attention"]
    ours = attention(*(x[None, None] for x in (q, k, v)))[0, 0]
    torch.testing.assert_close(f(q, k, v), ours)
    torch.testing.assert_close(f(q, k, v), F.scaled_dot_product_attention(q, k, v))
    as_one = printed("attention", sqrt=math.sqrt, d_k=5, softmax=lambda x: x.flatten().softmax(0).view_as(x))
    wrong = as_one["scaled_dot_product_attention"](q, k, torch.ones_like(v))
    assert wrong.sum().isclose(torch.tensor(3.0).double())  # all weights together are 1, and not those of a row
    # of a batch .T turns all three axes: an error, or, where sizes happen to agree, another result
    with pytest.raises(RuntimeError, match="size"), pytest.warns(UserWarning, match="dimension"):
        f(q[None].repeat(2, 1, 1), k[None].repeat(2, 1, 1), v[None].repeat(2, 1, 1))
    q, k, v = torch.randn(3, 5, 5, 5).double()
    silent, right = f(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert silent.shape == right.shape and (silent - right).abs().max() > 0.1
    mended = f.__code__.replace(co_names=tuple("mT" if name == "T" else name for name in f.__code__.co_names))
    torch.testing.assert_close(type(f)(mended, f.__globals__)(q, k, v), right)


@pytest.mark.claim("B9", "holds if")
def test_heads_in_a_loop_are_heads_at_once():
    torch.manual_seed(0)
    E, H, N = 12, 3, 7
    layer = MultiHeadAttention(E, H, bias=False).double()
    loop = printed("heads", AttentionHead=lambda: SelfAttention(E, E // H, bias=False).double())["MultiHeadAttention"](
        E, H
    )
    assert not hasattr(loop, "combine") and not hasattr(loop, "parameters")  # to be mended: no W_O, no nn.Module
    loop.combine = lambda outputs: layer.out_proj(torch.cat(outputs, -1))
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            for head, part in zip(loop.heads, getattr(layer, name).weight.chunk(H)):
                getattr(head, name).weight.copy_(part)
    x = torch.randn(2, N, E, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(loop.forward(x), layer(x))
    grads = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (loop.forward, layer)]
    torch.testing.assert_close(*grads)


@pytest.mark.claim("B9", "holds if")
def test_directions_of_heads_are_found_in_training(encoder):
    """Before training heads share nearly all of their weight; trained, about half, and some nearly all."""
    sentence = "Many heads look at the same time in many directions."
    states, weights = encoder.layers([sentence])[0], encoder.attention(sentence)[1]
    torch.manual_seed(0)
    untrained = [MultiHeadAttention(384, 12)(x, return_weights=True)[1][0] for x in states[:6]]
    others = ~torch.eye(12, dtype=torch.bool)
    trained, before = (overlap(torch.stack(list(of))[:, None]) for of in (weights, untrained))
    assert before[:, others].mean(-1).min() > 0.9
    assert trained[:, others].mean(-1).max() < 0.75
    assert trained[:, others].max() > 0.9  # a near-double
    assert (weights > 0).all()  # softmax gives no share of zero


# --- query, key, value ---------------------------------------------------------------------------------------------


def cosine(q, k):
    return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT


@pytest.mark.claim("B2", "holds if")
def test_cosine_and_dot_product_name_different_keys_first(encoder):
    query, keys = torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 0.0], [3.0, 3.0]])
    assert (keys @ query).argmax() == 1 and F.cosine_similarity(keys, query[None]).argmax() == 0
    torch.manual_seed(0)
    q, k = torch.randn(40, 8), torch.randn(30, 8)
    even = F.normalize(k, dim=-1) * 3  # keys of one length: the order is the same, whatever the queries' lengths
    assert torch.equal((q @ even.mT).argsort(-1), cosine(q, even).argsort(-1))
    assert not torch.equal((q @ k.mT).argmax(-1), cosine(q, k).argmax(-1))
    q = F.normalize(q, dim=-1) * 2  # and queries of one length: the same weights at one temperature
    torch.testing.assert_close((q @ even.mT / 8**0.5).softmax(-1), (6 / 8**0.5 * cosine(q, even)).softmax(-1))
    changed = []
    states, _ = encoder.layers(["He left the bank and sat on the river bank."])
    for x, layer in zip(states, encoder.model.encoder.layers):
        with torch.no_grad():
            q, k = (f(x[0]).unflatten(-1, (12, 32)).transpose(0, 1) for f in (layer.mixer.q_proj, layer.mixer.k_proj))
        changed.append(((q @ k.mT).argmax(-1) != cosine(q, k).argmax(-1)).float().mean().item())
    assert 0.05 < sum(changed) / 6 < 0.4


def by_cosine(sharpness, q, k, v, *, mask=None, **_):
    return attention(F.normalize(q, dim=-1) * sharpness, F.normalize(k, dim=-1), v, mask=mask, scale=1.0)


@pytest.mark.claim("B2", "holds if")
def test_vectors_made_for_search_are_compared_by_cosine(encoder):
    river, money = BANK["river"], BANK["money"]
    vectors = encoder.encode([*river, *money])
    torch.testing.assert_close(vectors @ vectors.T, cosine(vectors, vectors))  # of one length: dot product and cosine
    nearest = (vectors @ vectors.T).fill_diagonal_(-1).argmax(-1)
    assert ((nearest < len(river)) == (torch.arange(len(vectors)) < len(river))).float().mean() > 0.8  # the same sense


@pytest.mark.claim("B2", "holds if")
def test_measured_lengths_of_keys_carry_information(encoder):
    found = json.loads((MEASURED / "tantra_models.json").read_text())["figures"]
    large, small = found["smollm2"]["cosines"], found["minilm"]["cosines"]
    assert large["another key first"] > 0.2 and small["another key first"] > 0.1
    assert large["more loss"]["cosines"]["interval"][0] > 1
    assert large["more loss"]["keys"]["interval"][0] > 1 and large["more loss"]["queries"]["interval"][1] < 0.03
    rates = [float(each) for each in large["tried"]]
    assert min(rates) < large["sharpness"] < max(rates)
    sentences = BANK["river"] + BANK["money"]
    near = {}
    for sharpness in (4.0, small["sharpness"], 12.0):  # its best is the lowest that was tried; a lower one is worse
        with_cosines = copy.deepcopy(encoder)
        for layer in with_cosines.model.encoder.layers:
            layer.mixer.op = partial(by_cosine, sharpness)
        near[sharpness] = (with_cosines.encode(sentences) * encoder.encode(sentences)).sum(-1).mean().item()
    assert max(near, key=near.get) == small["sharpness"] and 0.9 < near[small["sharpness"]] < 0.99


@pytest.mark.claim("B16", "holds if")
def test_relevance_times_value_is_a_term_of_attention_if_relevance_is_a_share():
    torch.manual_seed(0)

    def of(query, key, value):
        return printed("understanding", cosine_similarity=cosine, query=query, key=key, value=value)["understanding"]

    with pytest.raises((AttributeError, TypeError)):  # as printed the three are sentences
        of("What is the meaning?", "The identifier", "The wisdom")
    query, key, value = torch.randn(3, 1, 5).double()
    one = attention(*(x.view(1, 1, 1, -1) for x in (query, key, value)))[0, 0]
    torch.testing.assert_close(one, value)  # of a single memory attention gives the value itself, relevant or not
    assert not torch.allclose(of(query, key, value), value)
    torch.testing.assert_close(of(-key, key, value), -value)  # an opposite key turns it round: no softmax weight is < 0
    keys, values = torch.randn(40, 5).double(), torch.ones(40, 5).double()
    joined = cosine(query, keys) @ values  # summed over memories: grows with their number
    assert (cosine(query, -keys) @ values + joined).abs().max() < 1e-12
    near = (query + 0.1 * torch.randn(40, 5)).double()
    assert (cosine(query, near) @ values).min() > 35
    weights = (query @ near.T / 5**0.5).softmax(-1)  # shares that sum to 1
    torch.testing.assert_close(weights @ values, torch.ones(1, 5).double())
    # with a share for the cosine the printed line is one term of attention's sum
    values = torch.randn(40, 3).double()
    terms = [
        printed("understanding", cosine_similarity=lambda share, _: share, query=share, key=None, value=value)
        for share, value in zip(weights[0], values)
    ]
    whole = attention(*(x[None, None] for x in (query, near, values)))[0, 0, 0]
    torch.testing.assert_close(sum(term["understanding"] for term in terms), whole)
    # with the sum and without the softmax it is a known layer: linear attention of unit vectors, without its division
    q, k, v = (torch.randn(1, 1, 9, 5).double() for _ in range(3))
    state = torch.einsum("bhnd,bhne->bhde", F.normalize(k, dim=-1), v)
    torch.testing.assert_close(cosine(q, k) @ v, F.normalize(q, dim=-1) @ state)


@pytest.mark.claim("B15", "holds if")
def test_of_query_key_and_value_two_can_be_one_but_without_keys_nothing_is_looked_up():
    found = json.loads((MEASURED / "tantra.json").read_text())["figures"]["roles"]
    by_place, by_content = found["reverse"], found["recall"]
    last = lambda arm: sum(run["curve"][-1] for run in arm["runs"]) / len(arm["runs"])  # noqa: E731
    for arm in by_place.values():
        assert last(arm) > 0.98
    for name in ("query is key", "value is input"):
        assert last(by_content[name]) > 0.98
    for name in ("no key, dense", "no key, no query"):
        assert last(by_content[name]) < 0.5 and by_content[name]["less_control"]["interval"][1] < -0.2
    # why: without keys a weight depends on the token that asks and on places, and not on what stands there
    torch.manual_seed(0)
    x, asks = torch.randn(1, 7, 12).double(), 6
    layer = SelfAttention(12).double()
    other = x.clone()
    other[:, :asks] = x[:, :asks].flip(1)
    _, one = layer(x, return_weights=True)
    _, two = layer(other, return_weights=True)
    torch.testing.assert_close(two[0, asks, :asks], one[0, asks, :asks].flip(0))  # with keys the weight goes along


# --- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.claim("B17", "holds if")
def test_attention_alone_knows_no_order_and_a_code_or_a_mask_brings_one_in():
    torch.manual_seed(0)
    x, order = torch.randn(2, 9, 20).double(), torch.randperm(9)
    free = Encoder(20, 4, 80, 3).double()
    torch.testing.assert_close(free(x[:, order]), free(x)[:, order])  # layers, norms, residuals: all defined, no order
    code = Sinusoidal(20).double()(9)
    assert (free(x[:, order] + code) - free(x + code)[:, order]).abs().max() > 0.01  # a code, and no mask
    causal = Encoder(20, 4, 80, 3, causal=True).double()  # a mask, and no code
    assert (causal(x[:, order]) - causal(x)[:, order]).abs().max() > 0.01
    same = torch.ones(1, 9, 20).double() * torch.randn(20).double()
    first = torch.cat([torch.randn(1, 1, 20).double(), same], 1)
    after = causal(first)[0, 1:]
    assert (after[1:] - after[:-1]).abs().amax(-1).min() > 1e-5  # nine equal words after another: each place differs
    assert torch.allclose(free(first)[0, 1:], free(first)[0, 1:2].expand(9, -1))
    run = json.loads((MEASURED / "positions.json").read_text())["figures"]["place"]["layers"]
    assert (
        min(seed[-1]["r2"] for seed in run["trained"])
        > 0.35
        > 0.05
        > max(seed[-1]["r2"] for seed in run["trained, mask lifted"])
    )


@pytest.mark.claim("B3", "slip")
def test_every_row_of_the_printed_encoding_is_the_same():
    f = printed("positions", np=np)["positional_encoding"]
    n, width = 13, 10
    table = f(n, width)
    assert table.shape == (n, width) and np.ptp(table, axis=0).max() == 0
    right = Sinusoidal(width).double()
    np.testing.assert_allclose(
        table[0], right.at(torch.tensor(n)).numpy(), atol=1e-12
    )  # that of the place after the last
    with pytest.raises(TypeError):
        f(np.arange(n), width)  # nor does it run with positions in place of their number
    with pytest.raises(IndexError):
        f(n, 9)
    mended = PRINTED["positions"].replace("(position /", "(np.arange(position) /")
    exec(mended, given := {"np": np})
    np.testing.assert_allclose(given["positional_encoding"](n, width), right(n).numpy(), atol=1e-6)
    torch.manual_seed(0)  # with the printed one attention still reads a set
    layer, x, order = MultiHeadAttention(width, 2).double(), torch.randn(1, n, width).double(), torch.randperm(n)
    for code, same in ((torch.from_numpy(table), True), (right(n).double(), False)):
        assert torch.allclose(layer(x[:, order] + code), layer(x + code)[:, order]) == same
