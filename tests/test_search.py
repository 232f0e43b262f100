"""Greedy search, sampling and beam search, over a model of a few tokens whose every sequence can be listed."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nondual.efficient_attention.mamba import Mamba
from nondual.efficient_attention.mamba2 import Mamba2
from nondual.efficient_attention.s4d import S4D
from nondual.language_models.causal import CausalLM
from nondual.positional_encoding import Sinusoidal
from nondual.search import Found, beam_search, greedy, length_penalty, sample, select_rows
from nondual.self_attention import MultiHeadAttention
from nondual.transformer_layer import MixerBlock

V, EOS, B = 3, 2, 2
START = torch.tensor([0, 1])


def next_token(history: tuple[int, ...]) -> Tensor:
    """Log-probabilities that depend on all that came before, the same at every call."""
    seed = sum((token + 1) * 7**i for i, token in enumerate(history))
    return (1.5 * torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).log_softmax(-1)


def step(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state is the history itself, (R, n)."""
    state = torch.cat([state, tokens[:, None]], 1)
    return torch.stack([next_token(tuple(row)) for row in state.tolist()]), state


def nothing(rows=B):
    return torch.empty(rows, 0, dtype=torch.long)


def every_sequence(start: int, max_len: int, strength: float) -> list[tuple[float, list[int]]]:
    """All that can be generated, ended by EOS or cut at max_len, the best first."""
    found = []
    for n in range(1, max_len + 1):
        for tokens in itertools.product(range(V), repeat=n):
            if EOS in tokens[:-1] or (tokens[-1] != EOS and n < max_len):
                continue
            log_prob = sum(float(next_token((start, *tokens[:i]))[token]) for i, token in enumerate(tokens))
            found.append((log_prob / ((5 + n) / 6) ** strength, list(tokens)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("strength", [0.0, 0.7, 2.0])
def test_with_enough_beams_it_finds_every_sequence_in_order(strength):
    max_len = 4
    expected = [every_sequence(start, max_len, strength) for start in START.tolist()]
    count = len(expected[0])
    assert count == sum(2 ** (n - 1) for n in range(1, max_len + 1)) + 2**max_len
    found = beam_search(step, START, nothing(), max_len=max_len, beams=count, eos=EOS, length_penalty=strength)
    for b in range(B):
        scores, tokens = zip(*expected[b])
        torch.testing.assert_close(found.scores[b], torch.tensor(scores, dtype=torch.float64))
        assert found.lengths[b].tolist() == [len(one) for one in tokens]
        assert found.tokens[b].tolist() == [one + [EOS] * (max_len - len(one)) for one in tokens]


@pytest.mark.parametrize("eos", [EOS, None])
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_one_beam_is_greedy_search(eos, strength):
    start = torch.arange(6) % V  # six rows of different first tokens
    alone = greedy(step, start, nothing(6), max_len=7, eos=eos)
    found = beam_search(step, start, nothing(6), max_len=7, beams=1, eos=eos, length_penalty=strength)
    assert torch.equal(found.tokens, alone.tokens) and torch.equal(found.lengths, alone.lengths)
    torch.testing.assert_close(found.scores, alone.scores / length_penalty(alone.lengths, strength))


def test_a_wider_search_here_finds_what_greedy_search_misses():
    """The likeliest first token leads to unlikely ones; a row is not disturbed by its neighbours."""
    table = torch.tensor([[0.6, 0.4, 0.0], [0.5, 0.3, 0.2], [0.0, 0.05, 0.95]], dtype=torch.float64)
    first, after_0, after_1 = table.log()

    def step(tokens, at):  # 2 is EOS here too
        rows = [first if n == 0 else after_0 if token == 0 else after_1 for token, n in zip(tokens.tolist(), at)]
        return torch.stack(rows), at + 1

    start, at = torch.zeros(1, dtype=torch.long), torch.zeros(1)
    assert greedy(step, start, at, max_len=2, eos=EOS).tokens.tolist() == [[[0, 0]]]
    found = beam_search(step, start, at, max_len=2, beams=2, eos=EOS)
    assert found.tokens.tolist() == [[[1, 2], [0, 0]]]
    torch.testing.assert_close(found.scores.exp(), torch.tensor([[0.4 * 0.95, 0.6 * 0.5]], dtype=torch.float64))


def test_each_row_is_found_as_if_alone():
    together = beam_search(step, START, nothing(), max_len=5, beams=3, eos=EOS, length_penalty=0.6)
    for b in range(B):
        alone = beam_search(step, START[b : b + 1], nothing(1), max_len=5, beams=3, eos=EOS, length_penalty=0.6)
        n = alone.tokens.shape[2]
        assert torch.equal(together.tokens[b, :, :n], alone.tokens[0])
        assert torch.equal(together.scores[b], alone.scores[0]) and torch.equal(together.lengths[b], alone.lengths[0])


def test_the_length_penalty_by_hand():
    lengths = torch.tensor([1, 7, 13])
    expected = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(length_penalty(lengths, 1.0), expected)
    torch.testing.assert_close(length_penalty(lengths, 0.5), expected.sqrt())
    assert length_penalty(lengths, 0.0).tolist() == [1, 1, 1]


def test_a_penalty_turns_the_order_of_a_short_and_a_long_sequence():
    """Probability 0.4 in one token against 0.6 · 0.6 in seven: 0.40 against 0.36, and log 0.36 / 2 is the higher."""

    def step(tokens, n):
        p = torch.tensor([0.6, 0.0, 0.4] if n[0] == 0 else [0.6, 0.0, 0.4] if n[0] == 6 else [1.0, 0.0, 0.0])
        return p.double().log().expand(len(tokens), -1), n + 1

    start, n = torch.zeros(1, dtype=torch.long), torch.zeros(1)
    plain = beam_search(step, start, n, max_len=7, beams=3, eos=EOS)
    assert plain.lengths[0].tolist() == [1, 7, 7]
    longer = beam_search(step, start, n, max_len=7, beams=3, eos=EOS, length_penalty=1.0)
    assert longer.lengths[0].tolist() == [7, 7, 1]
    torch.testing.assert_close(longer.scores[0, 0], torch.tensor(math.log(0.36) / 2, dtype=torch.float64))


def test_what_is_impossible_is_never_chosen():
    """Three sequences are possible where five are asked for: the others have length 0 and score -inf."""

    def step(tokens, state):
        p = torch.full((len(tokens), 5), -torch.inf)
        p[:, 3], p[:, 4] = math.log(0.7), math.log(0.3)
        return p, state

    found = beam_search(step, START[:1], torch.zeros(1, 1), max_len=2, beams=5, eos=4)
    assert found.tokens.tolist() == [[[3, 3], [4, 4], [3, 4], [4, 4], [4, 4]]]
    assert found.lengths.tolist() == [[2, 1, 2, 0, 0]]
    torch.testing.assert_close(found.scores[0, :3].exp(), torch.tensor([0.49, 0.3, 0.21]))
    assert found.scores[0, 3:].tolist() == [-math.inf, -math.inf]
    for _ in range(20):
        assert 0 not in sample(step, START, torch.zeros(2, 1), max_len=9, temperature=3.0, top_k=4).tokens


def test_equal_scores_are_taken_in_order_and_every_run_gives_the_same():
    def step(tokens, state):
        return torch.full((len(tokens), 50), -math.log(50)), state

    runs = [beam_search(step, START, None, max_len=2, beams=4) for _ in range(3)]
    assert runs[0].tokens[0].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))
    assert greedy(step, START, None, max_len=3).tokens.tolist() == [[[0, 0, 0]]] * 2


