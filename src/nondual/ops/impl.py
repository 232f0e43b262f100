"""How an engine is chosen: the name of an operation is its mathematics, `impl` is what computes it.

Each operation has a table, `ENGINES`: name -> Engine, in the order in which "auto" prefers them. An engine is a
function and its limits; each limit is written once. "auto" takes the first engine that refuses nothing and that is
meant for these inputs. An engine asked for by name runs, or raises the sentence of the limit that refuses; it is never
replaced silently. The tables of engines in the documentation are made from the same lines.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

NO_TRITON = "impl='triton' needs triton: pip install 'nondual[triton]'"
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # what Triton's kernels take


class Limit(NamedTuple):
    """One thing that an engine cannot do.

    Attributes:
        takes: what the engine takes, for the documentation: "float16, bfloat16 or float32".
        refuses: given an operation's inputs, the sentence that says why the engine cannot take them, or None.
        error: what is raised with that sentence where the engine was asked for by name.
    """

    takes: str
    refuses: Callable[[Any], str | None]
    error: type[Exception] = ValueError


class Preference(NamedTuple):
    """When "auto" takes an engine that could run: in words for the documentation, and as a question to the inputs."""

    when: str
    holds: Callable[[Any], bool]


class Engine(NamedTuple):
    """One way to compute an operation.

    Attributes:
        run: the function.
        does: what it is, in a line, for the documentation.
        limits: what it refuses; asked in this order.
        auto: when "auto" takes it; None: wherever it refuses nothing.
    """

    run: Callable[..., Any]
    does: str
    limits: tuple[Limit, ...] = ()
    auto: Preference | None = None


def refusal(engine: Engine, inputs: object) -> Exception | None:
    """The error that the engine raises for these inputs, or None where it can compute them."""
    for limit in engine.limits:
        if why := limit.refuses(inputs):
            return limit.error(why)
    return None


def choose(impl: str, engines: Mapping[str, Engine], inputs: object, otherwise: Engine | None = None) -> Engine:
    """The engine that `impl` names, or the one that "auto" takes for these inputs.

    Args:
        impl: "auto" or a key of `engines`.
        engines: in the order of preference.
        inputs: what the limits and preferences are asked about.
        otherwise: what "auto" takes where no engine can; it cannot be asked for by name. Left out, the last of
            `engines` must have no limits.

    Raises:
        ValueError: `impl` names no engine of this operation.
        Exception: what a limit of the engine asked for by name says.
    """
    if impl == "auto":
        for engine in engines.values():
            if (engine.auto is None or engine.auto.holds(inputs)) and refusal(engine, inputs) is None:
                return engine
        if otherwise is None:
            raise AssertionError("an operation has an engine without limits")
        return otherwise
    if impl not in engines:
        raise ValueError(f"impl must be one of {['auto', *list(engines)[::-1]]}, got {impl!r}")
    if error := refusal(engines[impl], inputs):
        raise error
    return engines[impl]


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


def takes_dtypes(impl: str, name: str, otherwise: str, *dtypes: torch.dtype) -> Limit:
    """The limit of an engine that takes these dtypes alone.

    Args:
        impl: the engine's name.
        name: the input whose dtype counts.
        otherwise: the engine that takes any.
        dtypes: two or more.
    """
    *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)

    def refuses(given: Any) -> str | None:
        dtype = getattr(given, name).dtype
        if dtype in dtypes:
            return None
        return (
            f"{name} must be {', '.join(first)} or {last} for impl={impl!r}, got {dtype}; impl={otherwise!r} takes any"
        )

    return Limit(", ".join((*first, last)), refuses)


def takes_chunks(impl: str, otherwise: str, *chunks: int) -> Limit:
    """The limit of an engine whose kernels are written for these numbers of steps in a chunk.

    Args:
        impl: the engine's name.
        otherwise: the engine that takes any.
        chunks: what `given.chunk` may be, besides None for the engine's own.
    """

    def refuses(given: Any) -> str | None:
        if given.chunk in (None, *chunks):
            return None
        return f"chunk must be one of {list(chunks)} for impl={impl!r}, got {given.chunk}; impl={otherwise!r} takes any"

    return Limit(f"chunks of {', '.join(map(str, chunks))}", refuses)


def needs_triton(load: Callable[[], Any]) -> Limit:
    """The limit of an engine of kernels that triton must be installed; `load` imports the operation's package."""

    def refuses(_: Any) -> str | None:
        try:
            load()
        except ImportError as error:
            return f"{NO_TRITON} ({error})"
        return None

    return Limit("triton installed", refuses, RuntimeError)


def runs_kernels(name: str, load: Callable[[], Any]) -> Limit:
    """The limit of an engine of Triton kernels that they can run where the input of this name is; `load` imports and
    returns the operation's package."""

    def refuses(given: Any) -> str | None:
        return kernels_refuse(name, getattr(given, name), load().INTERPRETED)

    return Limit("a GPU, or Triton's interpreter (there not bfloat16)", refuses)


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
    for x in tensors:
        if x is not None and is_functorch_wrapped_tensor(x):
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
