"""Scans over ranks: outputs, states and gradients of one device, bytes by the formula, and no rank left waiting."""

import os

import pytest
import torch
from refusals import message_of
from time_cases import B, cases

from nondual.ops.linear_attention import linear_attention
from nondual.ops.ssd import ssd
from nondual.parallel import of_lengths, traffic
from nondual.parallel.scan import parallel_linear_attention, parallel_selective_scan, parallel_ssd

dist = torch.distributed


def lengths(size):
    """Uneven parts, ranks without a step at the start, in between and at the end, and nothing at all."""
    return [[4, 3, 5, 1][:size], [3, 0, 0, 4][:size], [0, 0, 2, 0][:size], [0] * size]


def weights(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves_of(tensors):
    return {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in tensors.items()}


def summed(x):
    x = x.clone()
    dist.all_reduce(x)
    return x


# --- in every rank -------------------------------------------------------------------------------------------------


def against_one_device(rank, size):
    """The greatest difference of outputs, states and gradients from one device's, for each case and division."""
    said = {}
    for of_each in lengths(size):
        layout = of_lengths(of_each)
        span = layout.pieces[rank][0]
        for kind, case in cases(layout.length).items():
            whole = leaves_of(case.tensors)
            out, state = case.one(**whole, **case.options)
            loss = (out * weights(out.shape, 1)).sum() + (state * weights(state.shape, 2)).sum()
            floating = [x for x in whole.values() if x.requires_grad]
            loss = loss + 0 * sum(x.sum() for x in floating)  # without steps one device's output needs no gradient
            expected = torch.autograd.grad(loss, floating, materialize_grads=True)
            expected = dict(zip((n for n, x in whole.items() if x.requires_grad), expected))

            own = leaves_of(case.part(span.start, span.stop))
            got, after = case.many(**own, **case.options)
            dim = 2 if case.one is linear_attention else 1
            loss = (got * weights(out.shape, 1).narrow(dim, span.start, len(span))).sum()
            if rank == size - 1:
                loss = loss + (after * weights(state.shape, 2)).sum()
            floating = [x for x in own.values() if x.requires_grad]
            if size == 1:
                loss = loss + 0 * sum(x.sum() for x in floating)
            grads = torch.autograd.grad(loss, floating, materialize_grads=True)
            pairs = [(got, out.narrow(dim, span.start, len(span)))]
            pairs += [(after, case.one(**case.part(0, span.stop), **case.options)[1])]
            for name, grad in zip((n for n, x in own.items() if x.requires_grad), grads):
                if name in case.time:
                    pairs.append((grad, expected[name].narrow(case.time[name], span.start, len(span))))
                else:
                    pairs.append((summed(grad), expected[name]))
            differences = [float((a - b).detach().abs().max()) for a, b in pairs if a.numel()]
            assert all(a.shape == b.shape for a, b in pairs)
            said[f"{kind}, {of_each}"] = max(differences, default=0.0)
    return said


def without_an_order(rank, size):
    """Bidirectional linear attention: as one device's, and more keys than queries on each rank."""
    errors = []
    for normalise in (False, True):
        of_keys, of_queries = of_lengths([4, 0, 5, 1][:size]), of_lengths([2, 3, 0, 1][:size])
        shapes = [(B, 6, of_queries.length, 5), (B, 3, of_keys.length, 5), (B, 3, of_keys.length, 3)]
        q, k, v = (weights(shape, i).abs().requires_grad_() for i, shape in enumerate(shapes))
        state = weights((B, 6, 5, 3 + normalise), 4).abs().requires_grad_()
        options = {"causal": False, "normalise": normalise}
        out, total = linear_attention(q, k, v, state=state, **options)
        expected = torch.autograd.grad((out * weights(out.shape, 5)).sum(), (q, k, v, state))
        layouts = (of_queries, of_keys, of_keys)
        own = [layout.shard(x.detach(), rank).requires_grad_() for layout, x in zip(layouts, (q, k, v))]
        first = state.detach().clone().requires_grad_()
        got, sum_of_all = parallel_linear_attention(*own, state=first, **options)
        loss = (got * of_queries.shard(weights(out.shape, 5), rank)).sum()
        grads = torch.autograd.grad(loss, (*own, first), materialize_grads=True)
        pairs = [(got, of_queries.shard(out, rank)), (sum_of_all, total)]
        pairs += [(grad, layout.shard(x, rank)) for grad, layout, x in zip(grads, layouts, expected)]
        if rank == 0:
            pairs.append((grads[3], expected[3]))
        errors += [float((a - b).detach().abs().max()) for a, b in pairs if a.numel()]
    return max(errors)


def counted(rank, size):
    """Bytes forward and backward of each kind."""
    said = {}
    layout = of_lengths([4, 3, 5, 1][:size])
    span = layout.pieces[rank][0]
    for kind, case in cases(layout.length).items():
        own = leaves_of(case.part(span.start, span.stop))
        with traffic() as forward:
            out, state = case.many(**own, **case.options)
        with traffic() as backward:
            out.sum().backward()
        said[kind] = [forward.bytes, backward.bytes, list(state.shape)]
    return said


def one_gradient_at_a_time(rank, size):
    """Each of them alone asks every rank to take part, one without steps as well; and recomputed in backward."""
    case = cases(5)["ssd"]
    span = of_lengths([5, 0, 0][:size]).pieces[rank][0]
    for name in ("x", "delta", "A", "C", "D", "z"):
        own = leaves_of(case.part(span.start, span.stop))
        out, _ = case.many(**own, **case.options)
        torch.autograd.grad(out.sum(), own[name], allow_unused=True)
    for frozen in ("x", "A"):
        own = leaves_of(case.part(span.start, span.stop))
        own[frozen].requires_grad_(False)
        case.many(**own, **case.options)[0].sum().backward()
    own = leaves_of(case.part(span.start, span.stop))
    (once,) = torch.autograd.grad(case.many(**own, **case.options)[0].cos().sum(), own["x"], create_graph=True)
    twice = message_of(lambda: once.sum().backward())
    scan = torch.utils.checkpoint.checkpoint
    out = scan(lambda **given: case.many(**given, **case.options)[0], use_reentrant=False, **own)
    plain = torch.autograd.grad(case.many(**own, **case.options)[0].sum(), own["x"])[0]
    return [bool(torch.equal(torch.autograd.grad(out.sum(), own["x"])[0], plain)), twice]


def saved_for_backward(rank, size):
    """The most numbers in a tensor that is saved, as a share of those of time x state; and how many in all."""
    case, length = cases(192)["ssd"], 192
    span = of_lengths([length // size] * size).pieces[rank][0]
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.update({x.data_ptr(): x.numel()}) or x, lambda x: x):
        kept = case.many(**leaves_of(case.part(span.start, span.stop)), chunk=16, **case.options)
    del kept
    state = case.tensors["state"]
    return [max(saved.values()) / (len(span) * state.numel()), sum(saved.values())]


def narrow(rank, size):
    """bfloat16 and float32, with autocast and without: errors against float64, of ranks and of one device."""
    said = []
    for kind in ("selective scan", "ssd", "linear, channels", "gated delta"):
        for dtype in (torch.float32, torch.bfloat16):
            case = cases(13, dtype)[kind]
            span = of_lengths([4, 5, 4][:size]).pieces[rank][0]
            exact = {n: x.double() if x.is_floating_point() else x for n, x in case.tensors.items()}
            dim = 2 if case.one is linear_attention else 1
            out = case.one(**exact, **case.options)[0].narrow(dim, span.start, len(span))
            own = case.part(span.start, span.stop)
            ours = case.many(**own, **case.options)[0]
            theirs = case.one(**case.tensors, **case.options)[0].narrow(dim, span.start, len(span))
            assert ours.dtype == dtype
            errors = [float((x.double() - out).abs().max()) for x in (ours, theirs)]
            said.append([*errors, torch.finfo(dtype).eps * float(out.abs().max())])
    case = cases(13, torch.float32)["ssd"]
    with torch.autocast("cpu", torch.bfloat16):
        own = case.part(span.start, span.stop)
        ours = case.many(**own, **case.options)[0]
        theirs = case.one(**case.tensors, **case.options)[0].narrow(1, span.start, len(span))
    said.append([float((ours - theirs).abs().max()), 0.0, 0.01 * float(theirs.abs().max())])
    return said


def refused(rank, size):
    case = cases(4)["ssd"]
    own = case.part(0, 0 if rank == 2 else 4)
    other = own | {
        "x": own["x"][..., :4],
        "z": own["z"][..., :4],
        "D": own["D"][:, :4],
        "state": own["state"][:, :, :4],
    }
    bare = {name: x for name, x in own.items() if name not in ("state", "reset")}
    qkv = cases(4)["linear"].part(0, 4)
    delta = cases(4)["delta"].part(0, 4)
    return [
        message_of(lambda: parallel_ssd(**(other if rank == 1 else own))),
        message_of(lambda: parallel_ssd(**(own | {"A": own["A"][:2]} if rank == 0 else own))),
        message_of(lambda: parallel_ssd(**(bare | {"state": own["state"]} if rank else bare))),
        message_of(lambda: parallel_ssd(**(bare | {"reset": own["reset"]} if rank else bare))),
        message_of(lambda: parallel_linear_attention(**(delta if rank else qkv))),
        message_of(lambda: parallel_linear_attention(**qkv, causal=False, impl="triton")),
        message_of(lambda: parallel_selective_scan(**cases(4)["selective scan"].tensors, impl="fast")),
        message_of(lambda: parallel_linear_attention(**qkv, causal=rank == 0)),
        message_of(lambda: parallel_ssd(**own)),
    ]


def compiled(rank, size):
    """A model with a scan over ranks in its middle, compiled: it breaks there, and gives the same."""
    case = cases(7)["ssd"]
    own = case.part(0, 3) if rank == 0 else case.part(3, 7)

    def model(x):
        return parallel_ssd(**(own | {"x": x.sin()}), delta_softplus=True)[0].cos()

    return bool(torch.equal(torch.compile(model, backend="eager")(own["x"]), model(own["x"])))


def everything(rank, size):
    """All that needs ranks and leaves them alive, since starting them takes longer."""
    said = {
        "one device": against_one_device(rank, size),
        "no order": without_an_order(rank, size),
        "bytes": counted(rank, size),
        "saved": saved_for_backward(rank, size),
    }
    if size == 2:
        said["compiled"] = compiled(rank, size)
    if size == 3:
        said |= {
            "alone": one_gradient_at_a_time(rank, size),
            "narrow": narrow(rank, size),
            "refused": refused(rank, size),
        }
    return said


@pytest.fixture(scope="module")
def said(in_ranks):
    return in_ranks(everything, timeout=180)


def with_one_rank_gone(rank, size):
    dist.barrier()
    if rank == 1:
        os._exit(0)
    case = cases(4)["linear"]
    return message_of(lambda: case.many(**case.tensors, **case.options))


# --- tests ---------------------------------------------------------------------------------------------------------


def test_outputs_states_and_gradients_are_those_of_one_device(said):
    for size, ranks in said.items():
        for rank, of_rank in enumerate(ranks):
            for case, difference in of_rank["one device"].items():
                assert difference < 1e-11, (size, rank, case)


def test_without_an_order_every_query_reads_the_sum_over_ranks(said):
    assert max(of_rank["no order"] for ranks in said.values() for of_rank in ranks) < 1e-12


def numbers_of_decay(kind, state):
    """How many numbers a total decay has, for a state of this shape."""
    batch, heads, width = state[:3]
    if kind.startswith("selective"):
        return batch * heads * width
    if kind.startswith(("delta", "gated")):
        return batch * heads * width * width
    if kind.startswith("ssd"):
        return batch * heads
    return {
        "linear": 1, "linear, resets": batch, "linear, heads": batch * heads,
        "linear, steps, normalised": batch * heads, "linear, channels": batch * heads * width,
    }[kind]  # fmt: skip


def test_bytes_are_one_state_for_each_later_rank_and_a_decay_but_from_the_first(said):
    """Small states go directly; `test_passed_on` counts the doubling of large ones."""
    for size, ranks in said.items():
        for rank, of_rank in enumerate(ranks):
            for kind, (forward, backward, state) in of_rank["bytes"].items():
                numbers, decay = torch.Size(state).numel(), numbers_of_decay(kind, state)
                assert forward == 8 * (size - 1 - rank) * (numbers + decay * (rank > 0)), (size, rank, kind)
                assert backward == 8 * rank * (numbers + decay * (rank < size - 1)), (size, rank, kind)


def test_no_rank_saves_a_tensor_of_time_x_state(said):
    """The largest is the matrix of a chunk, as it is on one device."""
    assert {of_rank["saved"][0] for ranks in said.values() for of_rank in ranks} == {16 / (5 * 7)}


def test_what_a_rank_saves_falls_with_their_number(said):
    """But for the end state's part: its inputs in full precision, beside those of the operation."""
    of_one = said[1][0]["saved"][1]
    for size, ranks in said.items():
        for of_rank in ranks:
            assert of_rank["saved"][1] < 1.4 * of_one / size, (size, of_rank["saved"], of_one)


def test_every_rank_takes_part_whatever_gradient_is_asked_for(said):
    for of_rank in said[3]:
        recomputed, twice = of_rank["alone"]
        assert recomputed
        assert "differentiate twice a function that was marked with @once_differentiable" in twice


def test_narrow_dtypes_err_no_more_than_on_one_device(said):
    for of_rank in said[3]:
        for ours, theirs, unit in of_rank["narrow"]:
            assert ours <= 2 * theirs + unit


def test_a_compiled_model_breaks_at_the_scan_and_is_right(said):
    assert all(of_rank["compiled"] for of_rank in said[2])


def test_what_does_not_fit_is_one_error_on_every_rank(said):
    for rank, of_rank in enumerate(said[3]):
        width, own, state, reset, beta, engine, name, causal, fine = of_rank["refused"]
        assert width == (
            "ValueError: parallel_ssd must have the same head width on every rank, got [5, 4, 5] on ranks 0 to 2"
        )
        assert own.endswith("A must be (H,) = (6,), got (2,)") and ("parallel_ssd on rank 0" in own) == (rank != 0)
        assert state == (
            "ValueError: parallel_ssd: state must be given on rank 0, which holds the start of the sequence, got it on "
            "ranks [1, 2]"
        )
        assert "parallel_ssd must have the same reset on every rank, got [0, 1, 1]" in reset
        assert "parallel_linear_attention must have the same beta on every rank, got [0, 1, 1]" in beta
        assert "causal must be True for impl='triton'" in engine or "impl='triton'" in engine
        assert name.startswith("ValueError: impl must be one of ['auto', 'reference', 'cpu', 'triton'], got 'fast'")
        assert "must have the same causal on every rank, got [1, 0, 0]" in causal
        assert fine == ""


def test_a_rank_that_dies_is_named_by_those_that_live(in_ranks):
    (ranks,) = in_ranks(with_one_rank_gone, sizes=(3,), dying=(1,), timeout=120).values()
    for rank in (0, 2):
        said = f"RuntimeError: parallel_linear_attention: rank 1 does not answer (rank {rank} of 3 was told"
        assert ranks[rank].startswith(said)


def test_on_one_device_it_is_the_operation_itself(said):
    """P = 1 has no second pass: every difference is exactly 0."""
    assert set(said[1][0]["one device"].values()) == {0.0}
    assert ssd is cases(1)["ssd"].one
