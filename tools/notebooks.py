"""Keeps the committed notebooks readable: ``python tools/notebooks.py fix|check NOTEBOOK...``.

``fix`` drops outputs and metadata that editors and runs leave behind, and writes the badge and the first cell
anew; ``check`` says what ``fix`` would change and what it cannot mend.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
LONGEST_CELL = 15
"""Lines."""
BOOTSTRAP = """\
import os
import sys
from pathlib import Path

places = [Path.cwd(), *Path.cwd().parents, Path("lora-utils")]
if not any((place / "lora_utils").is_dir() for place in places):
    {fetch}
root = next(place for place in places if (place / "lora_utils").is_dir()).resolve()
os.chdir(root)
sys.path.insert(0, str(root))
if any(name.startswith("COLAB_") for name in os.environ):
    !bash setup.sh"""
FROM_ZIP = "!unzip -q -d lora-utils lora-utils.zip  # upload the zipped project to this machine first"
FROM_ADDRESS = "!git clone -q --depth 1 {address} lora-utils"


def fix(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """The notebook as it should be committed."""
    notebook.metadata = nbformat.from_dict(
        {
            "accelerator": "GPU",
            "colab": {"gpuType": "T4", "provenance": []},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    notebook.nbformat = 4
    notebook.nbformat_minor = 5  # the first with ids of cells, so that a diff follows a cell that moved

    # papermill puts a cell of parameters into what it ran.
    notebook.cells = [
        cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    for cell in notebook.cells:
        kept = {key: cell.metadata[key] for key in ("tags", "cellView") if cell.metadata.get(key)}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type == "code":
            cell.outputs = []
            cell.execution_count = None

    # The badge is the first paragraph; what follows it is the notebook's own.
    notebook.cells[0].source = _badge(name) + "\n\n" + notebook.cells[0].source.split("\n\n", 1)[-1]
    notebook.cells[1].source = _bootstrap()
    return notebook


def problems(path: Path) -> Iterator[str]:
    """What keeps the notebook from being committed."""
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, 4)
    # Parsed a second time: fix() changes what it is given.
    if nbformat.writes(fix(nbformat.reads(text, 4), path.name)).strip() != text.strip():
        yield f"not normalised: run python tools/notebooks.py fix {path}"
    if sum("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells) != 1:
        yield "exactly one cell must be tagged parameters"
    if not re.search(r"^# ", notebook.cells[0].source, re.MULTILINE):
        yield "the first cell needs a # title"
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            yield from (f"cell {number}: {problem}" for problem in _cell_problems(cell))


def _cell_problems(cell: nbformat.NotebookNode) -> Iterator[str]:
    source = cell.source
    tags = cell.metadata.get("tags", [])
    if len(source.splitlines()) > LONGEST_CELL:
        yield f"longer than {LONGEST_CELL} lines"
    if re.search(r"^\s*(def|class) ", source, re.MULTILINE):
        yield "logic belongs into lora_utils"
    if re.search(r"\bOutput\(|\binteract\w*\(", source):
        yield "Output and interact stall headless runs (nbclient issue 312)"
    if re.search(r"\binput\(|getpass\(|notebook_login\(|drive\.mount\(", source) and "nbval-skip" not in tags:
        yield "waits for the user; Run all must not"
    if re.search(r";\s*$", source):
        yield "ends in ';', which hides nothing under nbval"
    if "parameters" in tags and re.search(r"^\w+\s*:\s*\w+\s*=", source, re.MULTILINE):
        yield "Colab's forms take no type hints"


def _badge(name: str) -> str:
    address = _address()
    if address is None:
        return (
            f"*Open {name} in Jupyter from the project's folder. "
            "On Colab, first upload the folder's content as lora-utils.zip (Files, upload).*"
        )
    link = address.replace("https://github.com/", "https://colab.research.google.com/github/")
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})]({link}/blob/main/notebooks/{name})"


def _bootstrap() -> str:
    address = _address()
    return BOOTSTRAP.format(fetch=FROM_ADDRESS.format(address=address) if address else FROM_ZIP)


def _address() -> str | None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository")


def main() -> int:
    """Fix or check the named notebooks; 1 if any has a problem."""
    action, *names = sys.argv[1:]
    failed = False
    for path in map(Path, names):
        if action == "fix":
            path.write_text(nbformat.writes(fix(nbformat.read(path, 4), path.name)) + "\n", encoding="utf-8")
        for problem in problems(path):
            failed = True
            print(f"{path}: {problem}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
