"""A user's script on weights and encoders, for type checkers alone: what each call returns, and what it takes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, assert_type

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from nondual.data import ALICE, BANK, shakespeare
from nondual.language_models.mamba import MambaLM
from nondual.pretrained import (
    MINILM,
    PACKAGES,
    FetchError,
    Package,
    SentenceEncoder,
    WeightsMissing,
    fetch,
    from_bert,
    load_mamba,
    load_mamba2,
    minilm,
    read,
    smollm2,
)
from nondual.pretrained.gguf import dequantize, read_gguf
from nondual.pretrained.llama import from_gguf
from nondual.pretrained.mamba import from_mamba


def lines() -> Iterator[str]:
    yield ALICE


def encoder(device: torch.device, state: dict[str, Tensor]) -> None:
    try:
        bert = minilm(device)
    except WeightsMissing as error:
        assert_type(error.filename, Any)
        raise
    assert_type(bert, SentenceEncoder)
    assert_type(bert.encode(["one", "two"]), Tensor)
    assert_type(bert.encode(BANK["river"], batch_size=8), Tensor)
    assert_type(bert.encode(lines()), Tensor)
    assert_type(bert.vectors(["one"]), tuple[Tensor, Tensor])
    assert_type(bert.layers(["one"], batch_size=1), tuple[Tensor, Tensor])
    assert_type(bert.attention("one"), tuple[list[str], Tensor])
    assert_type(bert.tokens("one"), list[str])
    bert.model.load_state_dict(from_bert(state))


def language_model(state: dict[str, Tensor]) -> None:
    model, tokenizer = smollm2("cpu", torch.bfloat16)
    assert_type(model, LlamaForCausalLM)
    assert_type(tokenizer, PreTrainedTokenizerFast)
    assert_type(from_gguf(state, 9, 3), dict[str, Tensor])


def mamba(engine: Literal["auto", "cpu"], state: dict[str, Tensor]) -> None:
    assert_type(load_mamba("folder"), MambaLM)
    assert_type(load_mamba(Path("folder"), dtype=torch.float32, impl=engine), MambaLM)
    assert_type(load_mamba2("folder", impl="chunked"), MambaLM)
    assert_type(from_mamba(state), dict[str, Tensor])


def files(place: os.PathLike[str]) -> None:
    try:
        assert_type(fetch(MINILM, lambda here, whole: print(here, whole)), Path)
    except FetchError as error:
        print(error)
    assert_type(PACKAGES["minilm"], Package)
    assert_type(read(MINILM, "config.json"), bytes)
    assert_type(shakespeare(), dict[str, str])
    for source in (place, "some.gguf", b"GGUF"):
        assert_type(read_gguf(source), tuple[dict[str, Any], dict[str, Tensor]])
    assert_type(dequantize(torch.zeros(34, dtype=torch.uint8), 8, (32,)), Tensor)
