"""The house: rooms import downwards only, no two files import each other, files are small, plates true."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {  # room: the rooms that it may import
    "system": "", "config": "system", "data": "config system", "model": "config system", "tiny": "",
    "memory": "model config system", "precompute": "data model config system",
    "storage": "precompute config system", "compare": "model storage config system",
    "training": "memory model precompute storage compare config system",
    "export": "model storage config system",
}  # fmt: skip
TOP = {"__init__", "__main__", "cli", "stages", "checking", "notebook"}  # import all, and each other
WHOLE_CONFIG = TOP | {
    "config", "memory", "training.folders", "training.start", "training.run", "training.loop",
    "training.recording",
}  # fmt: skip
LINES, FUNCTION_LINES = 400, 60
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("lora_utils", "benchmarks", "tests", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
OURS = {name.partition(".")[2]: path for name, path in FILES.items() if name.startswith("lora_utils.")}


def imports_of(path):
    """Dotted names of our own modules that a file imports, lazily too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            deeper = f"{node.module}.{alias.name}"
            names.add(deeper if deeper in FILES else str(node.module))
    return {name for name in names if name.split(".")[0] in ("lora_utils", "benchmarks", "tests", "tools")}


def test_every_file_is_in_a_room():
    assert {name.split(".")[0] for name in OURS} == TOP | ROOMS.keys()


@pytest.mark.parametrize("name", OURS)
def test_rooms_import_downwards(name):
    room = name.split(".")[0]
    if room not in TOP:
        targets = {target.split(".")[1] for target in imports_of(OURS[name]) if target != "lora_utils"}
        assert targets <= {room, *ROOMS[room].split()}
    if not {room, name} & WHOLE_CONFIG:
        assert "import RunConfig" not in OURS[name].read_text(encoding="utf-8"), "take a section instead"


def opens_text(call):
    """Whether a call opens a file as text; a mode that cannot be read here counts as text."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if name in ("read_text", "write_text"):
        return True
    # Of others' open (os, Image, zipfile) none takes a path and a mode as Path.open and open do.
    if name != "open" or owner in ("os", "Image", "webbrowser"):
        return False
    modes = [node.value for node in call.args if isinstance(node, ast.Constant)]
    modes += [keyword.value.value for keyword in call.keywords if keyword.arg == "mode"]
    return not any("b" in str(mode) for mode in modes)


def test_text_is_read_and_written_as_utf_8_whatever_the_system_prefers():
    calls = [
        (name, node)
        for name in FILES
        if name.startswith(("lora_utils.", "tools."))
        for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_text(node)
    ]
    assert len(calls) > 5
    for name, call in calls:
        assert "encoding" in {keyword.arg for keyword in call.keywords}, f"{name} line {call.lineno}"


def test_no_two_files_import_each_other():
    TopologicalSorter({name: imports_of(path) - {name} for name, path in FILES.items()}).prepare()


def test_arrows_go_from_tests_to_benchmarks_to_the_package():
    for name in (name for name in FILES if name.startswith(("lora_utils.", "benchmarks."))):
        above = ("tests", "tools") if name.startswith("benchmarks.") else ("tests", "tools", "benchmarks")
        assert not [target for target in imports_of(FILES[name]) if target.startswith(above)]


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_small(name):
    source = FILES[name].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{node.name} is too long"
        is_pair = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
        if is_pair and isinstance(node.value, ast.Tuple) and name.startswith("lora_utils."):
            left, right = (sorted(map(ast.unparse, side.elts)) for side in (node.targets[0], node.value))
            assert left == right, f"line {node.lineno}: one assignment a line, unless it is a swap"


@pytest.mark.parametrize("room", ROOMS)
def test_door_plates_name_every_file_and_its_names(room):
    tree = ast.parse(OURS[f"{room}.__init__"].read_text(encoding="utf-8"))
    assert len(tree.body) == 1, "a docstring and no imports: workers and --help come through here"
    plate = ast.get_docstring(tree)
    assert f"\nMay use: {', '.join(ROOMS[room].split()) or 'no other room'}." in plate
    rows = dict(re.findall(r"^([a-z0-9_]+/?)  +([\w, ]+)", plate, re.MULTILINE))
    files = {name.split(".")[1]: path for name, path in OURS.items() if name.startswith(f"{room}.")}
    files.pop("__init__")
    assert {row.rstrip("/") for row in rows} == files.keys()
    for row, names in rows.items():
        source = files[row].read_text(encoding="utf-8") if row in files else names
        assert [name for name in names.split(", ") if not re.search(rf"\b{name}\b", source)] == []


@pytest.mark.parametrize("room", ["config", "data"])
def test_settings_and_data_know_no_torch(room):
    names = [f"lora_utils.{name}" for name in OURS if name.split(".")[0] == room]
    assert len(names) > 5
    code = (
        f"import sys, {', '.join(names)}; assert not {{'torch', 'diffusers', 'datasets'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_files_of_other_languages_stay_small_too():
    files = [path for ending in ("*.cpp", "*.h") for path in (ROOT / "tests" / "pretended_card").glob(ending)]
    assert len(files) > 2
    assert [path.name for path in files if len(path.read_text(encoding="utf-8").splitlines()) > LINES] == []
