"""A stream far longer than a window, read once from its first token to its last: loss and memory as it goes on.

SmolLM2 reads by blocks and keeps keys and values of

    window          the last 256 tokens
    sinks           those, and the first four tokens; positions are counted in the text
    sinks in place  the same; positions are counted in what is kept, so that the first four never lie farther back than
                    the window is long (Xiao et al. 2023, 2309.17453, section 3.2)
    full            every token
    afresh          nothing: each block is read anew with the 256 tokens before it, as at the beginning of a text

SmolLM2's weights and what it keeps are in bfloat16, softmax and losses in float32. In the first four a token's keys and
values are made once, when it is read, and depend on what it then saw: exactly what the whole text under the mask of the
pattern gives. A small Mamba (benchmarks/speak.py), trained on windows of 256 characters, reads the same plays by
character and keeps a state; its control begins anew every 256 characters with the 256 before them.
"""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import speak
from benchmarks.record import kept
from benchmarks.recurrence import difference
from nondual.data import shakespeare
from nondual.language_models.causal import CausalLM
from nondual.relative_positions import Rotary
from nondual.self_attention import MultiHeadAttention

STREAMS, LENGTH = ("macbeth", "the-tempest", "hamlet"), 10_240
WINDOW, SINKS, BLOCK, BIN = 256, 4, 256, 128
ARMS: dict[str, dict[str, Any]] = {
    "window": {"window": WINDOW},
    "sinks": {"window": WINDOW, "sinks": SINKS},
    "sinks in place": {"window": WINDOW, "sinks": SINKS, "in_place": True},
    "full": {"window": None},
}
HELD_OUT, CHARACTERS, TRAINED = ("macbeth", "the-tempest"), 98_304, 256


class Stream:
    """One layer's attention over a stream: it keeps a window of keys and values, and those of the first few tokens.

    Called as `nondual.ops.attention.attention` is, with queries (1, H, N, D) and keys and values (1, G, N, D) that are
    not turned yet; the first call has all the sinks.

    Attributes:
        rotary: how queries and keys are turned.
        window: how many keys a query sees, its own included; all where None.
        sinks: how many of the first tokens every query sees besides.
        in_place: count positions in what is kept, for the sinks; in the text otherwise.
    """

    def __init__(self, rotary: Rotary, window: int | None, sinks: int = 0, in_place: bool = False):
        self.rotary, self.window, self.sinks, self.in_place = rotary, window, sinks, in_place
        self.read = 0
        self.kept: tuple[Tensor, ...] = ()

    def bytes(self) -> int:
        """Of the keys and values that are kept."""
        return sum(x.untyped_storage().nbytes() for x in self.kept)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        n, start = q.shape[2], self.read
        self.read += n
        turned, k = self.rotary.turn(q, start), self.rotary.turn(k, start)
        if not self.kept:
            first = slice(0, self.sinks)
            self.kept = (k[:, :, first].clone(), v[:, :, first].clone(), k[:, :, :0], v[:, :, :0])
        first_k, first_v, past_k, past_v = self.kept
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        i = torch.arange(start, start + n)[:, None]
        j = torch.arange(start + n - k.shape[2], start + n)
        if self.window is None:
            self.kept = (first_k, first_v, k, v)
            return F.scaled_dot_product_attention(turned, k, v, attn_mask=j <= i, enable_gqa=True)
        # 1. Scores with the keys of the window, and with the first tokens where these have left it.
        groups = q.shape[1] // k.shape[1]
        scores = (turned @ k.repeat_interleave(groups, 1).mT).float()
        scores = scores.masked_fill((j > i) | (j <= i - self.window), -math.inf)
        if self.sinks:
            if self.in_place:  # a full cache ends at this position
                end = self.sinks + self.window - 1
                standing = self.rotary.turn(q.transpose(1, 2).reshape(n, -1, 1, q.shape[3]), end)
                standing = standing.reshape(1, n, -1, q.shape[3]).transpose(1, 2)
                turned = torch.where(i < end, turned, standing)
            far = (turned @ first_k.repeat_interleave(groups, 1).mT).float()
            far = far.masked_fill(torch.arange(self.sinks) > i - self.window, -math.inf)
            scores = torch.cat([far, scores], -1)
        # 2. One softmax over both.
        weights = (scores / math.sqrt(q.shape[3])).softmax(-1).to(v.dtype)
        out = weights[..., -k.shape[2] :] @ v.repeat_interleave(groups, 1)
        if self.sinks:
            out = out + weights[..., : self.sinks] @ first_v.repeat_interleave(groups, 1)
        # 3. Keep what the next query can see.
        last = slice(-(self.window - 1), None)
        self.kept = (first_k, first_v, k[:, :, last].clone(), v[:, :, last].clone())
        return out


def equip(model: CausalLM, **settings: Any) -> Callable[[], None]:
    """Every layer reads a stream, until the function that is returned is called."""
    mixers = [cast(MultiHeadAttention, layer.mixer) for layer in model.layers]
    before = [(mixer.op, mixer.positions) for mixer in mixers]
    for mixer in mixers:
        mixer.op, mixer.positions = Stream(cast(Rotary, mixer.positions), **settings), None

    def undo() -> None:
        for mixer, (op, positions) in zip(mixers, before):
            mixer.op, mixer.positions = op, positions

    return undo


@torch.no_grad()
def read(model: CausalLM, ids: Tensor, **settings: Any) -> dict[str, Any]:
    """Nats of each token after the first, in bins."""
    undo, each = equip(model, **settings), []
    try:
        for place in range(0, len(ids) - 1, BLOCK):
            block, after = ids[place : place + BLOCK], ids[place + 1 : place + BLOCK + 1]
            scores = model(block[None])[0, : len(after)]
            each.append(F.cross_entropy(scores.float(), after, reduction="none"))
    finally:
        undo()
    return {"bins": in_bins(torch.cat(each))}


