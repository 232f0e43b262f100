"""State space duality as Triton kernels: chunk by chunk, forward and backward, without atomics.

Source: Dao and Gu 2024 (2405.21060), section 6 and Listing 1. Symbols: B batch, L steps, H heads, P a head's channels,
N states, G groups of SHARE = H / G heads. Time is cut into chunks of CHUNK steps, and these into tiles of BLOCK rows; t
is an output's step, s an input's. In the kernels i_ is a program's index, o_ are offsets, m_ masks, p_ pointers, s_
strides and b_ blocks on the chip.

Four passes: the step lengths and the log of the decay up to every step (steps), what each chunk adds to the state
(states), the state carried from chunk to chunk (pass), the outputs (output). A single pass would read x, B and C once,
but go through a head's chunks one after another: a batch of one with 24 heads would keep only 24 programs busy, in the
backward pass too. Here every chunk has its own program, and its state is written to memory: P · N float32 numbers for
each chunk and head, which for the usual sizes (P 64, N 128, CHUNK 256) are as many bytes as the chunk's x has in half
precision.

The decay from step s to step t is exp(Σ Δ A) over s < r <= t. Its log is multiplied by log2(e), since the chip computes
2^x, and stored in two parts, "high" and "low", the leading 24 bits of a float64 and the next 24: high alone would lose
the difference of two nearly equal sums to rounding. Resets are given as `start`: for each step the first step of its
sequence, -1 where that lies before this call. Input s reaches output t if start[t] <= s <= t; the state before a chunk
reaches t if start[t] lies before the chunk. Offsets are in 64 bits, sums in float32 and in one order: no atomics, so
the same input gives the same bits. Only the inputs are saved for the backward pass.

Six files, each built on those before it: `primitives` (named steps), `forward` and `backward` (the kernels), `tiles`
(their sizes), `launch` (one call: memory and launches), `autograd` (operators of torch and the public function).
"""

from nondual.ops.ssd.triton.autograd import ssd
from nondual.ops.ssd.triton.backward import columns_kernel, pass_back_kernel, rows_kernel, steps_back_kernel
from nondual.ops.ssd.triton.forward import output_kernel, pass_kernel, states_kernel, steps_kernel
from nondual.ops.ssd.triton.primitives import INTERPRETED
from nondual.ops.ssd.triton.tiles import CHUNK, PIECE, TILES, configuration, heads_of_a_program, parts_of

__all__ = [
    "CHUNK",
    "INTERPRETED",
    "PIECE",
    "TILES",
    "columns_kernel",
    "configuration",
    "heads_of_a_program",
    "output_kernel",
    "parts_of",
    "pass_back_kernel",
    "pass_kernel",
    "rows_kernel",
    "ssd",
    "states_kernel",
    "steps_back_kernel",
    "steps_kernel",
]
