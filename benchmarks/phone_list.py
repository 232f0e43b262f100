"""What is left of a list of phone numbers: a state of fixed size against a store that grows, as the list gets longer.

Twelve names come in random order, each with a random digit. After every pair, the names that were read are asked for,
and each answer is one of ten digits. A GRU reads the pairs into a state of S numbers, and answers from that state and
the name alone. The look-up keeps the pairs, and answers from their mean with weights by softmax: one layer of
attention, whose queries are made from the name. Both read the same vectors and answer through the same two layers.

Each model is trained alike: the same number of batches of fresh lists, Adam, a warm-up and a straight descent to 0. Its
rate is the best of four, by one seed's share of right answers over all lengths; then three other seeds are trained at
that rate. All answers in docs/measured/phone_list.json are on fresh lists, and each model shows the same ones. This is
the picture at the head of the chapter on recurrence; no verdict rests on it.

    nox -s bench -- phone_list           some five minutes on one idle core
    nox -s bench -- phone_list --tiny    a few steps, which writes nothing

A run that is done is kept in `runs/phone_list` of the cache folder, and is not trained again.
"""

import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import write
from nondual.ops.attention import attention
from nondual.recurrent import GRU
from nondual.store import cache_folder

NAMES = ["Anna", "Ben", "Clara", "Dev", "Eva", "Finn", "Gita", "Hugo", "Ida", "Jun", "Kim", "Lea"]
DIGITS, WIDTH, HIDDEN = 10, 32, 64
SIZES = (8, 32)
STEPS, BATCH, ASKED = 2000, 64, 3
RATES, SWEEP_SEED, SEEDS = (1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2), 0, (1, 2, 3)
TESTED, SHOWN = 1000, 3  # fresh lists for the shares of right answers, and lists of which every answer is stored

N = len(NAMES)


class Reader(nn.Module):
    """Reads pairs of a name and a digit, and answers which digit a name had.

    Args:
        size: the numbers of a GRU's state; None for a look-up, whose value vectors have WIDTH numbers.
    """

    def __init__(self, size: int | None):
        super().__init__()
        self.names, self.digits = nn.Embedding(N, WIDTH), nn.Embedding(DIGITS, WIDTH)
        if size is None:
            self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)
            self.value = nn.Linear(2 * WIDTH, WIDTH)
        else:
            self.state = GRU(2 * WIDTH, size)
        self.size = size
        self.hidden = nn.Linear((size or WIDTH) + WIDTH, HIDDEN)
        self.answer = nn.Linear(HIDDEN, DIGITS)

    def forward(self, names: Tensor, digits: Tensor, places: Tensor) -> Tensor:
        """Scores (B, N, A, 10) of the digits, for the names at `places` (B, N, A), asked after each of N pairs."""
        x = torch.cat([self.names(names), self.digits(digits)], -1)
        b, n, a = places.shape
        asked = self.names(names.gather(1, places.flatten(1)).view(b, n, a))
        if self.size is None:
            seen = torch.ones(n, n, dtype=torch.bool).tril().repeat_interleave(a, 0)  # after each pair, those so far
            q, k, v = (y[:, None] for y in (self.query(asked).flatten(1, 2), self.key(x), self.value(x)))
            found = attention(q, k, v, mask=seen)[:, 0].unflatten(1, (n, a))
        else:
            found = self.state(x)[0][:, :, None].expand(-1, -1, a, -1)
        return self.answer(F.relu(self.hidden(torch.cat([found, asked], -1))))


