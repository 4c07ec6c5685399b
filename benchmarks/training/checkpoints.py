"""What a checkpoint costs beside the steps between two of them, by the preset ``t4``.

``python -m benchmarks checkpoints``; CPU and disk, SDXL's own shapes. Committing and pruning are timed here;
the steps between two checkpoints are the forecast's for a T4.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from benchmarks.record import save
from lora_utils.config.loading import find_config, load_config
from lora_utils.memory.cards import T4
from lora_utils.memory.forecast import forecast
from lora_utils.model.architectures import find_architecture
from lora_utils.model.lora import add_lora
from lora_utils.storage.checkpoint import newest_checkpoint, prune_checkpoints, write_checkpoint

CONFIG = find_config("t4")
MIB = 2**20


def main() -> None:
    """Time checkpoints of random tensors in the adapter's shapes, with AdamW's states."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where to write; a folder for temporary files when not given"
    )
    options = parser.parse_args()

    config = load_config(CONFIG, {"train_data_dir": "."})
    state = _state(config)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        written = [
            _timed(lambda step=step: _write(Path(scratch), state, step))
            for step in range(options.checkpoints)
        ]
        reading = _timed(lambda: newest_checkpoint(Path(scratch)))
        size_bytes = sum(path.stat().st_size for path in next(Path(scratch).iterdir()).iterdir())

    saving = statistics.median(written)
    step_seconds = forecast(config, T4).stages["train"].seconds
    between = 60 * (config.checkpoint.checkpointing_minutes or 0)
    figures = {
        "checkpoint MiB": size_bytes / MIB,
        "save and prune, seconds (median)": saving,
        "save and prune, seconds (each)": written,
        "find, check and read, seconds": reading,
        "T4 step, seconds (forecast)": step_seconds,
        "steps between two checkpoints": between / step_seconds,
        "saving over the steps between, % (bar 2)": 100 * saving / between,
    }
    save("checkpoints", figures)


def _state(config: Any) -> dict[str, Any]:
    """A state as a trainer's, with random numbers: zeros would be stored by some file systems as holes."""
    shape = find_architecture(config.model, None)
    with torch.device("meta"):  # only shapes are needed, and the U-Net would take 10 GB
        unet = UNet2DConditionModel.from_config(shape.unet)
        add_lora(unet, config.lora, 0)

    adapter = {}
    moments = {}
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad:
            moments[len(adapter)] = {  # by the parameter's number, as torch's optimisers have it
                "step": torch.tensor(1.0),
                "exp_avg": torch.randn(parameter.shape),
                "exp_avg_sq": torch.rand(parameter.shape),
            }
            adapter[name] = torch.randn(parameter.shape)
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(moments)}]}
    return {
        "adapter": adapter,
        "average": {},
        "optimizer": optimizer,
        "scaler": {},
        "skipped": 0,
        "micro_batches": 0,
    }


def _write(folder: Path, state: dict[str, Any], step: int) -> None:
    write_checkpoint(folder, state | {"step": step}, {}, b"")
    prune_checkpoints(folder, 2)


def _timed(work: Any) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started
