"""Text to token ids and back: by byte, by character, by subword and by word; and bits per byte, by which all compare.

    tokenizer = BPE.train(text, 512)                      # or Bytes(), Characters.of(text), Words.of(text)
    ids = tokenizer.encode("dharmakṣetre")
    tokenizer.decode(ids)                                 # "dharmakṣetre"

aksharas   a word in Devanagari, cut where its script builds its units
bpe        byte-pair encoding: subwords learned from a text
units      bytes, characters and words
"""

from nondual.tokenization.aksharas import aksharas
from nondual.tokenization.bpe import BPE
from nondual.tokenization.units import (
    Bytes,
    Characters,
    Tokenizer,
    Words,
    bits_per_byte,
    spelling_bits,
    words_of,
)

__all__ = [
    "BPE",
    "Bytes",
    "Characters",
    "Tokenizer",
    "Words",
    "aksharas",
    "bits_per_byte",
    "spelling_bits",
    "words_of",
]
