"""A state that is passed along the ranks of a group: each rank changes the state that it gets, and hands it on.

    h_{r+1} = D_r h_r + S_r        h_0 the initial state, h_r the state before rank r's first step

Rank r knows S_r, where its part of the sequence leads from a state of zero, and D_r, how much of a state is left after
its part. Two such steps made one are again such a step, (D_2 D_1, D_2 S_1 + S_2), so that no rank has to wait for all
the ranks before it. Two ways to share the work (`by_doubling` chooses):

- direct: each rank sends its step to all later ranks, which apply them in order. One round.
- by doubling: after k rounds each rank has joined the 2^k steps before its own. ceil(log2 P) rounds, in each of which a
  rank sends one step to one rank.

A step that begins with rank 0 is never applied to a state: its S alone is sent. The gradient is the same scan from the
last rank to the first: with g_r the gradient of h_r where rank r uses it, e_r = g_r + D_rᵀ e_{r+1}; then e_{r+1} is
that of S_r, and e_{r+1} h_r that of D_r.

Source: Hillis and Steele 1986, "Data parallel algorithms", for the doubling; Blelloch 1990, "Prefix sums and their
applications", section 1.4.1, for linear recurrences; over devices Sun et al. 2024, LASP (2404.02882), section 2.2, who
pass states from rank to rank, one after another. Symbols: P ranks, numbered r.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nondual.ops.autocast import autocast_off
from nondual.ops.checks import check_kinds, check_shapes, check_tensors
from nondual.parallel.exchange import Ranks, compared, exchange, not_compiled, ranks_of
from nondual.parallel.inputs import device_of

ROUND = 2**19
"""How many bytes can be sent in the time that one more round takes to begin: 10 to 20 microseconds at 25 to 50 GB/s."""

Product = Callable[[Tensor, Tensor], Tensor]


@not_compiled
def pass_on(
    added: Float[Tensor, "..."],
    decay: Float[Tensor, "..."],
    initial: Float[Tensor, "..."] | None = None,
    *,
    product: Product = torch.mul,
    group: Any = None,
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """The state before this rank's first step and after its last, h_r and h_{r+1} = D_r h_r + S_r.

    Every rank must make the call and, where it is differentiated, go backward through its own results: the others wait
    for it. A D_r of 0 forgets the state, a NaN in it as well.

    Args:
        added: S_r, where this rank's part leads from a state of zero; any shape, floating point.
        decay: D_r, in the dtype of `added`. With torch.mul it has the shape of `added` or 1 in its place; with
            torch.matmul it is a matrix (…, D, D) for states (…, D, Dv).
        initial: h_0, in the shape of `added`, as rank 0 gives it; zero where that leaves it out. What other ranks give
            is not read.
        product: how a decay acts on a state, and on another decay: torch.mul, or torch.matmul.
        group: a process group, a mesh of one dimension, or None for all ranks.

    Returns:
        The states before and after this rank's part. On the last rank the second is the state after the whole sequence;
        no other rank has that.

    Raises:
        TypeError: what is not a tensor.
        ValueError: on every rank alike: shapes, dtypes or devices that do not fit, or differ between ranks; a product
            that is neither; an initial state that rank 0 does not give.
        RuntimeError: no process group, a rank that does not answer, or a second derivative.
    """
    ranks = ranks_of(group)

    def check() -> dict[str, int]:
        _check(added, decay, initial, product)
        return {
            **{f"size of dimension {i} of added": size for i, size in enumerate(added.shape)},
            **{f"size of dimension {i} of decay": size for i, size in enumerate(decay.shape)},
            "bytes of a number": added.element_size(),
            "initial state": int(initial is not None),
            "need of gradients": int(need_of_gradients(added, decay, initial)),
        }

    sizes = compared(ranks, "pass_on", check, device_of(ranks, added), may_differ=("initial state",))
    first_rank_gives("pass_on", "initial", [of_rank["initial state"] for of_rank in sizes])
    before, _ = carry(ranks, "pass_on", added, decay, initial, product)
    return before, act(product, decay, before) + added


def need_of_gradients(*tensors: Tensor | None) -> bool:
    """Whether there will be a backward pass to one of these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def first_rank_gives(call: str, name: str, given: Sequence[int]) -> None:
    """Refuse what stands before the whole sequence, where some rank gives it and rank 0 does not.

    Args:
        call: the operation.
        name: of its argument.
        given: for each rank, whether it gives one.

    Raises:
        ValueError: on every rank alike, since all are told the same.
    """
    if any(given) and not given[0]:
        where = [rank for rank, there in enumerate(given) if there]
        raise ValueError(
            f"{call}: {name} must be given on rank 0, which holds the start of the sequence, got it on ranks {where}"
        )


