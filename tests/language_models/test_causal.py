"""The causal language model over each mixer, a toy one included: laws, generation and what it refuses."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nondual.efficient_attention.linear_attention import GatedDeltaNet, LinearAttentionMixer, Retention
from nondual.efficient_attention.mamba2 import Mamba2
from nondual.efficient_attention.native_sparse_attention import NativeSparseAttention
from nondual.efficient_attention.s4d import S4D
from nondual.language_models.bytes import HNet, Layers
from nondual.language_models.causal import CausalLM
from nondual.language_models.gpt import GPT
from nondual.language_models.hybrid import HybridLM
from nondual.language_models.mamba import MambaLM
from nondual.positional_encoding import LearnedPositions, Sinusoidal
from nondual.recent import TTTLinear
from nondual.recurrent import LSTM, Recurrent
from nondual.relative_positions import RelativeBias, Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import FeedForward, MixerBlock, TransformerLayer

B, N, V, E, LONGEST = 2, 11, 13, 12, 24


class MovingAverage(nn.Module):
    """A toy mixer, written without a line of the library: the mean of each position and of those before it."""

    def forward(self, x, *, cache=None):
        total, read = x.cumsum(1), 0
        if cache is not None:
            total, read = total + cache.total, cache.read
            cache.total, cache.read = total[:, -1:] if x.shape[1] else cache.total, read + x.shape[1]
        return total / torch.arange(read + 1, read + x.shape[1] + 1, device=x.device)[:, None]

    def new_cache(self, batch, max_len=None):
        return SimpleNamespace(total=0, read=0)


def toy():
    def layer(i):
        if i == 0:
            return MixerBlock(MovingAverage(), E)
        return TransformerLayer(MovingAverage(), FeedForward(E, 29), E, norm_first=True)

    return CausalLM(V, E, 2, layer=layer, max_len=LONGEST, norm=nn.LayerNorm)


def over(mixer, layers=2):
    return CausalLM(V, E, layers, layer=lambda i: MixerBlock(mixer(), E))


MODELS = {
    "gpt": partial(GPT, V, E, 2, 4, max_len=LONGEST),
    "gpt, grouped heads": partial(GPT, V, E, 2, 4, max_len=LONGEST, n_kv_heads=2, tied=False),
    "gpt, sinusoidal": lambda: GPT(V, E, 2, 4, positions=Sinusoidal(E)),
    "gpt, rotary": partial(GPT, V, E, 2, 3, positions=Rotary(4)),
    "gpt, relative bias": lambda: GPT(V, E, 2, 4, positions=RelativeBias(4, n_buckets=6, max_distance=9, causal=True)),
    "hybrid": partial(HybridLM, V, E, 3, 4),
    "hybrid, mamba2": partial(HybridLM, V, E, 2, 4, every=2, mixer=partial(Mamba2, d_state=5, d_head=4)),
    "mamba": partial(MambaLM, V, E, 2),
    "linear attention": lambda: over(partial(LinearAttentionMixer, E, 3)),
    "gated delta rule": lambda: over(partial(GatedDeltaNet, E, 3)),
    "toy": toy,
}
PACKING = [kind for kind in MODELS if kind != "toy"]


def make(kind, models=MODELS):
    """A model whose next token is no near tie, as small embeddings would make it, nor always the last."""
    torch.manual_seed(0)
    made = models[kind]().double()
    with torch.no_grad():
        for table in (made.embeddings, getattr(made.positions, "table", None), made.lm_head):
            if table is not None:
                table.weight *= 0.8 / table.weight.std()
        for module in made.modules():
            if isinstance(module, RelativeBias):
                module.table.weight.normal_()
        made.norm_f.weight.copy_(torch.randn(E))
    return made


def tokens(length=N, batch=B, seed=1):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths, width):
    """Rows of these lengths, padded on the left with 0, and the reset that says so."""
    ids, reset = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = tokens(length, 1, seed=row)[0]
        reset[row, width - length] = True
    return ids, reset


# --- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_later_token_changes_nothing_before_it(kind):
    model, ids = make(kind), tokens()
    other = torch.cat([ids[:, :7], (ids[:, 7:] + 1) % V], 1)
    torch.testing.assert_close(model(other)[:, :7], model(ids)[:, :7], atol=1e-12, rtol=1e-12)
    assert not torch.isclose(model(other)[:, 7:], model(ids)[:, 7:]).all(-1).any()


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_prompt_and_then_token_by_token(kind):
    model, ids = make(kind), tokens()
    cache = model.new_cache(B, N)
    parts = torch.cat([model(part, cache=cache) for part in ids.split([4, *[1] * (N - 4)], 1)], 1)
    torch.testing.assert_close(parts, model(ids), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", PACKING)
def test_packed_each_is_as_if_alone_and_so_are_loss_and_gradients(kind):
    model, ids, starts = make(kind), tokens(), [0, 1, 6]
    reset = torch.zeros(B, N, dtype=torch.bool)
    reset[:, starts] = True
    spans = list(zip(starts, [*starts[1:], N]))
    packed, alone = model(ids, reset=reset), torch.cat([model(ids[:, a:b]) for a, b in spans], 1)
    torch.testing.assert_close(packed, alone, atol=1e-11, rtol=1e-11)
    ours = model.loss(ids, reset=reset)
    theirs = (4 * B * model.loss(ids[:, 1:6]) + 4 * B * model.loss(ids[:, 6:])) / (8 * B)
    torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)
    for name, (a, b) in zip(
        dict(model.named_parameters()),
        zip(*(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in (ours, theirs))),
    ):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10, msg=name)


def test_packed_sequences_may_be_longer_together_than_the_positions_are():
    model, ids = make("gpt"), tokens(40)
    reset = torch.zeros(B, 40, dtype=torch.bool)
    reset[:, ::20] = True
    torch.testing.assert_close(model(ids, reset=reset)[:, 20:], model(ids[:, 20:]))


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_is_torchs_cross_entropy(kind):
    model, ids = make(kind), tokens()
    expected = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model.loss(ids), expected)
    assert model.loss(ids[:0]) == 0


@pytest.mark.parametrize("kind", MODELS)
def test_it_learns_by_heart(kind):
    model, ids = make(kind).float(), torch.arange(N)[None].expand(B, N)
    adam, before = torch.optim.Adam(model.parameters(), 1e-2), model.loss(ids).item()
    for _ in range(60):
        adam.zero_grad()
        model.loss(ids).backward()
        adam.step()
    assert model.loss(ids).item() < before / 10
    assert torch.equal(model.generate(ids[:, :3], N - 3), ids)


def test_how_it_begins():
    torch.manual_seed(0)
    model = GPT(V, 64, 8, 4, max_len=LONGEST)
    fresh = nn.Linear(64, 64).weight.std()
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias") and "norm" not in name)
    torch.testing.assert_close(model.positions.table.weight.std(), torch.tensor(0.02), atol=2e-3, rtol=0)
    for layer in model.layers:  # 16 branches
        torch.testing.assert_close(layer.mixer.out_proj.weight.std() * 4, fresh, atol=0, rtol=0.1)
        torch.testing.assert_close(layer.feed_forward.linear2.weight.std() * 8, fresh, atol=0, rtol=0.1)


# --- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_takes_the_likeliest_each_time_with_and_without_a_cache(kind):
    model, ids = make(kind), tokens(4)
    for _ in range(8):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    assert len(ids[:, 4:].unique()) > 2, "a text that repeats itself shows little"
    for cached in (True, False):
        assert torch.equal(model.generate(tokens(4), 8, cached=cached), ids)


@pytest.mark.parametrize("kind", MODELS)
def test_draws_are_the_same_with_and_without_a_cache(kind):
    model, settings = make(kind), dict(temperature=1.3, top_k=9, top_p=0.9)
    texts = [
        model.generate(tokens(4), 12, generator=torch.Generator().manual_seed(seed), cached=cached, **settings)
        for seed, cached in ((0, True), (0, False), (1, True))
    ]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", PACKING)
def test_padded_on_the_left_each_row_goes_on_as_it_does_alone(kind, cached):
    model, lengths = make(kind), [9, 1, 4]
    ids, reset = padded(lengths, 9)
    found = model.generate(ids, 7, reset=reset, cached=cached)[:, 9:]
    for row, length in enumerate(lengths):
        assert torch.equal(found[row], model.generate(ids[row : row + 1, 9 - length :], 7)[0, length:])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", PACKING)
def test_after_its_last_token_a_row_repeats_it(kind, cached):
    model = make(kind)
    long = model.generate(tokens(4), 9)
    eos = int(long[0, 6])
    short = model.generate(tokens(4), 9, eos=eos, cached=cached)
    for row in range(B):
        new = long[row, 4:].tolist()
        end = 4 + new.index(eos) + 1 if eos in new else short.shape[1]
        assert torch.equal(short[row, :end], long[row, :end]) and (short[row, end:] == eos).all()


def test_positions_that_run_out_are_an_error_that_says_the_longest():
    model = make("gpt")
    assert model.generate(tokens(4), 21).shape == (B, 25)  # the last token is chosen and never read
    with pytest.raises(ValueError, match=r"ids and n_new must be 24 positions or fewer, .*, got 25: shorten"):
        model.generate(tokens(4), 22)
    with pytest.raises(ValueError, match="positions must lie in 0 to 23, got 25 from 0: shorten"):
        model(tokens(25))
    with pytest.raises(ValueError, match="positions must lie in 0 to 23, got 24: shorten"):
        model(tokens(25), reset=torch.zeros(B, 25, dtype=torch.bool))
    cache = model.new_cache(B)
    with torch.no_grad(), pytest.raises(ValueError, match="positions must lie in 0 to 23, got 1 from 24"):
        model(tokens(24), cache=cache)
        model(tokens(1), cache=cache)
    assert make("hybrid").generate(tokens(4), 40).shape == (B, 44)  # no positions, no end


def test_a_code_without_an_end_reads_on_and_a_table_may_be_given_as_it_is():
    model = make("gpt, sinusoidal")
    assert model.generate(tokens(4), 40).shape == (B, 44)
    with pytest.raises(ValueError, match="max_len must be given"):
        model.new_cache(B)
    torch.manual_seed(0)
    given = GPT(V, E, 2, 4, positions=LearnedPositions(LONGEST, E))
    torch.manual_seed(0)
    by_length = GPT(V, E, 2, 4, max_len=LONGEST)
    assert given.state_dict().keys() == by_length.state_dict().keys()
    torch.testing.assert_close(given.positions.table.weight.std(), torch.tensor(0.02), atol=2e-3, rtol=0)
    assert len(given.new_cache(B)) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_code_in_float32_leaves_a_narrow_model_narrow(dtype):
    model, ids = make("gpt, sinusoidal"), tokens()
    exact = model(ids)
    model.to(dtype)
    assert model.positions(3).dtype == torch.float32 and model(ids).dtype == dtype
    assert (model(ids) - exact).abs().max() / exact.abs().max() < 16 * torch.finfo(dtype).eps


# --- compiled, and shapes alone ------------------------------------------------------------------------------------

# The compiler traces every layer anew, and a second of a kind as it traced the first. So only some models have two
# layers: a GPT and those whose layers differ. (A Mamba of two is exported in test_mamba_as_a_module.py.) One model has
# rotary positions, grouped heads and scores by a matrix of their own: positions turn q and k whatever the number of
# their heads is, before the op groups them.
COMPILED = {
    "gpt": MODELS["gpt"],
    "gpt, rotary, grouped heads": partial(GPT, V, E, 1, 6, positions=Rotary(2), n_kv_heads=3, tied=False),
    "gpt, sinusoidal": lambda: GPT(V, E, 1, 4, positions=Sinusoidal(E)),
    "gpt, relative bias": lambda: GPT(V, E, 1, 4, positions=RelativeBias(4, n_buckets=6, max_distance=9, causal=True)),
    "hybrid": partial(HybridLM, V, E, 2, 4, every=2),
    "hybrid, mamba2": MODELS["hybrid, mamba2"],
    "mamba": partial(MambaLM, V, E, 1),
    "linear attention": lambda: over(partial(LinearAttentionMixer, E, 3), 1),
    "gated delta rule": lambda: over(partial(GatedDeltaNet, E, 3), 1),
    "toy": toy,
}


# How many programs there are is decided as the model is traced. Where the layers' own tests trace gradients as well
# (attention, Mamba and Mamba-2, with more than one length), that is not done a second time here.
TRACED = [kind for kind in COMPILED if kind.startswith(("gpt, ", "hybrid", "mamba"))]


@pytest.mark.parametrize("kind, by", [(kind, "eager" if kind in TRACED else "aot_eager") for kind in COMPILED])
def test_two_programs_serve_every_length(kind, by):
    torch._dynamo.reset()
    model, programs = make(kind, COMPILED), []

    def backend(graph, inputs):
        programs.append(graph)
        return torch._dynamo.lookup_backend(by)(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for length in (5, 9, 2, 23):
        torch.testing.assert_close(compiled(tokens(length)), model(tokens(length)))
    assert len(programs) <= 2


@pytest.mark.parametrize("kind", sorted(COMPILED.keys() - {"gpt, sinusoidal", "gpt, relative bias", "toy"}))
@torch.no_grad()
def test_packing_and_decoding_compile_whole(kind):
    torch._dynamo.reset()
    model, ids, reset = make(kind, COMPILED), tokens(), torch.zeros(B, N, dtype=torch.bool)
    reset[:, 4] = True
    compiled = torch.compile(
        lambda ids, cache, reset: model(ids, cache=cache, reset=reset), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(ids, None, reset), model(ids, reset=reset))
    cache, right = model.new_cache(B, N), model(ids, reset=reset)
    found = [compiled(ids[:, :6], cache, reset[:, :6])]
    found += [compiled(one, cache, None) for one in ids[:, 6:].split(1, 1)]
    torch.testing.assert_close(torch.cat(found, 1), right)


@pytest.mark.parametrize("kind", MODELS)
def test_on_the_meta_device(kind):
    for length in (1, N):
        with torch.device("meta"):
            model, ids = MODELS[kind](), torch.empty(B, length, dtype=torch.long)
            scores = model(ids)
            assert scores.is_meta and scores.shape == (B, length, V)
            with torch.no_grad():
                assert model(ids, cache=model.new_cache(B, length)).shape == (B, length, V)
            if kind in PACKING:
                assert model.loss(torch.empty(B, 3, dtype=torch.long), reset=torch.ones(B, 3) > 0).shape == ()


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "ids, error, says",
    [
        (torch.tensor([[0, 13]]), ValueError, r"ids must lie in 0 to 12, got 0 to 13"),
        (torch.zeros(N, dtype=torch.long), ValueError, r"ids must be integers \(B, N\), got torch.int64 \(11,\)"),
        (torch.zeros(B, N), ValueError, r"ids must be integers \(B, N\), got torch.float32 \(2, 11\)"),
        ([[0, 1]], TypeError, r"ids must be a Tensor, got list"),
    ],
)
def test_ids_that_are_none(kind, ids, error, says):
    model = make(kind)
    for call in (model, model.loss, lambda ids: model.generate(ids, 1)):
        with pytest.raises(error, match=says):
            call(ids)


def test_what_a_mixer_does_not_take_is_named():
    model, reset = make("toy"), torch.zeros(B, N, dtype=torch.bool)
    for call in (model, model.loss):
        with pytest.raises(ValueError, match="reset must be left out: the mixer of layer 0, MovingAverage, does not"):
            call(tokens(), reset=reset)

    class Shift(nn.Module):
        def forward(self, x):
            return F.pad(x, (0, 0, 1, -1))

    model = CausalLM(V, E, 1, layer=lambda _: MixerBlock(Shift(), E))
    with pytest.raises(ValueError, match="the mixer of layer 0, Shift, has no new_cache: generate with cached=False"):
        model.generate(tokens(), 3)
    assert model.generate(tokens(), 3, cached=False).shape == (B, N + 3)


@pytest.mark.parametrize(
    "options, error, says",
    [
        ({"positions": Rotary(4)}, TypeError, r"must be LearnedPositions, .* got Rotary; what acts inside attention"),
        ({"positions": Sinusoidal(E), "max_len": 9}, ValueError, "max_len makes a learned table and cannot go with p"),
        ({"positions": Sinusoidal(8)}, ValueError, "positions must be of the width d_model=12, got 8"),
    ],
)
def test_positions_that_do_not_fit(options, error, says):
    with pytest.raises(error, match=says):
        CausalLM(V, E, 1, layer=lambda _: MixerBlock(MovingAverage(), E), **options)


def test_caches_that_do_not_fit():
    model = make("gpt")
    with pytest.raises(TypeError, match="cache must be a list, from new_cache, got KVCache"):
        model(tokens(), cache=model.new_cache(B)[1])
    with pytest.raises(ValueError, match="cache must have one for each of 2 layers, and one for the positions, got 2"):
        model(tokens(), cache=model.new_cache(B)[1:])
    with pytest.raises(TypeError, match="cache must begin with a PositionCache, from new_cache, got KVCache"):
        model(tokens(), cache=[model.new_cache(B)[1]] * 3)
    with pytest.raises(ValueError, match="max_len must be given"):
        make("hybrid").new_cache(B)


# Every kind of cache, and caches in caches. A chunking layer reads one sequence at a time.
CACHED = MODELS | {
    "s4d": lambda: over(partial(S4D, E, 6)),
    "mamba2": lambda: over(partial(Mamba2, E, d_state=5, d_head=4)),
    "retention": lambda: over(partial(Retention, E, 3)),
    "recurrent": lambda: over(lambda: Recurrent(E, LSTM(E, 5))),
    "native sparse attention": lambda: over(partial(NativeSparseAttention, E, 3, block=2, selected=3, window=3)),
    "test-time training": lambda: over(partial(TTTLinear, E, 3, mini_batch=4)),
    "layers in a layer": lambda: over(lambda: Layers([attends(), attends()], E)),
    "chunking": lambda: HNet(E, E, 3, vocabulary=V),
    "chunking, caches in caches": lambda: HNet(E, E, 3, vocabulary=V, layer=lambda d, h: MixerBlock(sparse(d, h), d)),
}


def attends():
    return MixerBlock(MultiHeadAttention(E, 3, causal=True), E)


def sparse(d_model, n_heads):
    return NativeSparseAttention(d_model, n_heads, block=2, selected=3, window=3)


def last_steps(model):
    """What is computed last in each mixer and feed-forward network, and last of all."""
    last = ("out_proj", "linear2", "residual", "norm_f")
    found = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in last]
    return found + [module for module in model.modules() if isinstance(module, (S4D, MovingAverage))]


@pytest.mark.parametrize("kind", CACHED)
@torch.no_grad()
def test_a_layer_that_raises_has_changed_no_cache(kind, held_by):
    """Whichever it is, the caches hold what they held, and the next call gives what is right."""
    model, ids = make(kind, CACHED), tokens(batch=1)
    cache, right = model.new_cache(1, N), model.new_cache(1, N)
    model(ids[:, :4], cache=cache), model(ids[:, :4], cache=right)
    before, steps = held_by(cache), last_steps(model)
    assert len(steps) > 2
    for step in steps:
        handle = step.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, 4:], cache=cache)
        assert held_by(cache) == before
        handle.remove()
    torch.testing.assert_close(model(ids[:, 4:], cache=cache), model(ids[:, 4:], cache=right))
