"""How an engine is chosen: the name of an operation is its mathematics, `impl` is what computes it.

Only "auto" chooses. An engine asked for by name runs or raises, saying why; it is never replaced in silence.
"""

from collections.abc import Callable

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # what Triton's kernels take


def choose(impl: str, engines: dict[str, Callable], auto: str) -> Callable:
    """The engine that `impl` names, or the one named `auto` where `impl` is "auto".

    Raises:
        ValueError: `impl` names no engine of this operation.
    """
    name = auto if impl == "auto" else impl
    if name not in engines:
        raise ValueError(f"impl must be one of {['auto', *engines]}, got {impl!r}")
    return engines[name]


def check_kernels_run(name: str, x: Tensor, interpreted: bool) -> None:
    """Refuse a tensor that Triton's kernels cannot run on where it is, or as they are run.

    Raises:
        ValueError: bfloat16 in the interpreter; outside of it, another device than CUDA's.
    """
    if interpreted and x.dtype == torch.bfloat16:
        raise ValueError(
            f"{name} must be float16 or float32 in Triton's interpreter, whose bfloat16 is wrong, got torch.bfloat16"
        )
    if x.device.type not in ("cuda", "meta") and not interpreted:
        raise ValueError(
            f"{name} must be on a CUDA device for impl='triton', got {x.device}; on a CPU use impl='auto', or set "
            "TRITON_INTERPRET=1 before triton is imported to run the kernels in its interpreter"
        )