def carry(
    ranks: Ranks,
    call: str,
    added: Tensor,
    decay: Tensor,
    initial: Tensor | None,
    product: Product = torch.mul,
    through: Sequence[Tensor] = (),
) -> tuple[Tensor, list[Tensor]]:
    """The state before this rank's first step, of arguments that fit; and the tensors of `through`, as they are.

    What is computed from tensors that went through depends on this call, in autograd's eyes. So backward comes by here
    on every rank, on one without steps too, whose output depends on no state.

    Args:
        ranks: the group.
        call: the name of the operation, for an error.
        added: as in `pass_on`; what the last rank adds is not needed.
        decay: likewise.
        initial: read on rank 0 alone.
        product: as in `pass_on`.
        through: any tensors.
    """
    initial = initial if ranks.rank == 0 else None
    before, *through = _PassedOn.apply(ranks, call, product, added, decay, initial, *through)
    return before, through


class _PassedOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks, call, product, added, decay, initial, *through):
        ctx.ranks, ctx.call, ctx.product = ranks, call, product
        ctx.set_materialize_grads(False)
        with autocast_off(added.device.type):
            own = added if initial is None else act(product, decay, initial) + added
            before = _exclusive_scan(ranks, call, own, decay, product)
        if before is None:  # no rank before this one
            before = torch.zeros_like(added) if initial is None else initial.clone()
        ctx.save_for_backward(decay, before)
        return before, *through

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        d_before, *d_through = gradients
        decay, before = ctx.saved_tensors
        matrix = ctx.product is torch.matmul
        adjoint = decay.mT if matrix else decay
        with autocast_off(before.device.type):
            d_before = torch.zeros_like(before) if d_before is None else d_before
            later = _exclusive_scan(ctx.ranks, ctx.call, d_before, adjoint, ctx.product, reverse=True)
            d_decay, d_initial = None, d_before
            if later is not None:  # there is a rank after this one
                if ctx.needs_input_grad[4]:
                    d_decay = (later @ before.mT if matrix else later * before).sum_to_size(decay.shape)
                d_initial = d_before + act(ctx.product, adjoint, later)
        return None, None, None, later, d_decay, d_initial if ctx.needs_input_grad[5] else None, *d_through


def _check(added: object, decay: object, initial: object, product: Product) -> None:
    """Refuse what does not fit together: what was expected, what was got."""
    check_tensors({"added": added, "decay": decay}, {"initial": initial})
    assert isinstance(added, Tensor) and isinstance(decay, Tensor) and (initial is None or isinstance(initial, Tensor))
    if product not in (torch.mul, torch.matmul):
        raise ValueError(f"product must be torch.mul or torch.matmul, got {product!r}")
    matrix = product is torch.matmul
    if matrix and added.ndim < 2:
        raise ValueError(f"added must be (…, D, Dv) with product=torch.matmul, got {tuple(added.shape)}")
    full = (*added.shape[:-1], added.shape[-2]) if matrix else tuple(added.shape)
    fits = decay.ndim == len(full) and all(have in (1, want) for have, want in zip(decay.shape, full))
    if not fits or (matrix and decay.shape[-2:] != full[-2:]):
        alone = ", before its last two" if matrix else ""
        raise ValueError(f"decay must be {full}, or 1 in place of a size{alone}, got {tuple(decay.shape)}")
    check_shapes({"initial": (initial, tuple(added.shape), "the shape of added")})
    check_kinds({"added": added, "decay": decay, "initial": initial}, {}, None)


def act(product: Product, decay: Tensor, state: Tensor) -> Tensor:
    """The decay applied to a state, or to an earlier decay. Where either is 0 so is the result: a reset forgets a NaN,
    and a decay that overflowed does not spoil a state of zero."""
    if product is torch.matmul:
        forgets = (decay == 0).all(-1).all(-1)[..., None, None]
        return decay @ state.masked_fill(forgets, 0)
    return product(decay, state).masked_fill((decay == 0) | (state == 0), 0)


# --- two ways ------------------------------------------------------------------------------------------------------


