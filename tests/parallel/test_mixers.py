"""Models whose mixers hand on a state read a sequence that is cut in time: scores and gradients of one device."""

import copy
import re

import pytest
import torch
import torch._dynamo  # here, before ranks are forked: the first call of a custom operator imports it, for seconds
from refusals import message_of

from nondual.efficient_attention.linear_attention import GatedDeltaNet, GatedLinearAttention, LinearMixer, Retention
from nondual.efficient_attention.mamba import Mamba
from nondual.efficient_attention.mamba2 import Mamba2
from nondual.language_models.causal import CausalLM
from nondual.ops.selective_scan import selective_scan
from nondual.parallel import contiguous, of_lengths
from nondual.parallel.mixers import shard_time
from nondual.parallel.ring import RingAttention
from nondual.positional_encoding import LearnedPositions
from nondual.self_attention import MultiHeadAttention
from nondual.transformer_layer import MixerBlock, TransformerLayer

dist = torch.distributed

V, E, B = 11, 12, 2
MIXERS = {
    "Mamba": lambda: Mamba(E, d_state=5, d_conv=3),
    "Mamba2": lambda: Mamba2(E, d_state=5, d_head=4, n_groups=2, chunk=4),
    "GatedDeltaNet": lambda: GatedDeltaNet(E, 2),
    "GatedLinearAttention": lambda: GatedLinearAttention(E, 2),
    "Retention": lambda: Retention(E, 2),
}


def model_of(kind):
    """Two layers, the same on every rank, in float64."""
    torch.manual_seed(0)
    return CausalLM(V, E, 2, layer=lambda i: MixerBlock(MIXERS[kind](), E)).double()


def read(length):
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(V, (B, length), generator=draw)
    return ids, torch.rand(B, length, generator=draw) < 0.15, torch.randn(B, length, V, generator=draw).double()


# --- in every rank -------------------------------------------------------------------------------------------------


def whole_models(rank, size):
    """The greatest difference of scores and of the gradient of every parameter, for even, short and empty parts."""
    said = {}
    for kind in MIXERS:
        plain = model_of(kind)
        ours = shard_time(copy.deepcopy(plain))
        for of_each in ([4, 4, 3, 3], [7, 1, 0, 2]):
            layout = of_lengths(of_each[:size])
            if kind == "Retention":
                layout = contiguous(layout.length, size)
            span = slice(layout.pieces[rank][0].start, layout.pieces[rank][0].stop)
            ids, marks, weights = read(layout.length)
            errors = []
            for reset in (None, marks):
                plain.zero_grad()
                ours.zero_grad()
                expected = plain(ids, reset=reset)
                (expected * weights).sum().backward()
                got = ours(ids[:, span], reset=None if reset is None else reset[:, span])
                (got * weights[:, span]).sum().backward()
                errors.append((got - expected[:, span]).detach().abs().max().item() if got.numel() else 0.0)
                for one, two in zip(ours.parameters(), plain.parameters()):
                    total = (
                        torch.zeros_like(one) if one.grad is None else one.grad
                    )  # a rank without rows convolves none
                    dist.all_reduce(total)
                    errors.append(float((total - two.grad).abs().max()))
            said[f"{kind}, {of_each}"] = max(errors)
    return said


def caches(rank, size):
    """A sequence read over ranks from rank 0's cache; the last rank goes on with its own, on one device."""
    errors = []
    for kind in ("Mamba", "Mamba2", "GatedDeltaNet"):
        torch.manual_seed(1)
        plain = MIXERS[kind]().double()
        ours = shard_time(copy.deepcopy(plain))
        x = torch.randn(B, 13, E, dtype=torch.float64)
        layout = of_lengths([5, 1, 2, 2][:size])
        first, n = layout.pieces[rank][0], layout.length
        with torch.no_grad():
            expected, cache = plain(x), ours.new_cache(B)
            plain(x[:, :2], cache=cache)  # what every rank's cache holds; rank 0's counts
            got = ours(x[:, 2 : n + 2][:, first.start : first.stop], cache=cache)
            errors.append(float((got - expected[:, 2 : n + 2][:, first.start : first.stop]).abs().max()))
            if rank == size - 1:
                rest = plain(x[:, n + 2 :], cache=cache)
                errors.append(float((rest - expected[:, n + 2 :]).abs().max()) if rest.numel() else 0.0)
    return max(errors)


