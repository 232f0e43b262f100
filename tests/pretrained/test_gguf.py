"""GGUF files against the package of llama.cpp's own authors, and files that are broken."""

import struct
import subprocess
import sys

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


# --- files that are cut, odd or hostile ----------------------------------------------------------------------------


def test_a_file_is_read_by_its_path_and_named_in_errors(file, tmp_path):
    path = tmp_path / "some.gguf"
    path.write_bytes(file)
    for source in (path, str(path), file, bytearray(file)):
        assert torch.equal(read_gguf(source)[1]["first"], torch.arange(6.0).view(2, 3))
    path.write_bytes(file[:100])
    for source, more, said in (
        (path, {}, str(path)),
        (file[:100], {}, "data"),
        (file[:100], {"name": "x.gguf"}, "x.gguf"),
    ):
        with pytest.raises(ValueError) as error:
            read_gguf(source, **more)
        assert str(error.value).startswith(f"{said}: the file is truncated")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gguf"):
        read_gguf(tmp_path / "nowhere.gguf")


def text(s: str | bytes) -> bytes:
    s = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(s)) + s


def made(values=(), tensors=(), data=bytes(256), n_values=None, n_tensors=None) -> bytes:
    """A file by hand: values are (name, kind, bytes), tensors (name, shape, kind, offset)."""
    counts = len(tensors) if n_tensors is None else n_tensors, len(values) if n_values is None else n_values
    head = struct.pack("<4sIQQ", b"GGUF", 3, *counts)
    for name, kind, raw in values:
        head += text(name) + struct.pack("<I", kind) + raw
    for name, shape, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + bytes(-len(head) % 32) + data


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def array(kind: int, count: int, raw: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + raw


def test_what_is_made_by_hand_is_read():
    values, tensors = read_gguf(
        made(
            [("a", 4, u32(7)), ("deep", 9, array(9, 1, array(9, 1, array(4, 1, u32(5))))), ("none", 9, array(4, 0))],
            [("x", (8,), 0, 0), ("y", (32, 2), 8, 32)],
            struct.pack("<8f", *range(8)) + bytes(68),
        )
    )
    assert values == {"a": 7, "deep": [[[5]]], "none": []}
    assert tensors["x"].tolist() == list(range(8)) and torch.equal(tensors["y"], torch.zeros(2, 32))


HUGE = 2**60
HOSTILE = {
    "more values than there are": (made([("a", 4, u32(1))], n_values=HUGE, data=b""), "truncated|two values named ''"),
    "more tensors than there are": (made(n_tensors=2**64 - 1), "truncated|two tensors named"),
    "a name without end": (made(n_values=1)[:24] + struct.pack("<Q", HUGE) + bytes(64), "truncated"),
    "a string without end": (made([("a", 8, struct.pack("<Q", 2**63))]), "truncated"),
    "a string that is not UTF-8": (made([("a", 8, text(b"\xff\xfe"))]), "must be UTF-8, got b'.xff"),
    "a name that is not UTF-8": (made([(b"\xc3", 4, u32(1))]), "must be UTF-8"),
    "an array without end": (made([("a", 9, array(4, HUGE))]), "truncated"),
    "an array of strings without end": (made([("a", 9, array(8, HUGE))]), "truncated"),
    "arrays of arrays of arrays": (made([("a", 9, array(9, 1) * 5000)]), "nested at most 4 deep"),
    "an array of no known kind": (made([("a", 9, array(13, 0))]), "array must be of kind 0 to 12, got 13"),
    "a value of no known kind": (made([("a", 77, b"")]), "a value must be of kind 0 to 12, got 77"),
    "two values of one name": (made([("a", 4, u32(1)), ("a", 4, u32(2))]), "two values named 'a'"),
    "two tensors of one name": (made(tensors=[("x", (8,), 0, 0), ("x", (8,), 0, 32)]), "two tensors named 'x'"),
    "alignment 0": (made([("general.alignment", 4, u32(0))]), "must be a power of 2, got 0"),
    "alignment 24": (made([("general.alignment", 4, u32(24))]), "must be a power of 2, got 24"),
    "alignment in words": (made([("general.alignment", 8, text("32"))]), "must be a power of 2, got '32'"),
    "alignment true": (made([("general.alignment", 7, b"\x01")]), "must be a power of 2, got True"),
    "alignment beyond the file": (
        made([("general.alignment", 4, u32(2**31))], [("x", (8,), 0, 0)]),
        "the file is truncated: .* 'x' ends at byte 2147483680",
    ),
    "a billion dimensions": (
        made(tensors=[("x", (), 0, 0)]).replace(text("x") + u32(0), text("x") + u32(2**30)),
        "'x' must have at most 4 dimensions, got 1073741824",
    ),
    "five dimensions": (made(tensors=[("x", (1,) * 5, 0, 0)]), "at most 4 dimensions, got 5"),
    "a huge dimension": (made(tensors=[("x", (HUGE,), 0, 0)]), "'x' must have dimensions from 1 to"),
    "a negative dimension": (made(tensors=[("x", (2**64 - 8,), 0, 0)]), "'x' must have dimensions from 1 to"),
    "a dimension of 0": (made(tensors=[("x", (0, 4), 0, 0)]), r"from 1 to 2147483647, got \(4, 0\)"),
    "a huge product": (made(tensors=[("x", (2**30,) * 4, 0, 0)]), "the file is truncated: it has"),
    "blocks that wrap at 64 bits": (made(tensors=[("x", (2**30,) * 4, 3, 0)]), "the file is truncated"),
    "an offset beyond the file": (made(tensors=[("x", (8,), 0, HUGE)]), "the file is truncated"),
    "an offset at the last byte": (made(tensors=[("x", (1,), 0, 256)]), "the file is truncated"),
    "an offset between": (made(tensors=[("x", (8,), 0, 4)]), "must begin at a multiple of 32 bytes, got offset 4"),
    "no multiple of 32": (made(tensors=[("x", (33,), 3, 0)]), r"rows of a multiple of 32 weights, got shape \(33,\)"),
    "32 weights in rows of 16": (made(tensors=[("x", (16, 2), 8, 0)]), r"multiple of 32 weights, got shape \(2, 16\)"),
    "a block without a row": (made(tensors=[("x", (), 8, 0)]), r"multiple of 32 weights, got shape \(\)"),
    "the same place": (made(tensors=[("x", (8,), 0, 0), ("y", (8,), 0, 0)]), "'x' and 'y' overlap at byte"),
    "one in the other": (made(tensors=[("x", (32,), 0, 0), ("y", (8,), 0, 32)]), "'x' and 'y' overlap at byte"),
    "no known kind": (made(tensors=[("x", (8,), 1, 0)]), r"'x' must be of kind 0 \(F32\), 3 \(Q4_1\) or 8"),
    "other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "must be a GGUF file of version 2 or 3"),
    "nothing": (b"", "must be a GGUF file of version 2 or 3, got one that begins b''"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_error_with_its_name(case, tmp_path):
    content, says = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        read_gguf(path)
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value)) < len(str(path)) + 300


def test_a_shape_that_does_not_fit_its_kind_is_refused_without_a_file_too():
    raw = torch.zeros(64, dtype=torch.uint8)
    for kind, shape in ((8, (33,)), (3, (16, 2)), (0, (-1, 2)), (0, (0,))):
        with pytest.raises(ValueError, match=r"^blk\.0 must have "):
            dequantize(raw, kind, shape, "blk.0")


FUZZ = """
import random, resource, struct, sys, time
from nondual.pretrained.gguf import read_gguf

path = sys.argv[1]
whole = open(path, "rb").read()
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
if now:
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**29, now + 2**29))  # half a GiB more than there is now
names = read_gguf(whole)[1].keys()

def read(data, name):
    try:
        return read_gguf(data, name=name)
    except ValueError as error:
        assert str(error).startswith(name + ": "), error
        assert error.__suppress_context__

cut = 0
for end in range(len(whole)):
    found = read(whole[:end], f"cut at {end}")
    cut += found is None
    assert found is None or found[1].keys() == names and end >= len(whole) - 32  # the padding at the end
draw = random.Random(0)
odd = [0, 1, 31, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1]
refused, slowest = 0, 0.0
for number in range(4000):
    data = bytearray(whole)
    if number % 2:
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    else:
        at = draw.randrange(len(data) - 8)
        data[at : at + 8] = struct.pack("<Q", draw.choice(odd))
    start = time.process_time()
    refused += read(bytes(data), f"change {number}") is None
    slowest = max(slowest, time.process_time() - start)
print(cut, refused, slowest < 20)
"""


def test_cut_at_every_byte_and_changed_at_random_it_is_read_or_refused(file, tmp_path):
    (tmp_path / "small.gguf").write_bytes(file)
    command = [sys.executable, "-c", FUZZ, str(tmp_path / "small.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    cut, refused, prompt = done.stdout.split()
    assert int(cut) >= len(file) - 32 and int(refused) > 1000 and prompt == "True"
