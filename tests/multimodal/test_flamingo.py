"""Flamingo: the language model to the bit at gate 0, who sees which image, caches, gradients, judges, what is refused.

The resampler is tested in test_perceiver.py, what Flamingo shares with LLaVA in test_image_text.py.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nondual.efficient_attention.mamba import Mamba
from nondual.language_models.causal import CausalLM
from nondual.language_models.gpt import GPT
from nondual.multimodal.flamingo import Flamingo, GatedCrossAttention, MediaCache, last_image
from nondual.multimodal.perceiver import PerceiverResampler
from nondual.relative_positions import Rotary
from nondual.training import optimiser
from nondual.transformer_layer import MixerBlock

V, E, D, R, MARK = 31, 12, 10, 3, 5

LANGUAGE_MODELS = {
    "learned positions": lambda: GPT(V, E, 3, 3, max_len=40, dropout=0.1),
    "rotary": lambda: GPT(V, E, 3, 3, positions=Rotary(4), dropout=0.1),
    "mamba": lambda: CausalLM(V, E, 3, layer=lambda _: MixerBlock(Mamba(E, d_state=4), E)),
    "wide residual": lambda: CausalLM(
        V, E, 3, layer=lambda _: MixerBlock(Mamba(E, d_state=4), E), residual_in_fp32=True
    ),
}


def made(kind="rotary", seed=0, opened=True, **more):
    torch.manual_seed(seed)
    model = LANGUAGE_MODELS[kind]()
    resampler = PerceiverResampler(D, R, n_layers=1, n_heads=2, d_head=4, n_frames=more.pop("n_frames", 1))
    flamingo = Flamingo(
        nn.Identity(), model, resampler, **(dict(mark=MARK, d_vision=D, n_heads=2, d_head=4, d_ff=17) | more)
    )
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
        if opened:
            for layer in flamingo.gated_layers:
                layer.attention_gate.fill_(0.8)
                layer.feed_forward_gate.fill_(-0.6)
    return flamingo.eval()


def text(places, batch=None, n=9, seed=1):
    """ids with a mark at each (row, place)."""
    ids = torch.randint(MARK + 1, V, (batch or max(row for row, _ in places) + 1, n), generator=draw(seed))
    for row, place in places:
        ids[row, place] = MARK
    return ids


def draw(seed):
    return torch.Generator().manual_seed(seed)


def pictures(count, s=7, seed=2):
    return torch.randn(count, s, D, generator=draw(seed))


TWO_AND_ONE = [(0, 1), (0, 5), (1, 3)]


# --- gates at 0: the language model, to the bit ----------------------------------------------------------------------


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@torch.no_grad()
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_at_gate_0_it_is_the_language_model_to_the_bit(kind):
    flamingo = made(kind, opened=False)
    ids, images = text(TWO_AND_ONE), pictures(3)
    alone = copy.deepcopy(flamingo.language_model)
    assert same_bits(flamingo(ids, images), alone(ids))
    assert same_bits(flamingo(ids, 1e6 * images), alone(ids))
    for layer in flamingo.gated_layers:
        layer.attention_gate.fill_(1e-3)
    assert not torch.equal(flamingo(ids, images), alone(ids))


@torch.no_grad()
def test_at_gate_0_generation_is_the_language_models():
    flamingo = made(opened=False)
    ids = text(TWO_AND_ONE)
    scores = flamingo.language_model(ids)[:, -1]
    assert int(scores.argmax(-1).max()) >= 0
    right = ids
    for _ in range(5):
        scores = flamingo.language_model(right)[:, -1]
        scores[:, MARK] = -torch.inf
        right = torch.cat([right, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(flamingo.generate(ids, 5, pictures(3)), right)


def test_the_gates_open_in_training_and_the_language_model_stays_as_it_was():
    flamingo = made(opened=False)
    before = {name: p.clone() for name, p in flamingo.language_model.state_dict().items()}
    flamingo.train()
    adam = optimiser(flamingo, 1e-2)
    ids, images = text(TWO_AND_ONE), pictures(3)
    losses = []
    for _ in range(30):
        loss = flamingo.loss(ids, images)
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    assert all(bool((layer.openness().abs() > 1e-3).all()) for layer in flamingo.gated_layers)
    assert all(torch.equal(before[name], p) for name, p in flamingo.language_model.state_dict().items())


def test_without_gates_both_terms_count_in_full_from_the_start():
    flamingo = made(opened=False, gated=False)
    ids, images = text(TWO_AND_ONE), pictures(3)
    assert not any("gate" in name.rpartition(".")[2] for name, _ in flamingo.named_parameters())
    assert flamingo.gated_layers[0].openness().tolist() == [1, 1]
    with torch.no_grad():
        assert not torch.allclose(flamingo(ids, images), flamingo.language_model(ids), atol=1e-3)
        layer, x, media = flamingo.gated_layers[0], torch.randn(2, 5, E), torch.randn(2, 4, D)
        right = x + layer.mixer(layer.norm(x), media)
        torch.testing.assert_close(layer(x, media), right + layer.feed_forward(right))


# --- frozen ----------------------------------------------------------------------------------------------------------


def test_the_language_model_stays_in_evaluation_mode_and_without_gradients():
    flamingo = made("learned positions").train()
    assert flamingo.training and flamingo.resampler.training
    assert not any(m.training for m in flamingo.language_model.modules())
    ids, images = text(TWO_AND_ONE), pictures(3)
    assert torch.equal(flamingo(ids, images), flamingo(ids, images))  # dropout would differ
    flamingo.loss(ids, images).backward()
    new = {name for name, p in flamingo.named_parameters() if not name.startswith("language_model.")}
    assert {name for name, p in flamingo.named_parameters() if p.grad is not None} == new
    assert set(flamingo.trained_state_dict()) == new
    held = {id(p) for group in optimiser(flamingo, 1e-3).param_groups for p in group["params"]}
    assert held == {id(p) for name, p in flamingo.named_parameters() if name in new}


def test_no_gradient_goes_below_the_first_gated_layer():
    flamingo = made(before=[2])
    reached = []
    for i, layer in enumerate(flamingo.language_model.layers):
        layer.register_forward_hook(lambda _, __, out, i=i: reached.append((i, out.requires_grad)))
    flamingo.loss(text(TWO_AND_ONE), pictures(3))
    assert reached == [(0, False), (1, False), (2, True)]


# --- who sees which image --------------------------------------------------------------------------------------------


def test_the_last_image_by_hand():
    marked = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    assert last_image(marked).tolist() == [[0, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]]
    reset = torch.tensor([[0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    assert last_image(marked, reset).tolist() == [[0, 1, 1, 0, 2, 2], [1, 1, 0, 0, 0, 2], [0, 0, 0, 0, 0, 0]]


def test_a_token_sees_the_last_image_before_it_and_no_other():
    """Of the first gated layer alone: above it the language model carries what one token saw on to the next."""
    flamingo = made(before=[0])
    ids, images = text([(0, 2), (0, 5)]), pictures(2).requires_grad_()
    found = {}
    flamingo.gated_layers[0].mixer.register_forward_hook(lambda _, __, out: found.update(seen=out))
    flamingo(ids, images)
    seen = found["seen"][0]  # (N, E)
    reach = [
        [bool(torch.autograd.grad(row.sum(), images, retain_graph=True)[0][i].any()) for i in (0, 1)] for row in seen
    ]
    assert reach == [[False, False]] * 2 + [[True, False]] * 3 + [[False, True]] * 4
    assert torch.equal(seen[:2], torch.zeros(2, E))  # nothing at all, and no NaN
    assert seen[2:].abs().amin(0).min() > 0


@torch.no_grad()
def test_text_before_the_first_image_does_not_depend_on_it():
    flamingo = made()
    ids = text([(0, 4)])
    one, other = flamingo(ids, pictures(1)), flamingo(ids, pictures(1, seed=3))
    assert torch.equal(one[:, :4], other[:, :4])
    assert (one[:, 4:] - other[:, 4:]).abs().amax((0, 2)).min() > 1e-4
    torch.testing.assert_close(one[:, :4], flamingo(ids[:, :4]))  # as text without an image
    assert one.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_rows_with_different_numbers_of_images_are_as_each_alone(kind):
    flamingo = made(kind)
    ids, images = text(TWO_AND_ONE, batch=3), pictures(3)
    whole = flamingo(ids, images)
    for row, which in enumerate(([0, 1], [2], [])):
        given = images[which] if which else None
        torch.testing.assert_close(whole[row : row + 1], flamingo(ids[row : row + 1], given), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_packed_sequences_are_as_each_alone(kind):
    flamingo = made(kind)
    ids, images = text([(0, 1), (0, 7)], n=11), pictures(2)
    reset = torch.zeros(1, 11, dtype=torch.bool)
    reset[0, 4] = True  # the text from 4 on has no image up to 7, though the row has one before it
    whole = flamingo(ids, images, reset=reset)
    torch.testing.assert_close(whole[:, :4], flamingo(ids[:, :4], images[:1]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole[:, 4:], flamingo(ids[:, 4:], images[1:]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_videos():
    flamingo = made(n_frames=4)
    ids = text(TWO_AND_ONE)
    videos = torch.randn(3, 2, 7, D, generator=draw(4))
    whole = flamingo(ids, videos)
    torch.testing.assert_close(whole[1:], flamingo(ids[1:], videos[2:]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole, flamingo(ids, videos.flip(1)), atol=1e-4)
    assert flamingo.tokens(videos).shape == (3, R, D)
    with pytest.raises(ValueError, match=r"images must be videos \(I, T, …\), up to 4 frames, got \(3, 7\)"):
        flamingo.tokens(torch.randn(3, 7))


# --- judges and gradients --------------------------------------------------------------------------------------------


@pytest.mark.claim("A6.4", "holds if")
def test_the_gated_layer_is_idefics():
    """transformers' gated cross-attention, with our norms and feed-forward network put into it."""
    from transformers import IdeficsConfig
    from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

    torch.manual_seed(0)
    heads = 3
    config = IdeficsConfig(
        hidden_size=E, num_attention_heads=heads, vision_config={"embed_dim": D}, alpha_initializer="random",
        alphas_initializer_range=1.0, alpha_type="vector", dropout=0.0, qk_layer_norms=False,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = IdeficsGatedCrossAttentionLayer(config).eval()
    ours = GatedCrossAttention(E, D, n_heads=heads, d_head=E // heads, d_ff=17)
    with torch.no_grad():
        for name, gate in (("alpha_cross_attn", 0.7), ("alpha_dense", -1.3)):
            getattr(theirs, name).fill_(gate)
        ours.attention_gate.fill_(0.7)
        ours.feed_forward_gate.fill_(-1.3)
    theirs.input_layernorm, theirs.post_attention_layernorm = ours.norm, nn.Identity()
    theirs.mlp = ours.feed_forward
    cross = theirs.cross_attn
    for mine, its in zip("qkv", (cross.q_proj, cross.k_proj, cross.v_proj)):
        getattr(ours.mixer, f"{mine}_proj").weight.data = its.weight.data.clone()
    ours.mixer.out_proj.weight.data = cross.o_proj.weight.data.clone()

    x, media = torch.randn(2, 9, E), torch.randn(2, 2 * R, D)
    marked = text([(0, 1), (0, 5), (1, 0), (1, 3)]) == MARK
    last = last_image(marked)
    allowed = (last[..., None] == torch.arange(1, 3).repeat_interleave(R))[:, None]
    pairs = []
    for layer in ("ours", "theirs"):
        a, b = x.clone().requires_grad_(), media.clone().requires_grad_()
        if layer == "ours":
            out = ours(a, b, mask=allowed)
        else:
            added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
            out = theirs(a, image_hidden_states=b, image_attention_mask=added, cross_attention_gate=(last > 0).float())
        out.backward(torch.ones_like(out) * torch.linspace(-1, 1, E))
        pairs.append((out, a.grad, b.grad))
    for mine, its in zip(*pairs):
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)
    for name in ("q_proj", "k_proj", "v_proj"):
        mine, its = getattr(ours.mixer, name), getattr(cross, name)
        torch.testing.assert_close(mine.weight.grad, its.weight.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.attention_gate.grad, theirs.alpha_cross_attn.grad.sum(), atol=1e-4, rtol=1e-4)


def test_every_gradient_by_finite_differences():
    torch.manual_seed(0)
    layer = GatedCrossAttention(4, 3, n_heads=2, d_head=2, d_ff=5).double()
    with torch.no_grad():
        layer.attention_gate.fill_(0.4)
        layer.feed_forward_gate.fill_(-0.9)
    names = [name for name, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    x, media = torch.randn(1, 5, 4).double().requires_grad_(), torch.randn(1, 4, 3).double().requires_grad_()
    mask = (last_image(torch.tensor([[0, 1, 0, 1, 0]]).bool())[..., None] == torch.tensor([1, 1, 2, 2]))[:, None]

    def call(x, media, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), (x, media), {"mask": mask})

    assert torch.autograd.gradcheck(call, (x, media, *values))


# --- caches ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["learned positions", "rotary", "mamba"])
@pytest.mark.parametrize("cuts", [(4, 5), (1, 1, 7), (3, 1, 1, 1, 3)])
def test_in_parts_as_in_one_even_where_images_come_later(kind, cuts):
    flamingo = made(kind)
    ids, images = text([(0, 1), (0, 5), (1, 3), (1, 4), (1, 8)], batch=3), pictures(5)
    whole = flamingo(ids, images)
    order = {(row, place): i for i, (row, place) in enumerate((ids == MARK).nonzero().tolist())}
    cache, start, parts = flamingo.new_cache(3, 9), 0, []
    for cut in cuts:
        part = ids[:, start : start + cut]
        which = [order[row, start + place] for row, place in (part == MARK).nonzero().tolist()]
        parts.append(flamingo(part, images[which] if which else None, cache=cache))
        start += cut
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_reset_in_a_later_part_forgets_the_image():
    flamingo = made()
    ids, images = text([(0, 1)], n=8), pictures(1)
    reset = torch.zeros(1, 8, dtype=torch.bool)
    reset[0, 6] = True
    whole = flamingo(ids, images, reset=reset)
    cache = flamingo.new_cache(1, 8)
    one = flamingo(ids[:, :5], images, cache=cache)
    two = flamingo(ids[:, 5:7], cache=cache, reset=reset[:, 5:7])
    assert not cache[-1].held.any()
    three = flamingo(ids[:, 7:], cache=cache)
    torch.testing.assert_close(torch.cat([one, two, three], 1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_cache_holds_one_image_a_row_whatever_their_number():
    flamingo = made()
    cache = flamingo.new_cache(2, 9)
    flamingo(text(TWO_AND_ONE), pictures(3), cache=cache)
    assert isinstance(cache[-1], MediaCache) and len(cache[-1].memories) == 3
    assert cache[-1].memories[0].keys.shape == (2, 2, R, 4)
    chosen = cache[-1].select(torch.tensor([1, 1, 0]))
    assert chosen.batch == 3 and chosen.held.tolist() == [True] * 3
    assert torch.equal(chosen.memories[2].values, cache[-1].memories[2].values[[1, 1, 0]])


def test_what_cannot_be_made_is_refused():
    model = LANGUAGE_MODELS["rotary"]()
    for more, error, says in (
        (dict(every=0), ValueError, r"every must be 1 or more, got 0"),
        (dict(before=[0, 3]), ValueError, r"before must name layers of 0 to 2, each once, got \[0, 3\]"),
        (dict(before=[1, 1]), ValueError, r"each once, got \[1, 1\]"),
        (dict(before=[]), ValueError, r"got \[\]"),
        (dict(mark=V), ValueError, r"mark must be an id of the language model, 0 to 30, got 31"),
        (dict(d_vision=0), ValueError, r"d_vision must be 1 or more, got 0"),
    ):
        with pytest.raises(error, match=says):
            Flamingo(nn.Identity(), model, PerceiverResampler(D, R), **(dict(mark=MARK, d_vision=D) | more))
    with pytest.raises(TypeError, match=r"language_model must be a CausalLM, got Linear"):
        Flamingo(nn.Identity(), nn.Linear(2, 2), PerceiverResampler(D, R), mark=MARK, d_vision=D)
    flamingo = made()
    flamingo.resampler = nn.Linear(D, D + 1)
    with pytest.raises(ValueError, match=r"resampler must give \(I, R, d_vision\) = \(3, R, 10\), got \(3, 7, 11\)"):
        flamingo(text(TWO_AND_ONE), pictures(3))
    assert made(every=2).before == (0, 2)
    assert made(every=2).extra_repr() == "mark=5, before=[0, 2]"


# --- a real language model -------------------------------------------------------------------------------------------


@pytest.mark.claim("A6.4", "holds if")
@torch.no_grad()
def test_at_gate_0_it_is_smollm2_to_the_bit_and_the_images_matter_once_the_gates_are_open():
    from nondual.pretrained import our_smollm2

    model, tokenizer = our_smollm2()
    (mark,) = tokenizer.convert_tokens_to_ids(["<file_sep>"])
    torch.manual_seed(0)
    width = model.embeddings.embedding_dim
    resampler = PerceiverResampler(64, 4, n_layers=1, n_heads=2, d_head=16)
    flamingo = Flamingo(nn.Identity(), model, resampler, mark=mark, d_vision=64, every=10, n_heads=2, d_head=16)
    ids = tokenizer("<file_sep>The picture shows a<file_sep> small dog", return_tensors="pt").input_ids
    assert int((ids == mark).sum()) == 2
    images = torch.randn(2, 49, 64)
    assert same_bits(flamingo(ids, images), model(ids))
    assert flamingo.gated_layers[0].mixer.q_proj.in_features == width
    for layer in flamingo.gated_layers:
        layer.attention_gate.fill_(0.5)
    assert not torch.allclose(flamingo(ids, images), flamingo(ids, images.flip(0)), atol=1e-3)


def test_the_loss_is_the_cross_entropy_of_the_text():
    flamingo = made()
    ids, images = text(TWO_AND_ONE), pictures(3)
    scores, targets = flamingo(ids, images)[:, :-1], ids[:, 1:].masked_fill(ids[:, 1:] == MARK, -100)
    right = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(flamingo.loss(ids, images), right)
