"""A Llama from a GGUF file: its weights against another reader of the same file, and its tokenizer."""

import pytest
import torch
from transformers.integrations.gguf import convert_gguf_tokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from nondual.data import ALICE
from nondual.pretrained import SMOLLM2

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


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
