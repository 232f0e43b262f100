"""CTranslate2's files: what is written comes back; what is cut, odd or another format is refused by name."""

import struct

import pytest
import torch

from nondual.pretrained.ctranslate2 import KINDS, read_ctranslate2


def text(x: str) -> bytes:
    return struct.pack("<H", len(x.encode()) + 1) + x.encode() + b"\0"


def tensor(name: str, x: torch.Tensor, kind=None, size=None) -> bytes:
    kinds = {dtype: number for number, dtype in KINDS.items()}
    raw = (
        x.contiguous().view(torch.uint8).numpy().tobytes()
        if x.ndim and x.numel()
        else x.view(-1).view(torch.uint8).numpy().tobytes()
    )
    head = struct.pack(f"<B{x.ndim}I", x.ndim, *x.shape)
    head += struct.pack("<BI", kinds[x.dtype] if kind is None else kind, len(raw) if size is None else size)
    return text(name) + head + raw


def model(*tensors: bytes, aliases=(), version=6, end=b"") -> bytes:
    head = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    tail = struct.pack("<I", len(aliases)) + b"".join(text(x) for pair in aliases for x in pair)
    return head + b"".join(tensors) + tail + end


MATRIX = torch.arange(6.0).view(2, 3)
WEIGHTS = {f"of/{dtype}": (MATRIX * 3 - 7).to(dtype) for dtype in KINDS.values()}
WEIGHTS |= {"a/number": torch.tensor(6, dtype=torch.int16), "empty": torch.zeros(0, 3)}
FILE = model(*(tensor(name, x) for name, x in WEIGHTS.items()), aliases=[("again", "a/number")])


def test_every_kind_of_tensor_comes_back_by_its_name(tmp_path):
    kind, read = read_ctranslate2(FILE)
    assert kind == "WhisperSpec" and list(read) == [*WEIGHTS, "again"]
    for name, x in WEIGHTS.items():
        assert read[name].dtype == x.dtype and torch.equal(read[name], x), name
    assert read["again"] is read["a/number"]
    (tmp_path / "model.bin").write_bytes(FILE)
    _, again = read_ctranslate2(tmp_path / "model.bin")
    assert all(torch.equal(again[name], x) for name, x in read.items())


def test_the_tensors_are_their_own():
    _, read = read_ctranslate2(FILE)
    read["of/torch.float32"].zero_()
    assert read_ctranslate2(FILE)[1]["of/torch.float32"].any()


def test_a_file_cut_anywhere_is_refused():
    for length in range(len(FILE)):
        with pytest.raises(ValueError, match=r"^data: "):
            read_ctranslate2(FILE[:length])


def test_bytes_changed_at_random_are_read_or_refused():
    draw = torch.Generator().manual_seed(0)
    for _ in range(2000):
        changed = bytearray(FILE)
        for at in torch.randint(len(FILE), (3,), generator=draw).tolist():
            changed[at] = int(torch.randint(256, (), generator=draw))
        try:
            read_ctranslate2(bytes(changed))
        except ValueError as why:
            assert str(why).startswith("data: ")


@pytest.mark.parametrize(
    "file, sentence",
    [
        (b"GGUF" + FILE[4:], r"must be a CTranslate2 file of binary version 6, got one that begins b'GGUF"),
        (model(version=5), r"must be a CTranslate2 file of binary version 6, got one that begins"),
        (model(tensor("x", MATRIX, kind=9)), r"'x' must be of kind 0 to 5, got 9"),
        (model(tensor("x", MATRIX, size=4)), r"'x' of shape \(2, 3\) and torch.float32 must have 24 bytes, got 4"),
        (model(tensor("x", MATRIX), tensor("x", MATRIX)), r"there are two tensors named 'x'"),
        (model(aliases=[("y", "x")]), r"'y' must be a new name of a tensor that is there, got one of 'x'"),
        (model(text("x") + struct.pack("<B", 9)), r"'x' must have at most 8 dimensions, got 9"),
        (
            model(text("x") + struct.pack("<B3IBI", 3, 0, 2**31, 2**31, 0, 0)),
            r"must have a shape that the file can hold",
        ),
        (model(end=b"???"), r"there are 3 bytes after the last alias"),
        (model(tensor("x", MATRIX)).replace(b"\x02\x00x\x00", b"\x02\x00xy"), r"must end with a 0"),
        (model(tensor("x", MATRIX)).replace(b"\x02\x00x\x00", b"\x02\x00\xff\x00"), r"must be UTF-8"),
    ],
)
def test_what_is_wrong_is_said(file, sentence):
    with pytest.raises(ValueError, match=rf"^whisper: .*{sentence}"):
        read_ctranslate2(file, name="whisper")


def test_a_huge_size_is_refused_before_memory_is_taken():
    huge = text("x") + struct.pack("<B3IBI", 3, 2**31, 2**31, 2**31, 0, 2**32 - 1)
    with pytest.raises(ValueError, match=r"must have \d+ bytes, got 4294967295"):
        read_ctranslate2(model(huge))
