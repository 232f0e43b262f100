"""LLaVA: where each vector goes, by hand; every part against the language model given the same embeddings; programs.

Whole models are judged by transformers' in tests/pretrained/test_llava.py; what LLaVA shares with Flamingo is tested in
test_image_text.py.
"""

import re

import pytest
import torch
from torch import nn

from nondual.language_models.gpt import GPT
from nondual.multimodal.llava import Llava, PatchFeatures, PositionsRead, Projector, places
from nondual.multimodal.towers import AttentionPool, VisionTower
from nondual.relative_positions import Rotary
from nondual.training import optimiser

V, E, D, S, MARK = 31, 12, 10, 4, -200


def made(seed=0, learned=False, layers=2, **more):
    torch.manual_seed(seed)
    kind = dict(max_len=24) if learned else dict(positions=Rotary(4))
    model = GPT(V, E, 2, 3, dropout=0.1, **kind)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return Llava(nn.Identity(), model, Projector(D, E, layers=layers), **(dict(mark=MARK, d_vision=D) | more)).eval()


def text(places, batch=None, n=7, seed=1):
    ids = torch.randint(
        V, (batch or max(row for row, _ in places) + 1, n), generator=torch.Generator().manual_seed(seed)
    )
    for row, place in places:
        ids[row, place] = MARK
    return ids


def pictures(count, s=S, seed=2):
    return torch.randn(count, s, D, generator=torch.Generator().manual_seed(seed))


def by_hand(llava, ids, images):
    """Scores of one row: embeddings joined one by one, and the scores of each id's last vector."""
    model, parts, ends, image = llava.language_model, [], [], iter(images)
    for token in ids.tolist():
        parts.append(llava.projector(next(image)) if token == MARK else model.embeddings.weight[token][None])
        ends.append(sum(map(len, parts)) - 1)
    return model.scores(model.hidden(torch.cat(parts)[None]))[0, ends]


def test_places_by_hand():
    marked = torch.tensor([[0, 1, 0], [0, 0, 0]]).bool()
    source, end, fill = places(marked, 3, 5)
    assert source.tolist() == [[0, 6, 7, 8, 2], [3, 3, 3, 4, 5]]  # 6 embeddings; then the image's vectors
    assert end.tolist() == [[0, 3, 4], [2, 3, 4]]
    assert fill.tolist() == [0, 2]
    source, end, fill = places(torch.tensor([[1, 1], [0, 1]]).bool(), 2, 4)
    assert source.tolist() == [[4, 5, 6, 7], [2, 2, 8, 9]]
    assert end.tolist() == [[1, 3], [1, 3]]
    source, end, _ = places(torch.tensor([[0, 1, 0]]).bool(), 1, 3)
    assert source.tolist() == [[0, 3, 2]] and end.tolist() == [[0, 1, 2]]


