"""A user's script on the attention family, for type checkers alone: each flag gives exactly one type."""

from typing import assert_type

import torch
from torch import Tensor

from nondual.attention_mechanism import (
    AdditiveAttention,
    AttentionDecoder,
    BahdanauDecoder,
    GeneralAttention,
    LastState,
    LocationAttention,
    LuongDecoder,
    Seq2Seq,
    UniformAttention,
    attend,
)
from nondual.decoder import Decoder
from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.efficient_attention.mamba import Mamba
from nondual.extensions import DecayingAttention, HeadFusion, TalkingHeads
from nondual.feed_forward import GatedFeedForward
from nondual.language_models.gpt import GPT
from nondual.ops import masks
from nondual.ops.attention import attention, masked_softmax
from nondual.ops.flash_attention import flash_attention
from nondual.positional_encoding import LearnedPositions, Sinusoidal
from nondual.relative_positions import ALiBi, RelativeBias, RelativePositions, Rotary, reorder_pairs
from nondual.search import Found
from nondual.self_attention import KVCache, MultiHeadAttention, SelfAttention
from nondual.transformer import Encoder, FeedForward, MixerBlock, TextEncoder, TransformerLayer


def ops(q: Tensor, k: Tensor, v: Tensor, flag: bool, mask: Tensor | None) -> None:
    assert_type(attention(q, k, v), Tensor)
    assert_type(attention(q, k, v, mask=mask, causal=flag, scale=0.5, dropout=0.1, impl="sdpa"), Tensor)
    assert_type(attention(q, k, v, return_weights=False), Tensor)
    assert_type(attention(q, k, v, return_weights=True, impl="reference"), tuple[Tensor, Tensor])
    assert_type(attention(q, k, v, return_weights=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(flash_attention(q, k, v, window=3), Tensor)
    assert_type(flash_attention(q, k, v, return_lse=False, impl="triton"), Tensor)
    assert_type(flash_attention(q, k, v, return_lse=True), tuple[Tensor, Tensor])
    assert_type(flash_attention(q, k, v, return_lse=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(masked_softmax(q @ k.mT, masks.causal(5)), Tensor)
    out, weights = attention(q, k, v, return_weights=True)
    assert_type(out + weights.sum(), Tensor)


def layers(x: Tensor, flag: bool) -> None:
    for layer in (SelfAttention(12), MultiHeadAttention(12, 3, n_kv_heads=1, op=FlashAttention(window=3, impl="sdpa"))):
        assert_type(layer(x), Tensor)
        assert_type(layer(x, return_weights=True), tuple[Tensor, Tensor])
        assert_type(layer(x, causal=True, return_weights=flag), Tensor | tuple[Tensor, Tensor])
    cache = KVCache(2, 3, 8, 4, dtype=torch.bfloat16, device="cpu")
    assert_type(MultiHeadAttention(12, 3)(x, causal=True, cache=cache), Tensor)
    assert_type(cache.length, int)
    assert_type(MultiHeadAttention(12, 3, causal=True).new_cache(2, 8), KVCache)
    assert_type(MultiHeadAttention(12, 3)(x, reset=x[..., 0] > 0), Tensor)


def extensions(x: Tensor, q: Tensor, flag: bool) -> None:
    decaying = DecayingAttention(12, 3)
    assert_type(decaying(x, scores=lambda s: 2 * s), Tensor)
    assert_type(decaying(x, return_weights=True), tuple[Tensor, Tensor])
    assert_type(decaying(x, return_weights=flag), Tensor | tuple[Tensor, Tensor])
    for op in (TalkingHeads(3), HeadFusion(4)):
        assert_type(op(q, q, q, causal=flag, scale=0.5, mask=None), Tensor)
        assert_type(op(q, q, q, return_weights=True), tuple[Tensor, Tensor])
        assert_type(op(q, q, q, dropout=0.1, return_weights=flag), Tensor | tuple[Tensor, Tensor])
        MultiHeadAttention(12, 3, op=op)


def blocks(x: Tensor, ids: Tensor, flag: bool) -> None:
    layer = TransformerLayer(MultiHeadAttention(12, 3), FeedForward(12, 48), 12)
    assert_type(layer(x, causal=True), Tensor)
    assert_type(layer(x, return_weights=True, mask=None), tuple[Tensor, Tensor])
    assert_type(layer(x, return_weights=flag), Tensor | tuple[Tensor, Tensor])
    encoder = Encoder(12, 3, 48, n_layers=2)
    assert_type(encoder(x), Tensor)
    assert_type(encoder(x, return_weights=True), tuple[Tensor, Tensor])
    assert_type(encoder(x, return_weights=flag), Tensor | tuple[Tensor, Tensor])
    stack = Encoder(12, 3, 48, n_layers=2, norm_first=True, norm=torch.nn.RMSNorm, feed_forward=GatedFeedForward)
    assert_type(stack(x, cache=stack.new_cache(2, 8), reset=x[..., 0] > 0), Tensor)
    assert_type(Encoder(12, 3, 48, n_layers=2, mixer=Mamba)(x), Tensor)
    assert_type(MixerBlock(Mamba(12), 12)(x), Tensor)
    decoder = Decoder(12, 3, 48, n_layers=2, n_kv_heads=1)
    assert_type(decoder(x, x, memory_mask=None, cache=decoder.new_cache(2, 8)), Tensor)
    text = TextEncoder(31, 16, 12, 3, 48, n_layers=2)
    assert_type(text(ids, mask=masks.padding(torch.tensor([3, 5]), 5)), Tensor)
    assert_type(text(ids, return_weights=True), tuple[Tensor, Tensor])
    assert_type(text(ids, return_weights=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(LearnedPositions(16, 12)(5, start=2), Tensor)
    assert_type(Sinusoidal(12)(5, start=2), Tensor)


def inside_attention(q: Tensor, weight: Tensor) -> None:
    kinds: list[RelativePositions] = [Rotary(12, order="interleaved", scaling="ntk", factor=2.0), ALiBi(4)]
    kinds.append(RelativeBias(4, causal=True))
    for positions in kinds:
        assert_type(positions.turn(q, 3), Tensor)
        assert_type(positions.bias(5, 8), Tensor | None)
        MultiHeadAttention(48, 4, positions=positions)
        Encoder(48, 4, 171, 2, positions=positions)
    Encoder(48, 4, 171, 2, positions=lambda i: RelativeBias(4))
    GPT(31, 48, 2, 4, positions=Rotary(12))
    GPT(31, 48, 2, 4, positions=Sinusoidal(48))
    assert_type(reorder_pairs(weight, 4, "half"), Tensor)


def before_self_attention(s: Tensor, h: Tensor, y: Tensor) -> None:
    assert_type(attend(s @ h.mT, h), tuple[Tensor, Tensor])
    additive = AdditiveAttention(7, 11, 13)
    assert_type(additive(s, h, projected=additive.project(h)), tuple[Tensor, Tensor])
    assert_type(AttentionDecoder(17, 7, 11, 13)(y, s[:, 0], h), tuple[Tensor, Tensor])
    located = LocationAttention(7, 12, 13, 2, 3)
    assert_type(located(s, h, past=located.start(h)), tuple[Tensor, Tensor])
    assert_type(BahdanauDecoder(17, located, 3)(y, h), tuple[Tensor, Tensor])


def a_whole_speller(ids: Tensor) -> None:
    model = Seq2Seq(28, 41, 16, attention=GeneralAttention, decoder=LuongDecoder)
    assert_type(model(ids, ids), tuple[Tensor, Tensor])
    assert_type(model.loss(ids, ids), Tensor)
    assert_type(model.generate(ids, 9, bos=1, eos=2, beams=4), Found)
    Seq2Seq(28, 41, 16, attention=UniformAttention)
    Seq2Seq(28, 41, 16, attention=LastState)
    Seq2Seq(28, 41, 16, attention=lambda s, h: LocationAttention(s, h, 8, 2, 3))
