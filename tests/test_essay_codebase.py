"""The files that the essay names, as they were counted, and what stands here in their place."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from ledger.claims import load
from ledger.essay_map import PATHS
from torch.nn.functional import scaled_dot_product_attention

from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.efficient_attention.mamba import Mamba
from nondual.language_models.gpt import GPT
from nondual.ops.attention import attention
from nondual.self_attention import MultiHeadAttention

ROOT = Path(__file__).parent.parent
COUNTED = json.loads((ROOT / "docs/measured/essay_codebase.json").read_text())

X = torch.randn(1, 3, 8)
COMPUTES = {  # for each of the essay's paths that stands here: something it computes
    "attention_mechanism": lambda room: room.AdditiveAttention(8, 8, 4)(X, X)[0],
    "self_attention": lambda room: room.MultiHeadAttention(8, 2)(X),
    "transformer": lambda room: room.Encoder(8, 2, 16, n_layers=2)(X),
    "positional_encoding": lambda room: room.LearnedPositions(8, 8)(3),
    "efficient_attention/mamba": lambda room: room.Mamba(8)(X),
    "efficient_attention/flash_attention": lambda room: room.FlashAttention()(*X.view(3, 1, 1, 1, 8).requires_grad_()),
    "efficient_attention/sparse_attention": lambda room: room.SparseAttention(room.local(2), block=16)(
        *X.expand(3, 3, 8)[:, None, None].requires_grad_()
    ),
    "efficient_attention/linear_attention": lambda room: room.LinearAttentionMixer(8, 2)(X),
    "vision_transformers/vit": lambda room: room.VisionTransformer(4, 2, 3, d_model=8, n_heads=2, d_ff=16, n_layers=1)(
        torch.randn(1, 3, 4, 4)
    ),
    "language_models/gpt_family": lambda room: room.GPTFamily(room.GPTSize(9, 8, 8, 1, 2)).loss(
        torch.tensor([[1, 2, 3]])
    ),
    "multimodal/clip": lambda room: room.CLIP(*[torch.nn.Identity()] * 2, 4, d_image=8, d_text=8).loss(X[0], X[0] ** 2),
    "multimodal/flamingo": lambda room: room.Flamingo(
        torch.nn.Identity(), GPT(9, 8, 1, 2), room.PerceiverResampler(8, 2), mark=8, d_vision=8
    ).loss(torch.tensor([[8, 1, 2]]), X),
    "multimodal/llava": lambda room: room.Llava(
        torch.nn.Identity(), GPT(9, 8, 1, 2), room.Projector(8, 8), mark=8, d_vision=8
    ).loss(torch.tensor([[8, 1, 2]]), X),
}


def stands_here(path):
    return any((ROOT / "src/nondual" / name).exists() for name in (f"{path}.py", f"{path}/__init__.py"))


@pytest.mark.parametrize("path", [path for path in PATHS if stands_here(path)])
def test_a_path_of_the_essay_that_stands_here_computes(path):
    out = COMPUTES[path](importlib.import_module("nondual." + path.replace("/", ".")))
    assert out.isfinite().all()
    out.sum().backward()  # and can be learned


def properties():
    """What the essay says of mechanisms in formulas, each as (its name, what it gives, what it should be)."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=draw)
    q, k, v = torch.randn(3, 2, 4, 5, 3, dtype=torch.float64, generator=draw)
    torch.manual_seed(0)
    heads, mamba = MultiHeadAttention(12, 4).double(), Mamba(12).double()
    plain = (q @ k.mT / math.sqrt(3)).softmax(-1) @ v
    yield "softmax(Q K^T / sqrt(d)) V", scaled_dot_product_attention(q, k, v), plain
    yield "tiles give the same as the whole table", FlashAttention()(q, k, v), plain
    yield "rows of weights sum to one", attention(q, k, v, return_weights=True)[1].sum(-1), torch.ones_like(q[..., 0])

    per_head = (heads.v_proj(x).unflatten(-1, (4, 3)), heads.out_proj.weight.unflatten(1, (4, 3)))
    _, weights = heads(x, return_weights=True)
    summed = torch.einsum("bhnm,bmhd,ehd->bne", weights, *per_head) + heads.out_proj.bias
    yield "heads side by side, then W_O, is a sum over heads", heads(x), summed
    order = torch.tensor([3, 0, 4, 1, 2])
    yield "without positions the order of the words is not seen", heads(x[:, order]), heads(x)[:, order]

    phi_q, phi_k = (torch.nn.functional.elu(t) + 1 for t in (q, k))
    yield "a summary first is the table first", phi_q @ (phi_k.mT @ v), (phi_q @ phi_k.mT) @ v
    cache = mamba.new_cache(2)
    with torch.no_grad():
        steps = torch.cat([mamba(part, cache=cache) for part in x.split(1, 1)], 1)
        yield "a state that is carried on is the whole sequence read at once", steps, mamba(x)


@pytest.mark.claim("A0.3", "holds if")
def test_mathematics_decides_what_is_said_of_a_mechanism_and_not_every_claim(monkeypatch):
    """Of the thirteen files five hold arithmetic; seven of the essay's formulas are checked here without any of them.

    In the ledger a test that runs decides every answered claim of this essay, except statements about texts. These are
    the counter-example: the essay says that files and mathematics let an engineer check every claim.
    """
    assert [Path(row["path"]).with_suffix("").as_posix() for row in COUNTED["figures"]["rows"]] == [
        f"ml_research/attention/{p}" for p in PATHS
    ]
    assert COUNTED["repository_commit"].startswith("d61d034")
    assert sum(row["arithmetic"] > 0 for row in COUNTED["figures"]["rows"]) == 5 and len(PATHS) == 13
    monkeypatch.syspath_prepend(ROOT)
    count = importlib.import_module("benchmarks.essay_codebase").count
    assert count('def f():\n    """a @ b"""\n    return "a * b"')["arithmetic"] == 0  # a formula in a string is text
    assert count("def f(a, b):\n    return a @ b + 1")["arithmetic"] == 2
    silent = [p for p, row in zip(PATHS, COUNTED["figures"]["rows"]) if row["arithmetic"] == 0]
    assert {"efficient_attention/mamba", "efficient_attention/flash_attention"} <= set(silent)

    checked = list(properties())
    assert len(checked) == 7
    for name, given, expected in checked:
        torch.testing.assert_close(given, expected, msg=lambda text, name=name: f"{name}: {text}")

    answered = [claim for claim in load(ROOT) if claim.essay == "A" and claim.verdict]
    undecided = {claim.id for claim in answered if not claim.test}
    assert undecided <= {claim.id for claim in answered if claim.verdict in ("reading", "slip")}
    assert {"A1.6", "A1.7", "A1.8", "A1.10"} <= undecided and len(answered) - len(undecided) >= 15
