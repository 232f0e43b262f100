"""One run of `spelling`: three tasks of writing one sequence after reading another, five models, a training kept.

Tasks:

    spelling   English letters to phonemes (nondual.data.pronunciations)
    gita       Devanagari signs to Latin letters (IAST), a word at a time (nondual.data.gita)
    reversal   random letters to the same letters from last to first

Models. The first three have one encoder (a GRU in both directions), one first state of the decoder (from the encoder's
two last states) and one decoder (a GRU cell that is given a context at each step). They differ in the context:

    fixed      the encoder's two last states, the same at every step
    uniform    the mean of all the encoder's states, the same at every step: attention whose weights are all equal
    additive   the states weighed by additive attention, with the decoder's state as the query

The decoder of `fixed` and `uniform` is a little wider, which makes up for the parameters of the scores. Two more have
as many parameters, to 2 %, and no recurrence:

    transformer  an encoder and a decoder of self-attention; the decoder reads the encoder by cross-attention, so that
                 here too queries come from one sequence, keys and values from another
    one stream   causal self-attention alone, over what is read followed by what is written
"""

import json
import random
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import keep
from nondual.attention_mechanism import AttentionDecoder, LastState, UniformAttention
from nondual.data import gita, pronunciations
from nondual.data.gita import transliterate
from nondual.encoder_decoder import EncoderDecoder
from nondual.feed_forward import FeedForward
from nondual.language_models.causal import CausalLM
from nondual.positional_encoding import Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.training import optimiser, train
from nondual.transformer_layer import TransformerLayer

ARMS = ("fixed", "uniform", "additive", "transformer", "one stream")
EMBEDDED, ENCODER, DECODER, COMPARED, WIDER = 48, 64, 96, 48, 105
D_MODEL, N_HEADS, D_FF, LAYERS, D_FF_STREAM, LAYERS_STREAM = 64, 4, 92, 2, 156, 4
PAD, START, END = 0, 1, 2
DECAY, EVERY = 0.01, 100
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TRAINED_TO, TESTED_TO = 12, 24


# --- the tasks -----------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """What is read and what is to be written, in signs."""

    source: tuple[str, ...]
    target: tuple[str, ...]


class Task(NamedTuple):
    """Pairs to train on, to choose the rate on and to test on. Those of `reversal` to train on are drawn as needed."""

    name: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    train: tuple[Pair, ...]
    tune: tuple[Pair, ...]
    test: tuple[Pair, ...]
    batch: int


SUFFIXES = (
    "ization izations ational ations ation ability ibility ousness fulness iveness ingly edly ments ment nesses ness "
    "ities ity ings ing iest ier ers er ors or ies ied est ed es ly s al als able ible ian ians ist ists ism isms "
    "ize izes ized izing ise ises ised ising ic ics ical ive ives ful less y e"
).split()
"""Endings that are taken off to find a stem. It takes off too many rather than too few: mistakes only join groups."""


def stem(word: str) -> str:
    """A word without its endings, and without a doubled consonant at the end: walks, walked, walkers -> walk."""
    while True:
        ending = max((x for x in SUFFIXES if word.endswith(x) and len(word) - len(x) >= 3), key=len, default="")
        if not ending:
            break
        word = word.removesuffix(ending)
    return word[:-1] if re.search(r"([^aeiou])\1$", word) and len(word) > 3 else word


