"""benchmarks/long_prompts.py: the attention of the last position, prompts by hand, steps against the whole."""

import re
import sys
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import long_prompts
from benchmarks.long_prompts import END, INSTRUCTION, QUESTION, TINY, Bench, by_steps, last_weights, measured, prompt
from nondual.analysis import weights_of
from nondual.language_models.causal import CausalLM
from nondual.relative_positions import Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import FeedForward, TransformerLayer


class Letters:
    """A tokenizer: a token for each byte."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(text.encode())}


class Words:
    """A tokenizer: a token for each word or mark, with the spaces before it; numbers by a checksum."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [zlib.crc32(word.encode()) % 257 for word in re.findall(r"\s*(?:\w+|[^\w\s])|\s+", text)]}


@pytest.fixture(scope="module")
def model():
    """Two layers of grouped heads with rotary positions, in float64."""
    torch.manual_seed(0)

    def layer(_):
        mixer = MultiHeadAttention(24, 4, n_kv_heads=2, causal=True, positions=Rotary(6))
        return TransformerLayer(mixer, FeedForward(24, 48), 24, norm_first=True)

    return CausalLM(257, 24, 2, layer=layer, norm=nn.LayerNorm).double().eval().requires_grad_(False)


def test_the_attention_of_the_last_position_is_the_last_row_of_the_weights(model):
    ids = torch.randint(257, (3, 13))
    with last_weights(model) as found:
        usual = model(ids)
    torch.testing.assert_close(torch.stack(found), weights_of(model, ids)[:, :, :, -1])
    found.clear()
    assert torch.equal(model(ids), usual) and not found  # the layers have their own operation again


def test_where_the_instruction_stands(model):
    bench = Bench(model, Letters(), TINY)
    text = INSTRUCTION.format("moon")
    for place in ("before", "after"):
        ids, where = prompt(bench, "moon", list(b"some filler"), place)
        whole = bytes(ids).decode()
        assert bytes(ids[where]).decode() == text and whole.count(text) == 1
        assert (whole.index(text) < whole.index("some filler")) == (place == "before")
        assert whole.endswith(f"{QUESTION}<|im_end|>\n{END}")


def test_rows_of_different_lengths_are_read_as_each_alone_and_step_by_step(model):
    bench = Bench(model, Letters(), TINY)
    rows = [[5, 7, 11, 2], [3, 1], [200, 100, 50, 25, 12, 6, 3]]
    together = bench.last(rows)
    for row, logs in zip(rows, together):
        torch.testing.assert_close(logs[None], bench.last([row]))
        torch.testing.assert_close(logs[None], by_steps(model, torch.tensor([row])))


@pytest.mark.parametrize("kind", long_prompts.FILLERS)
def test_filler_has_the_length_asked_for_and_differs_from_row_to_row(kind, model):
    bench = Bench(model, Letters(), TINY)
    assert [len(bench.filler(kind, count, 0)) for count in (0, 1, 37)] == [0, 1, 37]
    assert bench.filler(kind, 37, 0) != bench.filler(kind, 37, 1)


def test_the_whole_runs_small(model):
    found = measured(Bench(model, Words(), TINY), tiny=True)
    assert set(found) == {"form", "repetition", "instruction", "generating"}
    assert set(found["instruction"]) == set(long_prompts.FILLERS)
    assert (
        found["instruction"]["play"]["before"]["length"][1] - found["instruction"]["play"]["before"]["length"][0] == 32
    )
    for row in found["generating"]["all"]["rows"]:
        assert row["greatest difference"] < 1e-9 and row["same choice"]
    of_form = found["form"]["all"]
    assert of_form["talk"]["tokens"] > of_form["sentences"]["tokens"] > of_form["list"]["tokens"]
    longer = [of_form[name]["tokens"] for name in ("talk", "sentences, then talk", "talk, then sentences")]
    assert max(longer) - min(longer) < 15
