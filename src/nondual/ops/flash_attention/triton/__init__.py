"""Flash attention as Triton kernels: forward, decoding with split keys, and a backward without atomics.

Source: Dao 2023 (2307.08691), Algorithms 1 and 2; split keys as in Flash-Decoding (Dao, Haziza, Massa, Sizov 2023).

Seven files, each built on those before it: `primitives` (a tile loaded, the mask, the online softmax), `decay` (forget
gates), `forward` and `backward` (the kernels), `tiles` (their sizes), `launch` (memory and launches), `autograd`
(operators of torch and the public function).

Symbols: B batch, H query heads, G key/value heads, SHARE = H / G, N queries, M keys, D and DV head widths. In the
kernels n and m are N and M, and shift = M - N takes a query to its position among the keys. The first letters of a name
say what it is: i_ a program's index, o_ offsets, m_ masks, p_ pointers, s_ strides, b_ blocks on the chip.

Numbers: scores are multiplied by log2(e), so that the exponential is the chip's own exp2, and the factor and the
subtraction of the row's maximum are one fused operation. The log-sum-exp is stored in two parts, a row's highest score
("top") and the logarithm of its sum of exponentials ("total"): for a score of 1e4 their sum in float32 is off by up to
a thousandth, and so would be exp(S - L) in the backward pass. Sums run in float32 and in one order, without atomic
additions, so the same input gives the same bits. Rows are addressed in 64 bits.

Masks: a tile in which no query may attend to any key is not visited, and one in which every query may attend to every
key is not masked; only the others are.

Forget gates are arguments that may be None. Without them the compiler sees nothing of them, and the kernels are what
they are without this feature.
"""

from nondual.ops.flash_attention.triton.autograd import flash_attention
from nondual.ops.flash_attention.triton.backward import delta_kernel, dkdv_kernel, dq_kernel
from nondual.ops.flash_attention.triton.forward import combine_kernel, decode_kernel, forward_kernel
from nondual.ops.flash_attention.triton.launch import launch_backward, launch_decode, launch_forward
from nondual.ops.flash_attention.triton.primitives import INTERPRETED
from nondual.ops.flash_attention.triton.tiles import MOST_ROWS, configuration, splits_of

__all__ = [
    "INTERPRETED",
    "MOST_ROWS",
    "combine_kernel",
    "configuration",
    "decode_kernel",
    "delta_kernel",
    "dkdv_kernel",
    "dq_kernel",
    "flash_attention",
    "forward_kernel",
    "launch_backward",
    "launch_decode",
    "launch_forward",
    "splits_of",
]
