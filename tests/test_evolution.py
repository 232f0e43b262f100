"""The arc from 2014 to 2023: its dates, what each step adds and removes, how costs grow, and how dense heads spread."""

import copy
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.entropy import choice, power, spread
from benchmarks.evolution import crossing, crossing_in_all
from nondual.analysis import weights_of
from nondual.attention_mechanism import AdditiveAttention
from nondual.data import RELATIONS
from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.efficient_attention.linear_attention import LinearAttentionMixer
from nondual.efficient_attention.mamba import Mamba
from nondual.efficient_attention.sparse_attention import SparseAttention, layers_to_reach_all, local
from nondual.encoder_decoder import EncoderDecoder
from nondual.language_models.hybrid import HybridLM
from nondual.ops.attention import attention
from nondual.pretrained import minilm
from nondual.self_attention import MultiHeadAttention

ROOT = Path(__file__).parent.parent
E, H, WINDOW = 16, 2, 4
DENSE, TILES = partial(attention, impl="reference"), FlashAttention(impl="reference")


def measured(name):
    return json.loads((ROOT / f"docs/measured/{name}.json").read_text(encoding="utf-8"))["figures"]


def layers():
    """The mechanisms within one sequence, causal, x (1, N, E) -> (1, N, E); the first three with the same weights."""
    torch.manual_seed(0)
    dense, flash, sparse = (
        MultiHeadAttention(E, H, causal=True, op=op) for op in (DENSE, TILES, SparseAttention(local(WINDOW), block=16))
    )
    flash.load_state_dict(dense.state_dict())
    sparse.load_state_dict(dense.state_dict())
    linear = LinearAttentionMixer(E, H)
    return {"dense": dense, "flash": flash, "sparse": sparse, "linear": linear, "Mamba": Mamba(E)}


# --- dates ---------------------------------------------------------------------------------------------------------


def papers():
    return yaml.safe_load((ROOT / "docs/arc.yml").read_text(encoding="utf-8"))["papers"]


def test_each_month_is_the_one_that_the_papers_identifier_begins_with():
    off = {}
    for paper in papers():
        if number := paper.get("id"):
            month = f"20{number[:2]}-{number[2:4]}"
            if month != paper["month"]:
                off[paper["step"]] = (paper["month"], month)
    assert off == {"CLIP": ("2021-02", "2021-03")}, "handed in on a Friday in February, announced in March"


@pytest.mark.claim("A4.1", "slip")
def test_one_year_of_the_essays_table_is_wrong_and_with_it_the_order():
    """Flash attention is of 2022, not of 2019: it follows linear attention, ViT and CLIP. The other years are right."""
    steps = [paper for paper in papers() if "said" in paper]
    wrong = {paper["step"]: (paper["said"], int(paper["month"][:4])) for paper in steps}
    assert {step: years for step, years in wrong.items() if years[0] != years[1]} == {"flash attention": (2019, 2022)}
    first = {}
    for paper in papers():
        first.setdefault(paper["step"], paper["month"])
    order = sorted((step for step in first if step in {paper["step"] for paper in steps}), key=first.__getitem__)
    assert order == [
        "additive attention",
        "self-attention",
        "sparse attention",
        "linear attention",
        "ViT",
        "CLIP",
        "flash attention",
        "LLaVA",
        "GPT-4V",
        "Mamba",
    ]
    assert first["precursor of self-attention"] < first["self-attention"]
    assert first["precursor of linear attention"] < first["linear attention"]


# --- what each step adds and removes -------------------------------------------------------------------------------


def reached(layer, n):
    """The share of pairs, each position and one up to it, in which a change of the one moves the other."""
    x = torch.randn(1, n, E)
    slopes = torch.autograd.functional.jacobian(lambda x: layer(x)[0], x)[:, :, 0]  # (N, E, N, E)
    pairs = (slopes.abs().amax((1, 3)) > 0).double()
    assert not pairs.triu(1).any()
    return float(pairs.sum() / (n * (n + 1) / 2))


def kept(layer, n):
    """How many numbers a decoder keeps after n positions."""
    cache = layer.new_cache(1, n)
    with torch.no_grad():
        layer(torch.randn(1, n, E), cache=cache)
    return sum(value.numel() for value in vars(cache).values() if isinstance(value, torch.Tensor))


