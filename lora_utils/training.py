"""The training loop: precomputed examples in, a better adapter out."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from torch import Tensor

from lora_utils import UserError, diffusion
from lora_utils.config import TrainConfig
from lora_utils.denoising import Batch, Example, collate, denoising_errors, visit
from lora_utils.memory import peak_memory_gib
from lora_utils.sdxl import NoiseSchedule


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


def count_steps(config: TrainConfig, examples: int, processes: int = 1) -> int:
    """Optimiser updates in a run: max_train_steps, or enough for num_train_epochs over the examples."""
    per_step = config.train_batch_size * config.gradient_accumulation_steps * processes
    return config.max_train_steps or math.ceil(config.num_train_epochs * examples / per_step)


def train_steps(
    unet: UNet2DConditionModel,
    examples: Sequence[Example],
    schedule: NoiseSchedule,
    config: TrainConfig,
    accelerator: Accelerator,
) -> Iterator[StepReport]:
    """Update the adapter, yielding a report after each step. A generator: the caller plots, saves or stops.

    Everything random is a function of the seed and of the count of visits, so equal seeds give equal runs however
    visits are cut into micro-batches.

    Args:
        unet: With adapter, trainable parameters fp32, prepared by the accelerator.
        examples: Moments, time_ids, prompt_embeds, pooled_prompt_embeds, read on access.
        schedule: Of the base model.
        config: Loop settings; ``gradient_accumulation_steps`` must be the accelerator's.
        accelerator: Device, mixed precision, processes.

    Raises:
        DivergenceError: The loss became NaN or infinite.
    """
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    steps = count_steps(config, len(examples), accelerator.num_processes)
    optimizer = _new_optimizer(parameters, config)
    # Not prepared: accelerate would step it once per process.
    lr_scheduler = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=steps
    )
    prepared = accelerator.prepare_optimizer(optimizer)
    grad_norm = 0.0
    for step in range(1, steps + 1):
        started = time.monotonic()
        learning_rate = float(lr_scheduler.get_last_lr()[0])
        losses = []
        for micro_batch in range(config.gradient_accumulation_steps):
            with accelerator.accumulate(unet):
                count = (step - 1) * config.gradient_accumulation_steps + micro_batch
                loss = _micro_batch_loss(unet, examples, schedule, config, accelerator, count)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = float(accelerator.clip_grad_norm_(parameters, config.max_grad_norm))
                prepared.step()
                prepared.zero_grad()
                losses.append(loss.detach())
        lr_scheduler.step()
        mean_loss = float(accelerator.reduce(torch.stack(losses).mean(), "mean"))
        if not math.isfinite(mean_loss):
            raise DivergenceError(f"step {step}: the loss is {mean_loss}; try a lower learning_rate")
        yield StepReport(
            step,
            mean_loss,
            learning_rate,
            grad_norm,
            step_seconds=time.monotonic() - started,
            peak_memory_gib=peak_memory_gib(),
        )


def _micro_batch_loss(
    unet: UNet2DConditionModel,
    examples: Sequence[Example],
    schedule: NoiseSchedule,
    config: TrainConfig,
    accelerator: Accelerator,
    count: int,
) -> Tensor:
    size = config.train_batch_size
    first = (count * accelerator.num_processes + accelerator.process_index) * size
    visits = [_visit_number(examples, schedule, config.seed, first + place) for place in range(size)]
    batch = collate(visits).to(accelerator.device)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(diffusion.derived_seed(config.seed, first, 1))  # LoRA dropout draws from global state
        errors = denoising_errors(unet, batch, schedule)
    return (errors * _weights(batch, schedule, config.snr_gamma)).mean()


def _visit_number(examples: Sequence[Example], schedule: NoiseSchedule, seed: int, number: int) -> Batch:
    epoch, place = divmod(number, len(examples))
    example = examples[int(diffusion.data_order(seed, epoch, len(examples))[place])]
    return visit(example, diffusion.visit_generator(seed, number), schedule)


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
