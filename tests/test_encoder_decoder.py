"""The transformer whole: against torch's own, against its formulas written out, and against itself step by step."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.encoder_decoder import EncoderDecoder, from_torch
from nondual.feed_forward import GatedFeedForward
from nondual.ops import masks
from nondual.ops.attention import attention
from nondual.positional_encoding import LearnedPositions, Sinusoidal
from nondual.search import greedy

B, M, N, E, HEADS, FF, LAYERS, V = 2, 7, 5, 12, 3, 29, 2, 11
LENGTHS = torch.tensor([M, 3])


def draw_ids(*shape, vocabulary=V, seed=1):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SOURCE, TARGET = draw_ids(B, M), draw_ids(B, N, seed=2)

KINDS = {
    "2017": {},
    "pre-norm, learned positions": {
        "norm_first": True,
        "positions": lambda: LearnedPositions(19, E),
        "activation": F.gelu,
    },
    "two vocabularies, untied": {
        "target_vocabulary": 17,
        "tied": False,
        "n_decoder_layers": 1,
        "target_positions": Sinusoidal(E, base=50.0),
    },
    "as in Llama": {"norm_first": True, "norm": nn.RMSNorm, "n_kv_heads": 1, "feed_forward": GatedFeedForward},
    "flash": {"op": FlashAttention(impl="reference", otherwise=attention)},
}


def model(kind="2017", **options):
    torch.manual_seed(0)
    options = KINDS[kind] | options
    if callable(options.get("positions")) and not isinstance(options["positions"], nn.Module):
        options["positions"] = options["positions"]()  # each model its own table
    return EncoderDecoder(V, E, HEADS, FF, LAYERS, **options).eval()


def shaken(model):
    """Every parameter away from its first value, norms and biases too."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


# --- against its formulas, and against torch's own -----------------------------------------------------------------


def written_out(p: dict[str, Tensor], source: Tensor, target: Tensor) -> Tensor:
    """Sections 3.1 to 3.5 of the paper in plain tensor algebra: projections, scores, weights, update, heads and the
    output projection, feed-forward, normalisation, positions, and how they are put together."""

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def attention(x, memory, name, allowed):
        q, k, v = linear(x, f"{name}.q_proj"), linear(memory, f"{name}.k_proj"), linear(memory, f"{name}.v_proj")
        out, d = p[f"{name}.out_proj.bias"], E // HEADS
        for h in range(HEADS):
            own = slice(h * d, (h + 1) * d)
            scores = q[..., own] @ k[..., own].mT / math.sqrt(d)
            weights = scores.exp() * allowed
            weights = weights / weights.sum(-1, keepdim=True)
            out = out + weights @ v[..., own] @ p[f"{name}.out_proj.weight"][:, own].T
        return out

    def network(x, name):
        return linear(linear(x, f"{name}.linear1").clamp(min=0), f"{name}.linear2")

    def embedded(ids):
        where = torch.arange(ids.shape[1], dtype=torch.float64)[:, None]
        angles = where / 10000 ** (torch.arange(0, E, 2, dtype=torch.float64) / E)
        code = torch.empty(ids.shape[1], E, dtype=torch.float64)
        code[:, 0::2], code[:, 1::2] = angles.sin(), angles.cos()
        return p["embeddings.weight"][ids] * math.sqrt(E) + code

    memory, x = embedded(source), embedded(target)
    every, earlier = torch.ones(1, 1), torch.ones(x.shape[1], x.shape[1]).tril()
    for name in (f"encoder.layers.{i}" for i in range(LAYERS)):
        memory = norm(memory + attention(memory, memory, f"{name}.mixer", every), f"{name}.norm1")
        memory = norm(memory + network(memory, f"{name}.feed_forward"), f"{name}.norm2")
    for name in (f"decoder.layers.{i}" for i in range(LAYERS)):
        x = norm(x + attention(x, x, f"{name}.mixer", earlier), f"{name}.norm1")
        x = norm(x + attention(x, memory, f"{name}.cross", every), f"{name}.norm2")
        x = norm(x + network(x, f"{name}.feed_forward"), f"{name}.norm3")
    return x @ p["embeddings.weight"].T


@pytest.mark.claim("E10", "holds")
def test_the_whole_architecture_equals_its_written_out_formulas():
    ours = shaken(model()).double()
    expected = written_out(ours.state_dict(), SOURCE, TARGET)
    torch.testing.assert_close(ours(SOURCE, TARGET), expected, atol=1e-12, rtol=1e-12)


