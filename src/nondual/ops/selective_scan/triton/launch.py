"""One call of the operator, from its inputs to the launches: layouts, memory for results, numbers of programs."""

import math

import torch
import triton
from torch import Tensor

from nondual.ops.kernels import contiguous_rows, strides
from nondual.ops.selective_scan.triton import tiles
from nondual.ops.selective_scan.triton.adjoint import adjoint_kernel
from nondual.ops.selective_scan.triton.backward import backward_kernel
from nondual.ops.selective_scan.triton.forward import forward_kernel, pass_kernel


class Launcher:
    """The inputs of one call as the kernels take them, and the launches of its forward or its backward pass.

    u, delta, z and dy keep their layout where the channels of a step lie side by side, and are copied otherwise. B and
    C, which every channel of a group reads, become (B, L, G, BLOCK_N) in float32, with zeros for the missing states.
    What has both channels and states, as A and the states themselves, is (…, D, N), since a thread has neighbouring
    states; for the adjoint kernel, where neighbouring threads have neighbouring channels, it is (…, N, D).
    """

    def __init__(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        bias: Tensor | None, softplus: bool, state: Tensor | None, reset: Tensor | None,
    ):  # fmt: skip
        self.differentiable = (u, delta, A, B, C, D, z, bias, state)  # as given: each has a gradient of its dtype
        self.batch, self.length, self.channels = u.shape
        self.states = A.shape[1]
        self.u, self.delta = contiguous_rows(u), contiguous_rows(delta)
        self.z = None if z is None else contiguous_rows(z)
        self.s_zb, self.s_z = (0, 0) if self.z is None else self.z.stride()[:2]
        self.A, self.B, self.C = wide(A), wide_rows(B), wide_rows(C)
        self.D, self.bias, self.initial = (None if x is None else wide(x) for x in (D, bias, state))
        self.softplus = softplus
        self.reset = None if reset is None else reset.contiguous().view(torch.uint8)
        self.b_groups, self.c_groups = (0 if x.ndim == 2 else x.shape[2] for x in (B, C))
        self.groups = math.lcm(max(1, self.b_groups), max(1, self.c_groups))

    def cut(self, kernel: str) -> None:
        """Set how many spans there are, and their length, a whole number of chunks."""
        chunks = triton.cdiv(self.length, tiles.CHUNK)
        self.span = triton.cdiv(chunks, tiles.spans_of(self.u, kernel)) * tiles.CHUNK
        self.spans = triton.cdiv(self.length, self.span)

    def forward(self, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, the last state, and with `save` what the backward pass needs, as `empty_outputs` has it."""
        self.cut("forward")
        y, last, checkpoints, ungated = empty_outputs(self.u, self.A, self.z, save)
        config = tiles.configuration("forward", self.states)
        both_levels = {
            **self.inputs(),
            "p_u": self.u,
            "p_A": self.A,
            "p_B": self.B,
            **strides("b", u=self.u),
            "S_U": self.u.stride(1),
            "B_GROUPS": self.b_groups,
            "CHUNK": tiles.CHUNK,
            **config,
        }
        programs = self.programs(config["BLOCK_D"])
        start = self.initial
        end = self.per_span(self.channels, self.states)
        with torch.cuda.device_of(self.u):
            if self.spans > 1:
                decay = torch.empty_like(end)
                forward_kernel[(programs,)](
                    **both_levels | {"p_z": None},
                    p_C=None,
                    p_D=None,
                    p_start=None,
                    p_y=None,
                    p_ungated=None,
                    p_checkpoint=None,
                    p_end=end,
                    p_decay=decay,
                )
                start = self.pass_on(end, decay, start, reverse=False)
            forward_kernel[(programs,)](
                **both_levels,
                p_C=self.C,
                p_D=self.D,
                p_start=start,
                p_y=y,
                p_ungated=ungated if save and self.z is not None else None,
                p_checkpoint=checkpoints if save else None,
                p_end=end,
                p_decay=None,
            )
        return y, last.copy_(end[:, -1]), checkpoints, ungated

    def backward(
        self, dy: Tensor | None, d_last: Tensor | None, checkpoints: Tensor, ungated: Tensor
    ) -> tuple[Tensor, ...]:
        """The gradients of u, delta, A, B, C, D, z, bias and the initial state, of size 0 for what was not given."""
        self.cut("backward")
        grads = empty_gradients(*self.differentiable)
        du, ddelta, dA, dB, dC, dD, dz, dbias, dstate = grads
        dy = contiguous_rows(self.u.new_zeros(()).expand(self.u.shape) if dy is None else dy)
        config = tiles.configuration("backward", self.states)
        width, block_n = config["D_LO"] * config["D_HI"], config["N_HI"] * config["N_LO"]
        both_levels = {**self.inputs(), "p_dy": dy, **strides("b", dy=dy), "S_DY": dy.stride(1)}

        # Each program's sums over its steps and, for dB and dC that depend on time, over its channels.
        blocks = triton.cdiv(self.channels // self.groups, width)
        timed = (self.batch, self.length, self.groups, blocks, block_n)
        untimed = (self.batch, self.spans, self.channels, self.states)
        A_sums, q = self.empty(*untimed), self.empty(*untimed)
        B_sums, C_sums = (self.empty(*untimed if x.ndim == 2 else timed) for x in (self.B, self.C))
        D_sums, bias_sums = (
            None if x is None else self.empty(self.batch, self.spans, self.channels) for x in (self.D, self.bias)
        )
        scratch = self.empty(self.programs(width) * (tiles.CHUNK // config["STEPS"]) * width * block_n)

        end = None if d_last is None else wide(d_last)
        with torch.cuda.device_of(self.u):
            if self.spans > 1:
                end = self.between_spans(end, both_levels)
            backward_kernel[(self.programs(width),)](
                **both_levels,
                p_u=self.u,
                p_A=self.A,
                p_B=self.B,
                p_C=self.C,
                p_D=self.D,
                p_ungated=None if self.z is None else ungated,
                p_checkpoint=checkpoints,
                p_end=end,
                p_scratch=scratch,
                p_du=du,
                p_ddelta=ddelta,
                p_dA=A_sums,
                p_dB=B_sums,
                p_dC=C_sums,
                p_dD=D_sums,
                p_dz=None if self.z is None else dz,
                p_dbias=bias_sums,
                p_start=q,
                **strides("b", u=self.u),
                S_U=self.u.stride(1),
                B_GROUPS=self.b_groups,
                CHUNK=tiles.CHUNK,
                **config,
            )

        dA.copy_(A_sums.sum((0, 1)))
        for grad, x, sums in ((dB, self.B, B_sums), (dC, self.C, C_sums)):
            if x.ndim == 2:
                grad.copy_(sums.sum((0, 1)))
            else:  # the kernel's groups are those that share both B and C: of one of B there may be several, or of C
                grad.copy_(sums.view(*timed[:2], x.shape[2], -1, block_n).sum(3)[..., : self.states])
        for grad, sums in ((dD, D_sums), (dbias, bias_sums)):
            if sums is not None:
                grad.copy_(sums.sum((0, 1)))
        if self.initial is not None:
            dstate.copy_(q[:, 0])
        return grads

    def between_spans(self, end: Tensor | None, both_levels: dict) -> Tensor:
        """q after each span (B, spans, D, N), by the first of two levels, from the last state's gradient (B, D, N)."""
        local, decay = (self.per_span(self.states, self.channels) for _ in range(2))
        config = tiles.configuration("adjoint", self.states)
        adjoint_kernel[(self.programs(config["BLOCK_D"]),)](
            **both_levels,
            p_A=states_first(self.A),
            p_C=self.C if self.c_groups else states_first(self.C),
            p_end=local,
            p_decay=decay,
            **config,
        )
        end = None if end is None else states_first(end)
        return states_first(self.pass_on(local, decay, end, reverse=True))

    def pass_on(self, local: Tensor, decay: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
        """The state before each span; in reverse, q after each span."""
        start, size, block = torch.empty_like(local), self.states * self.channels, 256
        pass_kernel[(self.batch * triton.cdiv(size, block),)](
            p_start=start,
            p_local=local,
            p_decay=decay,
            p_initial=initial,
            size=size,
            spans=self.spans,
            REVERSE=reverse,
            BLOCK=block,
            num_warps=4,
        )
        return start

    # --- what the launches share -----------------------------------------------------------------------------------

    def inputs(self) -> dict:
        """The arguments that the forward, adjoint and backward kernels have in common."""
        return {
            "p_delta": self.delta,
            "p_z": self.z,
            "p_bias": self.bias,
            "p_reset": self.reset,
            **strides("b", delta=self.delta),
            "s_zb": self.s_zb,
            "length": self.length,
            "span": self.span,
            "spans": self.spans,
            "S_DELTA": self.delta.stride(1),
            "S_Z": self.s_z,
            "D": self.channels,
            "N": self.states,
            "GROUPS": self.groups,
            "C_GROUPS": self.c_groups,
            "SOFTPLUS": self.softplus,
        }

    def programs(self, width: int) -> int:
        """How many programs there are, each with a block of at most so many channels of one group."""
        blocks = triton.cdiv(self.channels // self.groups, width)
        return self.batch * self.spans * self.groups * blocks

    def empty(self, *shape: int) -> Tensor:
        """An empty float32 tensor."""
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)

    def per_span(self, *shape: int) -> Tensor:
        """An empty tensor for a state of each span (B, spans, …)."""
        return self.empty(self.batch, self.spans, *shape)


def wide(x: Tensor) -> Tensor:
    """x in float32, contiguous."""
    return x.float().contiguous()


def states_first(x: Tensor) -> Tensor:
    """(…, D, N) as (…, N, D), contiguous."""
    return x.mT.contiguous()


def wide_rows(x: Tensor) -> Tensor:
    """B or C in float32, contiguous; where it depends on time, with zeros for the states up to a power of two."""
    if x.ndim == 2:
        return wide(x)
    missing = triton.next_power_of_2(x.shape[-1]) - x.shape[-1]
    return torch.nn.functional.pad(x.float(), (0, missing)).contiguous()


def empty_outputs(u: Tensor, A: Tensor, z: Tensor | None, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors for y (B, L, D), the last state (B, D, N), and what is saved for the backward pass.

    That is the state at the start of each chunk (B, chunks, D, N) and, with a gate, the outputs before it (B, L, D);
    both of size 0 without `save`. Outputs before the gate may be too large for float16 though y is not: they are then
    saved in float32.
    """
    batch, length, channels = u.shape
    states = A.shape[1]
    chunks = triton.cdiv(length, tiles.CHUNK) if save else 0
    new = {"dtype": torch.float32, "device": u.device}
    gated = (batch, length, channels) if save and z is not None else (0,)
    return (
        torch.empty(u.shape, dtype=u.dtype, device=u.device),
        torch.empty(batch, channels, states, **new),
        torch.empty(batch, chunks, channels, states, **new),
        torch.empty(gated, dtype=torch.float32 if u.dtype == torch.float16 else u.dtype, device=u.device),
    )


def empty_gradients(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """An empty gradient for each; of size 0 for what was not given."""
    like = next(x for x in inputs if x is not None)
    return tuple(
        torch.empty(0 if x is None else x.shape, dtype=(like if x is None else x).dtype, device=like.device)
        for x in inputs
    )
