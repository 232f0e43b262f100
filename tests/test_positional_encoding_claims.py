"""What the essays say of position, of memory and of early words, put to small runs and to what was measured."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from nondual.data import BANK, SENSES
from nondual.language_models.gpt import GPT
from nondual.ops.attention import attention
from nondual.pretrained import minilm
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import Encoder

CAT, MAT = "The cat sat on the mat", "The mat sat on the cat"
STORED = Path(__file__).parent.parent / "docs/measured/positions.json"
WORDS = {"bank": {sense: sentences[:12] for sense, sentences in BANK.items()}, **SENSES}


@pytest.fixture(scope="module")
def encoder():
    return minilm()


@pytest.fixture
def without_positions(encoder):
    """MiniLM with the mean of its first 64 position vectors at every position, until the test ends."""
    table = encoder.model.position.table.weight
    kept = table.data.clone()
    table.data.copy_(kept[:64].mean(0).expand_as(kept))
    yield encoder
    table.data.copy_(kept)


def seen(encoder, sentences, word):
    """The word's last vector in each sentence (B, E)."""
    last, _ = encoder.vectors(sentences)
    return torch.stack([x[encoder.tokens(s).index(word)] for x, s in zip(last, sentences)])


def told(x, sense):
    """The share that lies nearer to the mean of its own sense than of the other; each is left out of its own mean."""
    right = []
    for i in range(len(x)):
        others = torch.arange(len(x)) != i
        near, far = (x[others & (sense == s)].mean(0) for s in (sense[i], 1 - sense[i]))
        right.append((x[i] - near).norm() < (x[i] - far).norm())
    return torch.stack(right).float().mean().item()


def of_all_words(encoder):
    """`told` of each of the six words, and its mean."""
    sense = torch.arange(24) // 12
    each = {
        word: told(seen(encoder, [s for texts in senses.values() for s in texts], word), sense)
        for word, senses in WORDS.items()
    }
    return each, sum(each.values()) / len(each)


# --- A3.1: a set, not a sequence -----------------------------------------------------------------------------------


@pytest.mark.claim("A3.1", "holds")
def test_without_positions_and_without_a_mask_attention_reads_a_set(without_positions):
    torch.manual_seed(0)
    for model in (MultiHeadAttention(24, 3).double(), Encoder(24, 3, 48, 2).double()):
        x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(2, 7, 24, dtype=torch.float64)
        order = torch.randperm(7)
        straight, mixed = model(x), model(x[:, order])
        torch.testing.assert_close(mixed, straight[:, order], rtol=0, atol=1e-12)
        torch.testing.assert_close(mixed.mean(1), straight.mean(1), rtol=0, atol=1e-12)
        (one,) = torch.autograd.grad((straight * weight).sum(), x, retain_graph=True)
        (two,) = torch.autograd.grad((mixed * weight[:, order]).sum(), x)
        torch.testing.assert_close(two, one, rtol=0, atol=1e-12)
    one, two = without_positions.encode([CAT, MAT])
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.claim("A3.1", "holds")
def test_positions_or_a_causal_mask_alone_tell_the_order(encoder):
    one, two = encoder.encode([CAT, MAT])
    assert 0.9 < one @ two < 0.999
    torch.manual_seed(0)
    for model in (MultiHeadAttention(24, 3, causal=True), Encoder(24, 3, 48, 2, causal=True)):
        x = torch.randn(1, 7, 24)
        order = torch.arange(6, -1, -1)
        straight, mixed = model(x), model(x[:, order])
        assert (mixed - straight[:, order]).abs().max() > 0.01
        assert (mixed.mean(1) - straight.mean(1)).abs().max() > 0.001
    stored = json.loads(STORED.read_text())["figures"]
    apart = {arm: told["relative distance"] for arm, told in stored["recency"]["smollm2"]["two_orders"].items()}
    assert apart["not turned, mask lifted"] < 1e-4 < 0.1 < apart["not turned"] < apart["as trained"]  # SmolLM2
    last = {arm: [seed[-1]["r2"] for seed in seeds] for arm, seeds in stored["place"]["layers"].items()}
    assert min(last["trained"] + last["untrained"]) > 0.35  # a probe reads the position where only the mask can tell it
    assert max(last["trained, mask lifted"] + last["trained, labels shuffled"]) < 0.05