def torchs(norm_first, activation):
    torch.manual_seed(0)
    theirs = nn.Transformer(
        E, HEADS, LAYERS, LAYERS, FF, 0.0, activation=activation, norm_first=norm_first, batch_first=True
    )
    return shaken(theirs.double())


@pytest.mark.claim("E10", "holds")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_stacks_equal_torchs_transformer_forward_and_backward(norm_first, activation, padded):
    theirs = torchs(norm_first, activation)
    encoder, decoder = from_torch(theirs)
    real = masks.padding(LENGTHS, M) if padded else None
    hidden = ~real[:, 0, 0] if padded else None
    given = {"tgt_mask": ~masks.causal(N), "src_key_padding_mask": hidden, "memory_key_padding_mask": hidden}
    results = []
    for run in (
        lambda x, y: decoder(y, encoder(x, mask=real), memory_mask=real),
        lambda x, y: theirs(x, y, **given),
    ):
        x, y = draw(B, M, E).requires_grad_(), draw(B, N, E, seed=2).requires_grad_()
        out = run(x, y)
        out.square().sum().backward()
        results.append((out, x.grad, y.grad))
    for name, a, b in zip(("out", "x", "y"), *results):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")
    for ours, their in ((encoder, theirs.encoder), (decoder, theirs.decoder)):
        torch.testing.assert_close(ours.norm.weight.grad, their.norm.weight.grad)
        for mine, yours in zip(ours.layers, their.layers):
            for a, b in [("mixer", "self_attn"), ("cross", "multihead_attn")][: 2 if ours is decoder else 1]:
                a, b = getattr(mine, a), getattr(yours, b)
                stacked = torch.cat([a.q_proj.weight.grad, a.k_proj.weight.grad, a.v_proj.weight.grad])
                torch.testing.assert_close(stacked, b.in_proj_weight.grad)
                torch.testing.assert_close(a.out_proj.weight.grad, b.out_proj.weight.grad)
            torch.testing.assert_close(mine.feed_forward.linear1.weight.grad, yours.linear1.weight.grad)
            torch.testing.assert_close(mine.norm2.bias.grad, yours.norm2.bias.grad)


def test_torchs_transformer_norms_once_more_than_the_paper():
    """Without that last norm, in post-norm, both are the paper's: pytorch issue 50086."""
    theirs = torchs(False, "relu")
    x, y = draw(B, M, E), draw(B, N, E, seed=2)
    encoder, decoder = from_torch(theirs)
    with_it = decoder(y, encoder(x))
    encoder.norm = decoder.norm = nn.Identity()
    without = decoder(y, encoder(x))
    assert (with_it - without).abs().max() > 0.1
    theirs.encoder.norm = theirs.decoder.norm = None
    torch.testing.assert_close(theirs(x, y, tgt_mask=~masks.causal(N)), without)
    again = from_torch(theirs)
    torch.testing.assert_close(again[1](y, again[0](x)), without)


def test_what_is_no_transformer_of_torchs_is_refused():
    with pytest.raises(TypeError, match=r"theirs must be an nn\.Transformer, got Linear"):
        from_torch(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="theirs must have biases"):
        from_torch(nn.Transformer(E, HEADS, 1, 1, FF, bias=False))
    with pytest.raises(TypeError, match=r"theirs.encoder must be an nn.TransformerEncoder, got Identity"):
        from_torch(nn.Transformer(E, HEADS, 1, 1, FF, custom_encoder=nn.Identity()))


