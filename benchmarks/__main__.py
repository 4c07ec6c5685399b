"""``python -m benchmarks NAME [OPTION ...]``: run one of the programs in the folders beside this file."""

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def programs() -> dict[str, str]:
    """Name of each program, which is a file with a function ``main``, to its module."""
    files = [
        file for file in sorted(FOLDER.glob("*/*.py")) if "\ndef main(" in file.read_text(encoding="utf-8")
    ]
    return {file.stem: f"benchmarks.{file.parent.name}.{file.stem}" for file in files}


def main() -> None:
    """Run the named program; without a name, list them."""
    modules = programs()
    if len(sys.argv) < 2 or sys.argv[1] not in modules:
        raise SystemExit(f"usage: python -m benchmarks {{{','.join(modules)}}} [OPTION ...]")
    importlib.import_module(modules[sys.argv.pop(1)]).main()


if __name__ == "__main__":
    main()
