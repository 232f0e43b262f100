"""How an engine is chosen: the name of an operation is its mathematics, `impl` is what computes it.

Only "auto" chooses. An engine asked for by name runs or raises, saying why; it is never replaced in silence.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

NO_TRITON = "impl='triton' needs triton: pip install 'nondual[triton]'"
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # what Triton's kernels take


def choose(impl: str, engines: dict[str, Callable[..., Any]], auto: str) -> Callable[..., Any]:
    """The engine that `impl` names, or the one named `auto` where `impl` is "auto".

    Raises:
        ValueError: `impl` names no engine of this operation.
    """
    name = auto if impl == "auto" else impl
    if name not in engines:
        raise ValueError(f"impl must be one of {['auto', *engines]}, got {impl!r}")
    return engines[name]


def kernels_refuse(name: str, x: Tensor, interpreted: bool) -> str | None:
    """Why Triton's kernels cannot run on this tensor where it is, or as they are run; None where they can."""
    if interpreted and x.dtype == torch.bfloat16:
        return f"{name} must be float16 or float32 in Triton's interpreter, whose bfloat16 is wrong, got torch.bfloat16"
    if x.device.type not in ("cuda", "meta") and not interpreted:
        return (
            f"{name} must be on a CUDA device for impl='triton', got {x.device}; on a CPU use impl='auto', or set "
            "TRITON_INTERPRET=1 before triton is imported to run the kernels in its interpreter"
        )
    return None


def refuses_transforms(*tensors: Tensor | None) -> str | None:
    """Why an engine that is one opaque operator of torch cannot take these tensors, or None where it can.

    Such an operator has a backward pass and nothing else. torch would take its forward-mode derivative for zero without
    a word, and its own error under the transforms of torch.func speaks of classes that a user has never seen.

    Returns:
        What is asked for and is not there, to be put after the engine's name: "has no forward-mode derivative (…)".
    """
    if has_tangent(*tensors):
        return "has no forward-mode derivative (torch.func.jvp, jacfwd, torch.autograd.forward_ad)"
    if torch.compiler.is_compiling():  # the compiler follows torch.func.jvp, and torch itself refuses the others
        return None
    if any(x is not None and is_functorch_wrapped_tensor(x) for x in tensors):
        return "cannot be transformed by torch.func (vmap, grad, vjp, jacrev)"
    return None


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether a forward-mode derivative is asked for: any of these carries a tangent.

    True too where forward mode is on and that cannot be seen: while torch.compile traces, and for a tensor that another
    transform of torch.func has wrapped.
    """
    if forward_ad._current_level < 0:
        return False
    if torch.compiler.is_compiling():
        return True
    return any(
        x is not None and (is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None)
        for x in tensors
    )
