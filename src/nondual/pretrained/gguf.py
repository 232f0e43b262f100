"""GGUF, the file format of llama.cpp: named values, then tensors, most of them quantized in blocks of 32 weights.

    b"GGUF" | version | T | V | V values: name, kind, value | T tensors: name, shape, kind, offset | padding | data

Source: the GGUF specification, version 3 (ggml, docs/gguf.md); the blocks Q4_1 and Q8_0: ggml, src/ggml-common.h. All
numbers are little-endian. Only what our files hold is read; anything else is refused by name.
"""

import math
import struct

import torch
from jaxtyping import Float
from torch import Tensor

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
BLOCK = 32  # weights that share a scale


def read_gguf(data: bytes) -> tuple[dict, dict[str, Float[Tensor, "..."]]]:
    """The named values of a file, and its tensors by name, in float32 and with their rows first, as torch has them.

    Raises:
        ValueError: it is no GGUF file of version 2 or 3, or holds a kind of value or tensor that is not read here.
    """
    magic, version, n_tensors, n_values = struct.unpack_from("<4sIQQ", data) if len(data) >= 24 else (data[:4], 0, 0, 0)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"data must be a GGUF file of version 2 or 3, got one that begins {data[:8]!r}")
    cursor = _Cursor(data, 24)
    values = {cursor.string(): cursor.value(cursor.number("I")) for _ in range(n_values)}
    tensors = [
        (cursor.string(), cursor.numbers("Q", cursor.number("I")), cursor.number("I"), cursor.number("Q"))
        for _ in range(n_tensors)
    ]
    alignment = values.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return values, {
        name: dequantize(raw[start + offset :], kind, shape[::-1], name) for name, shape, kind, offset in tensors
    }


def dequantize(raw: Tensor, kind: int, shape: tuple[int, ...], name: str = "tensor") -> Float[Tensor, "..."]:
    """Weights out of the bytes that begin `raw`, in float32.

        F32   0   4 bytes each
        Q4_1  3   a block: scale d and least value m in float16, 32 numbers q of 4 bits:   weight = d · q + m
        Q8_0  8   a block: scale d in float16, 32 numbers q of 8 bits with sign:           weight = d · q

    The 16 bytes of a Q4_1 block hold weights 0 to 15 in their low halves and 16 to 31 in their high halves.
    """
    n = math.prod(shape)
    size = {0: 4 * n, 3: n // BLOCK * 20, 8: n // BLOCK * 34}.get(kind)
    if size is None:
        raise ValueError(f"{name} must be of kind 0 (F32), 3 (Q4_1) or 8 (Q8_0), got {kind}")
    if len(raw) < size:
        raise ValueError(f"{name} must have {size} bytes, got {len(raw)}: the file is truncated")
    raw = raw[:size]
    if kind == 0:
        return raw.clone().view(torch.float32).view(shape)
    blocks = raw.view(n // BLOCK, -1)
    if kind == 8:
        d, q = blocks[:, :2].clone().view(torch.float16), blocks[:, 2:].view(torch.int8)
        return (d.float() * q).view(shape)
    d, m = blocks[:, :4].clone().view(torch.float16).float().split(1, dim=1)
    q = torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], dim=1)
    return torch.mul(d, q).add_(m).view(shape)


class _Cursor:
    """A place in the file that moves on as it is read."""

    def __init__(self, data: bytes, at: int):
        self.data, self.at = data, at

    def numbers(self, letter: str, count: int) -> tuple:
        layout = f"<{count}{letter}"
        try:
            found = struct.unpack_from(layout, self.data, self.at)
        except struct.error:
            raise ValueError(f"the file is truncated: it ends at byte {len(self.data)}, before its tensors") from None
        self.at += struct.calcsize(layout)
        return found

    def number(self, letter: str):
        return self.numbers(letter, 1)[0]

    def string(self) -> str:
        return self.numbers("s", self.number("Q"))[0].decode()

    def value(self, kind: int):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind in NUMBERS:  # all at once
                return list(self.numbers(NUMBERS[kind], count))
            return [self.value(kind) for _ in range(count)]
        if kind not in NUMBERS:
            raise ValueError(f"a value must be of kind 0 to 12, got {kind}")
        return self.number(NUMBERS[kind])
