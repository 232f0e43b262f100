"""Linear attention as Triton kernels: with and without decay, and the delta rule; forward and backward, no atomics.

Without beta it is the scan of `nondual.ops.ssd` with the input taken as it is and the log of the decay given, so it
runs on the kernels of that operation (`SumLauncher`): x is v, B is k and C is q.

With beta it is the delta rule, which has kernels of its own. Symbols: B batch, N steps, H heads, D a key's channels, Dv
(V) a value's. Time is cut into chunks of CHUNK steps; t is a later step, s an earlier one. In the kernels i_ is a
program's index, o_ are offsets, m_ masks, p_ pointers, s_ strides and b_ blocks on the chip.

Forward there are three passes: for each chunk the inverse of a triangular matrix, and with it what its steps would
write into an empty state and how much of that the state before takes off (solve); the state from chunk to chunk, one
chunk after another, since what a chunk writes depends on what it finds (carry); the outputs (read). Backward the first
two are run again, then three more: the gradient of what was written, within each chunk (written), the state's gradient
from the last chunk to the first (carry_back), and all the other gradients (chunk_back).

Decays and resets are as in `nondual.ops.ssd.triton`: the log of the decay in two parts, `start` for resets. Offsets are
in 64 bits, sums in float32 and in one order, so the same input gives the same bits. Only the inputs are saved for the
backward pass.

Six files, each built on those before it: `primitives` (named steps), `forward` and `backward` (the kernels), `tiles`
(their sizes), `launch` (one call: memory and launches), `autograd` (operators of torch and the public function).
"""

from nondual.ops.linear_attention.triton.autograd import linear_attention
from nondual.ops.linear_attention.triton.backward import carry_back_kernel, chunk_back_kernel, written_kernel
from nondual.ops.linear_attention.triton.forward import carry_kernel, read_kernel, solve_kernel
from nondual.ops.linear_attention.triton.tiles import CHUNK, CHUNKS, KERNELS, TILES, chunk_of, configuration
from nondual.ops.ssd.triton.primitives import INTERPRETED

__all__ = [
    "CHUNK",
    "CHUNKS",
    "INTERPRETED",
    "KERNELS",
    "TILES",
    "carry_back_kernel",
    "carry_kernel",
    "chunk_back_kernel",
    "chunk_of",
    "configuration",
    "linear_attention",
    "read_kernel",
    "solve_kernel",
    "written_kernel",
]
