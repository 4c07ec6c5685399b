"""The house of lora_utils: rooms import downwards only, no two files import each other, files stay readable."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_utils"
ROOMS = {  # room: the rooms that it may import
    "system": "",
    "config": "system",
    "data": "system config",
    "model": "system config",
    "memory": "system config model",
    "precompute": "system config data model",
    "compare": "system config model storage",
    "storage": "system config precompute",
    "training": "system config model memory precompute compare storage",
    "tiny": "",
}
TOP = {"__init__", "__main__", "cli", "stages", "notebook"}  # which may import all
LINES, FUNCTION_LINES = 400, 60
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def test_every_file_is_in_a_room():
    assert {name.split(".")[0] for name in FILES} == TOP | ROOMS.keys()


@pytest.mark.parametrize("name", FILES)
def test_rooms_import_downwards(name):
    room = name.split(".")[0]
    if room not in TOP:
        assert {target.split(".")[0] for target in own_imports(name)} <= {
            room,
            "__init__",
            *ROOMS[room].split(),
        }


def test_no_two_files_import_each_other():
    TopologicalSorter({name: own_imports(name) for name in FILES if name in TOP or "." in name}).prepare()


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_small(name):
    source = FILES[name].read_text()
    assert len(source.splitlines()) <= LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{node.name} is too long"


@pytest.mark.parametrize("room", ["config", "data"])
def test_settings_and_data_know_no_torch(room):
    names = [name for name in FILES if name.split(".")[0] == room]
    imports = ", ".join(f"lora_utils.{name}" for name in names)
    code = f"import sys, {imports}; assert not {{'torch', 'diffusers', 'datasets'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def own_imports(name):
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lora_utils":
            base = (node.module or "").partition(".")[2]
            for alias in node.names:
                target = f"{base}.{alias.name}".strip(".")
                found.add(target if target in FILES else base or "__init__")
    return found - {name}
