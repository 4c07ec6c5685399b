"""What a run survives: kills, stops, crashes, power cuts, disk errors and damage.

``python -m benchmarks faults [PART ...] [--minutes 15]``; CPU, tiny SDXL, no GPU needed. Without a part all
of them run, one after the other. Each adds its figures to benchmarks/results/faults.json.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.faults import files, runs

PARTS = {
    "kills": runs.kills,
    "cuts": runs.cuts,
    "accelerate": runs.accelerate,
    "crashes": files.crashes,
    "power": files.power_cuts,
    "errors": files.errors,
    "damage": files.damage,
}


def main() -> None:
    """Run the parts, print and keep their figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=15, help="for the cuts, which then stop")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no part is called {', '.join(unknown)}")

    torch.set_num_threads(1)  # forked children hang in a pool of threads that their parent started
    os.environ["HF_HUB_OFFLINE"] = "1"

    for name in options.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            figures = PARTS[name](Path(folder), options.minutes)
            figures |= {"minutes": round((time.monotonic() - started) / 60, 1)}
        keep({name: figures})  # at once: the parts after it take an hour


def keep(figures: dict[str, Any]) -> None:
    """Put figures beside those of the other parts."""
    before = record.read("faults")
    record.save("faults", (before["figures"] if before else {}) | figures)
