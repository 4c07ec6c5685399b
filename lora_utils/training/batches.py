"""A micro-batch of a training run: its examples and its loss."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor

from lora_utils import diffusion
from lora_utils.denoising import Batch, collate, training_losses, visit
from lora_utils.schema import TrainConfig
from lora_utils.sdxl import NoiseSchedule
from lora_utils.visits import CachedExamples, Record


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
    def steps(self) -> int:
        """Optimiser updates in all."""
        visits = sum(entry.repeats for entry in self.examples.entries)
        return self.config.total_steps(visits, self.accelerator.num_processes)

    def autocast(self) -> AbstractContextManager[object]:
        """What forward passes run in: nothing where the lean step fits all dtypes by itself."""
        if self.config.lean_step or self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, self.dtype)


def read_batch(run: TrainingRun, first: int, numbers: list[int]) -> Batch:
    """Read and join the share of this process in a micro-batch whose first visit has the given number."""
    size = run.config.train_batch_size
    mine = run.accelerator.process_index * size
    visits = [_visit_number(run, first + place, numbers[place]) for place in range(mine, mine + size)]
    return collate(visits).to(run.accelerator.device)


def batch_loss(run: TrainingRun, batch: Batch, first: int) -> Tensor:
    """The loss of a micro-batch whose first visit has the given number: a scalar, fp32."""
    devices = [run.accelerator.device] if run.accelerator.device.type == "cuda" else []
    mine = run.accelerator.process_index * run.config.train_batch_size
    with torch.random.fork_rng(devices), run.autocast():
        seed = diffusion.derived_seed(run.config.seed, first + mine, 1)
        torch.manual_seed(seed)  # LoRA dropout draws from global state
        return training_losses(run.unet, batch, run.schedule, run.config).mean()


def _visit_number(run: TrainingRun, visit_number: int, example_number: int) -> Batch:
    generator = diffusion.visit_generator(run.config.seed, visit_number)
    dropped = torch.rand((), generator=generator) < run.caption_dropout_rate
    example = run.examples.draw(example_number, generator)
    if dropped:
        example = example | run.unconditional
    return visit(example, generator, run.schedule, latent_mode=run.latent_mode, config=run.config)
