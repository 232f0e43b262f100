"""nondual.language_models.bytes: it generates, loses nothing, cuts where it says, and learns to cut at a given rate."""

import pytest
import torch

from nondual.chunking import ChunkingLayer, DynamicChunking, ratio_loss
from nondual.language_models.bytes import HNet, Layers, rotary_layer
from nondual.language_models.causal import CausalLM
from nondual.training import optimiser, train


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(**options):
    return HNet(16, 24, 2, pieces_of=3.0, **options)


def test_with_a_cache_and_without_it_says_the_same():
    model = small().eval()
    torch.nn.init.normal_(model.chunking.residual.weight)
    ids = torch.randint(256, (1, 23))
    assert torch.equal(model.generate(ids, 15), model.generate(ids, 15, cached=False))
    assert model.generate(ids.expand(2, -1), 3, cached=False).shape == (2, 26)
    with pytest.raises(ValueError, match="batch must be 1"):
        model.generate(ids.expand(2, -1), 3)


def test_no_score_depends_on_a_later_byte():
    model = small().eval()
    torch.nn.init.normal_(model.embeddings.weight)
    ids = torch.randint(256, (2, 29))
    changed = ids.clone()
    changed[:, 17:] = torch.randint(256, (2, 12))
    assert torch.allclose(model(ids)[:, :17], model(changed)[:, :17], atol=1e-5)
    assert not torch.allclose(model(ids)[:, 17:], model(changed)[:, 17:], atol=1e-2)


def test_the_loss_is_the_cross_entropy_and_the_ratio_loss():
    model, ids = small(), torch.randint(256, (3, 19))
    plain = CausalLM.loss(model, ids)
    cuts = model.cuts(ids[:, :-1])
    assert cuts.cut.shape == (3, 18) and cuts.cut[:, 0].all()
    assert torch.allclose(model.loss(ids), plain + 0.03 * ratio_loss(cuts, 3.0))
    with model.noting_cuts() as noted:
        model(ids)
    model(ids)
    assert len(noted) == 1  # and none after the block has ended


def test_it_starts_as_the_other_models_do():
    model = small()
    for layer in model.chunking.main.layers:
        assert not layer.feed_forward.linear1.bias.any()
        assert layer.mixer.out_proj.weight.std() < layer.mixer.v_proj.weight.std() / 2
    assert not model.chunking.residual.weight.any()


def test_it_learns_to_cut_at_the_rate_that_is_asked_for():
    text = b"in the beginning there was a word, and the word had no beginning in the text. " * 30
    ids = torch.tensor(list(text))

    def windows(generator):
        starts = torch.randint(len(ids) - 48, (4, 1), generator=generator)
        return ids[starts + torch.arange(48)]

    shares = {}
    for n in (2.0, 5.0):
        torch.manual_seed(1)
        model = HNet(16, 24, 2, pieces_of=n, ratio_weight=0.3)
        history = train(model, model.loss, windows, optimiser=optimiser(model, 1e-2), steps=40, name=None, log_every=40)
        shares[n] = model.cuts(ids[None, :256]).cut.float().mean().item()
        assert history[-1]["loss"] < 4.5
    assert 0.35 < shares[2.0] < 0.65 and 0.1 < shares[5.0] < 0.32


def test_pieces_may_be_cut_into_pieces_again():
    inner = Layers([rotary_layer(32, 2)], 32)
    stage = ChunkingLayer(DynamicChunking(inner, 24, d_main=32))
    outer = Layers([rotary_layer(24, 2), stage, rotary_layer(24, 2)], 24)
    layers = [rotary_layer(16, 2), ChunkingLayer(DynamicChunking(outer, 16, d_main=24)), rotary_layer(16, 2)]
    model = CausalLM(256, 16, 3, layer=lambda i: layers[i]).eval()
    ids = torch.randint(256, (1, 21))
    assert torch.equal(model.generate(ids, 9), model.generate(ids, 9, cached=False))
    model.loss(ids).backward()
    assert stage.mixer.router.q_proj.weight.grad is not None


def test_bad_sizes_are_refused():
    for options, says in (
        ({"pieces_of": 1.0}, "pieces_of must be above 1"),
        ({"n_main": 0}, "n_main must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=says):
            HNet(16, 24, 2, **options)
    with pytest.raises(ValueError, match="d_main must be d_model"):
        HNet(16, 8, 2)
    with pytest.raises(ValueError, match="must lie in 0 to 255"):
        small()(torch.tensor([[256]]))
