"""One run of `summary`: one block whose rule of memory differs, two tasks, a training whose result is kept as it ends.

    recall   values by their keys, as `nondual.tasks.recall`; the number of pairs is drawn anew for each batch
    parity   whether the ones read so far are odd in number, asked at every position; trained on rows of 32 bits

The block. From x come a query, a key, a value and an output gate, all of one width d, by one projection without bias;
one head; a rule reads the keys and values so far with the query; then

    out = W_out (rmsnorm(y) · silu(z))

    softmax     softmax attention; it keeps every key and value
    linear      elu + 1 of queries and keys, divided by the sum of the keys
    sum         S + β k vᵀ, keys and queries of length 1
    delta       S + β k (v - Sᵀ k)ᵀ, the same keys, queries and β
    gated       α S + k vᵀ, a decay for each row of S (GLA, 2312.06635, section 4.2)

β is between 0 and 1, and between 0 and 2 for "delta 2" (2411.12537, section 4). "Mamba" and "Mamba-2" are the library's
modules with inner width d and d states, Mamba-2 in one head; they have the same gate. No arm has a short convolution
(in Mamba and Mamba-2 its width is 1): a pair stands at one position. All states have d x d numbers, but for that of
softmax, which grows, and the d more of "linear". "LSTM" is torch's nn.LSTM with d cells and an output projection.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.recall_run import Batch, Reader, fitted, loss_of, lstm, size
from benchmarks.record import keep
from nondual.efficient_attention.mamba import Mamba
from nondual.efficient_attention.mamba2 import Mamba2
from nondual.ops.attention import attention
from nondual.ops.linear_attention import linear_attention
from nondual.tasks import recall

WIDTH, STATE, BATCH = 32, 16, 32
KEYS, VALUES, QUESTIONS = 64, 16, 16
TRAINED_ON, TESTED_ON = (4, 8, 16, 32, 64), (2, 4, 8, 12, 16, 24, 32, 48, 64)
BITS, READ, CHOSEN_ON = 32, 256, 64
"""Parity: the rows that are trained on, the longest that is read, and the rows by which a rate is chosen."""


class Memory(nn.Module):
    """The block above with one of its rules."""

    def __init__(self, d_model: int, d: int, rule: str, most: float = 1.0):
        super().__init__()
        self.d, self.rule, self.most = d, rule, most
        self.in_proj, self.out_proj = nn.Linear(d_model, 4 * d, bias=False), nn.Linear(d, d_model, bias=False)
        self.norm = nn.RMSNorm(d)
        if rule == "gated":
            self.decay = nn.Sequential(nn.Linear(d_model, 4, bias=False), nn.Linear(4, d))
        elif rule in ("sum", "delta"):
            self.beta = nn.Linear(d_model, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, E) -> (B, N, E)."""
        q, k, v, z = self.in_proj(x)[:, None].split(self.d, -1)  # (B, 1, N, d) each
        return self.out_proj(self.norm(self.read(x, q, k, v)) * F.silu(z)).squeeze(1)

    def read(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the rule gives back, (B, 1, N, d)."""
        if self.rule == "softmax":
            return attention(q, k, v, causal=True)
        if self.rule == "linear":
            return linear_attention(F.elu(q) + 1, F.elu(k) + 1, v, normalise=True)[0]
        if self.rule == "gated":
            decay = F.logsigmoid(self.decay(x))[:, None] / 16
            return linear_attention(q, k, v, log_decay=decay, scale=self.d**-0.5)[0]
        q, k = (F.normalize(F.silu(one), dim=-1) for one in (q, k))
        beta = self.most * self.beta(x).mT.sigmoid()  # (B, 1, N)
        if self.rule == "sum":
            return linear_attention(q, k, beta[..., None] * v)[0]
        return linear_attention(q, k, v, beta=beta)[0]


def mixer(arm: str) -> tuple[nn.Module, int]:
    """An arm's mixer, and the numbers of its state: of softmax those of each position. "delta, d = 8" has its own d."""
    if ", d = " in arm:
        rule, d = arm.split(", d = ")
        return Memory(WIDTH, int(d), rule), int(d) ** 2
    if arm == "Mamba":
        return Mamba(WIDTH, d_state=STATE, d_conv=1, expand=STATE / WIDTH), STATE**2
    if arm == "Mamba-2":
        return Mamba2(WIDTH, d_state=STATE, d_conv=1, expand=STATE / WIDTH, d_head=STATE), STATE**2
    if arm == "LSTM":
        return lstm(WIDTH, STATE), 2 * STATE
    rule = arm.removesuffix(" 2")
    most = 2.0 if arm.endswith(" 2") else 1.0
    held = {"softmax": 2 * STATE, "linear": STATE * (STATE + 1)}
    return Memory(WIDTH, STATE, rule, most), held.get(arm, STATE**2)


# --- what they read ------------------------------------------------------------------------------------------------


def pairs(batch: int, m: int, generator: torch.Generator) -> Batch:
    """Keys and values (B, m + Q), and what is asked (B, Q)."""
    keys, values, answers = recall(batch, m, keys=KEYS, values=VALUES, questions=QUESTIONS, generator=generator)
    return (keys, values), answers


def some_pairs(generator: torch.Generator) -> Batch:
    """A batch of one of the numbers of pairs that are trained on."""
    return pairs(BATCH, TRAINED_ON[int(torch.randint(len(TRAINED_ON), (1,), generator=generator))], generator)


def bits(n: int, batch: int, generator: torch.Generator) -> Batch:
    """Random bits (B, N), and at each the parity of those up to it."""
    drawn = torch.randint(2, (batch, n), generator=generator)
    return (drawn,), drawn.cumsum(1) % 2


# --- one run -------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One model, trained once, and where its result is kept. A task is "recall" or "parity"."""

    task: str
    arm: str
    rate: float
    seed: int
    steps: int
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / f"{self.task}_{self.arm}_{self.rate}_{self.seed}_{self.steps}.json".replace(
            " ", "-"
        ).replace(",", "")

    def result(self) -> dict[str, Any]:
        """What the run ended with."""
        return json.loads(self.file.read_text())


def carry_out(run: Run) -> dict[str, Any]:
    """Train from the beginning, unless it was done before; keep the result."""
    if not run.file.exists():
        torch.manual_seed(run.seed)
        try:
            result = {"recall": recalled, "parity": counted}[run.task](run)
        except FloatingPointError as error:  # a rate that is too high for this arm
            result = {"failed": str(error)}
        run.folder.mkdir(parents=True, exist_ok=True)
        keep(run.file, {"rate": run.rate, "seed": run.seed, **result})
    return run.result()


def trained(run: Run) -> tuple[Reader, dict[str, Any]]:
    """The model after its training, and what is said of every run."""
    memory, state = mixer(run.arm)
    inputs = [KEYS, VALUES + 1] if run.task == "recall" else [2]
    scores = VALUES if run.task == "recall" else 2
    model = Reader([nn.Embedding(n, WIDTH) for n in inputs], WIDTH, [memory], scores)
    draw = some_pairs if run.task == "recall" else partial(bits, BITS, BATCH)
    history = fitted(run, model, draw)  # type: ignore[arg-type]  # the fields that it reads are the same
    return model, {"parameters": size(model), "state": state, "loss": round(history[-1]["loss"], 5)}


@torch.no_grad()
def recalled(run: Run) -> dict[str, Any]:
    """How many answers are right, and how many bits are told of all values, by the number of pairs."""
    with torch.enable_grad():
        model, result = trained(run)
    right, told = [], []
    for m in TESTED_ON:
        given, answers = pairs(256, m, torch.Generator().manual_seed(7))
        said = model(given)[:, -QUESTIONS:]
        right.append(round((said.argmax(-1) == answers).double().mean().item(), 4))
        nats = F.cross_entropy(said.flatten(0, 1), answers.flatten()).item()
        told.append(round(m * (math.log2(VALUES) - nats / math.log(2)), 2))
    return {**result, "right": right, "bits": told}


@torch.no_grad()
def counted(run: Run) -> dict[str, Any]:
    """The share of right answers at each position, and the loss on the rows by which a rate is chosen."""
    with torch.enable_grad():
        model, result = trained(run)
    choose = loss_of(model, bits(CHOSEN_ON, 128, torch.Generator().manual_seed(6))).item()
    given, answers = bits(READ, 256, torch.Generator().manual_seed(7))
    right = (model(given).argmax(-1) == answers).double().mean(0)
    return {**result, "choose": round(choose, 5), "right": [round(share, 4) for share in right.tolist()]}
