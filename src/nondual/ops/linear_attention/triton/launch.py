"""One call of an operator, from its inputs to the launches: layouts, memory for results, numbers of programs."""

import torch
import triton
from torch import Tensor

from nondual.ops.kernels import chip_of, contiguous_rows, strides
from nondual.ops.linear_attention.triton.backward import carry_back_kernel, chunk_back_kernel, written_kernel
from nondual.ops.linear_attention.triton.forward import carry_kernel, read_kernel, solve_kernel
from nondual.ops.linear_attention.triton.tiles import configuration
from nondual.ops.ssd.triton.forward import steps_kernel
from nondual.ops.ssd.triton.launch import Launcher, sequence_starts
from nondual.ops.ssd.triton.tiles import configuration as configuration_of_sum

KERNELS = {
    "steps": steps_kernel,
    "solve": solve_kernel,
    "carry": carry_kernel,
    "read": read_kernel,
    "written": written_kernel,
    "carry_back": carry_back_kernel,
    "chunk_back": chunk_back_kernel,
}


class SumLauncher(Launcher):
    """Linear attention without the delta rule, by the kernels of state space duality: x is v, B is k and C is q.

    Their step length, a factor of every input, is `scale`; the log of the decay is given and not a product with it. So
    the state that they carry is `scale` times ours.

    Args of the constructor: q, k (B, N, H, D), v (B, N, H, Dv), log_decay (B, N, H) or None, state (B, H, D, Dv) or
    None, reset (B, N) or None, scale, other than 0, the steps of a chunk, and whether out is to be in float32.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, reset: Tensor | None,
        scale: float, chunk: int, wide: bool,
    ):  # fmt: skip
        self.scale, self.decayed = scale, log_decay is not None
        delta = v.new_zeros(()).expand(v.shape[:3]) if log_decay is None else log_decay
        rate = torch.ones(v.shape[2], dtype=torch.float32, device=v.device)
        state = None if state is None else state.mT * scale
        super().__init__(v, delta, rate, k, q, None, None, None, state, reset, False, chunk)
        if wide:
            self.y_dtype = torch.float32

    def steps(self) -> None:
        """Every step has the length `scale`; the log of the decay is the sum of what was given."""
        if self.decayed:
            super().steps()
            self.step.fill_(self.scale)
        else:
            self.step = self.empty(self.batch, self.heads, self.length).fill_(self.scale)
            self.high = self.low = torch.zeros_like(self.step)

    def forward(self) -> tuple[Tensor, Tensor]:
        """out (B, N, H, Dv) and the last state (B, H, D, Dv)."""
        y, last = super().forward()
        return y, (last.mT / self.scale).contiguous()

    def backward(self, dy: Tensor, dlast: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients of q, k, v, log_decay (without meaning where it was not given) and the initial state."""
        dv, dlog, _, dk, dq, _, _, _, dinitial = super().backward(dy, dlast.mT / self.scale)
        return dq, dk, dv, dlog, (dinitial.mT * self.scale).contiguous()

    def steps_back(self, **received: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of the log decay, which is all that it is asked for: `scale` has none."""
        if not self.decayed:
            return (self.A,) * 3
        received["p_dstep"] = torch.zeros_like(received["p_dstep"])
        return super().steps_back(**received)


class DeltaLauncher:
    """The inputs of one call of the delta rule as the kernels take them, and the launch of each kernel.

    Args of the constructor: q, k (B, N, H, D), v (B, N, H, Dv), log_decay (B, N, H) or None, beta (B, H, N) in float32,
    state (B, H, D, Dv) in float32 or None, reset (B, N) or None, scale, and the steps of a chunk.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, state: Tensor | None,
        reset: Tensor | None, scale: float, chunk: int,
    ):  # fmt: skip
        self.q, self.k, self.v, self.beta = (
            contiguous_rows(q),
            contiguous_rows(k),
            contiguous_rows(v),
            beta.contiguous(),
        )
        self.batch, self.length, self.heads, self.d = q.shape
        self.width, self.factor, self.chunk = v.shape[3], scale, chunk
        self.chunks = triton.cdiv(self.length, chunk)
        self.tiled_by = chip_of(q.device), self.d, self.width, q.dtype, chunk
        self.reset = reset is not None
        self.start = self.beta if reset is None else sequence_starts(reset)
        self.initial = self.empty_state().zero_() if state is None else state.contiguous()
        self.log_decay = log_decay

    def forward(self) -> tuple[Tensor, Tensor]:
        """out (B, N, H, Dv) and the last state (B, H, D, Dv)."""
        self.steps()
        _, w, u = self.solve()
        states, last = self.carry(w, u)
        return self.read(u, states), last

    def backward(self, dy: Tensor, dlast: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients of q, k, v, log_decay (B, H, N), beta (B, H, N) and the initial state."""
        dy = contiguous_rows(dy)
        self.steps()
        t, w, u = self.solve()
        states, _ = self.carry(w, u)
        du = self.written(dy)
        grads, dinitial = self.carry_back(dy, dlast, w, du)
        dq, dk, dv, dbeta, dlog = self.chunk_back(dy, t, u, du, states, grads)
        return dq, dk, dv, dlog, dbeta, dinitial

    # --- one method for each kernel --------------------------------------------------------------------------------

    def steps(self) -> None:
        """The log of the decay from the start of the chunk, or of the sequence, to each step, in two parts."""
        if self.log_decay is None:
            self.high = self.low = torch.zeros_like(self.beta)
            return
        step, self.high, self.low = (torch.empty_like(self.beta) for _ in range(3))
        one = self.empty(self.heads).fill_(1)
        self.launch(
            "steps",
            programs=self.batch * self.heads * self.chunks,
            p_delta=self.log_decay,
            p_a=one,
            p_bias=torch.zeros_like(one),
            p_start=self.start,
            p_step=step,
            p_high=self.high,
            p_low=self.low,
            **strides("blh", d=self.log_decay),
            length=self.length,
            heads=self.heads,
            chunks=self.chunks,
            SOFTPLUS=False,
            RESET=self.reset,
        )

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """T, W and U of every chunk."""
        t = self.q.new_empty(self.batch, self.heads, self.length, self.chunk)
        w = self.q.new_empty(self.batch, self.heads, self.length, self.d)
        u = self.q.new_empty(self.batch, self.heads, self.length, self.width)
        self.launch(
            "solve",
            programs=self.batch * self.heads * self.chunks,
            p_k=self.k,
            p_v=self.v,
            p_beta=self.beta,
            **self.decays(),
            p_t=t,
            p_w=w,
            p_u=u,
            **strides("blh", k=self.k, v=self.v),
            **self.sizes(),
        )
        return t, w, u

    def carry(self, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The state before each chunk, and the last; U becomes u."""
        states, last = self.empty_states(), self.empty_state()
        self.launch(
            "carry",
            programs=self.batch * self.heads * self.tiles("carry"),
            p_k=self.k,
            **self.decays(),
            p_initial=self.initial,
            p_w=w,
            p_u=u,
            p_states=states,
            p_last=last,
            **strides("blh", k=self.k),
            **self.sizes(),
        )
        return states, last

    def read(self, u: Tensor, states: Tensor) -> Tensor:
        """The outputs."""
        y = self.q.new_empty(self.v.shape)
        self.launch(
            "read",
            programs=self.batch * self.heads * self.chunks * self.tiles("read"),
            p_q=self.q,
            p_k=self.k,
            **self.decays(),
            p_u=u,
            p_states=states,
            p_y=y,
            **strides("blh", q=self.q, k=self.k),
            **self.sizes(),
            factor=self.factor,
        )
        return y

    def written(self, dy: Tensor) -> Tensor:
        """The gradient of u by way of the outputs of its own chunk."""
        du = self.q.new_empty(self.batch, self.heads, self.length, self.width)
        self.launch(
            "written",
            programs=self.batch * self.heads * self.chunks,
            p_q=self.q,
            p_k=self.k,
            p_dy=dy,
            **self.decays(),
            p_du=du,
            **strides("blh", q=self.q, k=self.k, dy=dy),
            **self.sizes(),
            factor=self.factor,
        )
        return du

    def carry_back(self, dy: Tensor, dlast: Tensor, w: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the state after each chunk and of the initial state; du becomes the whole gradient of u."""
        grads, dinitial = self.empty_states(), self.empty_state()
        self.launch(
            "carry_back",
            programs=self.batch * self.heads * self.tiles("carry_back"),
            p_q=self.q,
            p_k=self.k,
            p_dy=dy,
            **self.decays(),
            p_dlast=dlast.contiguous(),
            p_w=w,
            p_du=du,
            p_grads=grads,
            p_dinitial=dinitial,
            **strides("blh", q=self.q, k=self.k, dy=dy),
            **self.sizes(),
            factor=self.factor,
        )
        return grads, dinitial

    def chunk_back(
        self, dy: Tensor, t: Tensor, u: Tensor, du: Tensor, states: Tensor, grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients of q, k, v, beta and log_decay."""
        dq, dk, dv = (self.q.new_empty(x.shape) for x in (self.q, self.k, self.v))
        dbeta, dlog = (torch.empty_like(self.beta) for _ in range(2))
        self.launch(
            "chunk_back",
            programs=self.batch * self.heads * self.chunks,
            p_q=self.q,
            p_k=self.k,
            p_v=self.v,
            p_dy=dy,
            p_beta=self.beta,
            **self.decays(),
            p_t=t,
            p_u=u,
            p_du=du,
            p_states=states,
            p_grads=grads,
            p_dq=dq,
            p_dk=dk,
            p_dv=dv,
            p_dbeta=dbeta,
            p_dlog=dlog,
            **strides("blh", q=self.q, k=self.k, v=self.v, dy=dy),
            **self.sizes(),
            factor=self.factor,
        )
        return dq, dk, dv, dbeta, dlog

    # --- what the launches share -----------------------------------------------------------------------------------

    def launch(self, name: str, programs: int, **arguments) -> None:
        """Run a kernel with its own tiles; the arguments are the kernel's, by name."""
        choose = configuration_of_sum if name == "steps" else configuration
        with torch.cuda.device_of(self.q):
            KERNELS[name][(programs,)](**arguments, **choose(name, *self.tiled_by))

    def decays(self) -> dict[str, Tensor]:
        """The log of the decay up to each step in two parts, and where sequences start."""
        return {"p_high": self.high, "p_low": self.low, "p_start": self.start}

    def sizes(self) -> dict:
        return {
            "length": self.length,
            "heads": self.heads,
            "chunks": self.chunks,
            "RESET": self.reset,
            "D": self.d,
            "V": self.width,
        }

    def tiles(self, kernel: str) -> int:
        """Tiles of a head's value channels."""
        return triton.cdiv(self.width, configuration(kernel, *self.tiled_by)["BLOCK_V"])

    def empty(self, *shape: int) -> Tensor:
        """An empty float32 tensor."""
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def empty_state(self) -> Tensor:
        """An empty tensor for a state of each head."""
        return self.empty(self.batch, self.heads, self.d, self.width)

    def empty_states(self) -> Tensor:
        """An empty tensor for a state of each chunk and head: in bfloat16 where the inputs are, since every product
        rounds it to that anyway, and in float32 else, since float16 may not hold it."""
        shape = self.batch, self.chunks, self.heads, self.d, self.width
        if self.q.dtype == torch.bfloat16:
            return self.q.new_empty(shape)
        return self.empty(*shape)
