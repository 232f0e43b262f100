"""The attention family leaves Python: torch.export and ONNX, one program for every length from 2 on.

ONNX programs are run by onnxruntime and compared at several lengths.
"""

import io

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.efficient_attention.sparse_attention import SparseAttention, local, sinks
from nondual.ops import masks
from nondual.ops.attention import attention
from nondual.ops.flash_attention import flash_attention
from nondual.relative_positions import RelativeBias, Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import Encoder, TextEncoder

LENGTHS = (2, 3, 7, 150)  # on either side of the window, and beyond one tile


class Call(nn.Module):
    """A function of tensors, or a module with options, as a module."""

    def __init__(self, called, **options):
        super().__init__()
        self.called, self.options = called, options

    def forward(self, *inputs):
        return self.called(*inputs, **self.options)


def qkv(n, m=None):
    draw = torch.Generator().manual_seed(n)
    m = n if m is None else m
    return tuple(torch.randn(1, h, x, 8, generator=draw) for h, x in ((4, n), (2, m), (2, m)))


def fewer(n):
    return qkv(n, 2 * n + 1)


def vectors(n):
    return (torch.randn(2, n, 12, generator=torch.Generator().manual_seed(n)),)


def ids(n):
    return (torch.randint(31, (2, n), generator=torch.Generator().manual_seed(n)),)


def masked_ids(n):
    return (*ids(n), masks.padding(torch.tensor([n, n - 1]), n))


class Padded(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, ids, mask):
        return self.encoder(ids, mask=mask)


def text():
    torch.manual_seed(0)
    return TextEncoder(31, 256, 12, 3, 29, n_layers=2)


def frozen(attention):
    """Without gradients, and a bias that is not 0: torch's program for ONNX is wrong where a mask has a gradient."""
    torch.nn.init.normal_(attention.positions.table.weight)
    return attention.requires_grad_(False)


SAME, CROSS = ("n", "n", "n"), ("n", "m", "m")
PROGRAMS = {
    "causal attention": (Call(attention, causal=True), qkv, [{2: a} for a in SAME]),
    "causal attention, N != M": (Call(attention, causal=True), fewer, [{2: a} for a in CROSS]),
    "flash, causal": (Call(flash_attention, causal=True), qkv, [{2: a} for a in SAME]),
    "flash, causal, N != M": (Call(flash_attention, causal=True), fewer, [{2: a} for a in CROSS]),
    "flash, window": (Call(flash_attention, window=3), qkv, [{2: a} for a in SAME]),
    "multi-head, causal": (Call(MultiHeadAttention(12, 4, n_kv_heads=2), causal=True), vectors, [{1: "n"}]),
    "multi-head, flash": (Call(MultiHeadAttention(12, 4, op=FlashAttention(window=3))), vectors, [{1: "n"}]),
    "multi-head, sparse": (
        Call(MultiHeadAttention(12, 4, op=SparseAttention(local(3) | sinks(1)))),
        vectors,
        [{1: "n"}],
    ),
    "multi-head, rotary": (Call(MultiHeadAttention(12, 2, positions=Rotary(6)), causal=True), vectors, [{1: "n"}]),
    "multi-head, bias": (Call(frozen(MultiHeadAttention(12, 4, positions=RelativeBias(4)))), vectors, [{1: "n"}]),
    "encoder": (Encoder(12, 3, 29, n_layers=2), vectors, [{1: "n"}]),
    "text encoder": (text(), ids, [{1: "n"}]),
    "text encoder, padded": (Padded(text()), masked_ids, [{1: "n"}, {3: "n"}]),
}


def sizes(axes):
    """The dynamic shapes of a program's inputs, from letters."""
    letters = {letter: Dim(letter, min=2, max=255) for letter in ("n", "m")}
    return [{axis: letters[letter] for axis, letter in one.items()} for one in axes]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_one_exported_program_serves_every_length(name, strict):
    module, make, axes = PROGRAMS[name]
    module.eval()
    shapes = (tuple(sizes(axes)),) if isinstance(module, Call) else tuple(sizes(axes))
    program = torch.export.export(module, make(5), dynamic_shapes=shapes, strict=strict).module()
    for n in LENGTHS:
        given = make(n) if make is not fewer or n < 100 else qkv(n, n + 90)
        torch.testing.assert_close(program(*given), module(*given))


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_onnx_program_serves_every_length(name):
    module, make, axes = PROGRAMS[name]
    module.eval()
    shapes = (tuple(sizes(axes)),) if isinstance(module, Call) else tuple(sizes(axes))
    exported = torch.onnx.export(module, make(5), dynamic_shapes=shapes, dynamo=True, verbose=False)
    file = io.BytesIO()
    exported.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for n in LENGTHS:
        given = make(n) if make is not fewer or n < 100 else qkv(n, n + 90)
        (out,) = session.run(None, {i.name: np.asarray(x) for i, x in zip(session.get_inputs(), given)})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(out), module(*given), atol=1e-5, rtol=1e-4)
