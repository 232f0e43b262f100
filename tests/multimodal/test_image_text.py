"""What Flamingo and LLaVA share: losses, padding, generation, beams, programs, and what is refused at their doors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from nondual.language_models.gpt import GPT
from nondual.multimodal.flamingo import Flamingo
from nondual.multimodal.llava import Llava, Projector
from nondual.multimodal.perceiver import PerceiverResampler
from nondual.multimodal.towers import VisionTower
from nondual.relative_positions import Rotary
from nondual.search import beam_search

V, E, D, S, MARK = 31, 12, 10, 4, 5
KINDS = ("flamingo", "llava")


def made(kind, seed=0, vision=None, d_vision=D, layers=2, **more):
    torch.manual_seed(seed)
    model = GPT(V, E, layers, 3, **(dict(positions=Rotary(4)) | more))
    vision = nn.Identity() if vision is None else vision
    if kind == "flamingo":
        resampler = PerceiverResampler(d_vision, 3, n_layers=1, n_heads=2, d_head=4)
        whole = Flamingo(vision, model, resampler, mark=MARK, d_vision=d_vision, n_heads=2, d_head=4, d_ff=17)
    else:
        whole = Llava(vision, model, Projector(d_vision, E), mark=MARK, d_vision=d_vision)
    with torch.no_grad():
        for name, p in whole.named_parameters():
            p.fill_(0.8) if "_gate" in name and p.ndim == 0 else p.add_(0.3 * torch.randn_like(p))
    return whole.eval()


def text(places, batch=None, n=7, seed=1):
    rows = batch or max(row for row, _ in places) + 1
    ids = torch.randint(MARK + 1, V, (rows, n), generator=torch.Generator().manual_seed(seed))
    for row, place in places:
        ids[row, place] = MARK
    return ids


def pictures(count, s=S, seed=2):
    return torch.randn(count, s, D, generator=torch.Generator().manual_seed(seed))


MARKS = [(0, 1), (0, 4), (1, 3)]

each = pytest.mark.parametrize("kind", KINDS)


# --- the loss --------------------------------------------------------------------------------------------------------


@each
def test_the_loss_is_the_cross_entropy_at_the_labels_and_so_are_its_gradients(kind):
    ids, images = text(MARKS), pictures(3)
    labels = torch.full_like(ids, -100)
    labels[0, 5:], labels[1, 4] = ids[0, 5:], ids[1, 4]
    model, other = made(kind), made(kind)
    loss = model.loss(ids, images, labels)
    right = F.cross_entropy(other(ids, images)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, right)
    loss.backward()
    right.backward()
    for (name, mine), its in zip(model.named_parameters(), other.parameters()):
        assert (mine.grad is None) == (its.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, its.grad, atol=1e-5, rtol=1e-4, msg=name)


@each
def test_scores_are_computed_at_labelled_positions_alone(kind, monkeypatch):
    model, seen = made(kind), []
    ids, labels = text(MARKS), torch.full((2, 7), -100)
    labels[0, 6], labels[1, 5] = ids[0, 6], ids[1, 5]
    whole = model.language_model._scores
    monkeypatch.setattr(model.language_model, "_scores", lambda x: seen.append(tuple(x.shape)) or whole(x))
    model.loss(ids, pictures(3), labels)
    assert seen == [(2, E)]


@each
def test_nothing_to_predict_is_no_loss(kind):
    model = made(kind)
    loss = model.loss(text(MARKS), pictures(3), torch.full((2, 7), -100))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@each
@torch.no_grad()
def test_without_labels_all_tokens_but_marks_and_the_first_of_a_sequence_count(kind):
    model, ids, images = made(kind), text(MARKS), pictures(3)
    reset = torch.zeros(2, 7, dtype=torch.bool)
    reset[1, 5] = True
    labels = ids.masked_fill(ids == MARK, -100)
    torch.testing.assert_close(model.loss(ids, images), model.loss(ids, images, labels))
    labels[1, 5] = -100
    torch.testing.assert_close(model.loss(ids, images, reset=reset), model.loss(ids, images, labels, reset=reset))


# --- padding ---------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("more", [{}, dict(positions=None, max_len=30)])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(kind, more):
    model, ids, images = made(kind, **more), text([(0, 0), (0, 3)], n=5), pictures(2)
    alone, loss = model(ids, images), model.loss(ids, images)
    padding = torch.full((1, 3), 17)
    right = torch.cat([ids, padding], 1)
    torch.testing.assert_close(model(right, images)[:, :5], alone, atol=1e-5, rtol=1e-5)
    labels = right.masked_fill(right == MARK, -100)
    labels[:, 5:] = -100
    torch.testing.assert_close(model.loss(right, images, labels), loss)
    left, reset = torch.cat([padding, ids], 1), torch.zeros(1, 8, dtype=torch.bool)
    reset[0, 3] = True
    torch.testing.assert_close(model(left, images, reset=reset)[:, 3:], alone, atol=1e-5, rtol=1e-5)
    labels = left.masked_fill(left == MARK, -100)
    labels[:, :4] = -100
    torch.testing.assert_close(model.loss(left, images, labels, reset=reset), loss)
    both = torch.cat([left, text([], batch=1, n=8)])  # beside a row without padding and without images
    both_reset = torch.cat([reset, torch.zeros(1, 8, dtype=torch.bool)])
    torch.testing.assert_close(model(both, images, reset=both_reset)[:1, 3:], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(both, images, reset=both_reset)[1:], model(both[1:]), atol=1e-5, rtol=1e-5)


# --- generation ------------------------------------------------------------------------------------------------------


@each
@torch.no_grad()
def test_generation_with_and_without_caches_by_hand_and_padded(kind):
    model, ids, images = made(kind), text(MARKS), pictures(3)
    right = ids
    for _ in range(6):
        scores = model(right, images)[:, -1]
        scores[:, MARK] = -torch.inf
        right = torch.cat([right, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(ids, 6, images), right)
    assert torch.equal(model.generate(ids, 6, images, cached=False), right)
    assert model.generate(ids, 0, images).tolist() == ids.tolist()
    left, reset = torch.cat([torch.full((2, 2), 17), ids], 1), torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 2] = True
    for cached in (True, False):
        assert torch.equal(model.generate(left, 6, images, reset=reset, cached=cached)[:, 2:], right)
    eos = int(right[0, 7])
    stopped = model.generate(ids[:1], 6, images[:2], eos=eos)
    assert stopped.shape == (1, 8) and int(stopped[0, -1]) == eos
    small = model.generate(ids.to(torch.int8), 3, images)
    assert small.dtype == torch.int8 and torch.equal(small.long(), right[:, :10])


@each
@torch.no_grad()
def test_a_mark_is_never_generated(kind):
    model = made(kind)
    drawn = model.generate(text(MARKS), 60, pictures(3), temperature=100.0, generator=torch.Generator().manual_seed(0))
    assert not (drawn[:, 7:] == MARK).any()
    assert len(set(drawn[:, 7:].flatten().tolist())) > 20


@each
@torch.no_grad()
def test_beams_keep_their_images(kind):
    """nondual.search over the model with its caches, against the same search that reads everything anew."""
    model, ids, images = made(kind), text(MARKS), pictures(3)

    def step(tokens, cache):
        return model(tokens[:, None], cache=cache)[:, -1].log_softmax(-1), cache

    def anew(tokens, state):
        so_far, row = torch.cat([state["ids"], tokens[:, None]], 1), state["row"]
        given = torch.cat([images[:2] if int(i) == 0 else images[2:] for i in row])
        return model(so_far, given)[:, -1].log_softmax(-1), {"ids": so_far, "row": row}

    cache = model.new_cache(2, 40)
    model(ids[:, :-1], images, cache=cache)
    start = ids[:, -1]
    found = beam_search(step, start, cache, max_len=4, beams=3)
    right = beam_search(anew, start, {"ids": ids[:, :-1], "row": torch.arange(2)}, max_len=4, beams=3)
    assert torch.equal(found.tokens, right.tokens)
    torch.testing.assert_close(found.scores, right.scores, atol=1e-4, rtol=1e-4)


# --- programs --------------------------------------------------------------------------------------------------------


@each
def test_one_program_for_every_length_of_text(kind):
    model, images = made(kind, layers=1), pictures(2)
    program = torch.export.export(
        model, (text([(0, 1), (1, 3)]), images), dynamic_shapes=({1: Dim("n", min=4, max=100)}, None)
    ).module()
    for n in (4, 7, 30):
        ids = text([(0, 1), (1, 3)], n=n)
        torch.testing.assert_close(program(ids, images), model(ids, images), atol=1e-5, rtol=1e-5)


@each
def test_compiled_it_gives_the_same_loss_at_two_lengths(kind):
    model, images = made(kind, layers=1), pictures(2)
    compiled = torch.compile(model.loss, backend="eager", dynamic=True, fullgraph=True)
    for n in (5, 9):
        ids = text([(0, 1), (1, 3)], n=n)
        torch.testing.assert_close(compiled(ids, images), model.loss(ids, images))


# --- what is refused -------------------------------------------------------------------------------------------------


REFUSED = {
    "too few images": (
        dict(images=pictures(2)),
        ValueError,
        r"images must be as many as the marks \(id 5\) in ids, 3 \(2, 1 in the rows\), got 2",
    ),
    "too many": (dict(images=pictures(4)), ValueError, r"3 \(2, 1 in the rows\), got 4"),
    "none": (dict(images=None), ValueError, r"3 \(2, 1 in the rows\), got 0"),
    "no marks": (dict(ids=text([], batch=2)), ValueError, r"0 \(0, 0 in the rows\), got 3"),
    "no rows": (dict(ids=text(MARKS)[:0]), ValueError, r"ids must have 1 row and 1 token in it or more, got \(0, 7\)"),
    "no tokens": (dict(ids=text(MARKS)[:, :0]), ValueError, r"1 token in it or more, got \(2, 0\)"),
    "a list": (dict(ids=[[1, 2]]), TypeError, r"ids must be a Tensor, got list"),
    "images in a list": (dict(images=[1.0]), TypeError, r"images must be a Tensor, got list"),
    "an id too high": (dict(ids=text(MARKS) + (text(MARKS) != MARK) * V), ValueError, r"ids must lie in 0 to 30, got"),
    "floating ids": (dict(ids=text(MARKS).float()), ValueError, r"ids must be integers \(B, N\), got torch.float32"),
    "another width": (
        dict(images=torch.ones(3, S, D + 1)),
        ValueError,
        r"vision must give floating point \(I, S, d_vision\) = \(\d, S, 10\), got torch.float32 \(\d, 4, 11\)",
    ),
    "no vectors": (dict(images=torch.ones(3, 0, D)), ValueError, r"vision must give 1 vector or more for each image"),
    "a number": (dict(images=torch.tensor(1.0)), ValueError, r"images must be \(I, …\), .* got a number"),
    "another reset": (
        dict(reset=torch.zeros(2, 6, dtype=torch.bool)),
        ValueError,
        r"reset must be boolean \(B, N\) = \(2, 7\)",
    ),
}


@each
@pytest.mark.parametrize("case", REFUSED)
@torch.no_grad()
def test_what_cannot_be_read_is_one_clear_error_and_changes_no_cache(kind, case, held_by):
    more, error, says = REFUSED[case]
    model = made(kind)
    given = dict(ids=text(MARKS), images=pictures(3)) | more
    cache = model.new_cache(2, 40)
    model(text([(0, 1), (1, 1)], n=2), pictures(2), cache=cache)
    before = held_by(cache)
    with pytest.raises(error, match=says):
        model(**given, cache=cache)
    assert held_by(cache) == before
    with pytest.raises(error, match=says):
        model.generate(given.pop("ids"), 3, given.pop("images"), **given)


@each
@pytest.mark.parametrize("name", ["norm_f", "layers.0.mixer.out_proj", "layers.1.feed_forward.linear2"])
@torch.no_grad()
def test_a_layer_that_raises_has_changed_no_cache(kind, name, held_by):
    model, ids, images = made(kind), text([(0, 1), (1, 3)]), pictures(2)
    cache, right = model.new_cache(2, 40), model.new_cache(2, 40)
    for each_cache in (cache, right):
        model(text([(0, 1), (1, 1)], n=2), pictures(2), cache=each_cache)
    before = held_by(cache)
    handle = model.language_model.get_submodule(name).register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids, images, cache=cache)
    assert held_by(cache) == before
    handle.remove()
    torch.testing.assert_close(model(ids, images, cache=cache), model(ids, images, cache=right))


@each
@torch.no_grad()
def test_images_of_other_channels_are_refused_by_the_tower(kind):
    tower = VisionTower(8, 4, 6, 2, 7, 1)
    tower.forward = tower.features  # vectors, not one
    model = made(kind, vision=tower, d_vision=6)
    assert model(text(MARKS), torch.randn(3, 3, 8, 8)).shape == (2, 7, V)
    cache = model.new_cache(2, 40)
    with pytest.raises(ValueError, match=r"images must have 3 channels, \(B, C, H, W\), got \(3, 1, 8, 8\)"):
        model(text(MARKS), torch.randn(3, 1, 8, 8), cache=cache)
    assert cache[0].length == 0
    model.vision = nn.LSTM(6, 6)
    with pytest.raises(TypeError, match=r"vision must give a Tensor \(I, S, 6\), got tuple"):
        model(text(MARKS), torch.randn(3, 4, 6))


@each
def test_labels_that_cannot_be(kind):
    model, ids, images = made(kind), text(MARKS), pictures(3)
    with pytest.raises(ValueError, match=r"labels must be -100 where an image stands, got 5 in row 0, place 1"):
        model.loss(ids, images, ids)
    with pytest.raises(ValueError, match=r"labels must be int64 and of ids' shape \(2, 7\), got torch.int64 \(2, 6\)"):
        model.loss(ids, images, ids[:, 1:])
    with pytest.raises(TypeError, match=r"labels must be a Tensor, got list"):
        model.loss(ids, images, [[1]])
    with pytest.raises(ValueError, match=r"ids must have 2 tokens or more a row for a loss, got \(2, 1\)"):
        model.loss(ids[:, :1])


@each
@torch.no_grad()
def test_caches_that_are_another_models_and_texts_that_are_too_long(kind, held_by):
    model = made(kind, positions=None, max_len=20)
    ids, images = text(MARKS), pictures(3)
    for cache in ("cache", [], model.language_model.new_cache(2)):
        with pytest.raises(TypeError, match=rf"cache must be from new_cache of this {type(model).__name__}, got"):
            model(ids, images, cache=cache)
    cache = model.new_cache(2)
    with pytest.raises(ValueError, match=r"positions|must be 20 positions or fewer"):
        model(text([(0, 1)], n=21), pictures(1), cache=model.new_cache(1))
    with pytest.raises(ValueError, match=r"ids, with their images, and n_new must be 20 positions or fewer, .*"):
        model.generate(ids, 21, images)
    model(ids, images, cache=cache)
    before = held_by(cache)
    with pytest.raises(ValueError, match=r"positions"):
        model(text([], batch=2, n=15), cache=cache)
    assert held_by(cache) == before
    with pytest.raises(ValueError):
        model(text([], batch=3, n=2), cache=cache)  # of another batch
    assert held_by(cache) == before


@each
def test_a_cache_is_for_inference(kind):
    model = made(kind)
    with pytest.raises(RuntimeError, match=r"a KVCache is for inference"):
        model(text(MARKS), pictures(3), cache=model.new_cache(2, 40))