@torch.no_grad()
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    "marks", [[(0, 2)], [(0, 0)], [(0, 6)], [(0, 1), (0, 2)], [(0, 1), (0, 5), (1, 3)], [(0, 3), (1, 1), (2, 6)], []]
)
def test_scores_are_those_of_the_language_model_with_the_vectors_in_place(marks, learned):
    llava = made(learned=learned)
    ids, images = text(marks, batch=3), pictures(len(marks))
    scores = llava(ids, images if marks else None)
    assert scores.shape == (3, 7, V)
    for row in range(3):
        which = [i for i, (at, _) in enumerate(marks) if at == row]
        torch.testing.assert_close(scores[row], by_hand(llava, ids[row], images[which]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("learned", [False, True])
def test_packed_sequences_are_as_each_alone(learned):
    llava = made(learned=learned)
    ids, images = text([(0, 1), (0, 4), (1, 0)]), pictures(3)
    reset = torch.zeros(2, 7, dtype=torch.bool)
    reset[0, 4] = reset[1, 3] = True  # the first begins with an image
    whole = llava(ids, images, reset=reset)
    for row, cut, which in ((0, 4, [[0], [1]]), (1, 3, [[2], []])):
        for part, chosen in ((slice(0, cut), which[0]), (slice(cut, 7), which[1])):
            alone = by_hand(llava, ids[row, part], images[chosen])
            torch.testing.assert_close(whole[row, part], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_mark_is_never_read_as_a_token():
    llava, other = made(mark=7), made(mark=MARK)
    ids = text([(0, 2), (1, 4)])
    ids[ids == 7] = 8
    scores = other(ids, pictures(2))
    torch.testing.assert_close(llava(ids.masked_fill(ids == MARK, 7), pictures(2)), scores)
    llava.language_model.embeddings.weight[7] = torch.nan  # its scores are, too, since they are tied
    found = llava(ids.masked_fill(ids == MARK, 7), pictures(2))
    kept = [i for i in range(V) if i != 7]
    torch.testing.assert_close(found[..., kept], scores[..., kept])


def test_stage_one_trains_the_projector_and_stage_two_the_language_model_too():
    llava = made().train()
    assert llava.projector.training and not any(m.training for m in llava.language_model.modules())
    ids, images = text([(0, 1), (1, 3)]), pictures(2)
    llava.loss(ids, images).backward()
    of_projector = {f"projector.{name}" for name, _ in llava.projector.named_parameters()}
    assert {name for name, p in llava.named_parameters() if p.grad is not None} == of_projector
    assert {name for name in llava.trained_state_dict()} == of_projector
    held = {id(p) for group in optimiser(llava, 1e-3).param_groups for p in group["params"]}
    assert held == {id(p) for p in llava.projector.parameters()}

    assert llava.freeze("vision") is llava
    assert all(m.training for m in llava.language_model.modules())
    llava.loss(ids, images).backward()
    assert all(p.grad is not None for p in llava.parameters())
    with pytest.raises(ValueError, match=r"names must be among vision, language_model, projector, got 'tower'"):
        llava.freeze("tower")


@pytest.mark.parametrize("layers", [1, 2])
def test_the_projectors_gradients_by_finite_differences(layers):
    llava = made(layers=layers).double()
    ids, images = text([(0, 1), (0, 4), (1, 3)]), pictures(3).double()
    names = [name for name, _ in llava.projector.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in llava.projector.parameters()]

    def loss(*values):
        return torch.func.functional_call(
            _Loss(llava), {f"model.projector.{name}": value for name, value in zip(names, values)}, (ids, images)
        )

    assert torch.autograd.gradcheck(loss, tuple(values), fast_mode=True)
    assert llava.projector(images).shape == (3, S, E)
    assert len(names) == 2 * layers


class _Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, images):
        return self.model.loss(ids, images)


@torch.no_grad()
@pytest.mark.parametrize("learned", [False, True])
def test_in_parts_as_in_one(learned):
    llava = made(learned=learned)
    ids, images = text([(0, 1), (0, 5), (1, 2)]), pictures(3)
    whole, cache = llava(ids, images), llava.new_cache(2, 24)
    # images of unequal number are read at once, and text goes on from there
    parts = [llava(ids[:, :6], images, cache=cache), llava(ids[:, 6:], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    assert cache[-1].length == 7 + 2 * (S - 1)
    ids, images = text([(0, 1), (0, 5), (1, 2), (1, 6)]), pictures(4)  # as many in each part
    whole, cache = llava(ids, images), llava.new_cache(2, 24)
    parts = [llava(ids[:, :4], images[[0, 2]], cache=cache), llava(ids[:, 4:], images[[1, 3]], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_unequal_images_in_a_later_part_are_refused_and_nothing_is_read():
    llava = made()
    cache = llava.new_cache(2, 24)
    llava(text([], batch=2, n=3), cache=cache)
    with pytest.raises(ValueError, match=r"images must be as many in each row when a cache has been read before"):
        llava(text([(0, 1), (0, 5), (1, 2)]), pictures(3), cache=cache)
    assert cache[0].length == cache[-1].length == 3
    chosen = cache[-1].select(torch.tensor([1, 1, 0]))
    assert isinstance(chosen, PositionsRead) and chosen.length == 3


@torch.no_grad()
def test_text_and_images_past_the_context_are_refused_and_nothing_is_read():
    llava = made(learned=True)  # of 24 positions
    ids, images = text([(0, 1), (0, 2), (0, 3)], n=15), pictures(3)
    assert llava(ids, images).shape == (1, 15, V)  # exactly 24
    more = torch.cat([ids, ids[:, :1]], 1)
    says = r"ids with their images must be 24 positions or fewer, the longest that this model reads, got 25: shorten"
    cache = llava.new_cache(1)
    with pytest.raises(ValueError, match=says):
        llava(more, images, cache=cache)
    assert [c.length for c in cache] == [0] * len(cache)
    with pytest.raises(ValueError, match=r"ids, with their images, and n_new must be 24 positions or fewer"):
        llava.generate(ids, 2, images)
    assert llava.generate(ids, 1, images).shape == (1, 16)


# --- features of a CLIP tower ----------------------------------------------------------------------------------------


def tower(**more):
    torch.manual_seed(0)
    return VisionTower(8, 4, 6, 2, 7, 3, **more)


@torch.no_grad()
def test_patch_features_are_the_input_of_the_last_layer_without_the_class_token():
    made, found = tower(), {}
    made.encoder.layers[2].register_forward_pre_hook(lambda _, given: found.update(last=given[0]))
    x = torch.randn(2, 3, 8, 8)
    made(x)
    torch.testing.assert_close(PatchFeatures(made)(x), found["last"][:, 1:])
    torch.testing.assert_close(PatchFeatures(made, select="full")(x), found["last"])
    torch.testing.assert_close(PatchFeatures(made, 2)(x), found["last"][:, 1:])  # counted from the first
    torch.testing.assert_close(PatchFeatures(made, 0, select="full")(x), made.embed(x))
    last = PatchFeatures(made, -1, select="full")(x)
    torch.testing.assert_close(made.encoder.norm(last), made.features(x))
    both = PatchFeatures(made, [-2, -1])(x)
    torch.testing.assert_close(both, torch.cat([found["last"][:, 1:], last[:, 1:]], -1))
    assert PatchFeatures(made).extra_repr() == "layers=[2], select='default'"
    with pytest.raises(ValueError, match=r"images must have 3 channels, \(B, C, H, W\), got \(2, 1, 8, 8\)"):
        PatchFeatures(made)(x[:, :1])


def test_features_that_a_tower_does_not_have():
    for layer in (4, -5, []):
        says = rf"layer must be -4 to 3, for a tower of 3 layers, got {re.escape(str(layer))}"
        with pytest.raises(ValueError, match=says):
            PatchFeatures(tower(), layer)
    with pytest.raises(ValueError, match=r"select must be 'default' or 'full', got 'cls'"):
        PatchFeatures(tower(), select="cls")
    with pytest.raises(ValueError, match=r"select must be 'full' for a tower without a class token"):
        PatchFeatures(tower(class_token=False, pool=AttentionPool(6, 2, 7)))
    with pytest.raises(ValueError, match=r"layers must be 1 or 2, got 3"):
        Projector(D, E, layers=3)


def test_a_projector_of_another_width_is_refused():
    llava = made()
    llava.projector = nn.Linear(D, E + 1)
    with pytest.raises(ValueError, match=r"projector must give \(I, S, E\) = \(1, 4, 12\), got \(1, 4, 13\)"):
        llava(text([(0, 1)]), pictures(1))