def split_by(key: Callable[[Any], str], items: list[Any], sizes: tuple[int, ...], seed: int) -> list[list[Any]]:
    """Parts of the given sizes, cut so that items of one key stand in one part: the key's groups in a random order."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    parts: list[list[Any]] = [[] for _ in sizes]
    at = 0
    for name in order:
        if at < len(sizes):
            parts[at] += groups[name]
            at += len(parts[at]) >= sizes[at]
    return [part[:size] for part, size in zip(parts, sizes)]


@cache
def spelling() -> Task:
    """40,000 words to train on, 2,000 to choose rates on and 4,000 to test on; no stem is in two of the three."""
    words = [(word, sounds) for word, sounds in pronunciations() if 3 <= len(word) <= 16 and len(sounds) <= 18]
    parts = split_by(lambda entry: stem(entry[0]), words, (4000, 2000, 40_000), seed=0)
    test, tune, training = (tuple(Pair(tuple(word), sounds) for word, sounds in part) for part in parts)
    sounds = tuple(sorted({sound for _, sequence in words for sound in sequence}))
    return Task("spelling", tuple(LETTERS), sounds, training, tune, test, 64)


@cache
def gita_words() -> Task:
    """The Gītā's different words of up to 24 signs whose two texts agree: 400 to choose on, 800 to test on."""
    pairs = sorted(
        {
            (devanagari, iast)
            for verse in gita()
            for devanagari, iast in zip(verse.devanagari, verse.iast)
            if transliterate(devanagari) == iast and len(devanagari) <= 24
        }
    )
    parts = split_by(lambda pair: pair[0], pairs, (800, 400, len(pairs)), seed=0)
    test, tune, training = (tuple(Pair(tuple(a), tuple(b)) for a, b in part) for part in parts)
    signs = [tuple(sorted({sign for pair in pairs for sign in pair[i]})) for i in (0, 1)]
    return Task("gita", signs[0], signs[1], training, tune, test, 32)


@cache
def reversal() -> Task:
    """Random strings: to choose on, of the lengths trained on; to test on, 100 of each length up to twice the longest.

    Those to train on are drawn for each batch: see `batches`.
    """
    drawn = random.Random(0)

    def strings(length: int, count: int) -> Iterator[Pair]:
        for _ in range(count):
            letters = tuple(drawn.choices(LETTERS, k=length))
            yield Pair(letters, letters[::-1])

    tune = tuple(pair for length in range(1, TRAINED_TO + 1) for pair in strings(length, 30))
    test = tuple(pair for length in range(1, TESTED_TO + 1) for pair in strings(length, 100))
    return Task("reversal", tuple(LETTERS), tuple(LETTERS), (), tune, test, 64)


TASKS: dict[str, Callable[[], Task]] = {"spelling": spelling, "gita": gita_words, "reversal": reversal}


class Batch(NamedTuple):
    """Sources (B, M) and their lengths (B,); targets (B, N), each with START before it and END after it."""

    source: Tensor
    lengths: Tensor
    target: Tensor


def numbered(task: Task, pairs: list[Pair] | tuple[Pair, ...]) -> Batch:
    """Signs to numbers, 3 and up, with padding after the shorter rows."""
    read = {sign: i + 3 for i, sign in enumerate(task.sources)}
    write = {sign: i + 3 for i, sign in enumerate(task.targets)}
    sources = [torch.tensor([read[sign] for sign in pair.source]) for pair in pairs]
    targets = [torch.tensor([START, *(write[sign] for sign in pair.target), END]) for pair in pairs]
    lengths = torch.tensor([len(source) for source in sources])
    return Batch(nn.utils.rnn.pad_sequence(sources, True), lengths, nn.utils.rnn.pad_sequence(targets, True))


def batches(task: Task) -> Callable[[torch.Generator], Batch]:
    """A function that draws the next batch: all words once before any again, words of like length together."""
    waiting: list[list[Pair]] = []

    def draw(generator: torch.Generator) -> Batch:
        if task.name == "reversal":
            length = int(torch.randint(1, TRAINED_TO + 1, (), generator=generator))
            source = torch.randint(3, 3 + len(LETTERS), (task.batch, length), generator=generator)
            start, end = (torch.full((task.batch, 1), sign) for sign in (START, END))
            return Batch(source, torch.full((task.batch,), length), torch.cat([start, source.flip(1), end], 1))
        if not waiting:
            order = torch.randperm(len(task.train), generator=generator).tolist()
            order.sort(key=lambda i: len(task.train[i].source))  # a stable sort: like lengths stay in random order
            blocks = [order[i : i + task.batch] for i in range(0, len(order) - task.batch + 1, task.batch)]
            for block in torch.randperm(len(blocks), generator=generator).tolist():
                waiting.append([task.train[i] for i in blocks[block]])
        return numbered(task, waiting.pop())

    return draw


