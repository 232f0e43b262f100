"""Training with sequences cut over ranks is training on one device: step for step, with DDP, FSDP2 and checkpoints."""

import pytest
import torch
import torch.distributed.checkpoint as saved
from refusals import message_of
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nondual.language_models.gpt import GPT
from nondual.losses import token_loss
from nondual.parallel import (
    AllToAllAttention,
    RingAttention,
    contiguous,
    of_lengths,
    parallel_token_loss,
    shard_sequence,
    shard_tokens,
    zigzag,
)
from nondual.relative_positions import Rotary
from nondual.training import optimiser

dist = torch.distributed
V, E, H, N, STEPS = 11, 24, 4, 13, 4
OPS = {"AllToAllAttention": AllToAllAttention, "RingAttention": RingAttention}


def model_of() -> GPT:
    torch.manual_seed(0)
    return GPT(V, E, 2, H, d_ff=7, n_kv_heads=2, positions=Rotary(6)).double()


def batches(count=STEPS, rows=4):
    """Token ids (B, N + 1), of another length in every step."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(V, (rows, N + 1 - step), generator=generator) for step in range(count)]


def ignoring(targets, ignored):
    """The targets, with -100 for two tokens of the vocabulary if they are not to be predicted."""
    return targets.masked_fill(targets < 2, -100) if ignored else targets


def on_one_device(model, steps, ignored=False):
    """The losses of some steps of AdamW."""
    by, losses = optimiser(model, 0.02), []
    for ids in steps:
        losses.append(one_step(model, by, ids[:, :-1], ids[:, 1:], ignored))
    return by, losses


def one_step(model, by, inputs, targets, ignored=False):
    real = ~((targets < 2) & ignored)
    loss = token_loss(model(inputs), targets, real=real)
    loss.backward()
    by.step()
    by.zero_grad()
    return loss.item()


def one_step_over_ranks(model, by, inputs, targets, ignored=False):
    loss = parallel_token_loss(model(inputs), ignoring(targets, ignored))
    loss.backward()
    by.step()
    by.zero_grad()
    return loss.item()


def farthest(ours, theirs) -> float:
    """The largest difference between parameters; sharded ones are put together, on every rank."""
    whole = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in ours.parameters()]
    assert [x.shape for x in whole] == [x.shape for x in theirs.parameters()]
    return max(float((x - y).detach().abs().max()) for x, y in zip(whole, theirs.parameters()))


# --- in every rank -------------------------------------------------------------------------------------------------


def step_for_step(rank, size):
    """Losses and parameters beside one device's, for each op and layout, with tokens that count and that do not."""
    said = {}
    for name, layout in {"zigzag": zigzag, "contiguous": contiguous, "one has all": one_has_all}.items():
        ignored = name == "zigzag"
        alone = model_of()
        _, expected = on_one_device(alone, batches(), ignored)
        for op in OPS:
            ours = DistributedDataParallel(shard_sequence(model_of(), layout, op=OPS[op]))
            by, losses = optimiser(ours, 0.02), []
            for ids in batches():
                losses.append(one_step_over_ranks(ours, by, *shard_tokens(ids, layout), ignored))
            off = max(abs(a - b) for a, b in zip(losses, expected))
            said[f"{op} {name}"] = [off, farthest(ours.module, alone)]
    return said


def one_has_all(length, size):
    return of_lengths([0] * (size - 1) + [length])


def over_a_mesh(rank, size):
    """Each half of a batch on two ranks, which cut its sequences: every way to do so, beside one device."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    alone, said = model_of(), {}
    _, expected = on_one_device(alone, batches())
    numbers = sum(x.numel() for x in alone.parameters())
    for op in OPS:
        for how in ("DDP", "FSDP2", "HSDP"):
            ours, losses = distributed(mesh, how, op), []
            by = optimiser(ours, 0.02)
            for ids in batches():
                mine = ids.chunk(2)[mesh["data"].get_local_rank()]
                losses.append(one_step_over_ranks(ours, by, *shard_tokens(mine, zigzag, mesh["sequence"])))
            off = max(abs(a - b) for a, b in zip(losses, expected))
            held = sum(x.to_local().numel() if hasattr(x, "to_local") else x.numel() for x in ours.parameters())
            said[f"{op} {how}"] = [off, farthest(ours.module if how == "DDP" else ours, alone), held / numbers]
    return said


def distributed(mesh, how, op):
    """Our model over a mesh; "FSDP2" shards its parameters over all ranks, "HSDP" over those of a sequence alone."""
    model = shard_sequence(model_of(), zigzag, mesh["sequence"], op=OPS[op])
    if how == "DDP":
        return DistributedDataParallel(model)
    over = mesh if how == "HSDP" else mesh._flatten("all")
    for layer in model.layers:
        fully_shard(layer, mesh=over)
    return fully_shard(model, mesh=over)


def state_of(model, by):
    weights, moments = get_state_dict(model, by)
    return {"model": weights, "optimiser": moments}


def one_more_step(mesh, model, by, ids):
    mine = ids.chunk(2)[mesh["data"].get_local_rank()]
    return one_step_over_ranks(model, by, *shard_tokens(mine, zigzag, mesh["sequence"]))


def saves_and_loads(rank, size, ours, theirs):
    """Four ranks save after two steps into one folder, and go on with what one device saved in the other."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    model = distributed(mesh, "FSDP2", "AllToAllAttention")
    by = optimiser(model, 0.02)
    losses = [one_more_step(mesh, model, by, ids) for ids in batches(2)]
    saved.save(state_of(model, by), checkpoint_id=ours)
    forget(model)
    by = optimiser(model, 0.02)
    load(model, by, theirs)
    losses.append(one_more_step(mesh, model, by, batches(3)[2]))
    alone = model_of()
    on_one_device(alone, batches(3))
    return [losses, farthest(model, alone)]


