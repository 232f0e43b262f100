"""A sentence encoder: what it takes and refuses, its batches, and that they change nothing but the memory."""

import copy

import numpy as np
import pytest
import torch

from nondual.data import BANK
from nondual.pretrained import SentenceEncoder, from_bert

SENTENCES = [*BANK["river"][:8], *BANK["money"][:8], "", "Naïve café – 東京!", "pratyabhijñā", "word " * 200]


def test_a_batch_gives_what_each_sentence_gives_alone(encoder):
    together = encoder.encode(SENTENCES[:5])
    alone = torch.cat([encoder.encode([s]) for s in SENTENCES[:5]])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_layers_end_in_the_vectors(encoder):
    layers, mask = encoder.layers(SENTENCES[:3])
    assert layers.shape[:2] == (7, 3) and mask.shape == layers.shape[1:3]
    torch.testing.assert_close(layers[-1], encoder.vectors(SENTENCES[:3])[0])


def test_gradients_reach_the_weights(encoder):
    model = encoder.model
    model(torch.tensor([[101, 2924, 102]])).square().sum().backward()
    assert model.encoder.layers[0].mixer.q_proj.weight.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    "sentences, says",
    [
        ("one string", "put it in brackets"),
        (["fine", "word " * 300], r"sentence 1 has 302 tokens, and the model reads 256"),
    ],
)
def test_bad_sentences_are_named(encoder, sentences, says):
    with pytest.raises(ValueError, match=says):
        encoder.encode(sentences)


class Column:
    """As a column of a table: it can be gone through, and is no list."""

    def __iter__(self):
        return iter(SENTENCES[:3])


@pytest.mark.parametrize(
    "some",
    [tuple(SENTENCES[:3]), (s for s in SENTENCES[:3]), Column(), np.array(SENTENCES[:3])],
    ids=["tuple", "generator", "column", "numpy"],
)
def test_whatever_yields_strings_is_taken(encoder, some):
    torch.testing.assert_close(encoder.encode(some), encoder.encode(SENTENCES[:3]))


@pytest.mark.parametrize(
    "sentences, says",
    [
        (None, "sentences must be a list of strings, got NoneType"),
        (b"bytes", "sentences must be a list of strings, got bytes"),
        (bytearray(b"bytes"), "sentences must be a list of strings, got bytearray"),
        (7, "sentences must be a list of strings, got int"),
        ({"a": 1}, "sentences must be a list of strings, got dict"),
        ({"a"}, "sentences must be a list of strings, got set"),
        (["fine", None], "sentence 1 must be a str, got NoneType"),
        (["fine", b"bytes"], "sentence 1 must be a str, got bytes"),
        ([["nested"]], "sentence 0 must be a str, got list"),
        ([1.5], "sentence 0 must be a str, got float"),
        (torch.zeros(2), "sentence 0 must be a str, got Tensor"),
    ],
    ids=str,
)
def test_what_is_no_text_is_a_type_error_that_names_it(encoder, sentences, says):
    for method in (encoder.encode, encoder.vectors, encoder.layers):
        with pytest.raises(TypeError, match=says):
            method(sentences)


@pytest.mark.parametrize("sentence", [None, b"bytes", 3, ["a list"]], ids=str)
def test_a_sentence_that_is_no_text(encoder, sentence):
    for method in (encoder.attention, encoder.tokens):
        with pytest.raises(TypeError, match=f"sentence must be a str, got {type(sentence).__name__}"):
            method(sentence)


def test_a_string_that_is_not_unicode_text(encoder):
    with pytest.raises(ValueError, match=r"sentence 1 must be Unicode text, got a lone surrogate in 'a.ud800'"):
        encoder.encode(["fine", "a\ud800"])
    with pytest.raises(ValueError, match=r"sentence must be Unicode text"):
        encoder.attention("\ud800")


def test_no_sentences_give_no_vectors(encoder):
    assert encoder.encode([]).shape == encoder.encode(iter(())).shape == (0, 384)
    vectors, mask = encoder.vectors([])
    assert vectors.shape == (0, 0, 384) and mask.shape == (0, 0) and mask.dtype == torch.bool
    assert encoder.layers([])[0].shape == (7, 0, 0, 384)


def test_an_empty_sentence_has_its_two_markers(encoder):
    assert encoder.tokens("") == ["[CLS]", "[SEP]"]
    torch.testing.assert_close(encoder.encode([""]).norm(), torch.tensor(1.0))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 1000])
def test_batches_change_nothing_but_the_memory(encoder, batch_size):
    mixed = [" ".join(["bank"] * n) for n in (3, 90, 1, 40, 2, 200, 17, 5, 60, 1)]
    torch.testing.assert_close(encoder.encode(mixed, batch_size=batch_size), encoder.encode(mixed), atol=1e-5, rtol=0)
    for method in (encoder.vectors, encoder.layers):
        (ours, mask), (whole, real) = method(mixed, batch_size=batch_size), method(mixed)
        assert torch.equal(mask, real) and mask.sum(1).tolist() == [len(encoder.tokens(s)) for s in mixed]
        torch.testing.assert_close(ours, whole, atol=1e-4, rtol=0)
        assert not ours[..., ~mask, :].any()  # padding is 0


def test_the_model_never_reads_more_than_a_batch(encoder, largest):
    many = ["word " * 100] * 24
    peak = [largest(lambda n=n: encoder.encode(many[:n], batch_size=8)) for n in (8, 24)]
    assert peak[0] == peak[1] >= 8 * 102 * 1536  # the hidden layer of one batch, and no more for three


def test_sentences_of_a_batch_are_of_similar_length(encoder, monkeypatch):
    read, forward = [], encoder.model.forward
    monkeypatch.setattr(encoder.model, "forward", lambda ids, **more: read.append(ids.shape) or forward(ids, **more))
    encoder.encode(["one", "word " * 100, "two", "word " * 101, "three"], batch_size=2)
    assert [tuple(shape) for shape in read] == [(2, 103), (2, 3), (1, 3)]


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_holds_at_least_one(encoder, batch_size):
    for method in (encoder.encode, encoder.vectors, encoder.layers):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
            method(["one"], batch_size=batch_size)


def test_encoding_computes_no_gradients_and_keeps_the_model_s_dtype(encoder):
    assert not encoder.encode(["one"]).requires_grad and encoder.encode(["one"]).dtype == torch.float32
    half = SentenceEncoder(copy.deepcopy(encoder.model).bfloat16(), encoder.tokenizer, encoder.max_tokens)
    assert half.encode(["one"]).dtype == half.layers(["one"])[0].dtype == torch.bfloat16
    assert half.encode([]).dtype == torch.bfloat16


def test_the_pooler_is_left_out_and_prefixes_are_read():
    state = {"bert.embeddings.word_embeddings.weight": torch.zeros(1), "pooler.dense.weight": torch.zeros(1)}
    assert list(from_bert(state)) == ["token.weight"]
