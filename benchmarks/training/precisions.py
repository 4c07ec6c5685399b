"""Whether other precisions learn the same: the demo with its base in fp32, fp16 with loss scaling, int8 and nf4.

``python -m benchmarks precisions``: held-out loss after equal steps on equal data, beside fp32's; bar 2 %. On the CPU
fp16 rounds as it does on a card, where the order of additions differs.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator

from benchmarks.record import ROOT, save
from lora_utils import stages
from lora_utils.config.loading import load_config
from lora_utils.system.device import Precision
from lora_utils.tiny.demo_data import draw_demo_data
from lora_utils.training import loop
from lora_utils.training import run as run_module

CASES = {
    "fp32": ("fp32", "auto"),
    "fp16": ("fp16", "auto"),
    "bf16": ("bf16", "auto"),
    "int8": ("fp32", "int8"),
    "nf4": ("fp32", "nf4"),
}
BAR = 0.02


def main() -> None:
    """Train every case and print held-out losses, their distance from fp32's, and skipped steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        draw_demo_data(Path(scratch, "data"))
        found = {case: train(case, options.steps, Path(scratch)) for case in options.cases}
    for case, figures in found.items():
        figures["off fp32 by"] = figures["held-out loss"] / found["fp32"]["held-out loss"] - 1
        print(f"{case:5} {figures['held-out loss']:.5f}  {figures['off fp32 by']:+.2%}")
    save("precisions", {"steps": options.steps, "bar": BAR, "cases": found})


def train(case: str, steps: int, folder: Path) -> dict[str, float]:
    """The demo's recipe for so many steps."""
    name, base_precision = CASES[case]
    changes = {
        "train_data_dir": folder / "data",
        "precompute_dir": folder / "cache",
        "output_dir": folder / case,
        "base_precision": base_precision,
        "max_train_steps": steps,
        "validation_steps": steps,
    }
    config = load_config(ROOT / "lora_utils" / "presets" / "tiny.yaml", changes)
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    prepared = run_module.prepare(
        config, stages.precompute(config), accelerator, Precision(name, "the benchmark asks")
    )
    reports = list(loop.train(config, prepared))
    summary = json.loads((config.paths.output_dir / "summary.json").read_text())
    return {
        "held-out loss before": summary["held_out_loss_before"],
        "held-out loss": summary["held_out_loss"],
        "skipped steps": sum(report.grad_norm is None for report in reports),
        "seconds": summary["seconds"],
    }