# --- A3.4, A3.7: place and company ---------------------------------------------------------------------------------


@pytest.mark.claim("A3.4", "holds if")
def test_one_word_at_one_index_differs_by_its_company_and_stays_mostly_itself(encoder):
    pair = ["The river bank was closed.", "The savings bank was closed."]
    assert [encoder.tokens(s).index("bank") for s in pair] == [3, 3]
    layers, _ = encoder.layers(pair)
    cosine = torch.cosine_similarity(layers[:, 0, 3], layers[:, 1, 3], dim=-1)
    assert cosine[0] > 1 - 1e-6 and cosine[1:].max() < 0.95  # equal before the first layer, then no longer
    words = torch.stack([
        seen(encoder, [s for texts in senses.values() for s in texts], word) for word, senses in WORDS.items()
    ])  # (6, 24, E)  # fmt: skip
    of_word = (words.mean(1) - words.mean((0, 1))).square().sum() * 24
    whole = (words - words.mean((0, 1))).square().sum()
    assert 0.65 < of_word / whole < 0.9  # of the variance between six words' uses, most lies between the words
    last = json.loads(STORED.read_text())["figures"]["words"]["components"]["arranged"][-1]
    company = last["sense"] + last["other company"]
    assert last["word"] > 0.7 and last["form"] < company < 0.2


@pytest.mark.claim("A3.7", "does not hold")
def test_without_positions_a_word_still_takes_its_meaning_from_its_company(without_positions):
    each, mean = of_all_words(without_positions)
    assert mean > 0.8 and min(each.values()) > 0.7
    pair = ["The river bank was closed.", "The savings bank was closed."]
    one, two = seen(without_positions, pair, "bank")
    assert torch.cosine_similarity(one, two, dim=0) < 0.95
    stored = json.loads(STORED.read_text())["figures"]["words"]["senses"]
    assert stored["without positions"]["less with positions"]["mean"] > -0.05
    assert stored["without company"]["by layer"][-1] < 0.55 < 0.8 < stored["without positions"]["interval"][0]


@pytest.mark.claim("A3.7", "does not hold")
def test_it_is_attention_to_others_that_conditions_a_token():
    torch.manual_seed(0)
    model, weight = Encoder(24, 3, 48, 2).double(), torch.randn(5, 24, dtype=torch.float64)
    inputs = torch.randn(1, 5, 24, dtype=torch.float64)

    def moves(mask=None):  # does output i move with input j?
        x = inputs.clone().requires_grad_()
        rows = [torch.autograd.grad(out.sum(), x, retain_graph=True)[0][0] for out in (model(x, mask=mask)[0] * weight)]
        return torch.stack(rows).abs().amax(-1) > 1e-9

    whole, alone = moves(), moves(torch.eye(5, dtype=torch.bool))
    assert whole.all()  # every output depends on every input, without any positions
    assert torch.equal(alone, torch.eye(5, dtype=torch.bool))


# --- D5: what persists ---------------------------------------------------------------------------------------------


@pytest.mark.claim("D5", "holds if")
def test_attention_itself_keeps_nothing_between_calls():
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(24, 3).double(), torch.randn(1, 7, 24, dtype=torch.float64)
    first = layer(x)
    layer(torch.randn(1, 9, 24, dtype=torch.float64))
    assert torch.equal(layer(x), first) and not list(layer.buffers())


