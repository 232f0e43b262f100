"""A sentence encoder over our text encoder, and the names of a BERT checkpoint's tensors in it.

A sentence's vector is the mean of its tokens' last vectors, scaled to unit length (Reimers and Gurevych 2019,
1908.10084, section 3).
"""

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nondual.ops import masks
from nondual.transformer import TextEncoder

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


class SentenceEncoder:
    """Sentences to vectors: a tokenizer, a text encoder, the mean over the tokens, and unit length.

    A list of sentences is read in batches of similar length, so that memory does not grow with their number; what is
    returned is in the order of the list. `sentences` may be anything that yields strings: a list, a tuple, a generator,
    a column of a table. No gradients are computed.

    Args:
        model: the text encoder.
        tokenizer: a `tokenizers.Tokenizer`, without truncation or padding of its own.
        max_tokens: the longest sentence taken, its two marker tokens included.
    """

    model: TextEncoder
    tokenizer: "Tokenizer"
    max_tokens: int

    def __init__(self, model: TextEncoder, tokenizer: "Tokenizer", max_tokens: int):
        self.model, self.tokenizer, self.max_tokens = model.eval(), tokenizer, max_tokens

    @torch.no_grad()
    def encode(self, sentences: Iterable[str], *, batch_size: int = 32) -> Float[Tensor, "b e"]:
        """One vector of unit length for each sentence, (B, E), in the model's dtype and on its device.

        Args:
            sentences: B strings; none give a result of shape (0, E).
            batch_size: how many sentences the model reads at once, at most.

        Raises:
            TypeError: what is no text: bytes, None, numbers, a list within the list, a set or a dict.
            ValueError: a single string where a list is wanted, a sentence of more than `max_tokens` tokens, a string
                that is not Unicode text (a lone surrogate), or a batch_size below 1.
        """
        encoded = self._ids(sentences)
        out = self._zeros(len(encoded))
        for rows, ids, mask in self._batches(encoded, batch_size):
            total = (self.model(ids, mask=mask[:, None, None]) * mask[..., None]).sum(1)
            out[rows] = F.normalize(total / mask.sum(1, keepdim=True).clamp(min=1), dim=-1)
        return out

    @torch.no_grad()
    def vectors(
        self, sentences: Iterable[str], *, batch_size: int = 32
    ) -> tuple[Float[Tensor, "b n e"], Bool[Tensor, "b n"]]:
        """The last layer's vector of every token (B, N, E), and which of the N are real tokens, bool (B, N).

        N is the length of the longest sentence. Vectors of padding are 0. Arguments and errors as in `encode`.
        """
        encoded = self._ids(sentences)
        out, real = self._padded(encoded)
        for rows, ids, mask in self._batches(encoded, batch_size):
            out[rows, : ids.shape[1]] = self.model(ids, mask=mask[:, None, None]) * mask[..., None]
        return out, real

    @torch.no_grad()
    def layers(
        self, sentences: Iterable[str], *, batch_size: int = 32
    ) -> tuple[Float[Tensor, "layers b n e"], Bool[Tensor, "b n"]]:
        """Every token's vector before the first layer and after each: (layers + 1, B, N, E); and the mask (B, N).

        Padding, arguments and errors as in `vectors`.
        """
        encoded = self._ids(sentences)
        blocks = self.model.encoder.layers
        out, real = self._padded(encoded, len(blocks) + 1)
        for rows, ids, mask in self._batches(encoded, batch_size):
            x = self.model.embed(ids)
            out[0, rows, : ids.shape[1]] = x * mask[..., None]
            for number, block in enumerate(blocks, 1):
                x = block(x, mask=mask[:, None, None])
                out[number, rows, : ids.shape[1]] = x * mask[..., None]
        return out, real

    @torch.no_grad()
    def attention(self, sentence: str) -> tuple[list[str], Float[Tensor, "layers h n n"]]:
        """The N tokens of a sentence, and every layer's and head's weights over them (layers, H, N, N).

        Raises:
            TypeError: the sentence is no string.
            ValueError: it has more than `max_tokens` tokens, or is not Unicode text.
        """
        tokens = self.tokens(sentence)
        ((_, ids, _),) = self._batches(self._ids([sentence]), 1)
        _, weights = self.model(ids, return_weights=True)
        return tokens, weights[:, 0]

    def tokens(self, sentence: str) -> list[str]:
        """The sentence as the model reads it, with its marker tokens [CLS] and [SEP].

        Raises:
            TypeError: the sentence is no string.
            ValueError: it is not Unicode text.
        """
        return self._tokenize(sentence, "sentence").tokens

    def _tokenize(self, sentence: str, name: str) -> "Encoding":
        if not isinstance(sentence, str):
            raise TypeError(f"{name} must be a str, got {type(sentence).__name__}")
        try:
            # one at a time: the tokenizer's own batches start threads, which do not survive a fork
            return self.tokenizer.encode(sentence)
        except TypeError:  # what the tokenizer makes of a string without a UTF-8 form
            raise ValueError(f"{name} must be Unicode text, got a lone surrogate in {sentence!r:.60}") from None

    def _ids(self, sentences: Iterable[str]) -> list[list[int]]:
        """Each sentence's token ids."""
        if isinstance(sentences, str):
            raise ValueError("sentences must be a list of strings, got one string: put it in brackets")
        unordered = bytes | bytearray | memoryview | Set | Mapping  # or of numbers
        if isinstance(sentences, unordered) or not isinstance(sentences, Iterable):
            raise TypeError(f"sentences must be a list of strings, got {type(sentences).__name__}")
        encoded = [self._tokenize(sentence, f"sentence {i}").ids for i, sentence in enumerate(sentences)]
        longest = max(map(len, encoded), default=0)
        if longest > self.max_tokens:
            at = next(i for i, ids in enumerate(encoded) if len(ids) == longest)
            raise ValueError(f"sentence {at} has {longest} tokens, and the model reads {self.max_tokens}: split it")
        return encoded

    def _batches(self, encoded: list[list[int]], batch_size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """The rows of a batch, its ids (b, n) padded with 0, and which of them are real (b, n); the longest first."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]), reverse=True)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids = [torch.tensor(encoded[row], dtype=torch.long) for row in rows]
            lengths = torch.tensor([len(row) for row in ids])
            padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
            mask = masks.padding(lengths, padded.shape[1])[:, 0, 0]
            device = self.model.token.weight.device
            yield rows, padded.to(device), mask.to(device)

    def _zeros(self, *shape: int) -> Tensor:
        weight = self.model.token.weight
        return torch.zeros(*shape, weight.shape[1], dtype=weight.dtype, device=weight.device)

    def _padded(self, encoded: list[list[int]], *layers: int) -> tuple[Tensor, Tensor]:
        """Zeros (*layers, B, N, E) for what is computed, and which of the N are real tokens (B, N)."""
        lengths = torch.tensor([len(ids) for ids in encoded], dtype=torch.long, device=self.model.token.weight.device)
        longest = max(map(len, encoded), default=0)
        return self._zeros(*layers, len(encoded), longest), masks.padding(lengths, longest)[:, 0, 0]


def from_bert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a BERT encoder's tensors, from Hugging Face's names to those of `TextEncoder`; its pooler is left out."""
    ours = {
        "embeddings.word_embeddings": "token",
        "embeddings.position_embeddings": "position.table",
        "embeddings.token_type_embeddings": "segment",
        "embeddings.LayerNorm": "norm",
        "attention.self.query": "mixer.q_proj",
        "attention.self.key": "mixer.k_proj",
        "attention.self.value": "mixer.v_proj",
        "attention.output.dense": "mixer.out_proj",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "feed_forward.linear1",
        "output.dense": "feed_forward.linear2",
        "output.LayerNorm": "norm2",
        "encoder.layer.": "encoder.layers.",
    }
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("bert.")
        if not name.startswith(("embeddings.position_ids", "pooler.")):
            for theirs, our in ours.items():
                name = name.replace(theirs, our)
            renamed[name] = tensor
    return renamed
