"""nondual.tokenization.bpe: by hand, and merges and tokens as the library tokenizers has them."""

import json
import random
from collections import Counter
from itertools import pairwise

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from nondual.data.gita import transliterate
from nondual.tokenization import BPE, words_of
from nondual.tokenization.bpe import joined

SYLLABLES = "ka ta pa na ma ya ra la va sa ha ki ti ni mi tu ru su ke te ko to".split()


def made_up(words, seed, between="\n"):
    """A text of words from few syllables, with frequencies that differ."""
    draw = random.Random(seed)
    known = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 5))) for _ in range(60)]
    return between.join(draw.choices(known, [1 / i for i in range(1, 61)], k=words))


def signs():
    """The sign for each byte in the vocabularies of GPT-2 and its like, where a space and a control have none."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


SIGNS = signs()


def spelled(data):
    return "".join(SIGNS[byte] for byte in data)


def theirs(model):
    tokenizer = Tokenizer(model)
    cut = Regex(r" ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(cut, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def test_by_hand():
    bpe = BPE.train("low low lower", 259)
    first, second, third = bpe.merges
    assert first == (ord("l"), ord("o")) and second == (256, ord("w")) and third == (ord(" "), 257)
    assert bpe.pieces("lower low") == [b"low", b"e", b"r", b" low"]
    assert bpe.encode("slow") == [ord("s"), 257]
    assert joined([1, 1, 1, 2, 1, 1], (1, 1), 9) == [9, 1, 2, 9]


def test_what_is_joined_is_always_the_most_frequent_pair():
    text = made_up(400, 1, " ")
    words = Counter(words_of(text))
    of = {word: list(word.encode()) for word in words}
    for i, pair in enumerate(BPE.train(text, 330).merges):
        count = Counter()
        for word, times in words.items():
            for each in pairwise(of[word]):
                count[each] += times
        most = max(count.values())
        assert pair == min(each for each, n in count.items() if n == most)
        of = {word: joined(ids, pair, 256 + i) for word, ids in of.items()}


def test_merges_are_those_of_tokenizers():
    """On words without spaces between them, so that its order of signs is that of bytes and ties go the same way."""
    text = made_up(3000, 2)
    judge = theirs(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 120, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    judge.train_from_iterator([text], trainer)
    ours = BPE.train(text, 256 + 120)
    bytes_of = {i: piece for i, piece in enumerate(ours._bytes_of)}
    merges = json.loads(judge.to_str())["model"]["merges"]
    assert [[spelled(bytes_of[i]) for i in pair] for pair in ours.merges] == [list(pair) for pair in merges]


@pytest.mark.parametrize("text", ["sanskrit", "devanagari", "mixed"])
def test_tokens_are_those_of_tokenizers(text):
    devanagari = "धर्मक्षेत्रे कुरुक्षेत्रे समवेता युयुत्सवः\nमामकाः पाण्डवाश्चैव किमकुर्वत सञ्जय "
    given = {
        "sanskrit": transliterate(devanagari) * 4,
        "devanagari": devanagari * 4,
        "mixed": (devanagari + "two  words, 'and' 12 more…\t🙂 ") * 3,
    }[text]
    ours = BPE.train(given, 320)
    vocabulary = {spelled(ours._bytes_of[i]): i for i in range(ours.vocabulary)}
    merges = [tuple(spelled(ours._bytes_of[i]) for i in pair) for pair in ours.merges]
    judge = theirs(models.BPE(vocabulary, merges))
    for read in (given, given[::-1], made_up(50, 3, " ") + " नमः"):
        assert ours.encode(read) == judge.encode(read).ids
        assert ours.decode(ours.encode(read)) == read


def test_fewer_merges_than_asked_for_where_nothing_occurs_twice():
    assert BPE.train("abc", 400).merges == [] and BPE.train("", 256).vocabulary == 256
    assert BPE.train("abab", 400).merges == [(97, 98)]  # "abab" then is one word of two equal tokens, met once
    assert BPE.train("aaaa aaaa", 400).decode(BPE.train("aaaa aaaa", 400).encode("aaaaa")) == "aaaaa"


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="256 or more"):
        BPE.train("a", 255)
    with pytest.raises(ValueError, match="there before them"):
        BPE([(97, 256)])
    with pytest.raises(ValueError, match="once each"):
        BPE([(97, 98), (97, 98)])
