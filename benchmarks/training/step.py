"""The training step: our loop against the bare step, and against peft's way.

``python -m benchmarks step``: user-CPU seconds of a step on a mid-size SDXL-shaped U-Net, one thread. Each
way has a process of its own; they take turns, one step each, so that what else the machine does hits all
alike. A figure is the difference between two points of a process, so start-up cancels.
"""

import argparse
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from benchmarks.record import save
from lora_utils import stages
from lora_utils.config.loading import load_config
from lora_utils.config.schema import RunConfig
from lora_utils.tiny.demo_data import draw_demo_data
from lora_utils.training.batches import read_batch
from lora_utils.training.objective import training_losses
from lora_utils.training.optimizers import new_optimizer

TINY = Path(stages.__file__).parent / "tiny"
MID = {
    "block_out_channels": [64, 128, 256],
    "attention_head_dim": [2, 4, 8],
    "transformer_layers_per_block": [1, 2, 4],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
}
"""SDXL's own blocks at a fifth of its width: large enough that products, not Python, take the time."""
WAYS = {
    "loop": {},
    "bare": {},
    "peft, all recomputed": {"lean_step": False, "gradient_checkpointing": "full"},
    "peft, nothing recomputed": {"lean_step": False, "gradient_checkpointing": "none"},
}
"""Settings of each; *bare* takes the loop's and does without it."""
WARM_UP = 6
"""Steps before the first point: allocators and caches fill."""
STEPS = 20
"""From one point to the next."""


def main() -> None:
    """Time every way and print the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--resolutions", type=int, nargs="+", default=[64, 128], help="pixels; latents have a quarter"
    )
    parser.add_argument(
        "--child", nargs=4, metavar=("WAY", "STEPS", "FOLDER", "PIXELS"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.child:
        way, steps, folder, pixels = options.child
        _take_turns(way, int(steps), Path(folder), int(pixels))
        return

    figures = {}
    ratios = {}
    for resolution_px in options.resolutions:
        seconds = _rounds(options.rounds, resolution_px)
        figures[f"{resolution_px} px"] = seconds
        medians = {way: statistics.median(times) for way, times in seconds.items()}
        ratios[f"{resolution_px} px: bare over loop (bar 0.97)"] = medians["bare"] / medians["loop"]
        for way in list(WAYS)[2:]:
            ratios[f"{resolution_px} px: {way}, over loop"] = medians[way] / medians["loop"]
    save("step", {"user-CPU seconds per step": figures, "ratios": ratios})


def _rounds(count: int, resolution_px: int) -> dict[str, list[float]]:
    """Seconds of a step in every round, by way."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        prepare(Path(scratch), resolution_px)
        steps = WARM_UP + count * STEPS  # in all, so that the loop's schedule is known from the start
        workers = {way: stack.enter_context(_start(way, steps, scratch, resolution_px)) for way in WAYS}
        before = _advance(workers, WARM_UP)
        for _ in range(count):
            # Every round is a figure of its own: the median forgives a round that was disturbed.
            after = _advance(workers, STEPS)
            for way in WAYS:
                seconds[way].append((after[way] - before[way]) / STEPS)
            before = after
    return seconds


def _start(way: str, steps: int, folder: str, resolution_px: int) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "step",
        "--child",
        way,
        str(steps),
        folder,
        str(resolution_px),
    ]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)


def _advance(workers: dict[str, subprocess.Popen], steps: int) -> dict[str, float]:
    """Let every process take this many steps, in turns; the user-CPU seconds that each has used so far."""
    used = {}
    for _ in range(steps):
        for way, worker in workers.items():
            # Waits for the answer: never do two of them compute at once.
            print("step", file=worker.stdin)
            used[way] = float(worker.stdout.readline())
    return used


def prepare(folder: Path, resolution_px: int) -> None:
    """A base model with the mid-size U-Net and random weights, demo pictures, and their cache."""
    # The tiny model's other parts fit: what conditions the U-Net has their widths.
    shutil.copytree(TINY, folder / "base", ignore=shutil.ignore_patterns("*.py", "__pycache__", "unet"))
    torch.manual_seed(0)
    shape = UNet2DConditionModel.load_config(TINY, subfolder="unet")
    unet = UNet2DConditionModel.from_config(shape | MID)
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    print(f"{parameters / 1e6:.1f} M parameters", file=sys.stderr)
    unet.save_pretrained(folder / "base" / "unet")
    draw_demo_data(folder / "data", resolution_px)
    stages.precompute(_config("loop", 1, folder, resolution_px))


def _take_turns(way: str, steps: int, folder: Path, resolution_px: int) -> None:
    """Take a step for each line of input, and print the user-CPU seconds of this process."""
    torch.set_num_threads(1)
    config = _config(way, steps, folder, resolution_px)
    answers = sys.stdout
    # Answers are read from stdout, where the progress line would be among them.
    with redirect_stdout(sys.stderr):
        steps_taken = _bare_steps(config) if way == "bare" else stages.train(config)
        for _ in zip(sys.stdin, steps_taken, strict=False):
            print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, file=answers, flush=True)


def _bare_steps(config: RunConfig) -> Iterator[None]:
    """Forward, backward and update on one batch again and again: what no loop can do without."""
    run = stages.prepare_training(config)
    optimizer = new_optimizer(run.unet, config.train)
    # Read once: no reading, no noise, no clipping, no log.
    batch = read_batch(run, 0, list(range(config.train.train_batch_size)))
    while True:
        training_losses(run.unet, batch, run.schedule, config.train).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def _config(way: str, steps: int, folder: Path, resolution_px: int) -> RunConfig:
    settings = {
        "pretrained_model_name_or_path": str(folder / "base"),
        "train_data_dir": folder / "data",
        "precompute_dir": folder / "cache",
        "output_dir": folder / way.replace(", ", "-").replace(" ", "-"),
        "resolution": resolution_px,
        "max_train_steps": steps,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "rank": 8,
        "target_modules": "attn",  # what all of them adapt
        "gradient_checkpointing": "none",
    }
    return load_config(None, settings | WAYS[way])
