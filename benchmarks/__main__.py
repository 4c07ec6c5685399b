"""``python -m benchmarks NAME [OPTION ...]``: run one of the programs beside this file."""

import importlib
import sys
from pathlib import Path


def main() -> None:
    """Run the named program; without a name, list them."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != "results")
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        raise SystemExit(f"usage: python -m benchmarks {{{','.join(names)}}} [OPTION ...]")
    importlib.import_module(f"benchmarks.{sys.argv.pop(1)}").main()


if __name__ == "__main__":
    main()
