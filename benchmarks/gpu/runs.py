"""One whole run of the product on a base of SDXL's own size, and what it said of itself step by step."""

import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import Settings
from benchmarks.gpu.smoke import Check
from benchmarks.precompute.precompute import draw
from benchmarks.training.full_size import write_base
from lora_utils import stages
from lora_utils.config.loading import load_config
from lora_utils.storage.log import METRICS, read_summary

STEPS = 50
REHEARSED_STEPS = 6
SETTLED = 5  # steps, after which the plan and the clocks are what they stay
PICTURES = 4


def whole_run(check: Check, settings: Settings) -> dict[str, Any]:
    """Write a base with random weights, encode four pictures, take 50 steps; seconds, memory, waits, losses.

    Settings are the T4's preset, with one micro-batch a step.
    """
    work = Path(settings.work) / "whole"
    side_px = 64 if settings.rehearse else 1024
    started = time.monotonic()
    with settings.device:  # a CPU takes half a minute to draw so many numbers
        size_gib = write_base(work / "base", settings.rehearse)
    written = time.monotonic()
    draw(work / "pictures", PICTURES, side_px)

    config = load_config(
        None,
        {
            "pretrained_model_name_or_path": work / "base",
            "train_data_dir": work / "pictures",
            "output_dir": work / "run",
            "resolution": side_px,
            "rank": 16,
            "snr_gamma": 5,
            "train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "max_train_steps": REHEARSED_STEPS if settings.rehearse else STEPS,
            "mixed_precision": "fp32" if settings.device.type == "cpu" else "fp16",
            "vram_gib": settings.vram_gib,
            "resume_from_checkpoint": "none",
        },
    )
    before_first = None
    for _ in stages.train(config):
        before_first = before_first or time.monotonic() - written
    ended = time.monotonic()
    return {
        "base_gib": size_gib,
        "write_seconds": written - started,
        "first_step_after_seconds": before_first,
        "run_seconds": ended - written,
        "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        **_telemetry(config.paths.run_folder),
    }


def _telemetry(folder: Path) -> dict[str, Any]:
    """Of metrics.jsonl and the summary, without the first steps."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line.get("step_seconds") is not None]
    settled = steps[SETTLED:]
    seconds = [line["step_seconds"] for line in settled]
    peaks = [line["peak_memory_gib"] for line in steps if line["peak_memory_gib"] is not None]
    summary = read_summary(folder)
    return {
        "steps": len(steps),
        "skipped": sum(line["grad_norm"] is None for line in steps),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "step_seconds": statistics.median(seconds),
        "step_seconds_highest": max(seconds),
        "data_seconds": statistics.median(line["data_seconds"] for line in settled),
        "peak_gib": max(peaks, default=None),
        "forecast_gib": summary.get("forecast_memory_gib"),
        "plan": summary.get("recompute"),
    }
