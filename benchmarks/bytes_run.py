"""One run of the comparison of tokens: the texts, the models at equal work, and a training that is kept as it ends."""

import json
import math
import random
import unicodedata
from collections.abc import Callable
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bytes_cuts import where_it_cuts
from benchmarks.record import keep
from nondual.chunking import Cuts, ratio_loss
from nondual.data import gita, shakespeare
from nondual.data.gita import transliterate
from nondual.feed_forward import FeedForward
from nondual.language_models.bytes import HNet
from nondual.language_models.causal import CausalLM
from nondual.ops.attention import attention
from nondual.relative_positions import Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.tokenization import BPE, Bytes, Characters, Tokenizer, Words, bits_per_byte
from nondual.training import optimiser, train
from nondual.transformer_layer import TransformerLayer

TEXTS = ("IAST", "Devanagari", "English")
ARMS = ("bytes", "characters", "subwords", "words", "learned pieces", "fixed pieces")
ARMS_OF = {"English": ("bytes", "subwords", "words", "learned pieces"), "IAST": ARMS, "Devanagari": ARMS}
"""In English, which is in ASCII here, a character is a byte; it is there to compare Sanskrit with."""
LENGTH, BATCH = 128, 4
"""Segments are of LENGTH characters and as many more as end the word, in every arm."""
SUBWORDS = 768
WIDTH, OUTER, HEADS, LAYERS, WIDEST = 56, 40, 4, 2, 160
"""WIDTH of the bytes' model; OUTER of the layers at the bytes where there are pieces; no model is wider than WIDEST."""
PLAY = "hamlet"
CHOOSE, TEST = 0.08, 0.12
"""The shares of a text, at its end, on which rates are chosen and which is measured."""
NOISE = (0.0, 0.02, 0.05, 0.1)
"""The shares of letters that are mistyped."""


# --- the texts -----------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """One text in its three parts."""

    train: str
    choose: str
    test: str


@cache
def read(name: str) -> Text:
    """The Gītā in one of its scripts, letter for letter the same; or as many characters of a play, about."""
    devanagari = "\n".join(" ".join(verse.devanagari) for verse in gita())
    whole = {
        "Devanagari": lambda: devanagari,
        "IAST": lambda: transliterate(devanagari),
        "English": lambda: shakespeare()[PLAY][: len(transliterate(devanagari))],
    }[name]()
    lines = whole.split("\n")
    ends = list(accumulate(len(line) + 1 for line in lines))
    first, second = (
        next(i for i, end in enumerate(ends, 1) if end >= share * ends[-1]) for share in (1 - CHOOSE - TEST, 1 - TEST)
    )
    return Text(*("\n" + "\n".join(part) for part in (lines[:first], lines[first:second], lines[second:])))


def noised(text: str, share: float, seed: int = 0) -> str:
    """Some letters, or signs of a script, are left out, doubled, or change places with the one after them."""
    draw, out, i = random.Random(seed), [], 0
    while i < len(text):
        here = text[i : i + 2]
        letters = [unicodedata.category(c)[0] in "LM" for c in here]
        how = draw.choice(("drop", "double", "swap")) if letters[0] and draw.random() < share else "keep"
        if how == "swap" and letters == [True, True]:
            out.append(here[::-1])
            i += 1
        elif how == "double":
            out.append(here[0] * 2)
        elif how in ("keep", "swap"):
            out.append(here[0])
        i += 1
    return "".join(out)


@cache
def tokenizer_of(arm: str, text: str) -> Tokenizer:
    """What is made from the part that is trained on."""
    return {
        "characters": Characters.of,
        "subwords": lambda train: BPE.train(train, SUBWORDS),
        "words": Words.of,
    }.get(arm, lambda _: Bytes())(read(text).train)


class Tokens(NamedTuple):
    """A text in tokens, and where a segment may begin or end: at white space, where every tokenizer has a border."""

    ids: list[int]
    pieces: list[bytes]
    places: list[int]
    """The white space, in characters; and the end."""
    at: list[int]
    """The token that begins at each of these places."""


def in_tokens(tokenizer: Tokenizer, text: str) -> Tokens:
    pieces = tokenizer.pieces(text)
    begins = {byte: i for i, byte in enumerate(accumulate(map(len, pieces), initial=0))}
    byte_of = list(accumulate((len(c.encode()) for c in text), initial=0))
    places = [i for i, c in enumerate(text) if c.isspace()] + [len(text)]
    return Tokens(tokenizer.encode(text), pieces, places, [begins[byte_of[place]] for place in places])


@cache
def train_tokens(arm: str, text: str) -> Tokens:
    return in_tokens(tokenizer_of(arm, text), read(text).train)


