"""The benchmarks gpt_family and decode_smollm2: they run, every k predicts the same tokens, what counts as what."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import decode_smollm2, gpt_family
from nondual.language_models.gpt import GPT
from nondual.language_models.mamba import MambaLM


@pytest.fixture
def threads():
    """As many threads after the test as before it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Letters:
    """A tokenizer that takes each character for a token, below 97."""

    eos_token_id = 0

    def __call__(self, text, return_tensors=None):
        return type("Tokens", (), {"input_ids": torch.tensor([[ord(c) % 97 for c in text]])})

    def decode(self, ids):
        return "".join(chr(i) for i in ids.tolist())


def small():
    torch.manual_seed(0)
    return GPT(97, 8, 1, 2, max_len=512).eval(), Letters()


def test_the_parts_run_and_nothing_is_written(threads, monkeypatch, capsys):
    monkeypatch.setattr(gpt_family, "our_smollm2", small)
    monkeypatch.setattr(gpt_family, "write", None)  # to call it would raise
    monkeypatch.setattr(gpt_family, "keep", None)
    gpt_family.main(["--tiny"])
    said = capsys.readouterr().out
    assert all(part in said for part in ("window", "spelled_back", "cost", "whole_over_cached"))


def test_each_k_predicts_the_same_tokens_from_the_k_before_them(monkeypatch):
    model, tokenizer = small()
    monkeypatch.setattr(gpt_family, "our_smollm2", lambda: (model, tokenizer))
    found = gpt_family.window(True)
    right = []
    for text in (gpt_family.ALICE, gpt_family.shakespeare()["macbeth"][1000:], gpt_family.PROSE.replace("\n", " ")):
        ids = tokenizer(text).input_ids
        for i in range(5, 13):  # after the longest k, 4
            scores = model(ids[:, i - 2 : i])[0, -1].log_softmax(-1)
            right.append(-scores[ids[0, i]].item())
    assert found["tokens"] == len(right) == 24
    assert found["nats"]["2"][0] == pytest.approx(sum(right) / 24, abs=2e-4)


def test_what_a_cache_holds_in_bytes():
    gpt, mamba, ids = GPT(31, 8, 3, 2, max_len=20), MambaLM(31, 8, 3), torch.zeros(1, 7, dtype=torch.long)
    caches = gpt.new_cache(1, 20), mamba.new_cache(1)
    with torch.no_grad():
        gpt(ids, cache=caches[0]), mamba(ids, cache=caches[1])
    assert gpt_family.remembered(caches[0], 7) == 2 * 3 * 7 * 8 * 4  # keys and values, layers, positions, E, float32
    assert gpt_family.remembered(caches[1], 7) == gpt_family.remembered(caches[1], 19) > 0


def test_the_products_of_a_step_are_with_every_matrix_once():
    from transformers import GPT2Config, GPT2LMHeadModel

    from nondual.pretrained import from_gpt2

    config = GPT2Config(vocab_size=31, n_positions=64, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    theirs = GPT2LMHeadModel(config).eval()
    ids = torch.randint(31, (1, 5))
    runs = decode_smollm2.steps(theirs, from_gpt2(theirs), ids)
    assert list(runs) == ["ours", "transformers", "products alone"]
    for run in runs.values():
        run()
    found = decode_smollm2.ways(theirs, from_gpt2(theirs), ids, 4)
    assert {tuple(run().shape) for run in found.values()} == {(1, 9)}