def by_doubling(size: int, state: int, decay: int) -> bool:
    """Whether doubling takes less time than sending each step directly to all later ranks.

    The last rank receives P - 1 steps directly, or one in each round; each further round counts as `ROUND` bytes.

    Args:
        size: P.
        state: bytes of a state.
        decay: bytes of a decay.
    """
    rounds = max(size - 1, 0).bit_length()
    with_decay = sum(2 ** (k + 1) < size for k in range(rounds))  # rounds in which a step that needs its decay is sent
    direct = ROUND + (size - 1) * state + (size - 2) * decay
    return size > 1 and rounds * ROUND + rounds * state + with_decay * decay < direct


def _exclusive_scan(
    ranks: Ranks, call: str, added: Tensor, decay: Tensor, product: Product, reverse: bool = False
) -> Tensor | None:
    """What the ranks before this one lead to from zero, in reverse those after it; None where there are none."""
    number = added.element_size()
    doubling = by_doubling(ranks.size, added.numel() * number, decay.numel() * number)
    return (doubled if doubling else direct)(Line(ranks, call, reverse), Step(added, decay), product)


class Step(NamedTuple):
    """h -> decay h + added.

    Attributes:
        added: S.
        decay: D; None where the step begins with the sequence, and is applied to no state.
    """

    added: Tensor
    decay: Tensor | None


class Line:
    """The ranks in the order in which a state passes them, each with its place from 0 on.

    Args:
        ranks: the group.
        call: the name of the operation, for an error.
        reverse: the last rank has place 0.
    """

    ranks: Ranks
    call: str
    reverse: bool
    size: int
    place: int

    def __init__(self, ranks: Ranks, call: str, reverse: bool = False):
        self.ranks, self.call, self.reverse, self.size = ranks, call, reverse, ranks.size
        self.place = self.rank_at(ranks.rank)

    def rank_at(self, place: int) -> int:
        """The rank at a place."""
        return self.size - 1 - place if self.reverse else place

    def exchanged(
        self, like: Step, step: Step, sends: Sequence[int], receives: Sequence[int], with_decay: Sequence[int]
    ) -> list[Step]:
        """One round: a step goes to some places, and steps come from others, each in one message.

        Args:
            like: of the shapes of what comes.
            step: what goes.
            sends: to which places.
            receives: from which places.
            with_decay: those of them whose step has its decay.
        """
        assert like.decay is not None
        n, of_decay = like.added.numel(), like.decay.numel()
        packed = step.added if step.decay is None else torch.cat([step.added.reshape(-1), step.decay.reshape(-1)])
        rows = [like.added.new_empty(n + of_decay * (place in with_decay)) for place in receives]
        exchange(
            self.ranks,
            [(self.rank_at(place), packed) for place in sends],
            [(self.rank_at(place), into) for place, into in zip(receives, rows)],
            self.call,
        ).arrived()
        decays = [x[n:].view(like.decay.shape) if place in with_decay else None for place, x in zip(receives, rows)]
        return [Step(x[:n].view(like.added.shape), decay) for x, decay in zip(rows, decays)]


def direct(line: Line, own: Step, product: Product) -> Tensor | None:
    """In one round: every step goes to all later places.

    Args:
        line: the ranks in order.
        own: this rank's step.
        product: as in `pass_on`.

    Returns:
        The state before this place, from zero; None for the first.
    """
    later, earlier = range(line.place + 1, line.size), range(line.place)
    state = None
    for step in line.exchanged(own, own if line.place else Step(own.added, None), later, earlier, earlier[1:]):
        state = step.added if state is None or step.decay is None else act(product, step.decay, state) + step.added
    return state


def doubled(line: Line, own: Step, product: Product) -> Tensor | None:
    """In ceil(log2 P) rounds: in round k each place sends what it knows to the place 2^k further on.

    The arguments and the result are those of `direct`.
    """
    assert own.decay is not None
    before: Step | None = None  # of the places that this one has joined, up to the one before it
    span = 1
    while span < line.size:
        source, to = line.place - span, line.place + span
        added, decay = own
        if before is not None:
            added = act(product, own.decay, before.added) + added
            decay = None if before.decay is None else act(product, own.decay, before.decay)
        known = Step(added, decay if source >= 0 else None)
        sends, receives = (range(place, place + 1) if 0 <= place < line.size else range(0) for place in (to, source))
        for step in line.exchanged(own, known, sends, receives, receives if source >= span else range(0)):
            if before is None:
                before = step
                continue
            assert before.decay is not None
            added = act(product, before.decay, step.added) + before.added
            before = Step(added, None if step.decay is None else act(product, before.decay, step.decay))
        span *= 2
    return None if before is None else before.added
