"""The training loop: precomputed examples in, a better adapter out."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from lora_utils import UserError, diffusion
from lora_utils.denoising import Batch, collate, denoising_errors, visit
from lora_utils.memory import peak_memory_gib
from lora_utils.schema import TrainConfig
from lora_utils.sdxl import NoiseSchedule
from lora_utils.visits import CachedExamples, Record, micro_batches


@dataclass(frozen=True)
class StepReport:
    """What one optimiser update has to say. Equal runs give equal reports: times and memory are not compared."""

    step: int
    loss: float
    """Mean over the step's examples, weighted by min-SNR if that is on."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    held_out_loss: float | None = None
    """Unweighted, on fixed noise and timesteps; at step 0 and every validation_steps."""
    step_seconds: float = field(default=0.0, compare=False)
    peak_memory_gib: float | None = field(default=None, compare=False)


class DivergenceError(UserError):
    """The loss is no longer finite."""


@dataclass(frozen=True)
class TrainingRun:
    """Everything that the loop works on."""

    unet: UNet2DConditionModel
    """With adapter, trainable parameters fp32, prepared by the accelerator."""
    examples: CachedExamples
    """What is learned from."""
    unconditional: Record
    """prompt_embeds and pooled_prompt_embeds of no caption."""
    caption_dropout_rate: float
    """Share of visits that see no caption."""
    latent_mode: Literal["sample", "mean"]
    """Fresh latents on every visit, or the posterior's mean."""
    schedule: NoiseSchedule
    """Of the base model."""
    config: TrainConfig
    accelerator: Accelerator
    """Device, mixed precision, processes; its accumulation must be the config's."""

    @property
    def steps(self) -> int:
        """Optimiser updates in all."""
        visits = sum(entry.repeats for entry in self.examples.entries)
        return self.config.total_steps(visits, self.accelerator.num_processes)


def train_steps(run: TrainingRun) -> Iterator[StepReport]:
    """Update the adapter, yielding a report after each step. A generator: the caller plots, saves or stops.

    Everything random is a function of the seed and of the count of visits, so equal seeds give equal runs however
    visits are cut into micro-batches.

    Raises:
        DivergenceError: The loss became NaN or infinite.
    """
    config, accelerator = run.config, run.accelerator
    parameters = [parameter for parameter in run.unet.parameters() if parameter.requires_grad]
    raw_optimizer = _new_optimizer(parameters, config)
    lr_scheduler = _new_lr_scheduler(raw_optimizer, config, run.steps)
    optimizer = accelerator.prepare_optimizer(raw_optimizer)
    order = micro_batches(run.examples.entries, config.train_batch_size * accelerator.num_processes, config.seed)
    for step in range(1, run.steps + 1):
        started = time.monotonic()
        learning_rate, losses, grad_norm = float(lr_scheduler.get_last_lr()[0]), [], 0.0
        for micro_batch in range(config.gradient_accumulation_steps):
            with accelerator.accumulate(run.unet):
                count = (step - 1) * config.gradient_accumulation_steps + micro_batch
                loss = _micro_batch_loss(run, next(order), count)
                accelerator.backward(loss)
                losses.append(loss.detach())
                if accelerator.sync_gradients:
                    grad_norm = float(accelerator.clip_grad_norm_(parameters, config.max_grad_norm))
                optimizer.step()
                optimizer.zero_grad()
        lr_scheduler.step()
        loss = float(accelerator.reduce(torch.stack(losses).mean(), "mean"))
        if not math.isfinite(loss):
            raise DivergenceError(f"step {step}: the loss is {loss}; try a lower learning_rate")
        seconds = time.monotonic() - started
        yield StepReport(step, loss, learning_rate, grad_norm, None, seconds, peak_memory_gib())


def _micro_batch_loss(run: TrainingRun, numbers: list[int], count: int) -> Tensor:
    size, accelerator = run.config.train_batch_size, run.accelerator
    mine = accelerator.process_index * size
    first = count * len(numbers) + mine
    visits = [_visit_number(run, first + place, numbers[mine + place]) for place in range(size)]
    batch = collate(visits).to(accelerator.device)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(diffusion.derived_seed(run.config.seed, first, 1))  # LoRA dropout draws from global state
        errors = denoising_errors(run.unet, batch, run.schedule)
    return (errors * _weights(batch, run.schedule, run.config.snr_gamma)).mean()


def _visit_number(run: TrainingRun, visit_number: int, example_number: int) -> Batch:
    generator = diffusion.visit_generator(run.config.seed, visit_number)
    dropped = torch.rand((), generator=generator) < run.caption_dropout_rate
    example = run.examples.draw(example_number, generator)
    if dropped:
        example = example | run.unconditional
    return visit(example, generator, run.schedule, latent_mode=run.latent_mode)


def _weights(batch: Batch, schedule: NoiseSchedule, snr_gamma: float | None) -> Tensor:
    if snr_gamma is None:
        return torch.ones_like(batch.timesteps, dtype=torch.float32)
    snr = diffusion.signal_to_noise(batch.timesteps, schedule.alphas_cumprod.to(batch.timesteps.device))
    return diffusion.min_snr_weights(snr, snr_gamma, schedule.prediction_type)


def _new_optimizer(parameters: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    settings = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if not config.use_8bit_adam:
        return torch.optim.AdamW(parameters, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "use_8bit_adam needs bitsandbytes: pip install bitsandbytes, or set use_8bit_adam=false"
        ) from error
    return AdamW8bit(parameters, **settings)


def _new_lr_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> LRScheduler:
    """One call of its ``step`` per update. Never prepared: accelerate would step it once per process."""
    # diffusers' plain "constant" ignores warm-up without a word.
    warm = config.lr_scheduler == "constant" and config.lr_warmup_steps > 0
    name = "constant_with_warmup" if warm else config.lr_scheduler
    return get_scheduler(name, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=steps)