@torch.no_grad()
def forget(model):
    for x in model.parameters():
        x.fill_(0.5)


def load(model, by, folder, **options):
    state = state_of(model, by)
    saved.load(state, checkpoint_id=folder, **options)
    set_state_dict(model, by, model_state_dict=state["model"], optim_state_dict=state["optimiser"])


def losses_and_errors(rank, size):
    """The loss beside one of all tokens, its gradient, and what is refused on every rank."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 7, V, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (2, 7), generator=generator)
    targets[0, 2:] = -100
    layout = of_lengths([4, 0, 3])
    whole = scores.clone().requires_grad_()
    expected = token_loss(whole, targets, real=targets != -100)
    expected.backward()
    mine, labels = layout.shard(scores, rank, dim=1).requires_grad_(), layout.shard(targets, rank, dim=1)
    loss = parallel_token_loss(mine, labels)
    loss.backward()
    none = parallel_token_loss(mine, torch.full_like(labels, -100))
    half = parallel_token_loss(mine.detach().bfloat16(), labels.int())
    off = (mine.grad / size - layout.shard(whole.grad, rank, dim=1)).abs()
    ids = torch.arange(8).repeat(2, 1)
    first = rank == 0
    return [
        abs(float(loss - expected)),
        float(off.max()) if off.numel() else 0.0,
        [none.item(), float(torch.autograd.grad(none, mine)[0].abs().sum())],
        [str(half.dtype), abs(float(half - expected)) < 0.05],
        [x.tolist() for x in shard_tokens(ids, zigzag)],
        message_of(lambda: parallel_token_loss(mine[0] if first else mine, labels)),
        message_of(lambda: parallel_token_loss(mine, labels.double())),
        message_of(lambda: parallel_token_loss(mine[..., : V - first], labels)),
        message_of(lambda: shard_tokens(ids + first, zigzag)),
        message_of(lambda: shard_tokens(ids.double(), zigzag)),
        message_of(lambda: shard_tokens(ids, zigzag(6, size))),
        message_of(lambda: shard_tokens(ids, zigzag(7, size))),
    ]


# --- tests ---------------------------------------------------------------------------------------------------------


def test_every_step_is_that_of_one_device(in_ranks):
    (ranks,) = in_ranks(step_for_step, sizes=(2,), timeout=150).values()
    for said in ranks:
        assert len(said) == 3 * len(OPS)
        for case, (loss_off, parameters_off) in said.items():
            assert loss_off < 1e-12 and parameters_off < 1e-8, case


def test_a_mesh_of_data_and_sequence_is_one_device(in_ranks):
    (ranks,) = in_ranks(over_a_mesh, sizes=(4,), timeout=150).values()
    for said in ranks:
        assert len(said) == 3 * len(OPS)
        for case, (loss_off, parameters_off, held) in said.items():
            assert loss_off < 1e-12 and parameters_off < 1e-8, case
            assert held < {"DDP": 1.01, "FSDP2": 0.4, "HSDP": 0.6}[case.split()[1]]  # of the parameters


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_what_four_ranks_save_one_device_loads_and_the_other_way_round(in_ranks, tmp_path):
    by_one, by_four = tmp_path / "one", tmp_path / "four"
    model = model_of()
    by, expected = on_one_device(model, batches(3)[:2])
    saved.save(state_of(model, by), checkpoint_id=by_one, no_dist=True)
    third = batches(3)[2]
    expected.append(one_step(model, by, third[:, :-1], third[:, 1:]))

    (ranks,) = in_ranks(saves_and_loads, str(by_four), str(by_one), sizes=(4,), timeout=150).values()
    for losses, parameters_off in ranks:
        assert losses == pytest.approx(expected, abs=1e-12) and parameters_off < 1e-8

    other = model_of()
    forget(other)
    by = optimiser(other, 0.02)
    load(other, by, by_four, no_dist=True)
    loss = one_step(other, by, third[:, :-1], third[:, 1:])
    assert loss == pytest.approx(expected[2], abs=1e-12) and farthest(other, model) < 1e-8


def test_the_loss_is_that_of_all_tokens_and_what_does_not_fit_is_refused(in_ranks):
    (ranks,) = in_ranks(losses_and_errors, sizes=(3,)).values()
    pieces = zigzag(7, 3)
    for rank, (off, gradient_off, none, half, tokens, *said) in enumerate(ranks):
        assert off < 1e-14 and gradient_off < 1e-14
        assert none == [0.0, 0.0] and half == ["torch.float32", True]
        places = pieces.positions(rank).tolist()
        assert tokens == [[places] * 2, [[place + 1 for place in places]] * 2]
        shape, kind, vocabulary, differ, floating, short, fits = said
        assert "scores must be floating point (B, n, V), got torch.float64 (4, 11)" in shape
        assert "targets must be integers (B, n)" in kind and "got torch.float64" in kind
        assert vocabulary.endswith(
            "parallel_token_loss must have the same vocabulary on every rank, got [10, 11, 11] on ranks 0 to 2"
        )
        assert "shard_tokens must have the same ids (their checksum) on every rank" in differ
        assert "ids must be integers (B, N + 1), got torch.float64 (2, 8)" in floating
        assert "layout must be of 7 positions, one fewer than ids has, over 3 ranks, got 6 over 3" in short
        assert fits == ""
