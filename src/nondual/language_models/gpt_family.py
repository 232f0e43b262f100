"""GPT-1 and GPT-2 as their papers and released code have them, and what they are trained to raise.

    GPT-1  post-norm: each norm stands on the residual path, after a branch was added; none after the last layer
    GPT-2  pre-norm: each norm stands before a branch, and one after the last layer

Both learn a vector for each position, score a token by its own embedding, and have the tanh form of GELU in the
feed-forward network. A GPT of other positions or heads is `nondual.language_models.gpt.GPT`; checkpoints are read by
`nondual.pretrained.gpt2`.

Sources: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", sections 3.1 and 4.1;
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3 and table 2. Symbols: V
tokens in the vocabulary, C positions, E width, F = 4 E feed-forward width, L layers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nondual.feed_forward import FeedForward
from nondual.language_models.causal import CausalLM
from nondual.language_models.gpt import FLASH
from nondual.self_attention import MultiHeadAttention
from nondual.token_ids import check_ids
from nondual.transformer_layer import TransformerLayer

gelu_new: Callable[[Tensor], Tensor] = partial(F.gelu, approximate="tanh")
"""0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), (…) -> (…); 1606.08415, section 2."""


@dataclass(frozen=True)
class GPTSize:
    """The sizes of one model of the family.

    Attributes:
        vocabulary: V.
        max_len: C, the longest input.
        d_model: E.
        n_layers: L.
        n_heads: heads of each layer.
        norm_first: pre-norm, as in GPT-2; post-norm, as in GPT-1, if False.
        d_ff: F; 4 E where None.
    """

    vocabulary: int
    max_len: int
    d_model: int
    n_layers: int
    n_heads: int
    norm_first: bool = True
    d_ff: int | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter of `GPTFamily` of this size, by its name there; no model is made."""
        width, inner = self.d_model, 4 * self.d_model if self.d_ff is None else self.d_ff
        matrices = {f"mixer.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        matrices |= {"feed_forward.linear1": (inner, width), "feed_forward.linear2": (width, inner)}
        of_layer: dict[str, tuple[int, ...]] = {}
        for name, shape in matrices.items():
            of_layer |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        of_layer |= {f"{norm}.{kind}": (width,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        tables = {"embeddings.weight": (self.vocabulary, width), "positions.table.weight": (self.max_len, width)}
        layers = {f"layers.{i}.{name}": shape for i in range(self.n_layers) for name, shape in of_layer.items()}
        last = {"norm_f.weight": (width,), "norm_f.bias": (width,)} if self.norm_first else {}
        return tables | layers | last

    def n_parameters(self) -> int:
        """How many numbers the model learns: V E + C E + L (4 E² + 2 E F + 9 E + F), and 2 E for a last norm."""
        return sum(math.prod(shape) for shape in self.shapes().values())


SIZES: dict[str, GPTSize] = {
    "openai-gpt": GPTSize(40478, 512, 768, 12, 12, norm_first=False),
    "gpt2": GPTSize(50257, 1024, 768, 12, 12),
    "gpt2-medium": GPTSize(50257, 1024, 1024, 24, 16),
    "gpt2-large": GPTSize(50257, 1024, 1280, 36, 20),
    "gpt2-xl": GPTSize(50257, 1024, 1600, 48, 25),
}
"""The models that were released, by the names of their checkpoints on the Hugging Face Hub."""


class GPTFamily(CausalLM):
    """A GPT-1 or GPT-2: token ids to scores for the token after each; all else as in `CausalLM`.

        GPTFamily(SIZES["gpt2"])                                # 124 million parameters, at random
        GPTFamily(GPTSize(80, 256, 64, 4, 4), dropout=0.1)      # a small one

    Matrices and tables begin with the deviation 0.02, biases at 0. In GPT-2 the last matrix of each branch begins with
    0.02 / √(2 L), since 2 L of them are added up.

    Args:
        size: how large it is, and where its norms stand.
        activation: of the feed-forward networks.
        dropout: of the embeddings, of the weights of attention and of both branches while training; the papers' is 0.1.
        tied: score a token by its own embedding; otherwise the scores have a matrix of their own, lm_head.
        eps: added to the variance in the norms.

    Raises:
        TypeError: size is no GPTSize.
        ValueError: a width that the heads do not divide, or a dropout outside [0, 1).
    """

    size: GPTSize
    dropout: nn.Dropout

    def __init__(
        self,
        size: GPTSize,
        *,
        activation: Callable[[Tensor], Tensor] = gelu_new,
        dropout: float = 0.0,
        tied: bool = True,
        eps: float = 1e-5,
    ):
        if not isinstance(size, GPTSize):
            raise TypeError(f"size must be a GPTSize, such as SIZES['gpt2'], got {type(size).__name__}")

        def layer(_: int) -> TransformerLayer:
            return TransformerLayer(
                MultiHeadAttention(size.d_model, size.n_heads, dropout=dropout, causal=True, op=FLASH),
                FeedForward(size.d_model, 4 * size.d_model if size.d_ff is None else size.d_ff, activation=activation),
                size.d_model,
                norm_first=size.norm_first,
                eps=eps,
                dropout=dropout,
            )

        super().__init__(
            size.vocabulary,
            size.d_model,
            size.n_layers,
            layer=layer,
            max_len=size.max_len,
            norm=nn.LayerNorm if size.norm_first else nn.Identity,
            tied=tied,
            eps=eps,
        )
        self.size, self.dropout = size, nn.Dropout(dropout)
        self._initialise_as_the_papers()

    @torch.no_grad()
    def _initialise_as_the_papers(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                last = self.size.norm_first and name.endswith((".out_proj", ".linear2"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.size.n_layers) if last else 0.02)
                if module.bias is not None:
                    module.bias.zero_()

    def _through_layers(
        self, x: Tensor, cache: Any, reset: Any, before: Callable[[int, Tensor], Tensor] | None, mixing: Any = None
    ) -> Tensor:
        def dropped(i: int, x: Tensor) -> Tensor:
            x = self.dropout(x) if i == 0 else x
            return x if before is None else before(i, x)

        return super()._through_layers(x, cache, reset, dropped, mixing)


def log_likelihood(model: CausalLM, ids: Int[Tensor, "b n"], k: int, *, rows: int = 64) -> Float[Tensor, "b n_minus_1"]:
    """log P(u_i | u_{i-k}, …, u_{i-1}) of every token but the first, in nats: the sum is the papers' objective.

    Every token is predicted from the k tokens before it and no other (from all, where there are fewer), as equation 1
    of GPT-1 has it. So each has a window of its own, which is read by itself: k times the work of `CausalLM.loss`. That
    reads blocks instead, in which the token j has j predecessors; with k of N - 1 or more the two are one.

    Args:
        model: any causal language model.
        ids: (B, N), of any integer dtype, N of 2 or more.
        k: how many tokens a prediction may read, 1 or more.
        rows: how many windows are read at once.

    Returns:
        (B, N - 1), in float32 or better, each 0 or less.

    Raises:
        TypeError: ids that are not a Tensor.
        ValueError: fewer than two tokens a row, a k or rows below 1, windows longer than the model reads; ids as in
            `CausalLM.forward`.
    """
    ids = check_ids("ids", ids, model.vocabulary).long()
    n = ids.shape[1]
    if n < 2:
        raise ValueError(f"ids must have 2 tokens or more a row to be predicted, got {tuple(ids.shape)}")
    if k < 1 or rows < 1:
        raise ValueError(f"k and rows must be 1 or more, got {k} and {rows}")
    model.check_longest(min(k, n - 1), "k", "give a smaller k")
    # --8<-- [start:log_likelihood]
    # the first k: fewer precede them
    found = [_logarithms(model(ids[:, :k][:, : n - 1]), ids[:, 1 : k + 1])]
    if n - 1 > k:
        windows = ids[:, :-1].unfold(1, k, 1)[:, 1:].flatten(0, 1)  # (B (N - 1 - k), k)
        following = ids[:, k + 1 :].reshape(-1, 1)
        parts = zip(windows.split(rows), following.split(rows))
        last = [_logarithms(model(window)[:, -1:], token) for window, token in parts]
        found.append(torch.cat(last).view(len(ids), n - 1 - k))
    return torch.cat(found, 1)
    # --8<-- [end:log_likelihood]


def _logarithms(scores: Tensor, tokens: Tensor) -> Tensor:
    """log softmax of scores (B, N, V) at tokens (B, N)."""
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return wide.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
