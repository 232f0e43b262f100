"""nondual: the history of attention as a library that runs.

The names below can be taken from here, `from nondual import attention, Mamba`, or from the modules that they live in:

    nondual.ops                   the operations and their engines: attention, flash attention, scans, masks
    nondual.attention_mechanism   a decoder that reads an encoder: additive attention and those after it, seq2seq
    nondual.mixers                what a mixer of positions is; attention, Mamba, Mamba-2 and S4D are mixers alike
    nondual.recurrent             RNN, LSTM and GRU, and a mixer made of one
    nondual.self_attention        one X, three projections; many heads (Vaswani 2017)
    nondual.kv_cache              the key/value cache
    nondual.token_ids             token ids, checked where they enter a model
    nondual.weights               layers whose weight is used past their call, and adapters in their place
    nondual.tokenization          bytes, characters, subwords and words as tokens; bits per byte
    nondual.chunking              cuts that are learned: a sequence in pieces, and back
    nondual.positional_encoding   positions added to embeddings: sinusoidal, learned
    nondual.relative_positions    positions inside attention: rotary, ALiBi, T5's learned bias
    nondual.feed_forward          what a layer does at each position by itself, plain or gated
    nondual.residual              layer scale and stochastic depth, on the way back to the residual path
    nondual.connections           how the layers of a model are joined: the plain residual stream, and others
    nondual.transformer_layer     a mixer and a feed-forward network with residual paths and norms; a mixer alone
    nondual.transformer           a stack of layers that reads a whole sequence, a text encoder
    nondual.decoder               the decoder that reads a memory
    nondual.encoder_decoder       the transformer whole: a source is read, a target written
    nondual.losses                cross-entropy by token, with label smoothing
    nondual.efficient_attention   flash attention as a layer and for Hugging Face models; S4D, Mamba, Mamba-2
    nondual.search                greedy search, sampling and beam search over any model that scores the next token
    nondual.language_models       a causal language model over any mixer; a GPT, a Mamba and a hybrid configure it
    nondual.vision_transformers   images read by the same layers as words: patches, the Vision Transformer
    nondual.multimodal            images and words in one model: CLIP, SigLIP, Flamingo and LLaVA
    nondual.recent                test-time training, a Continuous Thought Machine, connections over depth
    nondual.extensions            the essay's proposals: attention without fixed roles, a flow down one energy
    nondual.parallel              one sequence over several devices: attention round a ring, scans passed on
    nondual.pretrained            real weights, checked by hash and loaded into the classes above
    nondual.analysis              attention heads recorded, replaced and measured, in these models and transformers' own
    nondual.training              optimiser, schedule, and a loop that resumes from a checkpoint to the bit
    nondual.data, tasks, figures  texts, synthetic tasks and drawings for the site's pages

`import nondual` imports nothing else, not even torch: each name is imported when it is first asked for (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nondual import (
        analysis,
        attention_mechanism,
        chunking,
        connections,
        data,
        decoder,
        efficient_attention,
        encoder_decoder,
        extensions,
        feed_forward,
        figures,
        kv_cache,
        language_models,
        losses,
        mixers,
        multimodal,
        ops,
        parallel,
        positional_encoding,
        pretrained,
        recent,
        recurrent,
        relative_positions,
        residual,
        search,
        self_attention,
        tasks,
        token_ids,
        tokenization,
        training,
        transformer,
        transformer_layer,
        vision_transformers,
        weights,
    )
    from nondual.attention_mechanism import (
        AdditiveAttention,
        AttentionDecoder,
        BahdanauDecoder,
        LocationAttention,
        LuongDecoder,
        Seq2Seq,
    )
    from nondual.data import shakespeare
    from nondual.decoder import Decoder
    from nondual.efficient_attention.flash_attention import FlashAttention
    from nondual.efficient_attention.linear_attention import (
        DeltaNet,
        GatedDeltaNet,
        GatedLinearAttention,
        LinearAttention,
        LinearAttentionMixer,
        Retention,
    )
    from nondual.efficient_attention.mamba import Mamba, MambaCache
    from nondual.efficient_attention.mamba2 import Mamba2
    from nondual.efficient_attention.native_sparse_attention import NativeSparseAttention
    from nondual.efficient_attention.s4d import S4D
    from nondual.efficient_attention.sparse_attention import SparseAttention
    from nondual.efficient_attention.transformers_interface import register_with_transformers
    from nondual.encoder_decoder import EncoderDecoder
    from nondual.feed_forward import FeedForward, GatedFeedForward
    from nondual.kv_cache import KVCache
    from nondual.language_models.causal import CausalLM
    from nondual.language_models.gpt import GPT
    from nondual.language_models.hybrid import HybridLM
    from nondual.language_models.mamba import MambaLM
    from nondual.multimodal.clip import CLIP, SigLIP
    from nondual.multimodal.flamingo import Flamingo
    from nondual.multimodal.llava import Llava
    from nondual.ops import masks
    from nondual.ops.attention import attention
    from nondual.ops.causal_conv1d import causal_conv1d
    from nondual.ops.flash_attention import flash_attention
    from nondual.ops.linear_attention import linear_attention, linear_attention_step
    from nondual.ops.linear_recurrence import linear_recurrence
    from nondual.ops.selective_scan import selective_scan, selective_scan_step
    from nondual.ops.sparse_attention import BlockMask, sparse_attention
    from nondual.ops.ssd import ssd, ssd_step
    from nondual.positional_encoding import LearnedPositions, Sinusoidal
    from nondual.pretrained import SentenceEncoder, load_mamba, load_mamba2, minilm, smollm2
    from nondual.recurrent import GRU, LSTM, RNN, Recurrent
    from nondual.relative_positions import ALiBi, RelativeBias, Rotary
    from nondual.search import beam_search, greedy, sample
    from nondual.self_attention import MultiHeadAttention, SelfAttention
    from nondual.transformer import Encoder, MixerBlock, TextEncoder, TransformerLayer
    from nondual.vision_transformers.vit import VisionTransformer

__version__ = "0.1.0"

__all__ = [
    "CLIP",
    "GPT",
    "GRU",
    "LSTM",
    "RNN",
    "S4D",
    "ALiBi",
    "AdditiveAttention",
    "AttentionDecoder",
    "BahdanauDecoder",
    "BlockMask",
    "CausalLM",
    "Decoder",
    "DeltaNet",
    "Encoder",
    "EncoderDecoder",
    "FeedForward",
    "Flamingo",
    "FlashAttention",
    "GatedDeltaNet",
    "GatedFeedForward",
    "GatedLinearAttention",
    "HybridLM",
    "KVCache",
    "LearnedPositions",
    "LinearAttention",
    "LinearAttentionMixer",
    "Llava",
    "LocationAttention",
    "LuongDecoder",
    "Mamba",
    "Mamba2",
    "MambaCache",
    "MambaLM",
    "MixerBlock",
    "MultiHeadAttention",
    "NativeSparseAttention",
    "Recurrent",
    "RelativeBias",
    "Retention",
    "Rotary",
    "SelfAttention",
    "SentenceEncoder",
    "Seq2Seq",
    "SigLIP",
    "Sinusoidal",
    "SparseAttention",
    "TextEncoder",
    "TransformerLayer",
    "VisionTransformer",
    "analysis",
    "attention",
    "attention_mechanism",
    "beam_search",
    "causal_conv1d",
    "chunking",
    "connections",
    "data",
    "decoder",
    "efficient_attention",
    "encoder_decoder",
    "extensions",
    "feed_forward",
    "figures",
    "flash_attention",
    "greedy",
    "kv_cache",
    "language_models",
    "linear_attention",
    "linear_attention_step",
    "linear_recurrence",
    "load_mamba",
    "load_mamba2",
    "losses",
    "masks",
    "minilm",
    "mixers",
    "multimodal",
    "ops",
    "parallel",
    "positional_encoding",
    "pretrained",
    "recent",
    "recurrent",
    "register_with_transformers",
    "relative_positions",
    "residual",
    "sample",
    "search",
    "selective_scan",
    "selective_scan_step",
    "self_attention",
    "shakespeare",
    "smollm2",
    "sparse_attention",
    "ssd",
    "ssd_step",
    "tasks",
    "token_ids",
    "tokenization",
    "training",
    "transformer",
    "transformer_layer",
    "vision_transformers",
    "weights",
]

# The module that a name of __all__ is taken from; a name that is not here is itself a module.
_HOME = {
    "AdditiveAttention": "attention_mechanism",
    "AttentionDecoder": "attention_mechanism",
    "BahdanauDecoder": "attention_mechanism",
    "LocationAttention": "attention_mechanism",
    "LuongDecoder": "attention_mechanism",
    "Seq2Seq": "attention_mechanism",
    "FlashAttention": "efficient_attention.flash_attention",
    "DeltaNet": "efficient_attention.linear_attention",
    "GatedDeltaNet": "efficient_attention.linear_attention",
    "GatedLinearAttention": "efficient_attention.linear_attention",
    "LinearAttention": "efficient_attention.linear_attention",
    "LinearAttentionMixer": "efficient_attention.linear_attention",
    "Retention": "efficient_attention.linear_attention",
    "Mamba": "efficient_attention.mamba",
    "MambaCache": "efficient_attention.mamba",
    "Mamba2": "efficient_attention.mamba2",
    "NativeSparseAttention": "efficient_attention.native_sparse_attention",
    "S4D": "efficient_attention.s4d",
    "SparseAttention": "efficient_attention.sparse_attention",
    "register_with_transformers": "efficient_attention.transformers_interface",
    "KVCache": "kv_cache",
    "CausalLM": "language_models.causal",
    "GPT": "language_models.gpt",
    "HybridLM": "language_models.hybrid",
    "MambaLM": "language_models.mamba",
    "CLIP": "multimodal.clip",
    "SigLIP": "multimodal.clip",
    "Flamingo": "multimodal.flamingo",
    "Llava": "multimodal.llava",
    "attention": "ops.attention",
    "causal_conv1d": "ops.causal_conv1d",
    "flash_attention": "ops.flash_attention",
    "linear_attention": "ops.linear_attention",
    "linear_attention_step": "ops.linear_attention",
    "linear_recurrence": "ops.linear_recurrence",
    "selective_scan": "ops.selective_scan",
    "selective_scan_step": "ops.selective_scan",
    "BlockMask": "ops.sparse_attention",
    "sparse_attention": "ops.sparse_attention",
    "ssd": "ops.ssd",
    "ssd_step": "ops.ssd",
    "LearnedPositions": "positional_encoding",
    "Sinusoidal": "positional_encoding",
    "SentenceEncoder": "pretrained",
    "load_mamba": "pretrained",
    "load_mamba2": "pretrained",
    "minilm": "pretrained",
    "shakespeare": "data",
    "smollm2": "pretrained",
    "GRU": "recurrent",
    "LSTM": "recurrent",
    "RNN": "recurrent",
    "Recurrent": "recurrent",
    "ALiBi": "relative_positions",
    "RelativeBias": "relative_positions",
    "Rotary": "relative_positions",
    "beam_search": "search",
    "greedy": "search",
    "sample": "search",
    "MultiHeadAttention": "self_attention",
    "SelfAttention": "self_attention",
    "Decoder": "decoder",
    "EncoderDecoder": "encoder_decoder",
    "FeedForward": "feed_forward",
    "GatedFeedForward": "feed_forward",
    "Encoder": "transformer",
    "MixerBlock": "transformer",
    "TextEncoder": "transformer",
    "TransformerLayer": "transformer",
    "VisionTransformer": "vision_transformers.vit",
}
_DEEPER = {"masks": "ops.masks"}  # a module that lies within another

if not TYPE_CHECKING:  # a type checker reads the imports above, and should go on to report a name that does not exist

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module 'nondual' has no attribute {name!r}")
        if name in _HOME:
            value = getattr(import_module(f"nondual.{_HOME[name]}"), name)
        else:
            value = import_module(f"nondual.{_DEEPER.get(name, name)}")
        globals()[name] = value  # the next look-up finds it without this function
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
