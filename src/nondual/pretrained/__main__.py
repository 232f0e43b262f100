"""`python -m nondual.pretrained`: fetch every package of weights, and say where each is."""

from nondual.pretrained import PACKAGES, fetch


def main() -> None:
    """Fetch every package of weights, and say where each is."""
    for package in PACKAGES.values():
        print(f"{package.name} {package.version}: {fetch(package)}", flush=True)


if __name__ == "__main__":
    main()
