"""What the essays say of a fixed window beside a stream, and of attention that redistributes and does not select."""

import json
import math
from pathlib import Path
from statistics import mean

import pytest
import torch

from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.efficient_attention.mamba import Mamba
from nondual.language_models.gpt import GPT
from nondual.language_models.mamba import MambaLM
from nondual.ops.attention import attention

MEASURED = Path(__file__).parent.parent / "docs/measured"


def stored(name):
    return json.loads((MEASURED / name).read_text(encoding="utf-8"))["figures"]


# --- C5: a window and a stream ---------------------------------------------------------------------------------------


@pytest.mark.claim("C5", "holds if")
def test_what_has_left_every_window_is_gone_for_good():
    """Two layers of a window of 8 reach back 2 (8 - 1) positions; a change before that moves nothing, to the bit."""
    torch.manual_seed(0)
    model = GPT(11, 16, 2, 2, max_len=64, op=FlashAttention(window=8)).eval()
    ids = torch.randint(11, (1, 60))
    clean = model(ids)[0, -1]
    moved = []
    for place in range(60):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 11
        moved.append(not torch.equal(model(changed)[0, -1], clean))
    assert moved == [False] * (60 - 15) + [True] * 15


@pytest.mark.claim("C5", "holds if")
def test_a_cache_of_all_keys_grows_with_the_stream_and_a_state_does_not():
    attends, scans = GPT(11, 16, 1, 2, max_len=512), MambaLM(11, 16, 1, mixer=Mamba)
    with torch.no_grad():
        sizes = {}
        for name, model in (("attention", attends), ("Mamba", scans)):
            cache, sizes[name] = model.new_cache(1, 512), []
            for part in torch.randint(11, (1, 512)).split(128, 1):
                model(part, cache=cache)
                last = cache[-1]
                held = last.length if name == "attention" else last.state.numel() + last.conv.numel()
                sizes[name].append(held)
    assert sizes["attention"] == [128, 256, 384, 512] and len(set(sizes["Mamba"])) == 1


@pytest.mark.claim("C5", "holds if")
def test_on_a_stream_a_window_alone_predicts_badly_and_the_first_tokens_mend_most_of_it_in_constant_memory():
    stream = stored("sparse_patterns.json")["stream"]
    change, arms, blocks = stream["differences, second half"], stream["arms"], stream["length"] // stream["block"]
    assert change["window less full"]["interval"][0] > 0.2 and change["sinks less window"]["interval"][1] < -0.2
    assert change["window less afresh"]["interval"][0] > 0.2  # so it is not the lost context
    behind = change["sinks in place less full"]  # with positions counted in what is kept
    assert 0 < behind["interval"][0] and behind["interval"][1] < 0.3
    assert -0.2 < change["full less afresh"]["interval"][0] and change["full less afresh"]["interval"][1] < 0
    for name in ("sinks", "sinks in place"):
        for window, sinks in zip(arms["window"]["nats by bin"], arms[name]["nats by bin"], strict=True):
            assert all(mean(sinks[i : i + 8]) < mean(window[i : i + 8]) for i in range(0, len(window), 8))
    kept = {name: arms[name]["bytes by block"] for name in ("window", "sinks", "sinks in place", "full")}
    assert all(len(set(kept[name])) == 1 for name in kept if name != "full")
    assert kept["full"] == [kept["full"][0] * (i + 1) for i in range(blocks)]
    assert kept["full"][-1] > 30 * kept["sinks"][-1]


@pytest.mark.claim("C5", "holds if")
def test_a_state_reads_on_far_past_its_training_as_well_as_at_its_beginning():
    for row in stored("sparse_patterns.json")["stream"]["mamba"].values():
        assert len(row["bytes"]) == 1 and abs(row["carried less anew"]) < 0.005
        bits, half = row["carried bits"], len(row["carried bits"]) // 2
        assert len(bits) == 24 and abs(mean(bits[half:]) - mean(bits[:half])) < 0.01


# --- D4: redistributed and not selected ------------------------------------------------------------------------------


@pytest.mark.claim("D4", "holds if")
def test_at_a_fixed_margin_the_share_of_the_irrelevant_grows_and_holding_it_takes_a_margin_of_log_n():
    for margin in (2.0, 5.0):
        shares = []
        for n in (64, 1024, 16_384):
            weights = torch.cat([torch.tensor([margin]), torch.zeros(n - 1)]).double().softmax(0)
            assert (weights > 0).all()  # nothing is left out
            shares.append(weights[1:].sum().item())
            assert shares[-1] == pytest.approx(1 / (1 + math.exp(margin) / (n - 1)))
        assert shares == sorted(shares)
    for n in (64, 1024, 16_384):
        weights = torch.cat([torch.tensor([math.log(9 * (n - 1))]), torch.zeros(n - 1)]).double().softmax(0)
        assert weights[1:].sum().item() == pytest.approx(0.1)


@pytest.mark.claim("D4", "holds if")
def test_what_the_irrelevant_add_averages_out_but_the_relevant_shrinks_faster():
    """With independent values the noise has the share over root N, the signal what is left: their ratio falls."""
    torch.manual_seed(0)
    margin, d, ratios = 4.0, 64, []
    for n in (64, 1024, 16_384):
        scores = torch.cat([torch.tensor([margin]), torch.zeros(n - 1)]).double()
        q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        values = torch.randn(n, d, dtype=torch.float64)
        values[0] = values[0] / values[0].norm() * d**0.5
        out = attention(q, scores.view(1, 1, n, 1), values[None, None], scale=1.0)[0, 0, 0]
        signal = scores.softmax(0)[0].item()
        noise = ((out - signal * values[0]).norm() / d**0.5).item()
        share = 1 - signal
        assert noise == pytest.approx(share / (n - 1) ** 0.5, rel=0.35)
        ratios.append(signal / noise)
        assert ratios[-1] == pytest.approx(math.exp(margin) / (n - 1) ** 0.5, rel=0.35)
    assert ratios == sorted(ratios, reverse=True)


@pytest.mark.claim("D4", "holds if")
def test_trained_heads_spread_their_weight_and_let_in_more_of_the_rest_in_longer_texts_though_less_than_the_law():
    for model, lengths in {"SmolLM2": (64, 2048), "MiniLM": (16, 256)}.items():
        for part in ("whole", "rest"):
            rows = stored("noise.json")[model][part]
            short, long = rows[0], rows[-1]
            assert (short["n"], long["n"]) == lengths
            for name in ("outside", "added"):
                assert [row[name] for row in rows] == sorted(row[name] for row in rows)
                assert all(b[name] > a[name] for a, b in zip(short["each"], long["each"]))  # in each of four texts
            assert all(row["law"] > row["outside"] + 0.05 for row in rows[1:])
            assert long["nearly all on one key"] < 0.07 and long["heads mostly so"] < 0.02
