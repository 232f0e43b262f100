"""`python -m nondual.pretrained`: fetch the packages of weights and texts, and say where each is."""

import sys
from collections.abc import Sequence

from nondual import data, pretrained
from nondual.store import command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command, with all packages that the library reads; arguments and exit status as `nondual.store.command`."""
    return command.main(pretrained.PACKAGES | data.PACKAGES, arguments)


if __name__ == "__main__":
    sys.exit(main())
