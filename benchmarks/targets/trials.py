"""One training run on the tiny SDXL, with its judgement."""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging

from benchmarks.targets.ways import EVERY_WAY
from lora_utils import UserError, stages
from lora_utils.config.loading import find_config, load_config
from lora_utils.config.schema import RunConfig
from lora_utils.tiny.demo_data import Content
from lora_utils.tiny.evaluate import FOLDER, LORA_GUIDANCE, draw, judge_content, prompts_for

PROMPTS = 50
"""Unseen ones, that a trial is judged by."""
WARM_UP_SHARE = 0.05


@dataclass(frozen=True)
class Trial:
    """What decides a run, apart from the preset ``tiny``."""

    way: str
    content: Content
    seed: int
    steps: int
    learning_rate: float
    rank: int = 16
    alpha_ratio: float = 1.0
    """lora_alpha / rank."""
    caption_dropout_rate: float = 0.3
    is_judged: bool = True
    """Whether pictures are drawn; for tuning the held-out loss is enough."""

    @property
    def key(self) -> str:
        """Names it in the result file, and on one line to a reader."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


def settings(trial: Trial, work: Path, run: Path) -> RunConfig:
    """The run of a trial.

    Args:
        trial: What to train.
        work: With data sets in folders named by their content; the cache in it serves all trials.
        run: Where checkpoints and the LoRA go.
    """
    changes = {
        "train_data_dir": work / trial.content,
        "precompute_dir": work / "cache",
        "output_dir": run,
        "target_modules": _layers_of(trial.way),
        "rank": trial.rank,
        "conv_rank": EVERY_WAY[trial.way].conv_rank(trial.rank),
        "lora_alpha": trial.rank * trial.alpha_ratio,
        "seed": trial.seed,
        "max_train_steps": trial.steps,
        "lr_warmup_steps": round(WARM_UP_SHARE * trial.steps),
        "learning_rate": trial.learning_rate,
        "caption_dropout_rate": trial.caption_dropout_rate,
        "validation_steps": trial.steps,
        "resume_from_checkpoint": "none",
    }
    return load_config(find_config("tiny"), changes)


def digest_of(trial: Trial) -> str:
    """Of all that the preset and the trial say of data, adapter and training, where they say anything."""
    config = settings(trial, Path("work"), Path("run"))
    sections = (config.data, config.lora, config.train)
    named = [section.model_dump_json(exclude_unset=True, exclude={"train_data_dir"}) for section in sections]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()[:16]


def carry_out(trial: Trial, work: Path) -> dict[str, Any]:
    """Train, measure, and draw what nobody trained on.

    Args:
        trial: What to train.
        work: As for ``settings``; the run's own folder is made in it, and deleted.

    Returns:
        status, "finished" or why there is no more than it; held_out_loss before and after;
        step_cpu_seconds, the median of all steps but the first and the measured last; shares by name.
    """
    torch.set_num_threads(1)
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    with TemporaryDirectory(dir=work) as run:
        try:
            figures = _train(settings(trial, work, Path(run)))
        except UserError as error:  # a rate too high for a way is a result
            return {"status": f"{type(error).__name__}: {error}"}
        if trial.is_judged:
            figures |= _judge(trial.content, Path(run))
    return {"status": "finished"} | figures


def _train(config: RunConfig) -> dict[str, float]:
    step_seconds = []
    began = time.process_time()
    for _ in stages.train(config):
        now = time.process_time()
        step_seconds.append(now - began)
        began = now
    summary = json.loads((config.paths.run_folder / "summary.json").read_text())
    figures = {name: summary[name] for name in ("held_out_loss_before", "held_out_loss")}
    return figures | {"step_cpu_seconds": round(median(step_seconds[1:-1]), 4)}


def _judge(content: Content, run: Path) -> dict[str, float]:
    pipeline = StableDiffusionXLPipeline.from_pretrained(FOLDER).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(run, weight_name="pytorch_lora_weights.safetensors")
    scenes = prompts_for(content, PROMPTS)
    return judge_content(draw(pipeline, scenes, LORA_GUIDANCE), scenes, content)


@cache
def _layers_of(way: str) -> list[str]:
    unet_config = UNet2DConditionModel.load_config(FOLDER, subfolder="unet")
    with torch.device("meta"):
        return EVERY_WAY[way].layers(UNet2DConditionModel.from_config(unet_config))
