"""`python -m benchmarks NAME ...`: run the benchmarks whose names begin so (`flash`: flash attention's), or all."""

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
HELPERS = ("__init__", "__main__", "record", "aot", "ceilings", "scaling")
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in HELPERS)


def main() -> None:
    asked = [word for word in sys.argv[1:] if not word.startswith("-")]
    options = [word for word in sys.argv[1:] if word.startswith("-")]
    unknown = [word for word in asked if not any(name.startswith(word) for name in NAMES)]
    if unknown:
        sys.exit(f"no benchmark begins with {', '.join(unknown)}; there are: {', '.join(NAMES)}")
    for name in [name for name in NAMES if not asked or any(name.startswith(word) for word in asked)]:
        importlib.import_module(f"benchmarks.{name}").main(options)


main()
