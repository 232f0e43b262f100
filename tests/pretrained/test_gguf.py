"""GGUF files against the package of llama.cpp's own authors, and files that are broken."""

import gguf
import numpy as np
import pytest
import torch

from nondual.pretrained.gguf import dequantize, read_gguf

Q = gguf.GGMLQuantizationType


def test_a_block_of_four_bits_by_hand():
    block = np.array([0.5, -1.0], dtype="<f2").tobytes() + bytes([0x21] + [0x00] * 14 + [0xF3])
    weights = dequantize(torch.frombuffer(bytearray(block), dtype=torch.uint8), 3, (32,))
    low, high = weights[:16], weights[16:]  # a byte's low half, and its high half 16 weights further on
    assert low.tolist() == [-0.5] + [-1.0] * 14 + [0.5]  # 0.5 · 1 - 1, 0.5 · 0 - 1, …, 0.5 · 3 - 1
    assert high.tolist() == [0.0] + [-1.0] * 14 + [6.5]


@pytest.mark.parametrize("kind", [Q.F32, Q.Q4_1, Q.Q8_0])
def test_weights_equal_those_of_the_format_s_own_package(kind):
    weights = np.random.default_rng(0).standard_normal((7, 96), dtype=np.float32)
    packed = gguf.quants.quantize(weights, kind)
    ours = dequantize(torch.from_numpy(packed.copy()).view(torch.uint8).flatten(), kind.value, (7, 96))
    np.testing.assert_array_equal(ours.numpy(), gguf.quants.dequantize(packed, kind))


@pytest.fixture
def file(tmp_path):
    """A file as the format's own package writes it, with a value of every kind."""
    writer = gguf.GGUFWriter(str(tmp_path / "small.gguf"), "llama")
    writer.add_string("a.string", "Ġpratyabhijñā")
    writer.add_uint32("a.number", 4_000_000_000)
    writer.add_int64("a.long", -(2**40))
    writer.add_float32("a.float", 0.25)
    writer.add_bool("a.bool", True)
    writer.add_array("some.strings", ["", "two"])
    writer.add_array("some.numbers", [3, 1, 4])
    writer.add_tensor("first", np.arange(6, dtype=np.float32).reshape(2, 3))
    packed = gguf.quants.quantize(np.ones((5, 32), dtype=np.float32), Q.Q8_0)
    writer.add_tensor("second", packed, raw_dtype=Q.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (tmp_path / "small.gguf").read_bytes()


def test_values_and_tensors_are_read(file):
    values, tensors = read_gguf(file)
    assert {name: values[name] for name in values if name.startswith(("a.", "some."))} == {
        "a.string": "Ġpratyabhijñā",
        "a.number": 4_000_000_000,
        "a.long": -(2**40),
        "a.float": 0.25,
        "a.bool": True,
        "some.strings": ["", "two"],
        "some.numbers": [3, 1, 4],
    }
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"first": (2, 3), "second": (5, 32)}
    torch.testing.assert_close(tensors["first"], torch.arange(6.0).view(2, 3))
    torch.testing.assert_close(tensors["second"], torch.ones(5, 32), atol=1e-3, rtol=0)


@pytest.mark.parametrize("end", [0, 3, 23, 40, 200, -300, -30])
def test_a_truncated_file_is_refused(file, end):
    with pytest.raises(ValueError, match=r"truncated|must be a GGUF file"):
        read_gguf(file[:end])


def test_what_is_not_read_here_is_named(file):
    with pytest.raises(ValueError, match=r"must be a GGUF file of version 2 or 3, got one that begins b'PK"):
        read_gguf(b"PK" + file[2:])
    with pytest.raises(ValueError, match=r"blk\.0 must be of kind 0 \(F32\), 3 \(Q4_1\) or 8 \(Q8_0\), got 12"):
        dequantize(torch.zeros(144, dtype=torch.uint8), 12, (256,), "blk.0")
