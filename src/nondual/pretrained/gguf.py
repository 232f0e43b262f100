"""GGUF, the file format of llama.cpp: named values, then tensors, most of them quantized in blocks of 32 weights.

    b"GGUF" | version | T | V | V values: name, kind, value | T tensors: name, shape, kind, offset | padding | data

Source: the GGUF specification, version 3 (ggml, docs/gguf.md); the blocks Q4_1 and Q8_0: ggml, src/ggml-common.h. All
numbers are little-endian. Only what our files hold is read; anything else is refused by name. A file may be cut, odd or
hostile: every count, length and offset is compared with the file's size before anything of that size is made.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
DEPTH = 4  # of arrays within arrays; the files of llama.cpp have none
DIMENSIONS = 4  # of a tensor, at most (GGML_MAX_DIMS)
LONGEST = 2**31  # of one dimension: below it, no product of four overflows torch's sizes unnoticed by our checks
BLOCK = 32  # weights that share a scale


def read_gguf(
    source: bytes | str | os.PathLike[str], *, name: str | None = None
) -> tuple[dict[str, Any], dict[str, Float[Tensor, "..."]]]:
    """The named values of a file, and its tensors by name, in float32 and with their rows first, as torch has them.

    Args:
        source: the path of a file, or its bytes.
        name: what errors call the file; its path, or "data" for bytes, where left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no GGUF file of version 2 or 3, holds a kind of value or tensor that is not read here, or is
            cut or damaged. The message begins with the file's name.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), name or "data"
    else:
        data, name = Path(source).read_bytes(), name or os.fspath(source)
    try:
        return _read(data)
    except ValueError as why:
        raise ValueError(f"{name}: {why}") from None


def _read(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    magic, version, n_tensors, n_values = struct.unpack_from("<4sIQQ", data) if len(data) >= 24 else (data[:4], 0, 0, 0)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"must be a GGUF file of version 2 or 3, got one that begins {data[:8]!r}")
    cursor = _Cursor(data, 24)
    values: dict[str, Any] = {}
    for _ in range(n_values):
        key = cursor.string()
        if key in values:
            raise ValueError(f"there are two values named {key!r:.80}")
        values[key] = cursor.value(cursor.number("I"))
    tensors: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(n_tensors):
        key = cursor.string()
        if key in tensors:
            raise ValueError(f"there are two tensors named {key!r:.80}")
        dimensions = cursor.number("I")
        if dimensions > DIMENSIONS:
            raise ValueError(f"{key!r:.80} must have at most {DIMENSIONS} dimensions, got {dimensions}")
        shape = cursor.numbers("Q", dimensions)[::-1]  # the file has the fastest dimension first
        tensors[key] = cursor.number("I"), shape, cursor.number("Q")
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of 2, got {alignment!r:.80}")
    start = -(-cursor.at // alignment) * alignment
    places = _places(tensors, start, alignment, len(data))
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return values, {
        key: dequantize(raw[first:end], tensors[key][0], tensors[key][1], key) for key, (first, end) in places.items()
    }


def _places(
    tensors: dict[str, tuple[int, tuple[int, ...], int]], start: int, alignment: int, size: int
) -> dict[str, tuple[int, int]]:
    """The first byte of every tensor, and the one behind its last: within the file, and no two at the same place."""
    places = {}
    for key, (kind, shape, offset) in tensors.items():
        if offset % alignment:
            raise ValueError(f"{key!r:.80} must begin at a multiple of {alignment} bytes, got offset {offset}")
        first = start + offset
        end = first + _size(kind, shape, f"{key!r:.80}")
        if end > size:
            raise ValueError(f"the file is truncated: it has {size} bytes, and {key!r:.80} ends at byte {end}")
        places[key] = first, end
    last, before = 0, None
    for key in sorted(places, key=places.__getitem__):
        first, end = places[key]
        if first < last:
            raise ValueError(f"{before!r:.80} and {key!r:.80} overlap at byte {first}")
        if end > first:
            last, before = end, key
    return places


def dequantize(raw: Tensor, kind: int, shape: tuple[int, ...], name: str = "tensor") -> Float[Tensor, "..."]:
    """Weights out of the bytes that begin `raw`, in float32.

        F32   0   4 bytes each
        Q4_1  3   a block: scale d and least value m in float16, 32 numbers q of 4 bits:   weight = d · q + m
        Q8_0  8   a block: scale d in float16, 32 numbers q of 8 bits with sign:           weight = d · q

    The 16 bytes of a Q4_1 block hold weights 0 to 15 in their low halves and 16 to 31 in their high halves.

    Args:
        raw: bytes, uint8 (size,); more than are needed may follow.
        kind: the number of one of the three kinds above.
        shape: of the weights; in Q4_1 and Q8_0 the last dimension is a multiple of 32.
        name: what errors call the tensor.

    Raises:
        ValueError: another kind, a shape that does not fit it, or too few bytes.
    """
    size = _size(kind, shape, name)
    if len(raw) < size:
        raise ValueError(f"{name} must have {size} bytes, got {len(raw)}: the file is truncated")
    raw = raw[:size]
    if kind == 0:
        return raw.clone().view(torch.float32).view(shape)
    blocks = raw.view(-1, 20 if kind == 3 else 34)
    if kind == 8:
        d, q = blocks[:, :2].clone().view(torch.float16), blocks[:, 2:].view(torch.int8)
        return (d.float() * q).view(shape)
    d, m = blocks[:, :4].clone().view(torch.float16).float().split(1, dim=1)
    q = torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], dim=1)
    return torch.mul(d, q).add_(m).view(shape)


