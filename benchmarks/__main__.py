"""`python -m benchmarks NAME ...`: run the benchmarks named, or all that need nothing but this machine."""

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("__init__", "__main__", "record"))


def main() -> None:
    asked = [word for word in sys.argv[1:] if not word.startswith("-")]
    options = [word for word in sys.argv[1:] if word.startswith("-")]
    unknown = set(asked) - set(NAMES)
    if unknown:
        sys.exit(f"no benchmark is called {', '.join(sorted(unknown))}; there are: {', '.join(NAMES)}")
    for name in asked or NAMES:
        importlib.import_module(f"benchmarks.{name}").main(options)


main()
