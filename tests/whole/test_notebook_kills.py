"""A notebook whose machine went away goes on when all of its cells are run again."""

from benchmarks.faults.notebook_cells import code_cells, kill_in_cell, run_all, with_parameters
from lora_utils import stages
from lora_utils.model import lora
from lora_utils.notebook import configure

OPTIONS = {"max_train_steps": 8, "checkpointing_steps": 2}


def test_a_kernel_that_was_killed_while_training_goes_on(data_dir, tmp_path):
    finished, killed = tmp_path / "finished", tmp_path / "killed"
    values = {"preset": "ci", "train_data_dir": str(data_dir), "overrides": OPTIONS}
    for _ in stages.train(configure(output_dir=str(finished), **values)):
        pass
    notebook = with_parameters("03_train", output_dir=str(killed), **values)
    training = next(place for place in code_cells(notebook) if "stages.train" in notebook.cells[place].source)
    kill_in_cell(notebook, training, after_seconds=5.0)
    run_all(notebook)
    assert (killed / lora.WEIGHTS_NAME).read_bytes() == (finished / lora.WEIGHTS_NAME).read_bytes()
    assert (killed / "metrics.jsonl").read_text().count("\n") == OPTIONS["max_train_steps"] + 1
