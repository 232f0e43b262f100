"""How an engine is chosen: the name of an operation is its mathematics, `impl` is what computes it.

Only "auto" chooses. An engine asked for by name runs or raises, saying why; it is never replaced in silence.
"""

from collections.abc import Callable


def choose(impl: str, engines: dict[str, Callable], auto: str) -> Callable:
    """The engine that `impl` names, or the one named `auto` where `impl` is "auto".

    Raises:
        ValueError: `impl` names no engine of this operation.
    """
    name = auto if impl == "auto" else impl
    if name not in engines:
        raise ValueError(f"impl must be one of {['auto', *engines]}, got {impl!r}")
    return engines[name]
