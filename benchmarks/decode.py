"""Decoding on one thread of a CPU: MambaLM beside transformers' MambaForCausalLM and mambapy, with the same weights.

Each continues the same prompt greedily, one token at a time, with its own cache: ours by `generate`, transformers by
its `generate` (in plain PyTorch, as it runs without a GPU), mambapy by its blocks' `step`. All must give the same
tokens. The prompt is read once; what is timed is prompt and new tokens together, so the prompt is short.
"""

import importlib.metadata
import warnings
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import alternate, ratio, write
from nondual.language_models.mamba import MambaLM
from nondual.pretrained.mamba import from_mamba

SIZES = (dict(d_model=128, n_layers=4), dict(d_model=512, n_layers=8))
VOCABULARY, PROMPT, NEW, ROUNDS = 2048, 8, 32, 9
PEERS = {"transformers": "transformers", "mambapy": "mambapy"}


def runs(d_model: int, n_layers: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name, what takes a prompt (1, N) and returns it with NEW tokens after it; all with the same random weights."""
    from mambapy.mamba import Mamba, MambaConfig
    from transformers import MambaConfig as HuggingFaceConfig
    from transformers import MambaForCausalLM

    torch.manual_seed(0)
    config = HuggingFaceConfig(
        vocab_size=VOCABULARY, hidden_size=d_model, num_hidden_layers=n_layers, eos_token_id=None, pad_token_id=0
    )
    theirs = MambaForCausalLM(config).eval()
    with torch.no_grad():  # from the small start, so that the next token is no near tie
        theirs.backbone.embeddings.weight.normal_()
    state = from_mamba(theirs.state_dict())
    state.pop("lm_head.weight", None)  # tied
    ours = MambaLM(VOCABULARY, d_model, n_layers).eval()
    ours.load_state_dict(state)
    blocks = Mamba(MambaConfig(d_model=d_model, n_layers=n_layers, rms_norm_eps=1e-5)).eval()
    names = blocks.state_dict().keys()
    blocks.load_state_dict({name: state[name] for name in names})

    @torch.no_grad()
    def by_mambapy(ids: Tensor) -> Tensor:
        mixer = blocks.layers[0].mixer.config
        empty = (None, torch.zeros(len(ids), mixer.d_inner, mixer.d_conv - 1))
        caches, tokens = [empty] * n_layers, list(ids.unbind(1))
        for t in range(ids.shape[1] + NEW - 1):
            hidden, caches = blocks.step(F.embedding(tokens[t], ours.embeddings.weight), caches)
            if t >= ids.shape[1] - 1:
                tokens.append(F.linear(ours.norm_f(hidden), ours.embeddings.weight).argmax(-1))
        return torch.stack(tokens, 1)

    def by_transformers(ids: Tensor) -> Tensor:
        return theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, use_cache=True
        )

    return {"ours": lambda ids: ours.generate(ids, NEW), "transformers": by_transformers, "mambapy": by_mambapy}


def compare(d_model: int, n_layers: int) -> dict:
    """Tokens a second of each, and how many times as many ours are."""
    ids = torch.randint(VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    ways = runs(d_model, n_layers)
    said = {name: way(ids) for name, way in ways.items()}
    for name, tokens in said.items():
        if not torch.equal(tokens, said["ours"]):
            raise AssertionError(f"{name} must say what ours says, {said['ours'].tolist()}, got {tokens.tolist()}")
    times = alternate({name: lambda way=way: way(ids) for name, way in ways.items()}, ROUNDS)
    found = {
        "d_model": d_model,
        "n_layers": n_layers,
        "tokens_per_second": {name: round(NEW / median(seconds), 1) for name, seconds in times.items()},
        "ours_over": {name: ratio(times[name], times["ours"]) for name in PEERS},
    }
    print(found, flush=True)
    return found


def main(options: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    write(
        "mamba_decode",
        "nox -s bench -- decode",
        {"sizes": [compare(**size) for size in SIZES]},
        threads=1,
        vocabulary=VOCABULARY,
        prompt=PROMPT,
        new_tokens=NEW,
        dtype="float32",
        peers={name: importlib.metadata.version(package) for name, package in PEERS.items()},
    )
