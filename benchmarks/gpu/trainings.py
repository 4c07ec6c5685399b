"""Short trainings of the tiny SDXL by the product itself: does it learn, repeat, resume and give back?"""

import gc
import hashlib
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.device import Settings, facts
from benchmarks.gpu.smoke import FIRST, Check
from lora_utils import stages
from lora_utils.config.loading import load_config
from lora_utils.config.schema import RunConfig
from lora_utils.storage.log import WEIGHTS_NAME, read_summary
from lora_utils.system.device import MachineError
from lora_utils.system.device_memory import free_memory
from lora_utils.tiny.demo_data import draw_demo_data

PICTURES = 8
STEPS = 4
CUT_AT = 2  # steps, of a run that is resumed
CROWDED_STEPS = 3
CROWD = 8  # pictures at a time, so that what a step keeps is most of what it takes
SHARE_LEFT = 0.5  # of what a step takes on top of what stays, for the full card
DIGITS = 5  # of a loss
HASH_LENGTH = 12
SETTINGS: dict[str, Any] = {
    "pretrained_model_name_or_path": str(Path(stages.__file__).parent / "tiny"),
    "resolution": 64,
    "validation_split": 0.0,
    "max_train_steps": STEPS,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-3,
    "rank": 16,
    "target_modules": ["attn"],
    "mixed_precision": "fp16",
    "resume_from_checkpoint": "none",
    "prompt": ["a red circle on a blue background", "a yellow star on a purple background"],
    "num_inference_steps": 4,
    "guidance_scale": 4.0,
}


def card_facts(check: Check, settings: Settings) -> dict[str, Any]:
    """What is here: card, versions, bitsandbytes' library, and what is free."""
    import bitsandbytes.cextension

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "bnb": type(bitsandbytes.cextension.lib).__name__,
        **facts(),
    }
    if torch.cuda.is_available():
        found["sm"] = list(torch.cuda.get_device_capability())
        found["architectures"] = torch.cuda.get_arch_list()
    return found


def training(check: Check, settings: Settings) -> dict[str, Any]:
    """A run from the start: losses, memory, and a hash of what it made; or why this card is refused it."""
    try:
        return _trained(_config(check.name, settings, **check.changes))
    except MachineError as error:
        return {"refused": str(error)}


def resumed(check: Check, settings: Settings) -> dict[str, Any]:
    """The same run, stopped in the middle and taken up again."""
    _trained(_config(check.name, settings, max_train_steps=CUT_AT))
    return _trained(_config(check.name, settings, resume_from_checkpoint="latest"))


def compare(check: Check, settings: Settings) -> dict[str, Any]:
    """Pictures of base and LoRA, by how much their pixels vary: a broken one is even."""
    config = _config(FIRST, settings, resume_from_checkpoint="latest")
    for _ in stages.train(config):  # where it is there already, that takes no step
        pass
    drawn = stages.compare(config)
    return {
        "std": [round(float(np.asarray(image).std()), 1) for image in (*drawn.baseline, *drawn.finetuned)]
    }


def left_behind(check: Check, settings: Settings) -> dict[str, Any]:
    """MiB of tensors before a run, after it, and after Python's collector came."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    _trained(_config(check.name, settings))
    after = torch.cuda.memory_allocated()
    gc.collect()
    return {
        "before_mib": before / 2**20,
        "after_mib": after / 2**20,
        "after_collect_mib": torch.cuda.memory_allocated() / 2**20,
    }


def full_card(check: Check, settings: Settings) -> dict[str, Any]:
    """A run that has half of what its steps took, from the second one on: it has to recompute, and go on."""
    changes = {"train_batch_size": CROWD, "gradient_accumulation_steps": 1, "vram_gib": 8.0}
    changes["max_train_steps"] = CROWDED_STEPS
    roomy = _trained(_config(f"{check.name}, with room", settings, **changes))

    config = _config(check.name, settings, **changes)
    running = stages.train(config)
    losses = [report.loss for report in islice(running, 1)]
    failures = _failures()
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        free_memory()
        stays = torch.cuda.memory_allocated()
        cap = torch.cuda.memory_reserved() + SHARE_LEFT * (peak - stays)
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
    losses += [report.loss for report in running]  # at its end the product lifts the cap again
    return {
        "losses": losses,
        "with_room": roomy["losses"],
        "failures": _failures() - failures,
        "plan": read_summary(config.paths.run_folder).get("recompute"),
    }


def _failures() -> int:
    """How often memory could not be had in this process."""
    return torch.cuda.memory_stats().get("num_ooms", 0) if torch.cuda.is_available() else 0


def _config(name: str, settings: Settings, **changes: Any) -> RunConfig:
    """Of a run in a folder of its own, which is emptied where nothing is to be resumed."""
    work = Path(settings.work)
    chosen = SETTINGS | {"train_data_dir": _pictures(work), "precompute_dir": work / "cache"} | changes
    if settings.device.type == "cpu" and "mixed_precision" not in changes:
        chosen["mixed_precision"] = "fp32"  # fp16 takes a CPU ten times as long
    if settings.vram_gib:
        chosen.setdefault("vram_gib", settings.vram_gib)
    folder = work / "".join(letter if letter.isalnum() else "_" for letter in name)
    if chosen["resume_from_checkpoint"] == "none":
        shutil.rmtree(folder, ignore_errors=True)
    return load_config(None, chosen | {"output_dir": folder})


def _pictures(work: Path) -> Path:
    folder = work / "pictures"
    if not folder.exists():
        draw_demo_data(work / "demo", 64)
        drawn = sorted((work / "demo").iterdir())[: 2 * PICTURES]  # each with its caption
        folder.mkdir()
        for file in drawn:
            shutil.copy(file, folder)
    return folder


def _trained(config: RunConfig) -> dict[str, Any]:
    reports = list(stages.train(config))
    folder = config.paths.run_folder
    peaks = [report.peak_memory_gib for report in reports if report.peak_memory_gib is not None]
    digest = hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()
    return {
        "losses": [round(report.loss, DIGITS) for report in reports],
        "peak_gib": max(peaks, default=None),
        "forecast_gib": read_summary(folder).get("forecast_memory_gib"),
        "bytes": digest[:HASH_LENGTH],
    }