@pytest.mark.claim("A4.17", "holds if")
def test_each_step_removes_what_is_named_and_most_bring_something_back():
    """Its table, by runs: who reads whom, how many pairs, the same result or another, and what is kept."""
    made = layers()
    n = 24
    x = torch.randn(1, n, E)

    # 2014: a decoder's states read an encoder's, and the encoder's do not depend on them.
    s, h = torch.randn(1, 3, E, requires_grad=True), torch.randn(1, 5, E, requires_grad=True)
    context, _ = AdditiveAttention(E, E, E)(s, h)
    assert all(slope.any() for slope in torch.autograd.grad(context.sum(), [s, h]))

    # 2017: queries, keys and values from one sequence, all pairs. The model of that paper still has the two networks.
    assert reached(made["dense"], n) == 1
    model = EncoderDecoder(20, E, H, 32, 2).eval()
    memories = []
    model.encoder.register_forward_hook(lambda _, __, out: memories.append(out))
    source, other, target = (torch.randint(20, (1, 6)) for _ in range(3))
    with torch.no_grad():
        a, b, c = model(source, target), model(source, target.flip(1)), model(other, target)
    assert torch.equal(memories[0], memories[1]) and not torch.equal(a, b), "what is read does not see who reads"
    assert not torch.allclose(a, c), "and every layer of the decoder looks at it"

    # Flash: all pairs, the same result, no table. It undoes nothing else.
    with torch.no_grad():
        exact = made["dense"](x)
        assert reached(made["flash"], n) == 1 and torch.allclose(made["flash"](x), exact, atol=1e-6)

    # Sparse: fewer pairs, and a border between the others that is exactly 0 in one layer.
    allowed = float(local(WINDOW).mask(n).sum()) / (n * (n + 1) / 2)
    assert reached(made["sparse"], n) == pytest.approx(allowed) and allowed < 0.35
    few = 10
    depth = layers_to_reach_all(local(WINDOW).mask(few))
    assert depth == math.ceil((few - 1) / (WINDOW - 1)) == 3
    assert reached(nn.Sequential(*[made["sparse"]] * (depth - 1)), few) < 1
    assert reached(nn.Sequential(*[made["sparse"]] * depth), few) == 1, "by way of others, depth brings it back"

    # Linear and Mamba: every position still reaches every later one, by way of a state that does not grow.
    for name in ("linear", "Mamba"):
        assert reached(made[name], n) == 1
        with torch.no_grad():
            assert not torch.allclose(made[name](x), exact, atol=0.01), "another function, and other weights"
        assert kept(made[name], 64) == kept(made[name], 128)
    assert kept(layers()["flash"], 128) == 2 * kept(layers()["flash"], 64)

    # And hybrids go back: in every third block the memory grows again.
    hybrid = HybridLM(20, E, 3, H, every=3)
    grows = []
    for block in hybrid.layers:
        grows.append(kept(block.mixer, 128) > kept(block.mixer, 64))
    assert grows == [False, False, True]


# --- how costs grow ------------------------------------------------------------------------------------------------