@pytest.fixture(scope="module")
def marian():
    """transformers' translation model of this architecture, with random weights, and ours with copies of them."""
    from transformers import MarianConfig, MarianMTModel

    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in MARIAN.items()}
    config = MarianConfig(
        vocab_size=V, d_model=E, activation_function="relu", scale_embedding=True, max_position_embeddings=16,
        pad_token_id=0, bos_token_id=1, decoder_start_token_id=1, eos_token_id=2, forced_eos_token_id=None,
        dropout=0.0, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = shaken(MarianMTModel(config).double().eval())
    table = theirs.model.encoder.embed_positions.weight  # sines in its first half, cosines in its second
    with torch.no_grad():
        code = Sinusoidal(E).double()(16)
        table.copy_(torch.cat([code[:, 0::2], code[:, 1::2]], 1))
        theirs.model.decoder.embed_positions.weight.copy_(table)
    ours = EncoderDecoder(V, E, HEADS, FF, LAYERS, positions=LearnedPositions(16, E)).double().eval()
    state = {"embeddings.weight": theirs.model.shared.weight, "positions.table.weight": table}
    for name, tensor in theirs.model.state_dict().items():
        if ".layers." in name:
            last = "norm3" if name.startswith("decoder") else "norm2"
            for their, our in (*MARIANS_NAMES, ("final_layer_norm", last)):
                name = name.replace(their, our)
            state[name] = tensor
    ours.load_state_dict(state)
    return ours, theirs


MARIAN = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": FF}
MARIANS_NAMES = (
    ("self_attn_layer_norm", "norm1"),
    ("encoder_attn_layer_norm", "norm2"),
    ("self_attn", "mixer"),
    ("encoder_attn", "cross"),
    ("fc", "feed_forward.linear"),
)


@pytest.mark.claim("E10", "holds")
def test_the_model_equals_the_one_of_transformers_with_copied_weights(marian):
    ours, theirs = marian
    real = masks.padding(LENGTHS, M)[:, 0, 0].long()
    results = []
    for scores, embeddings in (
        (ours(SOURCE, TARGET, source_lengths=LENGTHS), ours.embeddings.weight),
        (theirs(SOURCE, attention_mask=real, decoder_input_ids=TARGET).logits, theirs.model.shared.weight),
    ):
        scores.square().sum().backward()
        results.append((scores, embeddings.grad[1:]))  # transformers' padding, token 0, learns from the scores alone
    for name, a, b in zip(("scores", "embeddings"), *results):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_the_searches_find_what_those_of_transformers_find(marian):
    """Beams are compared without an end token: after one, transformers lets more than K sequences compete."""
    ours, theirs = marian
    real = masks.padding(LENGTHS, M)[:, 0, 0].long()
    given = {"attention_mask": real, "max_new_tokens": 6, "do_sample": False}
    found = ours.generate(SOURCE, 6, bos=1, eos=2, source_lengths=LENGTHS)
    for b, tokens in enumerate(theirs.generate(SOURCE, num_beams=1, **given)):
        length = found.lengths[b, 0]
        assert tokens[1 : 1 + length].tolist() == found.tokens[b, 0, :length].tolist()
    told = theirs.generation_config
    told.eos_token_id = None
    given |= {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0, "return_dict_in_generate": True}
    expected = theirs.generate(SOURCE, generation_config=told, output_scores=True, **given)
    found = ours.generate(SOURCE, 6, bos=1, source_lengths=LENGTHS, beams=4)
    assert torch.equal(found.tokens.flatten(0, 1), expected.sequences[:, 1:])
    torch.testing.assert_close(found.scores.flatten(), expected.sequences_scores.double(), atol=1e-5, rtol=1e-5)


def count(v, e, f, layers, norm_first=False):
    """Embeddings, once; 4 E² + 4 E an attention; 2 E F + F + E a feed-forward network; 2 E a norm."""
    attention, network, norm = 4 * e * e + 4 * e, 2 * e * f + f + e, 2 * e
    return v * e + layers * (3 * attention + 2 * network + 5 * norm) + (2 * norm if norm_first else 0)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_parameters_are_as_many_as_the_formula_says(norm_first):
    ours = model(norm_first=norm_first)
    assert sum(p.numel() for p in ours.parameters()) == count(V, E, FF, LAYERS, norm_first)
    with torch.device("meta"):  # the paper's base model, which it gives as 65 million, with some 37,000 tokens
        base = EncoderDecoder(37000, 512, 8, 2048, 6)
    counted = sum(p.numel() for p in base.parameters())
    assert counted == count(37000, 512, 2048, 6) and abs(counted - 65e6) < 2e6


# --- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_changes_nothing_and_no_score_sees_a_later_token(kind):
    ours = model(kind).double()
    scores = ours(SOURCE, TARGET, source_lengths=LENGTHS)
    other = torch.where(torch.arange(M) < LENGTHS[:, None], SOURCE, draw_ids(B, M, seed=5))
    torch.testing.assert_close(ours(other, TARGET, source_lengths=LENGTHS), scores, atol=1e-12, rtol=1e-12)
    alone = ours(SOURCE[1:, :3], TARGET[1:])
    torch.testing.assert_close(scores[1:], alone, atol=1e-12, rtol=1e-12)
    later = torch.cat([TARGET[:, :3], draw_ids(B, N - 3, seed=6)], 1)
    torch.testing.assert_close(
        ours(SOURCE, later, source_lengths=LENGTHS)[:, :3], scores[:, :3], atol=1e-12, rtol=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_each_pair_by_itself_weighted_by_its_tokens(kind):
    ours = model(kind).double()
    lengths = torch.tensor([N, 3])
    loss = ours.loss(SOURCE, TARGET, source_lengths=LENGTHS, target_lengths=lengths, label_smoothing=0.1)
    first = ours.loss(SOURCE[:1], TARGET[:1], label_smoothing=0.1)
    second = ours.loss(SOURCE[1:, :3], TARGET[1:, :3], label_smoothing=0.1)
    torch.testing.assert_close(loss, (4 * first + 2 * second) / 6, atol=1e-12, rtol=1e-12)
    scores = ours(SOURCE, TARGET[:, :-1])
    for smoothing in (0.0, 0.1):
        plain = F.cross_entropy(scores.flatten(0, 1), TARGET[:, 1:].flatten(), label_smoothing=smoothing)
        torch.testing.assert_close(ours.loss(SOURCE, TARGET, label_smoothing=smoothing), plain)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_step_by_step_with_caches_it_is_the_whole(kind, dtype, bound):
    ours = shaken(model(kind)).to(dtype)
    whole = ours(SOURCE, TARGET, source_lengths=LENGTHS)
    memory, cache = ours.encode(SOURCE, source_lengths=LENGTHS), ours.new_cache(B, N)
    projected = ours.decoder.project(memory)
    parts = [
        ours.decode(part, projected, source_lengths=LENGTHS, cache=cache) for part in TARGET.split([2, 1, 1, 1], 1)
    ]
    assert (torch.cat(parts, 1) - whole).abs().max() <= bound * whole.abs().max()
    state = ours.start(SOURCE, N, source_lengths=LENGTHS)
    for n in range(N):
        log_probs, state = ours.step(TARGET[:, n], state)
        assert (log_probs - whole[:, n].log_softmax(-1)).abs().max() <= bound * whole.abs().max()


def test_the_weights_over_the_source_are_those_that_the_decoder_reads_with():
    ours = model().double()
    scores, weights = ours(SOURCE, TARGET, source_lengths=LENGTHS, return_weights=True)
    assert weights.shape == (LAYERS, B, HEADS, N, M)
    torch.testing.assert_close(scores, ours(SOURCE, TARGET, source_lengths=LENGTHS), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(LAYERS, B, HEADS, N, dtype=torch.float64))
    assert (weights[:, 1, ..., 3:] == 0).all()


def test_source_and_target_share_one_table_and_the_scores_use_it_too():
    ours = model()
    assert ours.source_embeddings is None and ours.lm_head is None
    assert [name for name in ours.state_dict() if "embeddings" in name] == ["embeddings.weight"]
    apart = model("two vocabularies, untied")
    assert apart.source_embeddings.num_embeddings == V and apart.embeddings.num_embeddings == 17
    assert apart(SOURCE, TARGET).shape == (B, N, 17) and len(apart.decoder.layers) == 1
    size = torch.stack([ours.embeddings.weight.std() * math.sqrt(E), ours.embeddings(SOURCE).std() * math.sqrt(E)])
    torch.testing.assert_close(size, torch.ones(2), atol=0.35, rtol=0)


def test_the_target_may_have_positions_of_its_own():
    other = Sinusoidal(E, base=50.0)
    both, read, written = model(target_positions=other), model(), model(positions=other)
    memory = both.encode(SOURCE)
    assert torch.equal(memory, read.encode(SOURCE)) and not torch.equal(memory, written.encode(SOURCE))
    scores = both.decode(TARGET, memory)
    assert torch.equal(scores, written.decode(TARGET, memory)) and not torch.equal(scores, read.decode(TARGET, memory))


# --- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"beams": 3, "length_penalty": 0.6}, {"temperature": 1.3, "top_k": 5}])
def test_generation_with_caches_and_without_gives_the_same(kind, options):
    ours = shaken(model(kind)).double()
    found = []
    for cached in (True, False):
        options = options | ({"generator": torch.manual_seed(4)} if "temperature" in options else {})
        found.append(ours.generate(SOURCE, 8, bos=1, eos=2, source_lengths=LENGTHS, cached=cached, **options))
    assert torch.equal(found[0].tokens, found[1].tokens) and torch.equal(found[0].lengths, found[1].lengths)
    torch.testing.assert_close(found[0].scores, found[1].scores)
    assert found[0].tokens.shape[:2] == (B, options.get("beams", 1)) and not found[0].scores.requires_grad


@torch.no_grad()
def test_the_score_of_what_is_found_is_the_models_own_and_one_beam_is_greedy():
    ours = shaken(model()).double()
    found = ours.generate(SOURCE, 8, bos=1, eos=2, source_lengths=LENGTHS, beams=4)
    for b in range(B):
        for tokens, score, length in zip(found.tokens[b], found.scores[b], found.lengths[b]):
            target = torch.cat([torch.tensor([1]), tokens[:length]])[None]
            log_probs = ours(SOURCE[b : b + 1, : LENGTHS[b]], target[:, :-1]).log_softmax(-1)
            torch.testing.assert_close(score, log_probs[0].gather(1, target[0, 1:, None]).sum())
    one = ours.generate(SOURCE, 8, bos=1, eos=2)
    alone = greedy(ours.step, torch.tensor([1, 1]), ours.start(SOURCE, 8), max_len=8, eos=2)
    assert all(torch.equal(a, b) for a, b in zip(one, alone))
    assert one.tokens[0, 0, 0] == ours(SOURCE, torch.ones(B, 1, dtype=torch.long))[0, 0].argmax()


@torch.no_grad()
def test_the_memory_is_projected_once_a_source_and_follows_the_beams():
    ours = model().double()
    calls = []
    for layer in ours.decoder.layers:
        layer.cross.k_proj.register_forward_hook(lambda *_: calls.append(1))
    ours.generate(SOURCE, 8, bos=1, beams=3)
    assert len(calls) == LAYERS
    state = ours.start(SOURCE, 4)
    same = state.select(torch.tensor([0, 1]))
    assert same.memory is state.memory and same.cache is not state.cache
    other = state.select(torch.tensor([1, 1, 0]))
    assert torch.equal(other.memory[0].keys, state.memory[0].keys[[1, 1, 0]]) and other.rows.tolist() == [1, 1, 0]
    within = other.select(torch.tensor([1, 0, 2]))  # two beams of one source change places
    assert within.memory is other.memory


def test_learned_positions_end_where_they_end():
    ours = model(positions=LearnedPositions(9, E))
    assert ours.generate(SOURCE, 9, bos=1).tokens.shape == (B, 1, 9)
    with pytest.raises(ValueError, match="max_len must be 9 or less, as many positions as there are, got 10"):
        ours.generate(SOURCE, 10, bos=1)
    with pytest.raises(ValueError, match="positions must lie in 0 to 8"):
        ours(SOURCE, draw_ids(B, 10))


# --- what is refused -----------------------------------------------------------------------------------------------

CALLS = {
    "forward": lambda ours, source, target, **more: ours(source, target, **more),
    "loss": lambda ours, source, target, **more: ours.loss(source, target, **more),
    "generate": lambda ours, source, target, **more: ours.generate(source, 4, bos=1, **more),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"source": SOURCE + V}, ValueError, f"source must lie in 0 to {V - 1}"),
        ({"source": SOURCE - 5}, ValueError, f"source must lie in 0 to {V - 1}, got -"),
        ({"source": SOURCE.float()}, ValueError, r"source must be integers \(B, N\), got torch.float32"),
        ({"source": SOURCE[:, :0]}, ValueError, r"source must hold a token or more a row, got \(2, 0\)"),
        ({"source": SOURCE.tolist()}, TypeError, "source must be a Tensor, got list"),
        ({"source_lengths": LENGTHS - 3}, ValueError, f"source_lengths must lie in 1 to {M}, got 0 to 4"),
        ({"source_lengths": LENGTHS + 1}, ValueError, f"source_lengths must lie in 1 to {M}, got 4 to 8"),
        ({"source_lengths": LENGTHS[:1]}, ValueError, r"source_lengths must be \(B,\) = \(2,\), got \(1,\)"),
        ({"source_lengths": LENGTHS.float()}, ValueError, r"lengths must be integers \(B,\), got torch.float32"),
    ],
)
def test_a_source_that_does_not_fit_is_refused_with_one_clear_sentence(call, change, error, says):
    with pytest.raises(error, match=says):
        CALLS[call](model(), **({"source": SOURCE, "target": TARGET} | change))


