"""One training run, put together: examples, base model, adapter, precision."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from lora_utils.config.schema import RunConfig
from lora_utils.config.training import TrainConfig
from lora_utils.model.base import NoiseSchedule, PretrainedSdxl
from lora_utils.precompute.examples import CachedExamples, Record
from lora_utils.precompute.fill import Precomputed
from lora_utils.storage.identity import data_digest
from lora_utils.system.device import Precision
from lora_utils.training.objective import training_schedule
from lora_utils.training.unet import PlannedUnet
from lora_utils.training.validation import HeldOutLoss


@dataclass(frozen=True)
class TrainingRun:
    """Everything that the loop works on."""

    unet: UNet2DConditionModel
    """With adapter, trainable parameters fp32, prepared by the accelerator."""
    dtype: torch.dtype
    """What the U-Net computes in; fp16 gets a scaled loss."""
    examples: CachedExamples
    """What is learned from."""
    unconditional: Record
    """prompt_embeds and pooled_prompt_embeds of no caption."""
    caption_dropout_rate: float
    """Share of visits that see no caption."""
    latent_mode: Literal["sample", "mean"]
    """Fresh latents on every visit, or the posterior's mean."""
    schedule: NoiseSchedule
    """Of the base model, as training uses it."""
    config: TrainConfig
    accelerator: Accelerator
    """Device and processes; precision and accumulation are the loop's."""
    make_room: Callable[[], str | None] = lambda: None
    """Called when a step did not fit: recomputes more and says what, or None when nothing is left to recompute."""

    @property
    def bare_unet(self) -> UNet2DConditionModel:
        """Not wrapped for several processes."""
        return self.accelerator.unwrap_model(self.unet)

    @property
    def steps(self) -> int:
        """Optimiser updates in all."""
        visits = sum(entry.repeats for entry in self.examples.entries)
        return self.config.total_steps(visits, self.accelerator.num_processes)

    def autocast(self) -> AbstractContextManager[object]:
        """What forward passes run in: nothing where the lean step fits all dtypes by itself."""
        if self.config.lean_step or self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, self.dtype)


LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start."""

    run: TrainingRun
    fitted: PlannedUnet
    precision: Precision
    held_out: HeldOutLoss | None
    identity: dict[str, str]
    """base and data: what identifies the base's weights and the examples."""
    started: float
    """``time.monotonic`` when the stage began."""

    def measure(self) -> float:
        """The held-out loss of the U-Net as it is."""
        assert self.held_out is not None
        with self.run.autocast():
            return self.held_out.measure(self.run.unet, self.run.accelerator.device)

    def facts(self) -> dict[str, Any]:
        """For the run's summary."""
        run = self.run
        return {
            "max_train_steps": run.steps,
            "training_examples": len(run.examples),
            "held_out_examples": len(self.held_out) if self.held_out else 0,
            "mixed_precision": self.precision.name,
            "device": str(run.accelerator.device),
            "forecast_memory_gib": self.fitted.forecast_gib,
        }


def prepare(
    config: RunConfig,
    found: Precomputed,
    accelerator: Accelerator,
    precision: Precision,
    started: float | None = None,
) -> Prepared:
    """Load and fit the U-Net for the examples in the cache.

    Args:
        config: Of the run.
        found: The cache.
        accelerator: Device and processes.
        precision: What the U-Net computes in.
        started: ``time.monotonic`` when the stage began; now, when not given.

    Raises:
        UserError: The base model or a setting cannot be used.
    """
    examples = CachedExamples(found.cache, [entry for entry in found.entries if not entry.held_out])
    held_out = CachedExamples(found.cache, [entry for entry in found.entries if entry.held_out])
    base = PretrainedSdxl(config.model, config.paths.cache_dir)
    schedule = training_schedule(base.load_noise_schedule(), config.train)
    shapes = Counter(entry.size for entry in examples.entries)
    fitted = PlannedUnet(config, shapes, precision, accelerator.device)
    run = TrainingRun(
        accelerator.prepare_model(fitted.unet),
        precision.dtype,
        examples,
        found.cache.read(found.unconditional_key),
        config.data.caption_dropout_rate,
        config.data.latent_mode,
        schedule,
        config.train,
        accelerator,
        fitted.make_room,
    )
    measured = HeldOutLoss(held_out, schedule) if held_out else None
    identity = {"base": base.unet_identity(), "data": data_digest(found.entries, found.unconditional_key)}
    began = time.monotonic() if started is None else started
    return Prepared(run, fitted, precision, measured, identity, began)
