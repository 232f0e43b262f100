"""A model whose rows stand where the layout says gives what one device gives, with positions of every kind it takes."""

import copy
import re

import pytest
import torch
from refusals import message_of

from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.language_models.gpt import GPT
from nondual.language_models.mamba import MambaLM
from nondual.parallel import (
    AllToAllAttention,
    RingAttention,
    RowPositions,
    contiguous,
    of_lengths,
    shard_sequence,
    zigzag,
)
from nondual.positional_encoding import Sinusoidal
from nondual.relative_positions import ALiBi, RelativeBias, Rotary
from nondual.self_attention import MultiHeadAttention

dist = torch.distributed
V, E, H = 11, 24, 12

POSITIONS = {
    "rotary": {"positions": Rotary(2)},
    "interleaved rotary for longer texts": {
        "positions": lambda i: Rotary(2, order="interleaved", scaling="linear", factor=1.0 + i)
    },
    "learned": {"max_len": 13},
    "sinusoidal": {"positions": Sinusoidal(E)},
    "none, and a window": {"op": FlashAttention(window=4, scale=0.3)},
}


def model_of(options) -> GPT:
    torch.manual_seed(0)
    return GPT(V, E, 2, H, d_ff=5, n_kv_heads=4, **copy.deepcopy(options)).double()


# --- in every rank -------------------------------------------------------------------------------------------------


def scores(rank, size):
    """For each kind of positions the largest differences of scores and gradients, and whether names are the same."""
    said = {}
    for name, options in POSITIONS.items():
        whole = model_of(options)
        ids = torch.randint(V, (2, 13), generator=torch.Generator().manual_seed(1))
        for layout in (zigzag, contiguous, of_lengths([13 - 2 * (size - 1), *[2] * (size - 1)])):
            op = RingAttention if layout is contiguous else AllToAllAttention
            cut = layout(13, size) if callable(layout) else layout
            ours = shard_sequence(model_of(options), layout, dist.group.WORLD, op=op)
            ours = copy.deepcopy(ours)
            expected, got = whole(ids), ours(cut.shard(ids, rank, dim=1))
            (expected**2).sum().backward()
            (got**2).sum().backward()
            worst = float((got - cut.shard(expected, rank, dim=1)).detach().abs().max())
            gradients, same = (torch.cat([x.grad.flatten() for x in m.parameters()]) for m in (ours, whole))
            dist.all_reduce(gradients)
            worst = max(worst, float((gradients - same).abs().max()))
            named = list(ours.state_dict()) == list(whole.state_dict())
            said[f"{name} {getattr(layout, '__name__', 'uneven')}"] = [worst, named]
            whole.zero_grad()
    return said


def refusals(rank, size):
    ids = torch.zeros(2, 7, dtype=torch.int64)
    layout = zigzag(7, size)
    mine = layout.shard(ids, rank, dim=1)
    biased = GPT(V, E, 2, H, positions=ALiBi(H))
    ours = shard_sequence(GPT(V, E, 1, H, positions=Rotary(2)), layout, op=AllToAllAttention)
    short = shard_sequence(GPT(V, E, 1, H, max_len=6), layout, op=AllToAllAttention)
    return [
        message_of(lambda: shard_sequence(biased, layout, op=AllToAllAttention)),
        type(biased.layers[0].mixer.op).__name__,
        message_of(lambda: shard_sequence(MambaLM(V, E, 2), layout, op=AllToAllAttention)),
        message_of(lambda: shard_sequence(ours, layout, op=AllToAllAttention)),
        message_of(lambda: shard_sequence(torch.nn.Linear(2, 2), layout, op=AllToAllAttention)),
        message_of(lambda: GPT(V, E, 1, H, op=AllToAllAttention(layout), positions=RelativeBias(H))),
        message_of(lambda: short(mine)),
        message_of(lambda: ours(mine if rank else ids[:, :1])),
        message_of(lambda: ours.generate(mine[:, :1], 2)),
        message_of(lambda: ours(mine, reset=torch.zeros_like(mine, dtype=torch.bool))),
        message_of(lambda: ours(mine)),
    ]


# --- tests ---------------------------------------------------------------------------------------------------------


def test_scores_and_gradients_are_those_of_one_device(in_ranks):
    for size, ranks in in_ranks(scores, sizes=(1, 2, 4), timeout=180).items():
        for said in ranks:
            assert len(said) == 3 * len(POSITIONS)
            for case, (difference, named) in said.items():
                assert difference < 1e-12, (size, case)
                assert named


def test_what_a_rank_cannot_read_is_refused(in_ranks):
    (ranks,) = in_ranks(refusals, sizes=(2,)).values()
    for biased, kept, mamba, twice, other, bias, short, rows, cached, reset, after in ranks:
        only = (
            "ValueError: positions must only turn queries and keys, as Rotary does, got ALiBi: a bias of positions is"
        )
        assert biased == f"{only} a mask, which attention over ranks does not take"
        assert kept == "FlashAttention"
        assert mamba.startswith("ValueError: layer 0 must have MultiHeadAttention as its mixer, got Mamba: ")
        assert twice.startswith("ValueError: layer 0 must join queries, keys and values by attention or FlashAttention")
        assert other == "TypeError: model must be a CausalLM, such as GPT, got Linear"
        assert bias.startswith("ValueError: positions must be RowPositions, for AllToAllAttention, got RelativeBias")
        assert short.startswith("ValueError: positions must lie in 0 to 5, got 6")
        assert rows.startswith(
            "ValueError: AllToAllAttention: the ranks must hold the layout's [3, 4] rows, got [1, 4]"
        )
        assert cached.startswith(
            "ValueError: AllToAllAttention: the ranks must hold the layout's [3, 4] rows, got [1, 1]"
        )
        assert reset.startswith("ValueError: mask must be None for AllToAllAttention")
        assert after == ""


@pytest.mark.parametrize(
    ("positions", "kind", "said"),
    [
        (ALiBi(3), ValueError, "positions must only turn queries and keys, as Rotary does, got ALiBi"),
        (RelativeBias(3), ValueError, "positions must only turn queries and keys, as Rotary does, got RelativeBias"),
        (Sinusoidal(4), TypeError, "positions must act inside attention, as Rotary does, got Sinusoidal"),
    ],
)
def test_positions_with_a_bias_are_refused(positions, kind, said):
    with pytest.raises(kind, match=re.escape(said)):
        RowPositions(positions, contiguous(4, 2))


def test_another_head_width_is_refused():
    with pytest.raises(ValueError, match=re.escape("positions must be Rotary(2), of the head width")):
        MultiHeadAttention(E, H, positions=RowPositions(Rotary(4), contiguous(4, 2)))


@pytest.mark.parametrize("op", [RingAttention(zigzag), AllToAllAttention(contiguous(4, 2))])
def test_positions_that_know_this_rank_alone_are_refused_with_attention_over_ranks(op):
    """They would turn a rank's rows as if they were the first of the sequence, without a word."""
    with pytest.raises(ValueError, match=re.escape(f"for {type(op).__name__}, got Rotary, which knows no places but")):
        MultiHeadAttention(E, H, op=op, positions=Rotary(E // H))
    MultiHeadAttention(E, H, op=op, positions=RowPositions(Rotary(E // H), zigzag))
    MultiHeadAttention(E, H, op=op)


def test_without_a_group_the_error_says_how_to_make_one():
    with pytest.raises(RuntimeError, match="start the program with torchrun"):
        shard_sequence(model_of({}), zigzag, op=AllToAllAttention)
