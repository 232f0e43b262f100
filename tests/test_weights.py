"""What a hook makes of a layer's output, and what an adapter adds to it, is heard in every way of calling a module.

Here are the mixers, and modules that use the weight of a layer otherwise than by a call. Mamba's own tests are in
efficient_attention/test_mamba_as_a_module.py.
"""

import re
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nondual.attention_mechanism.attention import ConcatAttention
from nondual.attention_mechanism.seq2seq import Seq2Seq
from nondual.chunking import DynamicChunking
from nondual.efficient_attention.linear_attention import GatedDeltaNet, LinearAttentionMixer, Retention
from nondual.efficient_attention.native_sparse_attention import NativeSparseAttention
from nondual.encoder_decoder import EncoderDecoder
from nondual.extensions import EnergyFlow
from nondual.language_models.bytes import Layers
from nondual.language_models.gpt import GPT
from nondual.multimodal.llava import Llava, Projector
from nondual.multimodal.towers import TextTower
from nondual.positional_encoding import LearnedPositions
from nondual.pretrained.speech import SpeechTransformer
from nondual.recent import TTTMLP
from nondual.recent.hyper_connections import DoublyStochasticMaps
from nondual.recurrent import GRU, Recurrent
from nondual.relative_positions import RelativeBias
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import TextEncoder
from nondual.transformer_layer import MixerBlock
from nondual.weights import matrix_and_bias, tied_scores

B, N, M, E, V = 2, 5, 3, 8, 11


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, MEMORY, STREAMS, MEL = draw(B, N, E), draw(B, M, E, seed=2), draw(B, N, 3, E, seed=3), draw(B, 7, 6, seed=4)
IDS = torch.randint(V, (B, N), generator=torch.Generator().manual_seed(5))
MARKED = IDS.scatter(1, torch.tensor([[1], [3]]), V)  # with an image in each row
RESET = torch.arange(N).expand(B, N) == 2


def in_parts(call, cache):
    """What a model gives for the ids in two parts."""
    with torch.no_grad():
        return torch.cat([call(part, cache=cache) for part in IDS.split([3, 2], 1)], 1)


def read_in_parts(mixer):
    with torch.no_grad():
        cache = mixer.new_cache(1, N)
        return torch.cat([mixer(part, cache=cache) for part in X[:1].split([3, 1, 1], 1)], 1)


