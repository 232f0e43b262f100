"""Which steps, spans and chunks the scans' kernels visit, by brute force over every small case."""

from itertools import product

import pytest
import torch
from whole_numbers import ANYTHING, visits

from nondual.ops.selective_scan.triton import adjoint, backward, forward, launch, tiles
from nondual.ops.ssd import triton as ssd


def planned(length: int, spans: int, monkeypatch) -> tuple[int, int]:
    """Steps of a span and how many spans there are, as the launcher plans them for chunks of CHUNK steps."""
    monkeypatch.setattr(tiles, "CHUNK", CHUNK)
    monkeypatch.setattr(tiles, "spans_of", lambda u, kernel: spans)
    u = torch.empty(1, length, 2)
    given = (u, u, torch.empty(2, 2), u[:, :, None], u[:, :, None], None, None, None, True, None, None)
    plan = launch.Launcher(*given)
    plan.cut("forward")
    assert plan.span % CHUNK == 0 and plan.span * (plan.spans - 1) < length <= plan.span * plan.spans
    return plan.span, plan.spans


CHUNK = 4
SIZES = {"GROUPS": 1, "B_GROUPS": 1, "C_GROUPS": 1, "D": 2, "N": 2, "CHUNK": CHUNK}
SCANS = [*product(range(1, 30), (1, 2, 3, 5)), *product((64, 97), (2, 5))]  # lengths and spans


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_steps_of_the_selective_scan(steps, monkeypatch):
    """Every step once and in order, in both levels; a state left where each chunk begins."""
    asked_forward = {
        "scan_steps": (("t", "STEPS"), (ANYTHING,) * 3),
        "checkpoint": (("t",), None),
        "load_group": (("t", "STEPS", "EDGE"), ANYTHING),
    }
    asked_back = {"adjoint_steps": (("t", "STEPS"), (ANYTHING,) * 3)}
    for length, wanted in SCANS:
        span, spans = planned(length, wanted, monkeypatch)
        numbers = SIZES | {"length": length, "span": span, "spans": spans, "BLOCK_D": 2, "BLOCK_N": 2, "STEPS": steps}
        numbers |= {"N_HI": 1, "N_LO": 2}
        done, asked, loaded = [], [], []
        for program in range(spans):
            for name, t, *rest in visits(
                forward, "forward_kernel", program, asked_forward, ("place",), **numbers, p_decay=None, p_start=None
            ):
                if name == "checkpoint":
                    asked.append(int(t))
                elif name == "load_group":
                    loaded.append(int(t))
                    count, edge = rest
                    first = program * span
                    inside = first <= t and t + count <= min(first + span, length)
                    assert edge or inside, "read outside of the span"
                else:
                    assert t in asked, "the state before these steps is not offered to the backward"
                    assert t in loaded, "these steps were not loaded"
                    done += range(t, t + rest[0])
        assert done == list(range(length)), (length, span)
        if CHUNK % steps == 0:
            assert set(range(0, length, CHUNK)) <= set(asked), "a chunk begins without its state"

        done = []
        for program in reversed(range(spans)):
            for _, t, count in visits(adjoint, "adjoint_kernel", program, asked_back, ("place",), **numbers):
                done += reversed(range(t, t + count))
        assert done == list(reversed(range(length))), (length, span)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_of_the_selective_scans_backward(steps, monkeypatch):
    """Every step once, from the last to the first; the states of a chunk computed again before they are used; a barrier
    between what is written to scratch and its use, and another before the next chunk overwrites it."""
    recorded = {
        "recompute_states": (("t", "STEPS"), ANYTHING),
        "backward_steps": (("t", "last", "STEPS", "EDGE"), (ANYTHING,) * 6),
    }
    for length, wanted in SCANS:
        span, spans = planned(length, wanted, monkeypatch)
        done = []
        for program in reversed(range(spans)):
            events = visits(
                backward, "backward_kernel", program, recorded, ("place",), **SIZES, length=length, span=span,
                spans=spans, D_LO=1, D_HI=2, N_HI=1, N_LO=2, STEPS=steps, p_end=None,
            )  # fmt: skip
            ready: list[int] = []
            for name, *rest in events:
                if name == "recompute_states":
                    ready.append(int(rest[0]) + rest[1])
                elif name == "backward_steps":
                    t, last, count, edge = rest
                    assert edge or t + count <= last, "steps past the end are not masked"
                    assert t % CHUNK == 0 or t in ready, "the states before these steps were not computed again"
                    done += [s for s in reversed(range(t, t + count)) if s < last]
            chunks = -(-min(span, length - program * span) // CHUNK)
            barriers = [i for i, (name, *_) in enumerate(events) if name == "barrier"]
            assert len(barriers) == 2 * chunks, "two barriers for each chunk: before its states are used, and after"
            for written, read in zip(barriers[::2], barriers[1::2]):
                assert all(name != "recompute_states" for name, *_ in events[written:read]), "written after the barrier"
        assert done == list(reversed(range(length))), (length, span)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_spans_of_the_selective_scan_follow_the_rule(kernel):
    """Two levels where there are too few channels for each of 8 multiprocessors, into spans of two chunks or more."""
    enough, wanted = tiles.FULL[kernel] * 8, tiles.SPANNED[kernel] * 8
    lengths, widths = (0, 1, 15, 16, 31, 32, 33, 200, 1000), (1, 7, enough - 1, enough, 2 * enough)
    for batch, length, channels in product((1, 2, 5), lengths, widths):
        spans = tiles.spans_of(torch.empty(batch, length, channels, device="meta"), kernel)
        assert spans >= 1
        if batch * channels >= enough or length < 4 * tiles.CHUNK:
            assert spans == 1
        else:
            assert spans * 2 * tiles.CHUNK <= length
            assert (spans - 1) * batch * channels < wanted


def test_the_heads_of_a_group_are_shared_out_whole():
    """State space duality's backward: the programs of a group take every head of it once."""
    for programs, share in product((1, 2, 3, 100), range(1, 20)):
        per = ssd.heads_of_a_program(programs, share, torch.device("cpu"))
        splits = -(-share // per)
        taken = [h for i in range(splits) for h in range(i * per, min(i * per + per, share))]
        assert taken == list(range(share)) and splits <= max(1, -(-4 // programs))
