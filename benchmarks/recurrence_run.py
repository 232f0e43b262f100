"""One run of `recurrence`: a cue among noise that must be named at the end, by six networks alike but for their mixer.

    ids      n n c n n n n n ?      answer      c

The cue is one of CUES, the noise is drawn anew for each row, and the distance from the cue to the end too, evenly in
its logarithm. What is asked is one thing at any distance: a dependency that is sparse, and up to as long as the row.
The distances of the training begin at 1, so that near cues can teach what far ones cannot, or at FAR.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import keep
from nondual.efficient_attention.mamba import Mamba
from nondual.recurrent import GRU, LSTM, RNN, RecurrentNetwork
from nondual.self_attention import MultiHeadAttention
from nondual.training import optimiser, train

CUES, NOISE, WIDTH, LENGTH, BATCH = 8, 8, 32, 128, 32
NEAR, FAR = 1, 64
DISTANCES = (1, 2, 4, 8, 16, 32, 64, 127, 255, 511, 1023, 2047)
SLOPES = DISTANCES[:10]  # at which gradients are taken
ARMS = ("RNN", "LSTM, forget bias 0", "LSTM, forget bias 1", "GRU", "Mamba", "attention")
TORCH_S = {RNN: nn.RNN, LSTM: nn.LSTM, GRU: nn.GRU}


def network(arm: str) -> RecurrentNetwork[Any]:
    """The recurrent network of an arm."""
    if arm.startswith("LSTM"):
        return LSTM(WIDTH, WIDTH, forget_bias=float(arm[-1]))
    return {"RNN": RNN, "GRU": GRU}[arm](WIDTH, WIDTH)


class Fused(nn.Module):
    """Torch's own network with our first weights: the same mathematics, which it computes sooner on a CPU."""

    def __init__(self, ours: RecurrentNetwork[Any]):
        super().__init__()
        self.network = TORCH_S[type(ours)](ours.d_input, ours.d_hidden, batch_first=True)
        self.network.load_state_dict(ours.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0]


def mixer(arm: str) -> nn.Module:
    """What an arm reads the row with."""
    if arm == "attention":
        return MultiHeadAttention(WIDTH, 1, causal=True)
    return Mamba(WIDTH) if arm == "Mamba" else Fused(network(arm))