# --- the models ----------------------------------------------------------------------------------------------------


def last_states(h: Tensor, mask: Tensor) -> Tensor:
    """Of states in both directions (B, M, 2H) the last forward one and the last backward one, which is the first."""
    forward, backward = h.chunk(2, -1)
    at = (mask.sum(-1) - 1)[..., None].expand(-1, -1, forward.shape[-1])
    return torch.cat([forward.gather(1, at)[:, 0], backward[:, 0]], -1)


class Speller(nn.Module):
    """A GRU in both directions reads, a GRU cell with a context writes: the three recurrent arms."""

    def __init__(self, arm: str, task: Task):
        super().__init__()
        d_state = DECODER if arm == "additive" else WIDER
        self.read = nn.Embedding(len(task.sources) + 3, EMBEDDED, PAD)
        self.write = nn.Embedding(len(task.targets) + 3, EMBEDDED, PAD)
        self.encoder = nn.GRU(EMBEDDED, ENCODER, batch_first=True, bidirectional=True)
        self.first = nn.Linear(2 * ENCODER, d_state)
        self.decoder = AttentionDecoder(EMBEDDED, d_state, 2 * ENCODER, COMPARED)
        if arm != "additive":
            context = {"uniform": UniformAttention, "fixed": LastState}[arm]
            self.decoder.attention = context(d_state, 2 * ENCODER)
        self.out = nn.Linear(d_state, len(task.targets) + 3)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The encoder's states (B, M, 2H), the decoder's first state (B, S), the mask (B, 1, M)."""
        x = self.read(source)
        if bool((lengths == source.shape[1]).all()):
            h, _ = self.encoder(x)
        else:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
            h, _ = nn.utils.rnn.pad_packed_sequence(self.encoder(packed)[0], True)
        mask = (torch.arange(h.shape[1]) < lengths[:, None])[:, None]
        return h, torch.tanh(self.first(last_states(h, mask))), mask

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Scores (B, N, V) of the next sign at each step, the true signs before it given."""
        h, s, mask = self.encode(source, lengths)
        projected, states = self.decoder.attention.project(h), []
        for y in self.write(target).unbind(1):
            s, _ = self.decoder.step(y, s, h, mask, projected=projected)
            states.append(s)
        return self.out(torch.stack(states, 1))

    @torch.no_grad()
    def spell(self, source: Tensor, lengths: Tensor, longest: int, *, end: int | None = END) -> Tensor:
        """The likeliest sign at each step, until end: (B, up to longest)."""
        h, s, mask = self.encode(source, lengths)
        projected = self.decoder.attention.project(h)
        sign, written = torch.full((len(source),), START), []
        done = torch.zeros(len(source), dtype=torch.bool)
        while len(written) < longest and not done.all():
            s, _ = self.decoder.step(self.write(sign), s, h, mask, projected=projected)
            sign = self.out(s).argmax(-1)
            written.append(sign)
            if end is not None:
                done |= sign == end
        return torch.stack(written, 1)


