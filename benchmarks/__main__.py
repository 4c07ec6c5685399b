"""``python -m benchmarks NAME [OPTION ...]``: run one of the programs in the folders beside this file."""

import ast
import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def programs() -> dict[str, Path]:
    """Every program by name: a file with a function ``main``, two levels down."""
    # Read, not imported: for a list nobody should wait for torch.
    return {
        file.stem: file
        for file in sorted(FOLDER.glob("*/*.py"))
        if "\ndef main(" in file.read_text(encoding="utf-8")
    }


def purpose(program: Path) -> str:
    """The first line of its docstring, without the command that some put there."""
    text = ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].split(": ``python -m")[0].rstrip(".")


def usage() -> str:
    """How to call a program, and what there is to call, by folder."""
    lines = ["usage: python -m benchmarks NAME [OPTION ...]"]
    folder = None
    for name, program in programs().items():
        if program.parent != folder:
            folder = program.parent
            lines += ["", f"{folder.name}:"]
        lines.append(f"  {name:14}  {purpose(program)}")
    return "\n".join(lines)


def main() -> None:
    """Run the named program; without a name, list them."""
    files = programs()
    if len(sys.argv) < 2 or sys.argv[1] not in files:
        raise SystemExit(usage())
    program = files[sys.argv.pop(1)]  # what is left of argv is the program's own
    importlib.import_module(f"benchmarks.{program.parent.name}.{program.stem}").main()


if __name__ == "__main__":
    main()
