"""A user's script on the names that the package itself offers, for type checkers alone."""

from typing import assert_type

import torch
from torch import Tensor

import nondual
from nondual import KVCache, Mamba, MambaLM, MultiHeadAttention, SentenceEncoder, attention, masks, selective_scan, ssd


def names(q: Tensor, ids: Tensor) -> None:
    assert_type(attention(q, q, q, mask=masks.causal(q.shape[2])), Tensor)
    assert_type(nondual.attention(q, q, q, return_weights=True), tuple[Tensor, Tensor])
    assert_type(nondual.flash_attention(q, q, q, causal=True), Tensor)
    assert_type(nondual.linear_recurrence(q, q), tuple[Tensor, Tensor])
    assert_type(nondual.causal_conv1d(q, q[0]), tuple[Tensor, Tensor])
    assert_type(nondual.minilm(), SentenceEncoder)
    assert_type(nondual.__version__, str)
    assert_type(nondual.register_with_transformers(), str)
    assert_type(nondual.load_mamba("folder"), MambaLM)
    assert_type(nondual.shakespeare(), dict[str, str])
    layer = MultiHeadAttention(12, 3)
    assert_type(layer(q, causal=True, cache=KVCache(2, 3, 8, 4)), Tensor)
    assert_type(nondual.self_attention.SelfAttention(12)(q, return_weights=True), tuple[Tensor, Tensor])


def scans(x: Tensor, A: Tensor, B: Tensor) -> None:
    assert_type(selective_scan(x, x, A, B, B, delta_softplus=True, impl="cpu"), tuple[Tensor, Tensor])
    assert_type(nondual.selective_scan_step(x[:, 0], x[:, 0], A, B[:, 0], B[:, 0]), tuple[Tensor, Tensor])
    assert_type(ssd(x, x[..., 0], A[:, 0], B, B, chunk=16, impl="chunked"), tuple[Tensor, Tensor])
    assert_type(nondual.ssd_step(x[:, 0], x[:, 0, :, 0], A[:, 0], B[:, 0], B[:, 0]), tuple[Tensor, Tensor])


def models(ids: Tensor) -> None:
    model = MambaLM(256, 64, 2, mixer=lambda width: Mamba(width, d_state=8))
    loss = model.loss(ids)
    assert_type(loss, Tensor)
    assert_type(model.generate(ids, 5, temperature=0.7, top_k=10), Tensor)
    optimiser = nondual.training.optimiser(model, 1e-3)
    assert_type(optimiser, torch.optim.AdamW)
    optimiser.zero_grad()


def training(ids: Tensor) -> None:
    model = MambaLM(256, 64, 2)
    adam = nondual.training.optimiser(model, 1e-3)
    history = nondual.training.train(model, model.loss, lambda generator: ids, optimiser=adam, steps=2, log="run.jsonl")
    assert_type(history, list[dict[str, float]])
    assert_type(nondual.training.warmup_cosine(0, 2), float)


def whole_transformer(source: Tensor, target: Tensor) -> None:
    model = nondual.EncoderDecoder(100, 64, 4, 256, 2)
    assert_type(model(source, target), Tensor)
    assert_type(model(source, target, return_weights=True), tuple[Tensor, Tensor])
    assert_type(model.loss(source, target, label_smoothing=0.1), Tensor)
    found = model.generate(source, 9, bos=1, eos=2, beams=4)
    assert_type(found, nondual.search.Found)
    assert_type(found.tokens, Tensor)
    assert_type(nondual.greedy(model.step, source[:, 0], model.start(source, 9), max_len=9).scores, Tensor)
    assert_type(nondual.training.warmup_inverse_root(0, 9, warmup=4), float)
