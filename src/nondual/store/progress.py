"""A progress bar for one download, on standard error."""

import contextlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec

from nondual.store.download import Report


@contextlib.contextmanager
def progress_bar(name: str, size: int | None) -> Iterator[Report | None]:
    """What to pass to `fetch` as `report`; None where standard error is no terminal, or tqdm is not installed.

    Args:
        name: what stands before the bar.
        size: the bytes of the whole, where they are known.
    """
    if not (sys.stderr.isatty() and find_spec("tqdm")):
        yield None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(desc=name, total=size, unit="B", unit_scale=True, leave=False) as bar:

        def report(here: int, whole: int | None) -> None:
            bar.total = whole
            bar.update(here - bar.n)

        yield report
