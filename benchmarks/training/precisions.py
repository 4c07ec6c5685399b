"""Whether other precisions learn the same as fp32: fp16 with loss scaling, bf16, int8 and nf4.

``python -m benchmarks precisions``: the demo's held-out loss after equal steps on equal data, beside fp32's;
bar 2 %. On the CPU fp16 rounds as it does on a card, where the order of additions differs.
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
from lora_utils.model.base import PretrainedSdxl
from lora_utils.system.device import Precision
from lora_utils.tiny.demo_data import draw_demo_data
from lora_utils.training import loop
from lora_utils.training import run as run_module

CASES = {  # name: precision of the step, precision in which the base is kept
    "fp32": ("fp32", "auto"),
    "fp16": ("fp16", "auto"),
    "bf16": ("bf16", "auto"),
    "int8": ("fp32", "int8"),
    "nf4": ("fp32", "nf4"),
}
BAR = 0.02
"""Share of fp32's held-out loss by which another may be off."""


def main() -> None:
    """Train every case and print held-out losses, their distance from fp32's, and skipped steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        draw_demo_data(Path(scratch, "data"))
        cases = {case: train(case, options.steps, Path(scratch)) for case in options.cases}

    for case, figures in cases.items():
        figures["off fp32 by"] = figures["held-out loss"] / cases["fp32"]["held-out loss"] - 1
        print(f"{case:5} {figures['held-out loss']:.5f}  {figures['off fp32 by']:+.2%}")
    save("precisions", {"steps": options.steps, "bar": BAR, "cases": cases})


def train(case: str, steps: int, folder: Path) -> dict[str, float]:
    """The demo's recipe for so many steps.

    Args:
        case: A key of ``CASES``.
        steps: Optimiser updates.
        folder: With the demo's pictures in ``data``; the cache in it serves all cases.

    Returns:
        Figures by name.
    """
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
    # Given, not chosen: choose_precision refuses fp16 on a CPU.
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    base = PretrainedSdxl(config.model, config.paths.cache_dir)
    precision = Precision(name, "the benchmark asks")
    prepared = run_module.prepare(config, base, stages.precompute(config), accelerator, precision)
    reports = list(loop.train(config, prepared))
    summary = json.loads((config.paths.output_dir / "summary.json").read_text())
    return {
        "held-out loss before": summary["held_out_loss_before"],
        "held-out loss": summary["held_out_loss"],
        "skipped steps": sum(report.grad_norm is None for report in reports),
        "seconds": summary["seconds"],
    }
