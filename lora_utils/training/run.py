"""One training run, put together: examples, base model, adapter, precision."""

import logging
import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from lora_utils.config.schema import RunConfig
from lora_utils.config.section import Size
from lora_utils.config.training import TrainConfig
from lora_utils.memory.cards import T4, card_here
from lora_utils.memory.forecast import Forecast, forecast
from lora_utils.memory.simulation import SimulationError
from lora_utils.model.base import NoiseSchedule, PretrainedSdxl
from lora_utils.precompute.examples import CachedExamples, Record
from lora_utils.precompute.fill import Precomputed
from lora_utils.storage.identity import data_digest
from lora_utils.system.device import Precision
from lora_utils.system.device_memory import cap_memory, forget_peak_memory, free_memory
from lora_utils.training.objective import training_schedule
from lora_utils.training.unet import PlannedUnet
from lora_utils.training.validation import HeldOutLoss

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingRun:
    """Everything that the loop works on. Only the weights change, and the plan of what is recomputed."""

    config: TrainConfig
    accelerator: Accelerator
    """Device and processes; precision and accumulation are the loop's."""
    precision: Precision
    """What the U-Net computes in; fp16 gets a scaled loss."""
    planned: PlannedUnet
    """The U-Net with its adapter, and what its backward pass recomputes."""
    unet: UNet2DConditionModel
    """The same U-Net, prepared by the accelerator; trainable parameters are fp32."""
    schedule: NoiseSchedule
    """The base model's, as training uses it."""
    examples: CachedExamples
    """What is learned from."""
    held_out: HeldOutLoss | None
    """What is measured on; None where nothing is held out."""
    unconditional: Record
    """prompt_embeds and pooled_prompt_embeds of no caption."""
    caption_dropout_rate: float
    """Share of visits that see no caption."""
    latent_mode: Literal["sample", "mean"]
    """Fresh latents on every visit, or the posterior's mean."""
    steps: int
    """Optimiser updates in all."""
    visits_per_epoch: int
    """Looks at examples that an epoch has."""
    identity: dict[str, str]
    """base and data: what identifies the base's weights and the examples."""
    started: float
    """``time.monotonic`` when the stage began."""

    @property
    def bare_unet(self) -> UNet2DConditionModel:
        """The U-Net not wrapped for several processes."""
        return self.planned.unet

    def autocast(self) -> AbstractContextManager[object]:
        """What forward passes run in: nothing where the lean step fits all dtypes by itself."""
        if self.config.lean_step or self.precision.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, self.precision.dtype)

    def measure(self) -> float:
        """The held-out loss of the U-Net as it is; only where something is held out."""
        assert self.held_out is not None
        # In the training's own precision, so that it measures the model that is trained.
        with self.autocast():
            loss = self.held_out.measure(self.unet, self.accelerator.device)
        forget_peak_memory()  # peaks are told of steps, and correct their plan
        return loss

    def facts(self) -> dict[str, Any]:
        """What the run's summary says of it."""
        in_full = self.planned.left_in_full
        return {
            "max_train_steps": self.steps,
            "training_examples": len(self.examples),
            "held_out_examples": len(self.held_out) if self.held_out else 0,
            "mixed_precision": self.precision.name,
            "device": str(self.accelerator.device),
            "forecast_memory_gib": self.planned.forecast_gib,
            "left_in_full": str(in_full) if in_full else None,
        }


def prepare(
    config: RunConfig,
    base: PretrainedSdxl,
    precomputed: Precomputed,
    accelerator: Accelerator,
    precision: Precision,
    started: float | None = None,
) -> TrainingRun:
    """Load and plan the U-Net for the examples in the cache.

    Args:
        config: The whole of it, which the forecast of a step needs.
        base: Where the U-Net comes from.
        precomputed: The cache, filled.
        accelerator: Device and processes.
        precision: What the U-Net computes in.
        started: ``time.monotonic`` when the stage began; now, when not given.

    Raises:
        UserError: The base model or a setting cannot be used.
    """
    free_memory()  # of runs before this one in the same process: what is free decides the plan

    entries = precomputed.entries
    # Both read the same cache; an image is in one of them, whatever its captions and crops.
    examples = CachedExamples(precomputed.cache, [entry for entry in entries if not entry.held_out])
    held_out = CachedExamples(precomputed.cache, [entry for entry in entries if entry.held_out])
    schedule = training_schedule(base.load_noise_schedule(), config.train).to(accelerator.device)

    shapes = Counter(entry.size for entry in examples.entries)
    expected = _forecast(config, shapes, precision, accelerator)
    if expected is not None:
        cap_memory(expected.budget_gib)
    planned = PlannedUnet(base, config.lora, config.train, precision, accelerator.device, expected)
    # Counted once: with 100,000 examples the sum takes longer than a step's bookkeeping.
    visits_per_epoch = sum(entry.repeats for entry in examples.entries)
    return TrainingRun(
        config=config.train,
        accelerator=accelerator,
        precision=precision,
        planned=planned,
        # It would keep the U-Net beyond the run, and has nothing to do for a single process.
        unet=accelerator.prepare_model(planned.unet) if accelerator.num_processes > 1 else planned.unet,
        schedule=schedule,
        examples=examples,
        held_out=HeldOutLoss(held_out, schedule, config.train.train_batch_size) if held_out else None,
        unconditional=precomputed.cache.read(precomputed.unconditional_key),
        caption_dropout_rate=config.data.caption_dropout_rate,
        latent_mode=config.data.latent_mode,
        steps=config.train.total_steps(visits_per_epoch, accelerator.num_processes),
        visits_per_epoch=visits_per_epoch,
        identity={
            "base": base.unet_identity(),
            "data": data_digest(entries, precomputed.unconditional_key),
        },
        started=time.monotonic() if started is None else started,
    )


def _forecast(
    config: RunConfig, shapes: Counter[Size], precision: Precision, accelerator: Accelerator
) -> Forecast | None:
    """A step's forecast on the card here; None on a CPU, which has memory enough to recompute nothing.

    None also where this torch cannot be simulated, which is told.
    """
    if accelerator.device.type == "cuda":
        card = card_here(precision.dtype)
    elif config.train.vram_gib is not None:  # a budget without a card: as if there were a T4 with so much
        card = T4
    else:
        return None
    try:
        return forecast(config, card, shapes, precision)
    except SimulationError as error:
        LOGGER.warning("%s", error)
        return None
