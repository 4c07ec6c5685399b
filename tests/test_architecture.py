"""The layering of lora_utils: imports point down, files and functions stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lora_utils"
LAYERS = [
    {"__init__"},
    {"diffusion", "files", "findings", "images", "memory", "progress", "section"},
    {"archives", "data_config", "examples", "index", "packs", "runlog"},
    {"cache", "captions", "columns", "framing", "schema", "trees"},
    {"config", "decoding", "examining", "loading", "lora", "masks", "own_dataset", "rows", "sdxl", "visits"},
    {"denoising", "encoders", "metadata", "tables"},
    {"folders", "imagestore", "sampling", "textstore", "training", "validation"},
    {"dataset", "precomputing"},
    {"lint", "preflight"},
    {"plots", "stages"},
    {"cli"},
    {"__main__"},
]
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}
MODULES = sorted(PACKAGE.glob("*.py"))
FILES = sorted(path for path in PACKAGE.parent.rglob("*.py") if ".venv" not in path.parts)


def test_every_module_has_a_layer():
    assert {path.stem for path in MODULES} == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_down(path):
    for target in own_imports(path):
        if target == "tiny":
            assert path.stem == "stages"  # the demo pictures of the notebooks
        else:
            assert LEVEL[target] < LEVEL[path.stem], f"{path.stem} may not import {target}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_files_and_functions_stay_small(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 250
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{node.name} is too long"


@pytest.mark.parametrize("module", sorted(set.union(*LAYERS[:4])))
def test_the_lowest_layers_know_neither_diffusers_nor_peft(module):
    source = (PACKAGE / f"{module}.py").read_text()
    assert not {"diffusers", "peft"} & {name.split(".")[0] for name in all_imports(ast.parse(source))}


@pytest.mark.parametrize("module", ["decoding", "framing", "images", "dataset"])
def test_what_worker_processes_and_the_front_door_load_knows_no_torch(module):
    code = f"import sys, lora_utils.{module}; assert not {{'torch', 'diffusers', 'datasets'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=True)


def own_imports(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lora_utils":
            names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            found += [name for name in names if name not in ("UserError", "__version__")]
    return found


def all_imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