@pytest.mark.claim("D5", "holds if")
def test_what_a_token_was_persists_through_the_layers(encoder):
    """Each vector's nearest one in the layer below, among all tokens of its sentence, is its own: centred cosines."""
    sentences = [*BANK["river"][:8], *BANK["money"][:8]]
    layers, real = encoder.layers(sentences)
    found, own, bare = [], [], []
    for sentence in range(len(sentences)):
        x = layers[:, sentence, real[sentence]]
        unit = torch.nn.functional.normalize(x - x.mean(1, keepdim=True), dim=-1)
        for below, above in itertools.pairwise(unit):
            cosine = above @ below.T
            found.append((cosine.argmax(1) == torch.arange(len(cosine))).float().mean())
            own.append(cosine.diagonal().mean())
        first = encoder.model.encoder.layers[0].mixer(x[None, 0])[
            0
        ]  # what attention alone gives, without what was there
        bare.append(torch.cosine_similarity(first - first.mean(0), x[0] - x[0].mean(0), dim=-1).mean())
    assert torch.stack(found).mean() > 0.97 and torch.stack(own).mean() > 0.7
    assert torch.stack(bare).mean() < 0.3
    stored = json.loads(STORED.read_text())["figures"]["recency"]["smollm2"]["persistence"]  # and in SmolLM2
    assert sum(stored["nearest"][1:]) / len(stored["nearest"][1:]) > 0.95
    assert stored["nearest"][0] < 0.2 and stored["through"]["nearest"] < 0.05  # not from first to last


@pytest.mark.claim("D5", "holds if")
def test_kept_keys_and_values_give_what_reading_all_again_gives():
    torch.manual_seed(0)
    model, ids = GPT(17, 24, 2, 3, max_len=20).double().eval(), torch.randint(17, (2, 12))
    with torch.no_grad():
        whole, cache = model(ids), model.new_cache(2)
        parts = torch.cat(
            [model(ids[:, :5], cache=cache), *(model(ids[:, i : i + 1], cache=cache) for i in range(5, 12))], 1
        )
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


# --- D10: early and recent -----------------------------------------------------------------------------------------


@pytest.mark.claim("D10", "holds if")
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_softmax_of_random_scores_prefers_no_place(spread):
    """By symmetry each key's expected weight is 1/N, however long the context and however sharp the softmax."""
    torch.manual_seed(0)
    draws, n = 20_000, 24
    q, k = spread * torch.randn(draws, 1, 1, 8), torch.randn(draws, 1, n, 8)
    _, weights = attention(q, k, torch.randn(draws, 1, n, 1), return_weights=True)
    by_place, error = weights[:, 0, 0].mean(0), weights[:, 0, 0].std(0) / math.sqrt(draws)
    assert ((by_place - 1 / n).abs() < 4.5 * error).all()


@pytest.mark.claim("D10", "holds if")
def test_bounded_scores_spread_thinner_as_the_context_grows():
    """Scores within c of 0 give each of N keys at most e^(2c)/N: a law of softmax."""
    torch.manual_seed(0)
    for n in (8, 64, 512, 4096):
        scores = torch.empty(100, n, dtype=torch.float64).uniform_(-2, 2)
        assert scores.softmax(-1).max() <= math.exp(4) / n


@pytest.mark.claim("D10", "holds if")
def test_what_was_measured_in_a_trained_model():
    arms = json.loads(STORED.read_text())["figures"]["recency"]["smollm2"]["arms"]

    def mean(arm, n, name):
        return sum(text[name] for text in arms[arm][str(n)]) / len(arms[arm][str(n)])

    assert 5 * mean("as trained", 64, "effective") < mean("as trained", 2048, "effective")  # thinner
    even = 16 / 2048
    assert mean("as trained", 2048, "early") < even / 4 < 30 * even < mean("as trained", 2048, "near")  # recent ones
    assert mean("as trained", 1024, "moved by early block") < 0.05 * mean("as trained", 64, "moved by early block")
    assert mean("as trained", 1024, "moved by late block") > 0.5 * mean("as trained", 64, "moved by late block")
    assert mean("as trained", 2048, "first") > 500 / 2048  # but the first token of all keeps its share
    # Where the same weights turn no query and no key, the recent are not preferred; the first token still is.
    assert mean("not turned", 512, "near") == pytest.approx(16 / 512, abs=0.005)
    assert mean("not turned", 512, "first") > 100 / 512
    small = json.loads(STORED.read_text())["figures"]["recency"]["small"]
    near = {arm: sum(seed["near"] for seed in seeds) / len(seeds) for arm, seeds in small["arms"].items()}
    assert near["none, untrained"] == pytest.approx(small["even"]["near"], abs=0.01)
    assert near["none"] < 0.28 < 0.35 < min(near[arm] for arm in ("learned", "sinusoidal", "rotary", "ALiBi", "T5"))