MIXERS = {
    "attention": lambda: MultiHeadAttention(E, 2, causal=True, positions=RelativeBias(2, causal=True)),
    "native sparse attention": partial(NativeSparseAttention, E, 2, block=2, selected=3, window=3),
    "linear attention": partial(LinearAttentionMixer, E, 2),
    "gated delta rule": partial(GatedDeltaNet, E, 2),
    "retention": partial(Retention, E, 2),
    "test-time training": partial(TTTMLP, E, 2, mini_batch=2),
    "recurrent": lambda: Recurrent(E, GRU(E, 5)),
    "chunking": lambda: DynamicChunking(Layers([MixerBlock(MultiHeadAttention(E, 2, causal=True), E)], E), E),
}
MODULES = MIXERS | {
    "learned positions": partial(LearnedPositions, 9, E),
    "doubly stochastic maps": partial(DoublyStochasticMaps, E, 3, 0),
    "concat attention": partial(ConcatAttention, E, E, 6),
    "energy flow": partial(EnergyFlow, E, 2),
    "gpt": partial(GPT, V, E, 1, 2, max_len=9),
    "encoder and decoder": lambda: EncoderDecoder(V, E, 2, 16, 1, positions=LearnedPositions(9, E)),
    "speech": partial(SpeechTransformer, V, E, 2, 16, 1, max_len=9, n_mels=7),
    "text encoder": partial(TextEncoder, V, 9, E, 2, 16, 1),
    "text tower": partial(TextTower, V, 9, E, 2, 16, 1),
    "recurrent encoder and decoder": lambda: Seq2Seq(V, V, E, attention=partial(ConcatAttention, d_attention=6)),
    "llava": lambda: Llava(nn.Identity(), GPT(V, E, 1, 2, max_len=9), Projector(E, E), mark=V, d_vision=E),
}
WAYS = {kind: {"plain": lambda m: m(X), "cached": read_in_parts} for kind in MIXERS} | {
    "learned positions": {
        "plain": lambda m: m(N),
        "later": lambda m: m(N, start=3),
        "packed": lambda m: m.of_sequences(IDS, reset=RESET),
    },
    "doubly stochastic maps": {"plain": lambda m: torch.cat([x.flatten(2) for x in m(STREAMS)], -1)},
    "concat attention": {
        "plain": lambda m: torch.cat(m(X, MEMORY), -1),
        "projected before": lambda m: m.scores(X, MEMORY, projected=m.project(MEMORY)),
    },
    "energy flow": {
        "plain": lambda m: m(X),
        "causal": lambda m: m(X, causal=True),
        "velocity": lambda m: m.velocity(X),
        "energy": lambda m: m.energy(X),
    },
    "gpt": {
        "plain": lambda m: m(IDS),
        "packed": lambda m: m(IDS, reset=RESET),
        "cached": lambda m: in_parts(m, m.new_cache(B)),
    },
    "encoder and decoder": {
        "plain": lambda m: m(IDS, IDS),
        "cached": lambda m: in_parts(partial(m.decode, memory=m.encode(IDS)), m.new_cache(B)),
    },
    "speech": {
        "plain": lambda m: m(IDS, m.encode(MEL)),
        "with weights": lambda m: m(IDS, m.encode(MEL), return_weights=True)[0],
        "cached": lambda m: in_parts(partial(m, memory=m.encode(MEL)), m.new_cache(B)),
    },
    "text encoder": {"plain": lambda m: m(IDS)},
    "text tower": {"plain": lambda m: m(IDS)},
    "recurrent encoder and decoder": {"plain": lambda m: m(IDS, IDS)[0]},
    "llava": {"plain": lambda m: m(MARKED, MEMORY)},
}
TIED = {
    ("gpt", "embeddings"),
    ("encoder and decoder", "embeddings"),
    ("speech", "token"),
    ("llava", "language_model.embeddings"),
}


def make(kind):
    """A module of random weights, none of them small: what is not heard would show."""
    torch.manual_seed(0)
    made = MODULES[kind]().double().eval().requires_grad_()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p) / (2 if p.ndim < 2 else p.shape[-1] ** 0.5))
    return made


def layers(kind):
    return [name for name, layer in make(kind).named_modules() if hasattr(layer, "weight")]


LAYERS = [(kind, name) for kind in MODULES for name in layers(kind)]


def factors(layer):
    """One for each channel of what the layer gives."""
    channels = layer.weight.shape[1 if isinstance(layer, nn.Embedding) else 0]
    return torch.linspace(0.5, 1.7, channels, dtype=layer.weight.dtype)


@torch.no_grad()
def multiply(layer):
    """Multiply by the factors what a layer gives, by its parameters."""
    factor = factors(layer)
    for p in layer.parameters():
        p *= factor if isinstance(layer, nn.Embedding) else factor.view(-1, *[1] * (p.ndim - 1))


def hook(layer):
    """Multiply by the factors what a layer gives, by a hook."""
    factor = factors(layer)
    factor = factor[:, None] if isinstance(layer, nn.Conv1d) else factor
    layer.register_forward_hook(lambda _, given, out: factor * out)


@pytest.mark.parametrize("kind, name", [each for each in LAYERS if each not in TIED], ids=lambda value: value)
def test_what_a_hook_makes_of_a_layers_output_is_heard(kind, name):
    """Tied scores keep their own weight."""
    for way, call in WAYS[kind].items():
        hooked, right = make(kind), make(kind)
        hook(hooked.get_submodule(name))
        multiply(right.get_submodule(name))
        torch.testing.assert_close(call(hooked), call(right), atol=1e-11, rtol=1e-11, msg=way)


