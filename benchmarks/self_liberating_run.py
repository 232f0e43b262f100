"""One run of `self_liberating`: a model of `proposals` trained on Shakespeare, and what is measured of it afterwards.

    by_position    bits for each character at places 1 to 1,024, beside the same text read in windows of 128
    gates          of each head: half-life, spread, and on which characters its forgetting falls
    streamed       held-out text, one character at a time, by streams that let keys go: what they keep, how far each
                   output is off, and the bound that was promised

Streams run in float64, so that an error is what letting go did and not a rounding.
"""

import copy
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from benchmarks import proposals_run
from benchmarks.plays import Plays, in_numbers, windows
from benchmarks.proposals_run import CONTEXT, HELD_OUT, LIBERATING, TASKS, WINDOWS, Reader, fitted
from benchmarks.record import kept, run_file
from nondual.extensions import CertifiedStream, DecayingAttention

ARMS = tuple(LIBERATING)
STREAMED = ("decay", "decay, no positions")
"""The arms whose scores are those of one layer alone, which `CertifiedStream` needs, and which have gates."""
LONG, STRETCH = 1024, 64
EPSILONS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
STREAM, PARTS = 8192, 16
PASSAGE = 600
KINDS = {"line break": "\n", "space": " ", "stop": ".!?;:", "comma": ",", "letter": None}


class Run(NamedTuple):
    """One model, trained once and then measured, and where the result is kept.

    Attributes:
        trained_in: where `proposals` keeps its runs; this training is one of them.
        steps: of the training; the task's own where None.
        stream: how many characters are read one at a time.
    """

    arm: str
    rate: float
    seed: int
    folder: Path
    trained_in: Path
    steps: int | None = None
    long: int = LONG
    rows: int = WINDOWS
    stream: int = STREAM
    epsilons: tuple[float, ...] = EPSILONS

    @property
    def file(self) -> Path:
        return run_file(self.folder, self.arm, self.rate, self.seed, self.steps or "all", self.long, self.stream)


def carry_out(run: Run) -> dict[str, Any]:
    """Train and measure, unless that was done before; keep what came of it."""
    return kept(run.file, measured, run)


def measured(run: Run) -> dict[str, Any]:
    """All that is measured of one model."""
    training = proposals_run.Run("Shakespeare", run.arm, run.rate, run.seed, run.steps, run.trained_in)
    model, trained = fitted(training)
    kept(training.file, lambda: trained)  # for `proposals`, unless it has this run
    out: dict[str, Any] = {"arm": run.arm, "seed": run.seed, "trained": trained, "by_position": by_position(model, run)}
    if trained["failed"] is None and forgets(model):
        out["gates"] = gates(model)
        if run.arm in STREAMED:
            out |= streams(model, run)
    return out


def forgets(model: Reader) -> bool:
    return any(mixer.forget is not None for mixer in mixers(model))


def mixers(model: Reader) -> list[DecayingAttention]:
    """Those of each layer, in order."""
    return [layer.mixer for layer in model.layers]  # type: ignore[union-attr, misc]


@torch.no_grad()
def read_by(model: Reader, ids: Tensor) -> list[Tensor]:
    """What each layer's mixer reads, (B, N, E), while the model reads ids (B, N)."""
    seen: list[Tensor] = []
    hooks = [mixer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for mixer in mixers(model)]
    model((ids,))
    for hook in hooks:
        hook.remove()
    return seen


@cache
def plays() -> Plays:
    return in_numbers(HELD_OUT)


# --- loss by position ------------------------------------------------------------------------------------------------


