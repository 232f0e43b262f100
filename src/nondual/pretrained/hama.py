"""hama: a real network that spells words aloud, by additive attention over their letters.

Source: the package hama 1.7.0 (Seongmin Park, https://github.com/hamanlp/hama), its model from spelling to phonemes. A
bidirectional GRU of two layers reads the letters and a GRU of two layers writes the phonemes. Between them stand
Bahdanau's scores (1409.0473, section A.1.2) with Chorowski's location term (1506.07503, equations 8 and 9) and a pull
that is fixed, not learned. 2.1 million parameters, 1.6 million of them for letters and signs of many scripts; 0.5
million serve the Latin letters. Licence: Apache-2.0.

Its mathematics, with the names of its parameters. LN is a layer norm with `.weight` and `.bias`, eps 1e-5; the GRUs are
`nondual.recurrent.GRU`, as torch's. M letters, N phonemes; j and k count letters from 0.

    reading, once a word
      e_j = embedding.weight[letter_j]                                                          (M, 80)
      d_j[c] = sum over t = 0..4 of frontend.0.weight[c, 0, t] e_(j+t-2)[c], e = 0 outside       (M, 80)
      l_j = LN(e_j + frontend.1.weight[:, :, 0] d_j)                       frontend_norm        (M, 80)
      g   = GRU(l): two layers, each both ways                             encoder              (M, 192)
      h_j = LN(g_j + encoder_skip.weight l_j)                              encoder_norm         (M, 192)
      s1  = tanh(bridge.weight [forward; backward] + bridge.bias), from the last states of the encoder's layer 0,
      s2  = the same from those of its layer 1                                                  (96,), (96,)
      a_j = 1 / M                                                                               (M,)
    writing, once a phoneme; before the first, the phoneme is <sos>
      y   = decoder_embedding.weight[phoneme]                                                   (80,)
      s1  = GRU(y, s1), then s2 = GRU(s1, s2)                              decoder, layers 0, 1  (96,), (96,)
      s   = LN(s2 + decoder_skip.weight y)                                 decoder_norm         (96,)
      f_j[c] = sum over t = 0..10 of attention.filters.weight[c, 0, t] a_(j+t-5), a = 0 outside  (M, 16)
      u_j = v · tanh(W_s s + W_h h_j + W_f f_j)                            attention            (M,)
      p_j = -0.1 |j - Σ_k k a_k|                                           the fixed pull       (M,)
      a   = softmax(u + p)                                                 shown to the reader  (M,)
      c   = LN(Σ_j a_j h_j)                                                context_norm         (192,)
      x   = LN(tanh(fusion.weight [s; c] + fusion.bias))                   fusion_norm          (96,)
      scores = output.1.weight (output.0.weight x + output.0.bias)                              (189,)
    The next phoneme is the one with the greatest score; <eos> ends the word, and so does the 32nd step.

W_s, W_h, W_f and v are attention.w_s.weight (96, 96), attention.w_h.weight (96, 192), attention.w_f.weight (96, 16) and
attention.v (96,). A GRU's layer k has weight_ih_lk, weight_hh_lk, bias_ih_lk and bias_hh_lk, with _reverse for the way
back, rows in the order r, z, n:

      r = σ(W_r x + b_r + U_r h + b'_r)    z likewise    n = tanh(W_n x + b_n + r ⊙ (U_n h + b'_n))
      h = (1 - z) ⊙ n + z ⊙ h

docs/assets/models/spell.bin holds this network for the Latin letters alone, under these names. Its layout is that of a
safetensors file, its numbers are the package's own (float16), and its metadata has `letters`, one string whose
character i is row i of embedding.weight, and `phonemes`, a JSON list whose entry i is row i of decoder_embedding.weight
and of output.1.weight. benchmarks/spellers.py writes it.

The package keeps its weights as float16 in a format of its own, read here in a few lines; its engine computes in part
with float16 numbers, we with float32: the encoder's states differ by at most 0.004. On 1,000 words of all lengths the
two write the same phonemes for all but two, where two phonemes are nearly tied (tests/pretrained/test_hama.py).

The package's other model, from phonemes to spelling, is in `nondual.pretrained.hama_p2g`.

torch is imported by the function: `python -m nondual.pretrained` reads the package's hashes here without it.
"""

import json
import struct
from typing import TYPE_CHECKING

from nondual.store import Package, read

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nondual.pretrained.hama_network import AttentiveSpeller

HAMA = Package(
    name="hama",
    version="1.7.0",
    sha256="be48d6379d288fc588ff9a5f609462b2fb81287dd84afaa2dfb1d283cb280c4d",
    size=22_613_600,
    root="hama/assets/",
    files={
        "encoder.hama": "ae527c1aa758cd1b038c63d4d768d05313adce7c50706c5366600ab4f4ef8d75",
        "decoder_step.hama": "9ac34717f88b7bed2ef84a779b6fda1ec24b0b88d37bb813631493116581369d",
        "g2p_vocab.json": "520d19e4e6ae58658eed53594e0feab8ea8e1b4b04a7746e25e50c16c29b91bf",
        "p2g.hama": "b0e129709307f0f7edd4ce0f7a9e22c54026bfc9393b2c33aa7c0cac82dd58fb",
        "p2g_vocab.json": "56756bb2fa0ab1b45f30ba03fe5c059353653a4c95e2a501d9d4614ffd5d7b9b",
    },
)