def lists(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Names (B, N) in random order, and a random digit for each."""
    names = torch.rand(batch, N, generator=generator).argsort(1)
    return names, torch.randint(DIGITS, (batch, N), generator=generator)


def some_places(batch: int, generator: torch.Generator) -> Tensor:
    """For each list and time, ASKED random places among those that were read (B, N, ASKED)."""
    drawn = torch.rand(batch, N, ASKED, generator=generator)
    return (drawn * torch.arange(1, N + 1)[:, None]).long()


ALL_PLACES = torch.arange(N).expand(N, N)


def trained(size: int | None, rate: float, seed: int, steps: int) -> Reader:
    """A reader after so many batches; the seed decides its first weights and its lists."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Reader(size)
    optimizer = torch.optim.Adam(model.parameters(), rate, fused=True)
    warm = min(100, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, 1 - i / steps))
    for _ in range(steps):
        names, digits = lists(BATCH, generator)
        places = some_places(BATCH, generator)
        scores = model(names, digits, places)
        right = digits.gather(1, places.flatten(1))
        loss = F.cross_entropy(scores.flatten(0, 2), right.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def answers(model: Reader, names: Tensor, digits: Tensor) -> Tensor:
    """The shares (B, N, N, 10) that a reader gives the digits, after each pair for the name at each place."""
    return model(names, digits, ALL_PLACES.expand(len(names), -1, -1)).softmax(-1)


def tested(model: Reader, seed: int, count: int) -> dict[str, Any]:
    """The shares of right answers on fresh lists: after each number of pairs, and after the last for each place."""
    names, digits = lists(count, torch.Generator().manual_seed(seed))
    shares = answers(model, names, digits)
    read = torch.ones(N, N).tril()  # row n: the places that were read after n + 1 pairs
    hits = (shares.argmax(-1) == digits[:, None]).float().mean(0) * read
    return {
        "right": [round(x, 4) for x in (hits.sum(1) / read.sum(1)).tolist()],
        "right_by_place": [round(x, 4) for x in hits[-1].tolist()],
    }


def shown(model: Reader, count: int) -> list[dict[str, Any]]:
    """Of a few lists, after each pair and for each name read: the digit that is answered, and the percents that the
    right one got.
    """
    names, digits = lists(count, torch.Generator().manual_seed(1000))
    shares = answers(model, names, digits)
    said, sure = shares.argmax(-1), shares.gather(-1, digits[:, None, :, None].expand(-1, N, -1, 1))[..., 0]
    return [
        {
            "answers": ["".join(map(str, said[i, t, : t + 1].tolist())) for t in range(N)],
            "sure": [[round(100 * p) for p in sure[i, t, : t + 1].tolist()] for t in range(N)],
        }
        for i in range(count)
    ]


def run(size: int | None, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """One training with its results, from the store where it was done before."""
    folder = cache_folder() / "runs" / "phone_list"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{size or 'lookup'}-{rate:g}-{seed}-{steps}.json"
    if not file.exists():
        model = trained(size, rate, seed, steps)
        found = {
            "size": size,
            "rate": rate,
            "seed": seed,
            "parameters": sum(p.numel() for p in model.parameters()),
            **tested(model, seed=500 + seed, count=TESTED),
            "lists": shown(model, SHOWN),
        }
        file.write_text(json.dumps(found))
        print(size, rate, seed, found["right"][-1], flush=True)
    return json.loads(file.read_text())


def main(options: list[str]) -> None:
    torch.set_num_threads(1)
    tiny = "--tiny" in options
    steps = 3 if tiny else STEPS
    models = []
    for size in (*SIZES, None):
        sweep = [run(size, rate, SWEEP_SEED, steps) for rate in RATES]
        best = max(sweep, key=lambda one: sum(one["right"]))["rate"]
        seeds = [run(size, best, seed, steps) for seed in SEEDS]
        models.append(
            {
                "size": size,
                "parameters": seeds[0]["parameters"],
                "rate": best,
                "sweep": [{"rate": one["rate"], "right": one["right"]} for one in sweep],
                "seeds": [{name: one[name] for name in ("seed", "right", "right_by_place")} for one in seeds],
                "lists": seeds[0]["lists"],
            }
        )
    if tiny:
        return
    names, digits = lists(SHOWN, torch.Generator().manual_seed(1000))
    pairs = [{"names": [NAMES[i] for i in n], "digits": d} for n, d in zip(names.tolist(), digits.tolist())]
    write(
        "phone_list",
        "nox -s bench -- phone_list",
        {"pairs": pairs, "models": models},
        threads=1,
        steps=STEPS,
        batch=BATCH,
        tested=TESTED,
    )