def held_out(long: int, rows: int) -> Tensor:
    """Windows (rows, long + 1) of the plays that no training draws from."""
    return torch.cat([windows(plays().of[name], long, rows // len(HELD_OUT)) for name in HELD_OUT])


@torch.no_grad()
def bits(model: nn.Module, ids: Tensor) -> Tensor:
    """Of each next character of ids (B, N + 1), (B, N)."""
    scores = torch.cat([model((part,)) for part in ids[:, :-1].split(2)])
    return F.cross_entropy(scores.mT, ids[:, 1:], reduction="none") / math.log(2)


def by_position(model: nn.Module, run: Run) -> dict[str, Any]:
    """Mean bits in stretches of 64 places, read as one window, and read anew every 128 characters as in training."""
    ids = held_out(run.long, run.rows)
    whole = bits(model, ids)
    short = ids.unfold(1, CONTEXT + 1, CONTEXT).flatten(0, 1)  # row by row, in order
    anew = bits(model, short).view_as(whole)
    return {
        name: [round(each, 5) for each in of.unflatten(1, (-1, STRETCH)).mean((0, 2)).tolist()]
        for name, of in (("one window", whole), ("windows of 128", anew))
    }


# --- gates -----------------------------------------------------------------------------------------------------------


def half_life(log_gate: float) -> float | None:
    """In how many steps half is gone; None where nothing ever is."""
    return round(math.log(2) / -log_gate, 3) if log_gate < 0 else None


def gates(model: Reader) -> list[dict[str, Any]]:
    """Of every head, on held-out windows of 128: layer by layer."""
    alphabet = plays().alphabet
    ids = torch.cat([given[0] for given, _ in TASKS["Shakespeare"]().fresh()])
    kinds = {name: kind_of(ids, alphabet, of) for name, of in KINDS.items()}
    found = []
    for i, (mixer, x) in enumerate(zip(mixers(model), read_by(model, ids))):
        with torch.no_grad():
            log_forget, bound = mixer.parts(x).log_forget, mixer.bound()
        for head in range(log_forget.shape[1]):
            of = log_forget[:, head].double()
            low, middle, high = of.flatten().quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
            found.append(
                {
                    "layer": i + 1,
                    "head": head + 1,
                    "half_life": half_life(math.log(of.exp().mean().item())),
                    "half_life_of_the_product": half_life(of.mean().item()),
                    "half_life_of_a_gate": [half_life(each) for each in (low, middle, high)],
                    "forgetting_on": {
                        name: {
                            "of_characters": round(is_one.double().mean().item(), 4),
                            "of_forgetting": round(((of * is_one).sum() / of.sum()).item(), 4),
                        }
                        for name, is_one in kinds.items()
                    },
                    "bound": round(bound[head].item(), 4),
                }
            )
    return found


def kind_of(ids: Tensor, alphabet: list[str], of: str | None) -> Tensor:
    """Where ids are of these characters; letters where it is None."""
    wanted = [i for i, c in enumerate(alphabet) if (c.isalpha() if of is None else c in of)]
    return torch.isin(ids, torch.tensor(wanted))


# --- streams ---------------------------------------------------------------------------------------------------------


class Streamed(nn.Module):
    """A mixer in decoding, one position a call, and what was seen of its stream."""

    def __init__(self, mixer: DecayingAttention, epsilon: float):
        super().__init__()
        self.out_proj, self.epsilon = mixer.out_proj, epsilon
        self.heads = copy.deepcopy(mixer)
        self.heads.out_proj = nn.Identity()  # type: ignore[assignment]  # what the bound is about: the heads' outputs
        self.stream = CertifiedStream(self.heads, epsilon)
        self.read: list[Tensor] = []
        self.gave: list[Tensor] = []
        self.missing: list[Tensor] = []
        self.kept: list[int] = []
        self.bytes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        """x (1, 1, E) -> (1, 1, E)."""
        gave = self.stream.step(x)
        missing = self.stream.missing
        assert missing is not None
        for into, value in ((self.read, x), (self.gave, gave), (self.missing, missing)):
            into.append(value)
        self.kept.append(self.stream.kept)
        self.bytes.append(held_bytes(self.stream))
        return self.out_proj(gave)


def held_bytes(stream: CertifiedStream) -> int:
    """The memory of all tensors that a stream holds on to."""
    tensors = [value for value in vars(stream).values() if isinstance(value, Tensor)]
    return sum({each.data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


class Exact(nn.Module):
    """A mixer that reads the whole text, its rows in blocks; what its heads gave is kept."""

    def __init__(self, mixer: DecayingAttention, block: int = 256):
        super().__init__()
        self.mixer, self.block = mixer, block

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, E) -> (B, N, E)."""
        return self.mixer.out_proj(heads_of(self.mixer, x, self.block))


def heads_of(mixer: DecayingAttention, x: Tensor, block: int = 256) -> Tensor:
    """What the heads give before they are joined, (B, N, E), without the N by N matrix. x is in float64."""
    q, k, v, log_forget = mixer.parts(x)
    total, n, out = log_forget.cumsum(-1), x.shape[1], []
    for start in range(0, n, block):
        end = min(start + block, n)
        s = q[:, :, start:end] @ k[:, :, :end].mT / mixer.d_head**0.5
        s = s + total[:, :, start:end, None] - total[:, :, None, :end]
        later = torch.ones(end - start, end, dtype=torch.bool).triu(start + 1)
        out.append(s.masked_fill(later, -math.inf).softmax(-1) @ v[:, :, :end])
    return rearrange(torch.cat(out, 2), "b h n d -> b n (h d)")


def kept_by_rule(log_forget: Tensor, bound: Tensor, epsilon: float) -> Tensor:
    """How many keys each head keeps at each step, (H, N), from its gates (H, N) and bound (H,) alone.

    The most that can be let go at step i: the longest beginning of the sequence whose bounds, e^(2c + decay), sum to ε.
    """
    total, n = log_forget.double().cumsum(-1), log_forget.shape[-1]
    gone = (-total).logcumsumexp(-1)  # log of the sum of e^(-total) over the first p
    most = math.log(epsilon) - 2 * bound.double()[:, None] - total
    let_go = torch.searchsorted(gone, most.contiguous(), right=True).clamp(max=torch.arange(n))
    return torch.arange(1, n + 1) - let_go


@torch.no_grad()
def streams(model: Reader, run: Run) -> dict[str, Any]:
    """What streams of each ε keep of a held-out play and how far they are off, and the model that keeps all."""
    ids = plays().of["the-tempest"][: run.stream + 1][None]
    model = copy.deepcopy(model).double()
    whole = copy.deepcopy(model)
    for layer, mixer in zip(whole.layers, mixers(model)):
        layer.mixer = Exact(mixer)  # type: ignore[union-attr]
    exact = F.cross_entropy(whole((ids[:, :-1],))[0], ids[0, 1:]).item() / math.log(2)
    of_each = {f"{epsilon:g}": streamed(model, ids, epsilon) for epsilon in run.epsilons}
    cache = [2 * n * model.layers[0].mixer.q_proj.out_features * 8 for n in marks(run.stream)]  # type: ignore[union-attr, operator]
    found: dict[str, Any] = {"exact_bits": round(exact, 6), "cache_bytes": cache, "streams": of_each}
    if run.arm == "decay" and run.seed == 1:
        found["passage"] = passage(model, plays().alphabet, ids[:, : min(PASSAGE, run.stream)])
    return found


def marks(n: int) -> list[int]:
    """At which lengths something is noted."""
    return [n * (i + 1) // PARTS for i in range(PARTS)]


def streamed(model: Reader, ids: Tensor, epsilon: float) -> dict[str, Any]:
    """One stream over ids (1, N + 1), every layer letting keys go."""
    reading = copy.deepcopy(model)
    layers = [Streamed(mixer, epsilon) for mixer in mixers(model)]
    for layer, own in zip(reading.layers, layers):
        layer.mixer = own  # type: ignore[union-attr]
    n = ids.shape[1] - 1
    scores = torch.cat([reading((ids[:, i : i + 1],)) for i in range(n)], 1)
    return {
        "bits": round(F.cross_entropy(scores[0], ids[0, 1:]).item() / math.log(2), 6),
        "layers": [what_came_of(layer, n) for layer in layers],
    }


def what_came_of(layer: Streamed, n: int) -> dict[str, Any]:
    """The keys kept, and the errors beside the bound. Every output of every head is compared."""
    x, gave = torch.cat(layer.read, 1), torch.cat(layer.gave, 1)
    missing = torch.stack(layer.missing, -1)[0]  # (H, N)
    q, _, v, log_forget = layer.heads.parts(x)
    heads = q.shape[1]
    error = (gave - heads_of(layer.heads, x)).unflatten(-1, (heads, -1)).norm(dim=-1)[0].T  # (H, N)
    largest = v.norm(dim=-1).cummax(-1).values[0]
    by_rule = kept_by_rule(log_forget[0], layer.heads.bound(), layer.epsilon)
    kept = torch.tensor(layer.kept, dtype=torch.float64)
    promised = 2 * layer.epsilon * largest
    return {
        "kept_mean": round(kept.mean().item(), 1),
        "kept_most": int(kept.max()),
        "kept_by_part": [int(part.max()) for part in kept.split(-(-n // PARTS))],
        "kept_by_head_mean": [round(each, 1) for each in by_rule.double().mean(-1).tolist()],
        "kept_by_head_most": by_rule.amax(-1).tolist(),
        "as_the_rule": bool((by_rule.amax(0) - kept).abs().max() <= 1),
        "missing_most": missing.max().item(),
        "worst_error": error.max().item(),
        "promised_there": promised.flatten()[error.argmax()].item(),
        "worst_share_of_promise": (error / promised).max().item(),
        "worst_share_of_certificate": (error / (2 * missing * largest).clamp(min=1e-12)).max().item(),
        "within": bool((error <= promised).all() and (error <= 2 * missing * largest + 1e-10).all()),
        "values_most": largest.max().item(),
        "bytes": [layer.bytes[m - 1] for m in marks(n)],
    }


def passage(model: Reader, alphabet: list[str], ids: Tensor) -> dict[str, Any]:
    """A text, and for each head of each layer log f at each of its characters, and the bound of its scores."""
    return {
        "text": "".join(alphabet[i] for i in ids[0].tolist()),
        "log_forget": [
            [[round(each, 4) for each in head] for head in mixer.parts(x).log_forget[0].tolist()]
            for mixer, x in zip(mixers(model), read_by(model, ids))
        ],
        "bound": [[round(each, 4) for each in mixer.bound().tolist()] for mixer in mixers(model)],
    }