def test_samples_have_the_models_own_probabilities():
    found = sample(
        step, torch.zeros(4000, dtype=torch.long), nothing(4000), max_len=2, eos=EOS, generator=torch.manual_seed(0)
    )
    for score, tokens in every_sequence(0, 2, 0.0):
        same = (found.tokens[:, 0] == torch.tensor([*tokens, EOS][:2])).all(1)
        assert abs(same.double().mean() - math.exp(score)) < 0.03  # four times 1/√4000, halved
        if same.any():
            torch.testing.assert_close(found.scores[same][0, 0], torch.tensor(score, dtype=torch.float64))


def test_sampling_narrowed_to_the_likeliest_is_greedy_search():
    alone = greedy(step, START, nothing(), max_len=6, eos=EOS)
    for narrowed in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}):
        assert torch.equal(sample(step, START, nothing(), max_len=6, eos=EOS, **narrowed).tokens, alone.tokens)


def test_after_eos_a_row_only_repeats_it_and_its_score_stands_still():
    found = greedy(step, torch.arange(6) % V, nothing(6), max_len=9, eos=EOS)
    for tokens, length, start, score in zip(found.tokens[:, 0], found.lengths[:, 0], range(6), found.scores[:, 0]):
        own = tokens[:length].tolist()
        assert EOS not in own[:-1] and (tokens[length:] == EOS).all()
        total = sum(float(next_token((start % V, *own[:i]))[token]) for i, token in enumerate(own))
        torch.testing.assert_close(score, torch.tensor(total, dtype=torch.float64))


