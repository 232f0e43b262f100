"""hama the other way: a real prefix language model that writes a word from its phonemes.

Source: the package hama 1.7.0 (Seongmin Park, https://github.com/hamanlp/hama), its model from phonemes to spelling.
Four pre-norm layers, width 224, 4 heads, learned positions, tied scores: 7.3 million parameters, two thirds of them for
the signs of many scripts. Licence: Apache-2.0.

    <bos> <src> n aɪ t <tgt>    knight <eos>
    the prefix, read both ways  written letter by letter

The package holds the weights alone. That each layer norms first, that the prefix is read both ways, that there are 4
heads, GELU and no scale of the embeddings was found by comparison: of 64 settings this one alone writes every letter as
the package's own engine does (tests/pretrained/test_hama_p2g.py). Its engine computes in part with float16 numbers, we
with float32.

torch is imported by the function: `python -m nondual.pretrained` reads the package's hashes without it.
"""

import json
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nondual.pretrained.hama import HAMA, hama_tensors
from nondual.store import read

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nondual.language_models.prefix_lm import PrefixLM

N_HEADS: int = 4
LONGEST_PROMPT, LONGEST_WORD, LONGEST_TEXT = 192, 193, 416  # phonemes; letters and the end's sign; both together
SIGNS: tuple[str, ...] = ("<pad>", "<unk>", "<bos>", "<eos>", "<src>", "<tgt>", "<no_source>")
NAMES: dict[str, str] = {
    "embedding.": "embeddings.",
    "pos.embedding.": "positions.table.",
    "layers.norm.": "norm_f.",
    "layers.layers.": "layers.",
    ".self_attn.in_proj_": ".mixer.in_proj_",  # torch's, which MultiHeadAttention takes apart
    ".self_attn.out_proj.": ".mixer.out_proj.",
    ".linear": ".feed_forward.linear",
}


class PrefixSpeller:
    """The network with its signs: phonemes in, letters out.

    Attributes:
        model: the network, in evaluation mode.
        tokens: the signs, phonemes and letters in the order of their numbers.
    """

    model: "PrefixLM"
    tokens: list[str]

    def __init__(self, model: "PrefixLM", tokens: list[str]):
        self.model, self.tokens = model, tokens
        self._numbers = {token: number for number, token in enumerate(tokens)}

    def prompt(self, phonemes: Sequence[str]) -> list[int]:
        """The numbers of a word's prefix: <bos> <src> its phonemes <tgt>.

        Args:
            phonemes: in the International Phonetic Alphabet, as `hama().spell` gives them; "|" stands between words.

        Raises:
            TypeError: phonemes is one str.
            ValueError: there are none or more than 192, or one that the network does not know.
        """
        if isinstance(phonemes, str):
            raise TypeError(f"phonemes must be a list of phonemes, got the str {phonemes!r:.100}: use .split()")
        if not 1 <= len(phonemes) <= LONGEST_PROMPT:
            raise ValueError(f"phonemes must be 1 to {LONGEST_PROMPT}, got {len(phonemes)}")
        unknown = sorted({p for p in phonemes if p not in self._numbers or p in SIGNS})
        if unknown:
            raise ValueError(f"phonemes must be ones that the network knows, got {', '.join(map(repr, unknown))}")
        begin, source, target = (self._numbers[sign] for sign in ("<bos>", "<src>", "<tgt>"))
        return [begin, source, *(self._numbers[p] for p in phonemes), target]

    def write(self, phonemes: Sequence[str]) -> str:
        """The spelling of a word, the likeliest letter each time.

        Args:
            phonemes: as in `prompt`.

        Raises:
            TypeError, ValueError: as `prompt`.
        """
        return self.write_all([phonemes])[0]

    def write_all(self, words: Sequence[Sequence[str]]) -> list[str]:
        """What `write` gives for each of several words, read as one batch.

        Args:
            words: the phonemes of each.

        Raises:
            TypeError, ValueError: as `prompt`.
        """
        import torch

        if not words:
            return []
        prompts = [self.prompt(phonemes) for phonemes in words]
        width, end = max(map(len, prompts)), self._numbers["<eos>"]
        device = self.model.model.embeddings.weight.device
        padding = self._numbers["<pad>"]
        ids = torch.tensor([[padding] * (width - len(p)) + p for p in prompts], device=device)
        starts = torch.tensor([width - len(p) for p in prompts], device=device)
        reset = torch.arange(width, device=device) == starts[:, None]
        n_new = min(LONGEST_WORD, LONGEST_TEXT - width)
        written = self.model.generate(ids, n_new, eos=end, reset=reset if starts.any() else None)[:, width:]
        return [self._text(row) for row in written.tolist()]

    def _text(self, numbers: list[int]) -> str:
        """The letters up to the end's sign; parts of Korean syllables are joined (Unicode's NFKC)."""
        end = self._numbers["<eos>"]
        letters = numbers[: numbers.index(end)] if end in numbers else numbers
        text = "".join(self.tokens[i] for i in letters if self.tokens[i] not in SIGNS)
        return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def hama_p2g(device: "torch.device | str | None" = None) -> PrefixSpeller:
    """The speller of hama 1.7.0 from phonemes, in float32: `hama_p2g().write(["n", "aɪ", "t"])` is "night".

    Args:
        device: where it runs; the CPU where left out.

    Raises:
        WeightsMissing: the weights were not fetched yet; the message says how.
        RuntimeError: a file is not the one that was pinned.
    """
    import torch.nn.functional as F

    from nondual.language_models.gpt_family import GPTFamily, GPTSize
    from nondual.language_models.prefix_lm import PrefixLM

    tokens = [str(token) for token in json.loads(read(HAMA, "p2g_vocab.json"))["tokens"]]
    stored = hama_tensors(read(HAMA, "p2g.hama"))
    state = from_hama_p2g(stored)
    vocabulary, width = state["embeddings.weight"].shape
    n_layers = len({name.split(".")[1] for name in state if name.startswith("layers.")})
    size = GPTSize(vocabulary, len(state["positions.table.weight"]), width, n_layers, N_HEADS)
    model = GPTFamily(size, activation=F.gelu)
    model.load_state_dict(state)
    return PrefixSpeller(PrefixLM(model).to(device).eval(), tokens)


def from_hama_p2g(stored: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """The package's tensors under our names: what `GPTFamily.load_state_dict` takes."""
    state = {}
    for name, tensor in stored.items():
        for theirs, ours in NAMES.items():
            if name.startswith(theirs) or theirs.startswith("."):
                name = name.replace(theirs, ours, 1)
        state[name] = tensor
    return state
