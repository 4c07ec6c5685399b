"""Whether notebooks go on whose kernel was killed, in every cell of each.

``python -m benchmarks notebook_kills``; CPU, tiny SDXL. In each cell the kill comes at a random moment; the
run folder is that of the kill before, so later notebooks also meet what earlier ones left behind.
"""

import argparse
import os
import random
import tempfile
from pathlib import Path

from benchmarks.faults.notebook_cells import code_cells, kill_in_cell, run_all, with_parameters
from benchmarks.record import save
from lora_utils.model import lora
from lora_utils.tiny.demo_data import draw_demo_data

NOTEBOOKS = ("01_setup", "02_precompute", "03_train", "04_compare")
OPTIONS = {"max_train_steps": 8, "checkpointing_steps": 2, "num_inference_steps": 2}


def main() -> None:
    """Count kills and continuations; an error of a notebook ends the campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--longest_seconds", type=float, default=6.0, help="from a cell's start to the kill")
    options = parser.parse_args()
    os.environ["LORA_PRESET"] = "ci"

    generator = random.Random(0)
    kills = 0
    cells = 0
    weights = set()
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "data")
        draw_demo_data(data)
        for name in NOTEBOOKS:
            notebook = with_parameters(
                name, preset="ci", train_data_dir=str(data), output_dir=f"{scratch}/{name}", overrides=OPTIONS
            )
            for index in code_cells(notebook):
                kills += kill_in_cell(notebook, index, generator.uniform(0, options.longest_seconds))
                cells += 1
                run_all(notebook)
        # Training is the third's, and the fourth trains what it compares: both must end in the same bytes.
        for name in NOTEBOOKS[2:]:
            weights.add(Path(scratch, name, lora.WEIGHTS_NAME).read_bytes())

    figures = {
        "notebooks": len(NOTEBOOKS),
        "cells": cells,
        "killed inside a cell": kills,
        "killed after it": cells - kills,
        "run-alls that went on": cells,
        "different final LoRAs": len(weights),
    }
    save("notebook_kills", figures)
