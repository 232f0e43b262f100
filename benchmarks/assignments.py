"""One intervention for each of an essay's six assignments, by the protocol of docs/measured/six_assignments.md.

    powers      queries and keys exchanged in one layer of SmolLM2, beside a change that moves as much attention
    doors       each head's report through another head's part of W_O, beside closed heads and scrambled reports
    positions   MiniLM: two words exchange places, all words move on, one word is replaced
    tables      SmolLM2's tables of weights by a low rank, beside as many of the largest weights
    state       a character Mamba with its selection held still, or another text's; and without input
    prompt      eight word pairs in the prompt or, by gradient steps, in the weights

`judged` says of each of thirteen expectations whether it held, as the protocol has it.

    nox -s bench -- assignments

Some fifteen minutes of one core. Each part is kept, so that a stopped run goes on. --tiny runs everything once on small
untrained models and writes nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import assignments_prompt as by_prompt
from benchmarks import assignments_smollm2 as language
from benchmarks import assignments_words as words
from benchmarks.intervals import bootstrap
from benchmarks.record import write
from benchmarks.stages import carried_out

HELD_OUT = ("macbeth", "the-tempest")
TASKS = ("capital", "opposite", "past")
SEEDS = (1, 2, 3)
TEXTS, KINDS = ("play", "random rows"), ("low rank", "largest")
PLACES = ("trained", "one position", "dealt out")


def interval(each: Sequence[float] | Tensor) -> list[float]:
    """The mean, and its interval by a bootstrap over the units."""
    return [round(x, 4) for x in bootstrap(torch.as_tensor(each, dtype=torch.float64))]


def ratio(above: Sequence[float], below: Sequence[float], draws: int = 2000) -> list[float]:
    """The ratio of two means over the same units, and its interval by a bootstrap over them."""
    a, b = (torch.as_tensor(each, dtype=torch.float64) for each in (above, below))
    rows = torch.randint(len(a), (draws, len(a)), generator=torch.Generator().manual_seed(0))
    low, high = (a[rows].mean(1) / b[rows].mean(1)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [round(x, 4) for x in (float(a.mean() / b.mean()), low, high)]


def apart(one: Tensor, other: Tensor, draws: int = 2000) -> list[float]:
    """The difference of the means of two sets of units, each drawn anew by itself."""
    generator = torch.Generator().manual_seed(0)
    means = [each[torch.randint(len(each), (draws, len(each)), generator=generator)].mean(1) for each in (one, other)]
    low, high = (means[0] - means[1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [round(x, 4) for x in (float(one.mean() - other.mean()), low, high)]


# --- what was expected, and what was found ---------------------------------------------------------------------------


def of_tables(found: dict[str, Any]) -> dict[str, list[float]]:
    """Of the harm of being alone, the share that each substitute does, averaged over the ranks, by row."""
    excess = {}
    for text, one in found.items():
        alone = sum(one["alone"]) / len(one["alone"])
        kinds = {kind: torch.tensor(list(one[kind].values()), dtype=torch.float64).mean(0) / alone for kind in KINDS}
        excess[text] = kinds["low rank"] - kinds["largest"]
    return {
        "random rows": interval(excess["random rows"]),
        "over the play": apart(excess["random rows"], excess["play"]),
    }


# --8<-- [start:judged]
def judged(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each assignment its parts: the interval, and whether the expectation held."""

    def column(stage: str, name: str) -> Tensor:
        return torch.tensor([row[name] for row in found[stage].values()], dtype=torch.float64)

    def part(interval: list[float], holds: bool) -> dict[str, Any]:
        return {"interval": interval, "holds": holds}

    def above(interval: list[float], line: float = 0.0) -> dict[str, Any]:
        return part(interval, interval[1] > line)

    def not_below(interval: list[float]) -> dict[str, Any]:
        return part(interval, interval[2] >= 0)

    exchange = column("powers", "exchanged")
    door = {name: column("doors", name) for name in ("wrong door", "closed", "scrambled")}
    place = {name: column("positions", name) for name in found["positions"]["0"]}
    without, whole = (
        place[f"replaced, {kind}"] / place[f"spread, {kind}"].mean() for kind in ("one position", "trained")
    )
    dependence = ratio(without.tolist(), whole.tolist())
    table = of_tables(found["tables"])
    pulse, rest = found["state"]["pulse"], found["state"]["rest"]
    bits = {name: torch.tensor(each, dtype=torch.float64) for name, each in pulse.items()}
    share = {
        f"{way}, {label}": torch.tensor([row[f"{way}, {label}"]["share"] for row in found["prompt"].values()])
        for way in ("prompt", "weights")
        for label in by_prompt.LABELS
    }
    lost = {way: share[f"{way}, right"] - share[f"{way}, shuffled"] for way in ("prompt", "weights")}
    return {
        "powers": {
            "the exchange does harm": above(interval(exchange)),
            "no less than the control": not_below(interval(exchange - column("powers", "control"))),
        },
        "doors": {
            "wrong doors are worse than closed ones": above(interval(door["wrong door"] - door["closed"])),
            "scrambled reports are worse than wrong doors": above(interval(door["scrambled"] - door["wrong door"])),
        },
        "positions": {
            "an exchange moves more than a step of all": above(
                interval((place["exchanged"] - place["moved on"]) / place["spread, trained"].mean())
            ),
            "dependence falls to a half": part(dependence, dependence[2] < 0.5),
        },
        "tables": {
            "the low rank takes more of the random rows": above(table["random rows"]),
            "and more than of the play": above(table["over the play"]),
        },
        "state": {
            "stillness costs": above(interval(bits["still"] - bits["own"])),
            "a foreign pulse costs no less": not_below(interval(bits["foreign"] - bits["still"])),
            "it goes on without input": above(ratio(rest["blank"], rest["text"]), 0.1),
        },
        "prompt": {
            "the prompt brings more": above(interval(share["prompt, right"] - share["weights, right"])),
            "shuffling costs the weights more": above(interval(lost["weights"] - lost["prompt"])),
        },
    }


