"""Block-sparse attention as Triton kernels: forward and backward over the tiles that a mask lists, and no others.

Source: Dao et al. 2022 (2205.14135), section 3.3 and Algorithm 5: flash attention that passes over the tiles of a
block-sparse mask, in work proportional to the tiles that are left (proposition 4). Kernels for block-sparse attention:
Child et al. 2019 (1904.10509), section 5.5.

Six files, each built on those before it: `primitives` (the mask of a tile), `forward` and `backward` (the kernels),
`tiles` (their sizes), `launch` (memory and launches), `autograd` (operators of torch and the public function). Tiles
loaded and stored, the online softmax and delta are flash attention's own: `nondual.ops.flash_attention.triton`.

Two sizes of tile: the mask is given in tiles of TILE_Q x TILE_KV, the kernels work in blocks of BLOCK_Q x BLOCK_KV,
which divide them. A program is a block of queries of one head and passes the tiles of keys that its row lists; in the
backward pass another is a block of keys of one key head and passes the tiles of queries that its column lists, for each
query head that shares it. So nothing is added to from two programs, and the same input gives the same bits.

A list has its whole tiles first, where every query may attend to every key, and then its partial ones. The first are
passed without a mask, as most tiles of a flash attention are; of the second each loads its mask.

Symbols: those of `nondual.ops.flash_attention.triton`; T_q and T_k the rows and columns of tiles; L the listed tiles.
"""

from nondual.ops.sparse_attention.triton.autograd import sparse_attention
from nondual.ops.sparse_attention.triton.backward import dkdv_kernel, dq_kernel
from nondual.ops.sparse_attention.triton.forward import forward_kernel
from nondual.ops.sparse_attention.triton.launch import launch_backward, launch_forward
from nondual.ops.sparse_attention.triton.primitives import INTERPRETED
from nondual.ops.sparse_attention.triton.tiles import configuration

__all__ = [
    "INTERPRETED",
    "configuration",
    "dkdv_kernel",
    "dq_kernel",
    "forward_kernel",
    "launch_backward",
    "launch_forward",
    "sparse_attention",
]
