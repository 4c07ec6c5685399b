"""One training run on the tiny SDXL, with its judgement."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging

from benchmarks.targets.ways import EVERY_WAY
from lora_utils import stages
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
    way = EVERY_WAY[trial.way]
    unet_config = UNet2DConditionModel.load_config(FOLDER, subfolder="unet")
    with torch.device("meta"):
        layers = way.layers(UNet2DConditionModel.from_config(unet_config))
    changes = {
        "train_data_dir": work / trial.content,
        "precompute_dir": work / "cache",
        "output_dir": run,
        "target_modules": layers,
        "rank": trial.rank,
        "conv_rank": way.conv_rank(trial.rank),
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


def carry_out(trial: Trial, work: Path, run: Path) -> dict[str, Any]:
    """Train, measure, and draw what nobody trained on.

    Returns:
        held_out_loss before and after, cpu_seconds of the training stage, and shares by name.
    """
    torch.set_num_threads(1)
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    config = settings(trial, work, run)
    began = time.process_time()
    for _ in stages.train(config):
        pass
    figures: dict[str, Any] = {"cpu_seconds": round(time.process_time() - began, 1)}
    summary = json.loads((run / "summary.json").read_text())
    figures |= {name: summary[name] for name in ("held_out_loss_before", "held_out_loss")}
    if trial.is_judged:
        pipeline = StableDiffusionXLPipeline.from_pretrained(FOLDER).to(torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_lora_weights(run, weight_name="pytorch_lora_weights.safetensors")
        scenes = prompts_for(trial.content, PROMPTS)
        figures |= judge_content(draw(pipeline, scenes, LORA_GUIDANCE), scenes, trial.content)
    return figures