@pytest.mark.parametrize(
    "run, says",
    [
        (lambda m: m(SOURCE, TARGET + V), f"target must lie in 0 to {V - 1}"),
        (lambda m: m(SOURCE, TARGET[:1]), "source and target must have one batch, got 2 and 1"),
        (lambda m: m.loss(SOURCE, TARGET[:, :1]), r"target must have 2 tokens or more a row for a loss, got \(2, 1\)"),
        (
            lambda m: m.loss(SOURCE, TARGET, target_lengths=torch.tensor([N, 1])),
            f"target_lengths must lie in 2 to {N}, got 1 to {N}",
        ),
        (lambda m: m.loss(SOURCE, TARGET, label_smoothing=1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda m: m.generate(SOURCE, 0, bos=1), "max_len must be 1 or more, got 0"),
        (lambda m: m.generate(SOURCE, 4, bos=V), f"bos must lie in 0 to {V - 1}, got {V}"),
        (lambda m: m.generate(SOURCE, 4, bos=1, eos=-1), f"eos must lie in 0 to {V - 1}, got -1"),
        (lambda m: m.generate(SOURCE, 4, bos=1, beams=0), "beams must be 1 or more, got 0"),
        (lambda m: m.generate(SOURCE, 4, bos=1, temperature=0.0), "temperature must be above 0, got 0.0"),
        (lambda m: m.generate(SOURCE, 4, bos=1, top_k=2), "top_k and top_p must go with a temperature, got 2"),
        (
            lambda m: m.generate(SOURCE, 4, bos=1, beams=2, temperature=1.0),
            "beams must be 1 where tokens are drawn at a temperature, got 2",
        ),
        (
            lambda m: m.decode(TARGET, m.encode(SOURCE), cache=m.new_cache(B, N)[1:]),
            "cache must have one for the positions and one for each of 2 layers, got 2",
        ),
        (lambda m: m.decode(TARGET, m.encode(SOURCE)[0]), r"memory must be \(B, M, E\), got \(7, 12\)"),
        (lambda m: EncoderDecoder(V, E, HEADS, FF, 0), "n_layers must be 1 or more, got 0"),
        (lambda m: EncoderDecoder(V, E, HEADS, FF, 1, target_vocabulary=0), "target_vocabulary must be 1 or more"),
        (lambda m: EncoderDecoder(V, E, HEADS, FF, 1, positions=Sinusoidal(8)), "width d_model=12, got 8"),
    ],
)
def test_bad_input_is_refused_with_one_clear_sentence(run, says):
    with pytest.raises(ValueError, match=says), torch.no_grad():
        run(model())


def test_what_is_of_the_wrong_kind_is_refused():
    with pytest.raises(TypeError, match=r"positions must be LearnedPositions, Sinusoidal .*, got int"):
        EncoderDecoder(V, E, HEADS, FF, 1, positions=512)
    with pytest.raises(TypeError, match=r"memory must be a Tensor .* or a list from decoder.project, got another list"):
        model().decode(TARGET, [])


@torch.no_grad()
def test_whatever_raises_leaves_the_caches_as_they_were():
    ours = model().double()
    state = ours.start(SOURCE, N)
    _, state = ours.step(TARGET[:, 0], state)

    def fails(*_):
        raise KeyboardInterrupt

    handle = ours.decoder.layers[1].cross.register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        ours.step(TARGET[:, 1], state)
    handle.remove()
    with pytest.raises(ValueError, match="target must lie in"):
        ours.step(TARGET[:, 1] + V, state)
    with pytest.raises(ValueError, match=r"tokens must be \(R,\), one a row, got \(2, 5\)"):
        ours.step(TARGET, state)
    assert [one.length for one in state.cache] == [1] * (LAYERS + 1)
    for n in range(1, N):
        log_probs, state = ours.step(TARGET[:, n], state)
        expected = ours(SOURCE, TARGET)[:, n].log_softmax(-1)
        torch.testing.assert_close(log_probs, expected, atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match=f"cache holds {N} positions, and {N + 1} were asked of it"):
        ours.step(TARGET[:, 0], state)


# --- where else it runs --------------------------------------------------------------------------------------------


def test_compiled_for_several_lengths():
    torch._dynamo.reset()
    ours = EncoderDecoder(V, E, HEADS, FF, 1).eval()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for m, n in ((5, 4), (9, 7)):
        source, target, lengths = draw_ids(B, m), draw_ids(B, n, seed=2), torch.tensor([m, m - 2])
        expected = ours(source, target, source_lengths=lengths)
        torch.testing.assert_close(compiled(source, target, source_lengths=lengths), expected, atol=1e-5, rtol=1e-4)


def test_under_autocast_it_trains_and_writes():
    ours = model()
    plain = ours.loss(SOURCE, TARGET, label_smoothing=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours.loss(SOURCE, TARGET, label_smoothing=0.1)
        found = ours.generate(SOURCE, 6, bos=1, eos=2, beams=3)
    assert loss.dtype == torch.float32 and found.scores.dtype == torch.float32
    torch.testing.assert_close(loss, plain, atol=0.05, rtol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


def test_in_half_precision_and_on_meta():
    ours = model().bfloat16()
    assert ours(SOURCE, TARGET).dtype == torch.bfloat16 and ours.loss(SOURCE, TARGET).dtype == torch.float32
    found = ours.generate(SOURCE.to(torch.uint8), 4, bos=1, beams=2)
    assert found.tokens.dtype == torch.int64 and found.scores.dtype == torch.float32
    with torch.device("meta"):
        empty = EncoderDecoder(V, E, HEADS, FF, LAYERS)
        ids = torch.zeros(B, M, dtype=torch.long)
        assert empty(ids, ids).shape == (B, M, V)


@pytest.mark.gpu
def test_on_a_gpu_it_gives_what_it_gives_on_the_cpu():
    ours = shaken(model()).double()
    options = {"bos": 1, "eos": 2, "beams": 3, "length_penalty": 0.6}
    expected = ours.generate(SOURCE, 8, source_lengths=LENGTHS, **options)
    loss = ours.loss(SOURCE, TARGET, source_lengths=LENGTHS, label_smoothing=0.1)
    ours, source, lengths = ours.cuda(), SOURCE.cuda(), LENGTHS.cuda()
    found = ours.generate(source, 8, source_lengths=lengths, **options)
    assert torch.equal(found.tokens.cpu(), expected.tokens) and torch.equal(found.lengths.cpu(), expected.lengths)
    torch.testing.assert_close(found.scores.cpu(), expected.scores)
    on_gpu = ours.loss(source, TARGET.cuda(), source_lengths=lengths, label_smoothing=0.1)
    torch.testing.assert_close(on_gpu.cpu(), loss)
    drawn = ours.generate(source, 8, bos=1, eos=2, temperature=1.0, top_p=0.9)
    assert drawn.tokens.device.type == "cuda"


def test_dropout_is_for_training_only():
    ours = model(dropout=0.5)
    assert torch.equal(ours(SOURCE, TARGET), ours(SOURCE, TARGET))
    ours.train()
    assert not torch.equal(ours(SOURCE, TARGET), ours(SOURCE, TARGET))


def test_a_small_one_learns_to_write_backwards():
    """Every token of the target is another of the source: nothing but attention over the source can tell which."""
    torch.manual_seed(0)
    ours = EncoderDecoder(8, 32, 4, 64, 1, norm_first=True)
    generator = torch.Generator().manual_seed(1)

    def pairs(n):
        source = torch.randint(3, 8, (n, 4), generator=generator)
        ends = [torch.full((n, 1), token) for token in (1, 2)]
        return source, torch.cat([ends[0], source.flip(1), ends[1]], 1)

    adam = torch.optim.AdamW(ours.parameters(), 3e-3)
    for _ in range(150):
        adam.zero_grad()
        ours.loss(*pairs(64)).backward()
        adam.step()
    source, target = pairs(100)
    found = ours.eval().generate(source, 5, bos=1, eos=2, beams=2)
    right = (found.tokens[:, 0] == target[:, 1:]).all(1).double().mean()
    assert right > 0.9, f"{right:.2f} of the sequences are right"