def segment_end(places: list[int], start: int) -> int:
    """The first place that is LENGTH characters or more after place number `start`, or the last."""
    return next((i for i in range(start + 1, len(places)) if places[i] - places[start] >= LENGTH), len(places) - 1)


def batch_of(segments: list[list[int]], begin: int) -> tuple[Tensor, Tensor]:
    """Inputs (B, N), which begin with the sign of a beginning, and the token after each (B, N), -100 past the end."""
    longest = max(map(len, segments))
    inputs = torch.zeros(len(segments), longest, dtype=torch.long)
    labels = torch.full_like(inputs, -100)
    for row, ids in enumerate(segments):
        inputs[row, : len(ids)] = torch.tensor([begin, *ids[:-1]])
        labels[row, : len(ids)] = torch.tensor(ids)
    return inputs, labels


def draw_of(arm: str, text: str) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    """Draws batches; with the same generator every arm gets the same characters."""
    tokens, begin = train_tokens(arm, text), tokenizer_of(arm, text).vocabulary
    last = next(i for i, place in enumerate(tokens.places) if place >= tokens.places[-1] - LENGTH)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(last, (BATCH,), generator=generator).tolist()
        spans = [(start, segment_end(tokens.places, start)) for start in starts]
        return batch_of([tokens.ids[tokens.at[a] : tokens.at[b]] for a, b in spans], begin)

    return draw


# --- the models ----------------------------------------------------------------------------------------------------


class Every(nn.Module):
    """The router of fixed pieces: a cut at every n-th position, n not necessarily whole."""

    def __init__(self, n: float):
        super().__init__()
        self.n = n

    def forward(self, x: Tensor, before: Tensor | None = None) -> Cuts:
        piece = torch.arange(-1, x.shape[1]).div(self.n).floor()
        cut = (piece[1:] > piece[:-1]).expand(x.shape[:2])
        return Cuts(cut.float(), cut)


