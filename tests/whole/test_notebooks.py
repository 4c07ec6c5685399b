"""The notebooks, headless: three ways in are one road."""

import json
import os
import subprocess
import sys

import nbformat
import papermill
import pytest

from lora_utils import notebook, stages
from lora_utils.model import lora
from tests.conftest import ROOT
from tools.notebooks import fix, problems

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OPTIONS = {"max_train_steps": 3, "num_inference_steps": 2}


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")


def execute(name, output, **parameters):
    papermill.execute_notebook(
        f"notebooks/{name}.ipynb", output, parameters, kernel_name="python3", progress_bar=False, cwd=ROOT
    )


def test_there_are_five_and_all_are_normalised():
    assert [path.name[:2] for path in NOTEBOOKS] == ["00", "01", "02", "03", "04"]
    assert [problem for path in NOTEBOOKS for problem in problems(path)] == []


def test_the_tool_mends_what_editors_leave_behind_and_names_what_it_cannot(tmp_path):
    notebook = nbformat.read(NOTEBOOKS[1], 4)
    notebook.metadata["widgets"] = {"x": 1}
    notebook.cells[1].source = "edited"
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="left over")]
    assert nbformat.writes(fix(notebook, NOTEBOOKS[1].name)).strip() == NOTEBOOKS[1].read_text().strip()
    notebook.cells[-1].source = "def logic():\n    return input()"
    bad = tmp_path / NOTEBOOKS[1].name
    bad.write_text(nbformat.writes(notebook))
    assert len(list(problems(bad))) == 2


def test_notebook_papermill_and_command_line_give_equal_losses(data_dir, tmp_path):
    fields = {"train_data_dir": str(data_dir), "overrides": OPTIONS}
    config = notebook.configure(
        "ci", OPTIONS, train_data_dir=str(data_dir), output_dir=str(tmp_path / "cell")
    )
    list(stages.train(config))
    execute("03_train", tmp_path / "03.ipynb", output_dir=str(tmp_path / "papermill"), preset="ci", **fields)
    command = [sys.executable, "-m", "lora_utils", "train", "--config", "ci", "--max_train_steps", "3"]
    paths = ["--train_data_dir", str(data_dir), "--output_dir", str(tmp_path / "command")]
    subprocess.run([*command, *paths], check=True)
    metrics = [losses(tmp_path / name) for name in ("cell", "papermill", "command")]
    assert len(metrics[0]) == 3
    assert metrics[0] == metrics[1] == metrics[2]
    weights = {
        (tmp_path / name / lora.WEIGHTS_NAME).read_bytes() for name in ("cell", "papermill", "command")
    }
    assert len(weights) == 1


def test_the_quickstart_runs_the_whole_road(data_dir, tmp_path):
    run = tmp_path / "run"
    execute(
        "00_quickstart",
        tmp_path / "00.ipynb",
        output_dir=str(run),
        train_data_dir=str(data_dir),
        overrides=OPTIONS,
    )
    assert (run / lora.WEIGHTS_NAME).exists()
    assert (run / "compare" / "sheet.png").exists()
    assert len(list((run / "notebooks").glob("*.ipynb"))) == 4
    outputs = nbformat.read(tmp_path / "00.ipynb", 4).cells[-1].outputs
    assert "image/png" in outputs[0].data


def test_compare_opened_on_a_fresh_machine_trains_first(data_dir, tmp_path):
    run = tmp_path / "run"
    execute(
        "04_compare",
        tmp_path / "04.ipynb",
        output_dir=str(run),
        train_data_dir=str(data_dir),
        overrides=OPTIONS,
    )
    assert (run / "compare" / "sheet.png").exists()


def test_an_unknown_override_stops_the_notebook_with_a_short_message(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "notebooks/01_setup.ipynb", str(tmp_path / "o.ipynb"),
         "-k", "python3", "-y", "overrides: {lerning_rate: 1}"],
        capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 1
    assert "did you mean 'learning_rate'" in done.stderr


def losses(run):
    return [record["loss"] for record in map(json.loads, (run / "metrics.jsonl").open()) if "loss" in record]