# --8<-- [end:judged]


def arms(found: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """For each assignment what its interventions and controls gave, as means with intervals over the same units."""

    def means(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, list[float]]:
        return {name: interval([row[name] for row in rows]) for name in names}

    rows = {stage: list(found[stage].values()) for stage in ("powers", "doors", "positions", "prompt")}
    size = {kind: sum(row[f"spread, {kind}"] for row in rows["positions"]) / len(rows["positions"]) for kind in PLACES}
    moves = {"exchanged": "trained", "moved on": "trained"} | {f"replaced, {kind}": kind for kind in PLACES}
    kinds = {}
    for text, one in found["tables"].items():
        alone = sum(one["alone"]) / len(one["alone"])
        for kind in KINDS:
            for rank, each in one[kind].items():
                kinds[f"{text}, {kind} {rank}"] = [round(x / alone, 4) for x in interval(each)]
    pulse, rest = found["state"]["pulse"], found["state"]["rest"]
    return {
        "powers": means(rows["powers"], ("moved", "exchanged", "control")),
        "doors": means(rows["doors"], ("closed", "wrong door", "scrambled")),
        "positions": {
            name: interval([row[name] / size[kind] for row in rows["positions"]]) for name, kind in moves.items()
        },
        "tables": kinds,
        "state": {name: interval(each) for name, each in pulse.items()}
        | {name: [float(f"{x:.3g}") for x in bootstrap(torch.tensor(rest[name]))] for name in ("text", "blank")},
        "prompt": {
            name: interval([row[name]["share"] for row in rows["prompt"]])
            for name in ("bare", *(f"{way}, {label}" for way in ("prompt", "weights") for label in by_prompt.LABELS))
        },
    }


def verdict(parts: dict[str, dict[str, Any]]) -> str:
    """The protocol's word for an assignment."""
    held = [part["holds"] for part in parts.values()]
    return "survives" if all(held) else "survives in part" if any(held) else "fails"


# --- the runs --------------------------------------------------------------------------------------------------------


class Bench:
    """The models and texts, each made when it is first asked for."""

    def __init__(self, made: dict[str, Any] | None = None):
        self.made = made or {}

    def __getattr__(self, name: str) -> Any:
        if name not in self.made:
            self.made[name] = getattr(self, f"make_{name}")()
        return self.made[name]

    def make_smollm2(self) -> Any:
        from nondual.pretrained import our_smollm2

        return our_smollm2()

    def play(self, rows: int, length: int) -> Tensor:
        """Windows of a play (rows, length), one after another."""
        from nondual.data import shakespeare

        text = shakespeare()["hamlet"][2000 : 2000 + 8 * rows * length]
        return self.smollm2[1](text, return_tensors="pt").input_ids[0, : rows * length].view(rows, length)

    def make_text(self) -> language.Reader:
        return language.Reader(self.smollm2[0], self.play(2, 128))

    def make_outputs(self) -> list[Tensor]:
        return language.all_outputs(self.smollm2[0], self.text.ids)

    def make_rows(self) -> dict[str, tuple[language.Reader, int]]:
        tokens = torch.randint(200, 48000, (8, 40), generator=torch.Generator().manual_seed(2))
        model = self.smollm2[0]
        return {
            "play": (language.Reader(model, self.play(8, 80)), 0),
            "random rows": (language.Reader(model, torch.cat([tokens, tokens], 1)), 40),
        }

    def make_sentences(self) -> tuple[Any, list[tuple[list[int], list[int]]]]:
        """MiniLM; and of each sentence its tokens, and where its whole words stand."""
        from nondual.data import RELATIONS
        from nondual.pretrained import minilm

        encoder = minilm()
        read = []
        for one in RELATIONS:
            pieces = encoder.tokenizer.encode(one.text)
            names = [*pieces.tokens, ""]
            whole = [i for i in range(1, len(pieces.ids) - 1) if names[i].isalpha() and names[i + 1][:2] != "##"]
            read.append((pieces.ids, whole))
        return encoder.model, read

    def make_mamba(self) -> tuple[Any, Tensor, int]:
        """The character Mamba, 32 windows of its held-out plays, and the number of a space."""
        from benchmarks.speak import MODEL, load
        from nondual.data import shakespeare

        model, alphabet = load(MODEL)
        windows = []
        for name in HELD_OUT:
            ids = torch.tensor([alphabet.index(character) for character in shakespeare()[name]])
            starts = torch.linspace(0, len(ids) - 2 * words.STEPS, 16).long().tolist()
            windows += [ids[start : start + 2 * words.STEPS] for start in starts]
        return model, torch.stack(windows), alphabet.index(" ")

    def ask(self, stage: str, part: Any) -> Any:
        """What one part of a stage found."""
        with torch.no_grad():
            return rounded(getattr(self, f"ask_{stage}")(part))

    def ask_powers(self, layer: int) -> Any:
        return language.powers(self.text, layer)

    def ask_doors(self, layer: int) -> Any:
        return language.doors(self.text, self.outputs[layer], layer)

    def ask_positions(self, number: int) -> Any:
        model, read = self.sentences
        spare = [ids[i] for other, (ids, whole) in enumerate(read) if other != number for i in whole]
        return words.sentence(model, *read[number], spare, number)

    def ask_tables(self, text: str) -> Any:
        return language.tables(*self.rows[text])

    def ask_state(self, part: str) -> Any:
        model, text, blank = self.mamba
        half = text.shape[1] // 2
        return words.pulse(model, text[:, :half]) if part == "pulse" else words.rest(model, text, blank, half)

    def ask_rates(self, part: str) -> Any:
        task, rate = part.split()
        return by_prompt.by_rate(*self.smollm2, task, float(rate), **self.made.get("sizes", {}))

    def ask_prompt(self, part: str) -> Any:
        task, seed, rate = part.split()
        return by_prompt.draw(*self.smollm2, task, int(seed), float(rate), **self.made.get("sizes", {}))


def rounded(found: Any) -> Any:
    """Numbers of a result with five digits."""
    if isinstance(found, dict):
        return {name: rounded(each) for name, each in found.items()}
    return float(f"{found:.5g}") if isinstance(found, float) else found


def run(bench: Bench, parts: dict[str, Sequence[Any]], tasks: Sequence[str], seeds: Sequence[int], tiny: bool) -> Any:
    """All stages; the rates grow while the best is at their edge."""
    found = carried_out(__file__, parts, bench.ask, tiny)
    rates = sorted(by_prompt.RATES)[: 1 if tiny else None]
    while True:
        asked = [f"{task} {rate:g}" for rate in rates for task in tasks]
        found["rates"] = carried_out(__file__, {"rates": asked}, bench.ask, tiny)["rates"]
        rate = by_prompt.best(found["rates"])
        if tiny or rates[0] < rate < rates[-1] or len(rates) > 6:
            break
        rates = sorted([*rates, round(rate * (3 if rate == rates[-1] else 1 / 3), 9)])
    draws = [f"{task} {seed} {rate:g}" for task in tasks for seed in seeds]
    return found | carried_out(__file__, {"prompt": draws}, bench.ask, tiny) | {"rate": rate}


def main(options: list[str]) -> None:
    torch.set_num_threads(1)
    if "--tiny" in options:
        from benchmarks.assignments_tiny import tiny_bench

        found = run(*tiny_bench(), tiny=True)
        print("tiny", {name: verdict(parts) for name, parts in judged(found).items()}, list(arms(found)))
        return
    stages = {
        "powers": range(30),
        "doors": range(1, 30, 2),
        "positions": range(72),
        "tables": TEXTS,
        "state": ("pulse", "rest"),
    }
    found = run(Bench(), stages, TASKS, SEEDS, tiny=False)
    parts = judged(found)
    figures = {
        "judged": {name: {"verdict": verdict(each), "parts": each} for name, each in parts.items()},
        "arms": arms(found),
        **found,
    }
    for name, each in figures["judged"].items():
        print(name, each)
    write("assignments", "nox -s bench -- assignments", figures, threads=1)