# Our names of the parameters, and theirs. Matrices that the package keeps transposed have numbers for names.
NAMES = {
    "embedding.weight": "model.encoder_embedding.weight",
    "frontend.0.weight": "model.frontend.depthwise.weight",
    "frontend.1.weight": "model.frontend.pointwise.weight",
    "frontend_norm.weight": "model.frontend.norm.weight",
    "frontend_norm.bias": "model.frontend.norm.bias",
    "encoder_norm.weight": "model.encoder_out_norm.weight",
    "encoder_norm.bias": "model.encoder_out_norm.bias",
    "bridge.weight": "model.bridge.weight",
    "bridge.bias": "model.bridge.bias",
    "decoder_embedding.weight": "model.decoder_embedding.weight",
    "decoder_norm.weight": "model.decoder_state_norm.weight",
    "decoder_norm.bias": "model.decoder_state_norm.bias",
    "attention.filters.weight": "model.attention.location_conv.weight",
    "context_norm.weight": "model.context_norm.weight",
    "context_norm.bias": "model.context_norm.bias",
    "fusion.weight": "model.context_proj.weight",
    "fusion.bias": "model.context_proj.bias",
    "fusion_norm.weight": "model.fusion_norm.weight",
    "fusion_norm.bias": "model.fusion_norm.bias",
    "output.0.weight": "model.output_in_proj.weight",
    "output.0.bias": "model.output_in_proj.bias",
}
TRANSPOSED = {
    "encoder_skip.weight": "onnx::MatMul_532",
    "attention.w_h.weight": "onnx::MatMul_539",
    "decoder_skip.weight": "onnx::MatMul_302",
    "attention.w_s.weight": "onnx::MatMul_303",
    "attention.w_f.weight": "onnx::MatMul_304",
    "output.1.weight": "onnx::MatMul_306",
}
# W, U and both biases of each GRU layer, each with one entry a direction.
GRUS = {
    ("encoder", 0): ("onnx::GRU_484", "onnx::GRU_485", "onnx::GRU_483"),
    ("encoder", 1): ("onnx::GRU_527", "onnx::GRU_528", "onnx::GRU_526"),
    ("decoder", 0): ("onnx::GRU_279", "onnx::GRU_280", "onnx::GRU_281"),
    ("decoder", 1): ("onnx::GRU_299", "onnx::GRU_300", "onnx::GRU_301"),
}


def hama(device: "torch.device | str | None" = None) -> "AttentiveSpeller":
    """The speller of hama 1.7.0, in float32: `hama().spell("knight")` gives phonemes and the weights of each.

    Args:
        device: where it runs; the CPU where left out.

    Raises:
        WeightsMissing: the weights were not fetched yet; the message says how.
        RuntimeError: a file is not the one that was pinned.
    """
    from nondual.pretrained.hama_network import AttentiveSpeller, HamaNetwork

    vocabulary = json.loads(read(HAMA, "g2p_vocab.json"))
    model = HamaNetwork(len(vocabulary["encoder"]), len(vocabulary["decoder"]))
    stored = hama_tensors(read(HAMA, "encoder.hama")) | hama_tensors(read(HAMA, "decoder_step.hama"))
    model.load_state_dict(from_hama(stored))
    letters = {letter: number for number, letter in enumerate(vocabulary["encoder"])}
    return AttentiveSpeller(model.to(device).eval(), letters, vocabulary["decoder"])


def hama_tensors(file: bytes) -> "dict[str, Tensor]":
    """The tensors of a .hama file by name, in float16.

    The layout, with numbers of the least significant byte first: "HAMAPK", two bytes for version and kind, a count
    (uint32), and for each tensor the length of its name (uint16), the name, a byte for its dtype (1 is float16), a byte
    for its rank, its sizes (uint32 each), where it begins and its length in bytes (uint64 each). After these, at the
    next multiple of 16, come the numbers.

    Raises:
        ValueError: it is not such a file.
    """
    import torch

    if file[:6] != b"HAMAPK":
        raise ValueError(f"file must begin with b'HAMAPK', got {file[:6]!r}")
    at, table = 12, []
    for _ in range(struct.unpack_from("<I", file, 8)[0]):
        length = struct.unpack_from("<H", file, at)[0]
        name = file[at + 2 : at + 2 + length].decode()
        at += 2 + length
        dtype, rank = file[at], file[at + 1]
        if dtype != 1:
            raise ValueError(f"tensor {name} must have the dtype float16, code 1, got code {dtype}")
        shape = struct.unpack_from(f"<{rank}I", file, at + 2)
        begins, size = struct.unpack_from("<QQ", file, at + 2 + 4 * rank)
        at += 18 + 4 * rank
        table.append((name, shape, begins, size))
    data = bytearray(file[-(-at // 16) * 16 :])
    return {
        name: torch.frombuffer(data, dtype=torch.float16, count=size // 2, offset=begins).reshape(shape)
        for name, shape, begins, size in table
    }


def from_hama(stored: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """The package's tensors under our names: what `HamaNetwork.load_state_dict` takes."""
    import torch

    state = {ours: stored[theirs] for ours, theirs in NAMES.items()}
    state |= {ours: stored[theirs].T.contiguous() for ours, theirs in TRANSPOSED.items()}
    state["attention.v"] = stored["onnx::MatMul_305"][:, 0].contiguous()

    def ordered(rows: "Tensor") -> "Tensor":
        z, r, n = rows.chunk(3)  # ONNX's order of the gates; torch's is r, z, n
        return torch.cat([r, z, n])

    for (network, layer), names in GRUS.items():
        for way, (w, u, biases) in zip(("", "_reverse"), zip(*(stored[name] for name in names))):
            b_input, b_state = biases.chunk(2)
            end = f"l{layer}{way}"
            state[f"{network}.weight_ih_{end}"], state[f"{network}.weight_hh_{end}"] = ordered(w), ordered(u)
            state[f"{network}.bias_ih_{end}"], state[f"{network}.bias_hh_{end}"] = ordered(b_input), ordered(b_state)
    return state