@torch.no_grad()
def memory(model: CausalLM, length: int, **settings: Any) -> list[int]:
    """Bytes of the tensors that all layers keep after each block; one layer reads zeros, and they are alike."""
    mixer = cast(MultiHeadAttention, model.layers[0].mixer)
    stream, held = Stream(cast(Rotary, mixer.positions), **settings), []
    like = mixer.k_proj.weight
    for _ in range(0, length, BLOCK):
        q, k = (like.new_zeros(1, heads, BLOCK, mixer.d_head) for heads in (mixer.n_heads, mixer.n_kv_heads))
        stream(q, k, k)
        held.append(stream.bytes() * len(model.layers))
    return held


@torch.no_grad()
def afresh(model: CausalLM, ids: Tensor) -> dict[str, Any]:
    """The same of every second block, read with the WINDOW tokens before it; the first is read alone."""
    each = torch.full((len(ids) - 1,), math.nan)
    for place in range(0, len(ids) - 1, 2 * BLOCK):
        begin = max(place - WINDOW, 0)
        end = min(place + BLOCK, len(ids) - 1)
        scores = model(ids[None, begin:end])[0, place - begin :]
        each[place:end] = F.cross_entropy(scores.float(), ids[place + 1 : end + 1], reduction="none")
    return {"bins": in_bins(each)}


def in_bins(each: Tensor, size: int = BIN) -> list[float | None]:
    """Means over bins; None where nothing was measured."""
    means = [part.mean().item() for part in each.split(size)]
    return [None if math.isnan(value) else round(value, 4) for value in means]


# --- Mamba ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def mamba(play: str, length: int) -> dict[str, Any]:
    """Bits of each character in bins of 4,096: with a state that is carried on, and begun anew at every window."""
    model, alphabet = speak.load(speak.MODEL)
    number = {character: i for i, character in enumerate(alphabet)}
    ids = torch.tensor([number[c] for c in shakespeare()[play]])[: length + 1]
    cache, carried, held = model.new_cache(1), [], []
    for place in range(0, len(ids) - 1, 1024):
        after = ids[place + 1 : place + 1025]
        scores = model(ids[None, place : place + len(after)], cache=cache)[0]
        carried.append(F.cross_entropy(scores, after, reduction="none"))
        held.append(sum(x.numel() * x.element_size() for c in cache for x in vars(c).values() if isinstance(x, Tensor)))
    windows = ids.unfold(0, 2 * TRAINED + 1, TRAINED)
    anew = torch.full((len(ids) - 1,), math.nan)
    for first in range(0, len(windows), 16):
        part = windows[first : first + 16]
        scores = model(part[:, :-1])[:, TRAINED:].transpose(1, 2)
        each = F.cross_entropy(scores, part[:, TRAINED + 1 :], reduction="none").flatten()
        anew[(first + 1) * TRAINED : (first + 1) * TRAINED + len(each)] = each
    carried_on = torch.cat(carried)
    both = ~anew.isnan()
    return {
        "carried bits": [round(x.nanmean().item() / math.log(2), 4) for x in carried_on.split(4096)],
        "anew bits": [round(x.nanmean().item() / math.log(2), 4) for x in anew.split(4096)],
        "carried less anew": round((carried_on - anew)[both].mean().item() / math.log(2), 5),
        "bytes": sorted(set(held)),
    }


# --- the whole -----------------------------------------------------------------------------------------------------


def measure(folder: Path, tiny: bool, tokens: Callable[[str], Tensor], model: Callable[[], CausalLM]) -> dict[str, Any]:
    """By arm and stream; differences are paired by stream, over the second half."""
    streams, length = (STREAMS[:2], 1024) if tiny else (STREAMS, LENGTH)

    def one(arm: str, play: str) -> dict[str, Any]:
        ids = tokens(play)[: length + 1]
        return read(model(), ids, **ARMS[arm]) if arm in ARMS else afresh(model(), ids)

    found: dict[str, Any] = {}
    for arm in (*ARMS, "afresh"):
        rows = [kept(folder / f"{arm} {play}.json", one, arm, play) for play in streams]
        print(arm, [row["bins"][-2:] for row in rows], flush=True)
        found[arm] = {"nats by bin": [row["bins"] for row in rows]}
        if arm in ARMS:
            found[arm]["bytes by block"] = memory(model(), length, **ARMS[arm])

    def level(arm: str, among: str) -> list[float]:
        """The mean over the second half, where `among` was measured too; one for each stream."""
        rows = zip(found[arm]["nats by bin"], found[among]["nats by bin"])
        return [
            mean(x for x, y in list(zip(*row))[len(row[0]) // 2 :] if x is not None and y is not None) for row in rows
        ]

    pairs = [("window", "full"), ("sinks", "full"), ("sinks in place", "full"), ("sinks", "window")]
    pairs += [("sinks in place", "sinks"), *((arm, "afresh") for arm in ARMS)]
    characters = 8192 if tiny else CHARACTERS
    return {
        "streams": list(streams),
        "length": length,
        "window": WINDOW,
        "sinks": SINKS,
        "block": BLOCK,
        "bin": BIN,
        "arms": found,
        "differences, second half": {f"{a} less {b}": difference(level(a, b), level(b, a)) for a, b in pairs},
        "mamba": {play: kept(folder / f"mamba {play}.json", mamba, play, characters) for play in HELD_OUT},
    }
