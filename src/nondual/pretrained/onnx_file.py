"""Read the weights out of an ONNX file: its tensors by name, and which node uses which.

Only what weights need is read, of the format's description in onnx.proto (onnx.ai): tensors of floats whose numbers
are in the file, and the nodes' names. Nothing in the file is run.

    ModelProto   7 graph
    GraphProto   1 node, 5 initializer
    NodeProto    1 input, 3 name
    TensorProto  1 dims, 2 data_type, 8 name, 9 raw_data
"""

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf's wire types
FLOAT, FLOAT16 = 1, 10  # ONNX's numbers of dtypes


class OnnxWeights(NamedTuple):
    """What an ONNX file holds of weights.

    Attributes:
        tensors: by name, float32 or float16, each in memory of its own.
        inputs: of each node by its name, what it reads: names of tensors and of other nodes' results.
    """

    tensors: "dict[str, Tensor]"
    inputs: dict[str, list[str]]


def read_onnx(data: bytes) -> OnnxWeights:
    """The weights of an ONNX file.

    Raises:
        ValueError: it is no ONNX file, is cut, or a tensor's size is not its shape's.
    """
    view = memoryview(data)
    tensors: dict[str, Tensor] = {}
    inputs: dict[str, list[str]] = {}
    try:
        graph = next((value for number, value in _fields(view) if number == 7), None)
        if not isinstance(graph, memoryview):
            raise ValueError("there is no graph in it")
        for number, value in _fields(graph):
            if number == 5 and isinstance(value, memoryview):
                name, tensor = _tensor(value)
                if tensor is not None:
                    tensors[name] = tensor
            elif number == 1 and isinstance(value, memoryview):
                node = [(part, bytes(x).decode()) for part, x in _fields(value) if part in (1, 3) and not _is_int(x)]
                name = next((x for part, x in node if part == 3), "")
                inputs[name] = [x for part, x in node if part == 1]
    except (IndexError, UnicodeDecodeError) as why:
        raise ValueError(f"this is no ONNX file, or it is cut: {why}") from None
    return OnnxWeights(tensors, inputs)


def _is_int(value: "int | memoryview") -> bool:
    return isinstance(value, int)


def _fields(data: memoryview) -> "Iterator[tuple[int, int | memoryview]]":
    """The fields of a protobuf message: (number, value); a value of bytes is a view."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == BYTES:
            size, at = _varint(data, at)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"this is no ONNX file: it has a field of wire type {kind}")
        if at + size > len(data):
            raise IndexError(f"a field of {size} bytes ends after the file")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A whole number of 7 bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise IndexError("a number of more than 64 bits")


def _tensor(data: memoryview) -> "tuple[str, Tensor | None]":
    """An initializer's name, and its numbers if they are floats that the file holds as bytes."""
    import torch

    dims: list[int] = []
    name, kind, raw = "", 0, None
    for number, value in _fields(data):
        if number == 1 and isinstance(value, int):
            dims.append(value)
        elif number == 1 and isinstance(value, memoryview):  # packed: one after another
            at = 0
            while at < len(value):
                size, at = _varint(value, at)
                dims.append(size)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8 and isinstance(value, memoryview):
            name = bytes(value).decode()
        elif number == 9 and isinstance(value, memoryview):
            raw = value
    dtypes = {FLOAT: torch.float32, FLOAT16: torch.float16}
    if raw is None or kind not in dtypes or not len(raw):
        return name, None
    if len(raw) != prod(dims) * dtypes[kind].itemsize:
        raise ValueError(f"the tensor {name} of shape {tuple(dims)} has {len(raw)} bytes")
    return name, torch.frombuffer(bytearray(raw), dtype=dtypes[kind]).view(dims)
