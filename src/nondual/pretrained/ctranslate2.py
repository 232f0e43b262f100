"""model.bin, the file format of CTranslate2: tensors by name, one after the other, uncompressed.

    6 | name of the kind of model | its revision | T | T tensors: name, rank, shape, kind, size, data | A | A aliases

Source: CTranslate2, python/ctranslate2/specs/model_spec.py and src/models/model.cc, binary version 6. All numbers are
little-endian; a string is its length (2 bytes), its bytes and a 0. An alias is a second name of a tensor. Only what our
files hold is read; anything else is refused by name. A file may be cut, odd or hostile: every length is compared with
the file's size before anything of that size is made.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

VERSION = 6
DIMENSIONS = 8  # of a tensor, at most; our files have three
KINDS = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16, 5: torch.bfloat16}


def read_ctranslate2(
    source: bytes | str | os.PathLike[str], *, name: str | None = None
) -> tuple[str, dict[str, Shaped[Tensor, "..."]]]:
    """The kind of model that a file holds, such as "WhisperSpec", and its tensors by name, each in its own dtype.

    Args:
        source: the path of a file, or its bytes.
        name: what errors call the file; its path, or "data" for bytes, where left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no CTranslate2 file of binary version 6, holds a kind of tensor that is not read here, or is
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


def _read(data: bytes) -> tuple[str, dict[str, Tensor]]:
    cursor = _Cursor(data)
    version = cursor.number("I")
    if version != VERSION:
        raise ValueError(f"must be a CTranslate2 file of binary version {VERSION}, got one that begins {data[:8]!r}")
    kind, _, count = cursor.string(), cursor.number("I"), cursor.number("I")
    tensors: dict[str, Tensor] = {}
    for _ in range(count):
        key = cursor.string()
        if key in tensors:
            raise ValueError(f"there are two tensors named {key!r:.80}")
        tensors[key] = cursor.tensor(key)
    for _ in range(cursor.number("I")):
        alias, key = cursor.string(), cursor.string()
        if key not in tensors or alias in tensors:
            raise ValueError(f"{alias!r:.80} must be a new name of a tensor that is there, got one of {key!r:.80}")
        tensors[alias] = tensors[key]
    if cursor.at != len(data):
        raise ValueError(f"there are {len(data) - cursor.at} bytes after the last alias")
    return kind, tensors


class _Cursor:
    """A place in the file that moves on as it is read."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def bytes(self, size: int) -> bytes:
        at, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError(
                f"the file is truncated: it has {len(self.data)} bytes, and what begins at byte {at} ends at {self.at}"
            )
        return self.data[at : self.at]

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.bytes(struct.calcsize(f"<{letter}")))[0]

    def string(self) -> str:
        at, text = self.at, self.bytes(self.number("H"))
        if not text.endswith(b"\0"):
            raise ValueError(f"the string at byte {at} must end with a 0, got {text[-20:]!r}")
        try:
            return text[:-1].decode()
        except UnicodeDecodeError:
            raise ValueError(f"the string at byte {at} must be UTF-8, got {text[:20]!r}") from None

    def tensor(self, name: str) -> Tensor:
        dimensions = self.number("B")
        if dimensions > DIMENSIONS:
            raise ValueError(f"{name!r:.80} must have at most {DIMENSIONS} dimensions, got {dimensions}")
        shape = tuple(self.number("I") for _ in range(dimensions))
        if math.prod(max(n, 1) for n in shape) > 2 * len(self.data) + 1 and 0 in shape:
            raise ValueError(f"{name!r:.80} must have a shape that the file can hold, got {shape}")
        kind, size = self.number("B"), self.number("I")
        if kind not in KINDS:
            raise ValueError(f"{name!r:.80} must be of kind 0 to {max(KINDS)}, got {kind}")
        expected = math.prod(shape) * KINDS[kind].itemsize
        if size != expected:
            raise ValueError(f"{name!r:.80} of shape {shape} and {KINDS[kind]} must have {expected} bytes, got {size}")
        raw = self.bytes(size)
        if not raw:
            return torch.empty(shape, dtype=KINDS[kind])
        return torch.frombuffer(bytearray(raw), dtype=KINDS[kind]).view(shape)