class Translator(nn.Module):
    """Self-attention reads, self-attention and cross-attention write: the fourth arm."""

    def __init__(self, task: Task):
        super().__init__()
        self.model = EncoderDecoder(
            len(task.sources) + 3,
            D_MODEL,
            N_HEADS,
            D_FF,
            LAYERS,
            target_vocabulary=len(task.targets) + 3,
            norm_first=True,
        )

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Scores (B, N, V) of the next sign at each step, the true signs before it given."""
        padded = bool((lengths < source.shape[1]).any())
        return self.model(source, target, source_lengths=lengths if padded else None)

    @torch.no_grad()
    def spell(self, source: Tensor, lengths: Tensor, longest: int, *, end: int | None = END) -> Tensor:
        """The likeliest sign at each step, until end: (B, up to longest)."""
        return self.model.generate(source, longest, bos=START, eos=end, source_lengths=lengths).tokens[:, 0]


class OneStream(nn.Module):
    """A causal language model over the source and then the target: the fifth arm."""

    def __init__(self, task: Task):
        super().__init__()
        self.sources = len(task.sources)

        def layer(_: int) -> TransformerLayer:
            mixer = MultiHeadAttention(D_MODEL, N_HEADS, causal=True, positions=Rotary(D_MODEL // N_HEADS))
            return TransformerLayer(mixer, FeedForward(D_MODEL, D_FF_STREAM), D_MODEL, norm_first=True)

        # No code is added to the embeddings: at these rates they soon grow larger than a fixed one beside them.
        vocabulary = 3 + len(task.sources) + len(task.targets)
        self.model = CausalLM(vocabulary, D_MODEL, LAYERS_STREAM, layer=layer, norm=nn.LayerNorm)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Scores (B, N, V) of the next sign at each step, the true signs before it given."""
        before, reset = self._padded_left(source, lengths)
        if reset is not None:
            reset = torch.cat([reset, torch.zeros_like(target, dtype=torch.bool)], 1)
        return self._of_targets(self.model(torch.cat([before, self._shared(target)], 1), reset=reset), source)

    @torch.no_grad()
    def spell(self, source: Tensor, lengths: Tensor, longest: int, *, end: int | None = END) -> Tensor:
        """The likeliest sign at each step, until end: (B, up to longest)."""
        before, reset = self._padded_left(source, lengths)
        cache = self.model.new_cache(len(source), source.shape[1] + longest + 1)
        self.model(before, cache=cache, reset=reset)
        sign, written = torch.full((len(source),), START), []
        done = torch.zeros(len(source), dtype=torch.bool)
        while len(written) < longest and not done.all():
            scores = self.model(self._shared(sign[:, None]), cache=cache)
            sign = self._of_targets(scores, source[:, :0])[:, 0].argmax(-1)
            written.append(sign)
            if end is not None:
                done |= sign == end
        return torch.stack(written, 1)

    def _shared(self, target: Tensor) -> Tensor:
        """Signs of the target as numbers of the vocabulary that both share: those of the source come first."""
        return target + self.sources * (target > END)

    def _of_targets(self, scores: Tensor, source: Tensor) -> Tensor:
        """Scores at the target's steps, of PAD, START, END and the target's signs."""
        scores = scores[:, source.shape[1] :]
        return torch.cat([scores[..., :3], scores[..., 3 + self.sources :]], -1)

    def _padded_left(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sources with their padding before them, and where each begins; None where nothing is padded."""
        if bool((lengths == source.shape[1]).all()):
            return source, None
        at = torch.arange(source.shape[1])
        first = (source.shape[1] - lengths)[:, None]
        return source.gather(1, (at - first) % source.shape[1]), at == first


Model = Speller | Translator | OneStream


def model_of(arm: str, task: Task) -> Model:
    """An untrained model of an arm."""
    made = {"transformer": Translator, "one stream": OneStream}
    return made[arm](task) if arm in made else Speller(arm, task)


def loss_of(model: Model, batch: Batch) -> Tensor:
    """Nats a sign, END included, padding left out."""
    scores = model(batch.source, batch.lengths, batch.target[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1), batch.target[:, 1:].flatten(), ignore_index=PAD)


def right(model: Model, task: Task, pairs: tuple[Pair, ...], at_once: int = 256) -> list[bool]:
    """For each pair whether the whole word was written without a mistake."""
    found: list[bool] = [False] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].source))
    for start in range(0, len(order), at_once):
        rows = order[start : start + at_once]
        batch = numbered(task, [pairs[i] for i in rows])
        written = model.spell(batch.source, batch.lengths, batch.target.shape[1] + 4)
        for i, row, target in zip(rows, written.tolist(), batch.target.tolist()):
            said = row[: row.index(END)] if END in row else None
            found[i] = said == target[1 : target.index(END)]
    return found


# --- what a word costs ---------------------------------------------------------------------------------------------


def multiply_adds(arm: str, m: int, n: int, vocabulary: int) -> int:
    """Multiply-adds of the matrix products that read m signs and write n, each fed back, keys and values kept.

    Counted as one word needs them: the mean or the last states of the encoder are taken once, without products.
    """
    if arm == "transformer":
        projections, hidden = 4 * D_MODEL**2, 2 * D_MODEL * D_FF
        reads = m * (projections + hidden) + 2 * m * m * D_MODEL
        memory = m * 2 * D_MODEL**2
        writes = n * (projections + hidden + 2 * D_MODEL**2) + 2 * D_MODEL * (n * (n + 1) // 2 + n * m)
        return LAYERS * (reads + memory + writes) + n * D_MODEL * vocabulary
    if arm == "one stream":
        both = m + n
        layer = both * (4 * D_MODEL**2 + 2 * D_MODEL * D_FF_STREAM) + 2 * D_MODEL * (both * (both + 1) // 2)
        return LAYERS_STREAM * layer + n * D_MODEL * vocabulary
    state = DECODER if arm == "additive" else WIDER
    reads = m * 2 * 3 * ENCODER * (EMBEDDED + ENCODER) + 2 * ENCODER * state
    writes = n * (3 * state * (EMBEDDED + 2 * ENCODER + state) + state * vocabulary)
    if arm == "additive":  # W_h h once; then W_s s, the scores and the context at each step
        writes += m * 2 * ENCODER * COMPARED + n * (state * COMPARED + m * COMPARED + m * 2 * ENCODER)
    return reads + writes


# --- one run -------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One model, trained once to the end, and where its result is kept."""

    task: str
    arm: str
    rate: float
    seed: int
    steps: int
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / f"{self.task}_{self.arm.replace(' ', '-')}_{self.rate}_{self.seed}_{self.steps}.json"

    def result(self) -> dict[str, Any] | None:
        """What the run ended with, or None where it has not ended."""
        return json.loads(self.file.read_text()) if self.file.exists() else None


def carry_out(run: Run) -> None:
    """Train on one thread and keep the result; a run that has ended is not made again."""
    if run.file.exists():
        return
    torch.set_num_threads(1)
    task = TASKS[run.task]()
    torch.manual_seed(run.seed)
    model = model_of(run.arm, task)
    tune = numbered(task, task.tune[:: max(1, len(task.tune) // 500)])
    began = time.process_time()

    def measure() -> dict[str, float]:
        return {"tune": loss_of(model, tune).item()}

    history = train(
        model,
        lambda batch: loss_of(model, batch),
        batches(task),
        optimiser=optimiser(model, run.rate, decay=DECAY),
        steps=run.steps,
        seed=run.seed,
        measure=measure,
        log_every=min(EVERY, run.steps),
        name=None,
    )
    seconds = time.process_time() - began
    model.eval()
    by_length: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for pair, good in zip(task.test, right(model, task, task.test)):
        by_length[len(pair.source)][0] += good
        by_length[len(pair.source)][1] += 1
    with torch.no_grad():
        tune_loss = loss_of(model, numbered(task, task.tune)).item()
    tuned = right(model, task, task.tune)
    result = {
        **{name: getattr(run, name) for name in ("task", "arm", "rate", "seed", "steps")},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tune_loss": round(tune_loss, 4),
        "tune_accuracy": round(sum(tuned) / len(tuned), 4),
        "by_length": {str(length): counts for length, counts in sorted(by_length.items())},
        "curve": {
            "step": [row["step"] for row in history],
            "train": [round(row["loss"], 4) for row in history],
            "tune": [round(row["tune"], 4) for row in history],
        },
        "seconds": round(seconds, 1),
        "commit": _commit(),
    }
    keep(run.file, result)
    print(*run[:4], result["tune_loss"], result["tune_accuracy"], f"{seconds:.0f} s", flush=True)


def _commit() -> str:
    """The commit of this folder, with "+changes" where src or benchmarks differ from it."""
    said = [
        subprocess.run(
            ["git", *words], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()
        for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "src", "benchmarks"])
    ]
    return said[0] + ("+changes" if said[1] else "")
