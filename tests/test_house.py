"""The layering of lora_utils: imports point down, files and functions stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lora_utils"
LAYERS = [
    {"__init__", "sources"},
    {
        *("allocator", "autocast", "diffusion", "duplicates", "ema", "files", "findings", "images"),
        *("interruption", "memory", "nested", "nodes", "operators", "progress", "quantisation", "recompute"),
        *("redaction", "section", "yamlfiles"),
    },
    {
        *("cards", "checkpoint_config", "commits", "data_config", "index", "objectives", "packs", "simulation"),
        *("weights", "sources.archives", "sources.examples"),
    },
    {
        *("cache", "checkpoint", "framing", "mirrorfolder", "runlog", "schema", "sources.captions"),
        *("sources.columns", "sources.trees"),
    },
    {
        *("architectures", "config", "copying", "decoding", "examining", "fingerprints", "lora", "modelfiles"),
        *("optimizers", "restoring", "visits"),
    },
    {"lean", "mirror", "sdxl", "sources.loading", "sources.masks", "sources.own_dataset", "sources.rows"},
    {"denoising", "encoders", "footprints", "sources.metadata", "sources.tables"},
    {"imagestore", "microbatches", "remember", "sampling", "steps", "textstore", "validation", "sources.folders"},
    {"dataset", "precomputing", "stage_forecasts", "training"},
    {"forecast", "keeping", "lint", "preflight"},
    {"fitting", "outlook"},
    {"plots", "runs"},
    {"course"},
    {"stages"},
    {"cli"},
    {"__main__"},
]
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).replace(".__init__", ""): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "tiny" not in path.parts
}
FILES = sorted(path for path in PACKAGE.parent.rglob("*.py") if ".venv" not in path.parts)


def test_every_module_has_a_layer():
    assert MODULES.keys() == LEVEL.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    for target in own_imports(MODULES[module]):
        if target == "tiny":
            assert module == "stages"  # the demo pictures of the notebooks
        else:
            assert LEVEL[target] < LEVEL[module], f"{module} may not import {target}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_files_and_functions_stay_small(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 250
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{node.name} is too long"


@pytest.mark.parametrize("module", sorted(set.union(*LAYERS[:4])))
def test_the_lowest_layers_know_neither_diffusers_nor_peft(module):
    source = MODULES[module].read_text()
    assert not {"diffusers", "peft"} & {name.split(".")[0] for name in all_imports(ast.parse(source))}


@pytest.mark.parametrize("module", ["decoding", "framing", "images", "dataset"])
def test_what_worker_processes_and_the_front_door_load_knows_no_torch(module):
    code = f"import sys, lora_utils.{module}; assert not {{'torch', 'diffusers', 'datasets'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=True)


def own_imports(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lora_utils":
            name = (node.module or "").partition(".")[2]
            names = [name] if name else [alias.name for alias in node.names]
            found += [name.split(".")[0] if name.startswith("tiny") else name for name in names]
    return [name for name in found if name not in ("UserError", "__version__")]


def all_imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