class Reader(nn.Module):
    """ids (B, N) -> scores (B, CUES) for the cue: an embedding, one mixer, and a linear layer on its last output."""

    def __init__(self, arm: str):
        super().__init__()
        self.embeddings = nn.Embedding(CUES + NOISE + 1, WIDTH)
        self.mixer = mixer(arm)
        self.head = nn.Linear(WIDTH, CUES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.read(self.embeddings(ids))

    def read(self, x: Tensor) -> Tensor:
        """The scores from the embedded ids (B, N, WIDTH)."""
        return self.head(self.mixer(x)[:, -1])


def draw(
    generator: torch.Generator,
    batch: int = BATCH,
    length: int = LENGTH,
    distance: int | None = None,
    nearest: int = NEAR,
) -> tuple[Tensor, Tensor]:
    """(ids (B, length), cues (B,)): at one distance, or each row at its own, from the nearest on."""
    ids = torch.randint(CUES, CUES + NOISE, (batch, length), generator=generator)
    cues = torch.randint(CUES, (batch,), generator=generator)
    exponent = math.log(nearest) + torch.rand(batch, generator=generator) * math.log(length / nearest)
    at = exponent.exp().long().clamp(nearest, length - 1) if distance is None else torch.full((batch,), distance)
    ids[torch.arange(batch), length - 1 - at] = cues
    ids[:, -1] = CUES + NOISE
    return ids, cues


@torch.no_grad()
def accuracy(model: Reader, distance: int, rows: int = 128) -> float:
    """The share of cues named at a distance; the rows are as long as in training, or just long enough."""
    generator = torch.Generator().manual_seed(10_000 + distance)
    ids, cues = draw(generator, rows, max(LENGTH, distance + 1), distance)
    named = torch.cat([model(part).argmax(1) for part in ids.split(32)])
    return (named == cues).double().mean().item()


def gradient(model: Reader, distance: int, rows: int = 16) -> float:
    """How much the scores change with the cue's vector, in float64: the median over rows of the norm of ∂(u·scores)/∂x.

    u (CUES,) is random, drawn for each row: the square of the norm is that of the whole Jacobian on average.
    """
    rows = rows if distance < LENGTH else rows // 2
    generator = torch.Generator().manual_seed(20_000 + distance)
    ids, _ = draw(generator, rows, max(LENGTH, distance + 1), distance)
    u = torch.randn(rows, CUES, generator=generator, dtype=torch.float64)
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        x = model.embeddings(ids)
    cue = x[:, -1 - distance].clone().requires_grad_()
    whole = torch.cat([x[:, : -1 - distance], cue[:, None], x[:, x.shape[1] - distance :]], 1)
    (slope,) = torch.autograd.grad((u * model.read(whole)).sum(), cue)
    return slope.norm(dim=1).median().item()


class Run(NamedTuple):
    """One network, trained once to the end, and where it is kept."""

    arm: str
    nearest: int
    rate: float
    seed: int
    steps: int
    folder: Path

    @property
    def file(self) -> Path:
        arm = self.arm.replace(",", "").replace(" ", "_")
        return self.folder / f"{arm}_from_{self.nearest}_{self.rate}_{self.seed}_{self.steps}.json"

    def result(self) -> dict[str, Any]:
        """What the run ended with."""
        return json.loads(self.file.read_text())

    def model(self, *, trained: bool = True) -> Reader:
        """The network as it ended, or as it began."""
        torch.manual_seed(self.seed)
        model = Reader(self.arm).eval()
        if trained:
            model.load_state_dict(torch.load(self.file.with_suffix(".pt"), weights_only=True)["model"])
        return model

    def ours(self, *, trained: bool = True) -> tuple[RecurrentNetwork[Any], nn.Embedding]:
        """The recurrent network in the library's own class, and the embeddings that it reads."""
        model, ours = self.model(trained=trained), network(self.arm)
        ours.load_state_dict({name.removeprefix("network."): x for name, x in model.mixer.state_dict().items()})
        return ours.eval(), model.embeddings


def carry_out(run: Run) -> None:
    """Train from the beginning or from where it was interrupted; keep the result."""
    if run.file.exists():
        return
    model, log = run.model(trained=False), run.file.with_suffix(".jsonl")
    run.folder.mkdir(parents=True, exist_ok=True)
    train(
        model,
        lambda drawn: F.cross_entropy(model(drawn[0]), drawn[1]),
        lambda generator: draw(generator, nearest=run.nearest),
        optimiser=optimiser(model, run.rate, decay=0.01),
        steps=run.steps,
        seed=run.seed,
        log_every=50,
        log=log,
        checkpoint=run.file.with_suffix(".pt"),
        checkpoint_every=run.steps,
        arguments={"arm": run.arm, "rate": run.rate},
        name=None,
    )
    model.eval()
    ids, cues = draw(torch.Generator().manual_seed(999), 512, nearest=run.nearest)
    with torch.no_grad():
        loss = F.cross_entropy(model(ids), cues).item()
    result = {
        "rate": run.rate,
        "seed": run.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "chosen_on_loss": float(f"{loss:.4g}"),
        "commit": json.loads(log.read_text(encoding="utf-8").splitlines()[0])["commit"],
    }
    keep(run.file, result)


def looked_at(run: Run) -> dict[str, Any]:
    """What a trained network names at each distance, and how its scores change with the cue, before and after."""
    file = run.file.with_suffix(".looked_at")
    if not file.exists():
        before, after = run.model(trained=False), run.model()
        found = {"accuracy": [round(accuracy(after, distance), 4) for distance in DISTANCES]}
        if run.nearest == NEAR:
            found["gradient_before"] = [gradient(before, distance) for distance in SLOPES]
            found["gradient_after"] = [gradient(after, distance) for distance in SLOPES]
        keep(file, found)
    return json.loads(file.read_text())