def with_attention(rank, size):
    """Mamba and attention in one model: each over ranks."""

    def layer(op):
        def of(i):
            mixer = Mamba(E, d_state=5) if i else MultiHeadAttention(E, 2, causal=True, **op)
            return MixerBlock(mixer, E) if i else TransformerLayer(mixer, torch.nn.Linear(E, E), E)

        return of

    torch.manual_seed(0)
    plain = CausalLM(V, E, 2, layer=layer({})).double()
    ours = CausalLM(V, E, 2, layer=layer({"op": RingAttention(contiguous)})).double()
    ours.load_state_dict(plain.state_dict())
    ids, _, _ = read(9)
    part = contiguous(9, size)
    got = shard_time(ours)(part.shard(ids, rank, dim=1))
    return float((got - part.shard(plain(ids), rank, dim=1)).detach().abs().max())


def in_ddp(rank, size):
    """Gradients averaged by DDP while states and rows travel in the same backward pass, in each of three steps."""
    errors = []
    for kind in ("Mamba", "Mamba2"):
        plain = model_of(kind)
        ours = torch.nn.parallel.DistributedDataParallel(shard_time(copy.deepcopy(plain)), bucket_cap_mb=1e-3)
        for length in (7, 5, 8):
            ids, _, weights = read(length)
            part = of_lengths([length - 2, 2])
            plain.zero_grad()
            ours.zero_grad()
            (plain(ids) * weights).sum().backward()
            (ours(part.shard(ids, rank, dim=1)) * part.shard(weights, rank)).sum().backward()
            for one, two in zip(ours.parameters(), plain.parameters()):
                errors.append(float((size * one.grad - two.grad).abs().max()))
    return max(errors)


def refused(rank, size):
    def block(i):
        return MixerBlock(Mamba(E), E)

    attending = CausalLM(V, E, 1, layer=lambda i: TransformerLayer(MultiHeadAttention(E, 2), torch.nn.Linear(E, E), E))
    other = CausalLM(V, E, 1, layer=lambda i: MixerBlock(torch.nn.Identity(), E))
    places = CausalLM(V, E, 1, layer=block, positions=LearnedPositions(8, E))
    return [message_of(shard_time, m) for m in (attending, other, places, torch.nn.Linear(2, 2))] + [
        places.layers[0].mixer.rows_before is None
    ]


def everything(rank, size):
    """All that needs ranks, since starting them takes longer."""
    said = {"models": whole_models(rank, size), "caches": caches(rank, size)}
    if size == 2:
        said |= {"attention": with_attention(rank, size), "DDP": in_ddp(rank, size), "refused": refused(rank, size)}
    return said


@pytest.fixture(scope="module")
def said(in_ranks):
    return in_ranks(everything, timeout=180)


# --- tests ---------------------------------------------------------------------------------------------------------


def test_scores_and_every_gradient_are_those_of_one_device(said):
    for size, ranks in said.items():
        for rank, of_rank in enumerate(ranks):
            for kind, difference in of_rank["models"].items():
                assert difference < 1e-10, (size, rank, kind)  # sums in another order; 3e-11 on one processor


def test_the_last_rank_goes_on_with_its_cache(said):
    assert max(of_rank["caches"] for ranks in said.values() for of_rank in ranks) < 1e-12


def test_a_model_of_both_kinds_of_mixers(said):
    assert max(of_rank["attention"] for of_rank in said[2]) < 1e-12


def test_ddp_averages_the_gradients_of_parts(said):
    assert max(of_rank["DDP"] for of_rank in said[2]) < 1e-11


def test_what_does_not_read_a_part_of_time_is_refused_and_nothing_changed(said):
    for of_rank in said[2]:
        attending, other, places, none, unchanged = of_rank["refused"]
        assert re.search(
            r"must attend over ranks, as MultiHeadAttention\(op=RingAttention\(contiguous\)\) does", attending
        )
        assert "layer 0 must mix positions by Mamba, Mamba2, linear attention or" in other and "got Identity" in other
        assert "model must add no positions to its embeddings" in places
        assert none == "ValueError: model must have a mixer of Mamba, Mamba2, LinearMixer, got none"
        assert unchanged


def test_parts_are_named_as_arguments():
    """The seam: any function with the operation's arguments, and one that gives the convolution its first inputs."""
    calls = []

    def scan(*args, **options):
        calls.append("scan")
        return selective_scan(*args, **options)

    def rows(x, count, *, history, reset):
        calls.append(count)
        return history, x

    x = torch.randn(B, 5, E)
    mixer = Mamba(E, scan=scan, rows_before=rows)
    plain = Mamba(E)
    plain.load_state_dict(mixer.state_dict())
    assert torch.equal(mixer(x), plain(x)) and calls == [3, "scan"]
    assert LinearMixer(E, 2, rows_before=rows)(x).shape == x.shape and calls[2:] == [3]