# --- states --------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    a: Tensor
    b: Tensor | None


class Own:
    def __init__(self, x):
        self.x = x

    def select(self, rows):
        return Own(self.x[rows])


def test_the_rows_of_every_kind_of_state():
    x, rows = torch.arange(6).view(3, 2), torch.tensor([2, 0, 2])
    state = {"x": x, "list": [x, (x, None)], "pair": Pair(x, None), "own": Own(x), "n": 3, "name": "yes"}
    got = select_rows(state, rows)
    expected = x[rows]
    assert torch.equal(got["x"], expected) and torch.equal(got["list"][0], expected)
    assert isinstance(got["list"][1], tuple) and got["list"][1][1] is None
    assert isinstance(got["pair"], Pair) and torch.equal(got["pair"].a, expected) and got["pair"].b is None
    assert torch.equal(got["own"].x, expected) and got["n"] == 3 and got["name"] == "yes"
    with pytest.raises(TypeError, match=r"state must be a Tensor with the rows first.*got object"):
        select_rows(object(), rows)


@pytest.mark.parametrize("wrap", [lambda x: (x,), lambda x: [x], lambda x: {"x": x}, lambda x: Pair(x, None), Own])
def test_a_state_follows_its_beam_whatever_holds_it(wrap):
    def wrapped(tokens, state):
        inner = state.x if isinstance(state, Own) else state["x"] if isinstance(state, dict) else state[0]
        log_probs, inner = step(tokens, inner)
        return log_probs, wrap(inner)

    plain = beam_search(step, START, nothing(), max_len=5, beams=4, eos=EOS)
    found = beam_search(wrapped, START, wrap(nothing()), max_len=5, beams=4, eos=EOS)
    assert all(torch.equal(a, b) for a, b in zip(found, plain))


def test_a_recurrent_cell_as_the_page_says_it():
    torch.manual_seed(0)
    embedding, cell, scores = nn.Embedding(V, 5), nn.GRUCell(5, 7), nn.Linear(7, V)

    def step(tokens, state):
        state = cell(embedding(tokens), state)
        return scores(state).log_softmax(-1), state

    found = beam_search(step, START, torch.zeros(B, 7), max_len=6, beams=4, eos=EOS)
    for b in range(B):
        for tokens, score, length in zip(found.tokens[b], found.scores[b], found.lengths[b]):
            state, total, last = torch.zeros(1, 7), 0.0, START[b : b + 1]
            for token in tokens[:length]:
                log_probs, state = step(last, state)
                total, last = total + log_probs[0, token], token[None]
            torch.testing.assert_close(score, total.detach())
    assert not found.scores.requires_grad


MIXERS = {
    "attention": lambda: MultiHeadAttention(12, 3, causal=True),
    "mamba": lambda: Mamba(12, d_state=5),
    "mamba-2": lambda: Mamba2(12, d_state=5, d_head=3),
    "s4d": lambda: S4D(12, 4),
}


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_a_causal_language_model_over_any_mixer_is_searched_with_its_caches(mixer):
    torch.manual_seed(0)
    model = CausalLM(V, 12, 2, layer=lambda i: MixerBlock(MIXERS[mixer](), 12), positions=Sinusoidal(12)).double()
    nn.init.normal_(model.embeddings.weight)

    def step(tokens, cache):
        return model(tokens[:, None], cache=cache)[:, -1].log_softmax(-1), cache

    found = beam_search(step, START, model.new_cache(B, 8), max_len=6, beams=4, eos=EOS, length_penalty=1.0)
    for b in range(B):
        for tokens, score, length in zip(found.tokens[b], found.scores[b], found.lengths[b]):
            ids = torch.cat([START[b : b + 1], tokens[:length]])[None]
            own = model(ids[:, :-1]).log_softmax(-1)[0].gather(1, ids[0, 1:, None]).sum()
            torch.testing.assert_close(score, own / length_penalty(length, 1.0))