@pytest.mark.parametrize("kind, name", LAYERS, ids=lambda value: value)
def test_hooks_that_only_listen_change_nothing(kind, name):
    call = next(iter(WAYS[kind].values()))
    model, seen = make(kind), []
    right = call(model).detach()
    layer = model.get_submodule(name)
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    with FlopCounterMode(display=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ids have no gradient
        found = call(model)
        found.square().sum().backward()
    torch.testing.assert_close(found.detach(), right, atol=1e-12, rtol=1e-12)
    assert {*seen} == {"forward", "backward"}


class Model(nn.Module):
    """peft looks for layers below a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model


# An adapter of a convolution by groups is not merged, and of a norm there is none.
ADAPTED = [(kind, name) for kind, name in LAYERS if "norm" not in name and name != "conv1d"]


@pytest.mark.parametrize("kind, name", ADAPTED, ids=lambda value: value)
def test_an_adapter_acts_as_it_does_when_merged_and_is_trained(kind, name):
    import peft

    model = make(kind)
    before = {way: call(model).detach() for way, call in WAYS[kind].items()}
    config = peft.LoraConfig(target_modules=re.escape(f"model.{name}"), r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(Model(model), config)
    for p in adapted.parameters():
        p.data *= 0.3 if p.requires_grad else 1  # softly, so that no softmax is all or nothing
    found = {way: call(model) for way, call in WAYS[kind].items()}
    trained = [p for p in adapted.parameters() if p.requires_grad]
    for way, out in found.items():
        assert (out - before[way]).abs().max() > 1e-6 * before[way].abs().max(), way
        if out.requires_grad:
            gradients = torch.autograd.grad(out.square().sum(), trained, allow_unused=True)
            assert all(g is not None and g.any() for g in gradients), way
    adapted.merge_and_unload()
    for way, call in WAYS[kind].items():
        torch.testing.assert_close(found[way], call(model), atol=1e-6, rtol=1e-6, msg=way)


class Operations(TorchDispatchMode):
    """Which matrix products torch runs. Not the short convolutions: one position is a sum, or their layer's call."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.split("::")[1] in ("mm", "bmm", "addmm", "baddbmm", "linear"):
            self.products.append((func._schema.name, *(tuple(x.shape) for x in args if isinstance(x, torch.Tensor))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", MODULES)
def test_a_profilers_global_hook_does_not_change_what_is_multiplied(kind):
    """torch's FlopCounterMode and its profilers set such hooks: they must count what runs without them."""

    def products(call, model):
        with Operations() as run:
            call(model)
        return run.products

    for way, call in WAYS[kind].items():
        alone = products(call, make(kind))
        listening = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
        try:
            assert products(call, make(kind)) == alone, way
        finally:
            listening.remove()


# --- what is used in place of a weight -----------------------------------------------------------------------------


def test_the_matrix_of_what_is_linear_and_of_a_plain_layer():
    plain = nn.Linear(E, 3).double()
    matrix, bias = matrix_and_bias(plain, E, X)
    assert matrix is plain.weight and bias is plain.bias
    right = nn.Sequential(plain, nn.Linear(3, 4).double())
    matrix, bias = matrix_and_bias(right, E, X)
    torch.testing.assert_close(X @ matrix.mT + bias, right(X))


def test_tied_scores_by_the_rows_that_another_module_gives():
    table = nn.Embedding(V, E).double()
    torch.testing.assert_close(tied_scores(nn.Sequential(table), X, V), tied_scores(table, X, V))


def test_another_layers_bias_in_concat_attention_is_heard():
    attention = make("concat attention")
    attention.w = nn.Linear(2 * E, 6).double()
    pairs = torch.cat([X[:, :, None].expand(-1, -1, M, -1), MEMORY[:, None].expand(-1, N, -1, -1)], -1)
    torch.testing.assert_close(attention.scores(X, MEMORY), attention.w(pairs).tanh() @ attention.v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_doubly_stochastic_maps_of_narrow_weights_are_computed_wide_and_hear_a_hook(dtype):
    narrow, streams = make("doubly stochastic maps").to(dtype), STREAMS.to(dtype)
    wide = make("doubly stochastic maps")
    wide.load_state_dict(narrow.state_dict())
    for found, right in zip(narrow(streams), wide.float()(streams.float())):
        assert torch.equal(found, right.to(dtype))
    hook(narrow.project)
    multiply(wide.project)
    for found, right in zip(narrow(streams), wide(streams.float())):
        torch.testing.assert_close(found.float(), right, atol=0.02, rtol=0.02)