def _size(kind: int, shape: tuple[int, ...], name: str) -> int:
    """How many bytes the weights of a tensor take.

    Raises:
        ValueError: a kind that is not read here, or a shape that does not fit it.
    """
    if kind not in (0, 3, 8):
        raise ValueError(f"{name} must be of kind 0 (F32), 3 (Q4_1) or 8 (Q8_0), got {kind}")
    if not all(0 < n < LONGEST for n in shape):
        raise ValueError(f"{name} must have dimensions from 1 to {LONGEST - 1}, got {tuple(shape)}")
    if kind == 0:
        return 4 * math.prod(shape)
    if not shape or shape[-1] % BLOCK:
        raise ValueError(f"{name} must have rows of a multiple of {BLOCK} weights, got shape {tuple(shape)}")
    return math.prod(shape) // BLOCK * (20 if kind == 3 else 34)


class _Cursor:
    """A place in the file that moves on as it is read."""

    def __init__(self, data: bytes, at: int):
        self.data, self.at = data, at

    def numbers(self, letter: str, count: int) -> tuple:
        end = self.at + count * struct.calcsize(f"<{letter}")
        if end > len(self.data):
            raise ValueError(f"the file is truncated: it ends at byte {len(self.data)}, before its tensors")
        found = struct.unpack_from(f"<{count}{letter}", self.data, self.at)
        self.at = end
        return found

    def number(self, letter: str) -> Any:
        return self.numbers(letter, 1)[0]

    def string(self) -> str:
        at, text = self.at, self.numbers("s", self.number("Q"))[0]
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise ValueError(f"the string at byte {at} must be UTF-8, got {text[:20]!r}") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind in NUMBERS:  # all at once
                return list(self.numbers(NUMBERS[kind], count))
            if kind not in (STRING, ARRAY):
                raise ValueError(f"the values of an array must be of kind 0 to 12, got {kind}")
            if depth == DEPTH:
                raise ValueError(f"arrays must be nested at most {DEPTH} deep, got more at byte {self.at}")
            return [self.value(kind, depth + 1) for _ in range(count)]
        if kind not in NUMBERS:
            raise ValueError(f"a value must be of kind 0 to 12, got {kind}")
        return self.number(NUMBERS[kind])