def layer_of(width: int, d_ff: int) -> TransformerLayer:
    mixer = MultiHeadAttention(width, HEADS, causal=True, positions=Rotary(width // HEADS), op=attention)
    return TransformerLayer(mixer, FeedForward(width, d_ff), width, norm_first=True, norm=nn.RMSNorm)


def built(arm: str, vocabulary: int, width: int, d_ff: int, n: float, fixed: bool = False) -> CausalLM:
    """A model whose main layers are of this width.

    Args:
        arm: of ARMS.
        vocabulary: how many ids the tokenizer has; the model has one more, the beginning.
        width: of the main layers.
        d_ff: of their feed-forward networks.
        n: how many bytes a piece has, where there are pieces.
        fixed: pieces of fixed length whatever the arm, to count the work of cuts at this rate.
    """
    if "pieces" not in arm:
        return CausalLM(vocabulary + 1, width, LAYERS, layer=lambda i: layer_of(width, d_ff))
    router = Every(n) if fixed or arm == "fixed pieces" else None

    def layer(d_model: int, heads: int) -> TransformerLayer:
        return layer_of(OUTER, 4 * OUTER) if d_model == OUTER else layer_of(width, d_ff)

    return HNet(OUTER, width, HEADS, vocabulary=vocabulary + 1, pieces_of=n, router=router, n_main=LAYERS, layer=layer)


def loss_of(model: CausalLM, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean of the labelled tokens, and with learned pieces the ratio loss."""
    inputs, labels = batch
    if not isinstance(model, HNet):
        return model.loss_at(model.hidden(model.embeddings(inputs)), labels)
    with model.noting_cuts() as noted:
        loss = model.loss_at(model.hidden(model.embeddings(inputs)), labels)
    return loss + model.ratio_weight * ratio_loss(noted[0], model.pieces_of, labels != -100)


def flops_per_byte(model: CausalLM, arm: str, text: str) -> float:
    """Of a training step, forward and backward, as torch counts them: matrix products, those of attention in full."""
    batch = draw_of(arm, text)(torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        loss_of(model, batch).backward()
    in_bytes = draw_of("bytes", text)(torch.Generator().manual_seed(0))[1]  # the same characters
    return counter.get_total_flops() / (in_bytes != -100).sum().item()


def bytes_per_token(arm: str, text: str) -> float:
    tokens = train_tokens(arm, text)
    return sum(map(len, tokens.pieces)) / len(tokens.ids)


class Size(NamedTuple):
    """The sizes by which the work of an arm is that of bytes, and its work."""

    width: int
    d_ff: int
    flops_per_byte: float


@cache
def size_of(arm: str, text: str) -> Size:
    """The width in steps of 8, and the feed-forward width in steps of 4, with which a byte takes as much work as in the
    bytes' model; of all such pairs the one in which the feed-forward network is nearest to four times as wide.

    With pieces it is counted for 1.2 times as many as the model is asked for: where pieces are learned, the rows of a
    batch have different numbers of them, and all are filled up to the most.
    """
    n, vocabulary = bytes_per_token("subwords", text) / 1.2, tokenizer_of(arm, text).vocabulary

    def count(width: int, d_ff: int) -> float:
        return flops_per_byte(built(arm, vocabulary, width, d_ff, n, fixed=True), arm, text)

    if arm == "bytes":
        return Size(WIDTH, 4 * WIDTH, count(WIDTH, 4 * WIDTH))
    aim, fitting = size_of("bytes", text).flops_per_byte, []
    for width in range(OUTER + 8 if "pieces" in arm else 32, WIDEST + 1, 8):
        few, more = count(width, 2 * width), count(width, 6 * width)
        d_ff = round((2 + 4 * (aim - few) / (more - few)) * width / 4) * 4
        fitting.append((abs(math.log(max(d_ff, 1) / width / 4)), width, d_ff))
    _, width, d_ff = min(fitting)
    d_ff = min(d_ff, 4 * width) if width == WIDEST else d_ff
    return Size(width, d_ff, count(width, d_ff))


def model_of(arm: str, text: str) -> CausalLM:
    size = size_of(arm, text)
    vocabulary = tokenizer_of(arm, text).vocabulary
    return built(arm, vocabulary, size.width, size.d_ff, bytes_per_token("subwords", text))


# --- what is measured ----------------------------------------------------------------------------------------------


@torch.no_grad()
def measured(model: CausalLM, tokenizer: Tokenizer, text: str) -> dict[str, float]:
    """Bits a byte of a text, each byte said once, by segments; and how many of its tokens and bytes are unknown."""
    tokens = in_tokens(tokenizer, text)
    ends = [0]
    while ends[-1] < len(tokens.places) - 1:
        ends.append(segment_end(tokens.places, ends[-1]))
    segments = [tokens.ids[tokens.at[a] : tokens.at[b]] for a, b in pairwise(ends)]
    nats = []
    for i in range(0, len(segments), 2 * BATCH):
        inputs, labels = batch_of(segments[i : i + 2 * BATCH], tokenizer.vocabulary)
        scores = model(inputs).log_softmax(-1)
        said = scores.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        nats.append(-said[labels != -100])
    unknown = [piece for i, piece in zip(tokens.ids, tokens.pieces) if i == tokenizer.unknown]
    return {
        "bits_per_byte": bits_per_byte(torch.cat(nats), tokens.ids, tokens.pieces, tokenizer.unknown),
        "unknown_tokens": len(unknown) / len(tokens.ids),
        "unknown_bytes": sum(map(len, unknown)) / len(text.encode()),
        "bytes": len(text.encode()),
        "tokens": len(tokens.ids),
        "pairs_per_byte": sum(len(s) * (len(s) + 1) / 2 for s in segments) / len(text.encode()),
    }


# --- one run -------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One model, trained once to the end, and where its result is kept."""

    arm: str
    text: str
    rate: float
    seed: int
    steps: int
    folder: Path

    @property
    def file(self) -> Path:
        name = f"{self.arm}_{self.text}_{self.rate}_{self.seed}_{self.steps}.json"
        return self.folder / name.replace(" ", "-")


def carry_out(run: Run) -> dict[str, Any]:
    """Train on one thread, measure, keep the result, and give it."""
    if run.file.exists():
        return json.loads(run.file.read_text())
    torch.set_num_threads(1)
    run.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(run.seed)
    model, tokenizer, parts = model_of(run.arm, run.text), tokenizer_of(run.arm, run.text), read(run.text)
    result: dict[str, Any] = {"rate": run.rate, "seed": run.seed, "choose": math.inf}
    try:
        history = train(
            model,
            lambda batch: loss_of(model, batch),
            draw_of(run.arm, run.text),
            optimiser=optimiser(model, run.rate),
            steps=run.steps,
            seed=run.seed,
            name=None,
        )
    except FloatingPointError as error:
        result["stopped"] = str(error)
    else:
        model.eval()
        result["last_loss"] = history[-1]["loss"]
        result["choose"] = measured(model, tokenizer, parts.choose)["bits_per_byte"]
        result["parameters"] = sum(p.numel() for p in model.parameters())
        result["noise"] = {str(share): measured(model, tokenizer, noised(parts.test, share)) for share in NOISE}
        result["flops_per_byte"] = flops_per_byte(model, run.arm, run.text)
        if run.arm == "learned pieces":
            result["cuts"] = where_it_cuts(
                model, run.text, parts.test, read("Devanagari").test if run.text != "English" else None
            )
    keep(run.file, result)
    print(*run[:5], round(result["choose"], 4), round(result.get("last_loss", math.nan), 3), flush=True)
    return result