def operations(layer, n):
    """The multiplications and additions of one forward pass that are products of matrices."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(1, n, E))
    return counter.get_total_flops()


def curve(name, which):
    return next(c for c in measured("evolution")["curves"] if (c["name"], c["pass"]) == (name, which))


@pytest.mark.claim("E7", "holds if")
def test_exact_attention_takes_quadratic_work_and_only_a_stored_table_takes_quadratic_memory(largest):
    """Counted, and measured: the work of both grows with N², the memory of the table alone."""
    made = layers()
    for name in ("dense", "flash"):
        few, many = (operations(made[name], n) for n in (1024, 2048))
        assert 3.5 < many / few < 4
    n = 512
    x = torch.randn(1, n, E, requires_grad=True)
    assert largest(lambda: made["dense"](x).sum().backward()) >= H * n * n
    assert largest(lambda: made["flash"](x).sum().backward()) < n * n
    for which in ("forward", "training"):
        assert curve("dense", which)["time_slope"]["low"] > 1.7 and curve("dense", which)["memory_slope"] > 1.6
        assert curve("flash", which)["time_slope"]["low"] > 1.4 and curve("flash", which)["memory_slope"] < 1.2
    # Global, in the sense that every position reaches every later one, without either: A4.10 and A4.17.


@pytest.mark.claim("A4.10", "holds")
def test_linear_attention_grows_with_n_and_passes_flash_attention_from_some_length_on(largest):
    """Counted: twice the work for twice the length, no table of N x N. Measured: slopes below 1.45, and a crossing."""
    made = layers()
    few, many = (operations(made["linear"], n) for n in (512, 1024))
    assert many == 2 * few
    held = []
    for n in (512, 1024):
        x = torch.randn(1, n, E, requires_grad=True)
        held.append(largest(lambda x=x: made["linear"](x).sum().backward()))
    assert held[1] == 2 * held[0] < 512**2
    for name in ("linear", "gated", "delta"):
        for which in ("forward", "training"):
            case = curve(name, which)
            assert case["time_slope"]["high"] < (1.3 if which == "forward" else 1.45) and case["memory_slope"] < 1.15
            assert case["quicker_in_all_rounds_from"], "from there on quicker than flash in every round"


def test_a_crossing_lies_between_the_lengths_where_the_ratio_passes_1():
    assert crossing([256, 512, 1024], [2.0, 1.0, 0.5]) == 512
    assert crossing([256, 512, 1024], [4.0, 2.0, 0.5]) == pytest.approx(512 * 2**0.5)
    assert crossing([256, 512], [0.9, 0.5]) == 256 and crossing([256, 512], [0.5, 1.5]) is None
    assert crossing_in_all([256, 512, 1024], [[2, 0.9, 0.5], [2, 1.1, 0.5]]) == 1024
    assert crossing_in_all([256, 512], [[0.9, 0.5]]) == 256 and crossing_in_all([256], [[2.0]]) is None


# --- how dense heads spread ----------------------------------------------------------------------------------------


def test_the_entropy_of_rows_that_are_known():
    seen, rest = torch.ones(2, 4, dtype=torch.bool), torch.tensor([False, True, True, True])
    rows = torch.tensor([[[[0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]], [[1.0, 0, 0, 0], [0.4, 0.6, 0, 0]]]])
    found = spread(rows[0][None], seen, rest)
    assert found["of_even"][0][0] == 1 and found["rest_of_even"][0] == [1, 0] and found["rested"][0] == [0.25, 0.7]
    assert found["largest"][0] == [0.25, 0.8]
    keys = [choice("MiniLM", n, False) for n in (16, 64, 256)]
    assert power(keys, keys) == pytest.approx(1) and power(keys, [2.0] * 3) == 0
    assert choice("SmolLM2", 64, False) < math.log(64)


@pytest.mark.claim("A4.19", "holds if")
def test_trained_dense_heads_do_not_spread_evenly_and_a_sparse_mask_makes_them_narrower():
    """MiniLM, run here, beside a twin that has learned nothing; and SmolLM2 from the stored measurement."""
    encoder = minilm()
    twin = copy.deepcopy(encoder.model)
    torch.manual_seed(0)
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    of_even = {}
    for name, model in {"trained": encoder.model, "untrained": twin.eval()}.items():
        rows = []
        for sentence in RELATIONS[:12]:
            ids = torch.tensor([encoder.tokenizer.encode(sentence.text).ids])
            n = ids.shape[1]
            seen = torch.ones(n, n, dtype=torch.bool)
            rows.append(torch.tensor(spread(weights_of(model, ids)[:, 0], seen, seen[0])["of_even"]))
        of_even[name] = torch.stack(rows).mean(0)
    assert of_even["untrained"].min() > 0.99 and of_even["trained"].max() < 0.99
    assert of_even["trained"].mean() < 0.65 and (of_even["trained"] < 0.5).double().mean() > 0.2

    smol = measured("entropy")["SmolLM2"]
    at = {arm: smol["arms"][arm]["2048"] for arm in ("trained", "untrained")}
    assert at["trained"]["of_even"]["high"] < 0.5 < 0.99 < at["untrained"]["of_even"]["low"]
    assert at["trained"]["rest_of_even"]["high"] < 0.5, "nor is it the first token alone that makes them narrow"
    assert (
        smol["arms"]["trained"]["entropy_power"]["high"]
        < 0.5
        < 0.99
        < smol["arms"]["untrained"]["entropy_power"]["low"]
    )
    under = smol["sparse"]
    assert under["entropy"]["difference"]["high"] < -0.5, "under the mask fewer keys share the weight"
    assert under["of_even"]["difference"]["high"] > 0, "not narrower beside an even spread over the keys allowed"
    assert under["on_kept"]["dense"]["low"] > 0.6, "which without it were given most of the weight already"
