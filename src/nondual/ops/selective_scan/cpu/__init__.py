"""The selective scan on a CPU: a loop over time in C, compiled at its first use; without a C compiler, in plain torch.

Source: Gu and Dao 2023 (2312.00752), equation 2, Algorithm 2 and, for the backward pass, section 3.3.2; the equations
are written out in scan.c. Symbols: B batch, L steps, D channels, N states of a channel, G groups of channels that share
B and C.

Both ways take time and memory linear in L: the forward pass saves a checkpoint, the state, once every `CHUNK` steps,
and the backward pass computes the states between again. Why C: forward at B2 L2048 D512 N16, float32, one thread with
AVX-512, torch.compile over chunks of 16 steps took 3.0 times as long, numba's loop 8.9 times with an exponential of its
own and 10.4 with the library's (AMD EPYC, torch 2.13, numba 0.68, November 2026). How long the way in plain torch takes
stands in docs/measured/selective_scan_cpu.json.

A result of the compiled loop does not depend on the number of threads. That of the way in torch may differ in the last
place, as torch's own exponential does.

The way of a call: autograd.py -> loop.py, which has ops/c_loop.py find or compile scan.c, and calls it; or, where there
is no loop, in_torch.py. Their results have the shapes of memory.py.
"""

from nondual.ops.selective_scan.cpu.autograd import selective_scan as selective_scan
from nondual.ops.selective_scan.cpu.loop import LOOP as LOOP
from nondual.ops.selective_scan.cpu.loop import library as library
from nondual.ops.selective_scan.cpu.memory import CHUNK as CHUNK