def test_half_precision_is_summed_in_float32():
    def half(tokens, state):
        log_probs, state = step(tokens, state)
        return log_probs.bfloat16(), state

    found = beam_search(half, START, nothing(), max_len=4, beams=2, eos=EOS)
    assert found.scores.dtype == torch.float32 and isinstance(found, Found)


# --- what is refused -----------------------------------------------------------------------------------------------

SEARCHES = {
    "greedy": greedy,
    "sample": sample,
    "beam": lambda *args, **options: beam_search(*args, **({"beams": 2} | options)),
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    "options, says",
    [
        ({"max_len": 0}, "max_len must be 1 or more, got 0"),
        ({"eos": -1}, "eos must be the index of a token, 0 or more, got -1"),
        ({"eos": V}, f"eos must lie in 0 to {V - 1}, got {V}"),
        ({"start": START.float()}, r"start must be integers \(B,\), one token a row, got torch.float32"),
        ({"start": START[:0]}, r"start must be integers \(B,\), one token a row, got torch.int64 \(0,\)"),
        ({"start": START[None]}, r"start must be integers \(B,\)"),
        ({"state": nothing(3)}, r"state must have its 2 rows first in every Tensor, got \(3, 0\)"),
        ({"state": (nothing(), torch.zeros(5, 2, 7))}, r"state must have its 2 rows first in every Tensor"),
    ],
)
def test_bad_input_is_refused_with_one_clear_sentence(search, options, says):
    given = {"start": START, "state": nothing(), "max_len": 3, "eos": EOS} | options
    with pytest.raises(ValueError, match=says):
        SEARCHES[search](step, given.pop("start"), given.pop("state"), **given)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"beams": 0}, "beams must be 1 or more, got 0"),
        ({"beams": 2, "length_penalty": -0.1}, "length_penalty must be 0 or more, got -0.1"),
        ({"beams": 2, "length_penalty": math.nan}, "length_penalty must be 0 or more, got nan"),
    ],
)
def test_bad_beams_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        beam_search(step, START, nothing(), max_len=3, **options)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    "gives, error, says",
    [
        (lambda p: p * math.nan, ValueError, "step must return log-probabilities, got NaN at step 0"),
        (lambda p: p + 3, ValueError, r"none above 0, got [\d.]+ at step 0: take .log_softmax\(-1\)"),
        (lambda p: p - math.inf, ValueError, "step must leave a token possible, got only -inf at step 0"),
        (lambda p: p[:1], ValueError, r"step must return log-probabilities \(R, V\) for R = 2 tokens"),
        (lambda p: p[:, None], ValueError, r"step must return log-probabilities \(R, V\)"),
        (lambda p: p.long(), ValueError, r"got torch.int64 \(2, 3\)"),
        (lambda p: p.tolist(), TypeError, "step must return a Tensor of log-probabilities and a state, got list"),
    ],
)
def test_what_a_step_may_not_return(search, gives, error, says):
    def faulty(tokens, state):
        log_probs, state = step(tokens, state)
        return gives(log_probs), state

    with pytest.raises(error, match=says):
        SEARCHES[search](faulty, START, nothing(), max_len=3, eos=EOS)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_finished_row_may_give_anything(search):
    """Nothing that a model says after eos counts, NaN neither."""

    def careless(tokens, state):
        log_probs, state = step(tokens, state)
        ended = (state == EOS).any(1, keepdim=True)
        return log_probs.masked_fill(ended, math.nan), state

    options = {"max_len": 6, "eos": EOS}
    torch.manual_seed(1)
    plain = SEARCHES[search](step, torch.tensor([0, 1, 0, 1]), nothing(4), **options)
    torch.manual_seed(1)
    found = SEARCHES[search](careless, torch.tensor([0, 1, 0, 1]), nothing(4), **options)
    assert all(torch.equal(a, b) for a, b in zip(found, plain))
