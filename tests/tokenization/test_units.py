"""nondual.tokenization.units: exact inverses, what is unknown, and bits per byte."""

import math

import pytest
import torch

from nondual.tokenization import BPE, Bytes, Characters, Words, bits_per_byte, spelling_bits, words_of

TEXT = "धर्मक्षेत्रे कुरुक्षेत्रे\ndharmakṣetre  kurukṣetre, 'naïve' 🙂\t12 "
TOKENIZERS = {
    "bytes": Bytes(),
    "characters": Characters.of(TEXT),
    "words": Words.of(TEXT, at_least=1),
    "subwords": BPE.train(TEXT * 3, 300),
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("text", [TEXT, "", " ", "\n", TEXT[::-1]])
def test_decoding_is_the_inverse_of_encoding(tokenizer, text):
    ids, pieces = tokenizer.encode(text), tokenizer.pieces(text)
    assert len(ids) == len(pieces) and b"".join(pieces) == text.encode()
    assert all(0 <= i < tokenizer.vocabulary for i in ids)
    if tokenizer.unknown not in ids:
        assert tokenizer.decode(ids) == text


def test_bytes_by_hand():
    assert Bytes().encode("aध") == [97, 0xE0, 0xA4, 0xA7]
    assert Bytes().decode([97, 0xE0, 0xA4]) == "a\ufffd"  # half of a character
    assert [len(c.encode()) for c in "aāṛध"] == [1, 2, 3, 3]


def test_what_is_not_known_is_one_id_and_loses_its_spelling():
    characters = Characters.of("abc")
    assert characters.encode("abx") == [1, 2, 0] and characters.decode([1, 2, 0]) == "ab\ufffd"
    words = Words.of("one two two one one three")
    assert words.known == [" one", " two"]  # the first "one" has no space before it, and is there once
    assert words.encode("two one two") == [0, 1, 2] and words.unknown == 0
    assert words.pieces("two one") == [b"two", b" one"]
    assert Words.of("a a b b c", most=1, at_least=1).vocabulary == 2


def test_words_and_the_marks_of_a_script():
    assert words_of("one two,\nthree  four") == ["one", " two", ",", "\n", "three", " ", " four"]
    assert words_of("धर्मक्षेत्रे कुरु") == ["धर्मक्षेत्रे", " कुरु"]  # vowel signs are marks, not letters
    assert words_of("it's ... so") == ["it", "'", "s", " ...", " so"]


def test_bits_per_byte_by_hand():
    nats = torch.tensor([1.0, 3.0]) * math.log(2)
    assert bits_per_byte(nats, [5, 7], [b"ab", b"cd"]) == pytest.approx(1.0)  # 4 bits for 4 bytes
    unknown = bits_per_byte(nats, [5, 0], [b"ab", b"cd"], unknown=0)
    assert unknown == pytest.approx((4 + 3 * math.log2(257)) / 4)  # two letters, and the sign that ends them
    assert spelling_bits(b"") == math.log2(257)


def test_a_uniform_model_costs_the_same_by_every_tokenizer_that_is_a_code():
    """Eight bits a byte for bytes; and no tokenizer does better by hiding what it does not know."""
    text = "ab" * 500
    uniform = torch.full((1000,), math.log(256))
    assert bits_per_byte(uniform, Bytes().encode(text), Bytes().pieces(text)) == pytest.approx(8.0)
    none = Words([])
    ids, pieces = none.encode(text), none.pieces(text)
    assert ids == [0] and bits_per_byte(torch.zeros(1), ids, pieces, none.unknown) > 8.0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="single code points"):
        Characters(["ab"])
    for known in (["a", "a"], [""]):
        with pytest.raises(ValueError, match="each of them once"):
            Words(known)
    with pytest.raises(ValueError, match="at_least must be 1 or more"):
        Words.of("a", at_least=0)
    for tokenizer in (Characters.of("ab"), Words(["a", "b"]), BPE([])):
        for wrong in (-1, tokenizer.vocabulary):
            with pytest.raises(ValueError, match="ids must lie in 0 to"):
                tokenizer.decode([wrong])
    with pytest.raises(ValueError):
        Bytes().decode([256])
    for each in (Bytes(), BPE([])):
        with pytest.raises(UnicodeEncodeError):
            each.encode("\ud800")
    with pytest.raises(ValueError, match="N each"):
        bits_per_byte(torch.zeros(2), [1], [b"a", b"b"])
    with pytest.raises(ValueError, match="a byte or more"):
        bits_per_byte(torch.zeros(0), [], [])
    with pytest.raises(TypeError, match="nats must be a Tensor"):
        bits_per_byte([0.0], [1], [b"a"])  # type: ignore[arg-type]
